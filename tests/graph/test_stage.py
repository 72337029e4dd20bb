"""One stage against a naive reference of Eqs. 3-5, and what holds for every image and every way to run it."""

import pytest
import torch
from torch import nn

from dg_timm import adjacency, set_threshold
from dg_timm.execution import operators
from dg_timm.graph import edges
from dg_timm.graph.stage import DGStage
from tests.helpers.stages import CHANNELS, images, make_stage


def reference(stage: DGStage, x: torch.Tensor) -> torch.Tensor:
    """Eqs. 3-5 for one image, (1, C, H, W), as they are written down; straight-through where an edge is cut."""
    blocks, routers = stage[:], [stage.get_submodule(f"router{i}") for i in range(len(stage) + 1)]  # type: ignore[call-overload]
    p = stage.projection(x) if hasattr(stage, "projection") else x
    if hasattr(blocks[0], "projects_shortcut"):
        p = blocks[0].downsample(x)
    node, alpha = [p], {}
    for j in range(1, len(stage) + 2):
        router, i = routers[j - 1], j - 1
        for k, logit in enumerate(router.fc(node[i].mean((2, 3)))[0] if stage.instance_aware else router.logits):
            w, tau = torch.sigmoid(logit) * (1 if router.scale is None else router.scale[k]), router.threshold
            surrogate = w.detach() * torch.sigmoid((w.detach().abs() - tau) / edges.SURROGATE_WIDTH)
            cut = (w.detach().abs() < tau) or (i > 0 and all(alpha[h, i] == 0 for h in range(i)))
            alpha[i, j + k] = (w + surrogate - (w + surrogate).detach()) + (0 if cut else w.detach())
        if j == len(stage) + 1:
            return sum(alpha[i, j] * node[i] for i in range(j))
        z = sum(alpha[i, j] * (x if j == 1 else node[i]) for i in range(j))
        takes_shortcut = j == 1 and hasattr(blocks[0], "projects_shortcut") and stage.block_shortcut
        node.append(blocks[0].residual(z, alpha[0, 1] * p) if takes_shortcut else blocks[j - 1](z))
    raise AssertionError


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
@pytest.mark.parametrize("options", [{}, {"edge_scale": False, "block_shortcut": False}, {"instance_aware": False}],
                         ids=["default", "paper", "alpha"])  # fmt: skip
@pytest.mark.parametrize("backend", operators.BACKENDS)
def test_agrees_with_the_reference_in_output_and_gradients(kind, num_blocks, seed, options, backend):
    torch.manual_seed(seed)
    stage, x = make_stage(kind, num_blocks, **options), images(kind).requires_grad_()
    wanted = torch.cat([reference(stage, image[None]) for image in x])
    probe = torch.randn_like(wanted)
    tensors = [x, *stage.parameters()]
    wanted_grads = torch.autograd.grad((wanted * probe).sum(), tensors, allow_unused=True)
    with operators.using_backend(backend):
        got = stage(x)
        got_grads = torch.autograd.grad((got * probe).sum(), tensors, allow_unused=True)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert sum(g is not None for g in got_grads) > len(tensors) / 2
    for tensor, g, w in zip(tensors, got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10, msg=f"gradient of a {tuple(tensor.shape)} tensor")


