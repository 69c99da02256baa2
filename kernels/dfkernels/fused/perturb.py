"""`games.perturb` in Triton: a batch of perturbed latents in one pass over memory."""

from itertools import product

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dfkernels.fused.apply_masks import WARPS, tile
from dfkernels.fused.configuration import Configuration
from dfkernels.games import check_perturb


@triton.jit
def _perturb(
    latents, fill, ranks, rows, indices, out, h, w,
    FILL: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ, k] = fill[row, k, λ] where ranks[row, λ] < index·w, else latents[row, k, λ]; written channels-last."""
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = tl.load(rows + n).to(tl.int64)
    count = tl.load(indices + n).to(tl.int64) * w
    valid = (pixel < h * w) & (row >= 0)
    is_replaced = tl.load(ranks + row * (h * w) + pixel, mask=valid, other=0) < count

    latents += row * (C * h * w)
    fill += row * (C * h * w)
    out += n.to(tl.int64) * (C * h * w)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        inside = valid & (channel < C)
        offset = channel * (h * w) + pixel
        # Reading both is cheaper than selecting: entries of a row share them in the cache, and loads stay vectorised.
        x = tl.load(latents + offset, mask=inside, other=0.0)
        replacement = tl.load(fill + offset, mask=inside, other=0.0) if FILL else 0.0
        x = tl.where(is_replaced, replacement, x)
        tl.store(out + pixel * C + channel, x.to(out.dtype.element_ty), mask=(pixel < h * w) & (channel < C))


def perturb(
    latents: Float[Tensor, "r c h w"],
    ranks: Int[Tensor, "r h w"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    fill: Float[Tensor, "r c h w"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """`games.perturb`, bit for bit."""
    check_perturb(latents, ranks, fill)
    _, c, h, w = latents.shape
    out = torch.empty(
        (len(rows), c, h, w),
        dtype=dtype or latents.dtype,
        device=latents.device,
        memory_format=torch.channels_last,
    )
    inputs = (x.contiguous() for x in (latents, latents if fill is None else fill, ranks, rows, indices))
    blocks = tile(c, h * w)
    _perturb[(len(rows) * triton.cdiv(h * w, blocks["BLOCK"]),)](
        *inputs, out, h, w, FILL=fill is not None, C=c, **blocks, num_warps=WARPS
    )
    return out


def configurations() -> list[Configuration]:
    """With and without fill, every dtype and channel count, and sides of one pixel, which Triton makes constants."""

    def config(latents: str, out: str, fill: bool, c: int, **fixed: int) -> Configuration:
        pointers = {"latents": latents, "fill": latents, "ranks": "i32", "rows": "i64", "indices": "i64", "out": out}
        types = {name: f"*{type_}:16" for name, type_ in pointers.items()} | {"h": "i32:16", "w": "i32:16"}
        runtime = {name: type_ for name, type_ in types.items() if name not in fixed}
        return Configuration(_perturb, runtime, {"FILL": fill, "C": c, **tile(c, 4096), **fixed}, WARPS)

    return [
        *(config("fp32", out, fill, 4) for fill, out in product((True, False), ("bf16", "fp16", "fp32"))),
        *(config("fp16", "fp16", True, c) for c in (1, 3, 4, 16, 33)),
        config("fp32", "fp16", True, 1, h=1, w=1),
    ]
