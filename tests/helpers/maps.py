"""Maps for the operators, and how exactly each type of number adds up."""

import torch

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make_maps(
    n: int,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    shape: tuple[int, int, int, int] = (3, 5, 7, 9),
) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(n)]
