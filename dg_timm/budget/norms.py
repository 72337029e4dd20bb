"""Re-estimate the statistics of batch norms for the edges that are open now."""

import copy
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dg_timm._errors import BadValue
from dg_timm._modes import evaluating
from dg_timm.execution.sparse import BATCH_NORMS
from dg_timm.graph.context import requesting
from dg_timm.graph.stage import graph_stages


@torch.no_grad()
def refit_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the running statistics of all batch norms from some images, with the thresholds in force.

    A network that learned with its thresholds was normalized for what they let through. Another threshold lets more or
    less through, and without new statistics accuracy falls far below what the same weights can do. The model is
    switched while this runs: no other thread may use it.

    Args:
        model: any network; a dynamic one runs in dense or fixed execution.
        batches: training images without augmentation, at least a few hundred; every batch of one size.

    Raises:
        BadValue: if there is no image, or one that leads to statistics that are not finite. Whatever is raised, the
            model is then left as it was.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_cifar_resnet26.cifar10", pretrained=True)
    >>> dg_timm.set_threshold(model, 0.2)
    >>> dg_timm.refit_norms(model, [torch.randn(8, 3, 32, 32)])
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    batches = iter(batches)
    first = next(batches, None)
    if first is None or not len(first):
        raise BadValue("no images: give at least one batch (batch, channels, height, width)")
    execution = "fixed" if any(stage.execution == "fixed" for stage in graph_stages(model).values()) else "dense"
    try:
        with evaluating(model), requesting(execution=execution):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.train()
            for images in itertools.chain([first], batches):
                model(images)
        if not all(bool(own.isfinite().all()) for norm in norms for own in norm.buffers()):
            raise BadValue("the statistics are not finite: an image has values that are no numbers")
    except BaseException:
        for norm, state in zip(norms, states, strict=True):
            norm.load_state_dict(state)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
