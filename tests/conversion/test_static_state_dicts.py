"""Static state dicts: whole ones become the identity, wherever the network lies; parts never touch a graph."""

import copy
import functools

import pytest
import timm
import torch
from torch import nn

import dg_timm
from dg_timm._errors import UserError
from dg_timm.conversion.state_dict import is_identity, is_static
from dg_timm.graph.stage import graph_stages, routers
from tests.helpers.networks import FAMILIES, randomize, randomize_graph

SMALL = ["dg_cifar_resnet20", "dg_mobilenetv2_050"]  # of each kind of node 0
X = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


class Module(nn.Module):
    """The shape of a LightningModule: the network is an attribute, beside others with weights."""

    def __init__(self, network):
        super().__init__()
        self.net, self.extra = network, nn.Linear(3, 2)

    def forward(self, x):
        return self.extra(self.net(x))


PARENTS = {
    "alone": lambda network: network,
    "Sequential": lambda network: nn.Sequential(network, nn.Linear(3, 2)),
    "DataParallel": nn.DataParallel,
    "Lightning": Module,
    "ModuleDict": lambda network: nn.Sequential(nn.ModuleDict({"a.b".replace(".", "_"): network})["a_b"]),
    "two of them": lambda network: nn.Sequential(Module(network), nn.Identity(), Module(copy.deepcopy(network))),
}


@functools.cache
def made(name, **options):
    return randomize(timm.create_model(name, num_classes=3, **options))


def networks(name, parent="alone"):
    """The static network, and a dynamic one that is no identity, each below a parent."""
    static, dynamic = copy.deepcopy(made(name.removeprefix("dg_"))), randomize_graph(copy.deepcopy(made(name)))
    assert not is_identity(dynamic)
    return PARENTS[parent](static).eval(), PARENTS[parent](dynamic).eval()


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model, before, keys=None):
    now = model.state_dict()
    assert all(torch.equal(now[key], before[key]) for key in (before if keys is None else keys))


def outputs(model):
    with torch.no_grad():
        return model(X) if not isinstance(model, nn.Sequential) else model[0](X)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("name", SMALL)
def test_a_static_state_dict_becomes_the_identity(name, parent, strict):
    static, dynamic = networks(name, parent)
    given = static.state_dict()
    keys = list(given)
    report = dynamic.load_state_dict(given, strict=strict)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert is_identity(dynamic)
    assert torch.equal(outputs(dynamic), outputs(static))
    assert list(given) == keys  # what was given is not changed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stage_alone_takes_the_static_stage(name):
    static, dynamic = networks(name)
    first, *others = graph_stages(dynamic)
    before = state_of(dynamic)
    stage = dynamic.get_submodule(first)
    report = stage.load_state_dict(static.get_submodule(first).state_dict())
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert is_identity(stage)
    assert not is_identity(dynamic)
    assert_unchanged(dynamic, before, [key for key in before if not key.startswith(f"{first}.")])
    for other in others:
        dynamic.get_submodule(other).load_state_dict(static.get_submodule(other).state_dict())
    rest = {key: value for key, value in static.state_dict().items() if not key.startswith((first, *others))}
    dynamic.load_state_dict(rest, strict=False)
    assert is_identity(dynamic)
    assert torch.equal(outputs(dynamic), outputs(static))


def test_a_dynamic_state_dict_is_loaded_as_it_is():
    for name in SMALL:
        _, trained = networks(name, "Lightning")
        _, other = networks(name, "Lightning")
        randomize_graph(other)
        assert not torch.equal(outputs(trained), outputs(other))
        other.load_state_dict(trained.state_dict())
        assert torch.equal(outputs(trained), outputs(other))


# --------------------------------------------------------------------------- parts


def part_of(name, static):
    """Parts of a static state dict, by what they are."""
    state, (first, *_, last) = static.state_dict(), graph_stages(made(name))
    classifier = static.get_classifier().weight
    head = next(key for key, value in state.items() if torch.equal(value, classifier)).rpartition(".")[0]
    one = [key for key in state if key.startswith(f"{first}.") and key.endswith(".weight")][-1]
    kept = {
        "nothing": lambda key: False,
        "the head": lambda key: key.startswith(f"{head}."),
        "one stage": lambda key: key.startswith(f"{first}."),
        "all but one tensor": lambda key: key != one,
        "all but the last stage": lambda key: not key.startswith(f"{last}."),
    }
    return {part: {key: value for key, value in state.items() if keep(key)} for part, keep in kept.items()}


