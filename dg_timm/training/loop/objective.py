"""Compute the loss of a batch: smoothing, mixup, distillation and a price on cost.

An objective gives a number for each image, so that losses can be masked and summed over batches and processes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import create_classification_loss
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn

from dg_timm.budget.expected_cost import ExpectedCost
from dg_timm.hub.labeling import SINGLE, Labeling
from dg_timm.training.data.images import Batch
from dg_timm.training.data.seeding import seeded


class Losses(NamedTuple):
    """The losses of a batch, with a number for each image.

    Attributes:
        loss: (batch,); what training minimizes.
        metrics: by name, (batch,) each; what training shows.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class CostTarget:
    """Another objective plus a price on the mean cost of a batch above a target: ``max(0, cost - target)^2``.

    With a range of targets every image passes three times, as copies in one batch: at the highest target, the lowest,
    and one between (the sandwich rule of slimmable networks, Yu & Huang, 2019). Each copy has its price, and there it
    is ``(cost - target)^2``: without a price on being too cheap, the larger budgets came to lie next to the smaller
    ones. The loss is the mean of the three.

    The targets come down from 1, linearly, over the first updates, and the gates are noisy over the same time and
    longer: each image then meets the network with and without a block, and later blocks learn to do without.

    It adds the metrics ``cost``, ``skipped`` (percent of blocks) and ``spread`` (of the cost between images: its mean
    absolute deviation).

    Args:
        objective: that of the task.
        expected: expected cost of the network that the objective runs, in or out of its wrapper.
        targets: lowest and highest mean cost relative to the static network, 0..1; equal for a single budget.
        weight: factor of the squared distance.
        ramp: number of updates until the targets are in force.
        noise: scale of the gates' noise at the first update (:meth:`ExpectedCost.recording`).
        noise_until: number of the update from which on there is no noise.
        seed: of the noise and the targets of images.
    """

    def __init__(
        self,
        objective: Callable[..., Losses],
        expected: ExpectedCost,
        *,
        targets: tuple[float, float],
        weight: float = 300.0,
        ramp: int = 0,
        noise: float = 0.0,
        noise_until: int = 0,
        seed: int = 0,
    ) -> None:
        self.objective, self.expected, self.weight, self.ramp = objective, expected, weight, ramp
        self.targets, self.noise, self.noise_until, self.seed = targets, noise, noise_until, seed

    def targets_at(self, update: int) -> tuple[float, float]:
        """Return the targets in force for an update, counted from 0."""
        share = min(update / self.ramp, 1.0) if self.ramp else 1.0
        low, high = self.targets
        return 1 + (low - 1) * share, 1 + (high - 1) * share

    def noise_at(self, update: int) -> float:
        """Return the scale of the noise for an update, counted from 0."""
        return 0.0 if update >= self.noise_until else self.noise * (1 - update / self.noise_until)

    def __call__(self, model: nn.Module, batch: Any, update: int, *others: int) -> Losses:
        """Compute the losses of a batch, of images or of annotated ones.

        Args:
            update: counts from 0; it seeds the noise, together with ``others``.
        """
        generator = np.random.default_rng((self.seed, update, *others))
        mask = batch.sample_mask[batch.passing]
        targets = self._draw_targets(generator, len(mask), update)
        noise, seed = self.noise_at(update), int(generator.integers(2**31))
        budgets = targets.flatten() if self.is_range else None
        copies = {"copies": len(targets)} if self.is_range else {}
        with self.expected.recording(targets.numel(), noise=noise, seed=seed, budgets=budgets) as costs:
            losses = self.objective(model, batch, update, *others, **copies)
        cost, skipped = (values.view(targets.shape) for values in costs())
        counted = mask.to(cost) / mask.sum().clamp(min=1)
        above = ((cost - targets.to(cost)) * counted).sum(1)
        price = (above if self.is_range else above.clamp(min=0)).square().mean()
        spread = (cost - (cost * counted).sum(1, keepdim=True)).abs()
        shown = {"cost": cost, "skipped": 100 * skipped, "spread": spread}
        shown = {name: _of_batch(value.detach().mean(0), batch) for name, value in shown.items()}
        price = _of_batch(price.expand(len(mask)), batch)
        return Losses(losses.loss + self.weight * price, {**losses.metrics, **shown})

    @property
    def is_range(self) -> bool:
        """Whether there is more than one target."""
        return self.targets[0] != self.targets[1]

    def _draw_targets(self, generator: np.random.Generator, size: int, update: int) -> Tensor:
        """Give the targets of every image, the highest first: (copies, batch) float32."""
        low, high = self.targets_at(update)
        if not self.is_range:
            return torch.full((1, size), low)
        between = torch.from_numpy(generator.uniform(low, high, size)).float()
        return torch.stack([torch.full((size,), high), torch.full((size,), low), between])


def _of_batch(values: Tensor, batch: Any) -> Tensor:
    """Give the values of a batch, given those of its images that pass the network; 0 for the others."""
    found = values.new_zeros(len(batch.sample_mask))
    return found.index_put((torch.arange(len(found), device=found.device)[batch.passing],), values)


