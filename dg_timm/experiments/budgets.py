"""Accuracy, cost and measured time on CIFAR-10: a network that learned to close, shallower static ones, skipped blocks.

    python train_scripts/experiments/budgets.py --data path/to/cifar10            # three hours of one core
    python train_scripts/experiments/budgets.py --data uoft-cs/cifar10 --full     # a quarter of an hour on a GPU

Every network is trained at 16 px and then at 32 px, for the same number of epochs. The dynamic one learns a target cost
at 16 px and keeps it at 32 px, once for each target; what it costs there and at other thresholds is its curve.
``skip`` is the deepest static network trained with stochastic depth, without the last blocks of each stage. Another
threshold, or fewer blocks, need the statistics of norms taken anew (see calibrate.py); so that nobody gains by that
alone, all networks are shown with them. Times are of sparse execution relative to that static network, one
thread, in turn in one run.

Writes ``budgets.csv`` (without times), ``times.csv``, ``budgets.md`` and ``budgets.png``.
"""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

import dg_timm
from dg_timm.budget.norms import refit_norms
from dg_timm.cli import calibrate
from dg_timm.experiments.runner import Cell, Result, parse, run
from dg_timm.training.run import arguments
from dg_timm.training.run import networks as models
from dg_timm.training.run.report import hardware, write_beside, write_csv

DEEPEST = "cifar_resnet26"
DYNAMIC = f"dg_{DEEPEST}"
NAMES = (DYNAMIC, DEEPEST, "cifar_resnet20", "cifar_resnet14", "skip")
TIMED = (1, 32)
BROKEN = 50.0  # top-1 (%) below which a point is not drawn
GRAPH = {"model-kwargs": {"block_shortcut": False}}  # of the dynamic network: the better one in ablation.py
Row = dict[str, Any]


def cells(names: Sequence[str], seed: int, targets: Sequence[float], full: bool, distill: bool = False) -> list[Cell]:
    """Of every network a cell at 16 px and one at 32 px that starts from it; in full, one at 32 px alone.

    The dynamic network stands once for each target, and learns to close at 16 px. With ``distill`` the deepest static
    network and the dynamic ones go on for as long again, the latter learning also the logits of the former.
    """
    found: list[Cell] = []

    def add(name: str, model: str, first: Mapping[str, Any], second: Mapping[str, Any], start: str) -> None:
        if full:
            found.append(Cell(name, {"recipe": "cifar10_full", "model": model, **first, **second}, seed))
            return
        small = next((cell for cell in found if cell.name == f"{start}-16px"), None)
        if small is None:
            small = Cell(f"{start}-16px", {"recipe": "cifar10_16px", "model": model, **first}, seed)
            found.append(small)
        again(name, {"model": model, **second}, {"initial-checkpoint": small})

    def again(name: str, options: Mapping[str, Any], networks: Mapping[str, Cell]) -> None:
        found.append(Cell(name, {"recipe": "cifar10_32px", **options}, seed, networks))

    for name in names:
        if name == DYNAMIC:
            for target in targets:
                own = f"{DYNAMIC}-{target:g}"
                learned = {} if full else {"cost-ramp": 0, "cost-noise": 0}
                shared = {"target-cost": target, **GRAPH}
                add(own, DYNAMIC, shared, {**shared, **learned}, own)
        elif name == "skip":
            add(name, DEEPEST, {}, {"drop-path": 0.2}, DEEPEST)
        else:
            add(name, name, {}, {}, name)
    if distill:
        by_name = {cell.name: cell for cell in found}
        static = by_name[DEEPEST]
        again(f"{DEEPEST}-longer", {"model": DEEPEST}, {"initial-checkpoint": static})
        for target in targets:
            own = f"{DYNAMIC}-{target:g}"
            kept = {"model": DYNAMIC, "target-cost": target, "cost-ramp": 0, "cost-noise": 0, **GRAPH}
            again(f"{own}-distilled", kept, {"initial-checkpoint": by_name[own], "distill": static})
    return found


def without_last(model: nn.Module, blocks: int) -> nn.Module:
    """A static network that skips the last blocks of each stage."""
    for name in ("layer1", "layer2", "layer3"):
        stage = model.get_submodule(name)
        setattr(model, name, nn.Sequential(*list(stage.children())[: len(stage) - blocks]))  # type: ignore[arg-type]
    return model


