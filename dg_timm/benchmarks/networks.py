"""What benchmark.py runs: models that are built, verified, and then timed in turn."""

import gc
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median, quantiles
from typing import Any, Optional

import psutil
import timm
import torch
from torch import Tensor, nn

import dg_timm
from dg_timm.analysis.counting import relative_cost
from dg_timm.benchmarks import aggregation as benchmark_aggregation
from dg_timm.conversion.find import run_on_meta
from dg_timm.execution import aggregation
from dg_timm.graph.stage import DGStage, graph_stages, routers

Setting = dict[str, Any]


class Refused(Exception):
    """A model that does not predict what it must, or does not fit."""


@dataclass
class Contestant:
    spec: str
    model: nn.Module
    prepare: Callable[[], Optional[float]]  # before every round; returns the cost of its images
    milliseconds: list[float] = field(default_factory=list)  # of an image, by round
    costs: list[float] = field(default_factory=list)


def twin(spec: str) -> str:
    return spec.partition(":")[0].removeprefix("dg_")


def with_twins(specs: list[str]) -> list[str]:
    """The static twins of the dynamic networks, then all that was asked for; each once."""
    return list(dict.fromkeys([twin(spec) for spec in specs if spec.startswith("dg_")] + specs))


def measure(specs: list[str], setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """Rows of all models, the static ones first."""
    images = inputs(setting)
    contestants: dict[str, Contestant] = {}
    for spec in with_twins(specs):
        contestants[spec] = contestant(spec, setting, images, contestants)
    needed = sum(memory_needed(c.model, setting) for c in contestants.values())
    check_memory(" + ".join(contestants), needed, setting)
    step = step_of(setting, images)
    runners = {}
    for spec, entry in contestants.items():
        model: Any = torch.compile(entry.model) if setting["compile"] else entry.model
        as_timed(spec, model, entry.model, images, setting)
        runners[spec] = step(model)
        entry.prepare()
        for _ in range(3 if setting["compile"] else 2):  # warm up
            runners[spec]()
    copy = benchmark_aggregation.Copy(setting["device"])
    bandwidths = []
    for number in range(rounds):
        order = list(contestants.values())
        for entry in order if number % 2 == 0 else reversed(order):
            cost = entry.prepare()
            if cost is not None:
                entry.costs.append(cost)
            entry.milliseconds.append(1000 * seconds(runners[entry.spec], setting["device"]) / setting["batch_size"])
        bandwidths.append(copy.bytes / seconds(copy, setting["device"]))
    rows = [row(entry, contestants, setting, median(bandwidths)) for entry in contestants.values()]
    gc.collect()
    return [r for r in rows if r["model"].startswith("dg_") or r["model"] in specs]


def row(entry: Contestant, contestants: dict[str, Contestant], setting: Setting, bandwidth: float) -> dict[str, Any]:
    static = contestants.get(twin(entry.spec), next(iter(contestants.values())))
    ratios = [b / a for a, b in zip(static.milliseconds, entry.milliseconds, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    found: dict[str, Any] = {
        "model": entry.spec,
        **setting,
        "rounds": len(ratios),
        "static_rounds_ms": [round(value, 3) for value in static.milliseconds],
        "dynamic_rounds_ms": [round(value, 3) for value in entry.milliseconds],
        "static_ms": round(median(static.milliseconds), 2),
        "dynamic_ms": round(median(entry.milliseconds), 2),
        "ratio": round(median(ratios), 3),
        "low": round(low, 3),
        "high": round(high, 3),
        "copy_gb_s": round(bandwidth / 1e9, 1),
    }
    if entry.costs:
        found["cost"] = round(mean(entry.costs), 4)
    elif graph_stages(entry.model):
        traffic = aggregation_bytes(entry.model, setting) / bandwidth
        found["limit"] = round(1 + 1000 * traffic / median(static.milliseconds), 3)
    return found


def contestant(spec: str, setting: Setting, images: Tensor, others: dict[str, Contestant]) -> Contestant:
    """Build a model and see that it predicts what it must."""
    name, _, execution = spec.partition(":")
    layout = layout_of(setting)
    torch.manual_seed(0)
    if not name.startswith("dg_"):
        model = timm.create_model(name).to(setting["device"]).to(memory_format=layout)
        try:
            needed = memory_needed(model, setting)
        except (AssertionError, RuntimeError) as error:
            raise Refused(f"{spec} does not take images of {setting['image_size']} px: {error}") from error
        check_memory(spec, needed, setting)
        return Contestant(spec, model.train(setting["mode"] == "training"), lambda: None)
    static = others[twin(spec)].model
    weights = dict(state_dict=static.state_dict())
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=weights)
    model = model.to(setting["device"]).to(memory_format=layout).eval()
    check_memory(spec, memory_needed(model, setting), setting)
    prepare: Callable[[], Optional[float]] = lambda: None  # noqa: E731
    few = images[: min(len(images), 8)]
    with torch.no_grad():
        mode = static.training
        exact(spec, model(few), static.eval()(few), "as its static twin")
        static.train(mode)
        if setting["edges"] == "open" or setting["removed"] is not None:
            for router in routers(model).values():
                router.reset_parameters(identity=False)
        if setting["removed"] is not None:
            paths = {stage: ImposedPaths(graph) for stage, graph in graph_stages(model).items()}

            def prepare() -> Optional[float]:
                alphas = {stage: path.draw(len(images), setting["removed"], execution) for stage, path in paths.items()}
                if execution == "static":
                    dg_timm.set_execution(model, "static", {stage: alpha[0] != 0 for stage, alpha in alphas.items()})
                return relative_cost(model, alphas, tuple(images.shape[1:])).mean().item()  # type: ignore[arg-type]

            prepare()
            dg_timm.set_execution(model, "dense")
        with aggregation.path("reference"):
            wanted = model(images)
        if execution == "sparse":
            dg_timm.set_execution(model, execution)
        elif execution == "static" and setting["removed"] is None:
            dg_timm.set_execution(model, execution, complete_wiring(model))
        elif execution == "static":
            dg_timm.set_execution(model, execution, {stage: path.alpha[0] != 0 for stage, path in paths.items()})
        close(spec, model(images), wanted, "as the reference formulas")
    return Contestant(spec, model.train(setting["mode"] == "training"), prepare)


def as_timed(spec: str, timed: Any, plain: nn.Module, images: Tensor, setting: Setting) -> None:
    """Refuse what, as it is timed (compiled, autocast, training), is not what the reference formulas give eagerly.

    Gradients are compared as one vector, by its angle and length.
    """
    dtype, training = getattr(torch, setting["dtype"]), setting["mode"] == "training"
    if not (setting["compile"] or training or dtype != torch.float32):
        return  # seen already
    exactly = dtype == torch.float32

    def outcome(model: Any) -> list[Tensor]:
        torch.manual_seed(0)  # for dropout
        with torch.set_grad_enabled(training), torch.autocast(images.device.type, dtype, enabled=not exactly):
            out = model(images).float()
        if not training:
            return [out]
        nn.functional.cross_entropy(out, torch.arange(len(images), device=images.device)).backward()
        gradient = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None])
        plain.zero_grad()
        return [out.detach(), gradient]

    got = outcome(timed)
    with aggregation.path("reference"):
        wanted = outcome(plain)
    tolerance = 1e-3 if exactly else 0.1
    if not torch.allclose(got[0], wanted[0], tolerance, tolerance * float(wanted[0].abs().max())):
        raise Refused(
            f"{spec}, as it would be timed, does not predict what the reference formulas give; it is not timed"
        )
    if training:
        angle = nn.functional.cosine_similarity(got[1].double(), wanted[1].double(), 0).item()
        length = (got[1].norm() / wanted[1].norm()).item()
        if angle < 1 - tolerance or abs(length - 1) > tolerance:
            raise Refused(
                f"the gradient of {spec} is not that of the reference formulas (cosine {angle:.4f}, {length:.4f} of "
                "their length); it is not timed"
            )


