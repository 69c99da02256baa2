"""What the tests of the kernels share: where they run, odd shapes, and memory that is not clean."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

#: A GPU where there is one; elsewhere the kernels are interpreted (see conftest).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: h, w: neither powers of two nor square, one pixel, one row, one column, and a whole tile and a bit.
ODD_SHAPES = ((7, 13), (1, 1), (1, 9), (5, 1), (33, 35))


def exact_in(dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """x where a kernel's rounding to `dtype` can be told; for bfloat16 in the interpreter, which cuts off where a GPU
    rounds to nearest, x rounded already. (That a GPU does so is read off the compiled code: test_kernels_compiled.)
    """
    return x.to(dtype).to(x.dtype) if dtype == torch.bfloat16 and DEVICE == "cpu" else x


@contextmanager
def poisoned() -> Iterator[None]:
    """While this lasts, `torch.empty` hands out NaN (255 as an integer): what a kernel forgets to write is seen."""
    clean = torch.empty

    def poison(*args: object, **kwargs: object) -> torch.Tensor:
        fresh = clean(*args, **kwargs)
        if fresh.is_floating_point():
            return fresh.fill_(torch.nan)
        fresh.view(torch.uint8).fill_(255)
        return fresh

    with patch("torch.empty", poison):
        yield
