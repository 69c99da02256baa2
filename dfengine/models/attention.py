"""Scaled dot-product attention by one of several backends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfengine.diffusion.denoiser import AttentionHook

BACKENDS = ("auto", "sdpa", "cudnn", "xformers")

#: (q [b, heads, s, d], k and v [b, heads, t, d]) → [b, heads, s, d]
AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Compute capability from which cuDNN's attention is the fastest.
_HOPPER = (9, 0)
#: Largest size of a CUDA grid along y and z; xformers launches heads · batch blocks along one of them.
_MAX_BLOCKS = 65535


@dataclass(frozen=True)
class AttentionBackend:
    """A backend that can run here: `with backend.activated(): … backend.attend(q, k, v)`."""

    name: str
    attend: AttentionFunction = F.scaled_dot_product_attention
    priority: tuple[SDPBackend, ...] = ()
    """torch's kernels in the order in which they are tried; empty for torch's own choice"""

    def activated(self) -> AbstractContextManager[None]:
        """A context in which torch tries its kernels in this backend's order."""
        return sdpa_kernel(list(self.priority), set_priority=True) if self.priority else nullcontext()


def attention_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend of a name. "auto" is cuDNN in half precision on Hopper and newer GPUs, otherwise torch's own choice.

    Raises ValueError for an unknown name, or a backend that cannot run on the device in this dtype.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention {name!r} is not known: expected one of {', '.join(BACKENDS)}")
    is_half = dtype in (torch.float16, torch.bfloat16)
    if name == "auto":
        is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
        name = "cudnn" if is_hopper and is_half and torch.backends.cudnn.is_available() else "sdpa"
    if name == "sdpa":
        return AttentionBackend("sdpa")
    if device.type != "cuda":
        raise ValueError(f"attention {name!r} needs a CUDA device, but the device is {device.type}: use 'auto'")
    if name == "cudnn":
        if not is_half:
            raise ValueError(f"attention 'cudnn' needs half precision, but the dtype is {dtype}: use 'auto' or float16")
        kernels = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        )
        return AttentionBackend("cudnn", priority=kernels)
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("xformers is not installed: pip install 'dfengine[xformers]', or use attention 'auto'")
    from xformers.ops import memory_efficient_attention

    return AttentionBackend("xformers", split_heads(memory_efficient_attention))


def split_heads(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], max_heads: int = _MAX_BLOCKS) -> AttentionFunction:
    """A kernel of [b, s, heads, d], called on at most `max_heads` heads of the batch at a time."""

    def attend(
        q: Float[Tensor, "b heads s d"], k: Float[Tensor, "b heads t d"], v: Float[Tensor, "b heads t d"]
    ) -> Float[Tensor, "b heads s d"]:
        size = max(1, max_heads // q.shape[1])
        parts = zip(*(part.transpose(1, 2).split(size) for part in (q, k, v)), strict=True)
        return torch.cat([kernel(*part) for part in parts]).transpose(1, 2)

    return attend


def hooked_attention(hook: AttentionHook, grids: Mapping[int, tuple[int, int]]) -> AttentionFunction:
    """softmax(Q Kᵀ / √d) V, with the probabilities passed through `hook`.

    `grids` has the (height, width) of the feature map for each number of queries.
    """

    def attend(
        q: Float[Tensor, "b heads s d"], k: Float[Tensor, "b heads t d"], v: Float[Tensor, "b heads t d"]
    ) -> Float[Tensor, "b heads s d"]:
        # Scaling the queries rather than the products keeps the products within float16.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return hook(scores.softmax(-1), grids[q.shape[2]]) @ v

    return attend
