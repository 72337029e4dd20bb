"""A run from its options to its end: where it starts, what it is made of, and how it stops."""

import argparse
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import nn

from dg_timm._errors import BadState, BadValue, CommandStopped
from dg_timm.training.loop.checkpoints import Checkpoints, find_fault, latest_valid, read_args
from dg_timm.training.loop.config import Callbacks, Interrupted, NonFiniteLoss, TrainerConfig
from dg_timm.training.loop.distributed import HostAllReduce, InterruptFlag, Processes, make_accelerator
from dg_timm.training.loop.learner import Learner
from dg_timm.training.loop.optimization import BatchSplit
from dg_timm.training.loop.report import Report, Row
from dg_timm.training.loop.trainer import Trainer
from dg_timm.training.run.build import build_optimization
from dg_timm.training.run.memory import keep_freed_memory
from dg_timm.training.run.recipes import FREE_OPTIONS, find_differences
from dg_timm.training.run.task import Build, TrainingTask

# What a training writes into its folder.
RUN_FILES = ("args.yaml", "checkpoints", "model", "summary.csv", "updates.csv", "curves.png", "environment.json")


def build_trainer(
    args: argparse.Namespace, accelerator: Accelerator, interrupt: InterruptFlag, task: TrainingTask, split: BatchSplit
) -> Trainer:
    """Put optimizer, average of the weights, checkpoints and report around a task; write nothing."""
    output = Path(args.output)
    learning = sum(p.requires_grad for p in task.model.parameters())
    learner = Learner.create(
        accelerator,
        task.model,
        lambda network: build_optimization(args, network, task.updates_per_epoch),
        ema_decay=args.ema_decay,
        ema_warmup=args.ema_warmup,
        fsdp=task.fsdp,
    )
    set_seed(args.seed, device_specific=True)  # from here on each process draws its own dropout
    processes = Processes(accelerator, HostAllReduce(), interrupt)
    checkpoints = Checkpoints(
        output / "checkpoints",
        accelerator,
        processes.all_reduce,
        learner.network,
        learner.ema.module if learner.ema else None,
        keep=args.keep,
        args=vars(args),
        write_config=task.write_config,
        optimizer=learner.optimizer if task.fsdp else None,
    )
    config = TrainerConfig(
        epochs=learner.epochs,
        split=split,
        updates_per_epoch=task.updates_per_epoch,
        fixed_norms=task.fixed_norms,
        **{key: getattr(args, key) for key in ("updates", "clip_grad", "clip_mode", "save_every", "log_every",
                                               "patience", "dist_bn", "channels_last")},
    )  # fmt: skip
    accelerator.print(
        f"{args.model}: {learning} tensors learn; {task.images}; {split.images} images an update "
        f"({split.micro_batch} x {split.accumulation} x {split.processes} processes); {learner.epochs} epochs of "
        f"{task.updates_per_epoch} updates"
    )
    callbacks = _callbacks(task, learner, processes)
    report = Report(output, accelerator, task.metric)
    return Trainer(config, processes, learner, task.loader, task.objective, checkpoints, report, callbacks)


def _callbacks(task: TrainingTask, learner: Learner, processes: Processes) -> Callbacks:
    """Evaluate the network and its average after an epoch, and export the better one of the best epoch."""
    accelerator, all_reduce, interrupt = processes
    name = task.metric.name

    def evaluate() -> Row:
        row: Row = {}
        found: list[float] = []
        for prefix, candidate in learner.networks.items():
            figures = task.evaluate(candidate, lambda: interrupt.is_set)
            row |= {f"{prefix}_{key}": value for key, value in figures.items()}
            found.append(float(figures[name]))
        skipped, task.val_loader.skipped = int(all_reduce.sum(task.val_loader.skipped)[0]), 0
        if skipped:
            row["eval_skipped_images"] = skipped // len(found)
        network = learner.in_one_piece(learner.network, accelerator.is_main_process)
        if accelerator.is_main_process and network is not None:
            row |= task.observe(network)
        return row | {"metric": max(found)}

    def is_average(row: Row) -> bool:
        return learner.ema is not None and float(row[f"ema_{name}"]) >= float(row[f"eval_{name}"])

    def gather_best(row: Row) -> nn.Module | None:
        best = learner.networks["ema" if is_average(row) else "eval"]
        return learner.in_one_piece(best, accelerator.is_main_process)

    def export(row: Row, best: nn.Module) -> None:
        task.export(best, row, learner.epochs, is_average(row))

    return Callbacks(evaluate, task.on_epoch, gather_best, export)


def check_unused(folder: Path, advice: str = "", files: Collection[str] = RUN_FILES) -> None:
    """Refuse a folder that holds any of ``files``, so that nothing of another run is replaced.

    Raises:
        BadState: naming the file, with an advice before the general one.
    """
    found = next((name for name in files if (folder / name).exists()), None)
    if found is not None:
        raise BadState(f"{folder} holds a run already ({found}): {advice}give another --output")


