"""torchvision's detectors over a feature pyramid of any timm backbone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm.data import resolve_data_config
from torch import Tensor, autocast, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from dg_timm._errors import BadValue
from dg_timm._version import __version__
from dg_timm.detection.backbone import STRIDES, PyramidBackbone, create_body
from dg_timm.detection.initial_weights import is_detector, start_from
from dg_timm.training.data.seeding import seeded
from dg_timm.training.run import networks


class DetectorConfig(NamedTuple):
    """How a detector is built, apart from its backbone and classes; written into its config.json.

    Attributes:
        min_size: length of the shorter side of an image in pixels. Of several, training draws one for each image, and
            evaluation takes the last one.
        max_size: largest length of the longer side in pixels.
        fpn_channels: channels of every level of the pyramid.
        anchor_size: side of the smallest anchors in pixels, a multiple of 4.
        roi_batch: regions of an image from which Faster R-CNN's second stage learns.
        mean: mean of the images' channels, for images in 0..1; by default the backbone's own.
        std: standard deviation of the images' channels, likewise.
    """

    min_size: tuple[int, ...] = (800,)
    max_size: int = 1333
    fpn_channels: int = 256
    anchor_size: int = 32
    roi_batch: int = 512
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class _PreciseHeads:
    """Heads in float32, whatever the backbone runs in: in bfloat16 a box above 256 px would lie on a grid of 2 px."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        with autocast(images[0].device.type, enabled=False):
            return super().forward(images, targets)  # type: ignore[misc]


class PreciseFasterRCNN(_PreciseHeads, FasterRCNN):
    """torchvision's Faster R-CNN, with heads in float32."""


class PreciseRetinaNet(_PreciseHeads, RetinaNet):
    """torchvision's RetinaNet, with heads in float32."""


class PreciseFCOS(_PreciseHeads, FCOS):
    """torchvision's FCOS, with heads in float32."""


class DetectorSpec(NamedTuple):
    """A kind of detector.

    Attributes:
        strides: the strides of the levels that its pyramid reads, in pixels.
        extra_blocks: maps the channels of the pyramid to torchvision's module for extra levels on top.
        build: maps (backbone, classes with the background, config, arguments that all kinds take) to the detector.
    """

    strides: tuple[int, ...]
    extra_blocks: Callable[[int], nn.Module]
    build: Callable[[PyramidBackbone, int, DetectorConfig, dict[str, Any]], nn.Module]


def _faster_rcnn(backbone: PyramidBackbone, classes: int, config: DetectorConfig, common: dict[str, Any]) -> nn.Module:
    sizes = tuple((config.anchor_size * 2**k,) for k in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return PreciseFasterRCNN(
        backbone, classes, rpn_anchor_generator=anchors, box_batch_size_per_image=config.roi_batch, **common
    )


def _retinanet(backbone: PyramidBackbone, classes: int, config: DetectorConfig, common: dict[str, Any]) -> nn.Module:
    sizes = tuple(tuple(int(config.anchor_size * 2 ** (k + third / 3)) for third in range(3)) for k in range(5))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return PreciseRetinaNet(backbone, classes, anchor_generator=anchors, **common)


def _fcos(backbone: PyramidBackbone, classes: int, config: DetectorConfig, common: dict[str, Any]) -> nn.Module:
    anchors = AnchorGenerator(tuple((config.anchor_size // 4 * 2**k,) for k in range(5)), ((1.0,),) * 5)
    return PreciseFCOS(backbone, classes, anchor_generator=anchors, **common)


DETECTORS = {
    "faster_rcnn": DetectorSpec(STRIDES, lambda channels: LastLevelMaxPool(), _faster_rcnn),
    "retinanet": DetectorSpec(STRIDES[1:], lambda channels: LastLevelP6P7(channels, channels), _retinanet),
    "fcos": DetectorSpec(STRIDES[1:], lambda channels: LastLevelP6P7(channels, channels), _fcos),
}


def create_detector(
    detector: str,
    backbone: str,
    label_names: Sequence[str],
    category_ids: Sequence[int],
    config: DetectorConfig = DetectorConfig(),  # noqa: B008 (immutable)
    *,
    pretrained: bool = False,
    initial_checkpoint: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Any:
    """Build a detector of torchvision over a timm backbone.

    Args:
        detector: one of ``DETECTORS``.
        backbone: any name that :func:`dg_timm.training.run.networks.create` takes.
        label_names: the name of each class; label k + 1 is the k-th one.
        category_ids: the data set's own number of each class.
        config: sizes, channels and anchors.
        pretrained: start from the backbone's published weights.
        initial_checkpoint: weights of the backbone to start from: a safetensors file or a folder. Static ones make a
            ``dg_*`` backbone their identity conversion. The folder of a saved detector starts from that detector
            (:func:`dg_timm.detection.initial_weights.start_from`).
        model_kwargs: what the backbone is made with.
        seed: the seed of the weights of pyramid and heads, which are then the same over any backbone of the same
            channels.

    Returns:
        A torchvision detector; from its ``config`` it can be built again.

    Raises:
        BadValue: the detector or backbone is unknown, or the backbone has no feature maps at strides 4, 8, 16 and 32.
    """
    if detector not in DETECTORS:
        raise BadValue(f"unknown detector {detector}; there are {', '.join(DETECTORS)}")
    channels = config.fpn_channels
    if detector == "fcos" and (channels % 32 or channels == 32):  # its heads have norms of 32 groups
        raise BadValue(f"fcos needs 64, 96, 128, ... channels in its pyramid, not --fpn-channels {channels}")
    spec = DETECTORS[detector]
    other_detector = initial_checkpoint if initial_checkpoint and is_detector(initial_checkpoint) else None
    weights = None if other_detector else initial_checkpoint
    kwargs = dict(model_kwargs or {})
    body = create_body(backbone, pretrained=pretrained, initial_checkpoint=weights, **kwargs)
    config = _with_norm(config, body)
    with seeded(seed):
        pyramid = PyramidBackbone(body, spec.strides, channels, spec.extra_blocks(channels))
        built: Any = spec.build(pyramid, len(label_names) + 1, config, _common_arguments(config))
    built.config = {
        "detector": detector,
        "backbone": body.pretrained_cfg.get("architecture") or backbone,
        "backbone_kwargs": {**_saved_kwargs(backbone), **kwargs},
        "label_names": list(label_names),
        "category_ids": list(category_ids),
        "options": {key: list(v) if isinstance(v, tuple) else v for key, v in config._asdict().items()},
        "dg_timm": {"version": __version__},
    }
    if other_detector:
        start_from(built, other_detector)
    return built


def _with_norm(config: DetectorConfig, body: Any) -> DetectorConfig:
    data = resolve_data_config({}, pretrained_cfg=body.pretrained_cfg)
    return config._replace(mean=tuple(config.mean or data["mean"]), std=tuple(config.std or data["std"]))


def _common_arguments(config: DetectorConfig) -> dict[str, Any]:
    return dict(min_size=tuple(config.min_size), max_size=config.max_size, image_mean=config.mean, image_std=config.std)


def _saved_kwargs(backbone: str) -> dict[str, Any]:
    """What a saved backbone was made with: a detector over it must make it with the same."""
    others = ("in_chans", "num_classes", "global_pool", "drop_rate", "features_only", "out_indices")
    return {key: value for key, value in networks.saved_args(backbone).items() if key not in others}
