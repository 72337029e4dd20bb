"""Start a detector from the weights of a saved one."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dg_timm._errors import BadState, BadValue
from dg_timm.conversion.state_dict import check_fit, to_identity
from dg_timm.detection.backbone import flat_name

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_BODY = "backbone.body."


def detector_folder(folder: str) -> Path:
    """The folder with config.json: the given one, or ``model/`` in the folder of a run."""
    place = Path(folder)
    inner = place / "model"
    return inner if not (place / CONFIG).is_file() and (inner / CONFIG).is_file() else place


def is_detector(folder: str) -> bool:
    """Whether a folder holds a saved detector (or a run that left one)."""
    place = detector_folder(folder)
    return (place / CONFIG).is_file() and "detector" in read_config(place)


def read_config(place: Path) -> dict[str, Any]:
    """Read the config.json of a folder.

    Raises:
        BadValue: the file is not valid JSON, or not an object.
    """
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadValue(f"{place / CONFIG} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadValue(f"{place / CONFIG} must hold an object, not {type(config).__name__}")
    return config


def start_from(detector: Any, folder: str) -> None:
    """Load a saved detector's weights: all of its backbone's, and of pyramid and heads those of the same shape.

    Weights of a static backbone make a dynamic one its identity conversion: the detector then finds exactly what the
    static one found.

    Raises:
        BadValue: the backbone is another one, or the weights are missing or damaged; nothing was loaded.
    """
    try:
        state = load_file(detector_folder(folder) / WEIGHTS)
    except (SafetensorError, FileNotFoundError) as error:
        raise BadValue(f"the weights in {folder} are missing or damaged: {error}") from error
    own = detector.state_dict()
    own_names = {flat_name(name): name for name in own}
    state = to_identity(detector, {own_names.get(flat_name(name), name): value for name, value in state.items()})
    try:
        check_fit(detector, state, within=(_BODY,))
    except BadState as error:
        raise BadValue(f"the detector in {folder} has another backbone: {error}") from error
    fitting = {name: value for name, value in state.items() if name in own and own[name].shape == value.shape}
    detector.load_state_dict(fitting, strict=False)
