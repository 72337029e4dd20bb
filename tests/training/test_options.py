"""Options: their types, their help, and that each of them reaches what it is for."""

import argparse
import re
import sys

import pytest
import torch
from timm.data.random_erasing import RandomErasing

from dg_timm.cli import calibration as calibrate
from dg_timm.cli import detect, train, validate
from dg_timm.graph.stage import graph_stages
from dg_timm.training.loop.distributed import InterruptFlag, make_accelerator
from dg_timm.training.loop.optimization import split_batch
from dg_timm.training.run import option_types
from dg_timm.training.run.classification import build_classification
from dg_timm.training.run.lifecycle import build_trainer


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("positive_int", {"1": 1, "12": 12}, {"0": "less than 1", "1.5": "'1.5' is not an integer"}),
        ("non_negative_int", {"0": 0}, {"-1": "less than 0", "x": "'x' is not an integer"}),
        ("fraction", {"0": 0.0, "1": 1.0}, {"1.1": "not between 0 and 1", "nan": "not between", "x": "not a number"}),
        ("non_negative_float", {"0": 0.0, "1e3": 1e3}, {"-1": "at least 0", "inf": "finite", "nan": "finite"}),
        ("positive_float", {"0.5": 0.5}, {"0": "0 is not above 0", "fast": "'fast' is not a number"}),
        ("finite_float", {"-2": -2.0}, {"inf": "not a finite number"}),
    ],
)
def test_types_say_in_words_what_is_allowed(kind, good, bad):
    read = getattr(option_types, kind)
    for text, value in good.items():
        assert read(text) == value
    for text, message in bad.items():
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
            read(text)


def test_key_values_are_yaml_scalars():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kw", nargs="+", action=option_types.KeyValues)
    found = parser.parse_args(["--kw", "a=1", "b=1e-8", "c=false", "d=x=y", "e=[1, 2]"]).kw
    assert found == {"a": 1, "b": 1e-8, "c": False, "d": "x=y", "e": [1, 2]}


@pytest.mark.parametrize("script", [train, validate, calibrate, detect], ids=lambda script: script.__name__)
def test_every_option_has_a_help_text_that_tells_its_default(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.parse()
    chunks = re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]
    options = [chunk for chunk in chunks if not chunk.startswith("-h, --help")]
    assert len(options) > 20
    for option in options:
        text = re.split(r"\n\n", option)[0]
        assert "(default: " in text or "by default" in text, option
        assert "(default: None)" not in text, option
        assert len(re.split(r"\s{2,}", text, maxsplit=1)[1].split()) >= 3, option


# --------------------------------------------------------------------------- what options do

BASE = ["--data", "digits", "--model", "dg_test_resnet", "--image-size", "32", "--workers", "0", "--batch-size", "32"]


def trainer_of(tmp_path, *options):
    args = train.parse([*BASE, "--output", str(tmp_path / "run"), *map(str, options)])
    accelerator = make_accelerator(mixed_precision=args.mixed_precision)
    split = split_batch(args.batch_size, accelerator.num_processes, args.micro_batch)
    task = build_classification(args, accelerator, split)
    return build_trainer(args, accelerator, InterruptFlag(), task, split), task


def groups(trainer, graph):
    return [group for group in trainer.learner.optimizer.param_groups if group["graph"] == graph]


def erasing(task):
    return [step for step in task.loader.images.transform.transforms if isinstance(step, RandomErasing)]


