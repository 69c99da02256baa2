"""Batches of one fixed size, for any number of entries and any available memory."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfengine.runtime.batching import PADDING, AsyncHostCopy, in_batches


class Owner:
    """Something with a batch size and a device."""

    device = torch.device("cpu")

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


@pytest.mark.slow
@given(total=st.integers(0, 50), size=st.integers(1, 20))
def test_every_entry_once_in_batches_of_one_size(total: int, size: int) -> None:
    calls: list[tuple[torch.Tensor, range]] = []
    results = list(in_batches(total, Owner(size), lambda entries, batch: calls.append((entries, batch)) or len(calls)))
    assert {len(entries) for entries, _ in calls} <= {min(size, total)}
    assert [int(e) for entries, _ in calls for e in entries if e != PADDING] == list(range(total))
    assert [[e for e in entries.tolist() if e != PADDING] for entries, _ in calls] == [
        list(batch) for _, batch in calls
    ]
    # Each batch is yielded with its result.
    assert results == [(batch, i) for i, (_, batch) in enumerate(calls, 1)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_halves_the_batch_permanently_and_loses_no_entry(error: Exception) -> None:
    processed: list[int] = []
    owner = Owner(12)

    def work(entries: torch.Tensor, batch: range) -> None:
        if len(entries) > 5:
            raise error
        assert batch == range(len(processed), min(len(processed) + 3, 13))
        processed.extend(int(e) for e in entries if e != PADDING)

    assert [batch.stop for batch, _ in in_batches(13, owner, work)] == [3, 6, 9, 12, 13]
    assert processed == list(range(13))
    assert owner.batch_size == 3


def test_memory_of_a_failed_batch_is_free_before_the_next_one() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(entries: torch.Tensor, batch: range) -> None:
        assert all(ref() is None for ref in held)
        activation = torch.zeros(len(entries))
        held.append(weakref.ref(activation))
        if len(entries) > 1:
            raise torch.OutOfMemoryError

    assert [batch.stop for batch, _ in in_batches(3, Owner(3), work)] == [1, 2, 3]
    assert len(held) == 4


@pytest.mark.parametrize(("error", "size"), [(torch.OutOfMemoryError, 1), (RuntimeError, 4), (ValueError, 4)])
def test_other_errors_and_batches_of_one_are_reraised(error: type[Exception], size: int) -> None:
    def work(entries: torch.Tensor, batch: range) -> None:
        raise error("not memory, or no smaller batch")

    with pytest.raises(error, match="not memory, or no smaller batch"):
        list(in_batches(4, Owner(size), work))


def test_batches_that_are_not_needed_are_skipped() -> None:
    calls: list[range] = []
    results = in_batches(8, Owner(3), lambda entries, batch: calls.append(batch) or 1, lambda batch: 4 not in batch)
    assert list(results) == [(range(3), 1), (range(3, 6), None), (range(6, 8), 1)]
    assert calls == [range(3), range(6, 8)]


def test_a_host_copy_without_a_gpu_returns_the_tensors_themselves() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    ours = AsyncHostCopy(*tensors, stream=None).wait()
    assert [part.data_ptr() for part in ours] == [part.data_ptr() for part in tensors]
