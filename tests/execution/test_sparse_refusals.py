"""What sparse execution can't do, and says; and what it does in spite of looking like it."""

import pytest
import timm
import torch

import dg_timm
from dg_timm.graph.stage import DGStage, graph_stages
from tests.helpers.stages import images, make_stage


@pytest.fixture
def model():
    made = timm.create_model("dg_regnetx_002", num_classes=3).eval()
    dg_timm.set_execution(made, "sparse")
    return made


def test_what_records_or_transforms_a_program_is_refused(model):
    """What is read of one image would hold for all; and what has no memory must not be read."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.testing._internal.two_tensor import TwoTensor

    x = torch.randn(2, 3, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        with pytest.raises(RuntimeError, match="can't be traced, exported or transformed"):
            model(fake)
    for transform in (lambda: make_fx(model)(x), lambda: torch.func.vmap(model)(x[None]),
                      lambda: torch.func.jvp(model, (x,), (x,)), lambda: model(TwoTensor(x, x))):  # fmt: skip
        with pytest.raises(RuntimeError, match="can't be traced, exported or transformed"):
            transform()


def test_what_only_watches_is_not(model):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 64, 64))
    assert counter.get_total_flops() > 10**6


def test_norms_that_take_the_batchs_statistics_are_refused():
    stage = make_stage("input", 3).eval()
    stage.execution = "sparse"
    stage[0].bn1.train()
    with pytest.raises(RuntimeError, match="a BatchNorm2d of this stage would take its statistics"):
        stage(images("input"))
    stage[0].bn1.eval()
    stage[0].bn1.running_mean = None
    with pytest.raises(RuntimeError, match="would take its statistics"):
        stage(images("input"))


def test_a_parameter_that_learns_behind_a_frozen_stem_is_told(model):
    stages = list(graph_stages(model).values())
    model.requires_grad_(False)
    stages[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match="sparse execution has no gradients"):
        model(torch.randn(2, 3, 64, 64)).sum().backward()
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # a linear probe needs none of the stages' gradients
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.get_classifier().weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(torch.randn(2, 3, 64, 64)).requires_grad


def test_an_unknown_name_changes_nothing(model):
    for name in ("fast", "Sparse", None):
        with pytest.raises(ValueError, match="execution must be one of dense, sparse, fixed, got"):
            dg_timm.set_execution(model, name)
    assert all(stage.execution == "sparse" for stage in graph_stages(model).values())
    with pytest.raises(ValueError, match="is a static network"):
        dg_timm.set_execution(timm.create_model("resnet18"), "sparse")


def test_training_and_gradients(model):
    x = torch.randn(1, 3, 64, 64)
    model(x)  # parameters that want a gradient are no reason to refuse
    with pytest.raises(RuntimeError, match=r"sparse execution is for evaluation: call model.eval\(\)"):
        model.train()(x)
    with pytest.raises(RuntimeError, match="sparse execution has no gradients"):
        model.eval()(x).sum().backward()


def test_export_trace_script(model):
    x = torch.randn(1, 3, 64, 64)
    for attempt in (
        lambda: torch.jit.trace(model, x),
        lambda: torch.fx.symbolic_trace(model),
        lambda: torch.export.export(model, (x,)),
        lambda: torch.jit.script(model)(x),
    ):
        with pytest.raises(Exception, match="sparse execution"):
            attempt()


def test_compiled_it_falls_back_to_eager(model):
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), wanted)


def test_dense_is_the_default_and_is_not_saved(model, tmp_path):
    folder = dg_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert all(stage.execution == "dense" for stage in graph_stages(again).values())
    assert isinstance(next(iter(graph_stages(again).values())), DGStage)
