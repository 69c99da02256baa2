"""`apply_masks`, `draw_masks` and `masks` of `reference` in Triton; masks are drawn where they are used."""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfkernels.fused.configuration import Configuration
from dfkernels.fused.mask import load_entry, weights
from dfkernels.reference import MASK_KINDS, check_mask, mask_counters

#: Elements per tile, channels per tile at most, and warps: 16 elements per thread, two vectors in half precision.
TILE, MAX_CHANNELS, WARPS = 2048, 16, 4


@triton.jit(do_not_specialize=["threshold"])
def _apply_masks(
    latents, seeds, steps, rows, indices, out, h, w, threshold,
    GRID: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ, k] = latents[row, k, λ] · M(λ) for a block of pixels of one entry; channels-first to channels-last."""
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    row, k0, k1, step, index = load_entry(seeds, steps, rows, indices, n)
    weight = weights(first, k0, k1, step, index, h, w, threshold, GRID, KIND, BLOCK)[:, None]

    pixel = first + tl.arange(0, BLOCK)[:, None]
    latents += row * (C * h * w)
    out += n.to(tl.int64) * (C * h * w)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        inside = (pixel < h * w) & (channel < C)
        r = tl.load(latents + channel * (h * w) + pixel, mask=inside & (row >= 0), other=0.0)
        tl.store(out + pixel * C + channel, (r * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _draw_masks(
    seeds, steps, indices, out, h, w, threshold,
    GRID: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ] = M(λ) for a block of pixels of one entry; entry n has its own seed and step."""
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    seed, step, index = tl.load(seeds + n).to(tl.int64), tl.load(steps + n), tl.load(indices + n)
    k0, k1, step, index = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step.to(tl.uint32), index.to(tl.uint32)
    weight = weights(first, k0, k1, step, index, h, w, threshold, GRID, KIND, BLOCK)
    pixel = first + tl.arange(0, BLOCK)
    tl.store(out + n.to(tl.int64) * (h * w) + pixel, weight.to(out.dtype.element_ty), mask=pixel < h * w)


def apply_masks(
    latents: Float[Tensor, "r c h w"],
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """`reference.apply_masks`, bit for bit with Gaussian masks."""
    _, c, h, w = latents.shape
    check_mask((h, w), keep_probability, kind, grid)
    out = torch.empty(
        (len(rows), c, h, w),
        dtype=dtype or latents.dtype,
        device=latents.device,
        memory_format=torch.channels_last,
    )
    inputs = (x.contiguous() for x in (latents, seeds, steps, rows, indices))
    blocks = tile(c, h * w)
    _apply_masks[(len(rows) * triton.cdiv(h * w, blocks["BLOCK"]),)](
        *inputs, out, h, w, threshold(keep_probability), GRID=grid, KIND=kind, C=c, **blocks, num_warps=WARPS
    )
    return out


def draw_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
) -> Bool[Tensor, "n h w"] | Float[Tensor, "n h w"]:
    """`reference.draw_masks`, bit for bit for Gaussian masks."""
    check_mask(shape, keep_probability, kind, grid)
    h, w = shape
    dtype = torch.float32 if kind == "rise" else torch.bool
    out = torch.empty((len(seeds), h, w), dtype=dtype, device=seeds.device)
    inputs = (x.contiguous() for x in (seeds, steps, indices))
    block = tile(1, h * w)["BLOCK"]
    _draw_masks[(len(seeds) * triton.cdiv(h * w, block),)](
        *inputs,
        out if kind == "rise" else out.view(torch.uint8),
        h, w, threshold(keep_probability), GRID=grid, KIND=kind, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return out


def masks(
    seed: int,
    step: int,
    first: int,
    count: int,
    shape: tuple[int, int],
    *,
    device: torch.device | str | None = None,
    **mask: Any,
) -> Bool[Tensor, "count h w"] | Float[Tensor, "count h w"]:
    """`reference.masks`, drawn by `draw_masks`."""
    return draw_masks(*mask_counters(seed, step, first, count, device), shape, **mask)


def threshold(keep_probability: float) -> int:
    """The bound below which a random 32-bit integer keeps its pixel, up to 2³² inclusive: compare it in 64 bits."""
    return round(keep_probability * 2**32)


def tile(c: int, pixels: int) -> dict[str, int]:
    """The shape of a tile for latents with c channels and `pixels` pixels."""
    channels = min(MAX_CHANNELS, triton.next_power_of_2(c))
    return {"CHANNELS": channels, "BLOCK": min(TILE // channels, max(4, triton.next_power_of_2(pixels)))}


def configurations() -> list[Configuration]:
    """Every mask kind and dtype at Stable Diffusion's size, other channel counts, and sides of one pixel.

    Triton specialises an argument that equals one, which makes it a constant.
    """
    vectors = dict.fromkeys(("seeds", "steps", "rows", "indices"), "*i64:16")
    sizes = {"h": "i32:16", "w": "i32:16", "threshold": "i64"}

    def apply_config(latents: str, out: str, kind: str, c: int, grid: int = 8, **fixed: int) -> Configuration:
        types = {"latents": f"*{latents}:16", "out": f"*{out}:16", **vectors, **sizes}
        runtime = {name: type_ for name, type_ in types.items() if name not in fixed}
        return Configuration(
            _apply_masks, runtime, {"GRID": grid, "KIND": kind, "C": c, **tile(c, 4096), **fixed}, WARPS
        )

    def draw_config(kind: str, out: str) -> Configuration:
        constants = {"GRID": 8, "KIND": kind, "BLOCK": tile(1, 4096)["BLOCK"]}
        return Configuration(_draw_masks, {"out": f"*{out}:16", **vectors, **sizes}, constants, WARPS)

    return [
        *(apply_config("fp32", out, kind, 4) for kind, out in product(MASK_KINDS, ("bf16", "fp16", "fp32"))),
        *(apply_config("fp16", "fp16", kind, c) for kind, c in product(MASK_KINDS, (1, 3, 4, 16, 33))),
        apply_config("fp64", "fp64", "gaussian", 4),
        apply_config("fp32", "fp16", "rise", 4, grid=32),
        apply_config("fp32", "fp16", "rise", 1, grid=1, h=1, w=1),
        draw_config("gaussian", "u8"),
        draw_config("rise", "fp32"),
    ]
