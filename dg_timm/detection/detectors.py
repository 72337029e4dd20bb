"""torchvision's detectors over a feature pyramid of any timm backbone: made, saved, loaded, frozen."""

import functools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from dg_timm._version import __version__
from dg_timm.conversion.state_dict import check_fit, to_identity
from dg_timm.graph.stage import graph_stages
from dg_timm.training.data.loading import seeded
from dg_timm.training.run import networks as models

STRIDES = (4, 8, 16, 32)  # of the four feature levels of a pyramid (Lin et al., 2017)
CONFIG = "config.json"


class Backbone(nn.Module):
    """A timm feature extractor under a feature pyramid.

    Args:
        body: made with ``features_only=True``; images (batch, 3, H, W) -> one map a level.
        levels: strides of the levels that the pyramid reads.
        out_channels: of every level of the pyramid.
        more: torchvision's extra levels on top.
    """

    def __init__(self, body: Any, levels: Sequence[int], out_channels: int, more: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.places = [body.feature_info.reduction().index(stride) for stride in levels]
        channels = [body.feature_info.channels()[place] for place in self.places]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, more)
        self.out_channels = out_channels
        # how it runs; set_execution's business is its body's
        self.layout, self.precision, self.compiled = torch.contiguous_format, torch.float32, False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(batch, 3, H, W) -> ``{"0": (batch, out_channels, H / 4, W / 4), ...}``, finest first; float32."""
        run = _compiled() if self.compiled else _run
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            maps = run(self.body, images.contiguous(memory_format=self.layout))
            levels = self.fpn(OrderedDict((str(k), maps[place]) for k, place in enumerate(self.places)))
        return {name: level.float() for name, level in levels.items()}


def _run(body: Any, images: Tensor) -> list[Tensor]:
    maps: list[Tensor] = body(images)
    return maps


@functools.cache
def _compiled() -> Any:
    return torch.compile(_run)  # the function: a compiled module would be another module, with other names


class _PreciseHeads:
    """Heads in float32, whatever the backbone runs in: in bfloat16 a box above 256 px would lie on a grid of 2 px."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        with torch.autocast(images[0].device.type, enabled=False):
            return super().forward(images, targets)  # type: ignore[misc]


class PreciseFasterRCNN(_PreciseHeads, FasterRCNN):
    pass


class PreciseRetinaNet(_PreciseHeads, RetinaNet):
    pass


class PreciseFCOS(_PreciseHeads, FCOS):
    pass


class Kind(NamedTuple):
    """A detector: which levels its pyramid reads, and how it is built on it."""

    levels: tuple[int, ...]
    more: Any  # channels -> extra levels
    build: Any  # (backbone, classes, options) -> detector


def _faster_rcnn(backbone: Backbone, classes: int, o: "Options", common: dict[str, Any]) -> nn.Module:
    sizes = tuple((o.anchor_size * 2**k,) for k in range(5))
    return PreciseFasterRCNN(
        backbone,
        classes,
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        box_batch_size_per_image=o.roi_batch,
        **common,
    )


