"""Fixed-size batches: one shape, and so one set of kernels, serves every forward of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

#: Stands in a batch where there is no entry left: the tail is padded, never shorter.
PADDING = -1


def in_batches(
    total: int,
    size: int,
    work: Callable[[Int[Tensor, " size"]], None],
    device: torch.device,
    needed: Callable[[int, int], bool] | None = None,
) -> Iterator[int]:
    """Call `work` on the entries 0 … total − 1, `size` at a time, the tail padded; yields how many are done.

    When a batch does not fit into the device's memory the size is halved and that batch is done again: `work` must
    leave nothing half done when it fails. A batch for which `needed(first, last + 1)` is false is passed over, so that
    the others stay as they are.
    """
    size, done = min(size, total), 0
    while done < total:
        entries = torch.arange(done, done + size, device=device)
        try:
            if needed is None or needed(done, min(done + size, total)):
                work(torch.where(entries < total, entries, PADDING))
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = size // 2
            torch.cuda.empty_cache()
            continue
        done = min(done + size, total)
        yield done
