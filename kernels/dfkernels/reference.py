"""The specification of masks and similarity scores in plain PyTorch, short enough to read as mathematics.

Symbols: n masks in a batch, r rows (one row per item and step), c channels, λ a pixel of the h × w latent, M a mask,
s a score. `rows[i]` is the row of batch entry i; −1 marks padding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfkernels.counters import GAUSSIAN_STREAM, RISE_GRID_STREAM, RISE_SHIFT_STREAM, random_uint32

#: "gaussian" is the paper's word for masks that threshold Gaussian noise. Their pixels are independent Bernoulli(p).
MASK_KINDS = ("gaussian", "rise")
#: "contrast" is SSIM's comparison of σ_a with σ_b, unrelated to the estimator of that name (`estimators.ESTIMATORS`).
SIMILARITIES = ("structure", "luminance", "contrast_structure", "contrast", "ssim", "cosine")
SCORES = ("local", "global")

#: Elements scored at a time on a CPU, so that they and the intermediate results stay in its cache.
CHUNK_ELEMENTS = 2**16

#: The average E of [n, c, h, w]: over all pixels, or over a window around each pixel.
Average = Callable[[Tensor], Tensor]


# Masks ---------------------------------------------------------------------------------------------------------------


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
    """One mask per entry, a function of (seed, step, mask index, pixel) only.

    `gaussian`: M(λ) = 1[z > τ], z ~ N(0, 1), p = 1 − Φ(τ), drawn as 1[random integer λ < round(p·2³²)]; bool.
    `rise`: a grid × grid field of Bernoulli(p), upsampled and shifted (see `_rise_masks`); float32 in [0, 1], mean p.

    `seeds` hold 64 bits each (negative values represent seeds from 2⁶³); `steps` and `indices` lie in [0, 2³²).
    Raises ValueError if a setting is out of range.
    """
    check_mask(shape, keep_probability, kind, grid)
    if kind == "rise":
        return _rise_masks(seeds, steps, indices, shape, keep_probability, grid)
    pixels = random_uint32(seeds, steps, indices, shape[0] * shape[1], GAUSSIAN_STREAM)
    return (pixels < round(keep_probability * 2**32)).unflatten(1, shape)


def _rise_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    keep_probability: float,
    grid: int,
) -> Float[Tensor, "n h w"]:
    """RISE (Petsiuk et al. 2018): an s × s field, bilinear to (s+1)·⌈h/s⌉ × (s+1)·⌈w/s⌉, shifted, cropped to h × w.

    Half-pixel centres, edges replicated: pixel i of an upsampled side of `span` pixels reads the field at
    (i + ½)·s/span − ½. The vertical shift is number 0 of the shift stream modulo ⌈h/s⌉, the horizontal shift number 1
    modulo ⌈w/s⌉.
    """
    field = random_uint32(seeds, steps, indices, grid * grid, RISE_GRID_STREAM) < round(keep_probability * 2**32)
    field = field.to(torch.float32).unflatten(1, (grid, grid))
    shifts = random_uint32(seeds, steps, indices, 2, RISE_SHIFT_STREAM)
    for axis, size in enumerate(shape):
        cell = -(-size // grid)
        span = (grid + 1) * cell
        pixel = torch.arange(size, device=seeds.device) + shifts[:, axis, None] % cell
        # In units of 1/(2·span) the position is an integer, so its floor and fraction are the same on every device.
        position = ((2 * pixel + 1) * grid - span).clamp(min=0).unsqueeze(2 - axis)
        low = position // (2 * span)
        fraction = (position % (2 * span)).to(torch.float32) / (2 * span)
        below, above = (field.take_along_dim(i, axis + 1) for i in (low, (low + 1).clamp(max=grid - 1)))
        field = below + fraction * (above - below)
    return field


def masks(
    seed: int,
    step: int,
    first: int,
    count: int,
    shape: tuple[int, int],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "count h w"] | Float[Tensor, "count h w"]:
    """Masks `first` to `first + count − 1` of a 64-bit seed and a step index; see `draw_masks`.

    The same on every device and for every batch size. Raises ValueError if an argument is out of range.
    """
    seeds, steps, indices = mask_counters(seed, step, first, count, device)
    return draw_masks(seeds, steps, indices, shape, keep_probability=keep_probability, kind=kind, grid=grid)


def mask_counters(
    seed: int, step: int, first: int, count: int, device: torch.device | str | None
) -> tuple[Int[Tensor, " count"], Int[Tensor, " count"], Int[Tensor, " count"]]:
    """The arguments of `masks` as the seeds, steps and indices that `draw_masks` takes."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit in 64 bits: reduce it modulo 2**64")
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is outside [0, 2**32): give the index of the step in the list, from 0")
    if count < 0:
        raise ValueError(f"count {count} is negative: ask for 0 masks or more")
    if not 0 <= first <= 2**32 - count:
        raise ValueError(f"masks {first} to {first + count - 1} are outside [0, 2**32): for more, use another seed")
    signed = (seed + 2**63) % 2**64 - 2**63
    seeds, steps = (torch.full((count,), value, dtype=torch.int64, device=device) for value in (signed, step))
    return seeds, steps, torch.arange(first, first + count, device=device)


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
    """Masked latents x_i = R[row_i] ⊙ M(seed[row_i], step[row_i], index_i), channels-last; zeros for padding.

    All channels share the mask. `dtype` defaults to the latents' own; the product is rounded to it once.
    """
    h, w = latents.shape[-2:]
    row = rows.clamp(min=0)
    mask = draw_masks(seeds[row], steps[row], indices, (h, w), keep_probability=keep_probability, kind=kind, grid=grid)
    masked = torch.where((rows >= 0)[:, None, None, None], latents[row] * mask[:, None], 0.0)
    return masked.to(dtype or latents.dtype).contiguous(memory_format=torch.channels_last)


