"""Train a dynamic graph network and its static network on real images, compare, save, load back, and draw the wiring.

    python train_scripts/quickstart.py                                   # scikit-learn's handwritten digits
    python train_scripts/quickstart.py --data path/to/folder --image-size 96 --epochs 10
    python train_scripts/quickstart.py --data uoft-cs/cifar10 --image-size 32

On several devices or processes: `accelerate launch train_scripts/quickstart.py ...`, or on CPUs
`torchrun --nproc_per_node 2 train_scripts/quickstart.py ...`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

import dg_timm
from dg_timm._command_line import CommandParser
from dg_timm._errors import BadState, BadValue
from dg_timm._hardware import describe_hardware
from dg_timm.cli.errors import cli_errors
from dg_timm.training.data.images import Collate, Images
from dg_timm.training.data.loader import Loader, sample_images
from dg_timm.training.data.samplers import SINGLE, MapSampler, Rank
from dg_timm.training.data.sources import Splits, load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.run.option_types import (
    fraction,
    non_negative_int,
    positive_float,
    positive_int,
)
from dg_timm.training.run.timing import time_ratios

_ROUNDS = 15  # of timing
_TIMED_IMAGES, _SAVED_IMAGES, _DRAWN_IMAGES = 64, 4, 6


class Trained(NamedTuple):
    """A network after its training.

    Attributes:
        model: the network, in eval mode.
        accuracy: top-1 on the test split, in percent.
        seconds: that the training took.
    """

    model: nn.Module
    accuracy: float
    seconds: float


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line (by default that of this process)."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data", default="digits", help="data set: digits, an image folder, or a data set on the Hub")
    parser.add_argument("--model", default="dg_regnetx_002", help="dg_* model; the static network is trained beside it")
    parser.add_argument("--image-size", type=positive_int, default=32, help="height and width of the images in pixels")
    parser.add_argument("--epochs", type=positive_int, default=14, help="number of epochs")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="number of images for each process")
    parser.add_argument(
        "--lr", type=positive_float, default=4e-3, help="learning rate of AdamW for --batch-size images"
    )
    parser.add_argument(
        "--hflip", type=fraction, help="probability of flipping left and right; by default 0 for digits, otherwise 0.5"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="seed of weights, order and augmentation")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="folder of the results")
    args = parser.parse_args(argv)
    if not timm.is_model(args.model) or not args.model.startswith("dg_"):
        raise BadValue(f"--model {args.model} is not in the zoo; choose from {', '.join(timm.list_models('dg_*'))}")
    if args.hflip is None:
        args.hflip = 0.0 if args.data == "digits" else 0.5
    return args


def train_network(
    name: str, splits: Splits, data_config: dict[str, Any], args: argparse.Namespace, accelerator: Accelerator
) -> Trained:
    """Train one network from scratch and test it."""
    set_seed(args.seed)
    rows = len(splits.train.rows)
    batch_size = min(args.batch_size, rows // accelerator.num_processes)
    share = Rank(accelerator.process_index, accelerator.num_processes)
    loader = _training_loader(splits, data_config, args, batch_size, share)
    updates = rows // (batch_size * accelerator.num_processes)
    model = timm.create_model(name, num_classes=len(splits.label_names)).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05, foreach=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=args.epochs,
        warmup_epochs=min(2, args.epochs - 1),
        warmup_lr=args.lr / 100,
        updates_per_epoch=updates,
        step_on_epochs=False,
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    start = time.perf_counter()
    with tqdm(total=args.epochs * updates, desc=name, unit="step", mininterval=1) as bar:
        model.train()
        for epoch in range(args.epochs):
            for batch in loader.epoch(epoch):
                batch = batch.move_to(accelerator.device, torch.channels_last)
                loss = loss_fn(model(batch.images), batch.labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                scheduler.step_update(bar.n)
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", refresh=False)
    seconds = time.perf_counter() - start
    trained = accelerator.unwrap_model(model).eval()
    tests = held_out_loader(splits, data_config, batch_size, share)
    result = evaluate_model(trained, tests.epoch(0), accelerator, channels_last=True)
    return Trained(trained, result.top1, seconds)


def _training_loader(
    splits: Splits, data_config: dict[str, Any], args: argparse.Namespace, batch_size: int, share: Rank
) -> Loader:
    augment = create_transform(
        **data_config, is_training=True, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=args.hflip, color_jitter=0.0
    )
    images = Images(splits.train, augment, splits.label_names, seed=args.seed)
    order = MapSampler(
        len(splits.train.rows),
        batch_size,
        share,
        shuffle=True,
        seed=args.seed,
        multiple=batch_size * share.world_size,
    )
    return Loader(order, images, Collate(batch_size, data_config["input_size"]))


def held_out_loader(splits: Splits, data_config: dict[str, Any], batch_size: int = 64, share: Rank = SINGLE) -> Loader:
    """Make the loader of this process's part of the test images."""
    images = Images(splits.test, create_transform(**data_config), splits.label_names)
    order = MapSampler(len(splits.test.rows), batch_size, share)
    return Loader(order, images, Collate(batch_size, data_config["input_size"]))


