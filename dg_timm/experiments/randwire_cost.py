"""Count parameters and multiply-adds of the networks of the paper's Table 4, beside its figures.

    python train_scripts/experiments/randwire.py [--seeds 10]

Writes ``randwire.csv`` (a row for each network and seed) and prints the table.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm

import dg_timm
from dg_timm._tables import markdown_table
from dg_timm.cli.errors import cli_errors
from dg_timm.experiments.options import make_parser, results_folder
from dg_timm.training.loop.csv_tables import write_csv
from dg_timm.training.run.option_types import positive_int

CHAIN = "chain"
# topology -> its name and FLOPs (millions) in the paper
PAPER = {"er": ("ER (P=0.2)", 602), "ba": ("BA (M=5)", 582), "ws": ("WS (K=4, P=0.75)", 572), CHAIN: ("DG-Net", 611)}
_HEADER = (
    "topology", "FLOPs (M), paper", "multiply-adds of convolutions (M), mean (range over seeds)", "parameters (M)"
)  # fmt: skip


def count_network(topology: str, seed: int) -> dict[str, Any]:
    """Count one network: a row of the table that is written."""
    model = timm.create_model("randwire_small", topology=topology, topology_seed=seed)
    if topology == CHAIN:
        model = dg_timm.dynamize(model, identity=False)
    counted = dg_timm.complexity(model)
    return {
        "topology": topology,
        "seed": seed,
        "params": counted.params,
        "convolutions": counted.convolutions,
        "aggregation": counted.aggregation,
    }


def cells_of(topology: str, rows: Sequence[Mapping[str, Any]]) -> list[object]:
    """Write the cells of one topology: its mean over seeds, beside the paper."""
    title, paper = PAPER[topology]
    macs, params = (
        [row[key] / 1e6 for row in rows if row["topology"] == topology] for key in ("convolutions", "params")
    )
    spread = f" ({min(macs):.0f} to {max(macs):.0f})" if len(macs) > 1 else ""
    return [title, paper, f"{statistics.mean(macs):.1f}{spread}", f"{statistics.mean(params):.2f}"]


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Count, write and print; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=positive_int, default=10, help="number of seeds of every random topology")
    parser.add_argument("--results", type=Path, help="folder of the table; by default results/experiments/randwire")
    args = parser.parse_args(argv)
    rows = [
        count_network(topology, seed) for topology in PAPER for seed in range(args.seeds if topology != CHAIN else 1)
    ]
    write_csv((args.results or results_folder() / "randwire") / "randwire.csv", rows)
    print(markdown_table(_HEADER, [cells_of(topology, rows) for topology in PAPER]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
