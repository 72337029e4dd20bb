"""The networks that ship with the package: trained as dynamic networks, one folder in Hub layout each."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg

from dg_timm.graph.stage import GATE_OPTIONS, GRAPH_OPTIONS
from dg_timm.hub.layout import CONFIG, WEIGHTS

# {name with its tag: folder}
BUNDLED = {folder.name: folder for folder in sorted((Path(__file__).parent / "pretrained").glob("dg_*"))}


def bundled_cfg(folder: Path) -> PretrainedCfg:
    """Turn the config.json of a folder that ships into the configuration that timm keeps of a tag."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    values = {**config["pretrained_cfg"], "num_classes": config["num_classes"], "label_names": config["label_names"]}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in known}
    return PretrainedCfg(**{**values, "file": str(folder / WEIGHTS), "tag": None})


def bundled_graph_options(cfg: PretrainedCfg) -> dict[str, Any]:
    """Give the options of the graph that the weights of a configuration were trained with, if they ship.

    Other options take the same tensors and predict something else.
    """
    folder = Path(str(cfg.file)).parent
    if cfg.state_dict is not None or folder not in BUNDLED.values():  # a state dict comes before a file
        return {}
    made = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_args"]
    return {key: value for key, value in made.items() if key in (*GRAPH_OPTIONS, *GATE_OPTIONS)}
