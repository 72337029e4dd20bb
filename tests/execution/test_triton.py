"""The Triton kernels in Triton's interpreter, and what happens where they are wrong."""

import pytest

from tests.helpers.scripts import python

TRITON = """
import warnings
import torch
from dg_timm.execution import backends
from dg_timm.execution.backends import triton_kernels
kernels = triton_kernels.TritonKernels()
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    for n in (1, 3, 16, 17, 35):
        maps = [torch.randn(3, 5, 7, 9).to(dtype) for _ in range(n)]
        x, weights = torch.randn(3, 5, 7, 9).to(dtype), torch.randn(3, n).to(torch.promote_types(dtype, torch.float32))
        weights[1, n // 2] = 0
        maps[n // 2][1] = float("nan")  # of weight 0: not read
        clean = torch.stack(maps).double().nan_to_num()
        wanted = torch.einsum("bn,nbchw->bchw", weights.double(), clean)
        z, dx, dw = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weights)
        kernels.weighted_sum(z, maps, weights)
        maps[n // 2][1] = 0
        kernels.product_gradients(dx, dw, maps, x, weights)
        dots = torch.einsum("nbchw,bchw->bn", clean, x.double())
        for got, right in ((z, wanted), (dx, wanted), (dw, dots)):
            assert (got.double() - right).abs().max() <= tolerance * right.abs().max() + 1e-12, (dtype, n)
here = torch.device("cpu")  # where the interpreter runs
assert isinstance(backends.cuda_kernels(here), triton_kernels.TritonKernels)
triton_kernels.TritonKernels.weighted_sum = lambda self, out, features, weights: out.zero_()
backends.cuda_kernels.cache_clear()
with warnings.catch_warnings(record=True) as caught:
    assert backends.cuda_kernels(here) is None
    assert backends.cuda_kernels(here) is None
assert len(caught) == 1 and "they give wrong sums on cpu" in str(caught[0].message)
print("right")
"""


def test_they_are_right_in_the_interpreter_and_not_used_where_they_are_wrong():
    pytest.importorskip("triton", reason="Triton comes with PyTorch for GPUs")
    done = python("-c", TRITON, env={"TRITON_INTERPRET": "1"})
    assert done.stdout.strip() == "right", done.stderr[-2000:]
