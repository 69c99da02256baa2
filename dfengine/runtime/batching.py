"""Batches of a fixed size that are halved when memory runs out, and copies to the CPU that overlap with computation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

log = logging.getLogger(__name__)

#: The entry that fills up the last batch, so that all batches have the same size.
PADDING = -1
#: Messages of failed allocations that do not raise torch.OutOfMemoryError.
_OUT_OF_MEMORY_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")

T = TypeVar("T")


@runtime_checkable
class Batched(Protocol):
    """Anything with a batch size and a device; denoisers are."""

    batch_size: int
    device: torch.device


def in_batches(
    total: int,
    owner: Batched,
    work: Callable[[Int[Tensor, " size"], range], T],
    is_needed: Callable[[range], bool] | None = None,
) -> Iterator[tuple[range, T | None]]:
    """Call `work` on entries 0 … total − 1 in batches, and yield each batch's range and result.

    `work` receives a batch twice: as a tensor on the device, padded to the common size, and as a range, which the host
    can read without synchronising. If a batch does not fit into memory, the owner's batch size is halved permanently
    and the batch is repeated, so `work` must not have side effects; the caller applies its results. Batches for which
    `is_needed` is false are skipped, with None as their result, without changing how the others are formed.
    """
    start = 0
    while start < total:
        size = min(owner.batch_size, total)
        batch = range(start, min(start + size, total))
        result = None
        if is_needed is None or is_needed(batch):
            entries = torch.arange(start, start + size, device=owner.device)
            padded = torch.where(entries < total, entries, PADDING)
            fits, result = run_or_halve_batch(owner, size, partial(work, padded, batch))
            if not fits:
                continue
        start = batch.stop
        yield batch, result


def run_or_halve_batch(owner: Batched, size: int, work: Callable[[], T]) -> tuple[bool, T | None]:
    """(True, the result of `work` on `size` entries), or (False, None) after halving the owner's batch size.

    Reraises the allocator's error if `size` is 1.
    """
    try:
        return True, work()
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    # Outside the except clause, because the exception keeps the tensors of its frames alive.
    owner.batch_size = size // 2
    log.info("a batch of %d does not fit into memory: continuing with %d", size, owner.batch_size)
    if owner.device.type == "cuda":
        torch.cuda.empty_cache()
    return False, None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error reports a failed allocation."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(message in str(error) for message in _OUT_OF_MEMORY_MESSAGES)


class AsyncHostCopy:
    """Copies of tensors to the CPU, through pinned memory on a separate stream while the device continues."""

    def __init__(self, *tensors: Tensor, stream: torch.cuda.Stream | None) -> None:
        """Start the copies. Without a GPU `stream` is None, and tensors on the CPU are not copied."""
        self._copied: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._tensors = []
            for tensor in tensors:
                pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._tensors.append(pinned.copy_(tensor, non_blocking=True))
                tensor.record_stream(stream)
            self._copied = stream.record_event()

    def wait(self) -> list[Tensor]:
        """The copied tensors, in ordinary memory, so that the pinned memory can be reused."""
        if self._copied is None:
            return self._tensors
        self._copied.synchronize()
        return [tensor.clone() for tensor in self._tensors]
