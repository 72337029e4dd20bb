"""Imagenette from ImageNet weights: gates, a range of budgets, and the fixed networks that gates find, beside static.

    python train_scripts/experiments/skipping.py --data path/to/imagenette --weights model.safetensors
    python train_scripts/experiments/skipping.py --data frgfm/imagenette --full     # all images at 224 px; a GPU

For every seed, a static network is trained for two epochs (recipe ``imagenette_static``). All others start from it,
learn its logits too, and go on for six epochs (recipe ``imagenette_skip``): the static network itself (``static``),
networks whose gates learn one target (``gates``), one whose gates learn the whole range (``range``), and static
networks that cost as little: without the blocks that few images ran (``fixed``), without the last blocks of every stage
(``shallow``), and without blocks drawn at random (``random``).

Writes ``skipping.csv``, ``skipping.md`` and ``skipping.png``; and ``images.csv``, what networks with gates do at each
budget and in cascades, with the rank correlation of an image's cost with the static network's loss. ``--time`` then
times what is finished, alone on a quiet machine, and writes ``times.csv``.
"""

import argparse
import json
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
from dg_timm.experiments.image_costs import Row
from dg_timm.experiments.options import make_parser, parse
from dg_timm.experiments.reductions import REDUCTIONS
from dg_timm.experiments.runner import run_trials
from dg_timm.experiments.skipping_networks import Observer, load_batches, time_networks
from dg_timm.experiments.store import TrialStore
from dg_timm.experiments.trial import Result, Trial
from dg_timm.hub.save import save_pretrained
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run import networks
from dg_timm.training.run.option_types import fraction, non_negative_int, positive_int

KINDS = ("static", "gates", "range", "fixed", *REDUCTIONS)
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
        options = self._options("imagenette_skip", f"dg_{self.model}", {"target-cost": target, "no-cascade": True})
        return Trial(f"gates-{target:g}", options, start.seed, {"initial-checkpoint": start})

    def range(self, start: Trial) -> Trial:
        return Trial(
            "range", self._options("imagenette_skip", f"dg_{self.model}", {}), start.seed, {"initial-checkpoint": start}
        )

    def reduced(self, kind: str, start: Trial, gated: Result, store: TrialStore) -> Trial:
        """A static network that costs about what one with gates does, trained as it was.

        Args:
            kind: ``fixed``: it lacks the blocks that few images of the network with gates ran; or of ``REDUCTIONS``.
        """
        folder = store.output / f"{gated.trial.folder}-{kind}"
        if not (folder / "config.json").exists() and gated.network.exists():
            _write_reduced(store, start, gated, kind, folder)
        name = gated.trial.name.replace("gates", kind)
        options = self._options("imagenette_static", f"dg_{self.model}", {**_LONGER, "graph-lr-scale": 0.1})
        return Trial(name, {**options, "initial-checkpoint": folder}, start.seed, {"distill": start})

    def _options(self, recipe: str, model: str, others: Mapping[str, Any]) -> dict[str, Any]:
        return {"recipe": recipe, "model": model, "workers": 0, **others, **self.common}


def _write_reduced(store: TrialStore, start: Trial, gated: Result, kind: str, folder: Path) -> None:
    """Save the start's identity conversion without some blocks, as :meth:`Plan.reduced` says."""
    model = networks.create(str(gated.network)).eval()
    plain = dynamize(networks.create(str(store.network(start))))
    if kind == "fixed":
        _, images = load_batches(store, gated.network, "--refit-norms", str(_OBSERVED))
        leave_out(plain, rarely_run(model, images))
    else:
        most = gated.figures.get("eval_cost", 1.0)
        leave_out(plain, REDUCTIONS[kind](model, most, gated.trial.seed))
    save_pretrained(plain, folder)


def keep_shares(file: Path, results: Sequence[Result], static_name: str) -> dict[str, float]:
    """Give the multiply-adds of reduced networks relative to the static network with all blocks, by trial's folder.

    What such a network costs by itself is relative to the static network without the blocks that it lacks. The shares
    are kept as JSON, for when the networks are gone.

    Raises:
        BadState: if a network is gone, and its share was not kept.
    """
    kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for result in results:
        if result.network.exists():
            model = networks.create(str(result.network))
            size = model.pretrained_cfg["input_size"]
            whole = timm.create_model(f"dg_{static_name}", num_classes=model.num_classes, device="meta")
            share = count_costs(model, size).static_total / count_costs(whole, size).static_total
            kept[result.trial.folder] = share
        elif result.trial.folder not in kept:
            raise BadState(f"{result.network} is gone, and says which blocks were left out; run without --collect")
    if results:
        atomic_write(file, json.dumps(kept, indent=1) + "\n")
    return kept


