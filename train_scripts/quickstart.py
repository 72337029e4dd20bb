"""Train a dynamic graph network and its static twin on real images, compare, save, load back, and draw the wiring.

    python train_scripts/quickstart.py                                   # scikit-learn's handwritten digits
    python train_scripts/quickstart.py --data path/to/folder --image-size 96 --epochs 10
    python train_scripts/quickstart.py --data uoft-cs/cifar10 --image-size 32

Any process or device that Accelerate knows: `accelerate launch train_scripts/quickstart.py ...`.
"""

import argparse
import time
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

import dg_timm
from dg_timm.data import Splits, TransformedImages, load_splits


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, an image folder, or a data set on the Hub")
    parser.add_argument("--model", default="dg_regnetx_002", help="a dg_* model; its static twin is trained beside it")
    parser.add_argument("--image-size", type=int, default=32, help="pixels; images are resized to it")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64, help="images a process")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW, for --batch-size images")
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


def train(name: str, splits: Splits, data_config: dict, args: argparse.Namespace) -> tuple[nn.Module, float, float]:
    """Train one network from scratch; (model, top-1 on the test split in percent, training seconds)."""
    set_seed(args.seed)
    accelerator = Accelerator()
    hflip = args.hflip if args.hflip is not None else 0.5 * (args.data != "digits")
    augment = timm.data.create_transform(
        **data_config, is_training=True, scale=(0.6, 1.0), ratio=(0.9, 1.1), hflip=hflip, color_jitter=None
    )
    train_loader = DataLoader(
        TransformedImages(splits.train, augment), args.batch_size, shuffle=True, drop_last=len(splits.train) > args.batch_size
    )
    model = timm.create_model(name, num_classes=len(splits.label_names))
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=args.epochs,
        warmup_epochs=min(2, args.epochs - 1),
        warmup_lr=args.lr / 100,
        updates_per_epoch=len(train_loader),
        step_on_epochs=False,
    )
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)

    start = time.perf_counter()
    bar = tqdm(total=args.epochs * len(train_loader), desc=name, unit="step")
    for update in range(args.epochs * len(train_loader)):
        if update % len(train_loader) == 0:
            model.train()
            batches = iter(train_loader)
        images, labels = next(batches)
        loss = loss_fn(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step_update(update + 1)
        bar.update()
        bar.set_postfix(epoch=update // len(train_loader) + 1, loss=f"{loss.item():.3f}", refresh=False)
    bar.close()
    seconds = time.perf_counter() - start
    accuracy = evaluate(model, test_loader(splits, data_config, args), accelerator)
    return accelerator.unwrap_model(model), accuracy, seconds


def test_loader(splits: Splits, data_config: dict, args: argparse.Namespace) -> DataLoader:
    return DataLoader(TransformedImages(splits.test, timm.data.create_transform(**data_config)), args.batch_size)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """Exact top-1 in percent, under any number of processes."""
    model.eval()
    correct = [
        accelerator.gather_for_metrics((model(images).argmax(1) == labels))
        for images, labels in accelerator.prepare_data_loader(loader)
    ]
    return 100 * torch.cat(correct).float().mean().item()


@torch.inference_mode()
def milliseconds(models: dict[str, nn.Module], images: torch.Tensor, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds an image of every model in eval, measured in turn (A B A B ...) after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            model(images).sum().item()  # .item() waits for the device
            times[name].append(1000 * (time.perf_counter() - start) / len(images))
    return {name: sorted(each[2:])[rounds // 2] for name, each in times.items()}


def main() -> None:
    args = parse()
    splits = load_splits(args.data, seed=args.seed)
    static_name = args.model.removeprefix("dg_")
    print(f"{args.data}: {len(splits.train)} images to train on, {len(splits.test)} to test, {len(splits.label_names)} classes")
    cfg = timm.get_pretrained_cfg(args.model)
    size = (3, args.image_size, args.image_size)
    data_config = dict(input_size=size, mean=cfg.mean, std=cfg.std, interpolation="bilinear", crop_pct=1.0)

    static, static_accuracy, static_seconds = train(static_name, splits, data_config, args)
    model, accuracy, seconds = train(args.model, splits, data_config, args)
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        return

    batch = torch.stack([image for image, _ in (TransformedImages(splits.test, timm.data.create_transform(**data_config))[i] for i in range(min(64, len(splits.test))))])
    batch = batch.to(accelerator.device)
    ms = milliseconds({"static": static.eval(), "dynamic": model.eval()}, batch)
    print(f"\n{'':24}{static_name:>18}{args.model:>18}")
    counts = [dg_timm.complexity(m, size) for m in (static, model)]
    rows = (
        ("parameters (M)", *(f"{c.params / 1e6:.3f}" for c in counts)),
        ("multiply-adds (M)", *(f"{c.multiply_adds / 1e6:.2f}" for c in counts)),
        ("test accuracy (%)", f"{static_accuracy:.2f}", f"{accuracy:.2f}"),
        ("training (s)", f"{static_seconds:.1f}", f"{seconds:.1f}"),
        ("inference (ms/image)", f"{ms['static']:.2f}", f"{ms['dynamic']:.2f}"),
    )
    for row in rows:
        print(f"{row[0]:24}{row[1]:>18}{row[2]:>18}")
    print(f"(one seed, {len(splits.test)} test images, {torch.get_num_threads()} threads: a first look, no comparison)\n")

    folder = dg_timm.save_pretrained(
        model,
        args.output / "model",
        label_names=splits.label_names,
        data_config=data_config,
        dataset=args.data,
        accuracy=accuracy,
        training=f"from scratch, {args.epochs} epochs of AdamW, by train_scripts/quickstart.py (seed {args.seed}).",
        overwrite=True,
    )
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(accelerator.device)
    with torch.inference_mode():
        if not torch.equal(again(batch), model(batch)):
            raise RuntimeError(f"the network loaded from {folder} predicts something else than the one saved there")
    print(f"saved {folder}; loaded back by timm.create_model('local-dir:{folder}', pretrained=True), predictions equal")

    shown = batch[:6]
    predicted = [splits.label_names[k] for k in model(shown).argmax(1).tolist()]
    picture = dg_timm.draw_wiring(
        dg_timm.adjacency(model, shown), args.output / "wiring.png", images=shown, titles=[f"'{p}'" for p in predicted]
    )
    print(f"drew the wiring of {len(shown)} test images: {picture}")


if __name__ == "__main__":
    main()
