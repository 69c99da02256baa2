"""Values on their way into a file: held against the plan, copied, and rounded where it says so."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from dfengine.store.schema import Dataset


def as_planned(what: str, given: bool, planned: bool) -> None:
    """ValueError where something is given that the plan does not have, or the other way round."""
    if given != planned:
        raise ValueError(f"{what}: {'given, but not in the plan' if given else 'in the plan, but not given'}")


def checked(
    dataset: Dataset,
    size: Mapping[str, int],
    value: Any,
    where: Mapping[str, int],
    lengths: Mapping[str, int],
    mantissa_bits: int,
) -> np.ndarray:
    """A copy of a value as the file holds it; ValueError where its kind or shape is not the plan's.

    `size` has the dataset's axes, `where` the place on some of them, `lengths` the axes that are shorter there.
    """
    array = np.asarray(value)
    if not np.can_cast(array.dtype, dataset.dtype, "same_kind"):
        raise ValueError(f"{dataset.path} of type {array.dtype}: expected {np.dtype(dataset.dtype)}")
    expected = {axis: lengths.get(axis, length) for axis, length in size.items() if axis not in where}
    if array.shape != tuple(expected.values()):
        shape = f"{tuple(expected.values())}, {' × '.join(expected)}"
        raise ValueError(f"{dataset.path} of shape {array.shape}: expected {shape}")
    copied = np.array(array, dtype=dataset.dtype, order="C")
    return rounded(copied, mantissa_bits) if dataset.rounded else copied


def rounded(values: Float32[np.ndarray, " ..."], mantissa_bits: int) -> Float32[np.ndarray, " ..."]:
    """The nearest float32 with so many bits of mantissa, ties to even; infinities and NaN stay."""
    dropped = 23 - mantissa_bits
    raw = values.view(np.uint32)
    half = (1 << dropped >> 1) - (raw >> dropped & 1 ^ 1) * (dropped > 0)
    nearest = (raw + half.astype(np.uint32)) >> dropped << dropped
    return np.where(np.isfinite(values), nearest.view(np.float32), values)