def exact(spec: str, got: Tensor, wanted: Tensor, like: str) -> None:
    if not torch.equal(got, wanted):
        close(spec, got, wanted, like)
        worst = (got - wanted).abs().max().item()
        print(f"note: {spec} predicts {like}, but for rounding ({worst:.1e})", flush=True)


def close(spec: str, got: Tensor, wanted: Tensor, like: str) -> None:
    if got.shape != wanted.shape or not torch.allclose(got, wanted, 1e-3, 1e-3 * float(wanted.abs().max())):
        raise Refused(f"{spec} does not predict {like}; it is not timed")


def complete_wiring(model: nn.Module) -> dict[str, Tensor]:
    """Every edge of every stage, for static execution."""
    sizes = {name: len(stage.block_names) + 2 for name, stage in graph_stages(model).items()}
    return {name: torch.ones(n, n).triu(1).bool() for name, n in sizes.items()}


class ImposedPaths:
    """For every image a path past a random choice of a stage's blocks; the routers run, and are overruled."""

    def __init__(self, stage: DGStage) -> None:
        self.blocks = len(stage.block_names)
        self.alpha = torch.empty(0)
        self.piece = slice(0, 0)  # images of the batch that run now
        for node in range(self.blocks + 1):
            router = OverruledRouter(stage.get_submodule(f"router{node}"), self, node)
            setattr(stage, f"router{node}", router)

    def draw(self, batch: int, removed: float, execution: str) -> Tensor:
        """Adjacency matrices (batch, N, N); one for all images in static execution. Weights from 0.5 to 1.5."""
        self.alpha = torch.zeros(batch, self.blocks + 2, self.blocks + 2)
        for image in range(1 if execution == "static" else batch):
            gone = int(self.blocks * removed + float(torch.rand(())))  # the share on average, also of three blocks
            kept = sorted((torch.randperm(self.blocks)[gone:] + 1).tolist())
            for source, target in pairwise([0, *kept, self.blocks + 1]):
                self.alpha[image, source, target] = 0.5 + float(torch.rand(()))
        if execution == "static":
            self.alpha[:] = self.alpha[0].clone()
        self.piece = slice(0, 0)
        return self.alpha

    def row(self, node: int, images: int, like: Tensor) -> Tensor:
        if like.is_meta:  # only shapes are asked for
            return like
        if node == 0:  # a new part of the batch: a stage may run it in parts
            start = self.piece.stop % len(self.alpha)
            self.piece = slice(start, start + images)
        row = self.alpha[self.piece, node, node + 1 :]
        row = row if len(row) == images else row[row.any(1)]  # those whose node is not removed
        return row.to(like)


