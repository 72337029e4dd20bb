"""The training loop: updates, epochs, checkpoints, evaluation, and stopping in good order.

One loop for every task: what a batch's loss is comes from an objective, what is good from an evaluation.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, adaptive_clip_grad, distribute_bn
from torch import Tensor, nn

from dg_timm.training.data.loading import Loader, Position
from dg_timm.training.loop.distributed import Agreement, StopRequest
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.run.checkpoints import Checkpoints
from dg_timm.training.run.networks import has_finite_weights, set_train_mode
from dg_timm.training.run.report import Report, Row


class NonFiniteLoss(RuntimeError):
    """The loss or the weights are no longer finite; nothing of it has been saved."""


class Stopped(RuntimeError):
    """A signal asked for the end; the run is saved."""

    def __init__(self, signal: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal}; saved {checkpoint}")
        self.signal = signal


@dataclass
class Progress:
    """How far a run is; part of every checkpoint.

    ``epoch`` counts finished epochs; ``evaluated`` those of them that were evaluated. The sums are those of the epoch
    under way, over all processes.
    """

    epoch: int = 0
    evaluated: int = 0
    update: int = 0
    loss_sum: float = 0.0
    shown_sums: dict[str, float] = field(default_factory=dict)
    images: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    best_metric: float = -math.inf
    best_epoch: int = 0
    best_checkpoint: str = ""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own in fields(self):
            setattr(self, own.name, state.get(own.name, getattr(self, own.name)))  # an older version has fewer

    def start_epoch(self) -> None:
        self.loss_sum = self.images = self.seconds = 0.0
        self.shown_sums = {}

    def shown(self) -> dict[str, float]:
        """Means over the epoch so far of what the objective shows."""
        return {name: total / max(self.images, 1) for name, total in self.shown_sums.items()}


@dataclass(frozen=True)
class Plan:
    """How to train, apart from network, data and loss.

    Attributes:
        epochs: of the whole run, with warm-up prefix and cool-down.
        updates: of the whole run, where it ends within its last epoch; None for whole epochs.
        split: images of an update.
        clip_grad, clip_mode: bound and ``norm``, ``value`` or ``agc``; None clips nothing.
        save_every: updates between checkpoints within an epoch; 0 for none.
        log_every: updates between looks at the loss.
        patience: epochs without a better evaluation before stopping; None never stops early.
        fixed_norms: leave all norm statistics as they are.
        dist_bn: ``reduce`` (average) or ``broadcast`` (the main process's): norm statistics after an epoch.
    """

    epochs: int
    split: BatchSplit
    updates_per_epoch: int
    updates: Optional[int] = None
    clip_grad: Optional[float] = None
    clip_mode: str = "norm"
    save_every: int = 0
    log_every: int = 10
    patience: Optional[int] = None
    fixed_norms: bool = False
    dist_bn: str = "reduce"
    channels_last: bool = False


class Trainer:
    """Trains a prepared model.

    Args:
        model, optimizer: from ``accelerator.prepare``.
        schedule: timm's, in updates; not prepared (Accelerate would step it once a process).
        ema: of the unwrapped model, or None.
        loader: training batches of this process.
        objective: (model, batch, *entropy) -> per-image losses (see :class:`dg_timm.training.loop.objective.Losses`).
        evaluate: () -> a row of figures with ``metric``, larger is better.
        on_best: called in the main process after an evaluation that is the best so far.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        schedule: Scheduler,
        ema: Optional[ModelEmaV3],
        loader: Loader,
        objective: Callable[..., Any],
        evaluate: Callable[[], Row],
        checkpoints: Checkpoints,
        report: Report,
        agreement: Agreement,
        stop: StopRequest,
        plan: Plan,
        on_epoch: Callable[[int], None] = lambda epoch: None,
        on_best: Callable[[Row], None] = lambda row: None,
    ) -> None:
        self.accelerator, self.model, self.optimizer, self.schedule, self.ema = (
            accelerator,
            model,
            optimizer,
            schedule,
            ema,
        )
        self.loader, self.objective, self.evaluate, self.checkpoints = loader, objective, evaluate, checkpoints
        self.report, self.agreement, self.stop, self.plan = report, agreement, stop, plan
        self.on_epoch, self.on_best = on_epoch, on_best
        self.network = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.progress = Progress()
        # of updates that were not looked at yet: (images, loss sum, sums of what is shown), and the learning rate
        self._recent: list[Tensor] = []
        self._shown: tuple[str, ...] = ()
        self._rates: list[float] = []
        self._since = time.perf_counter()
        self._must_stop = False
        self._skipped_before = 0  # unreadable images, over all processes, before a resume
        checkpoints.states |= {"schedule": schedule, "progress": self.progress}

    def resume(self, place: Path) -> Optional[Position]:
        """Go back to a checkpoint; the position to give to :meth:`run`."""
        position = self.checkpoints.load(place)
        self.checkpoints.best = self.progress.best_checkpoint or None
        self._skipped_before = self.progress.skipped
        self.report.resume(self.progress.evaluated, self.progress.update)
        return position

    def run(self, position: Optional[Position] = None) -> None:
        """Train to the end.

        Raises:
            Stopped: after a signal, once the run is saved.
            NonFiniteLoss: naming the update and its learning rate.
            OSError: if a checkpoint can't be written.
        """
        progress = self.progress
        while True:
            if progress.evaluated < progress.epoch:
                self._evaluate()
            if progress.epoch >= self.plan.epochs or self._is_stale():
                break
            self._train_epoch(position)
            position = None

    def _is_stale(self) -> bool:
        waited = self.progress.epoch - self.progress.best_epoch
        if self.plan.patience is None or waited < self.plan.patience or self.progress.epoch == 0:
            return False
        self.report.line(f"no better evaluation in {waited} epochs (--patience {self.plan.patience}): stopping early")
        return True

    def _train_epoch(self, position: Optional[Position]) -> None:
        progress, plan = self.progress, self.plan
        if position is None:
            progress.start_epoch()
        self.on_epoch(progress.epoch)
        set_train_mode(self.network, plan.fixed_norms)
        batches = self.loader.epoch(progress.epoch, position)
        self._since = time.perf_counter()
        before = progress.epoch * plan.updates_per_epoch
        total = min(plan.updates_per_epoch, (plan.updates or math.inf) - before)
        with tqdm(
            total=total,
            initial=min(progress.update - before, total) if position else 0,
            desc=f"epoch {progress.epoch + 1}/{plan.epochs}",
            unit="update",
            mininterval=1,
            leave=False,
        ) as bar:
            while progress.update != plan.updates and self.update(batches):
                bar.update()
                if progress.update % plan.log_every == 0:
                    self.look(bar)
                if self._must_stop:
                    raise self._save_and_stop()
                if plan.save_every and progress.update % plan.save_every == 0:
                    self._save()
        self.look()
        if progress.images == 0:
            raise ValueError("the training split has no images (that can be read)")
        if progress.update != before + total:
            self.report.line(
                f"epoch {progress.epoch + 1} ended at update {progress.update}, not at {before + total}: "
                "the schedule is off; set --epoch-size to the rows that the stream has"
            )
        if self.accelerator.num_processes > 1:
            for network in self.checkpoints.networks.values():
                distribute_bn(network, self.accelerator.num_processes, plan.dist_bn == "reduce")
        progress.epoch += 1
        self._save(end_of_epoch=True)

    def update(self, batches: Iterator[Any]) -> bool:
        """One update of the weights from this process's next micro-batches; False if no process has any left."""
        accelerator, split = self.accelerator, self.plan.split
        micros = []
        for _ in range(split.accumulation):
            batch = next(batches, None)
            if batch is None:
                break
            micros.append(batch)
        counts = [float(batch.weights.sum()) for batch in micros]
        pending, rows, asked = self.agreement.sum(len(micros), sum(counts), self.stop.signal is not None)
        self._must_stop = asked > 0
        if pending == 0:
            return False
        if rows == 0:  # every image of the update is unreadable: the schedule goes on without it
            self.progress.update += 1
            self.schedule.step_update(self.progress.update)
            return True
        while len(micros) < split.accumulation:  # others still have images: take part with none
            micros.append(micros[-1].without_weight() if micros else self.loader.nothing())
        sums: list[Tensor] = []
        layout = torch.channels_last if self.plan.channels_last else torch.contiguous_format
        for number, batch in enumerate(micros):
            batch = batch.on(accelerator.device, layout)
            last = number == len(micros) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    losses = self.objective(self.model, batch, self.progress.update, number, accelerator.process_index)
                weighted = losses.loss * batch.weights
                # DDP averages over processes: this makes it the mean over all images of the update
                accelerator.backward(weighted.sum() * (accelerator.num_processes / rows))
            self._shown = tuple(losses.shown)
            columns = [torch.ones_like(batch.weights), losses.loss, *losses.shown.values()]
            sums.append(torch.stack([(column.detach() * batch.weights).double().sum() for column in columns]))
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.update += 1
        if self.ema is not None:
            self.ema.update(self.network, step=self.progress.update)
        self._recent.append(torch.stack(sums).sum(0))
        self._rates.append(max(group["lr"] / (group.get("lr_scale") or 1.0) for group in self.optimizer.param_groups))
        self.schedule.step_update(self.progress.update)
        return True

    def _clip(self) -> None:
        plan = self.plan
        if plan.clip_grad is None:
            return
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if plan.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(parameters, plan.clip_grad)
        elif plan.clip_mode == "value":
            self.accelerator.clip_grad_value_(parameters, plan.clip_grad)
        else:
            self.accelerator.unscale_gradients()
            adaptive_clip_grad(parameters, plan.clip_grad)

    def look(self, bar: Any = None) -> None:
        """Bring the sums of the last updates to the host, over all processes: all that waits for the device."""
        if not self._recent:
            return
        progress, recent, rates = self.progress, torch.stack(self._recent).cpu(), self._rates
        self._recent, self._rates = [], []
        flat = self.agreement.sum(*recent.flatten().tolist(), time.perf_counter() - self._since)
        self._since = time.perf_counter()
        seconds = flat[-1] / self.accelerator.num_processes
        table = torch.tensor(flat[:-1], dtype=torch.float64).view(-1, 2 + len(self._shown))
        loss = table[:, 1] / table[:, 0]
        for k in (~torch.isfinite(loss)).nonzero()[:1, 0].tolist():
            update = progress.update - len(loss) + k + 1
            raise self._not_finite(
                f"the loss became {loss[k].item()} at update {update} (learning rate {rates[k]:.3g})"
            )
        images, loss_sum, *sums = table.sum(0).tolist()
        progress.loss_sum += loss_sum
        for name, value in zip(self._shown, sums, strict=True):
            progress.shown_sums[name] = progress.shown_sums.get(name, 0.0) + value
        progress.images += images
        progress.seconds += seconds
        shown = {name: value / images for name, value in zip(self._shown, sums, strict=True)}
        row: Row = dict(
            update=progress.update,
            loss=loss_sum / images,
            **shown,
            lr=rates[-1],
            images_per_second=round(images / max(seconds, 1e-9), 2),
        )
        self.report.add_update(row)
        if bar is not None:
            figures = {name: f"{value:.4g}" for name, value in shown.items()}
            bar.set_postfix(loss=f"{row['loss']:.3f}", **figures, lr=f"{rates[-1]:.2e}",
                            img_s=f"{images / max(seconds, 1e-9):.3g}", refresh=False)  # fmt: skip

    def _save(self, end_of_epoch: bool = False) -> Path:
        started = time.perf_counter()
        self.look()
        # all processes have the same weights, but not the same norm statistics
        if self.agreement.any(not has_finite_weights(self.network)):
            raise self._not_finite(f"the weights are no longer finite at update {self.progress.update}")
        self.progress.skipped = self._skipped_before + int(self.agreement.sum(self.loader.skipped)[0])
        name = f"update-{self.progress.update:08d}" + (f"-epoch-{self.progress.epoch:04d}" if end_of_epoch else "")
        place = self.checkpoints.save(name, None if end_of_epoch else self.loader.position)
        self.report.write_tables()
        self._since += time.perf_counter() - started  # throughput is that of training
        return place

    def _not_finite(self, what: str) -> NonFiniteLoss:
        place = self.checkpoints.newest
        return NonFiniteLoss(
            f"{what}; " + (f"{place} is the last good checkpoint" if place else "nothing was saved yet")
        )

    def _save_and_stop(self) -> Stopped:
        number = self.stop.signal or 15  # in a process that got no signal itself
        return Stopped(int(number), self._save())

    def _evaluate(self) -> None:
        progress = self.progress
        started = time.perf_counter()
        figures = self.evaluate()
        if self.agreement.any(self.stop.signal is not None):  # the figures may be of a part
            place = self.checkpoints.folder / f"update-{progress.update:08d}-epoch-{progress.epoch:04d}"
            raise Stopped(int(self.stop.signal or 15), place)
        progress.evaluated = progress.epoch
        metric = float(figures.pop("metric"))
        is_best = metric > progress.best_metric
        row: Row = dict(
            epoch=progress.epoch,
            updates=progress.update,
            lr=float(self.report.updates[-1]["lr"]) if self.report.updates else math.nan,
            train_loss=progress.loss_sum / max(progress.images, 1),
            **{f"train_{name}": value for name, value in progress.shown().items()},
            **figures,
            images_per_second=round(progress.images / max(progress.seconds, 1e-9), 2),
            train_seconds=round(progress.seconds, 2),
            eval_seconds=round(time.perf_counter() - started, 2),
        )
        if progress.skipped:
            row["skipped_images"] = progress.skipped  # so far
        if is_best:
            progress.best_metric, progress.best_epoch = metric, progress.epoch
            progress.best_checkpoint = f"update-{progress.update:08d}-epoch-{progress.epoch:04d}"
            self.checkpoints.mark_best(progress.best_checkpoint)
        self.report.add_epoch(row)
        shown = {key: value for key, value in row.items() if "." not in key and key not in ("epoch", "updates")}
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        self.report.line(f"epoch {progress.epoch}/{self.plan.epochs}: {text}" + (" (best)" if is_best else ""))
        failure = ""
        if is_best and self.accelerator.is_main_process:
            try:
                self.on_best(row)
            except Exception as error:  # the other processes must hear of it
                failure = str(error) or type(error).__name__
        if self.agreement.any(bool(failure)):
            raise OSError(
                f"the best model can't be written ({failure or 'by another process'}); its checkpoint is intact"
            )
