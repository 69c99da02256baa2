"""`apply_masks`, `draw_masks` and `masks` of `designs` in Triton; masks are drawn where they are used."""

from itertools import product

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfkernels.designs import check_shape, mask_counters
from dfkernels.distribution import PIXELS, MaskDistribution
from dfkernels.fused.configuration import Configuration
from dfkernels.fused.mask import NOT_SPECIALISED, constants, load_entry, normal, runtime_arguments, weights

#: Elements per tile, channels per tile at most, and warps: 16 elements per thread, two vectors in half precision.
TILE, MAX_CHANNELS, WARPS = 2048, 16, 4


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _apply_masks(
    latents, seeds, steps, rows, indices, fill, out, h, w, threshold, cells, bits,
    GRID: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr, FILLS: tl.constexpr,
    C: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ, k] = latents[row, k, λ] · M(λ) + fill · (1 − M(λ)) for a block of pixels of one entry.

    Channels-first to channels-last.
    """
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    row, k0, k1, step, index = load_entry(seeds, steps, rows, indices, n)
    weight = weights(
        first, k0, k1, step, index, h, w, threshold, cells, bits, GRID, KIND, LEVELS, SHIFTED, BLOCK
    )[:, None]  # fmt: skip

    pixel = first + tl.arange(0, BLOCK)[:, None]
    latents += row * (C * h * w)
    fill += tl.maximum(row, 0) * (C + 1)
    out += n.to(tl.int64) * (C * h * w)
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        inside = (pixel < h * w) & (channel < C)
        value = tl.load(latents + channel * (h * w) + pixel, mask=inside & (row >= 0), other=0.0) * weight
        if FILLS:
            mean = tl.load(fill + channel, mask=channel < C, other=0.0)
            noise = mean + tl.load(fill + C) * normal(pixel, channel, C, k0, k1, step, index)
            value += tl.where(row >= 0, noise * (1 - weight), 0.0)
        tl.store(out + pixel * C + channel, value.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _draw_masks(
    seeds, steps, indices, out, h, w, threshold, cells, bits,
    GRID: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, λ] = M(λ) for a block of pixels of one entry; entry n has its own seed and step."""
    blocks = tl.cdiv(h * w, BLOCK)
    n = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    seed, step, index = tl.load(seeds + n).to(tl.int64), tl.load(steps + n), tl.load(indices + n)
    k0, k1, step, index = seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step.to(tl.uint32), index.to(tl.uint32)
    weight = weights(first, k0, k1, step, index, h, w, threshold, cells, bits, GRID, KIND, LEVELS, SHIFTED, BLOCK)
    pixel = first + tl.arange(0, BLOCK)
    tl.store(out + n.to(tl.int64) * (h * w) + pixel, weight.to(out.dtype.element_ty), mask=pixel < h * w)


