"""Copies of a model's structure: other modes, or no numbers, without touching modules that other threads run."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dg_timm import _compat
from dg_timm._errors import BadState


def eval_view(model: nn.Module) -> nn.Module:
    """The model in eval mode: itself if it is, else a copy of its modules that shares every tensor.

    Raises:
        Exception: whatever a module raises that can't be copied (a sharded one, say).
    """
    if not any(module.training for module in model.modules()):
        return model
    return _copy_structure(model, lambda tensor: tensor).eval()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, without hooks: shapes, and no numbers."""
    copied = _copy_structure(model, lambda tensor: _on_meta(tensor))
    for module in copied.modules():
        _compat.remove_hooks(module)
    return copied


def run_on_meta(
    model: nn.Module,
    hook: Callable[[str, nn.Module, tuple, dict, Any], None],
    input_size: tuple[int, int, int] | None = None,
) -> nn.Module:
    """Run a meta copy of a model once: ``hook(name, module, args, kwargs, result)`` sees every call, shapes only.

    Args:
        model: any image model; it is not touched.
        hook: called after each module has run.
        input_size: (channels, height, width); by default what the model's configuration names, or 3 x 224 x 224.

    Returns:
        The copy.

    Raises:
        BadState: if the model can't be copied (it is sharded, say), or has layers without shapes (quantized ones).
    """
    channels, height, width = input_size or default_size(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    try:
        copied = meta_copy(model)
    except Exception as error:  # whatever a module raises that can't be copied
        raise _not_countable(model, error) from error
    for name, module in copied.named_modules():

        def watch(module: nn.Module, args: tuple, kwargs: dict, result: Any, name: str = name) -> None:
            hook(name, module, args, kwargs, result)

        module.register_forward_hook(watch, with_kwargs=True)
    with torch.no_grad(), _QuickShapes():
        # Two images: BatchNorm in train mode refuses a single value for each channel.
        try:
            copied(torch.empty(2, channels, height, width, dtype=dtype, device="meta"))
        except NotImplementedError as error:
            raise _not_countable(model, error) from error
    return copied


class _QuickShapes(TorchFunctionMode):
    """Give at once what has the shape of its input, and what torch decomposes in Python: half of a run's time."""

    _KEEP_SHAPE = frozenset({F.batch_norm, F.hardtanh})

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self._KEEP_SHAPE and args and args[0].is_meta:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def _not_countable(model: nn.Module, error: Exception) -> BadState:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return BadState(
        f"this {type(model).__name__} can't be run on a copy without numbers ({reason}); count it before it is "
        "quantized, sharded or wrapped"
    )


def default_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model's configuration names, or 3 x 224 x 224."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    return getattr(model, "in_chans", channels), height, width


def _copy_structure(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy modules; ``replace`` gives the tensor that stands for each parameter, buffer and tensor attribute."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values())
        memo |= {id(tensor): replace(tensor) for tensor in own if isinstance(tensor, Tensor)}
        memo |= {id(hook): hook for hook in _compat.hooks_of(module)}  # whose owners may be anything
    return copy.deepcopy(model, memo)


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
