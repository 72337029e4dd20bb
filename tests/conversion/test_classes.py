"""Classes of dynamic networks: imported, derived from, copied, pickled into fresh processes, averaged."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torch.nn.utils import parametrize, prune

import dg_timm
from dg_timm._errors import UserError
from dg_timm.conversion import classes
from dg_timm.conversion.state_dict import is_identity
from dg_timm.graph.stage import DGStage, graph_stages, routers
from tests.helpers.networks import FAMILIES, randomize, randomize_graph
from tests.helpers.scripts import ROOT, one_thread

X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def trained(name="dg_resnet18", **options):
    return randomize_graph(randomize(timm.create_model(name, num_classes=3, **options))).requires_grad_(False)


class Doubled(ResNet):
    """A user's own network: timm's, with another forward and a layer more."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, offset=0.0):
        return self.gain * super().forward(x) + offset


def doubled():
    torch.manual_seed(0)
    return randomize(Doubled(BasicBlock, [2, 2, 2, 2], num_classes=3))


def assert_same(twin, model):
    assert type(twin) is type(model)
    assert twin is not model
    assert torch.equal(twin(X), model(X))
    assert list(twin.state_dict()) == list(model.state_dict())
    assert next(twin.parameters()) is not next(model.parameters())
    assert dg_timm.adjacency(twin, X).keys() == dg_timm.adjacency(model, X).keys()


# --------------------------------------------------------------------------- names


def test_a_class_can_be_imported_by_its_name():
    from dg_timm.conversion.classes import DGRegNet, DGResNet

    assert type(timm.create_model("dg_resnet18")) is DGResNet
    assert type(dg_timm.dynamize(timm.create_model("resnet26"))) is DGResNet
    assert issubclass(DGResNet, ResNet)
    assert issubclass(DGResNet, classes.DynamicGraph)
    assert DGRegNet is not DGResNet
    assert (DGResNet.__name__, DGResNet.__qualname__, DGResNet.__module__) == ("DGResNet",) * 2 + (classes.__name__,)
    assert "ResNet" in DGResNet.__doc__
    assert classes.dynamic_class(ResNet) is DGResNet
    with pytest.raises(ImportError):
        from dg_timm.conversion.classes import DGNobodysNet  # noqa: F401
    for name in ("DGLinear", "DGmodel_entrypoint", "DG", "ResNet", "DGX@os"):  # not the names of networks
        assert not hasattr(classes, name)


@pytest.mark.parametrize("name", [*FAMILIES, "dg_cifar_resnet20"])
def test_every_family_has_a_class_that_is_found_again(name):
    found = type(timm.create_model(name, device="meta"))
    assert getattr(classes, found.__name__) is found
    assert pickle.loads(pickle.dumps(found)) is found
    assert "@" not in found.__name__


def test_the_class_of_a_users_network_names_its_module():
    model = dg_timm.dynamize(doubled())
    assert isinstance(model, Doubled)
    assert type(model).__name__ == f"DGDoubled@{__name__.replace('.', ':')}"
    assert getattr(classes, type(model).__name__) is type(model)


# --------------------------------------------------------------------------- derived classes


def test_a_forward_that_is_overridden_runs_over_the_dynamic_stages():
    static = doubled()
    dynamic = dg_timm.dynamize(copy.deepcopy(static))
    with torch.no_grad():
        wanted = static(X, offset=1.0)
        assert torch.equal(dynamic(X, offset=1.0), wanted)
        randomize_graph(dynamic)
        assert not torch.equal(dynamic(X, offset=1.0), wanted)
        assert torch.equal(dynamic(X, offset=1.0), dynamic(X) + 1.0)
        dg_timm.set_execution(dynamic, "sparse")
        assert dynamic(X).shape == (2, 3)
        dg_timm.set_execution(dynamic, "dense")
        dynamic.load_state_dict(static.state_dict())
        assert is_identity(dynamic)
        assert torch.equal(dynamic(X, offset=1.0), wanted)
        for twin in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):
            assert_same(twin, dynamic)


def test_a_class_may_derive_from_a_dynamic_one():
    """As libraries do that mix something into a model's class."""
    model = trained()

    class Mine(type(model)):
        def forward(self, x):
            return super().forward(x) + 1

    wanted = model(X)
    model.__class__ = Mine
    assert torch.equal(model(X), wanted + 1)
    assert_same(copy.deepcopy(model), model)
    assert dg_timm.cost(model, X).shape == (2,)
    static = timm.create_model("resnet18", num_classes=3)
    model.load_state_dict(static.state_dict())
    assert is_identity(model)


class DerivedAtModuleLevel(classes.DGResNet):
    def forward(self, x):
        return super().forward(x) + 1