def measure(results: Sequence[Result], args: argparse.Namespace) -> list[Row]:
    """A row for each network and operating point: top-1, cost and its spread, and times relative to the deepest.

    ``top1`` is that of the network as trained, where it runs as it was trained; ``refitted`` that with the statistics
    of norms taken anew over training images without augmentation, which alone is worth half a point to all of them.
    """
    found = [result for result in results if not result.cell.name.endswith("-16px")]
    gone = [result.cell.name for result in found if not result.network.exists()]
    if gone or not found:
        raise ValueError(f"networks are not in {args.output}: {', '.join(gone) or 'any'}; run without --collect")
    loaded = {result.cell.name: models.create(str(result.network)).eval() for result in found}
    static = loaded.get(DEEPEST) or models.create(DEEPEST).eval()
    batches, refit = calibrate.load_batches(argparse.Namespace(**vars(parse_data(args)), model=DEEPEST), static)
    channels, height, width = batches[0].images.shape[1:]
    size = (channels, height, width)
    whole = dg_timm.analysis.counting(static, size).convolutions
    contestants: dict[tuple[str, str], nn.Module] = {}
    for name, model in loaded.items():
        if name.startswith(DYNAMIC):
            chosen = calibrate.thresholds_of(model, batches[0].images, args.points)
            contestants |= {(name, key): m for key, m in calibrate.variants(model, chosen, []).items()}
        elif name == "skip":
            for blocks in range(4):
                contestants[name, f"{blocks} a stage" if blocks else ""] = without_last(copy.deepcopy(model), blocks)
        else:
            contestants[name, ""] = model
    rows: list[Row] = []
    for (name, point), model in contestants.items():
        as_trained = calibrate.predict(model, batches)[0] if point in ("", "learned") else None
        refit_norms(refitted := copy.deepcopy(model), refit)
        top1, costs = calibrate.predict(refitted, batches)
        if name.startswith(DYNAMIC):
            cost = costs.mean().item()
            dg_timm.set_execution(model, "sparse")
        else:
            cost = dg_timm.analysis.counting(model, size).convolutions / whole
        rows.append(
            {"network": name, "point": point, "top1": "" if as_trained is None else round(as_trained, 2),
             "refitted": round(top1, 2), "cost": round(cost, 4), "spread": round(costs.std(unbiased=False).item(), 4)}
        )  # fmt: skip
    images = torch.cat([batch.images for batch in batches])
    for batch_size in TIMED:
        timed = calibrate.time_ratios(
            static, list(contestants.values()), images[: max(64, 8 * batch_size)], batch_size, args.rounds
        )
        for row, timing in zip(rows, timed, strict=True):
            row |= calibrate.time_columns(batch_size, timing)
    return [row | {"time_rounds": args.rounds, "time_hardware": hardware()} for row in rows]


def keep_rows(file: Path, names: set[str]) -> None:
    """ValueError if a table holds networks that a new one would not."""
    if file.exists():
        lost = sorted({line.partition(",")[0] for line in file.read_text().splitlines()[1:]} - names)
        if lost:
            raise ValueError(f"{file} holds {', '.join(lost)}, which these options leave out; give another --results")


def parse_data(args: argparse.Namespace) -> argparse.Namespace:
    """Options of calibrate.py for the data of this experiment."""
    parser = argparse.ArgumentParser()
    calibrate.add_options(parser)
    return parser.parse_args(["--data", args.data, "--refit-norms", "1024"])


def table(rows: Sequence[Row], results: Sequence[Result]) -> str:
    lines = [
        "| network | operating point | top-1 (%) | norms refitted | cost | spread | time, batch 1 (quartiles) | 32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{row[f'time_{b}']:.2f} ({row[f'time_{b}_low']:.2f} to {row[f'time_{b}_high']:.2f})" for b in TIMED]
        lines.append(
            f"| {row['network']} | {row['point']} | {row['top1']} | {row['refitted']} | {row['cost']:.3f} | "
            f"{row['spread']:.3f} | "
            f"{' | '.join(times)} |"
        )
    minutes = ", ".join(
        f"{sum(r.seconds for r in results if r.hardware == on) / 60:.0f} minutes ({on})"
        for on in dict.fromkeys(r.hardware for r in results)
    )
    return "\n".join([*lines, "", f"Training took {minutes} over all cells; measured on {hardware()}.", ""])


def draw(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    dynamic = [row for row in rows if str(row["network"]).startswith(DYNAMIC)]
    lines = {
        "dynamic, as learned": [row for row in dynamic if row["point"] == "learned"],
        "static, by depth": [row for row in rows if str(row["network"]) in NAMES and row["network"] != "skip"],
        "static, trained longer": [row for row in rows if row["network"] == f"{DEEPEST}-longer"],
        "stochastic depth, last blocks skipped": [row for row in rows if row["network"] == "skip"],
    }
    for name in dict.fromkeys(str(row["network"]) for row in dynamic):
        own = [row for row in dynamic if row["network"] == name and row["point"] != "learned"]
        lines[f"learned at {name.removeprefix(f'{DYNAMIC}-')}, other thresholds"] = own
    panels = {"cost": "cost", "time_1": "time, batch 1", "time_32": "time, batch 32"}
    for axes, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for label, found in lines.items():
            ordered = sorted((row for row in found if row["refitted"] > BROKEN), key=lambda row: float(row[key]))
            axes.plot([row[key] for row in ordered], [row["refitted"] for row in ordered], "o-", label=label)
        axes.set_xlabel(f"{title} / {DEEPEST}'s")
        axes.set_ylabel("top-1 (%), norms refitted")
    axes.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--target-cost", type=arguments.share, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--seed", type=arguments.natural, default=0)
    parser.add_argument("--points", type=arguments.positive, default=5, help="thresholds of the dynamic network")
    parser.add_argument("--rounds", type=arguments.positive, default=7, help="of timing")
    parser.add_argument(
        "--distill", action="store_true", help="then four epochs more, from the static network's logits"
    )
    parser.add_argument("--train-only", action="store_true", help="leave the curve for later")
    args = parse(parser, "budgets", "the recipe cifar10_full, at 32 px alone")
    torch.set_num_threads(1)
    if args.distill and not {DYNAMIC, DEEPEST} <= set(args.only):
        parser.error(f"--distill needs {DYNAMIC} and {DEEPEST}; --only leaves one out")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a ratio needs a spread")
    planned = cells(args.only, args.seed, args.target_cost, args.full, args.distill)
    if not args.train_only:
        keep_rows(args.results / "budgets.csv", {cell.name for cell in planned})
    results = run(planned, args, networks=True)
    if args.train_only:
        return 0
    rows = measure(results, args)
    write_csv(args.results / "budgets.csv", [{k: v for k, v in r.items() if "time" not in k} for r in rows])
    write_csv(args.results / "times.csv", rows)
    text = table(rows, results)
    write_beside(args.results / "budgets.md", text)
    draw(rows, args.results / "budgets.png")
    print(text)
    return 0
