"""Batches of one fixed size, whatever there is to do and whatever fits."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfengine.runtime.batching import PADDING, AsyncHostCopy, in_batches


class Owner:
    """Whoever has a batch size."""

    device = torch.device("cpu")

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


@given(total=st.integers(0, 50), size=st.integers(1, 20))
def test_every_entry_once_in_batches_of_one_size(total: int, size: int) -> None:
    seen: list[tuple[torch.Tensor, range]] = []
    done = list(in_batches(total, Owner(size), lambda entries, known: seen.append((entries, known)) or len(seen)))
    assert {len(entries) for entries, _ in seen} <= {min(size, total)}
    assert [int(e) for batch, _ in seen for e in batch if e != PADDING] == list(range(total))
    assert [[e for e in batch.tolist() if e != PADDING] for batch, _ in seen] == [list(known) for _, known in seen]
    # Each batch comes with what was made of it.
    assert done == [(known, i) for i, (_, known) in enumerate(seen, 1)]


@pytest.mark.parametrize(
    "said",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory"),
        RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_halves_the_batch_for_good_and_loses_nothing(said: Exception) -> None:
    seen: list[int] = []
    owner = Owner(12)

    def work(entries: torch.Tensor, known: range) -> None:
        if len(entries) > 5:
            raise said
        assert known == range(len(seen), min(len(seen) + 3, 13))
        seen.extend(int(e) for e in entries if e != PADDING)

    assert [known.stop for known, _ in in_batches(13, owner, work)] == [3, 6, 9, 12, 13]
    assert seen == list(range(13))
    assert owner.batch_size == 3


def test_memory_that_a_failed_batch_held_is_free_when_the_next_begins() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work(entries: torch.Tensor, known: range) -> None:
        assert all(ref() is None for ref in held)
        activation = torch.zeros(len(entries))
        held.append(weakref.ref(activation))
        if len(entries) > 1:
            raise torch.OutOfMemoryError

    assert [known.stop for known, _ in in_batches(3, Owner(3), work)] == [1, 2, 3]
    assert len(held) == 4


@pytest.mark.parametrize(("error", "size"), [(torch.OutOfMemoryError, 1), (RuntimeError, 4), (ValueError, 4)])
def test_what_halving_cannot_help_is_an_error(error: type[Exception], size: int) -> None:
    def work(entries: torch.Tensor, known: range) -> None:
        raise error("of another kind")

    with pytest.raises(error, match="of another kind"):
        list(in_batches(4, Owner(size), work))


def test_a_batch_that_is_not_needed_is_passed_over() -> None:
    seen: list[range] = []
    done = in_batches(8, Owner(3), lambda entries, known: seen.append(known) or 1, lambda known: 4 not in known)
    assert list(done) == [(range(3), 1), (range(3, 6), None), (range(6, 8), 1)]
    assert seen == [range(3), range(6, 8)]


def test_a_download_without_a_gpu_is_the_tensors() -> None:
    tensors = [torch.ones(2), torch.zeros(3)]
    ours = AsyncHostCopy(*tensors, stream=None).wait()
    assert [part.data_ptr() for part in ours] == [part.data_ptr() for part in tensors]
