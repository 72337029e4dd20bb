"""The sources of cards in hub_cards/, and how a reader runs the code on a card."""

import re
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.helpers.scripts import python

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "hub_cards").glob("*.yaml"))
# {name of a model: source of its card}
MODELS = {name: file for file in SOURCES for name in yaml.safe_load(file.read_text(encoding="utf-8"))["models"]}
# the first of each source, and of each size
SMALLEST = [
    "dg_resnet18.a1_in1k",
    "dg_resnext50_32x4d.a1h_in1k",
    "dg_mobilenetv2_050.lamb_in1k",
    "dg_tf_efficientnet_lite0.in1k",
    "dg_regnetx_002.pycls_in1k",
    "dg_regnety_002.pycls_in1k",
]


def code_blocks(text: str) -> dict[str, str]:
    """The Python blocks of a card by the headings of their sections."""
    return dict(re.findall(r"(?s)### ([^\n]+)\n(?:(?!###).)*?```python\n(.*?)```", text))


def run_code(text: str, folder: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """Run every block of a card alone, one after another in a fresh process; return what each printed.

    ``folder`` is the working directory. It gets what the card asks its reader for: a picture and a folder of pictures.
    """
    rng = np.random.default_rng(0)
    for path in ["image.jpg", *(f"images/{label}/{k}.jpg" for label in ("cat", "dog") for k in range(2))]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(folder / path)
    blocks = code_blocks(text)
    for title, block in blocks.items():
        assert block.startswith("import dg_timm\n"), title
    script = "".join(
        f"print('## {title}')\nexec({block!r}, {{'__name__': '__main__'}})\n" for title, block in blocks.items()
    )
    process = python("-c", script, cwd=folder, env={"PYTHONWARNINGS": "ignore", **(env or {})})
    assert process.returncode == 0, process.stdout + process.stderr
    return dict(re.findall(r"(?s)## ([^\n]+)\n(.*?)(?=## |\Z)", process.stdout))
