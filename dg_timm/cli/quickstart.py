"""Train a dynamic graph network and its static twin on real images, compare, save, load back, and draw the wiring.

    python train_scripts/quickstart.py                                   # scikit-learn's handwritten digits
    python train_scripts/quickstart.py --data path/to/folder --image-size 96 --epochs 10
    python train_scripts/quickstart.py --data uoft-cs/cifar10 --image-size 32

On several devices or processes: `accelerate launch train_scripts/quickstart.py ...`, or on CPUs
`torchrun --nproc_per_node 2 train_scripts/quickstart.py ...`.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate.utils import set_seed, tqdm
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

import dg_timm
from dg_timm.training.data.loading import ONE, Collate, Images, IndexOrder, Loader, Share, sample_images
from dg_timm.training.data.sources import Splits, load_splits
from dg_timm.training.loop.distributed import make_accelerator
from dg_timm.training.loop.evaluation import evaluate_model
from dg_timm.training.run.report import hardware


class Trained(NamedTuple):
    model: nn.Module
    accuracy: float  # top-1 on the test split, percent
    seconds: float  # of training


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, an image folder, or a data set on the Hub")
    parser.add_argument("--model", default="dg_regnetx_002", help="a dg_* model; its static twin is trained beside it")
    parser.add_argument("--image-size", type=int, default=32, help="pixels; images are resized to it")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--lr", type=float, default=4e-3, help="of AdamW, for --batch-size images")
    parser.add_argument("--hflip", type=float, help="probability of mirroring; 0 for digits, otherwise 0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="folder of the results")
    args = parser.parse_args()
    if not timm.is_model(args.model) or not args.model.startswith("dg_"):
        parser.error(f"--model {args.model} is not in the zoo; choose from {', '.join(timm.list_models('dg_*'))}")
    for name in ("image_size", "epochs", "batch_size", "lr"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    return args


def train(name: str, splits: Splits, data_config: dict[str, Any], args: argparse.Namespace) -> Trained:
    """Train one network from scratch and test it."""
    set_seed(args.seed)
    accelerator = make_accelerator()
    hflip = args.hflip if args.hflip is not None else 0.5 * (args.data != "digits")
    augment = create_transform(
        **data_config, is_training=True, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=hflip, color_jitter=0.0
    )
    rows = len(splits.train.rows)
    batch_size = min(args.batch_size, rows // accelerator.num_processes)
    share = Share(accelerator.process_index, accelerator.num_processes)
    together = batch_size * accelerator.num_processes
    order = IndexOrder(rows, batch_size, share, shuffle=True, seed=args.seed, multiple=together)
    images = Images(splits.train, augment, splits.label_names, seed=args.seed)
    loader = Loader(order, images, Collate(batch_size, data_config["input_size"]))
    updates = rows // together
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
                batch = batch.on(accelerator.device, torch.channels_last)
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
    figures = evaluate_model(trained, tests.epoch(0), accelerator, channels_last=True)
    return Trained(trained, figures.top1, seconds)


def held_out_loader(splits: Splits, data_config: dict[str, Any], batch_size: int = 64, share: Share = ONE) -> Loader:
    images = Images(splits.test, create_transform(**data_config), splits.label_names)
    order = IndexOrder(len(splits.test.rows), batch_size, share)
    return Loader(order, images, Collate(batch_size, data_config["input_size"]))


@torch.inference_mode()
def milliseconds(models: dict[str, nn.Module], images: Tensor, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds an image of every model, measured in turn (A B A B ...) after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(images).sum().item()  # .item() waits for the device
            times[name].append(1000 * (time.perf_counter() - start) / len(images))
    return {name: sorted(each[2:])[rounds // 2] for name, each in times.items()}


def describe(static: Trained, dynamic: Trained, splits: Splits, args: argparse.Namespace) -> dg_timm.Card:
    """What the card says of the training, and only what this run measured."""
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
            "Hardware": hardware(),
            "Seed": str(args.seed),
        },
        accuracies=[measured],
    )


def main() -> None:
    args = parse()
    splits = load_splits(args.data)
    classes = len(splits.label_names)
    print(f"{args.data}: {splits.train.size} images to train on, {splits.test.size} to test, {classes} classes")
    size = (3, args.image_size, args.image_size)
    mean, std = (timm.get_pretrained_cfg_value(args.model, key) for key in ("mean", "std"))
    data_config: dict[str, Any] = dict(input_size=size, mean=mean, std=std, interpolation="bilinear", crop_pct=1.0)

    twins = (args.model.removeprefix("dg_"), args.model)
    static, dynamic = (train(name, splits, data_config, args) for name in twins)
    accelerator = make_accelerator()
    if not accelerator.is_main_process:
        return

    images = sample_images(held_out_loader(splits, data_config), 64).to(accelerator.device)
    ms = milliseconds({"static": static.model, "dynamic": dynamic.model}, images)
    counts = [dg_timm.analysis.counting(trained.model, size) for trained in (static, dynamic)]
    table = (
        ("", *twins),
        ("parameters (M)", *(f"{count.params / 1e6:.3f}" for count in counts)),
        ("multiply-adds (M)", *(f"{count.multiply_adds / 1e6:.2f}" for count in counts)),
        ("test accuracy (%)", *(f"{trained.accuracy:.2f}" for trained in (static, dynamic))),
        ("training (s)", *(f"{trained.seconds:.1f}" for trained in (static, dynamic))),
        ("inference (ms/image)", f"{ms['static']:.2f}", f"{ms['dynamic']:.2f}"),
    )
    print()
    for title, left, right in table:
        print(f"{title:24}{left:>18}{right:>18}")
    threads = torch.get_num_threads()
    print(f"(one seed, {splits.test.size} test images, {threads} threads: a first look, not a comparison)\n")

    folder = dg_timm.save_pretrained(
        dynamic.model,
        args.output / "model",
        label_names=splits.label_names,
        data_config=data_config,
        card=describe(static, dynamic, splits, args),
        images=images[:4],
        overwrite=True,
    )
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    again = again.to(accelerator.device).to(
        memory_format=torch.channels_last
    )  # the layout decides how convolutions round
    with torch.inference_mode():
        if not torch.equal(again(images), dynamic.model(images)):
            raise RuntimeError(f"the network loaded from {folder} predicts something else than the one saved there")
    print(f"saved {folder}; timm.create_model('local-dir:{folder}', pretrained=True) predicts the same")

    shown = images[:6]
    titles = [f"'{splits.label_names[k]}'" for k in dynamic.model(shown).argmax(1).tolist()]
    adjacency = dg_timm.adjacency(dynamic.model, shown)
    picture = dg_timm.draw_wiring(adjacency, args.output / "wiring.png", images=shown, titles=titles)
    print(f"drew the wiring of {len(shown)} test images: {picture}")