def test_a_derived_class_of_a_module_is_pickled():
    model = trained()
    model.__class__ = DerivedAtModuleLevel
    assert_same(pickle.loads(pickle.dumps(model)), model)


def test_a_converted_class_can_not_be_made_directly_and_converted_again():
    made = classes.DGResNet(BasicBlock, [1, 1, 1, 1])  # a plain call gives the static layers
    assert graph_stages(made) == {}
    assert made.eval()(X).shape == (2, 1000)
    with pytest.raises(UserError, match="is a static network"):
        dg_timm.adjacency(made, X)


# --------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", FAMILIES)
def test_copies_are_the_same_and_apart(name):
    model = trained(name)
    dg_timm.set_threshold(model, 0.1)
    twins = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "EMA": timm.utils.ModelEmaV3(model).module,
    }
    for twin in twins.values():
        assert_same(twin, model)
        assert {router.fixed_threshold for router in routers(twin).values()} == {0.1}
        with torch.no_grad():
            next(iter(routers(twin).values())).scale.zero_()
    assert all(bool(router.scale.any()) for router in routers(model).values())


def test_copies_load_static_state_dicts_into_themselves():
    """A load hook knows the network that it belongs to."""
    static = randomize(timm.create_model("resnet18", num_classes=3)).eval()
    model = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), timm.utils.ModelEmaV3(model).module):
        nn.Sequential(twin).load_state_dict(nn.Sequential(static).state_dict())
        assert is_identity(twin)
        assert torch.equal(twin(X), static(X))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_average_follows_the_model():
    model = trained()
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    average.update(model)
    scale, averaged = model.layer1.router0.scale, average.module.layer1.router0.scale
    torch.testing.assert_close(averaged, scale * 1.05 / 1.1)
    assert bool(scale.any())
    swa = torch.optim.swa_utils.AveragedModel(model)
    swa.update_parameters(model)
    assert torch.equal(swa(X), model(X))


@pytest.mark.parametrize("execution", ["dense", "sparse", "fixed"])
def test_how_a_model_runs_goes_with_it(execution):
    model = trained()
    topology = None
    if execution == "fixed":
        topology = {name: torch.ones(len(s) + 1).diag(1).bool() for name, s in graph_stages(model).items()}
    dg_timm.set_execution(model, execution, topology)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(twin, model)
    for one, other in zip(graph_stages(twin).values(), graph_stages(model).values(), strict=True):
        assert isinstance(one, DGStage)
        assert (one.execution, one.topology) == (execution, other.topology)


def test_the_whole_model_is_saved_and_loaded():
    model, file = trained("dg_mobilenetv2_050"), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), model)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file)


class LastOf(nn.Module):
    """The last of a network's feature maps."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[-1]


FRESH = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    saved = pickle.load(file)
for name, model, x, wanted in saved:
    # to rounding: memory that lies elsewhere may be convolved otherwise
    assert (model(x) - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name
    print(name, type(model).__name__, type(model).__module__)
"""


def test_a_process_that_imports_nothing_but_pickle_loads_them(tmp_path):
    """What a spawned worker does (a DataLoader, joblib, Ray): the pickle names all that it needs."""
    names = ("dg_resnet18", "dg_mobilenetv2_050", "dg_regnety_002", "dg_cifar_resnet20")
    made = {name: trained(name) for name in names}
    features = timm.create_model("dg_resnet18", features_only=True)
    made["features"] = LastOf(randomize_graph(features)).eval().requires_grad_(False)
    made["own"] = dg_timm.dynamize(doubled()).requires_grad_(False)
    dg_timm.set_execution(made["dg_regnety_002"], "sparse")
    saved = [(name, model, X, model(X)) for name, model in made.items()]
    (tmp_path / "models.pickle").write_bytes(pickle.dumps(saved))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "models.pickle")],
        cwd=ROOT, env=one_thread(), capture_output=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == list(made)
    assert [line[1] for line in lines if line[0] != "features"][:2] == ["DGResNet", "DGEfficientNet"]
    assert all(line[2] == classes.__name__ for line in lines if line[0] != "features")


def test_a_scale_that_is_pruned_or_parametrized_does_not_decay():
    model = timm.create_model("dg_cifar_resnet20")
    assert {"layer1.router0.scale", "layer1.router0.threshold"} <= model.no_weight_decay()
    prune.l1_unstructured(model.layer1.router0, "scale", 1)
    parametrize.register_parametrization(model.layer1.router1, "scale", nn.Identity())
    left = {name for name, _ in model.named_parameters()}
    listed = model.no_weight_decay()
    assert listed <= left
    assert {"layer1.router0.scale_orig", "layer1.router1.parametrizations.scale.original"} <= listed
