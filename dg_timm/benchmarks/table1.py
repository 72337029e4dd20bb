"""Count parameters and multiply-adds of the zoo, beside the paper's Table 1.

python train_scripts/complexity.py          # the rows of Table 1
python train_scripts/complexity.py --all    # the whole zoo
python train_scripts/complexity.py --all --json results/complexity.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._files import atomic_write
from dg_timm._tables import markdown_table
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
_TITLES = ("model", "static params (M)", "DG", "paper", "static multiply-adds (M)", "DG", "paper")


def count(name: str) -> tuple[tuple[int, int, int], Complexity, Complexity]:
    """Count a static network and the dynamic one; give the size of an image as well (channels, height, width)."""
    size = (3, 32, 32) if name.startswith("cifar_") else (3, 224, 224)
    static, dynamic = (complexity(timm.create_model(prefix + name, device="meta"), size) for prefix in ("", "dg_"))
    return size, static, dynamic


def _cells(name: str, static: Complexity, dynamic: Complexity) -> list[Any]:
    params, flops = TABLE_1.get(name, (None, None))
    return [
        f"dg_{name}",
        *(f"{counted.params / 1e6:.2f}" for counted in (static, dynamic)),
        params,
        *(f"{counted.multiply_adds / 1e6:.0f}" for counted in (static, dynamic)),
        flops,
    ]


def _exact(counted: Complexity) -> dict[str, int]:
    return {"params": counted.params, "multiply_adds": counted.multiply_adds}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="count every model of the zoo, not only those of Table 1")
    parser.add_argument("--json", type=Path, help="JSON file for the exact counts; by default none is written")
    args = parser.parse_args(argv)
    counted = {name: count(name) for name in (dg_timm.models.STATIC_MODELS if args.all else TABLE_1)}
    print(markdown_table(_TITLES, [_cells(name, static, dynamic) for name, (_, static, dynamic) in counted.items()]))
    if args.json:
        rows = [
            {"model": f"dg_{name}", "input_size": list(size), "static": _exact(static), "dynamic": _exact(dynamic)}
            for name, (size, static, dynamic) in counted.items()
        ]
        words = ["train_scripts/complexity.py", *(["--all"] if args.all else [])]
        atomic_write(args.json, json.dumps({"command": " ".join(words), "models": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
