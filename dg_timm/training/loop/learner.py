"""The network that learns, with all that an update of its weights changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import nn
from torch.distributed.tensor import DTensor

from dg_timm.training.loop import sharding
from dg_timm.training.loop.distributed import prepare

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Learner:
    """A network, its optimizer and schedule, and the average of its weights.

    Attributes:
        model: as ``accelerator.prepare`` wraps it: forward and backward passes go through it.
        network: the same without its wrapper.
        optimizer: as ``accelerator.prepare`` wraps it.
        schedule: timm's, in updates; not prepared (Accelerate would step it once for each process).
        epochs: that the schedule has.
        ema: average of the network's weights, or None.
        whole: makes a sharded network whole; None where the processes have whole ones.
    """

    model: nn.Module
    network: nn.Module
    optimizer: Any
    schedule: Scheduler
    epochs: int
    ema: ModelEmaV3 | None
    whole: sharding.Whole | None = None

    @classmethod
    def create(
        cls,
        accelerator: Accelerator,
        network: nn.Module,
        optimize: Callable[[nn.Module], tuple[torch.optim.Optimizer, Scheduler, int]],
        *,
        ema_decay: float | None = None,
        ema_warmup: bool = True,
        fsdp: bool = False,
    ) -> "Learner":
        """Give a network its optimizer, let Accelerate prepare both, and begin an average if it has a decay.

        Args:
            accelerator: of this process.
            network: on the CPU.
            optimize: makes the optimizer and the schedule of the network, and counts the epochs that it has.
            ema_decay, ema_warmup: of the average; without a decay there is none.
            fsdp: share the network out over the processes (:mod:`dg_timm.training.loop.sharding`). Accelerate then
                prepares nothing.
        """

        def average(network: nn.Module, fused: bool) -> ModelEmaV3 | None:
            if ema_decay is None:
                return None
            return ModelEmaV3(network, decay=ema_decay, use_warmup=ema_warmup, foreach=fused)

        if fsdp:
            whole = sharding.Whole(network)
            # timm's fused update takes no mixture of shares and buffers
            ema = average(network, fused=False)
            for each in (network, *([ema.module] if ema is not None else [])):
                sharding.shard(each, accelerator.device)
            return cls(network, network, *optimize(network), ema, whole)
        optimizer, schedule, epochs = optimize(network)
        model, prepared = prepare(accelerator, network, optimizer)
        plain = accelerator.unwrap_model(model, keep_torch_compile=False)
        return cls(model, plain, prepared, schedule, epochs, average(plain, fused=True))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The network as ``eval`` and, where there is one, the average as ``ema``."""
        return {"eval": self.network, **({"ema": self.ema.module} if self.ema is not None else {})}

    def in_one_piece(self, network: nn.Module, wanted: bool) -> nn.Module | None:
        """Give one of the networks; every process calls, and a sharded one is made whole where it is ``wanted``."""
        return network if self.whole is None else self.whole.of(network, wanted)

    @property
    def rate(self) -> float:
        """The learning rate, without the factors of parameter groups."""
        return max(group["lr"] / (group.get("lr_scale") or 1.0) for group in self.optimizer.param_groups)

    def step(self, update: int) -> float:
        """Apply the gradients as the update of this number, counted from 1; return its learning rate."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.network, step=update)
        rate = self.rate
        self.schedule.step_update(update)
        return rate

    def clip_gradients(self, accelerator: Accelerator, bound: float, mode: str) -> None:
        """Bound the gradients' common norm (``norm``), their values (``value``), or both norms' ratio (``agc``)."""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        if mode == "norm":
            accelerator.clip_grad_norm_(parameters, bound)
        elif mode == "value":
            accelerator.clip_grad_value_(parameters, bound)
        else:
            accelerator.unscale_gradients()
            adaptive_clip_grad(parameters, bound)


def set_train_mode(model: nn.Module, fixed_norms: bool = False) -> None:
    """Put a model into training mode, but for BatchNorms that are frozen (or for all), which keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            frozen = module.weight is not None and not module.weight.requires_grad
            if fixed_norms or frozen:
                module.eval()


def has_finite_weights(model: nn.Module) -> bool:
    """Tell whether every floating-point weight and statistic is finite; of a sharded model, those of this process."""
    values = (v.to_local() if isinstance(v, DTensor) else v for v in model.state_dict().values())
    finite = [torch.isfinite(v).all() for v in values if v.is_floating_point()]
    return bool(torch.stack(finite).all())
