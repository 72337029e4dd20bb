"""Imagenette from ImageNet weights: gates, a range of budgets, and the fixed networks that gates find, beside static.

    python train_scripts/experiments/skipping.py --data path/to/imagenette --weights model.safetensors
    python train_scripts/experiments/skipping.py --data frgfm/imagenette --full     # all images at 224 px; a GPU

For every seed, a static network is trained for two epochs (recipe ``imagenette_static``). All others start from it,
learn its logits too, and go on for six epochs (recipe ``imagenette_skip``): the static network itself (``static``),
networks whose gates learn one target (``gates``), one whose gates learn the whole range (``range``), and static
networks without the blocks that few images ran (``fixed``). Writes ``skipping.csv``, ``skipping.md`` and
``skipping.png``.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dg_timm._errors import BadState, BadValue
from dg_timm._files import atomic_path, atomic_write
from dg_timm._tables import markdown_table
from dg_timm.analysis.counting import count_costs
from dg_timm.budget.fixed import leave_out, rarely_run
from dg_timm.cli.errors import cli_errors
from dg_timm.conversion.convert import dynamize
from dg_timm.experiments.comparison import paired_difference
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.store import TrialStore
from dg_timm.experiments.trial import Result, Trial
from dg_timm.hub.save import save_pretrained
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run import networks, operating_points
from dg_timm.training.run.option_types import fraction, non_negative_int

KINDS = ("static", "gates", "range", "fixed")
_LONGER = {"epochs": 6, "lr": 2.5e-4}  # the static network goes on as the others do
_RANGE_END = "@0.6"  # of the columns of summary.csv at the lowest budget of imagenette_skip
_OBSERVED = 640  # training images that say which blocks few images run
_FULL_SIZE = {"train-limit": 9469, "image-size": 224, "workers": 8}


class Plan:
    """The trials, each after those that it depends on.

    Args:
        model: timm's name of the static network.
        weights: safetensors file of it; None takes the published weights.
        common: options of every trial.
    """

    def __init__(self, model: str, weights: Path | None, common: Mapping[str, Any]) -> None:
        self.model, self.common = model, common
        self.first = {"pretrained": True} if weights is None else {"initial-checkpoint": weights}

    def start(self, seed: int) -> Trial:
        """The static network that all others of a seed start from, and learn from."""
        return Trial("start", self._options("imagenette_static", self.model, self.first), seed)

    def longer(self, start: Trial) -> Trial:
        options = self._options("imagenette_static", self.model, _LONGER)
        return Trial("static", options, start.seed, {"initial-checkpoint": start, "distill": start})

    def gates(self, start: Trial, target: float) -> Trial:
        options = self._options("imagenette_skip", f"dg_{self.model}", {"target-cost": target})
        return Trial(f"gates-{target:g}", options, start.seed, {"initial-checkpoint": start})

    def range(self, start: Trial) -> Trial:
        return Trial(
            "range", self._options("imagenette_skip", f"dg_{self.model}", {}), start.seed, {"initial-checkpoint": start}
        )

    def fixed(self, start: Trial, gated: Result, store: TrialStore) -> Trial:
        """The static network without the blocks that few images of a network with gates ran, trained as it was."""
        folder = store.output / f"{gated.trial.folder}-rare"
        if not (folder / "config.json").exists() and gated.network.exists():
            _write_without_rare(store, start, gated, folder)
        name = gated.trial.name.replace("gates", "fixed")
        options = self._options("imagenette_static", f"dg_{self.model}", {**_LONGER, "graph-lr-scale": 0.1})
        return Trial(name, {**options, "initial-checkpoint": folder}, start.seed, {"distill": start})

    def _options(self, recipe: str, model: str, others: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe": recipe, "model": model, "workers": 0, **others, **self.common}


def _write_without_rare(store: TrialStore, start: Trial, gated: Result, folder: Path) -> None:
    """Save the start's identity conversion without the blocks that less than half of some training images run."""
    model = networks.create(str(gated.network)).eval()
    parser = argparse.ArgumentParser()
    operating_points.add_options(parser)
    words = ["--data", store.data, "--refit-norms", str(_OBSERVED), "--val-limit", "64"]
    options = argparse.Namespace(**vars(parser.parse_args(words)), model=str(gated.network))
    _, images = operating_points.load_batches(options, model)
    plain = dynamize(networks.create(str(store.network(start))))
    leave_out(plain, rarely_run(model, images))
    save_pretrained(plain, folder)