def compare(
    names: Sequence[str], static: Trained, dynamic: Trained, images: Tensor, data_config: dict[str, Any]
) -> list[tuple[str, ...]]:
    """Make the rows of the table: a title, then what is known of the static and of the dynamic network."""

    def to_the_end(model: nn.Module) -> Callable[[Tensor], float]:
        return lambda batch: float(model(batch).sum().item())  # .item() waits for the device

    both = (static, dynamic)
    (timing,) = time_ratios(to_the_end(static.model), [to_the_end(dynamic.model)], images, len(images), _ROUNDS)
    counts = [dg_timm.complexity(trained.model, data_config["input_size"]) for trained in both]
    return [
        ("", *names),
        ("parameters (M)", *(f"{count.params / 1e6:.3f}" for count in counts)),
        ("multiply-adds (M)", *(f"{count.multiply_adds / 1e6:.2f}" for count in counts)),
        ("test accuracy (%)", *(f"{trained.accuracy:.2f}" for trained in both)),
        ("training (s)", *(f"{trained.seconds:.1f}" for trained in both)),
        ("inference (ms/image)", f"{timing.static_ms:.2f}", f"{timing.ms:.2f}"),
    ]


def make_card(static: Trained, dynamic: Trained, splits: Splits, args: argparse.Namespace) -> dg_timm.Card:
    """Write what the card says of the training, and only what this run measured."""
    local = Path(args.data)
    measured = dg_timm.Accuracy(
        dataset=local.name if local.exists() else args.data,
        value=dynamic.accuracy,
        static=static.accuracy,
        images=splits.test.size,
        spread="one seed",
        hub_dataset=args.data if "/" in args.data and not local.exists() else None,
    )
    return dg_timm.Card(
        datasets=[measured.hub_dataset] if measured.hub_dataset else [],
        made={
            "Training": f"from scratch, {args.epochs} epochs of AdamW, by `train_scripts/quickstart.py`; a smoke test",
            "Hardware": describe_hardware(),
            "Seed": str(args.seed),
        },
        accuracies=[measured],
    )


@torch.inference_mode()
def check_saved(folder: Path, model: nn.Module, images: Tensor) -> None:
    """Raise BadState if the network that is loaded from a folder predicts something else than the one saved there."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # the layout decides how convolutions round
    loaded = loaded.to(images.device).to(memory_format=torch.channels_last)
    if not torch.equal(loaded(images), model(images)):
        raise BadState(f"the network loaded from {folder} predicts something else than the one saved there")
    print(f"saved {folder}; timm.create_model('local-dir:{folder}', pretrained=True) predicts the same")


@cli_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart; return the exit status."""
    args = parse(argv)
    splits = load_splits(args.data)
    names = splits.label_names
    print(f"{args.data}: {splits.train.size} images to train on, {splits.test.size} to test, {len(names)} classes")
    size = (3, args.image_size, args.image_size)
    mean, std = (timm.get_pretrained_cfg_value(args.model, key) for key in ("mean", "std"))
    data_config: dict[str, Any] = dict(input_size=size, mean=mean, std=std, interpolation="bilinear", crop_pct=1.0)
    accelerator = make_accelerator()
    models = (args.model.removeprefix("dg_"), args.model)
    static, dynamic = (train_network(name, splits, data_config, args, accelerator) for name in models)
    if not accelerator.is_main_process:
        return 0

    images = sample_images(held_out_loader(splits, data_config), _TIMED_IMAGES).to(accelerator.device)
    print()
    for title, left, right in compare(models, static, dynamic, images, data_config):
        print(f"{title:24}{left:>18}{right:>18}")
    threads = torch.get_num_threads()
    print(f"(one seed, {splits.test.size} test images, {threads} threads: a first look, not a comparison)\n")

    folder = dg_timm.save_pretrained(
        dynamic.model,
        args.output / "model",
        label_names=names,
        data_config=data_config,
        card=make_card(static, dynamic, splits, args),
        images=images[:_SAVED_IMAGES],
        overwrite=True,
    )
    check_saved(folder, dynamic.model, images)
    shown = images[:_DRAWN_IMAGES]
    with torch.inference_mode():
        titles = [f"'{names[k]}'" for k in dynamic.model(shown).argmax(1).tolist()]
    adjacency = dg_timm.adjacency(dynamic.model, shown)
    picture = dg_timm.draw_wiring(adjacency, args.output / "wiring.png", images=shown, titles=titles)
    print(f"drew the wiring of {len(shown)} test images: {picture}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