# Similarity ----------------------------------------------------------------------------------------------------------


def similarity(
    a: Float[Tensor, "n c h w"],
    b: Float[Tensor, "..."],
    kind: str = "structure",
    score: str = "local",
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> Float[Tensor, "n h w"] | Float[Tensor, " n"]:
    """Similarity of a = f(R⊙M) to b = f(R), of shape [c, h, w] or [n, c, h, w]: a map (`local`) or a number (`global`).

        luminance            (2μ_a μ_b + C₁) / (μ_a² + μ_b² + C₁)          Eq. 5        C₁ = (0.01 L)²
        contrast_structure   (2σ_ab + C₂) / (σ_a² + σ_b² + C₂)             Eq. 6        C₂ = (0.03 L)²
        structure            (σ_ab + C₃) / (σ_a σ_b + C₃)                  Eq. 7        C₃ = C₂ / 2
        contrast             (2σ_a σ_b + C₂) / (σ_a² + σ_b² + C₂)
        ssim                 luminance · contrast_structure
        cosine               a·b / (‖a‖ ‖b‖), over channels (`local`) or all elements (`global`); 0 where a or b is 0

    All in [−1, 1]. Statistics are computed per channel over all pixels (`global`) or over a Gaussian window (`local`;
    `window` pixels wide, standard deviation `sigma`) whose weights are renormalised inside the border; scores are the
    mean over channels. L is `data_range`, a constant, so that a score does not depend on the rest of its batch.
    Computed in float32, or in float64 if an input is float64. Raises ValueError for an unknown kind or score, for
    shapes that do not match and for settings out of range.
    """
    check_similarity(a, b, kind, score, window, sigma, data_range)
    entries = torch.arange(len(a), device=a.device)
    references, rows = (b, entries) if b.ndim == 4 else (b[None], 0 * entries)
    return similarity_by_row(a, references, rows, kind, score, window=window, sigma=sigma, data_range=data_range)


def similarity_by_row(
    a: Float[Tensor, "n c h w"],
    references: Float[Tensor, "r c h w"],
    rows: Int[Tensor, " n"],
    kind: str,
    score: str,
    *,
    window: int,
    sigma: float,
    data_range: float,
) -> Float[Tensor, "n h w"] | Float[Tensor, " n"]:
    """`similarity` of a_i to references[row_i], rows in [0, r); the references' statistics are computed once."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, references.dtype), torch.float32)
    b = references.to(dtype, memory_format=torch.channels_last)
    average = partial(_window_mean, window=window, sigma=sigma) if score == "local" else _pixel_mean
    b_statistics = None if kind == "cosine" else _statistics(b, average)
    chunk = max(1, CHUNK_ELEMENTS // a[:1].numel()) if a.device.type == "cpu" and a.numel() else max(1, len(a))

    scores = []
    for start in range(0, max(1, len(a)), chunk):
        x, row = a[start : start + chunk].to(dtype, memory_format=torch.channels_last), rows[start : start + chunk]
        if b_statistics is None:
            x, y = (x, b[row]) if score == "local" else (x.flatten(1), b[row].flatten(1))
            scores.append(F.cosine_similarity(x, y))
        else:
            y_statistics = _Statistics(*(statistic[row] for statistic in b_statistics))
            value = _ssim_term(_statistics(x, average), y_statistics, kind, average, data_range)
            scores.append(value.mean(1) if score == "local" else value.mean((1, 2, 3)))
    return torch.cat(scores)


class _Statistics(NamedTuple):
    """Each channel's mean over its pixels (`offset`), x minus that mean, and E[x] and σ² = E[x²] − E[x]² of the latter.

    Variances do not depend on the offset, but in float32 E[x²] − E[x]² loses its digits to a large one.
    """

    offset: Tensor
    x: Tensor
    mean: Tensor
    variance: Tensor


def _statistics(x: Float[Tensor, "n c h w"], average: Average) -> _Statistics:
    offset = _pixel_mean(x)
    x = x - offset
    mean, square = average(torch.cat((x, x * x))).chunk(2)
    return _Statistics(offset, x, mean, (square - mean**2).clamp(min=0))


def _ssim_term(a: _Statistics, b: _Statistics, kind: str, average: Average, data_range: float) -> Tensor:
    """Eq. 5, Eq. 6, Eq. 7, contrast or SSIM per channel, under any average E; σ_ab = E[ab] − E[a] E[b]."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    c3 = c2 / 2

    def covariance() -> Tensor:
        return average(a.x * b.x) - a.mean * b.mean

    def luminance() -> Tensor:
        mean_a, mean_b = a.mean + a.offset, b.mean + b.offset
        return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)

    match kind:
        case "structure":
            return (covariance() + c3) / ((a.variance * b.variance).sqrt() + c3)
        case "luminance":
            return luminance()
        case "contrast":
            return (2 * (a.variance * b.variance).sqrt() + c2) / (a.variance + b.variance + c2)
    contrast_structure = (2 * covariance() + c2) / (a.variance + b.variance + c2)
    return contrast_structure if kind == "contrast_structure" else luminance() * contrast_structure


