"""Record the adjacency of each image as the network runs, without a trace on the network."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dg_timm._errors import BadType, BadValue
from dg_timm._modes import evaluating
from dg_timm._views import eval_view
from dg_timm.graph.context import request, requesting
from dg_timm.graph.edges import adjacency_matrix
from dg_timm.graph.gate import splice
from dg_timm.graph.router import Router
from dg_timm.graph.stage import DGStage, require_dynamic

# (router, pooled feature, weights of the edges that leave its node) -> what to record of them, (batch, edges, ...)
RowOf = Callable[[Router, Tensor, Tensor], Tensor]


class AdjacencyRecorder:
    """Collects what routers and gates give, and assembles the adjacency of each stage when its last router has spoken.

    Attributes:
        recorded: {stage: (batch, N, N)}, skipped nodes spliced out.
        skipped: {stage: (batch, N) bool}, of stages with gates.
        unspliced: as ``recorded``, with what routers gave for skipped nodes, too.
        output: what the model gave.
        later: of a cascade, the passes after the first one: places of their images (k,), and a recorder of each.
    """

    output: Any = None

    def __init__(self, names: dict[DGStage, str], row_of: RowOf | None = None) -> None:
        self.recorded: dict[str, Tensor] = {}
        self._names, self._row_of = names, row_of
        self.skipped: dict[str, Tensor] = {}
        self.unspliced: dict[str, Tensor] = {}
        self._rows: dict[str, dict[int, tuple[Tensor, list[int]]]] = {}
        self._skipped: dict[str, dict[int, Tensor]] = {}
        self.later: list[tuple[Tensor, AdjacencyRecorder]] = []

    def begin_pass(self, images: Tensor) -> "AdjacencyRecorder":
        """Give a recorder of a cascade's next pass."""
        self.later.append((images, AdjacencyRecorder(self._names, self._row_of)))
        return self.later[-1][1]

    def keep(self, stage: DGStage, node: int, router: Router, pooled: Tensor, row: Tensor) -> None:
        """Take the row of one node."""
        name = self._names.get(stage)
        if name is None:
            return
        rows = self._rows.setdefault(name, {})
        if node == 0:  # what is left of a forward pass that was interrupted goes
            rows.clear()
            self._skipped.pop(name, None)
        rows[node] = (row.detach() if self._row_of is None else self._row_of(router, pooled, row), router.targets)
        if node == len(stage.edges) - 2:
            of_nodes = [rows[k] for k in range(len(rows))]
            alpha = adjacency_matrix([row for row, _ in of_nodes], [targets for _, targets in of_nodes])
            self.unspliced[name] = alpha
            if name in self._skipped:
                skipped = alpha.new_zeros(alpha.shape[:2], dtype=torch.bool)
                for k, of_node in self._skipped.pop(name).items():
                    skipped[:, k] = of_node
                self.skipped[name] = skipped
                alpha = alpha if self._row_of else splice(alpha, skipped)
            self.recorded[name] = alpha

    def keep_gate(self, stage: DGStage, node: int, runs: Tensor) -> None:
        """Take what the gate of one node says."""
        name = self._names.get(stage)
        if name is not None:
            self._skipped.setdefault(name, {})[node] = ~runs[:, 0]