def share_of_static(result: Result, static_name: str) -> float:
    """Multiply-adds of a fixed network's blocks relative to the static network with all of them.

    What a fixed network costs by itself is relative to the static network without the blocks that it lacks.

    Raises:
        BadState: if the network was deleted.
    """
    if not result.network.exists():
        raise BadState(f"{result.network} is gone, and says which blocks were left out; run without --collect")
    model = networks.create(str(result.network))
    size = model.pretrained_cfg["input_size"]
    whole = timm.create_model(f"dg_{static_name}", num_classes=model.num_classes, device="meta")
    return count_costs(model, size).static_total / count_costs(whole, size).static_total


def collect_rows(results: Sequence[Result], shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Make a row for every network and seed, with two for a range: its highest and its lowest budget.

    Args:
        results: of finished trials.
        shares: of fixed networks by their trial's folder, as :func:`share_of_static` gives them.
    """
    rows = []
    for result in results:
        figures, share = result.figures, shares.get(result.trial.folder, 1.0)
        for end in ("", _RANGE_END) if f"eval_top1{_RANGE_END}" in figures else ("",):
            rows.append(
                {
                    "network": f"{result.trial.name}{end}",
                    "seed": result.trial.seed,
                    **{
                        key: figures.get(f"eval_{key}{end}", default)
                        for key, default in (("top1", None), ("loss", None), ("spread", 0.0))
                    },
                    "cost": share * figures.get(f"eval_cost{end}", figures.get("cost", 1.0)),
                }
            )
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], base: str) -> str:
    """Write in Markdown the means over seeds, and the difference of top-1 from the base's on the same seeds."""
    of_base = {row["seed"]: row["top1"] for row in rows if row["network"] == base}
    lines = []
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        found = {row["seed"]: row["top1"] for row in own}
        difference = ""
        if name != base and found.keys() & of_base.keys():
            mean, low, high, n = paired_difference(found, of_base)
            difference = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" if n > 1 else f"{mean:+.2f}"
        means = {key: sum(row[key] for row in own) / len(own) for key in ("cost", "spread", "top1", "loss")}
        lines.append([name, f"{means['cost']:.3f}", f"{means['spread']:.3f}", f"{means['top1']:.2f}", difference,
                      f"{means['loss']:.3f}", len(own)])  # fmt: skip
    header = ["network", "cost", "spread between images", "top-1 (%)", "difference (95 % interval)", "loss", "seeds"]
    return markdown_table(header, lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw top-1 over cost: a dot for every network and seed, in the color of its kind."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for k, kind in enumerate(KINDS):
        own = [row for row in rows if row["network"].startswith(kind)]
        axes.plot([row["cost"] for row in own], [row["top1"] for row in own], "os^D"[k], color=f"C{k}", label=kind)
    axes.set_xlabel("mean cost, relative to the static network")
    axes.set_ylabel("top-1 (%)")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm's name of the static network")
    parser.add_argument("--weights", type=Path, help="safetensors file of it; by default the published weights")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="what to train; by default all")
    parser.add_argument(
        "--target-cost", type=fraction, nargs="+", default=[0.8, 0.7, 0.6], help="costs that gates learn"
    )
    parser.add_argument("--seeds", nargs="+", type=non_negative_int, default=[0, 1, 2], help="seeds of every network")
    args = parse(parser, "skipping", "all images at 224 px", argv)
    torch.set_num_threads(1)
    if args.weights is not None and not args.weights.is_file():
        raise BadValue(f"--weights {args.weights}: there is no such file")
    if "fixed" in args.only and "gates" not in args.only:
        parser.error("fixed networks are those that gates find; name gates, too")
    plan = Plan(args.model, args.weights, _FULL_SIZE if args.full else {})
    store = TrialStore(args)
    starts = [plan.start(seed) for seed in args.seeds]
    trials: list[Trial] = list(starts)
    for start in starts:
        trials += [plan.longer(start)] if "static" in args.only else []
        trials += [plan.gates(start, target) for target in args.target_cost] if "gates" in args.only else []
        trials += [plan.range(start)] if "range" in args.only else []
    results = run_trials(trials, args)
    if "fixed" in args.only:
        start_of = {start.seed: start for start in starts}
        gated = [result for result in results if result.trial.name.startswith("gates")]
        fixed = [plan.fixed(start_of[result.trial.seed], result, store) for result in gated]
        results += run_trials([*starts, *fixed], args)[len(starts) :]
    found = [result for result in results if result.trial.name != "start"]
    if not found:
        raise BadState(f"no trial is finished in {args.results}; run without --collect")
    shares = {r.trial.folder: share_of_static(r, args.model) for r in found if r.trial.name.startswith("fixed")}
    rows = collect_rows(found, shares)
    write_csv(args.results / "skipping.csv", rows)
    text = write_table(rows, "static")
    atomic_write(args.results / "skipping.md", text)
    draw(rows, args.results / "skipping.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