@pytest.mark.parametrize("part", ["nothing", "the head", "one stage", "all but one tensor", "all but the last stage"])
@pytest.mark.parametrize("parent", ["alone", "Lightning"])
@pytest.mark.parametrize("name", SMALL)
def test_a_part_never_touches_a_graph_and_says_what_is_missing(name, parent, part):
    static, _ = networks(name)
    _, dynamic = networks(name, parent)
    given = part_of(name, static)[part]
    assert is_static(given)
    prefix = "net." if parent == "Lightning" else ""
    given = {f"{prefix}{key}": value for key, value in given.items()}
    before = state_of(dynamic)
    report = dynamic.load_state_dict(given, strict=False)
    assert report.unexpected_keys == []
    missing = {key for key in before.keys() - given.keys() if not key.endswith("num_batches_tracked")}  # torch adds it
    assert missing == {key for key in report.missing_keys if not key.endswith("num_batches_tracked")}
    assert_unchanged(dynamic, before, before.keys() - given.keys())
    assert_unchanged(dynamic, given)  # and what was given is there


@pytest.mark.parametrize("part", ["the head", "one stage", "all but one tensor"])
@pytest.mark.parametrize("name", SMALL)
def test_a_part_is_refused_where_all_is_wanted(name, part):
    static, dynamic = networks(name)
    before = state_of(dynamic)
    with pytest.raises(UserError, match=r"does not fit .*: missing .* Nothing was loaded"):
        dynamic.load_state_dict(part_of(name, static)[part])
    assert_unchanged(dynamic, before)


def test_old_checkpoints_that_do_not_count_batches_are_whole():
    static, dynamic = networks("dg_cifar_resnet20", "Lightning")
    old = {key: value for key, value in static.state_dict().items() if "num_batches_tracked" not in key}
    report = dynamic.load_state_dict(old, strict=False)
    assert all("num_batches_tracked" in key for key in report.missing_keys)
    assert is_identity(dynamic)


# --------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("options", [{"edge_scale": False, "block_shortcut": False}, {"block_shortcut": False},
                                     {"topology": "ws"}])  # fmt: skip
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_network_without_identity_refuses_before_it_loads_anything(options, parent, strict):
    name = "cifar_resnet26"
    static = PARENTS[parent](copy.deepcopy(made(name)))
    dynamic = PARENTS[parent](copy.deepcopy(made(f"dg_{name}", **options)))
    before = state_of(dynamic)
    with pytest.raises(ValueError, match="such a network is another function from the start"):
        dynamic.load_state_dict(static.state_dict(), strict=strict)
    own = [key for key in before if "extra" not in key]  # what a parent has loaded by then is the parent's
    assert_unchanged(dynamic, before, own)
    assert dynamic.load_state_dict(dynamic.state_dict()).missing_keys == []  # its own is no static one


@pytest.mark.parametrize("other", ["cifar_resnet26", "resnet18", "mobilenetv2_050"])
def test_another_architecture_changes_nothing(other):
    _, dynamic = networks("dg_cifar_resnet20")
    before = state_of(dynamic)
    with pytest.raises(UserError, match="does not fit"):
        dynamic.load_state_dict(made(other).state_dict())
    assert_unchanged(dynamic, before)


@pytest.mark.parametrize(
    ("other", "name"),
    [("cifar_resnet26", "dg_cifar_resnet20"), ("resnet18", "dg_cifar_resnet20"),
     ("mobilenetv2_050", "dg_cifar_resnet20"), ("cifar_resnet20", "dg_cifar_resnet26")],
)  # fmt: skip
@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("strict", [True, False])
def test_below_a_parent_another_architecture_changes_nothing(other, name, parent, strict):
    _, dynamic = networks(name, parent)
    given = PARENTS[parent](copy.deepcopy(made(other))).state_dict()
    before = state_of(dynamic)
    with pytest.raises(UserError, match=r"does not fit|is of another architecture than DG.*: .*Nothing .*was loaded"):
        dynamic.load_state_dict(given, strict=strict)
    assert_unchanged(dynamic, before, [key for key in before if "extra" not in key])  # a parent's own is the parent's