def adjacency(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Give the edge weights of every image, stage by stage.

    The model runs in dense execution and eval mode, whatever its user chose, and is not touched: other threads may
    predict meanwhile. One in training mode that can't be copied (DistributedDataParallel, FSDP) is switched to eval
    mode and back.

    Args:
        model: a dynamic graph network.
        images: (batch, channels, height, width), as the model takes them.

    Returns:
        ``{stage name: alpha}`` in the order in which the stages run; alpha is (batch, N, N), [source, target], strictly
        upper triangular, for N - 2 blocks. A closed edge is exactly 0; so is every edge of a removed or skipped node.
        What a skipped node passes on is part of the edges past it. Of a cascade, that of the first pass.

    Raises:
        BadType: if ``images`` is not a tensor, or of another type than the model.
        BadValue: if the model is static, or the images have the wrong rank or channels.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18")
    >>> {name: tuple(alpha.shape) for name, alpha in dg_timm.adjacency(model, torch.randn(2, 3, 64, 64)).items()}
    {'layer1': (2, 4, 4), 'layer2': (2, 4, 4), 'layer3': (2, 4, 4), 'layer4': (2, 4, 4)}
    """
    return record(model, images).recorded


def skipped_nodes(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Say which nodes each image skips, because their gate is closed; as :func:`adjacency` for the rest.

    Returns:
        ``{stage name: (batch, N) bool}``, of stages with gates, in the order in which they run.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18", gates=True)
    >>> int(sum(of_stage.sum() for of_stage in dg_timm.skipped_nodes(model, torch.randn(2, 3, 64, 64)).values()))
    0
    """
    return record(model, images).skipped


@torch.no_grad()
def record(model: nn.Module, images: Tensor) -> AdjacencyRecorder:
    """Run a model in dense execution and eval mode, and give what its routers and gates say."""
    if not isinstance(images, Tensor):
        raise BadType(f"images must be a tensor (batch, channels, height, width), got {type(images).__name__}")
    require_dynamic(model)
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), images.dtype)
    if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
        raise BadType(f"images are {images.dtype} and the model is {own}: images.to({own})")
    with _evaluated(model) as view, requesting(execution="dense"), recording(view) as recorder:
        recorder.output = view(images)
    return recorder


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; a copy of its structure if it is not, so that its own modes stay."""
    try:
        view = eval_view(model)
    except Exception:  # a wrapper that can't be copied (DistributedDataParallel, FSDP) is switched, and switched back
        with evaluating(model):
            yield model
        return
    yield view


@contextmanager
def record_adjacency(model: nn.Module, row_of: RowOf | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the adjacency of the last forward pass inside the ``with`` block, at no cost of a second one.

    Only passes of this thread, in dense execution, are seen; the model is not touched.

    Args:
        model: a dynamic graph network.
        row_of: what to record of each router in place of its weights, (router, pooled feature (batch, channels),
            weights (batch, edges)) -> (batch, edges, ...). Nothing of it is passed on past a skipped node.

    Returns:
        ``{stage name: alpha}``, filled as stages run; see :func:`dg_timm.adjacency`.

    Raises:
        BadValue: if the model is static, or not in dense execution.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18").eval()
    >>> with dg_timm.record_adjacency(model) as recorded:
    ...     logits = model(torch.randn(2, 3, 64, 64))
    >>> tuple(recorded["layer1"].shape)
    (2, 4, 4)
    """
    stages = require_dynamic(model)
    if request().execution != "dense" and any(stage.execution != "dense" for stage in stages.values()):
        raise BadValue("the adjacency is recorded in dense execution: dg_timm.set_execution(model, 'dense') first")
    with recording(model, row_of) as recorder:
        yield recorder.recorded


@contextmanager
def recording(model: nn.Module, row_of: RowOf | None = None) -> Iterator[AdjacencyRecorder]:
    """As :func:`record_adjacency`, with what the gates say; nothing is checked."""
    recorder = AdjacencyRecorder({stage: name for name, stage in require_dynamic(model).items()}, row_of)
    with requesting(recorder=recorder):
        yield recorder


def majority_topology(model: nn.Module, batches: Iterable[Tensor], share: float = 0.5) -> dict[str, Tensor]:
    """Find one topology for all images: the edges that are open for at least a share of those of a data set.

    Args:
        model: a dynamic graph network.
        batches: of images, (batch, channels, height, width), as the model takes them.
        share: of the images, from 0 to 1.

    Returns:
        {stage: (N, N) bool}, for ``set_execution(model, "fixed", topology)``.

    Raises:
        BadValue: if there is no image, the share is not one, or the model is static.

    >>> import dg_timm, timm, torch
    >>> model = timm.create_model("dg_resnet18").eval()
    >>> topology = dg_timm.majority_topology(model, [torch.randn(2, 3, 64, 64)])
    >>> dg_timm.set_execution(model, "fixed", topology)
    """
    require_dynamic(model)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise BadValue(f"share must be a number from 0 to 1, got {share!r}")
    total, times_open = 0, dict[str, Tensor]()
    for images in batches:
        total += len(images)
        # an edge past a skipped node weighs something there alone: in a topology the node's own edges lead past it
        for name, alpha in record(model, images).unspliced.items():
            times_open[name] = times_open.get(name, 0) + (alpha != 0).sum(0)
    if total == 0:
        raise BadValue("no images: give at least one batch (batch, channels, height, width)")
    return {name: ((count >= share * total) & (count > 0)) for name, count in times_open.items()}
