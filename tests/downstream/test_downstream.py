"""Libraries that take timm models take these: each is run for real (extra ``downstream``)."""

import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm.graph.stage import graph_stages
from dg_timm.training.run import networks
from tests.helpers.imports import quietly_import
from tests.helpers.networks import FAMILIES, QUICK_FAMILIES, static_and_dynamic
from tests.helpers.publishing import small
from tests.helpers.scripts import python

LABELS = [f"label {k}" for k in range(10)]


def images(batch=2, size=64):
    return torch.linspace(-1, 1, batch * 3 * size * size).view(batch, 3, size, size)


# --------------------------------------------------------------------------- transformers


@pytest.fixture
def transformers():
    library = quietly_import("transformers")
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library


def load(transformers, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, on lazy imports
        return transformers.AutoModelForImageClassification.from_pretrained(*args, **kwargs)


def same_network(theirs, ours):
    """Every tensor to the bit; logits to rounding: mapped files lie otherwise in memory, and kernels round by that."""
    found = theirs.timm_model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in ours.state_dict().items())
    with torch.inference_mode():
        wanted = ours(images())
        torch.testing.assert_close(theirs(images()).logits, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", QUICK_FAMILIES)
def test_transformers_reads_what_we_publish(name, transformers, hub):
    model = small(name)
    dg_timm.push_to_hub(model, "lab/net", label_names=LABELS)
    theirs = load(transformers, "lab/net").eval()
    same_network(theirs, model)
    assert list(theirs.config.id2label.values()) == LABELS
    assert type(theirs.timm_model) is type(model)


def test_transformers_reads_shards(transformers, tmp_path):
    model = small()
    folder = dg_timm.save_pretrained(model, tmp_path / "net", max_shard_size="3MB")
    same_network(load(transformers, folder).eval(), model)


def test_we_read_what_transformers_saves(transformers, tmp_path):
    """Its config.json has no model_args, and fields that timm does not know; of a static network and of ours."""
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=3)
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path / "static")
    same_network(theirs, networks.create(str(tmp_path / "static")).eval())
    folder = dg_timm.save_pretrained(small(), tmp_path / "net", label_names=LABELS)
    theirs = load(transformers, folder).eval()
    theirs.save_pretrained(tmp_path / "dynamic")
    same_network(theirs, networks.create(str(tmp_path / "dynamic")).eval())


