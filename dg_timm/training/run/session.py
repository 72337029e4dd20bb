"""A run from its options to its end: where it starts, what it is made of, and how it stops.

What tasks differ in (network, data, loss, figures) comes as a :class:`Task`.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from timm.utils import ModelEmaV3
from torch import nn

from dg_timm.training.data.loading import Loader
from dg_timm.training.loop.distributed import Agreement, StopRequest, make_accelerator
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.loop.trainer import NonFiniteLoss, Plan, Stopped, Trainer
from dg_timm.training.run import arguments
from dg_timm.training.run.build import build_optimization
from dg_timm.training.run.checkpoints import Checkpoints, find_fault, newest_sound, read_args
from dg_timm.training.run.report import Metric, Report, Row

# of a run's folder, and of an evaluation's
WRITTEN = ("args.yaml", "checkpoints", "model", "summary.csv", "updates.csv", "curves.png", "environment.json",
           "predictions.json", "per_class.csv", "figures.json", "detections.png")  # fmt: skip


class Task(NamedTuple):
    """What a run trains.

    Attributes:
        model: on the CPU, with what must not learn frozen.
        objective: (model, batch, *entropy) -> :class:`dg_timm.training.loop.objective.Losses`.
        loader: training batches of this process.
        val_loader: what is evaluated on.
        updates_per_epoch: of the weights.
        evaluate: (network, whether to stop) -> its figures, the same in every process; the metric is among them.
        metric: the one that is to grow.
        observe: (network) -> figures of the main process alone, such as those of the graph; after every evaluation.
        write_config: (network, folder): config.json, beside the weights in every checkpoint.
        export: (network, row of the summary, epochs of the run, whether it is the average of the weights): writes the
            best network so far; in the main process.
        images: in words, e.g. ``1437 images, 10 classes``.
        on_epoch: (epoch), before each.
        fixed_norms: leave all norm statistics as they are.
    """

    model: Any
    objective: Callable[..., Any]
    loader: Loader
    val_loader: Loader
    updates_per_epoch: int
    evaluate: Callable[[nn.Module, Callable[[], bool]], Row]
    metric: Metric
    observe: Callable[[nn.Module], Row]
    write_config: Callable[[nn.Module, Path], None]
    export: Callable[[nn.Module, Row, int, bool], None]
    images: str
    on_epoch: Callable[[int], None] = lambda epoch: None
    fixed_norms: bool = False


Build = Callable[[argparse.Namespace, Accelerator, BatchSplit], Task]


def assemble(
    args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest, task: Task, split: BatchSplit
) -> Trainer:
    """Optimizer, average of the weights, checkpoints and report around a task, wired up; nothing is written."""
    output, metric = Path(args.output), task.metric
    optimizer, schedule, epochs = build_optimization(args, task.model, task.updates_per_epoch)
    learning = sum(p.requires_grad for p in task.model.parameters())
    model, optimizer = accelerator.prepare(task.model, optimizer)
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    ema = None
    if args.ema_decay is not None:
        ema = ModelEmaV3(plain, decay=args.ema_decay, use_warmup=args.ema_warmup)
    set_seed(args.seed, device_specific=True)  # from here on each process draws its own dropout
    agreement, report = Agreement(), Report(output, accelerator, metric)
    checkpoints = Checkpoints(
        output / "checkpoints",
        accelerator,
        agreement,
        plain,
        ema.module if ema else None,
        keep=args.keep,
        args=vars(args),
        write_config=task.write_config,
    )

    def evaluate() -> Row:
        row: Row = {}
        found: list[float] = []
        for prefix, candidate in {"eval": plain, **({"ema": ema.module} if ema else {})}.items():
            figures = task.evaluate(candidate, lambda: stop.signal is not None)
            row |= {f"{prefix}_{name}": value for name, value in figures.items()}
            found.append(float(figures[metric.name]))
        skipped, task.val_loader.skipped = int(agreement.sum(task.val_loader.skipped)[0]), 0
        if skipped:
            row["eval_skipped_images"] = skipped // len(found)
        if accelerator.is_main_process:
            row |= task.observe(plain)
        return row | {"metric": max(found)}

    def export(row: Row) -> None:
        use_ema = ema is not None and float(row[f"ema_{metric.name}"]) >= float(row[f"eval_{metric.name}"])
        task.export(ema.module if use_ema and ema else plain, row, epochs, use_ema)

    plan = Plan(
        epochs=epochs,
        updates=args.updates,
        split=split,
        updates_per_epoch=task.updates_per_epoch,
        clip_grad=args.clip_grad,
        clip_mode=args.clip_mode,
        save_every=args.save_every,
        log_every=args.log_every,
        patience=args.patience,
        fixed_norms=task.fixed_norms,
        dist_bn=args.dist_bn,
        channels_last=args.channels_last,
    )
    accelerator.print(
        f"{args.model}: {learning} tensors learn; {task.images}; {split.images} images an update "
        f"({split.micro_batch} x {split.accumulation} x {split.processes} processes); {epochs} epochs of "
        f"{task.updates_per_epoch} updates"
    )
    return Trainer(
        accelerator, model, optimizer, schedule, ema, task.loader, task.objective, evaluate, checkpoints, report,
        agreement, stop, plan, task.on_epoch, export,
    )  # fmt: skip


def check_unused(folder: Path, advice: str = "") -> None:
    """ValueError if a folder holds what a run would write: nothing of another's is replaced."""
    found = next((name for name in WRITTEN if (folder / name).exists()), None)
    if found is not None:
        raise ValueError(f"{folder} holds a run already ({found}): {advice}give another --output")


