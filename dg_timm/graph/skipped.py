"""What stands where no image runs a block: the plain form of what gates found."""

from torch import Tensor, nn

from dg_timm._errors import BadValue


class SkippedBlock(nn.Module):
    """Leave a block out: its node passes on what it reads.

    Args:
        block: that is left out. Of a block 1 that makes node 0's feature, the projection stays.

    Raises:
        BadValue: if the block projects in a way of its own.
    """

    passes_on = True

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.training = block.training
        if hasattr(block, "projects_shortcut"):
            if not isinstance(getattr(block, "downsample", None), nn.Module):
                raise BadValue(f"a {type(block).__name__} that projects the stage's input can't be left out")
            self.projects_shortcut = True
            self.downsample = block.downsample

    def forward(self, x: Tensor) -> Tensor:
        """Pass on: any shape."""
        return x

    def project(self, x: Tensor) -> Tensor:
        """Make node 0's feature: (batch, in_chs, height, width) -> (batch, out_chs, height', width')."""
        return self.downsample(x)  # type: ignore[operator]