def _retinanet(backbone: Backbone, classes: int, o: "Options", common: dict[str, Any]) -> nn.Module:
    sizes = tuple(tuple(int(o.anchor_size * 2 ** (k + third / 3)) for third in range(3)) for k in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return PreciseRetinaNet(backbone, classes, anchor_generator=anchors, **common)


def _fcos(backbone: Backbone, classes: int, o: "Options", common: dict[str, Any]) -> nn.Module:
    anchors = AnchorGenerator(tuple((o.anchor_size // 4 * 2**k,) for k in range(5)), ((1.0,),) * 5)
    return PreciseFCOS(backbone, classes, anchor_generator=anchors, **common)


DETECTORS = {
    "faster_rcnn": Kind(STRIDES, lambda channels: LastLevelMaxPool(), _faster_rcnn),
    "retinanet": Kind(STRIDES[1:], lambda channels: LastLevelP6P7(channels, channels), _retinanet),
    "fcos": Kind(STRIDES[1:], lambda channels: LastLevelP6P7(channels, channels), _fcos),
}


class Options(NamedTuple):
    """What a detector is built with, beside its backbone; written into its config.json.

    Attributes:
        min_size: pixels of the shorter side; of several, training draws one for each image, and evaluation takes the
            last one.
        max_size: pixels of the longer side, at most.
        fpn_channels: of every level of the pyramid.
        anchor_size: pixels of the smallest anchors (a multiple of 4).
        roi_batch: regions of an image that Faster R-CNN's second stage learns from.
        mean, std: of the images; by default the backbone's own.
    """

    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    fpn_channels: int = 256
    anchor_size: int = 32
    roi_batch: int = 512
    mean: Optional[tuple[float, ...]] = None
    std: Optional[tuple[float, ...]] = None


def create_detector(
    detector: str,
    backbone: str,
    label_names: Sequence[str],
    category_ids: Sequence[int],
    options: Options = Options(),  # noqa: B008 (immutable)
    *,
    pretrained: bool = False,
    initial_checkpoint: Optional[str] = None,
    model_kwargs: Optional[Mapping[str, Any]] = None,
    seed: int = 0,
) -> Any:
    """A detector of torchvision over a timm backbone.

    Args:
        detector: one of ``DETECTORS``.
        backbone: any name that :func:`dg_timm.training.run.networks.create` takes.
        label_names, category_ids: of the classes; label k + 1 is the k-th one.
        pretrained, initial_checkpoint: where the backbone's weights come from; static ones make a ``dg_*`` backbone
            their identity conversion. The folder of a saved detector starts from that one (:func:`start_from`).
        model_kwargs: of the backbone.
        seed: of the weights of pyramid and heads, which then are the same over any backbone of the same channels.

    Returns:
        a torchvision detector; its ``config`` builds it again.

    Raises:
        ValueError: for an unknown detector or backbone, or one without feature maps at strides 4, 8, 16 and 32.
    """
    if detector not in DETECTORS:
        raise ValueError(f"{detector} is no detector; there are {', '.join(DETECTORS)}")
    channels = options.fpn_channels
    if detector == "fcos" and (channels % 32 or channels == 32):  # its heads have norms of 32 groups
        raise ValueError(f"fcos needs 64, 96, 128, ... channels in its pyramid, not --fpn-channels {channels}")
    kind = DETECTORS[detector]
    from_detector = initial_checkpoint is not None and _is_detector(initial_checkpoint)
    kwargs = {**_own_args(backbone), **dict(model_kwargs or {})}
    body = create_body(
        backbone,
        pretrained=pretrained,
        initial_checkpoint=None if from_detector else initial_checkpoint,
        **dict(model_kwargs or {}),
    )
    data = resolve_data_config({}, pretrained_cfg=body.pretrained_cfg)
    options = options._replace(mean=tuple(options.mean or data["mean"]), std=tuple(options.std or data["std"]))
    common = dict(
        min_size=tuple(options.min_size), max_size=options.max_size, image_mean=options.mean, image_std=options.std
    )
    with seeded(seed):
        pyramid = Backbone(body, kind.levels, channels, kind.more(channels))
        built = kind.build(pyramid, len(label_names) + 1, options, common)
    built.config = {
        "detector": detector,
        "backbone": body.pretrained_cfg.get("architecture") or backbone,
        "backbone_kwargs": kwargs,
        "label_names": list(label_names),
        "category_ids": list(category_ids),
        "options": {key: list(v) if isinstance(v, tuple) else v for key, v in options._asdict().items()},
        "dg_timm": {"version": __version__},
    }
    if from_detector:
        start_from(built, str(initial_checkpoint))
    return built


def _own_args(backbone: str) -> dict[str, Any]:
    """What a saved backbone was made with, and a detector over it must be made with again."""
    others = ("in_chans", "num_classes", "global_pool", "drop_rate", "features_only", "out_indices")
    return {key: value for key, value in models.saved_args(backbone).items() if key not in others}


def _is_detector(folder: str) -> bool:
    config = _place(folder) / CONFIG
    return config.is_file() and "detector" in json.loads(config.read_text())


def _place(folder: str) -> Path:
    place = Path(folder)
    inner = place / "model"  # of a run's folder
    return inner if not (place / CONFIG).is_file() and (inner / CONFIG).is_file() else place


def start_from(detector: Any, folder: str) -> None:
    """Take over a saved detector's weights: all of its backbone's, and of pyramid and heads what has the same shape.

    Weights of a static backbone make a dynamic one their identity conversion: the detector then finds exactly what the
    static one found.

    Raises:
        ValueError: if the backbone is another one, or the weights are damaged.
    """
    try:
        state = load_file(_place(folder) / "model.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"the weights in {folder} are missing or damaged: {error}") from error
    body, prefix = detector.backbone.body, "backbone.body."
    own = {_flat(name): name for name in body.state_dict()}
    taken = {
        own.get(_flat(name.removeprefix(prefix)), name.removeprefix(prefix)): value
        for name, value in state.items()
        if name.startswith(prefix)
    }
    try:
        taken = to_identity(body, taken)
        check_fit(body, taken)
    except RuntimeError as error:
        raise ValueError(f"the detector in {folder} has another backbone: {error}") from error
    rest = {name: value for name, value in detector.state_dict().items() if not name.startswith(prefix)}
    fitting = {k: state[k] for k, value in rest.items() if k in state and state[k].shape == value.shape}
    body.load_state_dict(taken)
    detector.load_state_dict(fitting, strict=False)


def create_body(backbone: str, **options: Any) -> Any:
    """A timm model with ``features_only=True``; ValueError without the four levels, or for one image size alone."""
    try:
        body = models.create(backbone, features_only=True, **options)
    except (ValueError, FileNotFoundError):
        raise
    except Exception as error:  # timm's, of many kinds, for what gives no features
        raise ValueError(f"{backbone} gives no feature maps (features_only=True): {error!r}") from error
    strides = body.feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise ValueError(
            f"{backbone} has feature maps at the strides {', '.join(map(str, strides))}; a pyramid needs "
            f"{', '.join(map(str, STRIDES))}"
        )
    height, width = 96, 160
    wanted = [(1, c, height // s, width // s) for c, s in zip(body.feature_info.channels(), strides, strict=True)]
    training = body.training
    try:
        with torch.no_grad():
            found = [tuple(level.shape) for level in body.eval()(torch.zeros(1, 3, height, width))]
    except Exception as error:
        raise ValueError(f"{backbone} does not take images of any size ({error!r}); a detector needs that") from error
    body.train(training)
    if found != wanted:
        raise ValueError(f"{backbone} makes maps of {found} from an image of {height} x {width}, not of {wanted}")
    return body


def freeze_backbone(detector: Any, levels: int, norms: bool) -> None:
    """Stop parts of the backbone from learning, as Detectron2 does by default.

    Args:
        levels: the stem and so many of the four feature levels (Detectron2's FREEZE_AT is one more).
        norms: weights and statistics of all norms that came with the backbone. A norm that the graph added (of a
            projection) still learns: it has no statistics yet.
    """
    body = detector.backbone.body
    if levels:
        modules = [info["module"] for info in body.feature_info.get_dicts(["module"])]
        last = _flat(modules[body.feature_info.reduction().index(STRIDES[levels - 1])])
        parameters = list(body.named_parameters())  # in the order of the modules, from the stem on
        inside = [place for place, (name, _) in enumerate(parameters) if _flat(name).startswith(f"{last}_")]
        if not inside:
            raise ValueError(
                f"this {type(body).__name__} has no module {last} to freeze up to; leave --freeze-levels out"
            )
        for _, parameter in parameters[: inside[-1] + 1]:
            parameter.requires_grad_(False)
    if norms:
        added = {
            id(module)
            for stage in graph_stages(body).values()
            for name in stage.graph_modules()
            for module in stage.get_submodule(name).modules()
        }
        for module in body.modules():
            if isinstance(module, models.NORMS) and id(module) not in added:
                for parameter in module.parameters():
                    parameter.requires_grad_(False)


def _flat(name: str) -> str:
    return name.replace(".", "_")  # timm's feature extractors name a stage blocks.1 or blocks_1


def write_detector_config(detector: nn.Module, folder: Path) -> None:
    """config.json, from which :func:`load_detector` builds it again."""
    (folder / CONFIG).write_text(json.dumps(detector.config, indent=2) + "\n")


def load_detector(folder: str) -> Any:
    """A detector that detect.py saved: its ``model/``, or a checkpoint; in evaluation mode.

    Raises:
        FileNotFoundError: if the folder has no config.json or no weights.
        ValueError: if they are of something else, or damaged.
    """
    place = _place(folder)
    for name in (CONFIG, "model.safetensors"):
        if not (place / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; give a folder that detect.py saved (model, checkpoints/best)"
            )
    config = json.loads((place / CONFIG).read_text())
    if "detector" not in config:
        raise ValueError(f"{folder} is a {config.get('architecture')}, no detector")
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["options"].items()}
    detector = create_detector(
        config["detector"],
        config["backbone"],
        config["label_names"],
        config["category_ids"],
        Options(**options),
        model_kwargs=config["backbone_kwargs"],
    )
    try:
        detector.load_state_dict(load_file(place / "model.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"the weights in {place} do not fit its config.json, or are damaged: {error}") from error
    return detector.eval()
