"""What one measurement of benchmark.py runs under."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]  # of a table: what was measured, and under which setting

MODES = ("inference", "training")
EDGES = ("open", "identity")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """One combination of the options of benchmark.py.

    Attributes:
        mode: ``inference`` or ``training``.
        batch_size: images of a step.
        image_size: height and width of an image, in pixels.
        layout: ``nchw`` or ``channels_last``.
        dtype: name of a type of torch; below float32, autocast runs in it.
        compile: run what ``torch.compile`` makes of the network.
        device: ``cpu``, ``cuda``, ``cuda:1`` ...
        edges: ``open`` gives every edge a weight; ``identity`` leaves the conversion as it is.
        removed: share of the blocks that an imposed path leaves out; None imposes no paths.
    """

    mode: str
    batch_size: int
    image_size: int
    layout: str = "nchw"
    dtype: str = "float32"
    compile: bool = False
    device: str = "cpu"
    edges: str = "open"
    removed: float | None = None

    @property
    def trains(self) -> bool:
        """Whether a step is an update of the weights."""
        return self.mode == "training"

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout, as torch calls it."""
        return LAYOUTS[self.layout]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type, as torch calls it."""
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """The device, as torch calls it."""
        return torch.device(self.device)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return 3, self.image_size, self.image_size

    def autocast(self) -> torch.autocast:
        """Run what follows ``with`` in the type of the setting."""
        return torch.autocast(self.torch_device.type, self.torch_dtype, enabled=self.torch_dtype != torch.float32)

    def as_row(self) -> Row:
        """The columns that say under what a row was measured."""
        return dataclasses.asdict(self)
