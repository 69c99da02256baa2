"""Batches of one size, halved where they do not fit, and what comes back from the device while it works on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

log = logging.getLogger(__name__)

#: Stands in a batch where there is no entry left: the tail is padded, never shorter.
PADDING = -1
#: What a failed allocation says of itself where it has no exception of its own.
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")

T = TypeVar("T")


@runtime_checkable
class Batched(Protocol):
    """Whoever's forwards come in batches; a denoiser is one."""

    batch_size: int
    device: torch.device


def in_batches(
    total: int,
    owner: Batched,
    work: Callable[[Int[Tensor, " size"], range], T],
    needed: Callable[[range], bool] | None = None,
) -> Iterator[tuple[range, T | None]]:
    """Call `work` on the entries 0 … total − 1, a batch at a time, the tail padded; yields each batch and its result.

    `work` is given the entries twice: on the device, padded to one size for all batches, and as a range, of which the
    host knows all without asking the device. When a batch does not fit into memory the owner's batch size is halved,
    for good, and that batch is done again: `work` must change nothing, which is for whoever is given the result. A
    batch for which `needed` is false is passed over, so that the others stay as they are; its result is None.
    """
    done = 0
    while done < total:
        size = min(owner.batch_size, total)
        known = range(done, min(done + size, total))
        result = None
        if needed is None or needed(known):
            entries = torch.arange(done, done + size, device=owner.device)
            fits, result = run_or_halve_batch(
                owner, size, partial(work, torch.where(entries < total, entries, PADDING), known)
            )
            if not fits:
                continue
        done = known.stop
        yield known, result


def run_or_halve_batch(owner: Batched, size: int, work: Callable[[], T]) -> tuple[bool, T | None]:
    """Do some work on `size` entries: (True, its result). Where memory does not suffice, halve the owner's batch size.

    Raises what the allocator raised where there is nothing left to halve.
    """
    try:
        return True, work()
    except RuntimeError as error:
        if size == 1 or not is_out_of_memory(error):
            raise
    # Only here, where the exception has let go of the tensors that its frames held.
    owner.batch_size = size // 2
    log.info("a batch of %d does not fit into memory: going on with %d", size, owner.batch_size)
    if owner.device.type == "cuda":
        torch.cuda.empty_cache()
    return False, None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is memory that an operation lacked."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


class AsyncHostCopy:
    """Tensors on their way to the CPU: through pinned memory, on a stream of their own, while the device works on."""

    def __init__(self, *tensors: Tensor, stream: torch.cuda.Stream | None) -> None:
        """`stream` is None where there is no GPU, and nothing is copied that is on the CPU already."""
        self._arrived: torch.cuda.Event | None = None
        if stream is None:
            self._tensors = [tensor.cpu() for tensor in tensors]
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._tensors = []
            for tensor in tensors:
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._tensors.append(host.copy_(tensor, non_blocking=True))
                tensor.record_stream(stream)
            self._arrived = stream.record_event()

    def wait(self) -> list[Tensor]:
        """The tensors, once they are here, in ordinary memory: what is pinned serves the next download."""
        if self._arrived is None:
            return self._tensors
        self._arrived.synchronize()
        return [tensor.clone() for tensor in self._tensors]
