"""The training loop: updates, epochs, checkpoints, evaluation, and stopping in good order.

There is one loop for every task: an objective gives the loss of a batch, and an evaluation says how good a network is.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from timm.utils import distribute_bn
from torch import Tensor

from dg_timm._errors import BadState, BadValue, UserError
from dg_timm.training.data.loader import Loader
from dg_timm.training.data.samplers import Position
from dg_timm.training.loop.checkpoints import Checkpoints
from dg_timm.training.loop.config import Callbacks, Interrupted, NonFiniteLoss, TrainerConfig
from dg_timm.training.loop.distributed import Processes
from dg_timm.training.loop.learner import Learner, has_finite_weights, set_train_mode
from dg_timm.training.loop.objective import Losses
from dg_timm.training.loop.progress import Progress
from dg_timm.training.loop.report import Report, Row
from dg_timm.training.loop.statistics import RunningStats, UpdateStats, masked_sums


class Trainer:
    """Train a prepared model.

    Args:
        config: how to train.
        processes: what this process shares with the others.
        learner: network, optimizer, schedule and average.
        loader: training batches of this process.
        objective: (model, batch, *entropy) -> :class:`dg_timm.training.loop.objective.Losses`.
        checkpoints: where the run is saved.
        report: where the run is told.
        callbacks: evaluation, and what goes with it.
    """

    def __init__(
        self,
        config: TrainerConfig,
        processes: Processes,
        learner: Learner,
        loader: Loader,
        objective: Callable[..., Losses],
        checkpoints: Checkpoints,
        report: Report,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.learner, self.loader, self.objective = config, learner, loader, objective
        self.accelerator, self.all_reduce, self.interrupt = processes
        self.checkpoints, self.report, self.callbacks = checkpoints, report, callbacks
        self.progress, self.stats = Progress(), RunningStats()
        self._must_stop = False
        self._skipped_before = 0  # unreadable images, over all processes, before a resume
        checkpoints.states |= {"schedule": learner.schedule, "progress": self.progress}

    def resume(self, place: Path) -> Position | None:
        """Go back to a checkpoint; return the position to give to :meth:`run`."""
        position = self.checkpoints.load(place)
        self.checkpoints.best = self.progress.best.checkpoint or None
        self._skipped_before = self.progress.skipped
        self.report.resume(self.progress.evaluated, self.progress.update)
        return position

    @property
    def is_trained(self) -> bool:
        """Whether nothing is left to train; a checkpoint of the last epoch is evaluated once more."""
        return self.progress.epoch >= self.config.epochs

    def run(self, position: Position | None = None) -> None:
        """Train to the end.

        Raises:
            Interrupted: after a signal, once the run is saved.
            NonFiniteLoss: naming the update and its learning rate.
            BadState: if a checkpoint can't be written.
            BadValue: if there is no image to train on.
        """
        progress = self.progress
        while True:
            if progress.evaluated < progress.epoch:
                self._evaluate()
            if progress.epoch >= self.config.epochs or self._is_stale():
                break
            self._train_epoch(position)
            position = None

    def _is_stale(self) -> bool:
        waited, patience = self.progress.epoch - self.progress.best.epoch, self.config.patience
        if patience is None or waited < patience or self.progress.epoch == 0:
            return False
        self.report.line(f"no better evaluation in {waited} epochs (--patience {patience}): stopping early")
        return True

    def _train_epoch(self, position: Position | None) -> None:
        progress, config = self.progress, self.config
        if position is None:
            progress.start_epoch()
        self.callbacks.on_epoch(progress.epoch)
        set_train_mode(self.learner.network, config.fixed_norms)
        before = progress.epoch * config.updates_per_epoch
        total = min(config.updates_per_epoch, (config.updates or math.inf) - before)
        self._train_updates(self.loader.epoch(progress.epoch, position), total, progress.update - before)
        if progress.sums.images == 0:
            raise BadValue("the training split has no images (that can be read)")
        if progress.update != before + total:
            self.report.line(
                f"epoch {progress.epoch + 1} ended at update {progress.update}, not at {before + total}: "
                "the schedule is off; set --epoch-size to the number of rows of the stream"
            )
        if self.accelerator.num_processes > 1:
            for network in self.checkpoints.networks.values():
                distribute_bn(network, self.accelerator.num_processes, config.dist_bn == "reduce")
        progress.epoch += 1
        self._save(end_of_epoch=True)

    def _train_updates(self, batches: Iterator[Any], total: float, done: int) -> None:
        """Train on the rest of an epoch of ``total`` updates, of which ``done`` were made before."""
        progress, config = self.progress, self.config
        title = f"epoch {progress.epoch + 1}/{config.epochs}"
        self.stats.restart_clock()
        with tqdm(total=total, initial=min(done, total), desc=title, unit="update", mininterval=1, leave=False) as bar:
            while progress.update != config.updates and self.update(batches):
                bar.update()
                if progress.update % config.log_every == 0:
                    self.flush_stats(bar)
                if self._must_stop:
                    raise Interrupted(self._signal, self._save())
                if config.save_every and progress.update % config.save_every == 0:
                    self._save()
        self.flush_stats()

    def update(self, batches: Iterator[Any]) -> bool:
        """Update the weights once from this process's next micro-batches; False if no process has any left."""
        micros = list(itertools.islice(batches, self.config.split.accumulation))
        counts = [float(batch.sample_mask.sum()) for batch in micros]
        pending, rows, asked = self.all_reduce.sum(len(micros), sum(counts), self.interrupt.is_set)
        self._must_stop = asked > 0
        if pending == 0:
            return False
        if rows == 0:  # every image of the update is unreadable: the schedule goes on without it
            self.progress.update += 1
            self.learner.schedule.step_update(self.progress.update)
            return True
        while len(micros) < self.config.split.accumulation:  # others still have images: take part with none
            micros.append(micros[-1].masked_out() if micros else self.loader.empty_batch())
        sums, names = self._accumulate(micros, rows)
        if self.config.clip_grad is not None:
            self.learner.clip_gradients(self.accelerator, self.config.clip_grad, self.config.clip_mode)
        self.progress.update += 1
        rate = self.learner.step(self.progress.update)
        self.stats.add(sums, names, rate)
        return True

    def _accumulate(self, micros: list[Any], rows: float) -> tuple[Tensor, tuple[str, ...]]:
        """Add up the gradients of an update's micro-batches; return the sums of what they show, and its names."""
        accelerator, model = self.accelerator, self.learner.model
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        sums: list[Tensor] = []
        names: tuple[str, ...] = ()
        for number, batch in enumerate(micros):
            batch = batch.move_to(accelerator.device, layout)
            with nullcontext() if number == len(micros) - 1 else accelerator.no_sync(model):
                with accelerator.autocast():
                    losses = self.objective(model, batch, self.progress.update, number, accelerator.process_index)
                weighted = losses.loss * batch.sample_mask
                # DDP averages over processes: this makes it the mean over all images of the update
                accelerator.backward(weighted.sum() * (accelerator.num_processes / rows))
            sums.append(masked_sums(losses, batch.sample_mask))
            names = tuple(losses.metrics)
        return torch.stack(sums).sum(0), names

    def flush_stats(self, bar: Any = None) -> None:
        """Read the sums of the last updates, report them, and check that the loss is finite."""
        stats = self.stats.collect(self.all_reduce, self.accelerator.num_processes)
        if stats is None:
            return
        self._check_finite(stats)
        self.progress.sums.add(stats.loss, stats.metrics, stats.images, stats.seconds)
        loss, metrics, rate = stats.loss / stats.images, stats.means(), stats.rates[-1]
        speed = stats.images_per_second
        self.report.add_update(
            dict(update=self.progress.update, loss=loss, **metrics, lr=rate, images_per_second=round(speed, 2))
        )
        if bar is not None:
            shown = {name: f"{value:.4g}" for name, value in metrics.items()}
            bar.set_postfix(loss=f"{loss:.3f}", **shown, lr=f"{rate:.2e}", img_s=f"{speed:.3g}", refresh=False)

    def _check_finite(self, stats: UpdateStats) -> None:
        k = stats.first_not_finite()
        if k is not None:
            loss, rate = stats.update_losses[k].item(), stats.rates[k]
            update = self.progress.update - len(stats.rates) + k + 1
            raise self._not_finite(f"the loss became {loss} at update {update} (learning rate {rate:.3g})")

    def _not_finite(self, what: str) -> NonFiniteLoss:
        place = self.checkpoints.newest
        return NonFiniteLoss(
            f"{what}; " + (f"{place} is the last good checkpoint" if place else "nothing was saved yet")
        )

    def _save(self, end_of_epoch: bool = False) -> Path:
        started = time.perf_counter()
        self.flush_stats()
        # all processes have the same weights, but not the same norm statistics
        if self.all_reduce.any(not has_finite_weights(self.learner.network)):
            raise self._not_finite(f"the weights are no longer finite at update {self.progress.update}")
        self.progress.skipped = self._skipped_before + int(self.all_reduce.sum(self.loader.skipped)[0])
        name = self._epoch_checkpoint if end_of_epoch else f"update-{self.progress.update:08d}"
        place = self.checkpoints.save(name, None if end_of_epoch else self.loader.position)
        self.report.write_tables()
        self.stats.leave_out(time.perf_counter() - started)
        return place

    @property
    def _epoch_checkpoint(self) -> str:
        return f"update-{self.progress.update:08d}-epoch-{self.progress.epoch:04d}"

    @property
    def _signal(self) -> int:
        return int(self.interrupt.signal or 15)  # this process may have got none itself

    def _evaluate(self) -> None:
        progress = self.progress
        started = time.perf_counter()
        figures = self.callbacks.evaluate()
        if self.all_reduce.any(self.interrupt.is_set):  # the figures may be of a part
            raise Interrupted(self._signal, self.checkpoints.folder / self._epoch_checkpoint)
        progress.evaluated = progress.epoch
        is_best = progress.best.offer(float(figures.pop("metric")), progress.epoch, self._epoch_checkpoint)
        row = self._summarize(figures, time.perf_counter() - started)
        if is_best:
            self.checkpoints.mark_best(progress.best.checkpoint)
        self.report.add_epoch(row)
        shown = {key: value for key, value in row.items() if "." not in key and key not in ("epoch", "updates")}
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        self.report.line(f"epoch {progress.epoch}/{self.config.epochs}: {text}" + (" (best)" if is_best else ""))
        self._export(row, is_best)

    def _summarize(self, figures: Row, seconds: float) -> Row:
        """Make the row of an epoch: what it trained, and the figures of its evaluation."""
        progress, sums = self.progress, self.progress.sums
        row: Row = dict(
            epoch=progress.epoch,
            updates=progress.update,
            lr=float(self.report.updates[-1]["lr"]) if self.report.updates else math.nan,
            **{f"train_{name}": value for name, value in sums.means().items()},
            **figures,
            images_per_second=sums.images_per_second,
            train_seconds=round(sums.seconds, 2),
            eval_seconds=round(seconds, 2),
        )
        if progress.skipped:
            row["skipped_images"] = progress.skipped  # so far
        return row

    def _export(self, row: Row, is_best: bool) -> None:
        """Write the best network so far; raise in every process if the main one can't."""
        error: Exception | None = None
        network = self.callbacks.gather_best(row) if is_best else None
        if is_best and self.accelerator.is_main_process:
            try:
                self.callbacks.on_best(row, network)
            except Exception as caught:  # the other processes must hear of it
                error = caught
        if self.all_reduce.any(error is not None):
            if error is not None and not isinstance(error, (OSError, UserError)):
                raise error
            reason = "by another process" if error is None else str(error) or type(error).__name__
            raise BadState(f"the best model can't be written ({reason}); its checkpoint is intact") from error
