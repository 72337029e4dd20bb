"""Towards a compute budget: costs that can be learned from, a start from which blocks can be skipped, thresholds."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from dg_timm import graph
from dg_timm.checkpoint import graph_stages, is_identity, routers
from dg_timm.cost import Costs, count_costs
from dg_timm.gates import Gates
from dg_timm.introspect import adjacency, require_dynamic, set_threshold

ASLEEP = -4.0  # logit of an edge that could carry weight 1, and weighs 2 * sigmoid(-4) = 0.036


class ExpectedCost:
    """The cost of every image of a forward pass that trains, with a gradient for the gate of every block.

    Its value is exactly :func:`dg_timm.cost`, with the noise of the gates if there is any. Its gradient is that of
    the blocks' gates (:mod:`dg_timm.gates`): so the weights of edges learn to close and open nodes. What edges cost
    themselves, about a hundredth, is in the value only.

    Args:
        model: a dynamic graph network, in dense execution.
        input_size: (channels, height, width) of its images; by default that of its configuration.

    Raises:
        ValueError: if the model is static.
    """

    def __init__(self, model: nn.Module, input_size: Optional[tuple[int, int, int]] = None) -> None:
        require_dynamic(model)
        self.model = model
        self.costs: Costs = count_costs(model, input_size)

    @contextmanager
    def recording(self, noise: float = 0.0, seed: int = 0) -> Iterator[Callable[[], Tensor]]:
        """Call what it gives after a forward pass of the model inside the ``with`` block: (batch,) relative costs.

        Args:
            noise: scale of the noise on the logarithm of |weight| / threshold by which a node runs or does not.
            seed: of that noise.
        """
        stages = graph_stages(self.model)
        if any(stage.execution != "dense" for stage in stages.values()):
            raise ValueError("a cost is learned in dense execution: dg_timm.set_execution(model, 'dense') first")
        generator = torch.Generator().manual_seed(seed)
        gates = {name: Gates(noise, generator) for name in stages}
        try:
            for name, stage in stages.items():
                stage.gates = gates[name]
            yield lambda: self.relative(gates)
        finally:
            for stage in stages.values():
                stage.gates = None

    def relative(self, gates: dict[str, Gates]) -> Tensor:
        """(batch,): the cost, given the gates {stage: ...} of a forward pass."""
        opened = {name: (graph.adjacency_matrix(gate.rows) != 0).float() for name, gate in gates.items()}
        run = torch.zeros(())
        for name, stage in self.costs.stages.items():
            for own, gate in zip(stage.nodes, gates[name].of_nodes, strict=True):
                run = run + own * gate[:, 0]
        return graph.straight_through(run / self.costs.static, self.costs.relative(opened))


@torch.no_grad()
def raise_thresholds(model: nn.Module) -> None:
    """Lift thresholds to where edges can close: half of the smallest weight in a fresh stage. Higher ones stay.

    The edges of a fresh node weigh 1 / in-degree.
    """
    for stage in require_dynamic(model).values():
        lowest = 0.5 / max(len(sources) for sources in stage.edges)
        for router in routers(stage).values():
            router.threshold.clamp_(min=lowest)


@torch.no_grad()
def make_skippable(model: nn.Module, threshold: float = 0.1) -> None:
    """Let an identity conversion, still bit for bit the static network, skip a run of blocks by one router's decision.

    From the plain identity, to skip a block, the edges into it must close, and one past it must grow from scale 0 to
    full weight, at once. Here every edge that passes a block has the scale at which it weighs 1 when its logit is 0,
    and a logit so low that the threshold closes it.

    Args:
        model: an identity conversion.
        threshold: of all nodes, above 0.036 (an edge that is asleep) and below 1 (the chain).

    Raises:
        ValueError: if the model is no identity conversion, or the threshold is out of range; it is then left as it was.
    """
    require_dynamic(model)
    if not is_identity(model):
        raise ValueError("only an identity conversion can be made skippable: convert a static network first")
    if not 2 * torch.tensor(ASLEEP).sigmoid().item() < threshold < 1:
        raise ValueError(f"threshold must lie between 0.036 and 1, got {threshold}")
    for router in routers(model).values():
        assert router.scale is not None
        router.scale.fill_(2.0)
        (router.fc.bias if hasattr(router, "fc") else router.logits)[1:] = ASLEEP
        router.threshold.fill_(threshold)


@dataclass(frozen=True)
class Operating:
    """What one threshold for all nodes does over a data set: mean cost of an image, and how it differs between them."""

    threshold: float
    cost: float
    spread: float  # standard deviation over images; 0 where every image takes the same path


def threshold_curve(model: nn.Module, batches: Iterable[Tensor], thresholds: Sequence[float]) -> list[Operating]:
    """The mean cost at each threshold; the model's own setting is kept.

    Args:
        batches: of images, (batch, channels, height, width); read once for each threshold, so no generator.

    Raises:
        ValueError: if there is no image, a threshold is no number of at least 0, or the model is static.
    """
    fixed = {router: router.fixed_threshold for router in routers(model).values()}
    counted: Optional[Costs] = None  # of the first image's size
    try:
        found = []
        for threshold in thresholds:
            set_threshold(model, threshold)
            costs = []
            for images in batches:
                counted = counted or count_costs(model, (images.shape[1], images.shape[2], images.shape[3]))
                alphas = adjacency(model, images)
                costs.append(counted.relative({name: (alpha != 0).double() for name, alpha in alphas.items()}))
            if not costs or not sum(map(len, costs)):
                raise ValueError("no images: give batches that can be read more than once")
            every = torch.cat(costs)
            found.append(Operating(float(threshold), every.mean().item(), every.std(unbiased=False).item()))
        return found
    finally:
        for router, before in fixed.items():
            router.fixed_threshold = before


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


def calibrate(
    model: nn.Module, batches: Iterable[Tensor], target_cost: float, *, highest: float = 2.0, steps: int = 16
) -> Operating:
    """Set the lowest threshold at which images cost ``target_cost`` on average, or less: one network, many budgets.

    Found by bisection, as fewer edges are open the higher the threshold is; what closes is what weighs least.

    Args:
        batches: as for :func:`threshold_curve`.
        target_cost: relative to the static network.
        highest: threshold to look at; no edge of an identity conversion weighs more than 2.
        steps: halvings of the interval.

    Raises:
        ValueError: if even ``highest`` costs more; the model is then left as it was.
    """
    if not target_cost > 0:
        raise ValueError(f"target_cost must be above 0, got {target_cost}")
    (best,) = threshold_curve(model, batches, [highest])
    if best.cost > target_cost:
        raise ValueError(
            f"no threshold up to {highest:g} brings the mean cost to {target_cost:g}: with every edge closed that can "
            f"be, it is {best.cost:.3f} (what always runs: stem, projections, head)"
        )
    low, high = 0.0, highest
    for _ in range(steps):
        (tried,) = threshold_curve(model, batches, [(low + high) / 2])
        if tried.cost <= target_cost:
            best, high = tried, tried.threshold
        else:
            low = tried.threshold
    set_threshold(model, best.threshold)
    return best
