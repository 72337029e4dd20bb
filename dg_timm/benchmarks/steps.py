"""What is timed: one batch through a network, or one update of its weights."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dg_timm.benchmarks.memory import check_memory
from dg_timm.benchmarks.setting import Setting


def random_images(setting: Setting) -> Tensor:
    """Draw a batch: (batch, 3, size, size) float32.

    Raises:
        BadValue: if it does not fit into memory.
    """
    torch.manual_seed(1)
    size = (setting.batch_size, *setting.input_size)
    check_memory("the batch", 4 * math.prod(size), setting)
    return torch.randn(size).to(setting.device, memory_format=setting.memory_format)


def make_step(model: nn.Module, setting: Setting, images: Tensor) -> Callable[[], None]:
    """Make the call that is timed; in training, one of plain SGD with momentum."""

    def predict() -> None:
        with torch.inference_mode(), setting.autocast():
            model(images)

    if not setting.trains:
        return predict
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    labels = torch.arange(len(images), device=images.device)

    def update() -> None:
        with setting.autocast():
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update
