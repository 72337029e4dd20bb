"""Where a graph touches timm's blocks: shortcuts that are ready or dropped, and node 0's projection.

Where block 1 has a shortcut projection, that module also makes node 0's feature. It must run once a forward pass (run
twice, its norm would mix two distributions), so block 1 owns it, runs it, and asks the stage for its input and its
ready shortcut. These subclasses repeat the forward of timm's block from there on. ``type(block)`` must match exactly,
and the identity tests compare the two.
"""

import copy
from collections.abc import Callable
from typing import Optional

import torch
from timm.models import regnet, resnet
from torch import Tensor, nn

from dg_timm._compat import DepthwiseSeparableConv, InvertedResidual


class GivenShortcut(nn.Module):
    """A block whose shortcut comes from the stage; mixed in before timm's class."""

    projects_shortcut: bool  # there where this block makes node 0's feature

    @torch.jit.unused
    def forward(self, x: Tensor, read: Optional[Callable] = None) -> Optional[Tensor]:
        """Run the block.

        Args:
            x: (batch, in_chs, height, width).
            read: for a block that makes node 0's feature. It takes ``project(x)`` and gives the block's input and its
                shortcut (or None for no shortcut), or None if the block runs for no image. Without it the block runs
                on ``x`` and has no shortcut.

        Returns:
            (batch, out_chs, height', width'), or None if the block runs for no image.
        """
        if read is None:
            return self.residual(x, None)
        inputs = read(self.project(x))
        return None if inputs is None else self.residual(*inputs)

    def project(self, x: Tensor) -> Tensor:
        """Make node 0's feature: (batch, in_chs, height, width) -> (batch, out_chs, height', width')."""
        return self.downsample(x)  # type: ignore[operator]

    def residual(self, x: Tensor, shortcut: Optional[Tensor]) -> Tensor:
        """What timm's block gives for ``x`` if its shortcut is ``shortcut``; None for no shortcut."""
        raise NotImplementedError


class ResNetBasicBlock(GivenShortcut, resnet.BasicBlock):  # type: ignore[misc]
    """timm's BasicBlock with its shortcut given."""

    def residual(self, x: Tensor, shortcut: Optional[Tensor]) -> Tensor:
        """As in :class:`GivenShortcut`."""
        x = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        x = self.bn2(self.conv2(self.aa(x)))  # type: ignore[misc]
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if shortcut is not None:
            x += shortcut
        return self.act2(x)


class ResNetBottleneck(GivenShortcut, resnet.Bottleneck):  # type: ignore[misc]
    """timm's Bottleneck with its shortcut given."""

    def residual(self, x: Tensor, shortcut: Optional[Tensor]) -> Tensor:
        """As in :class:`GivenShortcut`."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(self.aa(x)))  # type: ignore[misc]
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if shortcut is not None:
            x += shortcut
        return self.act3(x)


class RegNetBottleneck(GivenShortcut, regnet.Bottleneck):  # type: ignore[misc]
    """timm's RegNet Bottleneck with its shortcut given."""

    def residual(self, x: Tensor, shortcut: Optional[Tensor]) -> Tensor:
        """As in :class:`GivenShortcut`."""
        x = self.conv3(self.se(self.conv2(self.conv1(x))))
        if shortcut is not None:
            x = self.drop_path(x) + shortcut
        return self.act3(x)


# timm's block class -> the same block with its shortcut given
GIVEN_SHORTCUT: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: ResNetBasicBlock,
    resnet.Bottleneck: ResNetBottleneck,
    regnet.Bottleneck: RegNetBottleneck,
}

# Blocks whose shape-changing form has no shortcut at all, so that node 0 needs a projection of its own
WITHOUT_SHORTCUT = (DepthwiseSeparableConv, InvertedResidual)


def has_shortcut_projection(block: nn.Module) -> bool:
    """Whether this block has a shortcut module that can make node 0's feature."""
    return type(block) in GIVEN_SHORTCUT and isinstance(block.downsample, nn.Module)


def can_drop_shortcut(block: nn.Module) -> bool:
    """Whether ``block_shortcut=False`` is offered for this block."""
    return type(block) in GIVEN_SHORTCUT or type(block) in WITHOUT_SHORTCUT


def give_shortcut(block: nn.Module, projects: bool) -> None:
    """Let a block, in place, take its shortcut from the stage; ``projects``: it also makes node 0's feature."""
    block.__class__ = GIVEN_SHORTCUT[type(block)]
    if projects:
        block.projects_shortcut = True  # type: ignore[assignment]


def drop_shortcut(block: nn.Module, projects: bool) -> None:
    """Turn a block, in place, into one without a shortcut: the graph's edges replace it."""
    if type(block) in GIVEN_SHORTCUT:
        give_shortcut(block, projects)
    else:
        block.has_skip = False  # type: ignore[assignment]
    undo_zero_init(block)


@torch.no_grad()
def undo_zero_init(block: nn.Module) -> None:
    """Set zero weights of a block's norms to 1.

    timm starts the last norm of a residual block at zero. Without the shortcut such a block returns relu(0), whose
    gradient is zero as well: it could never learn.
    """
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
            module.weight.copy_(torch.where(module.weight == 0, 1.0, module.weight))


class Projection(nn.Module):
    """Node 0's feature where block 1 has no shortcut: 1x1 convolution with block 1's stride, and norm; no activation.

    Args:
        in_chs: channels that block 1 takes.
        out_chs: channels that block 1 gives.
        stride: of block 1.
        num_blocks: of the stage. These blocks have linear outputs, each of which adds about unit variance in the static
            stage; node 0's feature starts at the standard deviation sqrt(num_blocks) of that stage's output. At 1 the
            mean over predecessors would start 4-block stages at 0.42 of the static standard deviation.
        norm: block 1's output norm; the projection's is made like it (TensorFlow has an epsilon of its own).
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int,
        num_blocks: int,
        norm: nn.Module,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.projects_input = True  # how TorchScript tells it from a block
        self.conv = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, device=device, dtype=dtype)
        if hasattr(norm, "reset_parameters"):
            self.bn = copy.deepcopy(norm).requires_grad_(True)
            if hasattr(self.bn, "act"):
                self.bn.act = nn.Identity()
        else:  # frozen or folded away in the block; a new projection has statistics to learn
            self.bn = nn.BatchNorm2d(out_chs, eps=getattr(norm, "eps", 1e-5), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start afresh; the norm's weight at sqrt(num_blocks)."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        self.bn.reset_parameters()  # type: ignore[operator]
        if isinstance(self.bn.weight, nn.Parameter):
            nn.init.constant_(self.bn.weight, self.num_blocks**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_chs, height, width) -> (batch, out_chs, ceil(height / stride), ceil(width / stride))."""
        return self.bn(self.conv(x))


def output_norm(block: nn.Module) -> nn.Module:
    """The norm after the last convolution of a block in ``WITHOUT_SHORTCUT``."""
    return block.get_submodule("bn3" if isinstance(block, InvertedResidual) else "bn2")