def find_start(args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> Optional[Path]:
    """The checkpoint to go on from, or None for a fresh run; ValueError if it is that of another training."""
    if args.resume is None:
        check_unused(folder.parent, "go on with --resume auto, or ")
        return None
    # the main process looks: files may change under the others' eyes
    found: list[Any] = [None, []]
    if accelerator.is_main_process:
        found[:] = newest_sound(folder) if args.resume == "auto" else (args.resume, find_fault(Path(args.resume)))
    place, faults = broadcast_object_list(found)
    if args.resume == "auto":
        for line in faults:
            accelerator.print(f"passed over {line}")
        if place is None:
            accelerator.print(f"--resume auto: there is no checkpoint in {folder} to go on from, starting afresh")
            return None
    elif faults:
        raise ValueError(f"--resume {place}: {faults}")
    elif Path(place).resolve().parent != folder.resolve():
        raise ValueError(
            f"--resume {place} is of another run than --output {folder.parent}; to start afresh from its weights, give "
            f"--initial-checkpoint {place}"
        )
    changed = arguments.differences(vars(args), read_args(Path(place)))
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{place} was written with other options; going on would be another training:\n  {lines}\n"
            "Give the same options, or start afresh from its weights: --initial-checkpoint, in another --output"
        )
    return folder / Path(place).resolve().name  # `last` and `best` are links


def train(
    args: argparse.Namespace, accelerator: Accelerator, stop: StopRequest, split: BatchSplit, build: Build
) -> None:
    """Train to the end, from the start or from a checkpoint."""
    output = Path(args.output)
    start = find_start(args, accelerator, output / "checkpoints")
    task = build(args, accelerator, split)
    trainer = assemble(args, accelerator, stop, task, split)
    trainer.checkpoints.clean(start)
    position = None
    if start is not None:
        position = trainer.resume(start)
        accelerator.print(
            f"going on from {start}: epoch {trainer.progress.epoch + 1}, update {trainer.progress.update}"
        )
    trainer.report.begin(vars(args), trackers=bool(args.report_to))
    try:
        trainer.run(position)
    finally:
        accelerator.end_training()
    progress = trainer.progress
    accelerator.print(
        f"best: {task.metric.title} {progress.best_metric:.2f} in epoch {progress.best_epoch}; "
        f"{output / 'model'} holds it"
    )


def run(args: argparse.Namespace, work: Callable[[Accelerator, StopRequest], None], *, compile: bool = False) -> int:
    """Do the work of a script; what ends it becomes a message and an exit status."""
    stop = StopRequest()
    with stop.listening():
        try:
            accelerator = make_accelerator(
                mixed_precision=args.mixed_precision,
                compile=compile,
                trackers=args.report_to,
                folder=Path(args.output) if args.output else None,
            )
            work(accelerator, stop)
        except Stopped as stopped:
            accelerator.print(f"{stopped}. Go on with:\n  {command_to_go_on(sys.argv, accelerator.num_processes)}")
            return 128 + stopped.signal
        except NonFiniteLoss as error:
            accelerator.print(
                f"error: {error}. A smaller --lr, --warmup-epochs or --clip-grad may help", file=sys.stderr
            )
            return 1
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


def command_to_go_on(argv: Sequence[str], processes: int) -> str:
    """The command that started this run, with --resume auto."""
    kept, skip = [], False
    for token, following in zip(argv, [*argv[1:], "--"], strict=True):
        if token == "--resume":
            skip = not following.startswith("--")  # its value
        elif skip or token.startswith("--resume="):
            skip = False
        else:
            kept.append(token)
    command = shlex.join([*kept, "--resume", "auto"])
    return (
        f"python {command}"
        if processes == 1
        else f"torchrun --nproc_per_node ... (as before, {processes} processes) {command}"
    )