def collect_rows(results: Sequence[Result], shares: Mapping[str, float]) -> list[dict[str, Any]]:
    """Make a row for every network and seed, with two for a range: its highest and its lowest budget.

    Args:
        results: of finished trials.
        shares: of reduced networks by their trial's folder, as :func:`keep_shares` gives them.
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


def write_images_table(rows: Sequence[Row]) -> str:
    """Write in Markdown what networks do at each budget and in cascades: means over seeds."""
    lines = []
    for name, how in dict.fromkeys((row["network"], row["how"]) for row in rows):
        own = [row for row in rows if (row["network"], row["how"]) == (name, how)]
        means = {
            key: sum(row[key] for row in own) / len(own)
            for key in ("cost", "spread", "top1", "loss", "rank_correlation")
        }
        lines.append([name, how, f"{means['cost']:.3f}", f"{means['spread']:.3f}", f"{means['top1']:.2f}",
                      f"{means['loss']:.3f}", f"{means['rank_correlation']:.2f}", len(own)])  # fmt: skip
    header = ["network", "how", "cost", "spread between images", "top-1 (%)", "loss", "rank correlation", "seeds"]
    return markdown_table(header, lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw top-1 over cost: a dot for every network and seed, in the color of its kind."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for k, kind in enumerate(KINDS):
        own = [row for row in rows if row["network"].startswith(kind)]
        axes.plot([row["cost"] for row in own], [row["top1"] for row in own], "os^Dvx"[k], color=f"C{k}", label=kind)
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
    parser.add_argument(
        "--time", action="store_true", help="train nothing, and time what is finished of the first seed"
    )
    parser.add_argument("--threads", type=positive_int, default=1, help="number of CPU threads of --time")
    parser.add_argument("--time-batch", type=positive_int, nargs="+", default=[1, 8, 32], help="batch sizes of --time")
    parser.add_argument("--rounds", type=positive_int, default=15, help="rounds of --time, at least 2")
    args = parse(parser, "skipping", "all images at 224 px", argv)
    args.collect |= args.time
    torch.set_num_threads(args.threads)
    if args.weights is not None and not args.weights.is_file():
        raise BadValue(f"--weights {args.weights}: there is no such file")
    reduced = [kind for kind in ("fixed", *REDUCTIONS) if kind in args.only]
    if reduced and "gates" not in args.only:
        parser.error(f"{', '.join(reduced)}: what they cost is what gates find; name gates, too")
    plan = Plan(args.model, args.weights, _FULL_SIZE if args.full else {})
    store = TrialStore(args)
    starts = [plan.start(seed) for seed in args.seeds]
    trials: list[Trial] = list(starts)
    for start in starts:
        trials += [plan.longer(start)] if "static" in args.only else []
        trials += [plan.gates(start, target) for target in args.target_cost] if "gates" in args.only else []
        trials += [plan.range(start)] if "range" in args.only else []
    results = run_trials(trials, args)
    start_of = {start.seed: start for start in starts}
    gated = [result for result in results if result.trial.name.startswith("gates")]
    others = [plan.reduced(kind, start_of[r.trial.seed], r, store) for kind in reduced for r in gated]
    if others:
        results += [result for result in run_trials([*starts, *others], args) if result.trial in others]
    found = [result for result in results if result.trial.name != "start"]
    if not found:
        raise BadState(f"no trial is finished in {args.results}; run without --collect")
    statics = {result.trial.seed: result for result in found if result.trial.name == "static"}
    if args.time:
        return _time(args, store, found, statics)
    shares = keep_shares(args.results / "shares.json", [r for r in found if r.trial in others], args.model)
    rows = collect_rows(found, shares)
    write_csv(args.results / "skipping.csv", rows)
    observers = {seed: Observer(store, static) for seed, static in statics.items()}
    observed = [row for r in found if r.trial.seed in observers for row in observers[r.trial.seed].rows(r)]
    if observed:
        write_csv(args.results / "images.csv", observed)
        print(write_images_table(observed))
    text = write_table(rows, "static")
    atomic_write(args.results / "skipping.md", text)
    draw(rows, args.results / "skipping.png")
    print(text)
    return 0


def _time(args: argparse.Namespace, store: TrialStore, found: Sequence[Result], statics: Mapping[int, Result]) -> int:
    """Time the networks of the first seed, and add the rows to times.csv."""
    seed = args.seeds[0]
    if seed not in statics:
        raise BadState(f"there is no static network of seed {seed} to time beside; train it first")
    timed = [r for r in found if r.trial.seed == seed and r.trial.name != "static" and r.network.exists()]
    rows = time_networks(store, timed, statics[seed], args.time_batch, args.rounds)
    file = args.results / f"times-{args.threads}.csv"
    write_csv(file, rows)
    print(file.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
