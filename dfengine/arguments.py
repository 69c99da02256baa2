"""The arguments of `Engine` and its methods, checked before a model is read or anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import dfengine.checks as checks
from dfengine.models.attention import BACKENDS
from dfengine.models.loading import DTYPES
from dfengine.store.file.template import COMPRESSIONS


def check_arguments(**arguments: Any) -> None:
    """Raise ValueError for an argument that no model can work with; None stands for a default."""
    for name, value in arguments.items():
        if value is not None:
            _CHECKS[name](name, value)


def _dtype(name: str, value: Any) -> None:
    if not isinstance(value, torch.dtype):
        checks.one_of(name, value, DTYPES)


def _path(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise checks.mistake(name, value, "a path")


def _name(name: str, value: Any) -> None:
    if not checks.text(name, value).strip():
        raise checks.mistake(name, value, "a name")


def _function(name: str, value: Any) -> None:
    if not callable(value):
        raise checks.mistake(name, value, "a function")


_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "attention": partial(checks.one_of, choices=BACKENDS),
    "batch_size": checks.whole_number,
    "compile": checks.switch,
    "compression": partial(checks.one_of, choices=COMPRESSIONS),
    "dtype": _dtype,
    "guidance": checks.finite_number,
    "image_size": checks.size,
    "mantissa_bits": partial(checks.whole_number, low=1, high=23),
    "model": _path,
    "on_event": _function,
    "out": _path,
    "overwrite": checks.switch,
    "previews": checks.switch,
    "progress": checks.switch,
    "random_weights": checks.switch,
    "revision": _name,
    "variant": _name,
}
