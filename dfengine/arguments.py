"""The arguments of `Engine` and its methods, checked before a model is read or anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import dfengine.checks as checks
from dfengine.diffusion.job import Job
from dfengine.explain import Explainer
from dfengine.explain.registry import PRESETS, entries
from dfengine.models.attention import BACKENDS
from dfengine.models.loading import DTYPES
from dfengine.store.file.template import COMPRESSIONS


def check_arguments(**arguments: Any) -> None:
    """Raise ValueError for an argument that is not possible, whatever the model."""
    for name, value in arguments.items():
        if value is not None or name not in _OPTIONAL:
            _CHECKS[name](name, value)


def _dtype(name: str, value: Any) -> None:
    if not isinstance(value, torch.dtype):
        checks.one_of(name, value, DTYPES)


def _device(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
        raise checks.mistake(name, value, "cpu, cuda, cuda:0 … or mps")


def _list(name: str, value: Any) -> None:
    if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable):
        raise checks.mistake(name, value, "a list")


def _jobs(name: str, value: Any) -> None:
    if not isinstance(value, Sequence) or not all(isinstance(one, Job) for one in value):
        raise checks.mistake(name, value, "a list of jobs")


def _explainers(name: str, value: Any) -> None:
    several = [value] if isinstance(value, str | Explainer) else value
    if not isinstance(several, Sequence):
        raise checks.mistake(name, value, "explainers, such as Rise()")
    for one in several:
        if not isinstance(one, Explainer | str):  # an unknown name is refused where it is looked up
            raise checks.mistake(name, one, f"explainers, such as Rise(), or their names: {', '.join(entries())}")


def _maps(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value):
        raise checks.mistake(name, value, "arrays by their names")
    for method, array in value.items():
        given = np.asarray(array)
        if given.dtype.kind not in "fiu" or given.ndim != 3:
            raise checks.mistake(f"{name} of {method}", array, "an array (images, height, width)")


def _features(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike) and not callable(value):
        raise checks.mistake(name, value, "a path or a function")


def _path(name: str, value: Any) -> None:
    if not isinstance(value, str | os.PathLike):
        raise checks.mistake(name, value, "a path")


def _name(name: str, value: Any) -> None:
    if not checks.text(name, value).strip():
        raise checks.mistake(name, value, "a name")


def _function(name: str, value: Any) -> None:
    if not callable(value):
        raise checks.mistake(name, value, "a function")


#: Arguments that may be None.
_OPTIONAL = {
    *("batch_size", "compile", "dtype", "guidance", "image_size", "num_masks", "num_samples", "on_event", "out"),
    *("device", "features", "maps", "progress", "revision", "variant"),
}
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "attention": partial(checks.one_of, choices=BACKENDS),
    "batch_size": partial(checks.whole_number, low=1, high=2**31 - 1),
    "compile": checks.switch,
    "compression": partial(checks.one_of, choices=COMPRESSIONS),
    "device": _device,
    "dtype": _dtype,
    "explainers": _explainers,
    "features": _features,
    "gamma": checks.finite_number,
    "guidance": checks.finite_number,
    "image_size": checks.size,
    "mantissa_bits": partial(checks.whole_number, low=1, high=23),
    "jobs": _jobs,
    "maps": _maps,
    "methods": _list,
    "model": _path,
    "num_masks": partial(checks.whole_number, low=1, high=2**24),
    "num_samples": partial(checks.whole_number, low=2, high=2**24),
    "num_seeds": partial(checks.whole_number, low=1, high=10**6),
    "num_steps": partial(checks.whole_number, low=1, high=2**31 - 1),
    "on_event": _function,
    "on_progress": _function,
    "out": _path,
    "overwrite": checks.switch,
    "preset": partial(checks.one_of, choices=PRESETS),
    "previews": checks.switch,
    "progress": checks.switch,
    "random_weights": checks.switch,
    "revision": _name,
    "seed": partial(checks.whole_number, low=0, high=2**63 - 1),
    "variant": _name,
}
