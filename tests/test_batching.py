"""Batches of one fixed size, whatever there is to do and whatever fits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dfengine.batching import PADDING, in_batches

CPU = torch.device("cpu")


@given(total=st.integers(0, 50), size=st.integers(1, 20))
def test_every_entry_once_in_batches_of_one_size(total: int, size: int) -> None:
    seen: list[torch.Tensor] = []
    done = list(in_batches(total, size, seen.append, CPU))
    assert {len(entries) for entries in seen} <= {min(size, total)}
    assert [int(e) for batch in seen for e in batch if e != PADDING] == list(range(total))
    assert done == [int((torch.cat(seen[: i + 1]) != PADDING).sum()) for i in range(len(seen))]


def test_out_of_memory_halves_the_batch_and_loses_nothing() -> None:
    seen: list[int] = []

    def work(entries: torch.Tensor) -> None:
        if len(entries) > 5:
            raise torch.OutOfMemoryError
        seen.extend(int(e) for e in entries if e != PADDING)

    assert list(in_batches(13, 12, work, CPU)) == [3, 6, 9, 12, 13]
    assert seen == list(range(13))


def test_one_entry_that_does_not_fit_is_an_error() -> None:
    def work(entries: torch.Tensor) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(3, 4, work, CPU))
