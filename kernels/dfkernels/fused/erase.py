"""`games.erase` in Triton: a batch of perturbed latents in one pass."""

from itertools import product

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dfkernels.fused.blend import WARPS, tile
from dfkernels.fused.configuration import Configuration
from dfkernels.games import check_erase


@triton.jit
def _erase(
    latents, fill, ranks, rows, indices, out, h, w,
    FILL: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ, k] = fill[row, k, λ] where ranks[row, λ] < index·w, else latents[row, k, λ]; written channels-last."""
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[:, None]
    row = tl.load(rows + n).to(tl.int64)
    count = tl.load(indices + n).to(tl.int64) * w
    real = (pixel < h * w) & (row >= 0)
    erased = tl.load(ranks + row * (h * w) + pixel, mask=real, other=0) < count

    latents += row * (C * h * w)
    fill += row * (C * h * w)
    out += n.to(tl.int64) * (C * h * w)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        inside = real & (channel < C)
        at = channel * (h * w) + pixel
        # Both are read, which is the cheaper: a row's entries share them in the cache, and whole vectors are loaded.
        x = tl.load(latents + at, mask=inside, other=0.0)
        end = tl.load(fill + at, mask=inside, other=0.0) if FILL else 0.0
        x = tl.where(erased, end, x)
        tl.store(out + pixel * C + channel, x.to(out.dtype.element_ty), mask=(pixel < h * w) & (channel < C))


def erase(
    latents: Float[Tensor, "r c h w"],
    ranks: Int[Tensor, "r h w"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    fill: Float[Tensor, "r c h w"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """As `games.erase`, whose bits it gives."""
    check_erase(latents, ranks, fill)
    _, c, h, w = latents.shape
    out = torch.empty(
        (len(rows), c, h, w),
        dtype=dtype or latents.dtype,
        device=latents.device,
        memory_format=torch.channels_last,
    )
    inputs = (x.contiguous() for x in (latents, latents if fill is None else fill, ranks, rows, indices))
    blocks = tile(c, h * w)
    _erase[(len(rows) * triton.cdiv(h * w, blocks["BLOCK"]),)](
        *inputs, out, h, w, FILL=fill is not None, C=c, **blocks, num_warps=WARPS
    )
    return out


def configurations() -> list[Configuration]:
    """With and without a fill, every dtype and number of channels; sides of one, which are constants."""

    def erased(latents: str, out: str, fill: bool, c: int, **fixed: int) -> Configuration:
        pointers = {"latents": latents, "fill": latents, "ranks": "i32", "rows": "i64", "indices": "i64", "out": out}
        types = {name: f"*{type_}:16" for name, type_ in pointers.items()} | {"h": "i32:16", "w": "i32:16"}
        runtime = {name: type_ for name, type_ in types.items() if name not in fixed}
        return Configuration(_erase, runtime, {"FILL": fill, "C": c, **tile(c, 4096), **fixed}, WARPS)

    return [
        *(erased("fp32", out, fill, 4) for fill, out in product((True, False), ("bf16", "fp16", "fp32"))),
        *(erased("fp16", "fp16", True, c) for c in (1, 3, 4, 16, 33)),
        erased("fp32", "fp16", True, 1, h=1, w=1),
    ]
