"""Shared by the tests of the kernels: the device, odd shapes, and memory filled with NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

#: The GPU, or the CPU, where Triton's interpreter runs the kernels (see conftest).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: h, w: neither powers of two nor square; one pixel, one row, one column; slightly more than one tile.
ODD_SHAPES = ((7, 13), (1, 1), (1, 9), (5, 1), (33, 35))


def exact_in(dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """x, rounded to bfloat16 in advance if an interpreted kernel would do so: the interpreter truncates, a GPU rounds.

    test_kernels_compiled checks in the compiled code that a GPU rounds to nearest.
    """
    return x.to(dtype).to(x.dtype) if dtype == torch.bfloat16 and DEVICE == "cpu" else x


@contextmanager
def poisoned() -> Iterator[None]:
    """Make `torch.empty` return NaN (255 in integers), so that elements a kernel fails to write show up."""
    original = torch.empty

    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        tensor.view(torch.uint8).fill_(255)
        return tensor

    with patch("torch.empty", poison):
        yield
