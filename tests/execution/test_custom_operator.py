"""``torch.ops.dg_timm.weighted_sum`` as torch's own checks see it: fake, derivatives, vmap; and forward mode."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from dg_timm import UserError, set_threshold
from dg_timm.execution import operators
from dg_timm.graph import edges
from tests.helpers.maps import LAYOUTS, make_maps
from tests.helpers.stages import images, make_stage

weighted_sum = torch.ops.dg_timm.weighted_sum.default
checks_of_torch = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # its own


@checks_of_torch
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 4])
def test_torch_finds_nothing_wrong(n, dtype, layout, learns):
    features = [map_.requires_grad_(learns) for map_ in make_maps(n, dtype, layout, (2, 3, 4, 5))]
    weights = torch.randn(2, n, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_(learns)
    checked = torch.library.opcheck(weighted_sum, (features, weights))
    assert set(checked.values()) == {"SUCCESS"}
    assert len(checked) == 4


@checks_of_torch
def test_torch_finds_nothing_wrong_where_some_learn():
    for learning in ((True, False, False), (False, True, True), (False, False, True)):
        features, weights = make_maps(2, torch.float64, shape=(2, 3, 4, 5)), torch.rand(2, 2, dtype=torch.float64)
        for tensor, learns in zip((*features, weights), learning, strict=True):
            tensor.requires_grad_(learns)
        assert set(torch.library.opcheck(weighted_sum, (features, weights)).values()) == {"SUCCESS"}


def double(n=3):
    features = [f.requires_grad_() for f in make_maps(n, torch.float64, shape=(2, 3, 4, 5))]
    return features, torch.randn(2, n, dtype=torch.float64).requires_grad_()


def test_its_derivatives_are_those_of_the_formula():
    features, weights = double()

    def run(weights, *features):
        return weighted_sum(features, weights)

    assert torch.autograd.gradcheck(run, (weights, *features))
    assert torch.autograd.gradgradcheck(run, (weights, *features))


def test_double_backward_is_that_of_the_formula():
    features, weights = double()
    tensors = [*features, weights]

    def second(summed):
        first = torch.autograd.grad(summed.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    found = second(weighted_sum(features, weights))
    wanted = second(edges.weighted_sum(features, weights))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", list(itertools.product([0, 1, None], [0, None], [0, 2, None]))[:-1])
def test_batched_by_vmap_it_is_every_item_in_turn(dims):
    count, shape = 4, (2, 3, 5, 6)

    def batched(size, dim):
        return torch.randn(size if dim is None else (*size[:dim], count, *size[dim:]), dtype=torch.float64)

    a, b, weights = batched(shape, dims[0]), batched(shape, dims[1]), batched((2, 2), dims[2])

    def take(x, dim, k):
        return x if dim is None else x.select(dim, k)

    def run(a, b, weights):
        return weighted_sum([a, b], weights)

    found = torch.vmap(run, in_dims=dims)(a, b, weights)
    for k in range(count):
        wanted = edges.weighted_sum([take(a, dims[0], k), take(b, dims[1], k)], take(weights, dims[2], k))
        torch.testing.assert_close(found[k], wanted)


def test_it_keeps_what_is_behind_a_closed_edge_out_under_vmap():
    features = torch.randn(2, 4, 2, 3, 5, 5)
    weights = torch.rand(4, 2, 2) + 0.1
    weights[1, 0, 1] = 0
    wanted = torch.stack([edges.weighted_sum(list(features[:, k]), weights[k]) for k in range(4)])
    features[1, 1, 0] = float("nan")
    torch.testing.assert_close(torch.vmap(lambda f, w: weighted_sum(f, w))(list(features), weights), wanted)


def test_forward_mode_through_the_package_is_right():
    """Through an operator it gives zeros without a word; so the package takes the formulas there."""
    features, weights = make_maps(2, torch.float64), torch.rand(3, 2, dtype=torch.float64)
    tangent = torch.randn_like(features[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(features[0], tangent)
        plain = operators.is_plain(dual)
        z = operators.weighted_sum([dual, features[1]], weights, plain)
        along = forward_ad.unpack_dual(z).tangent
    assert not plain
    torch.testing.assert_close(along, weights[:, 0, None, None, None] * tangent)
    assert operators.is_plain(features[0])


@pytest.mark.parametrize("kind", ["input", "shortcut", "projection"])
def test_forward_mode_through_a_stage_is_right(kind):
    """Against finite differences; by dual numbers and by ``torch.func.jvp``."""
    stage, x = make_stage(kind, 3), images(kind, batch=2)
    set_threshold(stage, 0.0)  # straight through a cut edge, its derivative is not that of its value
    tangent, step = torch.randn_like(x), 1e-6
    with torch.no_grad():
        wanted = (stage(x + step * tangent) - stage(x - step * tangent)) / (2 * step)
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(stage(forward_ad.make_dual(x, tangent))).tangent
    assert along.abs().max() > 0
    torch.testing.assert_close(along, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.func.jvp(stage, (x,), (tangent,))[1], along)


def test_gradients_of_each_image_by_vmap_are_those_of_a_loop():
    """As privacy accounting takes them: vmap over grad."""
    stage, x = make_stage("shortcut", 3), images("shortcut", batch=4)
    parameters = {name: p.detach() for name, p in stage.named_parameters()}

    def loss(parameters, image):
        return torch.func.functional_call(stage, parameters, (image[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for k, image in enumerate(x):
        wanted = torch.autograd.grad(stage(image[None]).square().sum(), list(stage.parameters()), allow_unused=True)
        for (name, _), w in zip(stage.named_parameters(), wanted, strict=True):
            torch.testing.assert_close(found[name][k], torch.zeros_like(found[name][k]) if w is None else w)


def test_modes_that_watch_see_one_operation():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    stage, x = make_stage("input", 3), images("input")
    with torch.no_grad():
        wanted = stage(x)
        with Watch():
            got = stage(x)
    assert torch.equal(got, wanted)
    assert seen.count(weighted_sum) == 4  # three blocks and the output


def test_forward_mode_through_the_operator_itself_is_refused():
    """It would give no tangent without a word."""
    features = [torch.randn(2, 3, 4, 4) for _ in range(2)]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(features[0], torch.randn(2, 3, 4, 4))
        with pytest.raises(UserError, match="has no forward-mode derivative"):
            torch.ops.dg_timm.weighted_sum([dual, features[1]], torch.rand(2, 2))
