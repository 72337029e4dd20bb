"""Every private API of another library that this package needs, each with a fallback.

A fallback may be slower or say less; it is never wrong. ``tests/package/test_compat.py`` runs both ways.
"""

import inspect
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module_file

from dg_timm._files import put_in_place


def _blocks_of_mobilenetv2() -> tuple[type[nn.Module], type[nn.Module]]:
    """timm's classes of blocks, from a model that has them."""
    with torch.device("meta"):
        blocks: Any = timm.create_model("mobilenetv2_035").blocks
    return type(blocks[0][0]), type(blocks[1][0])


try:
    from torch._C import _are_functorch_transforms_active as _functorch_active
except ImportError:  # pragma: no cover
    _functorch_active = None  # type: ignore[assignment]

try:
    from torch._C._autograd import (  # type: ignore[attr-defined]
        _saved_tensors_hooks_is_enabled as _hooks_enabled,
    )
    from torch._C._autograd import _top_saved_tensors_default_hooks as _top_hooks
except ImportError:  # pragma: no cover
    _hooks_enabled = _top_hooks = None  # type: ignore[assignment]

try:
    from torch.utils._python_dispatch import _get_current_dispatch_mode as _dispatch_mode
except ImportError:  # pragma: no cover
    _dispatch_mode = None  # type: ignore[assignment]


try:
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
except ImportError:  # pragma: no cover
    DepthwiseSeparableConv, InvertedResidual = _blocks_of_mobilenetv2()  # type: ignore[misc, assignment]


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way.

    Without the private name nobody can tell: the answer is yes, and the reference formulas run, which are always right.
    """
    return _functorch_active is None or _functorch_active() or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether forward-mode differentiation is under way; without the private name nobody can tell, and it may be."""
    level: int = getattr(forward_ad, "_current_level", 0)
    return level >= 0


def may_hook_saved_tensors() -> bool:
    """Whether hooks on saved tensors are allowed here, and nobody else's are in force.

    Without the private names the answer is no, and what could be recomputed is kept.
    """
    return _hooks_enabled is not None and _hooks_enabled() and _top_hooks(False) is None


def is_watched() -> bool:
    """Whether a dispatch mode sees every operation of this thread. Unknown counts as yes."""
    return _dispatch_mode is None or _dispatch_mode() is not None


def records_a_program() -> bool:
    """Whether a dispatch mode is active under which tensors have no values: fake tensors, or a proxy trace.

    Other modes only watch. Without the private names the answer is no; fake tensors are then told by their type.
    """
    mode = None if _dispatch_mode is None else _dispatch_mode()
    if mode is None:  # without one, nothing here needs these modules
        return False
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
    except ImportError:  # pragma: no cover
        return False
    return isinstance(mode, (FakeTensorMode, ProxyTorchDispatchMode))


def version_of(x: Tensor) -> int:
    """How many times a tensor was changed in place. Tensors made in inference mode count no changes."""
    return 0 if x.is_inference() else getattr(x, "_version", 0)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more, or other, than its class's ``forward``. Unknown counts as yes."""
    own = module.__dict__
    try:
        return bool(own["_forward_hooks"] or own["_forward_pre_hooks"]) or "forward" in own
    except KeyError:  # pragma: no cover
        return True


def has_global_hooks() -> bool:
    """Whether hooks are registered on all modules of the process. Unknown counts as yes."""
    own = vars(_module_file)
    try:
        return bool(own["_global_forward_hooks"] or own["_global_forward_pre_hooks"])
    except KeyError:  # pragma: no cover
        return True


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """A module's own parameters by name; attributes and ``named_parameters`` take several times as long."""
    found = module.__dict__.get("_parameters")
    return dict(module.named_parameters(recurse=False)) if found is None else found


def own_modules(module: nn.Module) -> Mapping[str, nn.Module | None]:
    """A module's own children by name; ``named_children`` takes several times as long."""
    found = module.__dict__.get("_modules")
    return dict(module.named_children()) if found is None else found