class OverruledRouter(nn.Module):
    def __init__(self, router: nn.Module, paths: ImposedPaths, node: int) -> None:
        super().__init__()
        self.router, self.paths, self.node, self.out_degree = router, paths, node, router.out_degree

    def forward(self, x: Tensor, reached: Optional[Tensor] = None) -> Tensor:
        return self.paths.row(self.node, len(x), self.router(x))


# --------------------------------------------------------------------------- one step


def layout_of(setting: Setting) -> torch.memory_format:
    return torch.channels_last if setting["layout"] == "channels_last" else torch.contiguous_format


def inputs(setting: Setting) -> Tensor:
    torch.manual_seed(1)
    size = (setting["batch_size"], 3, setting["image_size"], setting["image_size"])
    check_memory("the batch", 4 * math.prod(size), setting)
    return torch.randn(size).to(setting["device"], memory_format=layout_of(setting))


def step_of(setting: Setting, images: Tensor) -> Callable[[nn.Module], Callable[[], None]]:
    dtype = getattr(torch, setting["dtype"])
    autocast = torch.autocast(torch.device(setting["device"]).type, dtype, enabled=dtype != torch.float32)
    labels = torch.arange(len(images), device=images.device)

    def inference(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), autocast:
                model(images)

        return run

    def training(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def run() -> None:
            with autocast:
                loss = nn.functional.cross_entropy(model(images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return training if setting["mode"] == "training" else inference


def seconds(run: Callable[[], Any], device: str) -> float:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


# --------------------------------------------------------------------------- memory


def aggregation_bytes(model: nn.Module, setting: Setting) -> float:
    """The least that aggregation and routers must move for one image, every map read and written in memory."""
    reads = features = 0

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        nonlocal reads, features
        if isinstance(module, DGStage):
            reads += module.edge_reads(args[0][0].numel(), out[0].numel())
            features += (len(module.block_names) + 1) * out[0].numel()

    run_on_meta(model, count, (3, setting["image_size"], setting["image_size"]))
    forward = reads + 2 * features  # sums read and written, features pooled
    # once more to gather inputs again; gradients: of the targets, features, one written, and the pool's added to it
    backward = reads + features + reads + 4 * features
    size = 4 if setting["dtype"] == "float32" else 2
    return size * (forward + (backward if setting["mode"] == "training" else 0))


def memory_needed(model: nn.Module, setting: Setting) -> float:
    """A low estimate of what a step takes, in bytes: weights, and activations for one batch."""
    all_maps = widest = 0

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        nonlocal all_maps, widest
        if isinstance(out, Tensor) and isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            all_maps += out[0].numel()
            widest = max(widest, out[0].numel())

    run_on_meta(model, count, (3, setting["image_size"], setting["image_size"]))
    weights = sum(p.numel() for p in model.parameters())
    if setting["mode"] == "training":
        return 4 * (3 * weights + setting["batch_size"] * all_maps)
    return 4 * (weights + 2 * setting["batch_size"] * widest)


def check_memory(spec: str, needed: float, setting: Setting) -> None:
    device = torch.device(setting["device"])
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise Refused(
            f"{spec} does not fit: {setting['mode']} at batch size {setting['batch_size']} and {setting['image_size']} "
            f"px takes at least {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}. "
            "Use a smaller --batch-size or --image-size"
        )


def peak_memory(spec: str, setting: Setting) -> dict[str, float]:
    """Peak of this process (CPU) or of the allocator (CUDA) over three steps, MiB."""
    images = inputs(setting)
    name, _, execution = spec.partition(":")
    torch.manual_seed(0)
    model = timm.create_model(name).to(setting["device"]).to(memory_format=layout_of(setting))
    check_memory(spec, memory_needed(model, setting), setting)
    model.train(setting["mode"] == "training")
    if execution == "static":
        dg_timm.set_execution(model, execution, complete_wiring(model))
    elif execution:
        dg_timm.set_execution(model, execution)
    before = resident()
    compiled: Any = torch.compile(model) if setting["compile"] else model
    run = step_of(setting, images)(compiled)
    for _ in range(3):
        run()
    on_gpu = torch.device(setting["device"]).type == "cuda"
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resident()
    return {"before_mib": round(before, 1), "peak_mib": round(peak, 1)}


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