def test_transformers_pipeline(transformers, tmp_path):
    from PIL import Image

    folder = dg_timm.save_pretrained(small(), tmp_path / "net", label_names=LABELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classify = transformers.pipeline("image-classification", model=str(folder))
        (first, *_) = classify(Image.fromarray(np.full((80, 90, 3), 100, np.uint8)), top_k=10)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.inference_mode():
        probabilities = model(transform(Image.fromarray(np.full((80, 90, 3), 100, np.uint8)))[None]).softmax(1)[0]
    assert first["label"] == LABELS[probabilities.argmax()]
    assert first["score"] == pytest.approx(probabilities.max().item(), abs=1e-5)


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_regnetx_002"])
def test_transformers_backbone_with_hidden_states(name, transformers):
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=(1, 2, 3, 4), use_pretrained_backbone=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = transformers.AutoBackbone.from_config(config).eval()
    with torch.inference_mode():
        out = backbone(images(), output_hidden_states=True)
    assert [m.shape[1] for m in out.feature_maps] == backbone.channels
    assert len(out.hidden_states) == 5
    assert graph_stages(backbone)


def test_transformers_trainer(transformers, tmp_path):
    """A few steps; routers, scales and thresholds move, and what it saves comes back."""
    folder = dg_timm.save_pretrained(small(), tmp_path / "net", label_names=LABELS)
    model = load(transformers, folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rows = [{"pixel_values": images(1)[0] + 0.1 * k, "labels": k % 10} for k in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        assert trainer.train().global_step == 4
        trainer.save_model(str(tmp_path / "saved"))
    moved = {key.rpartition(".")[2] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"weight", "bias", "scale", "threshold"} <= moved
    again = load(transformers, tmp_path / "saved").eval()
    same_network(again, model.eval().timm_model)


# --------------------------------------------------------------------------- segmentation, detection


@pytest.mark.parametrize("encoder", ["tu-dg_resnet18", "tu-dg_regnety_002", "tu-dg_mobilenetv2_050"])
@pytest.mark.parametrize("decoder", ["Unet", "FPN", "DeepLabV3Plus"])
def test_segmentation_models_pytorch(encoder, decoder):
    smp = quietly_import("segmentation_models_pytorch")
    options = {"encoder_output_stride": 16} if decoder == "DeepLabV3Plus" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=3, **options)
    assert graph_stages(model)
    out = model(images())
    assert out.shape == (2, 3, 64, 64)
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "fc" in name or "scale" in name)
    if options:
        assert model.encoder(images())[-1].shape[-1] == 64 // 16


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_regnetx_002", "dg_tf_efficientnet_lite0"])
def test_torchvision_detection(name):
    """A feature pyramid over features_only: a training step, and detections."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
            self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32)
            self.out_channels = 32

        def forward(self, x):
            return self.fpn(OrderedDict((str(k), m) for k, m in enumerate(self.body(x))))

    sizes = AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 5, 2)
    model = FasterRCNN(Pyramid(), 3, rpn_anchor_generator=sizes, box_roi_pool=pool, min_size=64, max_size=96)
    target = [{"boxes": torch.tensor([[4.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    losses = model(list(images()), target)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert set(model.eval()(list(images()))[0]) == {"boxes", "labels", "scores"}


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_resnet50"])
def test_torchvision_backbone_with_fpn(name):
    """BackboneWithFPN rebuilds a classifier from its children, by name."""
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    model = timm.create_model(name).eval()
    channels = [info["num_chs"] for info in model.feature_info[1:]]
    layers = {f"layer{k}": str(k - 1) for k in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(model, layers, channels, 32).eval()
    with torch.inference_mode():
        maps = backbone(images())
        body = backbone.body(images())
        wanted = model.forward_features(images())
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    assert torch.equal(body["3"], wanted)


def test_effdet():
    effdet = quietly_import("effdet")
    config = effdet.get_efficientdet_config("tf_efficientdet_lite0")
    config.backbone_name, config.backbone_args = "dg_tf_efficientnet_lite0", {"drop_path_rate": 0.0}
    config.image_size = (128, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = effdet.EfficientDet(config, pretrained_backbone=False).eval()
        with torch.inference_mode():
            classes, boxes = model(images(size=128))
    assert graph_stages(model)
    assert len(classes) == len(boxes) == 5


# --------------------------------------------------------------------------- exchange


@pytest.mark.parametrize(
    "name", [n if n == "dg_resnet18" else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_onnx_runtime(name, tmp_path):
    """Any batch; closed edges close there, too. The exporter takes the whole graph, routers and thresholds included."""
    quietly_import("onnxscript")
    onnxruntime = quietly_import("onnxruntime")
    model = small(name)
    file = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images(),), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (name_in,) = (node.name for node in session.get_inputs())
    alphas = dg_timm.adjacency(model, images(5))
    upper = [alpha[:, torch.ones(alpha.shape[1:]).triu(1).bool()] for alpha in alphas.values()]
    assert any((edges == 0).any() for edges in upper)  # closed, and closed in the export, too
    for batch in (1, 2, 5):
        (theirs,) = session.run(None, {name_in: images(batch).numpy()})
        with torch.inference_mode():
            ours = model(images(batch)).numpy()
        np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-3 * np.abs(ours).max())


def test_weights_open_from_numpy_alone(tmp_path):
    """Without torch, timm or us: a converted network's file, in which the static one's weights are found by name."""
    static, dynamic = static_and_dynamic("dg_regnetx_002", num_classes=10)
    folder = dg_timm.save_pretrained(dynamic, tmp_path / "net")
    np.savez(tmp_path / "static.npz", **{key: value.numpy() for key, value in static.state_dict().items()})
    script = f"""
import sys
sys.modules["torch"] = sys.modules["timm"] = None
import numpy
from safetensors.numpy import load_file
ours, static = load_file({str(folder / "model.safetensors")!r}), numpy.load({str(tmp_path / "static.npz")!r})
assert all(numpy.array_equal(ours[key], static[key]) for key in static)
chain = {{float(value) for key in ours if key.endswith("scale") for value in ours[key]}}
assert chain == {{0.0, 2.0}}, chain
print(len(ours), len(static))
"""
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    ours, theirs = map(int, done.stdout.split())
    assert ours > theirs


# --------------------------------------------------------------------------- timm's own scripts


@pytest.mark.skipif(
    not Path(os.environ.get("TIMM_SOURCE", "/nowhere"), "train.py").is_file(),
    reason="TIMM_SOURCE names no clone of timm: train.py and validate.py are in its repository only",
)
def test_timms_train_and_validate(tmp_path):
    """train.py takes ``--device-modules dg_timm``; validate.py has no such option yet and starts after the import."""
    from PIL import Image

    source = Path(os.environ["TIMM_SOURCE"])
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("dark", "light"):
            (tmp_path / split / label).mkdir(parents=True)
            for k in range(8):
                pixels = rng.integers(0, 100, (40, 40, 3)) + (150 if label == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / label / f"{k}.png")
    common = ["--data-dir", str(tmp_path), "--num-classes", "2", "--device", "cpu", "--model", "dg_regnetx_002",
              "-b", "8", "--workers", "0", "--img-size", "32"]  # fmt: skip

    def run(*start):
        done = python(*start, *common, cwd=tmp_path, env={"PYTHONPATH": ""})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    train = [str(source / "train.py"), "--device-modules", "dg_timm", "--epochs", "1", "--warmup-epochs", "0"]
    run(*train, "--cooldown-epochs", "0", "--output", str(tmp_path / "out"))
    (checkpoint,) = (tmp_path / "out").glob("*/last.pth.tar")
    start = f"import dg_timm, runpy; runpy.run_path({str(source / 'validate.py')!r}, run_name='__main__')"
    assert "top1" in run("-c", start, "--split", "validation", "--checkpoint", str(checkpoint))
