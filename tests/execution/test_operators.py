"""The operators on maps, by every backend, against sums in double precision."""

import pytest
import torch

from dg_timm._errors import UserError
from dg_timm.execution import operators
from dg_timm.execution.backends import cpu
from dg_timm.graph import edges
from tests.helpers.maps import LAYOUTS, TOLERANCE, make_maps


@pytest.fixture(params=["kernels", "torch"])
def backend(request):
    with operators.using_backend(request.param):
        yield request.param


def test_the_kernels_are_what_runs_here():
    """The comparisons below would be empty otherwise."""
    kernels = cpu.load()
    assert kernels is not None
    assert kernels.dtypes == set(cpu.SUFFIXES)
    assert operators.uses_kernels()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 2, 4, 5, 37])
def test_the_weighted_sum(backend, n, dtype, layout):
    sources, weights = make_maps(n, dtype, layout), torch.randn(3, n)
    weights[1, n // 2] = 0
    wanted = torch.einsum("bn,nbchw->bchw", weights.double(), torch.stack(sources).double())
    z = operators.weighted_sum(sources, weights)
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=layout)
    scale = 5 if backend == "torch" else 1  # rounds after every source
    tolerance = scale * TOLERANCE[dtype] * wanted.abs().max().item()
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=max(tolerance, 2e-7 if dtype == torch.float64 else 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 37])
def test_gradients_of_the_products(backend, n, dtype, layout):
    gradients, x, weights = make_maps(n, dtype, layout), make_maps(1, dtype, layout)[0], torch.randn(3, n).double()
    stacked = torch.stack(gradients).double()
    dx, dw = operators.product_gradients(gradients, x, weights)
    wanted_dx = torch.einsum("bn,nbchw->bchw", weights, stacked)
    wanted_dw = torch.einsum("nbchw,bchw->bn", stacked, x.double())
    atol = 5 * TOLERANCE[dtype]
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=0, atol=atol * wanted_dx.abs().max().item())
    torch.testing.assert_close(dw.double(), wanted_dw, rtol=0, atol=atol * wanted_dw.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 3, 4, 5, 37])
def test_one_gradient_alone_is_the_same(backend, n, layout):
    gradients, (x,), weights = (
        make_maps(n, torch.float32, layout),
        make_maps(1, torch.float32, layout),
        torch.rand(3, n),
    )
    dx, dw = operators.product_gradients(gradients, x, weights)
    only_dx, only_dw = (
        operators.product_gradients(gradients, x, weights, need_dx=need, need_dw=not need) for need in (True, False)
    )
    assert only_dx[1] is None
    assert only_dw[0] is None
    assert torch.equal(only_dx[0], dx)
    assert torch.equal(only_dw[1], dw)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [3, 300])
def test_means_of_channels(backend, dtype, layout, channels):
    x = torch.randn(2, channels, 5, 7).to(dtype).contiguous(memory_format=layout)
    wanted = x.double().mean((2, 3))
    means = operators.channel_means(x)
    assert means.dtype == dtype
    torch.testing.assert_close(means.double(), wanted, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch rounds otherwise on other processors")
def test_float32_is_the_reference_to_the_bit():
    """What is traced, scripted or exported then predicts what eager mode does."""
    for n in (1, 2, 5, 9):
        sources, weights = make_maps(n, torch.float32, shape=(2, 8, 33, 33)), torch.rand(2, n)
        assert torch.equal(operators.weighted_sum(sources, weights), edges.weighted_sum(sources, weights))


def test_results_do_not_depend_on_the_number_of_threads():
    sources, weights = make_maps(6, torch.float32, shape=(3, 64, 31, 31)), torch.randn(3, 6)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            gradients = operators.product_gradients(sources, sources[0], weights)
            found.append((operators.weighted_sum(sources, weights), *gradients, operators.channel_means(sources[0])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_maps_of_other_layouts_types_and_views_are_taken(backend):
    a, b = make_maps(2, torch.float32)
    odd = b.double().transpose(2, 3).contiguous().transpose(2, 3)
    weights = torch.tensor([[0.5, 2.0]]).expand(3, 2)
    torch.testing.assert_close(operators.weighted_sum([a, odd], weights), 0.5 * a + 2 * b)
    expanded = a[:, :, :1, :1].expand(a.shape)
    dx, dw = operators.product_gradients([expanded], b.contiguous(memory_format=torch.channels_last), weights[:, :1])
    torch.testing.assert_close(dx, 0.5 * expanded.contiguous())
    torch.testing.assert_close(dw[:, 0], (expanded * b).sum((1, 2, 3)))
    torch.testing.assert_close(operators.channel_means(expanded), expanded.mean((2, 3)))


def test_one_pixel_is_of_both_layouts(backend):
    maps = [torch.randn(3, 5, 1, 1) for _ in range(2)]
    maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    assert not operators.is_channels_last(maps[1])
    weights = torch.rand(3, 2)
    torch.testing.assert_close(operators.weighted_sum(maps, weights), edges.weighted_sum(maps, weights))


def test_an_empty_batch(backend):
    empty = [torch.empty(0, 3, 4, 4)] * 2
    assert operators.weighted_sum(empty, torch.empty(0, 2)).shape == (0, 3, 4, 4)
    dx, dw = operators.product_gradients(empty, empty[0], torch.empty(0, 2))
    assert (dx.shape, dw.shape) == ((0, 3, 4, 4), (0, 2))


def test_what_does_not_fit_is_refused_before_memory_is_touched(backend):
    a, b = make_maps(2, torch.float32)
    for maps, weights in (([a, b], (4, 2)), ([a, b[:, :, :3]], (3, 2)), ([a, b], (3, 3)), ([a, b[:2]], (3, 2))):
        with pytest.raises(ValueError, match="do not fit: every block of a stage must give the shape that the others"):
            operators.weighted_sum(maps, torch.rand(weights))
    with pytest.raises(ValueError, match="do not fit"):
        operators.product_gradients([a], b[:2], torch.rand(3, 1))


def test_an_unknown_backend_is_refused_and_the_last_one_comes_back():
    with pytest.raises(UserError, match="backend must be one of kernels, torch, reference, got 'fast'"):
        operators.using_backend("fast").__enter__()
    with operators.using_backend("reference"):
        assert not operators.is_plain(torch.ones(1))
        with operators.using_backend("torch"):
            assert not operators.uses_kernels()
            assert operators.is_plain(torch.ones(1))
        assert not operators.is_plain(torch.ones(1))
    assert operators.uses_kernels()


def test_large_maps_on_the_cpu_whatever_the_default_device_is():
    maps = [torch.randn(4, 64, 72, 72) for _ in range(2)]  # 5 MiB: memory of our own
    weights = torch.ones(4, 2)
    wanted = edges.weighted_sum(maps, weights)
    with torch.device("meta"):
        got = operators.weighted_sum(maps, weights)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, wanted)
