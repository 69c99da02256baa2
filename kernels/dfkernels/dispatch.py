"""The public operations: the reference's own, run by Triton where their tensors are on a GPU.

Nothing of Triton is imported before the first call on a GPU.
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

from dfkernels import estimators, games, reference

P = ParamSpec("P")
T = TypeVar("T")

#: What Triton supports, by compute capability.
OLDEST_CAPABILITY = (8, 0)
#: The largest grid of a RISE mask that a kernel keeps in shared memory.
MAX_GRID = 32


def on_gpu(operation: Callable[P, T], module: str) -> Callable[P, T]:
    """A reference operation, in whose stead the one of its name in dfkernels.fused.<module> runs where it can."""

    @wraps(operation)
    def either(*args: P.args, **kwargs: P.kwargs) -> T:
        device = kernel_device(args, kwargs)
        kernels = load(module) if device is not None else None
        if kernels is None:
            return operation(*args, **kwargs)
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(device):
            return getattr(kernels, operation.__name__)(*args, **kwargs)

    return either


def kernel_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The GPU that a call's tensors are on, or None where the reference has to serve.

    It serves what needs gradients, and grids of RISE masks beyond a kernel's shared memory, on any device.
    """
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    device = tensors[0].device if tensors else torch.device(kwargs.get("device") or torch.get_default_device())
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if differentiated or kwargs.get("grid", 0) > MAX_GRID or not serves(device):
        return None
    return device


@cache
def serves(device: torch.device) -> bool:
    """Whether Triton can run on a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


def runs_fused(device: torch.device) -> bool:
    """Whether operations on a device's tensors are Triton's: it can run there and is installed."""
    return serves(device) and importlib.util.find_spec("triton") is not None


@cache
def load(module: str) -> ModuleType | None:
    """dfkernels.fused.<module>, or None, with a warning the first time, where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        warn_once()
        return None
    return importlib.import_module(f"dfkernels.fused.{module}")


@cache
def warn_once() -> None:
    warnings.warn(
        "triton is not installed, so that masks and scores are computed by the slower reference: pip install triton",
        RuntimeWarning,
        stacklevel=4,
    )


blend = on_gpu(reference.blend, "blend")
draw = on_gpu(reference.draw, "blend")
masks = on_gpu(reference.masks, "blend")
erase = on_gpu(games.erase, "erase")
similarity = on_gpu(reference.similarity, "similarity")
add = on_gpu(estimators.add, "accumulate")
accumulate = on_gpu(estimators.accumulate, "accumulate")
ridge = on_gpu(estimators.ridge, "ridge")
