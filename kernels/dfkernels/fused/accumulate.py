"""`estimators.add` and `estimators.accumulate` in Triton: from f(R⊙M) to the running sums without storing score maps.

Entries are sorted by row and cut into short segments of one row each. One kernel scores the masks of a segment and sums
them in float64 registers, in a fixed order; a second kernel adds each row's segments to its sums, in order. Without
atomics, the same batches in the same order give identical bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from dfkernels import estimators, reference
from dfkernels.designs import check_shape
from dfkernels.distribution import PIXELS, MaskDistribution
from dfkernels.fused.apply_masks import DISTRIBUTIONS
from dfkernels.fused.configuration import Configuration
from dfkernels.fused.mask import NOT_SPECIALISED, constants, load_entry, runtime_arguments, weights_at
from dfkernels.fused.similarity import (
    INPUT_TYPES,
    LAYOUTS,
    ReferenceStatistics,
    prepare,
    read_arguments,
    score_numbers,
    strided,
    tiles,
)
from dfkernels.fused.statistics import TILE_H, TILE_W, local_score, tile_pixels

#: Masks per segment, at least and at most, and the number of programs that fills a device: small batches are cut finely
#: enough to occupy it, large ones coarsely to have few partial sums.
SEGMENT_MIN, SEGMENT_MAX, PROGRAMS = 4, 64, 2048
#: As `similarity.LOCAL_REGISTERS`, with the sums in addition to the score.
REGISTERS = 224
#: Pixels and warps per program that adds up segments.
BLOCK, ADD_WARPS = 256, 2


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _segment_sums(
    scores, stride_n, stride_c, stride_p, input, input_n, input_c, input_p, reading,
    targets, b, mean, variance, offset, C, rate, c1, c2,
    seeds, steps, rows, indices, order, bounds, partials, means, h, w, threshold, cells, bits,
    SCORES: tl.constexpr, SIMILARITY: tl.constexpr, RADIUS: tl.constexpr, READS: tl.constexpr, GRID: tl.constexpr,
    KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """partials[segment, k, λ] = Σ Mⁱ sʲ over the masks of a segment on one tile, 3i + j = k + 1; float64.

    SCORES says what `scores` holds: "outputs", f(R⊙M), scored here against the statistics of row targets[n], with each
    tile's sum of scores stored in means[n, tile]; "maps", [n, h, w]; or "numbers", [n]. MAPS is 8 for RISE masks and 5
    for Gaussian ones, whose M² = M.
    """
    count = tl.cdiv(h, TILE_H) * tl.cdiv(w, TILE_W)
    segment = tl.program_id(0) // count
    tile = tl.program_id(0) % count
    y, x = tile_pixels(tile, h, w)
    inside = (y < h)[:, None] & (x < w)[None, :]
    pixel = y[:, None] * w + x[None, :]
    s_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    s2_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    m_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    ms_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    ms2_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    m2_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    m2s_sum = tl.zeros((TILE_H, TILE_W), tl.float64)
    m2s2_sum = tl.zeros((TILE_H, TILE_W), tl.float64)

    begin = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    for i in range(begin, end):
        n = tl.load(order + i)
        _, k0, k1, step, index = load_entry(seeds, steps, rows, indices, n)
        if SCORES == "outputs":
            target = tl.load(targets + n)
            start = target * C * h * w
            of_output = 1.0
            of_input = 0.0
            if READS:
                of_output = tl.load(reading + 2 * n)
                of_input = tl.load(reading + 2 * n + 1)
            score = local_score(
                scores + n * stride_n, stride_c, stride_p, input + n * input_n, input_c, input_p, of_output, of_input,
                b + start, mean + start, variance + start, offset + target * C,
                y, x, h, w, C, rate, c1, c2, SIMILARITY, RADIUS, READS,
            ).to(tl.float64)  # fmt: skip
            tl.store(means + n * count + tile, tl.sum(tl.where(inside, score, 0.0)))
        elif SCORES == "maps":
            score = tl.load(scores + n * stride_n + pixel * stride_p, mask=inside, other=0.0).to(tl.float64)
        else:
            score = tl.zeros((TILE_H, TILE_W), tl.float64) + tl.load(scores + n * stride_n).to(tl.float64)
        m = weights_at(
            pixel, k0, k1, step, index, h, w, threshold, cells, bits, GRID, KIND, LEVELS, SHIFTED
        ).to(tl.float64)  # fmt: skip
        s_sum += score
        s2_sum += score * score
        m_sum += m
        ms_sum += m * score
        ms2_sum += m * (score * score)
        if MAPS == 8:
            m2_sum += m * m
            m2s_sum += m * m * score
            m2s2_sum += m * m * (score * score)

    # Segments past the last one are empty, and nothing reads them.
    inside = inside & (begin < end)
    out = partials + segment.to(tl.int64) * (MAPS * h * w) + pixel
    tl.store(out, s_sum, mask=inside)
    tl.store(out + h * w, s2_sum, mask=inside)
    tl.store(out + 2 * h * w, m_sum, mask=inside)
    tl.store(out + 3 * h * w, ms_sum, mask=inside)
    tl.store(out + 4 * h * w, ms2_sum, mask=inside)
    if MAPS == 8:
        tl.store(out + 5 * h * w, m2_sum, mask=inside)
        tl.store(out + 6 * h * w, m2s_sum, mask=inside)
        tl.store(out + 7 * h * w, m2s2_sum, mask=inside)


@triton.jit
def _add_segments(partials, first, segment_of_row, moments, pixels, MAPS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the row's segments to moments[row, i, j, λ], in order, and its number of masks to moments[row, 0, 0]."""
    blocks = tl.cdiv(pixels, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(segment_of_row + row)
    end = tl.load(segment_of_row + row + 1)
    inside = (pixel < pixels) & (begin < end)
    moments += row * 9 * pixels + pixel
    masks = tl.load(first + row + 1) - tl.load(first + row)
    tl.store(moments, tl.load(moments, mask=inside) + masks.to(tl.float64), mask=inside)
    for k in tl.static_range(MAPS):
        total = tl.zeros((BLOCK,), tl.float64)
        for segment in range(begin, end):
            at = (tl.cast(segment, tl.int64) * MAPS + k) * pixels + pixel
            total += tl.load(partials + at, mask=inside, other=0.0)
        moment = moments + (k + 1) * pixels
        tl.store(moment, tl.load(moment, mask=inside) + total, mask=inside)
        if MAPS == 5 and k >= 2:  # M² = M
            moment += 3 * pixels
            tl.store(moment, tl.load(moment, mask=inside) + total, mask=inside)


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """A batch sorted by row and cut into segments.

    `order` sorts the entries by row, padding last; segment k is order[bounds[k] : bounds[k + 1]]. Row r's entries begin
    at order[first[r]], its segments at segment_of_row[r]. Only the device knows the number of segments, so `bounds` has
    room for the largest possible number, and segments past the last one are empty.
    """

    order: Int[Tensor, " n"]
    bounds: Int[Tensor, " segments_and_one"]
    first: Int[Tensor, " rows_and_one"]
    segment_of_row: Int[Tensor, " rows_and_one"]


def _plan(rows: Int[Tensor, " n"], num_rows: int, length: int) -> _Plan:
    """The plan for segments of `length` masks, computed without waiting for the device."""
    n = len(rows)
    by_row, order = torch.where(rows < 0, num_rows, rows).sort(stable=True)
    first = torch.searchsorted(by_row, torch.arange(num_rows + 1, device=rows.device))
    begins = torch.arange(n, device=rows.device) % length == 0
    begins[1:] |= by_row[1:] != by_row[:-1]
    segment = begins.cumsum(0) - 1
    max_segments = min(n, -(-n // length) + num_rows)
    bounds = torch.searchsorted(segment, torch.arange(max_segments + 1, device=rows.device))
    after_last = segment[-1:] + 1
    return _Plan(order, torch.minimum(bounds, first[-1]), first, torch.cat((segment, after_last))[first])


def add(
    sums: estimators.Sums,
    scores: Float[Tensor, "n h w"] | Float[Tensor, " n"],
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    distribution: MaskDistribution = PIXELS,
) -> None:
    """`estimators.add` to float64 rounding."""
    form = "maps" if scores.ndim == 3 else "numbers"
    scores = scores.contiguous()
    pixels = (scores.stride(0), 0, 1)
    unused = (scores, 0, 0, 1, *(scores,) * 6, 1, 0.0, 0.0, 0.0)
    _sum(
        sums, (scores, *pixels, *unused), {"SCORES": form, "SIMILARITY": "structure", "RADIUS": 0, "READS": False},
        scores, (seeds, steps, rows, indices), distribution,
    )  # fmt: skip


def accumulate(
    outputs: Float[Tensor, "n c h w"],
    references: Float[Tensor, "r c h w"] | ReferenceStatistics,
    sums: estimators.Sums,
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    distribution: MaskDistribution = PIXELS,
    *,
    similarity: str = "structure",
    score: str = "local",
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    inputs: Float[Tensor, "n c h w"] | None = None,
    reading: Float[Tensor, "r 2"] | None = None,
) -> Float[Tensor, " n"]:
    """`estimators.accumulate` with float32 scores; float64 inputs are left to the reference.

    To share the work between batches, `references` may be the result of `similarity.prepare` with the same settings.
    """
    n, c, h, w = outputs.shape
    settings: dict[str, Any] = {"window": window, "sigma": sigma, "data_range": data_range}
    rows = rows.long()
    counters, targets = (seeds, steps, rows, indices), rows.contiguous()
    if isinstance(references, Tensor):
        if torch.float64 in (outputs.dtype, references.dtype):
            return estimators.accumulate(
                outputs, references, sums, *counters, distribution, similarity=similarity, score=score, **settings,
                inputs=inputs, reading=reading,
            )  # fmt: skip
        reference.check_similarity(outputs, references[0], similarity, score, **settings)
        if len(references) > n:  # prepare one reference per entry, fewer than one per row
            references = references[rows.clamp(min=0)]
            targets = torch.where(rows < 0, rows, torch.arange(n, device=rows.device))
        references = prepare(references, similarity, score, **settings)
    references.check(similarity, score, **settings)
    reference.check_reading(outputs, inputs, reading)
    by_entry = None if reading is None else reading[rows.clamp(min=0)]
    if score == "global":
        numbers = score_numbers(outputs, references, targets, inputs, by_entry)
        add(sums, numbers, *counters, distribution)
        return numbers
    b, means = references, torch.empty((n, tiles(h, w)), dtype=torch.float64, device=outputs.device)
    _sum(
        sums, (*strided(outputs), *read_arguments(outputs, inputs, by_entry), targets, b.pixels, b.mean, b.variance,
               b.offset, c, b.rate, *b.constants),
        {"SCORES": "outputs", "SIMILARITY": b.kind, "RADIUS": b.radius, "READS": reading is not None}, means,
        counters, distribution,
    )  # fmt: skip
    return torch.where(rows >= 0, means.sum(1) / (h * w), torch.nan).float()


def _sum(
    sums: estimators.Sums,
    score_arguments: tuple[Any, ...],
    score_constants: dict[str, Any],
    means: Tensor,
    counters: tuple[Tensor, ...],
    distribution: MaskDistribution,
) -> None:
    """Sum the masks of each segment, then add each target's segments to its moments in place."""
    num_targets, _, _, h, w = sums.moments.shape
    check_shape((h, w))
    counters = tuple(x.contiguous() for x in counters)
    _, _, rows, indices = counters
    n = len(rows)
    if n == 0:
        return
    targets = sums.targets(rows.long(), indices, distribution)
    plan = _plan(targets, num_targets, min(SEGMENT_MAX, max(SEGMENT_MIN, n * tiles(h, w) // PROGRAMS)))
    segments, maps = len(plan.bounds) - 1, 5 if distribution.is_binary else 8
    partials = torch.empty((segments, maps, h, w), dtype=torch.float64, device=rows.device)
    _segment_sums[(segments * tiles(h, w),)](
        *score_arguments, *counters, plan.order, plan.bounds, partials, means, h, w,
        **runtime_arguments(distribution), **score_constants, **constants(distribution), MAPS=maps,
        num_warps=1, maxnreg=REGISTERS,
    )  # fmt: skip
    moments = sums.moments.contiguous()
    _add_segments[(num_targets * triton.cdiv(h * w, BLOCK),)](
        partials, plan.first, plan.segment_of_row, moments, h * w, MAPS=maps, BLOCK=BLOCK, num_warps=ADD_WARPS
    )
    if moments is not sums.moments:
        sums.moments.copy_(moments)


# Ahead of time -------------------------------------------------------------------------------------------------------


def configurations() -> list[Configuration]:
    """Every similarity, both forms of given scores, every form of masks, the largest grid and sides of one pixel."""
    types = {
        **dict.fromkeys(("targets", "seeds", "steps", "rows", "indices", "order", "bounds"), "*i64:16"),
        **dict.fromkeys(("b", "mean", "variance", "offset", "reading"), "*fp32:16"),
        **dict.fromkeys(("partials", "means"), "*fp64:16"),
        **dict.fromkeys(("rate", "c1", "c2"), "fp32"),
        **INPUT_TYPES,
        "C": "i32", "h": "i32:16", "w": "i32:16", "threshold": "i64", "cells": "i32", "bits": "i32",
    }  # fmt: skip

    def config(
        masks: MaskDistribution, scores: str, kind: str, dtype: str, strides: Any, *, reads: bool = False, **sides: int
    ) -> Configuration:
        runtime = types | strides[0] | {"scores": f"*{dtype}:16"}
        settings = {"SCORES": scores, "SIMILARITY": kind, "RADIUS": 5, "READS": reads, "input_c": 1, **constants(masks)}
        settings |= {"MAPS": 5 if masks.is_binary else 8, **strides[1], **sides}
        return Configuration(
            _segment_sums, {k: v for k, v in runtime.items() if k not in sides}, settings, 1, REGISTERS
        )

    sums = {"partials": "*fp64:16", "first": "*i64:16", "segment_of_row": "*i64:16", "moments": "*fp64:16"}
    contiguous = ({"stride_n": "i32:16", "stride_c": "i32:16"}, {"stride_p": 1})
    configs = []
    for masks in DISTRIBUTIONS:
        kinds = reference.SIMILARITIES if masks == PIXELS else ("structure", "mse")
        configs += [config(masks, "outputs", kind, *layout) for kind in kinds for layout in LAYOUTS]
        configs += [config(masks, "outputs", kind, *LAYOUTS[0], reads=True) for kind in kinds]
        configs += [config(masks, scores, "structure", "fp32", contiguous) for scores in ("maps", "numbers")]
    rise = [MaskDistribution(kind="rise", grid=grid) for grid in (1, 32)]
    configs += [config(masks, "outputs", "ssim", *LAYOUTS[0], h=1, w=1) for masks in (PIXELS, *rise)]
    for maps in (5, 8):
        settings = {"MAPS": maps, "BLOCK": BLOCK}
        configs.append(Configuration(_add_segments, sums | {"pixels": "i32:16"}, settings, ADD_WARPS))
    return configs
