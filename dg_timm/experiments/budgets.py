"""Accuracy, cost and measured time on CIFAR-10: a network that learned to close, shallower static ones, skipped blocks.

    python train_scripts/experiments/budgets.py --data path/to/cifar10            # three hours of one core
    python train_scripts/experiments/budgets.py --data uoft-cs/cifar10 --full     # a quarter of an hour on a GPU

Every network is trained at 16 px and then at 32 px, for the same number of epochs. The dynamic one learns a target cost
at 16 px and keeps it at 32 px, once for each target; what it costs there and at other thresholds is its curve.
``skip`` is the deepest static network, trained with stochastic depth and run without the last blocks of each stage. At
another threshold, or with fewer blocks, the statistics of norms have to be estimated again (see calibrate.py); so that
no network gains by that alone, all are shown with new ones. Times are those of sparse execution relative to that static
network, on one thread, in turn in one run.

Writes ``budgets.csv`` (without times), ``times.csv``, ``budgets.md`` and ``budgets.png``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dg_timm._errors import BadValue
from dg_timm._files import atomic_write
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.curves import DEEPEST, DYNAMIC, NAMES, SKIP, curves_table, draw_curves, measure_networks
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.trial import Trial
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run.option_types import fraction, non_negative_int, positive_int

GRAPH = {"model-kwargs": {"block_shortcut": False}}  # of the dynamic network: the better one in ablation.py
_KEPT = {"cost-ramp": 0, "cost-noise": 0}  # a cost that was learned before is kept from the first update on


class _Plan:
    """Collects trials: of every network one at 16 px and one at 32 px that starts from it; in full, one at 32 px."""

    def __init__(self, seed: int, full: bool) -> None:
        self.seed, self.full = seed, full
        self.trials: dict[str, Trial] = {}

    def add(
        self, name: str, recipe: str, options: Mapping[str, Any], depends_on: Mapping[str, Trial] | None = None
    ) -> Trial:
        trial = Trial(name, {"recipe": recipe, **options}, self.seed, depends_on or {})
        self.trials[name] = trial
        return trial

    def add_network(self, name: str, first: Mapping[str, Any], second: Mapping[str, Any], start: str) -> None:
        """Add a network: options at 16 px, options at 32 px, and name of what it starts from, without ``-16px``."""
        if self.full:
            self.add(name, "cifar10_full", {**first, **second})
            return
        small = self.trials.get(f"{start}-16px") or self.add(f"{start}-16px", "cifar10_16px", first)
        self.add(name, "cifar10_32px", second, {"initial-checkpoint": small})


def trials(names: Sequence[str], seed: int, targets: Sequence[float], full: bool, distill: bool = False) -> list[Trial]:
    """List the trials, each after those that it depends on.

    The dynamic network is there once for each target, and learns to close at 16 px. With ``distill`` the deepest static
    network and the dynamic ones go on for as long again, the latter learning also the logits of the former.
    """
    plan = _Plan(seed, full)
    for name in names:
        if name == DYNAMIC:
            for target in targets:
                own = {"model": DYNAMIC, "target-cost": target, **GRAPH}
                plan.add_network(f"{DYNAMIC}-{target:g}", own, own if full else own | _KEPT, f"{DYNAMIC}-{target:g}")
        elif name == SKIP:
            static = {"model": DEEPEST}
            plan.add_network(name, static, {**static, "drop-path": 0.2}, DEEPEST)
        else:
            plan.add_network(name, {"model": name}, {"model": name}, name)
    if distill:
        static_trial = plan.trials[DEEPEST]
        plan.add(f"{DEEPEST}-longer", "cifar10_32px", {"model": DEEPEST}, {"initial-checkpoint": static_trial})
        for target in targets:
            start = plan.trials[f"{DYNAMIC}-{target:g}"]
            options = {"model": DYNAMIC, "target-cost": target, **_KEPT, **GRAPH}
            depends_on = {"initial-checkpoint": start, "distill": static_trial}
            plan.add(f"{start.name}-distilled", "cifar10_32px", options, depends_on)
    return list(plan.trials.values())


def check_rows_kept(file: Path, names: set[str]) -> None:
    """Raise BadValue if a table holds networks that a new one would not."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines()[1:]
        lost = sorted({line.partition(",")[0] for line in lines} - names)
        if lost:
            raise BadValue(f"{file} holds {', '.join(lost)}, which these options leave out; give another --results")


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=list(NAMES), help="networks to train; by default all"
    )
    parser.add_argument(
        "--target-cost", type=fraction, nargs="+", default=[0.6, 0.5], help="costs that the dynamic network learns"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of every network")
    parser.add_argument("--points", type=positive_int, default=5, help="number of thresholds of the dynamic network")
    parser.add_argument("--rounds", type=positive_int, default=7, help="number of rounds of timing, at least 2")
    parser.add_argument(
        "--distill", action="store_true", help="train four epochs more, from the static network's logits"
    )
    parser.add_argument("--train-only", action="store_true", help="train, and leave the curve for later")
    args = parse(parser, "budgets", "the recipe cifar10_full, at 32 px alone", argv)
    torch.set_num_threads(1)
    if args.distill and not {DYNAMIC, DEEPEST} <= set(args.only):
        parser.error(f"--distill needs {DYNAMIC} and {DEEPEST}; --only leaves one out")
    if args.rounds < 2:
        parser.error("--rounds must be at least 2: a ratio needs a spread")
    planned = trials(args.only, args.seed, args.target_cost, args.full, args.distill)
    if not args.train_only:
        check_rows_kept(args.results / "budgets.csv", {trial.name for trial in planned})
    results = run_trials(planned, args, networks=True)
    if args.train_only:
        return 0
    rows = measure_networks(results, args)
    write_csv(args.results / "budgets.csv", [{k: v for k, v in r.items() if "time" not in k} for r in rows])
    write_csv(args.results / "times.csv", rows)
    text = curves_table(rows, results)
    atomic_write(args.results / "budgets.md", text)
    draw_curves(rows, args.results / "budgets.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