EFFECTS = {
    "--micro-batch 8": lambda t, k: (t.config.split.accumulation, t.loader.sampler.batch_size) == (4, 8),
    "--opt lamb": lambda t, k: type(t.learner.optimizer.optimizer).__name__ == "Lamb",
    "--opt-kwargs nesterov=false": lambda t, k: not t.learner.optimizer.param_groups[0]["nesterov"],
    "--lr 0.5 --lr-base-batch 64": lambda t, k: t.learner.rate == 0.25,
    "--layer-decay 0.5": lambda t, k: len({group["lr_scale"] for group in groups(t, False)}) > 3,
    "--graph-lr-scale 0.25": lambda t, k: {group["lr_scale"] for group in groups(t, True)} == {0.25},
    "--weight-decay 0.125": lambda t, k: {g["weight_decay"] for g in groups(t, False)} == {0.0, 0.125},
    "--momentum 0.5": lambda t, k: t.learner.optimizer.param_groups[0]["momentum"] == 0.5,
    "--sched multistep": lambda t, k: type(t.learner.schedule).__name__ == "MultiStepLRScheduler",
    "--warmup-epochs 1 --warmup-lr 0.001": lambda t, k: t.learner.rate == pytest.approx(0.001),
    "--clip-grad 2 --clip-mode agc": lambda t, k: (t.config.clip_grad, t.config.clip_mode) == (2.0, "agc"),
    "--save-every 3 --keep 7": lambda t, k: (t.config.save_every, t.checkpoints.keep) == (3, 7),
    "--patience 4 --log-every 5": lambda t, k: (t.config.patience, t.config.log_every) == (4, 5),
    "--updates 90": lambda t, k: (t.config.updates, t.config.epochs) == (90, 3),
    "--ema-decay 0.75": lambda t, k: t.learner.ema.decay == 0.75,
    "--channels-last": lambda t, k: (
        t.config.channels_last and t.learner.network.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    ),
    "--grad-checkpointing": lambda t, k: all(s.grad_checkpointing for s in graph_stages(t.learner.network).values()),
    "--drop 0.25": lambda t, k: t.learner.network.drop_rate == 0.25,
    "--mixup 0.3": lambda t, k: k.objective.mixup.mixup_alpha == 0.3,
    "--cutmix 1 --mixup-prob 0.5": lambda t, k: k.objective.mixup.mix_prob == 0.5,
    "--cutmix 0.7": lambda t, k: k.objective.mixup.cutmix_alpha == 0.7,
    "--smoothing 0.2": lambda t, k: k.objective.smoothing == 0.2,
    "--size-schedule 32 48": lambda t, k: t.loader.images.transform.sizes == [32, 48],
    "--loss bce": lambda t, k: k.objective.labeling.loss == "bce",
    "--auto-augment rand-m5-n2": lambda t, k: "RandAugment" in str(k.loader.images.transform),
    "--reprob 0.3": lambda t, k: [step.probability for step in erasing(k)] == [0.3],
    "--no-augment": lambda t, k: (k.loader.images.seed, str(k.loader.images.transform)) == (
        None, str(k.val_loader.images.transform)
    ),
    "--aug-repeats 2": lambda t, k: (k.loader.sampler.repeats, k.val_loader.sampler.repeats) == (2, 1),
    "--seed 5": lambda t, k: (k.loader.sampler.seed, k.objective.seed) == (5, 5),
    "--train-limit 64 --val-limit 40": lambda t, k: (k.loader.sampler.size, k.val_loader.sampler.size) == (64, 40),
    "--val-batch-size 24": lambda t, k: k.val_loader.sampler.batch_size == 24,
    "--on-bad-image skip": lambda t, k: (k.loader.on_bad_image, k.val_loader.on_bad_image) == ("skip", "skip"),
    "--freeze backbone": lambda t, k: [n for n, p in t.learner.network.named_parameters() if p.requires_grad] == [
        "fc.weight", "fc.bias"
    ],
    "--freeze-norm": lambda t, k: t.config.fixed_norms,
    "--model-kwargs edge_scale=false block_shortcut=false": lambda t, k: not any(
        "scale" in name for name in t.learner.network.state_dict()
    ),
    "--num-classes 12": lambda t, k: t.learner.network.num_classes == 12,
    "--target-cost 0.5 --no-cascade --cost-ramp 0.5": lambda t, k: (k.objective.targets, k.objective.ramp) == (
        (0.5, 0.5), 132
    ),
    "--target-cost 0.5 --cascade": lambda t, k: k.objective.targets == (
        round((k.objective.expected.minimum + 0.5) / 2, 3), 1.0
    ),
    "--target-cost 0.5 0.9 --cost-noise 2 --cost-quiet 1": lambda t, k: (
        k.objective.noise_at(0) == 2.0 and k.objective.noise_at(263) > 0 == k.objective.noise_at(264)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def by_default(tmp_path_factory):
    return trainer_of(tmp_path_factory.mktemp("default"))


@pytest.mark.parametrize("options", EFFECTS)
def test_no_option_is_ignored(tmp_path, by_default, options):
    """Without it, what is looked at is another way: a check that always holds would prove nothing."""
    check = EFFECTS[options]
    assert check(*trainer_of(tmp_path, *options.split()))
    try:
        holds_anyway = bool(check(*by_default))
    except AttributeError:
        holds_anyway = False
    assert not holds_anyway
    assert not (tmp_path / "run").exists()


def test_a_new_classifier_is_scaled_and_has_no_bias(tmp_path):
    whole, _ = trainer_of(tmp_path)
    scaled, _ = trainer_of(tmp_path, "--head-init-scale", 0.1)
    before, after = whole.learner.network.fc, scaled.learner.network.fc
    assert torch.allclose(after.weight, 0.1 * before.weight)
    assert after.bias.abs().max() == 0


def test_mixing_ends_at_its_epoch(tmp_path):
    _, task = trainer_of(tmp_path, "--mixup", 0.2, "--mixup-off-epoch", 2)
    enabled = []
    for epoch in range(4):
        task.on_epoch(epoch)
        enabled.append(task.objective.mixup.mixup_enabled)
    assert enabled == [True, True, False, False]


def test_drop_path_reaches_the_blocks(tmp_path):
    def rates(*options):
        network = trainer_of(tmp_path, *options)[0].learner.network
        return [module.drop_prob for module in network.modules() if type(module).__name__ == "DropPath"]

    assert not any(rates())
    assert max(rates("--drop-path", 0.1)) == pytest.approx(0.1)
