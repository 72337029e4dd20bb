"""One stage as a dynamic graph (paper 3.2-3.4): its children, in order, are the graph in topological order."""

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from torch import Tensor, nn

from dg_timm._errors import BadType, BadValue
from dg_timm.graph.executor import Executor, FirstEdge
from dg_timm.graph.gate import Gate
from dg_timm.graph.plan import StagePlan
from dg_timm.graph.router import Router
from dg_timm.graph.skipped import SkippedBlock
from dg_timm.graph.topology import complete

# Options of a graph, with which a saved network is built again: those that are True by default, and all.
BOOL_OPTIONS = ("edge_scale", "block_shortcut", "instance_aware")
GRAPH_OPTIONS = (*BOOL_OPTIONS, "gates", "topology", "topology_seed")
# What a network with gates was given after its training; saved and built again as options are.
GATE_OPTIONS = ("budgets", "cascade", "skipped_blocks")


class DGStage(nn.Module):
    """A run of timm's blocks that every image passes along its own edges.

    The blocks keep their names. Beside them stand ``router0`` (of the input node), ``router1`` .. ``routerB`` (of the
    blocks) and, where block 1 has no shortcut to project with, ``projection``. The static stage's state dict is a
    subset of this one's.

    Args:
        container: the static stage; its children move here.
        plan: its parts.
        engine: runs the stage, ``engine(stage, x)``: chooses an executor and calls :meth:`run`. A module-level
            function, so that the stage can be pickled.
        projection: makes node 0's feature where ``plan.input_node`` is ``projection``.
        identity: start as the static network, bit for bit; otherwise every node starts from its predecessors' mean.
        edge_scale: False drops the learned scale of each edge (weights are the paper's alpha).
        block_shortcut: False says that the blocks have no shortcuts of their own; the graph's edges replace them.
        instance_aware: False learns one weight an edge for all images.
        gates: True gives every block a gate (``gate1`` .. ``gateB``), by which an image skips it; but for block 1 where
            node 0's feature is a new projection.
        topology: the edges that there are, as the sources of every node; by default all.

    Attributes:
        execution: ``dense``, ``sparse`` or ``fixed`` (:func:`dg_timm.set_execution`).
        topology: the edges of fixed execution, as the sources of every node; otherwise all that there are.
    """

    def __init__(
        self,
        container: nn.Module,
        plan: StagePlan,
        *,
        engine: Callable[["DGStage", Tensor], Tensor],
        projection: nn.Module | None = None,
        identity: bool,
        edge_scale: bool = True,
        block_shortcut: bool = True,
        instance_aware: bool = True,
        gates: bool = False,
        topology: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.identity = identity
        self.edge_scale = edge_scale
        self.block_shortcut = block_shortcut
        self.instance_aware = instance_aware
        self.gates = gates
        # A new projection has learned nothing that could be passed on: measured, images that skipped block 1 were lost
        self.gated_nodes = list(range(1 + (projection is not None), len(plan.blocks) + 1)) if gates else []
        self.grad_checkpointing = False
        self.loading = frozenset[int]()  # what of a state dict is a part of the static network, by identity
        self.load_hook: Callable[..., None] | None = None
        self.execution = "dense"
        # What each budget costs (dg_timm.budget.curve). TorchScript takes no annotation of an empty list.
        self.budgets = list[dict[str, Any]]()
        self.cascade: dict[str, Any] | None = None  # (dg_timm.execution.cascade)
        self.edges = topology or complete(len(plan.blocks))  # the sources of every node
        self.topology = self.edges
        self.input_node = plan.input_node
        self.peak_ratio = plan.peak_ratio
        self.entry_names = plan.entry
        self.block_names = plan.blocks
        like = next(container.parameters())
        place = dict(device=like.device, dtype=like.dtype)

        def add_router(node: int) -> None:
            router = Router(plan.out_chs, node, self.edges, edge_scale, instance_aware, **place)  # type: ignore[arg-type]
            self.add_module(f"router{node}", router)

        for name in plan.entry:
            self.add_module(name, container.get_submodule(name))
        if projection is not None:
            self.projection = projection
        add_router(0)
        for node, name in enumerate(plan.blocks, start=1):
            if node in self.gated_nodes:
                self.add_module(f"gate{node}", Gate(plan.out_chs, **place))  # type: ignore[arg-type]
            self.add_module(name, container.get_submodule(name))
            add_router(node)
        self.training = container.training
        for added in self.added_modules():  # a block may have modes of its own, such as frozen norms
            self.get_submodule(added).train(container.training)
        self.reset_graph_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage: (batch, in_chs, H, W) -> (batch, out_chs, H', W')."""
        return self.engine(self, x)

    def run(self, executor: Executor, x: Tensor) -> Tensor:
        """Run the graph: node by node, in topological order.

        ``x`` is (batch, in_chs, H, W); the result is what the output node reads, (batch, out_chs, H', W').
        """
        for name in self.entry_names:
            x = getattr(self, name)(x)
        first = None
        if self.input_node == "input":
            executor.finish(0, x)
        else:
            projects = self.input_node == "shortcut"
            first = FirstEdge(x, block_projects=projects, has_shortcut=projects and self.block_shortcut)
            if not projects:
                executor.finish(0, self.projection(x))
        for node, name in enumerate(self.block_names, start=1):
            block = getattr(self, name)
            if isinstance(block, SkippedBlock):
                if first is not None and first.block_projects:
                    executor.finish(0, block.project(x))
                feature = executor.read(node)
            else:
                feature = executor.apply(node, block, first)
            if feature is not None:
                executor.finish(node, feature)
            first = None
        out = executor.read(len(self.block_names) + 1)
        assert out is not None  # the output node runs for every image
        return out

    def reset_graph_parameters(self) -> None:
        """Start routers, scales, thresholds, gates and projection afresh; the blocks' weights are left alone."""
        for name in self.added_modules():
            added = self.get_submodule(name)
            if isinstance(added, Router):
                added.reset_parameters(self.identity)
            else:
                added.reset_parameters()  # type: ignore[operator]

    def leave_out(self, nodes: list[int]) -> None:
        """Leave the blocks of some nodes out, for every image, and drop all gates."""
        for node, name in enumerate(self.block_names, start=1):
            if node in nodes and not isinstance(self.get_submodule(name), SkippedBlock):
                setattr(self, name, SkippedBlock(self.get_submodule(name)))
            if node in self.gated_nodes:
                delattr(self, f"gate{node}")
        self.gates, self.gated_nodes, self.budgets, self.cascade = False, [], [], None

    def skipped_blocks(self) -> list[int]:
        """The nodes whose blocks are left out."""
        blocks = [self.get_submodule(name) for name in self.block_names]
        return [node for node, block in enumerate(blocks, start=1) if isinstance(block, SkippedBlock)]

    def added_modules(self) -> dict[str, str]:
        """Name what the graph adds, each with the name of the block that it belongs to."""
        added = {f"router{node}": self.block_names[max(node, 1) - 1] for node in range(len(self.block_names) + 1)}
        if self.gates:
            added |= {f"gate{node}": self.block_names[node - 1] for node in self.gated_nodes}
        if self.input_node == "projection":
            added["projection"] = self.block_names[0]
        return added

    def on_load(self, hook: Callable[..., None]) -> None:
        """Let ``hook`` see every state dict that this stage loads, as ``register_load_state_dict_pre_hook`` says."""
        self.load_hook = hook
        self.register_load_state_dict_pre_hook(hook)

    def edge_macs(self, source: int, feature: int) -> dict[tuple[int, int], int]:
        """Count the multiply-adds of each edge for one image: one an element that it reads.

        Args:
            source: elements of the stage's input.
            feature: elements of a node's feature.

        Returns:
            {(source node, target node): multiply-adds}.
        """
        macs = {(i, j): feature for j, sources in enumerate(self.edges) for i in sources}
        if self.input_node != "input":  # the edge reads the stage's input, before its stride
            source = feature if self.entry_names else source  # an entry block ends at the shape of the features
            macs[0, 1] = source + feature * (self.input_node == "shortcut" and self.block_shortcut)
        return macs

    def is_complete(self) -> bool:
        """Say whether there is an edge between any two nodes."""
        return self.edges == complete(len(self.block_names))

    def __len__(self) -> int:
        return len(self.entry_names) + len(self.block_names)

    def __getitem__(self, index: int | slice) -> nn.Module | list[nn.Module]:
        """Give the static stage's blocks by position (``model.layer4[-1]`` is what Grad-CAM tools ask for)."""
        names = (*self.entry_names, *self.block_names)[index]
        return self.get_submodule(names) if isinstance(names, str) else [self.get_submodule(name) for name in names]

    def __setitem__(self, index: int | slice, block: nn.Module) -> None:
        """Put another block in the place of one (``model.layer4[-1] = Adapter(...)``); it must keep the shape."""
        if isinstance(index, slice):
            raise BadType("blocks are replaced one at a time; give a position, not a slice")
        name = (*self.entry_names, *self.block_names)[index]
        if not isinstance(block, nn.Module):
            raise BadType(f"a block must be a module, got {type(block).__name__}")
        if self.input_node == "shortcut" and name == self.block_names[0] and not hasattr(block, "residual"):
            raise BadType(
                f"block '{name}' of this stage projects the stage's input for node 0, which a {type(block).__name__} "
                "does not do; replace a later block, or a module inside this one"
            )
        self.add_module(name, block)

    def __contains__(self, block: object) -> bool:
        """Whether a module is one of the static stage's blocks."""
        return any(block is own for own in self[:])  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[NoReturn]:
        # timm's checkpoint_seq would iterate the blocks one after another and never run the graph
        raise TypeError(
            "the blocks of a dynamic stage are no chain and can't be iterated; call the stage, or take its blocks by "
            "position: [stage[k] for k in range(len(stage))]"
        )

    def __prepare_scriptable__(self) -> "DGStage":
        # torch.jit.script asks for it, and puts what it gets in this stage's place, for good
        from dg_timm.graph.scripting import ScriptableStage

        return ScriptableStage.of(self)

    def extra_repr(self) -> str:
        """Show nodes, edges and options."""
        options = ", ".join(f"{name}={getattr(self, name)}" for name in (*BOOL_OPTIONS, "gates"))
        return f"nodes={len(self.edges)}, edges={sum(len(sources) for sources in self.edges)}, {options}"


def graph_stages(model: nn.Module) -> dict[str, DGStage]:
    """The dynamic stages of a model by name, in the order in which they run."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DGStage)}


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def require_dynamic(model: nn.Module) -> dict[str, DGStage]:
    """The dynamic stages of a model by name; BadValue if it has none."""
    if not isinstance(model, nn.Module):
        raise BadType(f"expected a model, got {type(model).__name__}")
    stages = graph_stages(model)
    if not stages:
        raise BadValue(f"{type(model).__name__} is a static network; convert it with dg_timm.dynamize(model)")
    return stages