def find_start(
    args: argparse.Namespace, accelerator: Accelerator, folder: Path, free_options: Collection[str] = FREE_OPTIONS
) -> Path | None:
    """Find the checkpoint in ``folder`` that --resume asks for; None for a fresh run.

    Raises:
        BadValue: if it is missing, damaged, or of another training.
    """
    # the main process looks: files may change under the others' eyes
    found: list[Any] = [None, []]
    if accelerator.is_main_process:
        found[:] = latest_valid(folder) if args.resume == "auto" else (args.resume, find_fault(Path(args.resume)))
    place, faults = broadcast_object_list(found)
    if args.resume == "auto":
        for line in faults:
            accelerator.print(f"passed over {line}")
        if place is None:
            accelerator.print(f"--resume auto: there is no checkpoint in {folder} to go on from, starting afresh")
            return None
    elif faults:
        raise BadValue(
            f"--resume {place} is no sound checkpoint: {faults}; give one of {folder}, or auto for the newest"
        )
    elif Path(place).resolve().parent != folder.resolve():
        raise BadValue(
            f"--resume {place} is of another run than --output {folder.parent}; to start afresh from its weights, give "
            f"--initial-checkpoint {place}"
        )
    changed = find_differences(vars(args), read_args(Path(place)), free_options)
    if changed:
        lines = "\n  ".join(changed)
        raise BadValue(
            f"{place} was written with other options; going on would be another training:\n  {lines}\n"
            "Give the same options, or start afresh from its weights: --initial-checkpoint, in another --output"
        )
    return folder / Path(place).resolve().name  # `last` and `best` are links


def run_training(
    args: argparse.Namespace,
    accelerator: Accelerator,
    interrupt: InterruptFlag,
    split: BatchSplit,
    build: Build,
    *,
    free_options: Collection[str] = FREE_OPTIONS,
    files: Collection[str] = RUN_FILES,
) -> None:
    """Train to the end, from the start or from a checkpoint.

    Args:
        args: options of the run.
        accelerator: of this process.
        interrupt: asks for an early end.
        split: how the images of an update are shared.
        build: makes the task; it writes nothing.
        free_options: names of options in which a resumed run may differ.
        files: what the run writes into its folder; a fresh run replaces none of them.

    Raises:
        UserError: for whatever a user can mend.
        Interrupted: after a signal, once the run is saved.
    """
    output = Path(args.output)
    start = None
    if args.resume is None:
        check_unused(output, "go on with --resume auto, or ", files)
    else:
        start = find_start(args, accelerator, output / "checkpoints", free_options)
    task = build(args, accelerator, split)
    trainer = build_trainer(args, accelerator, interrupt, task, split)
    trainer.checkpoints.clean(start)
    position = None
    if start is not None:
        position = trainer.resume(start)
        progress = trainer.progress
        if trainer.is_trained:
            accelerator.print(f"{output} is trained already, for {progress.epoch} epochs: it is evaluated again")
        else:
            accelerator.print(f"going on from {start}: epoch {progress.epoch + 1}, update {progress.update}")
    trainer.report.begin(vars(args), trackers=bool(args.report_to))
    try:
        trainer.run(position)
    finally:
        accelerator.end_training()
    best = trainer.progress.best
    accelerator.print(f"best: {task.metric.title} {best.metric:.2f} in epoch {best.epoch}; {output / 'model'} holds it")
    rows = {int(row["epoch"]): row for row in trainer.report.epochs}
    conclusion = task.conclude(rows[best.epoch], trainer.config.epochs) if best.epoch in rows else None
    if conclusion is not None:
        accelerator.print(conclusion)


def run_command(
    args: argparse.Namespace, work: Callable[[Accelerator, InterruptFlag], None], *, compile: bool = False
) -> int:
    """Do the work of a script; return the exit status 0.

    Raises:
        CommandStopped: with status 1 for a loss that is not finite; 128 and the number of the signal that ended it.
    """
    interrupt = InterruptFlag()
    with interrupt.listening():
        try:
            accelerator = make_accelerator(
                mixed_precision=args.mixed_precision,
                compile=compile,
                trackers=args.report_to,
                folder=Path(args.output) if args.output else None,
            )
            keep_freed_memory(accelerator.device)
            work(accelerator, interrupt)
        except Interrupted as stopped:
            accelerator.print(f"{stopped}. Go on with:\n  {command_to_go_on(sys.argv, accelerator.num_processes)}")
            raise CommandStopped(128 + stopped.signal, "") from stopped
        except NonFiniteLoss as error:
            advice = "A smaller --lr, --warmup-epochs or --clip-grad may help"
            line = f"error: {error}. {advice}"
            raise CommandStopped(1, line if accelerator.is_main_process else "") from error
    return 0


def command_to_go_on(argv: Sequence[str], processes: int) -> str:
    """Write the command that started this run, with --resume auto."""
    kept, skip = [], False
    for token, following in zip(argv, [*argv[1:], "--"], strict=True):
        if token == "--resume":
            skip = not following.startswith("--")  # its value
        elif skip or token.startswith("--resume="):
            skip = False
        else:
            kept.append(token)
    command = shlex.join([*kept, "--resume", "auto"])
    if kept[0].startswith("dg-timm "):
        return " ".join([kept[0], shlex.join([*kept[1:], "--resume", "auto"])])
    if processes == 1:
        return f"python {command}"
    return f"torchrun --nproc_per_node ... (as before, {processes} processes) {command}"
