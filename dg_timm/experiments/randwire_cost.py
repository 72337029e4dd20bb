"""Parameters and multiply-adds of the networks of the paper's Table 4, beside its figures.

    python train_scripts/experiments/randwire.py [--seeds 10]

Writes ``randwire.csv`` (a row a network and seed) and prints the table.
"""

import argparse
import statistics
from pathlib import Path

import timm

import dg_timm
from dg_timm.experiments.runner import RESULTS
from dg_timm.training.run.arguments import positive
from dg_timm.training.run.report import write_csv

PAPER = {"er": ("ER (P=0.2)", 602), "ba": ("BA (M=5)", 582), "ws": ("WS (K=4, P=0.75)", 572), "chain": ("DG-Net", 611)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS / "randwire")
    args = parser.parse_args()
    rows = []
    for wiring in PAPER:
        for seed in range(args.seeds if wiring != "chain" else 1):
            model = timm.create_model("randwire_small", topology=wiring, topology_seed=seed)
            if wiring == "chain":
                model = dg_timm.dynamize(model, identity=False)
            counted = dg_timm.analysis.counting(model)
            rows.append(
                {
                    "topology": wiring,
                    "seed": seed,
                    "params": counted.params,
                    "convolutions": counted.convolutions,
                    "aggregation": counted.aggregation,
                }
            )
    args.results.mkdir(parents=True, exist_ok=True)
    write_csv(args.results / "randwire.csv", rows)
    print("| wiring | FLOPs (M), paper | multiply-adds of convolutions (M), mean (range over seeds) | parameters (M) |")
    print("|---|---|---|---|")
    for wiring, (title, paper) in PAPER.items():
        macs = [row["convolutions"] / 1e6 for row in rows if row["wiring"] == wiring]  # type: ignore[operator]
        params = [row["params"] / 1e6 for row in rows if row["wiring"] == wiring]  # type: ignore[operator]
        spread = f" ({min(macs):.0f} to {max(macs):.0f})" if len(macs) > 1 else ""
        print(f"| {title} | {paper} | {statistics.mean(macs):.1f}{spread} | {statistics.mean(params):.2f} |")
    return 0
