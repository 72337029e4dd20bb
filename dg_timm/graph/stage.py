"""One stage as a dynamic graph (paper 3.2-3.4): its children, in order, are the graph in topological order."""

from typing import Any, Dict, List, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from dg_timm.conversion import blocks as _blocks
from dg_timm.conversion.find import StagePlan
from dg_timm.execution import aggregation
from dg_timm.execution import sparse as _sparse
from dg_timm.execution.gates import Gates
from dg_timm.graph import edges as graph
from dg_timm.graph.router import Router

# Parts of a batch that run on their own (DGStage.pieces): how much may be live in one for each thread, a few times the
# cache of a core (what is live at once is an upper bound; measured: results/performance.md), and the fewest images. A
# single image would take other algorithms of some convolutions, and round otherwise.
LIVE_BYTES = 6 * 2**20
MIN_IMAGES = 2


# Options of a graph, with which a saved network is built again: those that are True by default, and all.
SWITCHES = ("edge_scale", "block_shortcut", "instance_aware")
GRAPH_OPTIONS = (*SWITCHES, "topology", "topology_seed")


class DGStage(nn.Module):
    """A run of timm's blocks, wired per image.

    The blocks keep their names; beside them stand ``router0`` (of the input node), ``router1`` .. ``routerB`` (of the
    blocks) and, where block 1 has no shortcut, ``projection``. The static stage's state dict is a subset of this one's.

    Args:
        container: the static stage; its children move here.
        plan: from :func:`dg_timm.conversion.find.find_stages`.
        identity: start as the static network, bit for bit; otherwise every node starts from its predecessors' mean.
        edge_scale: False drops the learned scale of each edge (weights are the paper's alpha).
        block_shortcut: False drops the blocks' own shortcuts; the graph's edges replace them.
        instance_aware: False learns one weight an edge for all images.
        topology: the edges that there are, as the sources of every node; by default all.
    """

    # Blocks can be indexed, as in nn.Sequential, but not iterated: timm's checkpoint_seq would iterate them one after
    # another and never run the graph.
    __iter__ = None
    edges: List[List[int]]
    topology: List[List[int]]

    def __init__(
        self,
        container: nn.Module,
        plan: StagePlan,
        *,
        identity: bool,
        edge_scale: bool = True,
        block_shortcut: bool = True,
        instance_aware: bool = True,
        topology: Optional[List[List[int]]] = None,
    ) -> None:
        super().__init__()
        self.identity = identity
        self.edge_scale = edge_scale
        self.block_shortcut = block_shortcut
        self.instance_aware = instance_aware
        self.grad_checkpointing = False
        self.gates: Optional[Gates] = None  # while a cost is learned (dg_timm.budget.calibration)
        self.execution = "dense"  # set_execution
        self.edges = topology or graph.complete(len(plan.blocks))  # the sources of every node
        self.topology = self.edges  # ... that are read; fewer in static execution
        self.num_entry = len(plan.entry)
        self.live = plan.live
        self.block_names = plan.blocks
        like = next(container.parameters())

        def add_router(node: int) -> None:
            router = Router(
                plan.out_chs, node, self.edges, edge_scale, instance_aware, device=like.device, dtype=like.dtype
            )
            self.add_module(f"router{node}", router)

        for name in plan.entry:
            self.add_module(name, container.get_submodule(name))
        first = container.get_submodule(plan.blocks[0])
        if plan.node0 == "projection":
            norm = _blocks.output_norm(first)
            self.projection = _blocks.Projection(
                plan.in_chs, plan.out_chs, plan.stride, len(plan.blocks), norm, device=like.device, dtype=like.dtype
            )
        add_router(0)
        for node, name in enumerate(plan.blocks, start=1):
            self.add_module(name, container.get_submodule(name))
            add_router(node)
        self.training = container.training
        for added in self.graph_modules():  # a block may have modes of its own, such as frozen norms
            self.get_submodule(added).train(container.training)
        self.reset_graph_parameters()

    def adapt_blocks(self, plan: StagePlan) -> None:
        """Change timm's blocks where the graph needs it. Apart from ``__init__``, so that planning can still fail."""
        blocks = [self.get_submodule(name) for name in self.block_names]
        if not self.block_shortcut:
            for block in blocks:
                _blocks.drop_shortcut(block)
        elif plan.node0 == "shortcut":
            _blocks.take_shortcut_as_argument(blocks[0])
        if plan.node0 == "shortcut":
            blocks[0].projects_shortcut = True  # type: ignore[assignment]

    def reset_graph_parameters(self) -> None:
        """Start routers, scales, thresholds and projection afresh; the blocks' weights are left alone."""
        if not self.block_shortcut:
            for name in self.block_names:
                _blocks.undo_zero_init(self.get_submodule(name))
        for module in self.children():
            if isinstance(module, Router):
                module.reset_parameters(self.identity)
            elif isinstance(module, _blocks.Projection):
                module.reset_parameters()

    @torch.jit.unused
    def graph_modules(self) -> Dict[str, str]:
        """Names of what the graph adds, each with the name of the block it belongs to."""
        added = {f"router{node}": self.block_names[max(node, 1) - 1] for node in range(len(self.block_names) + 1)}
        if hasattr(self, "projection"):
            added["projection"] = self.block_names[0]
        return added

    @torch.jit.unused
    def edge_reads(self, source: int, feature: int) -> int:
        """Elements that all edges read for one image, given those of the stage's input and of a node's feature."""
        source = source if self.num_entry == 0 else feature  # an entry block ends at the shape of the features
        edges = sum(len(sources) for sources in self.edges)
        takes_shortcut = any(hasattr(child, "projects_shortcut") for child in self.children()) and self.block_shortcut
        return (edges - 1) * feature + source + takes_shortcut * feature

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage: (batch, in_chs, H, W) -> (batch, out_chs, H', W').

        This is the one place that decides what is computed. By default every edge is multiplied and every block runs
        for every image, with no control flow that depends on values, so it scripts, traces, exports and compiles.
        """
        if self.execution == "sparse":
            if torch.jit.is_scripting():
                raise RuntimeError("sparse execution can't be scripted; dg_timm.set_execution(model, 'dense') first")
            else:
                return self.sparse(x)
        if not torch.jit.is_scripting():
            pieces = self.pieces(x)
            if pieces > 1:
                return torch.cat([self.dense(piece) for piece in x.tensor_split(pieces)])
        return self.dense(x)

    @torch.jit.unused
    def pieces(self, x: Tensor) -> int:
        """In how many parts a batch runs: in inference on CPUs, so that the maps of a stage stay in the cache.

        Nothing in a stage depends on the other images of a batch, and a graph holds many maps at once; so does a wide
        block. Parts are large enough for the threads, and for the weights, which every part reads, to weigh less than
        the maps. A hook on a module of the stage sees the whole batch: there is one part then.
        """
        if (
            not aggregation.is_fused(x)
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or self.training
            or self.live is None
            or len(x) < 2 * MIN_IMAGES
        ):
            return 1
        maps = self.live * x[0].numel() * x.element_size()  # bytes of one image
        weights = sum(p.numel() for p in self.parameters()) * x.element_size()
        threads = torch.get_num_threads()
        images = max(MIN_IMAGES, threads, threads * LIVE_BYTES / maps, weights / maps)
        pieces = int(len(x) // images)
        if pieces > 1 and (_global_hooks() or any(_sees_the_batch(m) for m in self.modules())):
            return 1
        return max(pieces, 1)

    @torch.jit.unused
    @torch.compiler.disable(reason="sparse execution chooses what to run by the image")
    def sparse(self, x: Tensor) -> Tensor:
        """As :meth:`dense` in evaluation, to rounding; closed edges are not read, removed nodes are not run."""
        if _sparse.is_transformed(x):
            raise RuntimeError(
                "sparse execution chooses what to run by the image and can't be traced, exported or transformed; "
                "dg_timm.set_execution(model, 'dense') first"
            )
        if self.training:
            raise RuntimeError(
                "sparse execution is for evaluation: call model.eval(), or dg_timm.set_execution(model, 'dense')"
            )
        if x.is_meta:  # only shapes are asked for
            return self.dense(x)
        with torch.no_grad():
            pieces = self.pieces(x)
            out = (
                torch.cat([self._sparse(piece) for piece in x.tensor_split(pieces)]) if pieces > 1 else self._sparse(x)
            )
        if not torch.is_grad_enabled():
            return out
        learning = next((p for p in (x, *self.parameters()) if p.requires_grad), None)
        return out if learning is None else _sparse.NoGradient.apply(learning, out)

    def _sparse(self, source: Tensor) -> Tensor:
        children: dict[str, Any] = dict(self._modules)  # get_submodule takes as long as a small kernel
        for child in list(children.values())[: self.num_entry]:  # they stand first
            _sparse.refuse_batch_statistics(child)
            source = child(source)
        blocks = [children[name] for name in self.block_names]
        node0, reads_input, takes_shortcut = source, False, False
        if hasattr(self, "projection") or hasattr(blocks[0], "projects_shortcut"):
            project = children["projection"] if hasattr(self, "projection") else blocks[0].downsample
            _sparse.refuse_batch_statistics(project)
            node0, reads_input = project(source), True
            takes_shortcut = self.block_shortcut and not hasattr(self, "projection")
        routers = [children[f"router{node}"] for node in range(len(blocks) + 1)]
        return _sparse.run(source, node0, blocks, routers, takes_shortcut, reads_input)

    def dense(self, x: Tensor) -> Tensor:
        # Written over children(), with hasattr to tell them apart: TorchScript resolves both when it unrolls the loop.
        fused = aggregation.is_fused(x)
        node = x  # the feature of the last node; of node 0 first
        projected = False  # node 0's feature is a projection, which block 1 does not read
        rows: List[Tensor] = []  # of every node so far: the weights of the edges that leave it
        edges: List[List[Tensor]] = []  # ... and what they carry
        weights = x  # of the edges that enter the last node; set before it is read
        for child in self.children():
            if hasattr(child, "projects_shortcut"):
                # Once: block 1 takes its shortcut from here.
                node = child.downsample(x)  # type: ignore[operator]
                projected = True
        for index, child in enumerate(self.children()):
            if hasattr(child, "out_degree"):
                if len(rows) > 0 and len(self.topology[len(rows)]) == 0:
                    rows.append(rows[0])  # this node's block did not run, and nothing reads what stands here
                    edges.append([node])
                else:
                    node, pooled = aggregation.pool(node, fused)
                    if not torch.jit.is_scripting() and self.gates is not None:
                        rows.append(self.gates.leave(child, pooled))  # type: ignore[arg-type]
                    else:
                        rows.append(child(pooled) if len(rows) == 0 else child(pooled, graph.reached(weights)))
                    edges.append(aggregation.fan_out(node, rows[-1], child.out_degree, fused))  # type: ignore[arg-type]
            elif hasattr(child, "projects_input"):
                node, projected = child(x), True
            elif index < self.num_entry:
                x = child(x)
                node = x
            elif len(self.topology[len(rows)]) > 0:
                target = len(rows)
                weights = graph.column(rows, target, self.topology[target])
                if not torch.jit.is_scripting() and self.gates is not None:
                    weights = self.gates.enter(weights, target, self.topology[target])
                sources = graph.carried(edges, target, self.topology[target])
                shortcut: Optional[Tensor] = None
                if target == 1 and projected:
                    if hasattr(child, "projects_shortcut") and self.block_shortcut:
                        shortcut = aggregation.aggregate(sources, weights, fused)
                    sources = aggregation.fan_out(x, weights, 1, fused)
                if not torch.jit.is_scripting():
                    node = self.run_node(child, sources, weights, shortcut, fused)
                elif hasattr(child, "projects_shortcut"):
                    node = child(aggregation.aggregate(sources, weights, fused), shortcut)
                else:
                    node = child(aggregation.aggregate(sources, weights, fused))
        into_output = self.topology[len(rows)]
        sources = graph.carried(edges, len(rows), into_output)
        return aggregation.aggregate(sources, graph.column(rows, len(rows), into_output), fused)

    @torch.jit.unused
    def run_node(
        self, block: nn.Module, sources: List[Tensor], weights: Tensor, shortcut: Optional[Tensor], fused: bool
    ) -> Tensor:
        """One node in eager mode, with what makes its backward pass cheap in memory."""
        if self.grad_checkpointing:
            return checkpoint(_run_node, block, weights, shortcut, fused, *sources, use_reentrant=False)
        if fused and torch.is_grad_enabled():
            z = aggregation.aggregate(sources, weights, fused)
            with aggregation.recompute(z, sources, weights):
                return block(z) if shortcut is None else block(z, shortcut)
        return _run_node(block, weights, shortcut, fused, *sources)

    @torch.jit.unused
    def __len__(self) -> int:
        return self.num_entry + len(self.block_names)

    @torch.jit.unused
    def __getitem__(self, index: Union[int, slice]) -> Union[nn.Module, List[nn.Module]]:
        """The static stage's blocks, by position (``model.layer4[-1]`` is what Grad-CAM tools ask for)."""
        static = [m for m in self.children() if not isinstance(m, (Router, _blocks.Projection))]
        return static[index]

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)}" for name in SWITCHES)
        return f"nodes={len(self.edges)}, edges={sum(len(sources) for sources in self.edges)}, {options}"

    @torch.jit.unused
    def is_complete(self) -> bool:
        """Whether there is an edge between any two nodes."""
        return self.edges == graph.complete(len(self.block_names))


def _sees_the_batch(module: nn.Module) -> bool:
    """Whether a module's result may depend on the batch as a whole, or somebody watches it."""
    return (
        module.training
        or (isinstance(module, _NormBase) and module.running_mean is None)
        or bool(module._forward_hooks or module._forward_pre_hooks)
    )


def _global_hooks() -> bool:
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


def _run_node(block: nn.Module, weights: Tensor, shortcut: Optional[Tensor], fused: bool, *sources: Tensor) -> Tensor:
    z = aggregation.aggregate(list(sources), weights, fused)
    return block(z) if shortcut is None else block(z, shortcut)


def graph_stages(model: nn.Module) -> dict[str, DGStage]:
    """The graphs of a model by name, in the order in which they run."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DGStage)}


def routers(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def require_dynamic(model: nn.Module) -> dict[str, DGStage]:
    """The graphs of a model by name; ValueError if it has none."""
    stages = graph_stages(model)
    if not stages:
        raise ValueError(f"{type(model).__name__} is a static network; convert it with dg_timm.dynamize(model)")
    return stages
