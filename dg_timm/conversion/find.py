"""Find the stages of any timm model by watching its dataflow.

A copy of the model runs once on the meta device (shapes only, no arithmetic) while the input and output of every
module are recorded. A *stage* is a container without parameters of its own that hands its input through its children,
one after another, where every child is a *block*: a module that holds convolutions (and at least two weight layers,
which tells a residual block from a convolution with its norm) and maps one image-shaped tensor to one. Names and
classes play no part in this.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from dg_timm import _compat
from dg_timm._errors import BadValue
from dg_timm._views import run_on_meta
from dg_timm.conversion.blocks import WITHOUT_SHORTCUT, has_shortcut_projection
from dg_timm.graph.plan import InputNode, StagePlan


class RecordedCall(NamedTuple):
    """What went into a module, and what came out."""

    source: Tensor
    result: Tensor


def find_stages(model: nn.Module) -> list[StagePlan]:
    """Plan every stage that can become a graph, in the order of ``model.named_modules()``. The model is not changed.

    Raises:
        BadValue: if there is none, and the message says what was looked for; or if the model can't be run.
    """
    own_forward = {name for name, module in model.named_modules() if _compat.has_own_forward(module)}
    try:
        model, calls = _record_calls(model)
    except Exception as error:
        raise BadValue(
            f"{type(model).__name__} can't be run on a batch of images to find its stages: {error}"
        ) from error
    modules = dict(model.named_modules())
    containers = [
        name
        for name, module in modules.items()
        if name and name not in own_forward and _is_run_of_blocks(module, calls)
    ]
    innermost = [name for name in containers if not any(other.startswith(f"{name}.") for other in containers)]
    plans = [plan for name in innermost if (plan := _plan(name, modules[name], calls, own_forward)) is not None]
    if not plans:
        raise BadValue(
            f"{type(model).__name__} has no stage that can become a graph. Looked for: a container that hands its "
            "input through its children one after another, where every child is a convolutional block (at least one "
            "convolution, at least two weight layers, one (batch, channels, height, width) tensor in and one out) and "
            f"the last block keeps the shape. Found: {_describe(modules, calls)}."
        )
    return plans


def _record_calls(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, RecordedCall]]:
    """A copy of the model, and its modules that are called exactly once, with one 4-D tensor in and one out."""
    calls: dict[nn.Module, RecordedCall | None] = {}

    def record(name: str, module: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
        image_like = (
            len(args) == 1 and not kwargs and all(isinstance(t, Tensor) and t.ndim == 4 for t in (*args, result))
        )
        calls[module] = RecordedCall(args[0], result) if image_like and module not in calls else None  # type: ignore[arg-type]

    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    if not cfg.get("fixed_input_size"):  # strides must show: at small sizes 2 -> 1 and 1 -> 1 look alike
        height, width = max(height, 224), max(width, 224)
    copied = run_on_meta(model, record, (getattr(model, "in_chans", channels), height, width))
    return copied, {module: call for module, call in calls.items() if call is not None}


def _is_run_of_blocks(module: nn.Module, calls: dict[nn.Module, RecordedCall]) -> bool:
    children = list(module.children())
    owns_tensors = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None)) is not None
    if not children or owns_tensors or module not in calls or not all(_is_block(c) and c in calls for c in children):
        return False
    if not all(_is_channels_first(child, calls[child]) for child in children):
        return False
    handed = calls[module].source
    for child in children:
        if calls[child].source is not handed:
            return False
        handed = calls[child].result
    return calls[module].result is handed


def _is_block(module: nn.Module) -> bool:
    if next(module.children(), None) is None:
        return False
    weight_layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return len(weight_layers) >= 2 and any(isinstance(m, nn.Conv2d) for m in weight_layers)


def _is_channels_first(block: nn.Module, call: RecordedCall) -> bool:
    """Whether dimension 1 counts channels: it is one that a weight layer of the block takes or makes."""
    channels: set[int] = set()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            channels |= {module.in_channels, module.out_channels}
        elif isinstance(module, nn.Linear):
            channels |= {module.in_features, module.out_features}
    return {call.source.shape[1], call.result.shape[1]} <= channels


def _plan(
    name: str, container: nn.Module, calls: dict[nn.Module, RecordedCall], own_forward: set[str]
) -> StagePlan | None:
    """Split the children into entry blocks and nodes; None if nothing is left to be a node.

    A block of the names ``own_forward`` has a forward that was put on the instance. It is called, and not taken apart.
    """
    names = [child for child, _ in container.named_children()]
    blocks = [block for _, block in container.named_children()]
    changes = [k for k, b in enumerate(blocks) if calls[b].source.shape != calls[b].result.shape]
    first = 0
    input_node: InputNode = "input"
    if changes:
        first = changes[-1]
        is_plain = f"{name}.{names[first]}" not in own_forward
        if first == 0 and is_plain and has_shortcut_projection(blocks[0]):
            input_node = "shortcut"
        elif is_plain and type(blocks[first]) in WITHOUT_SHORTCUT:
            input_node = "projection"
        else:
            first += 1  # any other family: the last block that changes the shape is the stage's entry
    if first == len(blocks):
        return None
    source, result = calls[blocks[first]]
    return StagePlan(
        name=name,
        entry=tuple(names[:first]),
        blocks=tuple(names[first:]),
        input_node=input_node,
        in_chs=source.shape[1],
        out_chs=result.shape[1],
        stride=-(-source.shape[2] // result.shape[2]),
        peak_ratio=_peak_ratio(container, calls, len(names)),
    )


def _peak_ratio(container: nn.Module, calls: dict[nn.Module, RecordedCall], blocks: int) -> float | None:
    """See :class:`StagePlan`: every node's feature, and what the widest layer reads and writes."""
    inside = [calls[m] for m in container.modules() if m in calls and next(m.children(), None) is None]
    if any(call.source.shape[2:].numel() == 1 for call in inside):
        return None
    source, result = calls[container]
    widest = max((call.source.numel() + call.result.numel() for call in inside), default=0)
    return ((blocks + 2) * result.numel() + widest) / source.numel()


def _describe(modules: dict[str, nn.Module], calls: dict[nn.Module, RecordedCall]) -> str:
    """What there was instead: the containers of several composite children, and why they are not stages."""

    def reasons() -> Iterator[str]:
        for name, module in modules.items():
            children = list(module.children())
            if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(children) > 1:
                if not all(_is_block(c) for c in children):
                    yield f"'{name}' has children that are not convolutional blocks"
                elif not _is_run_of_blocks(module, calls):
                    yield f"'{name}' does not run its children one after another on one image-shaped tensor"
                else:
                    yield f"'{name}' changes the shape in its last block"

    found = list(reasons())
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "") or "no container of blocks"
