"""Take the statistics of batch norms again, for the edges that are open now."""

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dg_timm.graph.stage import graph_stages


@torch.no_grad()
def refit_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take the running statistics of all batch norms anew, over some images, with the thresholds in force.

    A network that learned with its thresholds was normalised for what they let through. Another threshold lets more or
    less through, and without new statistics accuracy falls far below what the same weights can do.

    Args:
        batches: training images without augmentation, at least a few hundred; every batch of one size.

    Raises:
        ValueError: if there is no image, or one that leads to statistics that are not finite. Whatever is raised, the
            model is then left as it was.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    batches = iter(batches)
    first = next(batches, None)
    if first is None or not len(first):
        raise ValueError("no images: give at least one batch (batch, channels, height, width)")
    sparse = [stage for stage in graph_stages(model).values() if stage.execution == "sparse"]
    try:
        for stage in sparse:
            stage.execution = "dense"
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for images in itertools.chain([first], batches):
            model(images)
        if not all(bool(own.isfinite().all()) for norm in norms for own in norm.buffers()):
            raise ValueError("the statistics are not finite: an image has values that are no numbers")
    except BaseException:
        for norm, state in zip(norms, states, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for stage in sparse:
            stage.execution = "sparse"
        for module, training in modes.items():
            module.training = training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
