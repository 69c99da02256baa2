"""The specification of the operations on masks and scores, in plain PyTorch, small enough to read as mathematics.

Symbols: n masks in a batch, r rows (a row is one item at one step), c channels, λ a pixel of the h × w latent, M a
mask, s a score. `rows[i]` says which row entry i of a batch belongs to; a row of −1 is padding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfkernels.counters import GAUSSIAN_STREAM, RISE_GRID_STREAM, RISE_SHIFT_STREAM, words

MASK_KINDS = ("gaussian", "rise")
SIMILARITIES = ("structure", "luminance", "contrast_structure", "contrast", "ssim", "cosine")
SCORES = ("local", "global")

#: How many elements a CPU scores at a time: with what is computed from them they stay in its cache.
CHUNK_ELEMENTS = 2**16

#: E: the mean over all pixels or over a window around each, of [n, c, h, w].
Average = Callable[[Tensor], Tensor]


# Masks ---------------------------------------------------------------------------------------------------------------


def draw(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
) -> Bool[Tensor, "n h w"] | Float[Tensor, "n h w"]:
    """One mask an entry, a function of (seed, step, mask index, pixel) and nothing else.

    `gaussian`: M(λ) = 1[z > τ], z ~ N(0, 1), p = 1 − Φ(τ), which is 1[word λ < round(p·2³²)]: bool.
    `rise`: a grid × grid field of Bernoulli(p), enlarged and shifted (see `_rise`): float32 in [0, 1], of mean p.

    `seeds` are 64-bit patterns (a negative value is one of the high half); `steps` and `indices` lie in [0, 2³²).
    """
    check_mask(shape, keep_probability, kind, grid)
    if kind == "rise":
        return _rise(seeds, steps, indices, shape, keep_probability, grid)
    pixels = words(seeds, steps, indices, shape[0] * shape[1], GAUSSIAN_STREAM)
    return (pixels < round(keep_probability * 2**32)).unflatten(1, shape)


def _rise(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    keep_probability: float,
    grid: int,
) -> Float[Tensor, "n h w"]:
    """RISE (Petsiuk et al. 2018): an s × s field, bilinear to (s+1)·⌈h/s⌉ × (s+1)·⌈w/s⌉, shifted, cropped to h × w.

    Half-pixel centres, edges repeated: pixel i of a side of `span` reads the field at (i + ½)·s/span − ½. Word 0 of the
    shift stream, modulo ⌈h/s⌉, shifts the rows; word 1, modulo ⌈w/s⌉, the columns.
    """
    field = words(seeds, steps, indices, grid * grid, RISE_GRID_STREAM) < round(keep_probability * 2**32)
    field = field.to(torch.float32).unflatten(1, (grid, grid))
    shifts = words(seeds, steps, indices, 2, RISE_SHIFT_STREAM)
    for axis, size in enumerate(shape):
        cell = -(-size // grid)
        span = (grid + 1) * cell
        pixel = torch.arange(size, device=seeds.device) + shifts[:, axis, None] % cell
        # The position in units of 1/(2·span), so that its whole part and its fraction are the same on every device.
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
    """Masks number `first` to `first + count − 1` of a seed (64 bits) and a step index; see `draw`.

    The same on every device and however the masks are split into batches. ValueError where an argument is out of range.
    """
    seeds, steps, indices = entries(seed, step, first, count, device)
    return draw(seeds, steps, indices, shape, keep_probability=keep_probability, kind=kind, grid=grid)


def entries(
    seed: int, step: int, first: int, count: int, device: torch.device | str | None
) -> tuple[Int[Tensor, " count"], Int[Tensor, " count"], Int[Tensor, " count"]]:
    """The seeds, steps and indices by which `draw` draws what `masks` is asked for."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit in 64 bits: reduce it modulo 2**64")
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is outside [0, 2**32): it is the index of the step in the list, from 0")
    if count < 0:
        raise ValueError(f"count {count} is negative: ask for 0 masks or more")
    if not 0 <= first <= 2**32 - count:
        raise ValueError(f"masks {first} to {first + count - 1} are outside [0, 2**32): that is all a seed has")
    signed = (seed + 2**63) % 2**64 - 2**63
    seeds, steps = (torch.full((count,), value, dtype=torch.int64, device=device) for value in (signed, step))
    return seeds, steps, torch.arange(first, first + count, device=device)