class ClassificationObjective:
    """The loss of a classification with label smoothing, mixup and cutmix, and distillation of logits.

    Of a single class and of soft labels it is cross-entropy, or binary cross-entropy of each class (Wightman et al.,
    2021), averaged over the classes; of several labels one of timm's.

    Its metric is ``top1``: 100 where the best class is the label (the larger one, under mixup), otherwise 0. Several
    labels have none: their figures are those of all images at once.

    Args:
        num_classes: number of the network's classes.
        smoothing: 0..1; probability that is spread over all classes (Szegedy et al., 2016), or by which each of several
            labels moves towards 0.5.
        labeling: what the labels are, and the loss.
        mixup: timm's, or None. It mixes images with the labels that are smoothed already where those are several or
            soft (``multi_label``, without smoothing of its own).
        teacher: network whose logits are learned (Hinton et al., 2015), or None.
        distill_weight: share of the distillation in the loss, 0..1.
        temperature: of both softmaxes (or sigmoids); the distillation loss is multiplied by its square.
        student_norm: mean and std of the student's images, each (1, channels, 1, 1); the teacher gets its own.
        seed: of mixup.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        smoothing: float = 0.0,
        labeling: Labeling = SINGLE,
        mixup: Mixup | None = None,
        teacher: DistillationTeacher | None = None,
        distill_weight: float = 0.5,
        temperature: float = 1.0,
        student_norm: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        self.num_classes, self.smoothing, self.labeling, self.mixup = num_classes, smoothing, labeling, mixup
        self.teacher, self.distill_weight, self.temperature = teacher, distill_weight, temperature
        self.student_norm, self.seed = student_norm, seed
        several = labeling.task == "multilabel"
        self.criterion = loss_of_each(create_classification_loss(labeling.loss, multi_label=True)) if several else None

    def __call__(self, model: nn.Module, batch: Batch, *entropy: int, copies: int = 1) -> Losses:
        """Compute the losses of a batch on the model's device.

        Args:
            entropy: update, number of the micro-batch, process: what mixup draws depends on them and the seed.
            copies: how often every image passes, in one batch. The first learns from the teacher, the others from the
                first (Yu & Huang, 2019), and the loss is the mean over them. Metrics are those of the first.
        """
        images, target = batch.images, self._smooth(batch.labels)
        if self.mixup is not None and self.mixup.mixup_enabled:
            with seeded(self.seed, *entropy):
                images, target = self.mixup(images, target)
        elif self.labeling.loss == "bce" and target.ndim == 1:
            target = mixup_target(target, self.num_classes, smoothing=self.smoothing)
        passing = images if copies == 1 else torch.cat([images] * copies)
        logits, *others = model(passing).float().chunk(copies)
        loss = self._loss(logits, target)
        if self.teacher is not None:
            loss = torch.lerp(loss, self._distillation(logits, self._ask_teacher(images)), self.distill_weight)
        for of_copy in others:
            learned = self._distillation(of_copy, logits.detach())
            loss = loss + torch.lerp(self._loss(of_copy, target), learned, self.distill_weight)
        loss = loss / copies
        if self.labeling.task == "multilabel":
            return Losses(loss, {})
        label = target.argmax(1) if target.ndim == 2 else target
        return Losses(loss, {"top1": 100 * (logits.argmax(1) == label).float()})

    def _smooth(self, labels: Tensor) -> Tensor:
        """Smooth the labels of several classes and soft ones; those of one class are smoothed as they are mixed."""
        if labels.ndim == 1:
            return labels
        if self.labeling.task == "multilabel":
            return mixup_target(labels, self.num_classes, smoothing=self.smoothing, multi_label=True)
        return torch.lerp(labels, torch.full_like(labels, 1 / self.num_classes), self.smoothing)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.criterion is not None:
            return self.criterion(logits, target)
        if self.labeling.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        if target.ndim == 2:  # soft, or smoothed by mixup
            return -(target * F.log_softmax(logits, 1)).sum(1)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)

    @torch.no_grad()
    def _ask_teacher(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        return self.teacher(self.teacher.normalize_input(images, *(self.student_norm or (None, None)))).float()

    def _distillation(self, logits: Tensor, theirs: Tensor) -> Tensor:
        """Compute the divergence of the student's distribution (or each class's own) from the teacher's; (batch,)."""
        t = self.temperature
        if self.labeling.independent:
            shares = torch.sigmoid(theirs / t)
            both = [F.binary_cross_entropy_with_logits(x / t, shares, reduction="none") for x in (logits, theirs)]
            return (both[0] - both[1]).mean(1) * t * t
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(theirs / t, 1), reduction="none", log_target=True
        )
        return divergence.sum(1) * t * t


def loss_of_each(criterion: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Give the loss of every image of a batch, as if it were alone: timm's losses of several labels average them.

    Args:
        criterion: (logits, target) -> the mean over the batch.

    Returns:
        (batch, classes) logits and targets -> (batch,).
    """
    return torch.func.vmap(lambda logits, target: criterion(logits[None], target[None]))
