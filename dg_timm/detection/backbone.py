"""A timm feature extractor under a feature pyramid: the part of a detector that may be dynamic."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork

from dg_timm._errors import BadValue, UserError
from dg_timm._modes import evaluating
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.learner import BATCH_NORMS
from dg_timm.training.run import networks

STRIDES = (4, 8, 16, 32)  # of the four feature levels of a pyramid (Lin et al., 2017)
_PROBE_SIZE = (96, 160)  # height and width of an image on which a backbone is tried: not square
# what timm's models raise where they have no feature maps, or take images of one size alone
_TIMM_REFUSES = (AssertionError, RuntimeError)


class PyramidBackbone(nn.Module):
    """A timm feature extractor under a feature pyramid.

    Args:
        body: a model made with ``features_only=True``: images (batch, 3, H, W) -> one map for each level.
        strides: the strides of the levels that the pyramid reads, in pixels.
        out_channels: the channels of every level of the pyramid.
        extra_blocks: torchvision's module for extra levels on top of the pyramid.

    Attributes:
        layout: the memory format in which the body gets its images.
        precision: the dtype in which body and pyramid compute, through autocast.
        compiled: run the body through ``torch.compile``. It is compiled beside the module, not in its place: names,
            copies and hooks stay those of the module. How the graph of the body executes is a setting of the body.
    """

    def __init__(self, body: Any, strides: Sequence[int], out_channels: int, extra_blocks: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.level_indices = [body.feature_info.reduction().index(stride) for stride in strides]
        channels = [body.feature_info.channels()[level] for level in self.level_indices]
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks)
        self.out_channels = out_channels
        self.layout, self.precision, self.compiled = torch.contiguous_format, torch.float32, False
        self._compiled_run: Callable[[Any, Tensor], list[Tensor]] | None = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(batch, 3, H, W) -> ``{"0": (batch, out_channels, H / 4, W / 4), ...}``, finest first; float32."""
        if self.compiled and self._compiled_run is None:
            self._compiled_run = torch.compile(_run)
        run = self._compiled_run if self.compiled and self._compiled_run is not None else _run
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            maps = run(self.body, images.contiguous(memory_format=self.layout))
            levels = self.fpn(OrderedDict((str(k), maps[level]) for k, level in enumerate(self.level_indices)))
        return {name: level.float() for name, level in levels.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what was compiled: a copy compiles its own."""
        state: dict[str, Any] = super().__getstate__()
        return {**state, "_compiled_run": None}


def _run(body: Any, images: Tensor) -> list[Tensor]:
    maps: list[Tensor] = body(images)
    return maps


def create_body(backbone: str, **options: Any) -> Any:
    """Create a timm model with ``features_only=True`` that can carry a pyramid.

    Args:
        backbone: any name that :func:`dg_timm.training.run.networks.create` takes.
        options: what that function takes.

    Raises:
        BadValue: the model is unknown, has no feature maps at the strides 4, 8, 16 and 32, or takes images of one size
            alone.
    """
    try:
        body = networks.create(backbone, features_only=True, **options)
    except UserError:
        raise
    except _TIMM_REFUSES as error:
        raise BadValue(f"{backbone} gives no feature maps (features_only=True): {error!r}") from error
    strides = body.feature_info.reduction()
    if not set(STRIDES) <= set(strides):
        raise BadValue(
            f"{backbone} has feature maps at the strides {', '.join(map(str, strides))}; a pyramid needs "
            f"{', '.join(map(str, STRIDES))}"
        )
    height, width = _PROBE_SIZE
    expected = [(1, c, height // s, width // s) for c, s in zip(body.feature_info.channels(), strides, strict=True)]
    try:
        with torch.no_grad(), evaluating(body):
            found = [tuple(level.shape) for level in body(torch.zeros(1, 3, height, width))]
    except _TIMM_REFUSES as error:
        raise BadValue(f"{backbone} does not take images of any size ({error!r}); a detector needs that") from error
    if found != expected:
        raise BadValue(f"{backbone} makes maps of {found} from an image of {height} x {width}, not of {expected}")
    return body


def freeze_backbone(detector: Any, levels: int, norms: bool) -> None:
    """Stop parts of the backbone from learning, as Detectron2 does by default.

    Args:
        detector: a detector of :func:`dg_timm.detection.detectors.create_detector`.
        levels: freeze the stem and this many of the four feature levels, 0..4 (Detectron2's FREEZE_AT is one more). 0
            freezes neither.
        norms: freeze weights and statistics of all norms that came with the backbone. A norm that the graph added (to a
            projection) still learns: it has no statistics yet.

    Raises:
        BadValue: the backbone has no module of its own for the last level to freeze.
    """
    body = detector.backbone.body
    if levels:
        modules = [info["module"] for info in body.feature_info.get_dicts(["module"])]
        last = flat_name(modules[body.feature_info.reduction().index(STRIDES[levels - 1])])
        parameters = list(body.named_parameters())  # in the order of the modules, from the stem on
        inside = [k for k, (name, _) in enumerate(parameters) if flat_name(name).startswith(f"{last}_")]
        if not inside:
            raise BadValue(
                f"this {type(body).__name__} has no module {last} to freeze up to; leave --freeze-levels out"
            )
        for _, parameter in parameters[: inside[-1] + 1]:
            parameter.requires_grad_(False)
    if norms:
        added = {
            id(module)
            for stage in graph_stages(body).values()
            for name in stage.added_modules()
            for module in stage.get_submodule(name).modules()
        }
        for module in body.modules():
            if isinstance(module, BATCH_NORMS) and id(module) not in added:
                for parameter in module.parameters():
                    parameter.requires_grad_(False)


def flat_name(name: str) -> str:
    """A module's or tensor's name without dots: timm's feature extractors name a stage ``blocks.1`` or ``blocks_1``."""
    return name.replace(".", "_")