def _pixel_mean(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n 1 1"]:
    return x.mean((-2, -1), keepdim=True)


def _window_mean(x: Float[Tensor, "*n h w"], window: int, sigma: float) -> Float[Tensor, "*n h w"]:
    """Σ_k g_k x_{λ+k} / Σ_k g_k over the k for which λ + k is inside the image, g_k = exp(−|k|² / 2σ²).

    A sum of shifted images, not a convolution or a matrix product: a GPU may compute those in TF32, whose ten-bit
    mantissa is too coarse for E[a²] − E[a]².
    """

    def weighted(x: Tensor, dim: int) -> Tensor:
        size, total = x.shape[dim], x.clone()
        for k in range(1, min(window // 2, size - 1) + 1):
            g, inside = math.exp(-0.5 * (k / sigma) ** 2), size - k
            total.narrow(dim, 0, inside).add_(x.narrow(dim, k, inside), alpha=g)
            total.narrow(dim, k, inside).add_(x.narrow(dim, 0, inside), alpha=g)
        return total

    h, w = x.shape[-2:]
    x = weighted(x, -2) * weighted(x.new_ones(h, 1), -2).reciprocal()
    return weighted(x, -1) * weighted(x.new_ones(w), -1).reciprocal()


# Argument checks -----------------------------------------------------------------------------------------------------


def check_mask(shape: tuple[int, int], keep_probability: float, kind: str, grid: int) -> None:
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown mask kind {kind!r}: choose one of {', '.join(MASK_KINDS)}")
    if not 0 < keep_probability < 1:
        raise ValueError(f"keep_probability {keep_probability} is outside (0, 1): 0.5 keeps half of the pixels")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"mask shape {tuple(shape)} is not (h, w), both at least 1: give the latent's size")
    if grid < 1:
        raise ValueError(f"grid {grid} is not positive: give the cells per side, 1 or more (RISE uses 8)")


def check_similarity(a: Tensor, b: Tensor, kind: str, score: str, window: int, sigma: float, data_range: float) -> None:
    if kind not in SIMILARITIES:
        raise ValueError(f"unknown similarity {kind!r}: choose one of {', '.join(SIMILARITIES)}")
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose 'local' (a map per mask) or 'global' (a number per mask)")
    if b.shape not in (a.shape, a.shape[1:]):
        raise ValueError(f"got a {tuple(a.shape)}, b {tuple(b.shape)}, expected [n, c, h, w] and the same or [c, h, w]")
    check_window(window, sigma)
    if not data_range > 0:
        raise ValueError(f"data_range {data_range} is not positive: give the L of SSIM's constants (1 by default)")


def check_window(window: int, sigma: float) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} is not a positive odd number: give its width in pixels (11 by default)")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} is not positive: give the Gaussian window's standard deviation in pixels")
