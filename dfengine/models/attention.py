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
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Compute capability from which cuDNN's attention is the fastest.
_HOPPER = (9, 0)
#: In a kernel's grid y and z end here; xformers counts heads · batch along one of them.
_MOST_BLOCKS = 65535


@dataclass(frozen=True)
class Attention:
    """A backend that can run here: `with attention.chosen(): … attention.attend(q, k, v)`."""

    name: str
    attend: Attend = F.scaled_dot_product_attention
    order: tuple[SDPBackend, ...] = ()
    """torch's kernels, those to try first first; empty leaves the order to torch"""

    def chosen(self) -> AbstractContextManager[None]:
        """While inside, torch tries its kernels in this backend's order."""
        return sdpa_kernel(list(self.order), set_priority=True) if self.order else nullcontext()


def attention(backend: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """The backend of a name. "auto" is cuDNN's on Hopper and newer in half precision, otherwise torch's own choice.

    Raises ValueError for one that is not known or cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention {backend!r} is not known: expected one of {', '.join(BACKENDS)}")
    half = dtype in (torch.float16, torch.bfloat16)
    if backend == "auto":
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
        backend = "cudnn" if hopper and half and torch.backends.cudnn.is_available() else "sdpa"
    if backend == "sdpa":
        return Attention("sdpa")
    if device.type != "cuda":
        raise ValueError(f"attention {backend!r} needs a CUDA device, and this is {device.type}: use 'auto'")
    if backend == "cudnn":
        if not half:
            raise ValueError(f"attention 'cudnn' computes in half precision, not in {dtype}: use 'auto' or float16")
        kernels = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        )
        return Attention("cudnn", order=kernels)
    if importlib.util.find_spec("xformers") is None:
        raise ValueError("xformers is not installed: pip install 'dfengine[xformers]', or use attention 'auto'")
    from xformers.ops import memory_efficient_attention

    return Attention("xformers", in_parts(memory_efficient_attention))


def in_parts(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], most: int = _MOST_BLOCKS) -> Attend:
    """A kernel of [b, s, heads, d], called on at most so many heads in all at a time."""

    def attend(
        q: Float[Tensor, "b heads s d"], k: Float[Tensor, "b heads t d"], v: Float[Tensor, "b heads t d"]
    ) -> Float[Tensor, "b heads s d"]:
        size = max(1, most // q.shape[1])
        parts = zip(*(part.transpose(1, 2).split(size) for part in (q, k, v)), strict=True)
        return torch.cat([kernel(*part) for part in parts]).transpose(1, 2)

    return attend


def watched(watch: AttentionHook, grids: Mapping[int, tuple[int, int]]) -> Attend:
    """Attention as its formula, so that `watch` sees the probabilities; `grids` has the grid of each number of queries.

    softmax(Q Kᵀ / √d) V
    """

    def attend(
        q: Float[Tensor, "b heads s d"], k: Float[Tensor, "b heads t d"], v: Float[Tensor, "b heads t d"]
    ) -> Float[Tensor, "b heads s d"]:
        # The queries are scaled, not the products: those may be beyond float16.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return watch(scores.softmax(-1), grids[q.shape[2]]) @ v

    return attend
