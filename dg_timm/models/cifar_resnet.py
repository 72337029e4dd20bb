"""The residual networks for CIFAR-10 (He et al., 2016, 4.2), as timm models: small enough to learn without a GPU.

They have a 3 x 3 stem, no pooling, and three stages of basic blocks with 16, 32 and 64 channels at 32, 16 and 8 px;
``6n + 2`` layers for n blocks a stage. Where a stage changes the shape, its first block's shortcut is a projection
(their option B), as in every ResNet of timm.
"""

from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm.conversion.classes import give_name

CHANNELS = (16, 32, 64)
BLOCKS = {  # blocks of each stage
    "cifar_resnet8": 1,
    "cifar_resnet14": 2,
    "cifar_resnet20": 3,
    "cifar_resnet26": 4,
    "cifar_resnet32": 5,
    "cifar_resnet38": 6,
}
_LAYERS = ("layer1", "layer2", "layer3")

CIFAR10 = {  # statistics of the training images
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({name: {"url": "", **CIFAR10} for name in BLOCKS})


@give_name
class CifarResNet(ResNet):
    """timm's ResNet with the stem and the three stages of the networks for CIFAR.

    Args:
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        **kwargs: further arguments of timm's ``ResNet`` (``block``, ``layers``, ``channels``, ``drop_rate``, ...).
    """

    if TYPE_CHECKING:  # TorchScript would read them
        layer1: nn.Module
        layer2: nn.Module
        layer3: nn.Module

    def __init__(self, num_classes: int = 10, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(
            num_classes=num_classes, in_chans=in_chans, stem_type="deep", stem_width=CHANNELS[0] // 2, **kwargs
        )
        # timm gives a stem of 16 channels only as three convolutions
        first = self.conv1[0]
        where: dict[str, Any] = dict(device=first.weight.device, dtype=first.weight.dtype)
        stem = nn.Conv2d(in_chans, CHANNELS[0], 3, padding=1, bias=False, **where)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = stem  # type: ignore[assignment]
        self.maxpool = nn.Sequential()
        self.feature_info = [
            dict(num_chs=channels, reduction=reduction, module=module)
            for channels, reduction, module in zip(
                (CHANNELS[0], *CHANNELS), (1, 1, 2, 4), ("act1", *_LAYERS), strict=True
            )
        ]

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, in_chans, H, W) -> (batch, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, list[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """Return the maps of the levels (the stem and the three stages), as timm's models do.

        Args:
            x: images, (batch, in_chans, height, width).
            indices: levels to return, negative ones from the end; a number n means the last n, None means all.
            norm: has no effect: no level has a norm of its own.
            stop_early: do not run the stages behind the last level of ``indices``.
            output_fmt: only "NCHW".
            intermediates_only: leave out the final map.

        Returns:
            the final map and the list of levels, or only the list; every map is (batch, channels, H, W).

        Raises:
            BadValue: for another format, or a level that there is not.
        """
        if output_fmt != "NCHW":
            raise BadValue(f"output_fmt must be NCHW, got {output_fmt!r}")
        taken = _levels(indices)
        last = max(taken)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in taken else []
        for level, name in enumerate(_LAYERS[:last] if stop_early else _LAYERS, start=1):
            layer = getattr(self, name)
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            if level in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: Union[int, list[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Empty the stages that no level of ``indices`` needs, as timm's models do; return the levels.

        Args:
            indices: levels to keep, as for :meth:`forward_intermediates`.
            prune_norm: has no effect: there is no norm behind the last stage.
            prune_head: drop the classifier as well.
        """
        taken = _levels(indices)
        last = max(taken)
        for name in _LAYERS[last:]:
            setattr(self, name, nn.Sequential())
        if last < len(_LAYERS):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < len(_LAYERS):
            self.reset_classifier(0, "")
        return taken


def _levels(indices: Optional[Union[int, list[int]]]) -> list[int]:
    """Turn what timm calls ``indices`` into levels, counted from the stem."""
    count = 1 + len(_LAYERS)
    if indices is None:
        return list(range(count))
    wanted = range(-indices, 0) if isinstance(indices, int) else indices
    levels = [count + index if index < 0 else index for index in wanted]
    if not levels or any(not 0 <= level < count for level in levels):
        raise BadValue(f"there are the levels 0 to {count - 1}, got the indices {indices!r}")
    return levels


def _register(variant: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
        model_args = dict(block=BasicBlock, layers=(BLOCKS[variant],) * 3, channels=CHANNELS)
        return build_model_with_cfg(
            CifarResNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **dict(model_args, **kwargs)
        )

    entrypoint.__name__ = entrypoint.__qualname__ = variant
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"Build a ResNet for CIFAR with {BLOCKS[variant]} basic blocks a stage."
    globals()[variant] = register_model(entrypoint)


__all__ = ["CifarResNet"]
for _variant in BLOCKS:
    _register(_variant)