def apply_masks(
    latents: Float[Tensor, "r c h w"],
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    distribution: MaskDistribution = PIXELS,
    *,
    fill: Float[Tensor, "r c_and_one"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """`designs.apply_masks`, bit for bit with Gaussian masks over zeros."""
    _, c, h, w = latents.shape
    check_shape((h, w))
    out = torch.empty(
        (len(rows), c, h, w),
        dtype=dtype or latents.dtype,
        device=latents.device,
        memory_format=torch.channels_last,
    )
    inputs = (x.contiguous() for x in (latents, seeds, steps, rows, indices, latents if fill is None else fill))
    blocks = tile(c, h * w)
    _apply_masks[(len(rows) * triton.cdiv(h * w, blocks["BLOCK"]),)](
        *inputs, out, h, w, **runtime_arguments(distribution),
        **constants(distribution), FILLS=fill is not None, C=c, **blocks, num_warps=WARPS,
    )  # fmt: skip
    return out


def draw_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    distribution: MaskDistribution = PIXELS,
) -> Bool[Tensor, "n h w"] | Float[Tensor, "n h w"]:
    """`designs.draw_masks`, bit for bit for Gaussian masks."""
    check_shape(shape)
    h, w = shape
    dtype = torch.bool if distribution.is_binary else torch.float32
    out = torch.empty((len(seeds), h, w), dtype=dtype, device=seeds.device)
    inputs = (x.contiguous() for x in (seeds, steps, indices))
    block = tile(1, h * w)["BLOCK"]
    _draw_masks[(len(seeds) * triton.cdiv(h * w, block),)](
        *inputs,
        out.view(torch.uint8) if distribution.is_binary else out,
        h, w, **runtime_arguments(distribution), **constants(distribution), BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return out


def masks(
    seed: int,
    step: int,
    first: int,
    count: int,
    shape: tuple[int, int],
    distribution: MaskDistribution = PIXELS,
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "count h w"] | Float[Tensor, "count h w"]:
    """`designs.masks`, drawn by `draw_masks`."""
    return draw_masks(*mask_counters(seed, step, first, count, device), shape, distribution)


def tile(c: int, pixels: int) -> dict[str, int]:
    """The shape of a tile for latents with c channels and `pixels` pixels."""
    channels = min(MAX_CHANNELS, triton.next_power_of_2(c))
    return {"CHANNELS": channels, "BLOCK": min(TILE // channels, max(4, triton.next_power_of_2(pixels)))}


#: A distribution of every form of masks inside kernels.
DISTRIBUTIONS = (
    PIXELS,
    MaskDistribution(kind="rise"),
    MaskDistribution(cells=(2, 4), shifted=True),
    MaskDistribution(cells=(4,), design="orthogonal", block=32),
    MaskDistribution(cells=(2, 4, 8), shifted=True, design="orthogonal", block=64),
)


def configurations() -> list[Configuration]:
    """Every form of masks and dtype at Stable Diffusion's size, other channel counts, fills, and sides of one pixel.

    Triton specialises an argument that equals one, which makes it a constant.
    """
    vectors = dict.fromkeys(("seeds", "steps", "rows", "indices"), "*i64:16")
    sizes = {"h": "i32:16", "w": "i32:16", "threshold": "i64", "cells": "i32", "bits": "i32"}

    def apply_config(
        latents: str, out: str, distribution: MaskDistribution, c: int, fills: bool = False, **fixed: int
    ) -> Configuration:
        types = {"latents": f"*{latents}:16", "fill": "*fp32:16", "out": f"*{out}:16", **vectors, **sizes}
        runtime = {name: type_ for name, type_ in types.items() if name not in fixed}
        settings = {**constants(distribution), "FILLS": fills, "C": c, **tile(c, 4096), **fixed}
        return Configuration(_apply_masks, runtime, settings, WARPS)

    def draw_config(distribution: MaskDistribution) -> Configuration:
        settings = {**constants(distribution), "BLOCK": tile(1, 4096)["BLOCK"]}
        out = "*u8:16" if distribution.is_binary else "*fp32:16"
        return Configuration(_draw_masks, {"out": out, **vectors, **sizes}, settings, WARPS)

    rise = MaskDistribution(kind="rise")
    return [
        *(apply_config("fp32", out, one, 4) for one, out in product(DISTRIBUTIONS, ("bf16", "fp16", "fp32"))),
        *(apply_config("fp16", "fp16", one, c) for one, c in product((PIXELS, rise), (1, 3, 4, 16, 33))),
        *(apply_config("fp32", "fp16", one, c, fills=True) for one, c in product(DISTRIBUTIONS, (4, 16))),
        apply_config("fp64", "fp64", PIXELS, 4),
        apply_config("fp32", "fp16", MaskDistribution(kind="rise", grid=32), 4),
        apply_config("fp32", "fp16", MaskDistribution(kind="rise", grid=1), 1, h=1, w=1),
        *(draw_config(one) for one in DISTRIBUTIONS),
    ]