def blend(
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
    """Masked latents, x_i = R[row_i] ⊙ M(seed[row_i], step[row_i], index_i), channels-last; zeros where row_i is −1.

    The mask is shared by the channels. `dtype` is the latents' own unless given; the product is taken before rounding.
    """
    h, w = latents.shape[-2:]
    row = rows.clamp(min=0)
    mask = draw(seeds[row], steps[row], indices, (h, w), keep_probability=keep_probability, kind=kind, grid=grid)
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
    """Similarity of a = f(R⊙M) and b = f(R) [c, h, w] or [n, c, h, w]: a map each (`local`) or a number (`global`).

        luminance            (2μ_a μ_b + C₁) / (μ_a² + μ_b² + C₁)          eq. 5        C₁ = (0.01 L)²
        contrast_structure   (2σ_ab + C₂) / (σ_a² + σ_b² + C₂)             eq. 6        C₂ = (0.03 L)²
        structure            (σ_ab + C₃) / (σ_a σ_b + C₃)                  eq. 7        C₃ = C₂ / 2
        contrast             (2σ_a σ_b + C₂) / (σ_a² + σ_b² + C₂)
        ssim                 luminance · contrast_structure
        cosine               a·b / (‖a‖ ‖b‖), over channels (`local`) or over everything (`global`); 0 where a or b is 0

    All in [−1, 1]. Statistics per channel, over all pixels or over a Gaussian window (`window` pixels across, of width
    `sigma`) whose weights are renormalised inside the border; then the mean over channels. L is `data_range`, fixed so
    that a score does not depend on its batch-mates. In float32, or float64 where an input is float64.
    """
    check_similarity(a, b, kind, score, window, sigma, data_range)
    each = torch.arange(len(a), device=a.device)
    references, rows = (b, each) if b.ndim == 4 else (b[None], 0 * each)
    return score_rows(a, references, rows, kind, score, window=window, sigma=sigma, data_range=data_range)


def score_rows(
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
    """`similarity` of each a_i and references[row_i], rows in [0, r), what tells of a reference found once a row.

    A CPU is fastest on as many entries at a time as its cache holds, a GPU on all of them.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, references.dtype), torch.float32)
    b = references.to(dtype, memory_format=torch.channels_last)
    average = partial(_window_mean, window=window, sigma=sigma) if score == "local" else _pixel_mean
    of_b = None if kind == "cosine" else _moments(b, average)
    chunk = max(1, CHUNK_ELEMENTS // a[:1].numel()) if a.device.type == "cpu" and a.numel() else max(1, len(a))

    scores = []
    for start in range(0, max(1, len(a)), chunk):
        x, row = a[start : start + chunk].to(dtype, memory_format=torch.channels_last), rows[start : start + chunk]
        if of_b is None:
            x, y = (x, b[row]) if score == "local" else (x.flatten(1), b[row].flatten(1))
            scores.append(F.cosine_similarity(x, y))
        else:
            value = _compare(_moments(x, average), _Moments(*(each[row] for each in of_b)), kind, average, data_range)
            scores.append(value.mean(1) if score == "local" else value.mean((1, 2, 3)))
    return torch.cat(scores)


class _Moments(NamedTuple):
    """Of each channel the pixels' mean, and under an average E of x less that mean: x, E[x] and σ² = E[x²] − E[x]².

    A variance does not see an offset, but float32 does: without it E[x²] − E[x]² keeps its bits.
    """

    offset: Tensor
    x: Tensor
    mean: Tensor
    variance: Tensor


def _moments(x: Float[Tensor, "n c h w"], average: Average) -> _Moments:
    offset = _pixel_mean(x)
    x = x - offset
    mean, square = average(torch.cat((x, x * x))).chunk(2)
    return _Moments(offset, x, mean, (square - mean**2).clamp(min=0))


def _compare(a: _Moments, b: _Moments, kind: str, average: Average, data_range: float) -> Tensor:
    """Eqs. 5 to 7 per channel, under any `average` E: σ_ab = E[ab] − E[a] E[b]."""
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

    Shifted sums, neither a convolution nor a matrix product, which a GPU may round to TF32: ten bits are too few to
    take E[a]² from E[a²].
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


# What the caller may get wrong ---------------------------------------------------------------------------------------


def check_mask(shape: tuple[int, int], keep_probability: float, kind: str, grid: int) -> None:
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown kind of mask {kind!r}: choose one of {', '.join(MASK_KINDS)}")
    if not 0 < keep_probability < 1:
        raise ValueError(f"keep_probability {keep_probability} is outside (0, 1): 0.5 keeps half of the pixels")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"mask shape {tuple(shape)}: give (h, w) of the latent, both at least 1")
    if grid < 1:
        raise ValueError(f"grid {grid} is not a number of cells: give 1 or more (RISE uses 8)")


def check_similarity(a: Tensor, b: Tensor, kind: str, score: str, window: int, sigma: float, data_range: float) -> None:
    if kind not in SIMILARITIES:
        raise ValueError(f"unknown similarity {kind!r}: choose one of {', '.join(SIMILARITIES)}")
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose 'local' for a map each or 'global' for a number each")
    if b.shape not in (a.shape, a.shape[1:]):
        raise ValueError(f"a {tuple(a.shape)}, b {tuple(b.shape)}: give a [n, c, h, w] and b [c, h, w] or of a's shape")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} has no middle pixel: give a positive odd number (11 by default)")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} is not positive: it is the window's width in pixels (1.5 by default)")
    if not data_range > 0:
        raise ValueError(f"data_range {data_range} is not positive: it is the L of the constants (1 by default)")
