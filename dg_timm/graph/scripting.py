"""A stage for TorchScript, which is deprecated in torch and still part of timm's contract.

TorchScript unrolls loops over children and resolves ``hasattr`` while it compiles, and can do little else of what a
stage does; so it gets a loop of its own, over the reference formulas.
"""

from typing import Dict, List, Optional

import torch
from torch import Tensor, nn

from dg_timm._errors import BadState
from dg_timm.graph import edges
from dg_timm.graph.gate import is_open, pass_on, pool_inputs
from dg_timm.graph.stage import DGStage


class ScriptableStage(DGStage):
    """A stage that TorchScript can compile. In eager mode it is the stage that it was made from.

    ``torch.jit.script`` leaves it in the place of the original, so it must go on being a stage.
    """

    topology: List[List[int]]
    num_entry: int

    @classmethod
    def of(cls, stage: DGStage) -> "ScriptableStage":
        """Make a scriptable stage that shares every module and setting with ``stage``."""
        if stage.execution == "sparse":
            raise BadState("sparse execution can't be scripted; dg_timm.set_execution(model, 'dense') first")
        if stage.cascade is not None:
            raise BadState("a cascade can't be scripted; dg_timm.set_cascade(model, None) first")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        # torch binds load hooks to their module, so this one registers its own
        made.__dict__ |= {key: own for key, own in stage.__dict__.items() if not key.startswith("_load_state_dict")}
        if stage.load_hook is not None:
            made.on_load(stage.load_hook)
        made.num_entry = len(stage.entry_names)
        return made

    def __prepare_scriptable__(self) -> "ScriptableStage":
        return self if self.execution != "sparse" and self.cascade is None else ScriptableStage.of(self)

    def forward(self, x: Tensor) -> Tensor:
        """As :meth:`DGStage.forward`; compiled, in dense or fixed execution."""
        return self.run_compiled(x) if torch.jit.is_scripting() else self.run_eagerly(x)

    def run_compiled(self, x: Tensor) -> Tensor:
        """Run what TorchScript compiles."""
        feature = x  # of the last node; of node 0 first
        is_projected = False  # node 0's feature is a module's projection of x; block 1 reads x
        for child in self.children():
            if hasattr(child, "projects_shortcut"):
                feature = child.project(x)  # type: ignore[operator]
        features: List[Tensor] = []
        weights: List[Dict[int, Tensor]] = []  # of every node: of the edges that leave it, by target
        pooled: List[Tensor] = []
        into = torch.empty(0)  # weights of the edges into the last node
        # what the next node puts out where its gate is closed; where it is open, to learn from and as bool
        passed, gate, runs, is_gated = x, torch.empty(0), torch.empty(0), False
        for index, child in enumerate(self.children()):
            node = len(features)  # the next one
            if hasattr(child, "targets"):
                if is_gated:
                    feature, is_gated = pass_on(feature, passed, gate, runs), False
                row: Dict[int, Tensor] = {}
                means = feature  # nobody reads it if nothing leads to the node
                if node == 0 or len(self.topology[node]) > 0:
                    active: Optional[Tensor] = None if node == 0 else edges.has_open_input(into)
                    means = edges.global_average_pool(feature)
                    given = child(means, active)
                    for k, target in enumerate(child.targets):  # type: ignore[arg-type]
                        row[target] = given[:, k]
                pooled.append(means)
                features.append(feature)
                weights.append(row)
            elif hasattr(child, "shift"):
                if len(self.topology[node]) > 0:
                    into, is_gated = self.weigh_inputs(weights, node), True
                    passed = edges.weighted_sum([features[i] for i in self.topology[node]], into)
                    logit = child(pool_inputs([pooled[i] for i in self.topology[node]], into))
                    runs = is_open(logit)
                    gate = edges.straight_through(torch.sigmoid(logit), runs.to(logit.dtype))
            elif hasattr(child, "projects_input"):
                feature, is_projected = child(x), True
            elif hasattr(child, "residual"):  # such a block is called by that name alone
                if len(self.topology[node]) > 0:
                    into = self.weigh_inputs(weights, node)
                    sources = [features[i] for i in self.topology[node]]
                    shortcut: Optional[Tensor] = None
                    if hasattr(child, "projects_shortcut"):
                        if self.block_shortcut:
                            shortcut = edges.weighted_sum(sources, into)
                        sources = [x]
                    z = edges.weighted_sum(sources, into)
                    feature = child.residual(z, shortcut)  # type: ignore[operator]
            elif index < self.num_entry:
                x = feature = child(x)
            elif len(self.topology[node]) > 0:
                into = self.weigh_inputs(weights, node)
                sources = [features[i] for i in self.topology[node]]
                # a block 1 that is left out passes on node 0's feature
                reads_input = node == 1 and is_projected and not hasattr(child, "passes_on")
                feature = child(edges.weighted_sum([x] if reads_input else sources, into))
        output = len(features)
        into = self.weigh_inputs(weights, output)
        return edges.weighted_sum([features[i] for i in self.topology[output]], into)

    def weigh_inputs(self, weights: List[Dict[int, Tensor]], node: int) -> Tensor:
        """The weights of the edges into a node: (batch, in-degree)."""
        return torch.stack([weights[i][node] for i in self.topology[node]], dim=1)

    @torch.jit.unused
    def run_eagerly(self, x: Tensor) -> Tensor:
        """Run as the original stage does."""
        return self.engine(self, x)
