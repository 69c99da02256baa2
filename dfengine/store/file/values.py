"""Values on their way into a file: checked against the plan, copied, and rounded where the schema says so."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from dfengine.store.file.schema import Dataset


def check_presence(what: str, is_given: bool, is_planned: bool) -> None:
    """Raises ValueError if something is given that is not in the plan, or the other way round."""
    if is_given != is_planned:
        raise ValueError(f"{what}: {'given, but not in the plan' if is_given else 'in the plan, but not given'}")


def checked_copy(
    dataset: Dataset,
    size: Mapping[str, int],
    value: Any,
    where: Mapping[str, int],
    lengths: Mapping[str, int],
    mantissa_bits: int,
) -> np.ndarray:
    """A copy of a value as the file stores it. Raises ValueError if its type or shape does not match the plan.

    `size` holds the lengths of the dataset's axes, `where` the indices on some of them, and `lengths` replaces those
    that are shorter at this place.
    """
    array = np.asarray(value)
    if not np.can_cast(array.dtype, dataset.dtype, "same_kind"):
        raise ValueError(f"{dataset.path} has type {array.dtype}: expected {np.dtype(dataset.dtype)}")
    expected = {axis: lengths.get(axis, length) for axis, length in size.items() if axis not in where}
    if array.shape != tuple(expected.values()):
        shape = f"{tuple(expected.values())}, {' × '.join(expected)}"
        raise ValueError(f"{dataset.path} has shape {array.shape}: expected {shape}")
    copy = np.array(array, dtype=dataset.dtype, order="C")
    return round_mantissa(copy, mantissa_bits) if dataset.rounded else copy


def round_mantissa(values: Float32[np.ndarray, " ..."], bits: int) -> Float32[np.ndarray, " ..."]:
    """The nearest float32 with so many bits of mantissa, ties to even. Infinities and NaN are unchanged."""
    dropped = 23 - bits
    raw = values.view(np.uint32)
    half = (1 << dropped >> 1) - (raw >> dropped & 1 ^ 1) * (dropped > 0)
    nearest = (raw + half.astype(np.uint32)) >> dropped << dropped
    return np.where(np.isfinite(values), nearest.view(np.float32), values)