@pytest.mark.parametrize(
    ("other", "name", "match"),
    [("cifar_resnet26", "dg_cifar_resnet20", "which the model has not"),
     ("cifar_resnet20", "dg_cifar_resnet26", "no tensor of '3'")],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_a_stage_of_another_architecture_changes_nothing(other, name, match, strict):
    _, dynamic = networks(name)
    parent = nn.Sequential(dynamic.layer1)
    given = nn.Sequential(made(other).layer1).state_dict()
    before = state_of(dynamic)
    with pytest.raises(UserError, match=f"is of another architecture than .*{match}"):
        parent.load_state_dict(given, strict=strict)
    assert_unchanged(dynamic, before)


@pytest.mark.parametrize("parent", ["alone", "Lightning"])
def test_few_tensors_are_no_architecture(parent):
    """Of a file of an adapter, or of a note beside a tensor, torch reports what is not the model's."""
    _, dynamic = networks("dg_cifar_resnet20", parent)
    prefix = "net." if parent == "Lightning" else ""
    before = state_of(dynamic)
    given = {f"{prefix}layer1.0.conv1.weight": torch.ones(16, 16, 3, 3), f"{prefix}layer1.0.lora": torch.ones(2)}
    report = dynamic.load_state_dict(given | {f"{prefix}epoch": 3}, strict=False)
    assert set(report.unexpected_keys) == {f"{prefix}layer1.0.lora", f"{prefix}epoch"}
    assert_unchanged(dynamic, before, before.keys() - given.keys())
    assert_unchanged(dynamic, {key: given[key] for key in given if key in before})


def test_a_load_that_fails_midway_leaves_no_trace():
    """The next load of a stage alone is that of a whole stage."""
    static, dynamic = networks("dg_cifar_resnet20")
    handle = dynamic.layer1.register_load_state_dict_pre_hook(lambda *_: 1 / 0)
    given = {key: value for key, value in static.state_dict().items() if not key.startswith("layer3.")}
    with pytest.raises(ZeroDivisionError):
        dynamic.load_state_dict(given, strict=False)
    handle.remove()
    report = dynamic.layer2.load_state_dict(static.layer2.state_dict())
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    assert is_identity(dynamic.layer2)


def test_a_part_of_another_shape_is_named_before_anything_is_copied():
    static, dynamic = networks("dg_cifar_resnet20")
    before = state_of(dynamic)
    given = static.state_dict() | {"fc.weight": torch.zeros(7, static.fc.in_features)}
    with pytest.raises(UserError, match=r"'fc.weight': \(7, 64\) in the checkpoint, \(3, 64\) in the model"):
        dynamic.load_state_dict(given, strict=False)
    assert_unchanged(dynamic, before)
    report = dynamic.load_state_dict(static.state_dict() | {"aux.weight": torch.zeros(2)}, strict=False)
    assert report.unexpected_keys == ["aux.weight"]  # a whole static network with more beside it
    assert is_identity(dynamic)


# --------------------------------------------------------------------------- devices and types


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("name", SMALL)
def test_a_static_state_dict_is_assigned_to_a_model_without_numbers(name, parent):
    static, _ = networks(name, parent)
    dynamic = PARENTS[parent](timm.create_model(name, num_classes=3, device="meta")).eval()
    report = dynamic.load_state_dict(static.state_dict(), assign=True)
    assert (report.missing_keys, report.unexpected_keys) == ([], [])
    if parent in ("alone", "DataParallel"):  # elsewhere its other layers were never on the meta device
        assert not any(tensor.is_meta for tensor in dynamic.state_dict().values())
    assert is_identity(dynamic)
    assert torch.equal(outputs(dynamic), outputs(static))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("parent", ["alone", "Lightning"])
def test_a_model_of_another_type_keeps_it(dtype, parent):
    static, dynamic = networks("dg_cifar_resnet20", parent)
    dynamic.to(dtype).load_state_dict(static.state_dict())
    assert all(p.dtype == dtype for p in dynamic.parameters())
    assert is_identity(dynamic)
    dynamic.float().load_state_dict(static.to(dtype).state_dict())
    assert all(p.dtype == torch.float32 for p in dynamic.parameters())
    assert is_identity(dynamic)


def test_half_precision_and_no_memory_between_calls():
    """A model that is moved after it has run: right again, or a clear error and right after."""
    static, model = networks("dg_cifar_resnet20")
    model.load_state_dict(static.state_dict())
    wanted = outputs(model)
    for execution in ("dense", "sparse"):
        dg_timm.set_execution(model, execution)
        first = outputs(model)
        half = model.to(torch.bfloat16)(X.to(torch.bfloat16)).float()
        assert (half - first).norm() < 0.1 * first.norm()
        model.float()
        model.load_state_dict(static.state_dict())
        torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-4)
    alone = copy.deepcopy(model).to("meta")
    with torch.no_grad():
        assert alone(X.to("meta")).shape == wanted.shape  # shapes, in sparse execution too
        with pytest.raises(Exception, match="meta"):
            alone(X)
    alone = alone.to_empty(device="cpu")
    alone.load_state_dict(model.state_dict())
    assert torch.equal(outputs(alone), outputs(model))


