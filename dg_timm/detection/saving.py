"""Save detectors, and load them again."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dg_timm._errors import BadValue
from dg_timm._files import atomic_path, atomic_write
from dg_timm.detection.detectors import DetectorConfig, create_detector
from dg_timm.detection.initial_weights import CONFIG, WEIGHTS, detector_folder, read_config


def write_detector_config(detector: nn.Module, folder: Path) -> None:
    """Write config.json, from which :func:`load_detector` builds the detector again."""
    atomic_write(folder / CONFIG, json.dumps(detector.config, indent=2) + "\n")


def save_detector(detector: nn.Module, folder: Path) -> None:
    """Write model.safetensors and config.json; files of the same names are replaced."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in detector.state_dict().items()}
    with atomic_path(folder / WEIGHTS) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    write_detector_config(detector, folder)


def load_detector(folder: str) -> Any:
    """Load a detector that :func:`save_detector` or detect.py saved: ``model/``, a checkpoint, or the folder of a run.

    Returns:
        The detector, in evaluation mode.

    Raises:
        BadValue: the folder has no config.json or no weights, or they are damaged or not those of a detector.
    """
    place = detector_folder(folder)
    for name in (CONFIG, WEIGHTS):
        if not (place / name).is_file():
            raise BadValue(f"{folder} has no {name}; give a folder that detect.py saved (model, checkpoints/best)")
    config = read_config(place)
    if "detector" not in config:
        raise BadValue(f"{folder} is a {config.get('architecture')}, not a detector")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["options"].items()}
    detector = create_detector(
        config["detector"],
        config["backbone"],
        config["label_names"],
        config["category_ids"],
        DetectorConfig(**options),
        model_kwargs=config["backbone_kwargs"],
    )
    try:
        detector.load_state_dict(load_file(place / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise BadValue(f"the weights in {place} do not fit its config.json, or are damaged: {error}") from error
    return detector.eval()
