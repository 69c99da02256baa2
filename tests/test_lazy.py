"""Arrays of a file behave as arrays of NumPy that cannot be written to."""

from pathlib import Path

import numpy as np
import pytest
from store_example import PLAN, fill

from dfengine import store


@pytest.fixture
def both(tmp_path: Path):
    """A lazy array, and the same as an array."""
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        fill(writer)
    with store.open(tmp_path / "run.h5") as run:
        lazy = run[0].maps["random"]
        yield lazy, lazy[...]


@pytest.mark.parametrize("name", ["mean", "max", "min", "sum", "std", "argmax", "flatten", "tolist", "copy", "any"])
def test_methods(both, name: str) -> None:
    lazy, array = both
    np.testing.assert_array_equal(getattr(lazy, name)(), getattr(array, name)())


def test_methods_take_arguments(both) -> None:
    lazy, array = both
    np.testing.assert_array_equal(lazy.mean(axis=(1, 2)), array.mean(axis=(1, 2)))
    np.testing.assert_array_equal(lazy.astype(np.float64).reshape(3, -1), array.astype(np.float64).reshape(3, -1))
    np.testing.assert_array_equal(lazy.T, array.T)


def test_attributes_are_known_without_reading(both, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, array = both
    monkeypatch.setattr(type(lazy), "__getitem__", None)
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.size, len(lazy)) == (
        array.shape, array.dtype, array.ndim, array.size, len(array)
    )  # fmt: skip


def test_arithmetic_and_functions(both) -> None:
    lazy, array = both
    for result, expected in (
        (lazy * 2 + 1, array * 2 + 1),
        (1 - lazy, 1 - array),
        (lazy - lazy, array - array),
        (array + lazy, 2 * array),
        (lazy > 0.5, array > 0.5),
        (-lazy, -array),
        (np.sqrt(abs(lazy)), np.sqrt(abs(array))),
        (np.add.reduce(lazy), np.add.reduce(array)),
        (np.mean(lazy, axis=0), array.mean(0)),
        (np.stack([lazy, lazy]), np.stack([array, array])),
        (np.asarray(lazy, dtype=np.float64), array.astype(np.float64)),
    ):
        np.testing.assert_array_equal(result, expected)
        assert isinstance(result, np.ndarray)


def test_it_cannot_be_written_to(both) -> None:
    """What would change a copy unnoticed raises an error."""
    lazy, array = both
    with pytest.raises(TypeError):
        lazy += 1
    with pytest.raises(TypeError):
        np.add(array, 1, out=lazy)
    for method in (lambda: lazy.sort(), lambda: lazy.fill(0)):
        with pytest.raises(ValueError, match="read-only"):
            method()
    with pytest.raises(AttributeError, match="'means' is no attribute"):
        lazy.means()
