"""The public operations: the reference implementations, replaced by Triton kernels for tensors on a GPU.

Triton is imported on the first call with GPU tensors, not before.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from dfkernels import designs, estimators, games, reference
from dfkernels.distribution import MaskDistribution

P = ParamSpec("P")
T = TypeVar("T")

#: The lowest compute capability that Triton supports.
MIN_CAPABILITY = (8, 0)
#: The largest RISE grid that fits into a kernel's shared memory.
MAX_RISE_GRID = 32


def with_fused(operation: Callable[P, T], module: str) -> Callable[P, T]:
    """Wrap a reference operation: on a GPU the function of the same name in dfkernels.fused.<module> runs instead."""

    @wraps(operation)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> T:
        device = fused_device(args, kwargs)
        kernels = load_fused(module) if device is not None else None
        if kernels is None:
            return operation(*args, **kwargs)
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device):
            return getattr(kernels, operation.__name__)(*args, **kwargs)

    return dispatched


def fused_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The GPU to launch a call's kernel on, or None if the reference has to compute it.

    The reference computes whatever needs gradients and RISE masks with a grid too large for shared memory.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    grids = [one.grid for one in (*args, *kwargs.values()) if isinstance(one, MaskDistribution) and one.kind == "rise"]
    if needs_gradient or max(grids, default=0) > MAX_RISE_GRID or not supports_triton(device):
        return None
    return device


@cache
def supports_triton(device: torch.device) -> bool:
    """Whether Triton can run on a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def runs_fused(device: torch.device) -> bool:
    """Whether operations on a device's tensors run as Triton kernels: it supports Triton, and Triton is installed."""
    return supports_triton(device) and importlib.util.find_spec("triton") is not None


@cache
def load_fused(module: str) -> ModuleType | None:
    """Import dfkernels.fused.<module>. Without Triton: None, and a warning the first time."""
    if importlib.util.find_spec("triton") is None:
        warn_without_triton()
        return None
    return importlib.import_module(f"dfkernels.fused.{module}")


@cache
def warn_without_triton() -> None:
    warnings.warn(
        "triton is not installed, so masks and scores are computed by the slower reference: pip install triton",
        RuntimeWarning,
        stacklevel=4,
    )


apply_masks = with_fused(designs.apply_masks, "apply_masks")
draw_masks = with_fused(designs.draw_masks, "apply_masks")
masks = with_fused(designs.masks, "apply_masks")
perturb = with_fused(games.perturb, "perturb")
similarity = with_fused(reference.similarity, "similarity")
add = with_fused(estimators.add, "accumulate")
accumulate = with_fused(estimators.accumulate, "accumulate")
ridge = with_fused(estimators.ridge, "ridge")
