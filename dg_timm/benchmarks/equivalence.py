"""Nothing is timed before it gives what it must."""

from typing import Any

import torch
from torch import Tensor, nn

from dg_timm._errors import BadState
from dg_timm.benchmarks.setting import Setting
from dg_timm.execution.operators import using_backend

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


class NotEquivalent(BadState):
    """A network does not give what it must, so that its time would say nothing."""


def check_exact(spec: str, found: Tensor, expected: Tensor, like: str) -> None:
    """Raise NotEquivalent unless both are equal; where only rounding differs, print a note."""
    if not torch.equal(found, expected):
        check_close(spec, found, expected, like)
        worst = (found - expected).abs().max().item()
        print(f"note: {spec} predicts {like}, but for rounding ({worst:.1e})", flush=True)


def check_close(spec: str, found: Tensor, expected: Tensor, like: str) -> None:
    """Raise NotEquivalent unless both are equal to rounding; ``like`` says what ``expected`` is."""
    if found.shape != expected.shape or not _is_close(found, expected, _TOLERANCE):
        raise NotEquivalent(f"{spec} does not predict {like}; it is not timed")


def check_as_timed(spec: str, timed: Any, plain: nn.Module, images: Tensor, setting: Setting) -> None:
    """Compare a network as it is timed (compiled, autocast, training) with the reference formulas, run eagerly.

    Gradients are compared as one vector, by its angle and length.

    Args:
        spec: its name.
        timed: what is timed.
        plain: the network itself.
        images: one batch.
        setting: under which it is timed.

    Raises:
        NotEquivalent: naming what differs.
    """
    exact_type = setting.torch_dtype == torch.float32
    if not (setting.compile or setting.trains or not exact_type):
        return  # compared already, when it was built

    found = _outcome(timed, plain, images, setting)
    with using_backend("reference"):
        expected = _outcome(plain, plain, images, setting)
    tolerance = _TOLERANCE if exact_type else _HALF_TOLERANCE
    if not _is_close(found[0], expected[0], tolerance):
        raise NotEquivalent(
            f"{spec}, as it would be timed, does not predict what the reference formulas give; it is not timed"
        )
    if setting.trains:
        angle = nn.functional.cosine_similarity(found[1].double(), expected[1].double(), 0).item()
        length = (found[1].norm() / expected[1].norm()).item()
        if not (angle >= 1 - tolerance and abs(length - 1) <= tolerance):
            raise NotEquivalent(
                f"the gradient of {spec} is not that of the reference formulas (cosine {angle:.4f}, {length:.4f} of "
                "their length); it is not timed"
            )


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return torch.allclose(found, expected, tolerance, tolerance * float(expected.abs().max()))


def _outcome(model: Any, plain: nn.Module, images: Tensor, setting: Setting) -> list[Tensor]:
    """Give the logits and, in training, the gradient of all parameters as one vector."""
    torch.manual_seed(0)  # for dropout
    with torch.set_grad_enabled(setting.trains), setting.autocast():
        out = model(images).float()
    if not setting.trains:
        return [out]
    nn.functional.cross_entropy(out, torch.arange(len(images), device=images.device)).backward()
    gradient = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
    plain.zero_grad()
    return [out.detach(), gradient]