def test_without_numbers_nothing_is_known():
    with pytest.raises(UserError, match="on the meta device has no numbers"):
        is_identity(timm.create_model("dg_cifar_resnet20", device="meta"))


def test_thresholds_count_for_what_is_an_identity():
    """A card may say "bit for bit" of an identity alone."""
    static, model = networks("dg_cifar_resnet20")
    model.load_state_dict(static.state_dict())
    router = next(iter(routers(model).values()))
    for value, expected in ((0.0, True), (1.0, True), (1.0001, False)):
        nn.init.constant_(router.threshold, value)
        assert is_identity(model) == expected
        assert torch.equal(outputs(model), outputs(static)) == expected
    nn.init.zeros_(router.threshold)
    for value, expected in ((0.9, True), (1.5, False), (None, True)):
        dg_timm.set_threshold(model, value)
        assert is_identity(model) == expected
        assert torch.equal(outputs(model), outputs(static)) == expected
    nn.init.constant_(router.fc.bias, 1e-3)
    assert not is_identity(model)


def test_what_is_left_out_or_replaced_is_no_identity():
    model = dg_timm.dynamize(copy.deepcopy(made("cifar_resnet20")))
    assert is_identity(model)
    gated = dg_timm.dynamize(copy.deepcopy(made("cifar_resnet20")), gates=True).eval()
    assert is_identity(gated)
    nn.init.constant_(gated.layer1.gate2.fc.bias, -3.0)
    assert not is_identity(dg_timm.to_fixed(gated, torch.randn(2, 3, 32, 32)))
    cut = {
        name: torch.ones(len(stage.edges), len(stage.edges)).triu(1).bool()
        for name, stage in graph_stages(model).items()
    }
    cut["layer2"][2, 3] = 0
    dg_timm.set_execution(model, "fixed", cut)
    assert not is_identity(model)
    dg_timm.set_execution(model, "dense")
    assert is_identity(model)
    kept = model.layer1.router1.fc
    model.layer1.router1.fc = nn.Identity()
    assert not is_identity(model)
    model.layer1.router1.fc = kept
    nn.init.constant_(model.layer1.router1.threshold, float("nan"))
    assert not is_identity(model)


@pytest.mark.parametrize(("other", "name"), [("resnet18", "dg_seresnet18"), ("regnetx_002", "dg_regnety_002")])
@pytest.mark.parametrize("strict", [True, False])
def test_simpler_blocks_of_the_same_names_are_another_architecture(other, name, strict):
    if name not in timm.list_models("dg_*"):
        dynamic = dg_timm.dynamize(timm.create_model(name.removeprefix("dg_")))
    else:
        dynamic = timm.create_model(name)
    before = state_of(dynamic)
    static = timm.create_model(other)
    for model, given in ((dynamic, static), (nn.ModuleDict({"net": dynamic}), nn.ModuleDict({"net": static}))):
        with pytest.raises(UserError, match=r"does not fit|is of another architecture .*se\b"):
            model.load_state_dict(given.state_dict(), strict=strict)
        assert_unchanged(dynamic, before)
