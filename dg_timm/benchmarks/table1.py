"""Parameters and multiply-adds of the zoo, against the paper's Table 1.

python train_scripts/complexity.py          # the rows of Table 1
python train_scripts/complexity.py --all    # the whole zoo, as the Markdown table of the README
python train_scripts/complexity.py --all --json results/complexity.json
"""

import argparse
import json
from pathlib import Path

import timm

import dg_timm
from dg_timm.analysis.counting import Complexity, complexity

# model -> DG-Net's parameters and FLOPs in millions, as the paper gives them (Table 1, 224 x 224)
TABLE_1 = {
    "mobilenetv2_100": (3.58, 312),
    "resnet18": (11.71, 1826),
    "resnet50": (25.62, 4125),
    "resnet101": (44.90, 7837),
    "resnext50_32x4d": (25.09, 4305),
    "regnetx_006": (6.22, 600),
    "regnetx_016": (9.22, 1604),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every model of the zoo, not only the rows of Table 1")
    parser.add_argument("--json", type=Path, help="write the exact counts to this file")
    args = parser.parse_args()
    rows = []
    names = dg_timm.models.registry.VARIANTS if args.all else TABLE_1

    print("| model | static params (M) | DG | paper | static multiply-adds (M) | DG | paper |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        size = (3, 32, 32) if name.startswith("cifar_") else (3, 224, 224)
        static = complexity(timm.create_model(name, device="meta"), size)
        dynamic = complexity(timm.create_model(f"dg_{name}", device="meta"), size)
        params, flops = TABLE_1.get(name, ("", ""))
        both = {"static": exact(static), "dynamic": exact(dynamic)}
        rows.append({"model": f"dg_{name}", "input_size": list(size), **both})
        print(
            f"| dg_{name} | {static.params / 1e6:.2f} | {dynamic.params / 1e6:.2f} | {params} "
            f"| {static.multiply_adds / 1e6:.0f} | {dynamic.multiply_adds / 1e6:.0f} | {flops} |"
        )
    if args.json:
        result = {
            "command": f"train_scripts/complexity.py{' --all' if args.all else ''}",
            "models": rows,
        }
        beside = args.json.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        beside.replace(args.json)


def exact(counts: Complexity) -> dict[str, int]:
    return {"params": counts.params, "multiply_adds": counts.multiply_adds}