class InputRouters(nn.Module):
    """Routers of one node's *input* edges (paper Fig. 3b): a layer for each predecessor, on that one's feature."""

    def __init__(self, stage: DGStage, node: int) -> None:
        super().__init__()
        owners = [stage.get_submodule(f"router{i}") for i in range(node)]
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, 1, dtype=torch.float64) for _ in owners)
        for i, (layer, owner) in enumerate(zip(self.layers, owners, strict=True)):  # Eq. 7: the layer, split
            layer.load_state_dict(
                {"weight": owner.fc.weight[node - 1 - i][None], "bias": owner.fc.bias[node - 1 - i, None]}
            )
        self.scale = torch.stack([owner.scale[node - 1 - i] for i, owner in enumerate(owners)])
        self.threshold = torch.cat([owner.threshold for owner in owners])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        logits = [layer(f.mean((2, 3))) for layer, f in zip(self.layers, features, strict=True)]
        weight = torch.sigmoid(torch.cat(logits, 1)) * self.scale
        return torch.where(weight.abs() >= self.threshold, weight, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_routers_of_input_edges_are_the_same_function(seed):
    """Paper 6.2: whether a node weighs its output edges or its input edges, with the same weights, does not matter."""
    torch.manual_seed(seed)
    stage, x = make_stage("input", 4), images("input", batch=5)
    features, entering = [x], []
    for node in range(1, 6):
        weights = InputRouters(stage, node)(features)
        for i in range(1, node):  # nothing leaves a removed node
            weights[:, i] = torch.where((entering[i - 1] != 0).any(1), weights[:, i], 0.0)
        entering.append(weights)
        z = sum(weights[:, i, None, None, None] * f for i, f in enumerate(features))
        features.append(z if node == 5 else stage[node - 1](z))
    torch.testing.assert_close(features[-1], stage(x), rtol=1e-10, atol=1e-10)
    assert any((weights == 0).any() for weights in entering)


def test_without_instance_awareness_every_image_has_the_same_weights():
    torch.manual_seed(0)
    stage = make_stage("shortcut", 4, instance_aware=False)
    with torch.no_grad():
        stage.router0.threshold.zero_()  # otherwise nothing may get past it, for no image
    alpha = adjacency(stage, images("shortcut", batch=4))[""]
    assert (alpha == alpha[:1]).all()
    assert len(alpha[0][alpha[0] != 0].unique()) > 3
    assert sum(p.numel() for name, p in stage.named_parameters() if "logits" in name) == 15  # one an edge


def test_random_graphs_do_close_edges_and_remove_nodes():
    """The comparison above would be empty of Eq. 5 otherwise."""
    closed = removed = 0
    for seed in range(4):
        torch.manual_seed(seed)
        alpha = adjacency(make_stage("input", 5), images("input"))[""]
        upper = torch.ones_like(alpha).triu(1).bool()
        closed += int((alpha[upper] == 0).sum())
        dead = (alpha[:, :, 1:-1] == 0).all(1)
        removed += int(dead.sum())
        assert (alpha[:, 1:-1][dead] == 0).all()  # nothing leaves a removed node
    assert closed > 0
    assert removed > 0


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_an_image_does_not_depend_on_its_batch(kind):
    stage, x = make_stage(kind, 4), images(kind, batch=5)
    with torch.no_grad():
        together = stage(x)
        alone = torch.cat([stage(image[None]) for image in x])
        shuffled = stage(x.flip(0)).flip(0)
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shuffled, together, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_checkpointing_changes_neither_outputs_nor_gradients(kind):
    stage, x = make_stage(kind, 3), images(kind)
    results = []
    for stage.grad_checkpointing in (False, True):
        out = stage(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(stage.parameters()), allow_unused=True)))
    for plain, checkpointed in zip(*results, strict=True):
        assert (plain is None) == (checkpointed is None)
        assert plain is None or torch.equal(plain, checkpointed)


def kept_bytes(stage: DGStage, x: torch.Tensor) -> int:
    """Memory that one forward keeps for its backward pass: different storages alone."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stage(x)
    return sum(kept.values()) + 0 * len(out)


def test_checkpointing_keeps_less():
    stage, x = make_stage("input", 6), images("input", batch=8)
    everything = kept_bytes(stage, x)
    stage.grad_checkpointing = True
    assert kept_bytes(stage, x) < 0.75 * everything


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_every_parameter_learns_in_train_mode(kind):
    stage = make_stage(kind, 4).train()
    stage(images(kind)).square().mean().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype_and_layout_are_kept(dtype, memory_format, batch):
    stage = make_stage("shortcut", 3, dtype=dtype).to(memory_format=memory_format)
    x = images("shortcut", batch=batch, dtype=dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        out = stage(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_full_precision(dtype):
    stage, x = make_stage("shortcut", 3, dtype=torch.float32), images("shortcut", dtype=torch.float32)
    set_threshold(stage, 0.05)  # far from every weight here: at a threshold, half precision may cut differently
    with torch.no_grad():
        full = stage(x)
        with torch.autocast("cpu", dtype=dtype):
            half = stage(x)
    assert half.dtype == dtype
    assert 0 < (half.float() - full).norm() < 0.03 * full.norm()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (13, 4)])
@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_any_spatial_size(kind, size):
    stage = make_stage(kind, 3)
    x = torch.randn(2, images(kind).shape[1], *size, dtype=torch.float64)
    stride = 1 if kind == "input" else 2
    assert stage(x).shape == (2, CHANNELS, -(-size[0] // stride), -(-size[1] // stride))