def find_modules(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[nn.Module]:
    """The modules of some classes in a module, itself included; ``modules()`` takes several times as long."""
    found: list[nn.Module] = []
    rest: list[nn.Module | None] = [module]
    try:
        for one in rest:  # it grows
            if isinstance(one, kinds):
                found.append(one)
            elif one is not None and (own := one.__dict__["_modules"]):
                rest += own.values()
    except KeyError:  # pragma: no cover
        return [one for one in module.modules() if isinstance(one, kinds)]
    return found


def has_own_forward(module: nn.Module) -> bool:
    """Whether a ``forward`` was put on the instance; accelerate's does not count, which runs the class's."""
    return "forward" in module.__dict__ and "_hf_hook" not in module.__dict__


def find_sharded(module: nn.Module) -> nn.Module | None:
    """A module inside, not the module itself, that FSDP2 shards over several processes; None if there is none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # who shards has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        return None
    return next((inside for inside in module.modules() if inside is not module and isinstance(inside, kind)), None)


def hooks_of(module: nn.Module) -> list[Any]:
    """The functions that are called before or after a module's forward, backward, and loading; none, if unknown."""
    own = module.__dict__.items()
    return [
        hook
        for name, hooks in own
        if name.endswith("_hooks") and isinstance(hooks, dict)
        for hook in hooks.values()
        if callable(hook)
    ]


def remove_hooks(module: nn.Module) -> None:
    """Take every hook on a forward pass, what was compiled, and a ``forward`` that was put on the instance, off it."""
    own = module.__dict__
    for name, value in own.items():
        if name.startswith("_forward_") and isinstance(value, dict):
            value.clear()
    own.pop("forward", None)
    if own.get("_compiled_call_impl") is not None:
        own["_compiled_call_impl"] = None
    original = own_modules(module).get("_orig_mod")
    if original is not None:  # torch.compile's wrapper, whose class has no forward
        own["forward"] = original.__call__


def remove_forward_hook(module: nn.Module, function: Callable[..., Any]) -> None:
    """Take one function off the hooks before or after a module's forward; a copy of it has no handle of them."""
    own = module.__dict__
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        for key in [key for key, hook in own.get(kind, {}).items() if hook is function]:
            for name, value in own.items():
                if name.startswith(kind) and isinstance(value, dict):
                    value.pop(key, None)


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let the hooks of one module fire for another: taps set on a static stage go on working on the dynamic one."""
    for name, value in source.__dict__.items():
        if "_hooks" in name and name.startswith(("_forward_", "_backward_")) and isinstance(value, dict):
            target.__dict__[name] = value


try:
    from timm.models import _hub as _timm_hub

    _save_config_for_hf: Any = _timm_hub.save_config_for_hf
except (ImportError, AttributeError):  # pragma: no cover
    _save_config_for_hf = None


def save_timm_config(model: nn.Module, file: Path, **options: Any) -> None:
    """Write timm's config.json of a model; ``options`` are those of ``timm.models.save_for_hf``.

    Without the private name timm writes the weights as well, and they are deleted.
    """
    if _save_config_for_hf is not None:
        _save_config_for_hf(model, str(file), **options)
        return
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".config-") as scratch:
        save_for_hf(model, scratch, **options)
        put_in_place(Path(scratch) / "config.json", file)


def static_weights_filter(entrypoint: Callable[..., nn.Module]) -> Callable[[Any, nn.Module], Any]:
    """Find the function by which timm's own model file turns published weights into a state dict of its model.

    timm's files have no public name for it. Where neither is there, the weights are taken as they are.
    """
    file = sys.modules[entrypoint.__module__]
    own = getattr(file, "checkpoint_filter_fn", getattr(file, "_filter_fn", None))
    if own is None:
        return lambda state_dict, model: state_dict
    if len(inspect.signature(own).parameters) > 1:
        return own
    return lambda state_dict, model: own(state_dict)


def end_loader_workers(loader: Any) -> None:
    """End the workers of a ``torch.utils.data.DataLoader`` that keeps them; torch has no public call for it.

    They end by themselves when their iterator is collected, but a traceback can hold it beyond the end of the program.
    Without the private names the workers are left to the collector.
    """
    shut_down = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()
