"""The specification of the operations on masks and scores, in plain PyTorch, small enough to read as mathematics.

Symbols: n masks in a batch, r rows (a row is one item at one step), c channels, λ a pixel of the h × w latent, M a
mask, s a score. `rows[i]` says which row entry i of a batch belongs to; a row of −1 is padding.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MASK_KINDS = ("gaussian", "rise")
SIMILARITIES = ("structure", "luminance", "contrast_structure", "contrast", "ssim", "cosine")
SCORES = ("local", "global")

#: The last word of the counter: each use of random numbers has its own stream.
GAUSSIAN_STREAM, RISE_GRID_STREAM, RISE_SHIFT_STREAM = 0, 1, 2

U32 = 0xFFFFFFFF


# Masks ---------------------------------------------------------------------------------------------------------------


def philox(counter: Int[Tensor, "... 4"], key: Int[Tensor, "... 2"]) -> Int[Tensor, "... 4"]:
    """Philox4x32-10 (Salmon et al. 2011): four random words of a counter and a key, which broadcast.

        x₀ x₁ x₂ x₃ ← hi(B·x₂) ⊕ x₁ ⊕ k₀,  lo(B·x₂),  hi(A·x₀) ⊕ x₃ ⊕ k₁,  lo(A·x₀)       ten rounds
        k₀ k₁ ← k₀ + 0x9E3779B9,  k₁ + 0xBB67AE85

    Every word is an unsigned 32-bit integer held in an int64.
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which leaves the bits of the unsigned product.
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32 & U32) ^ x1 ^ k0, b & U32, (a >> 32 & U32) ^ x3 ^ k1, a & U32
        k0, k1 = k0 + 0x9E3779B9 & U32, k1 + 0xBB67AE85 & U32
    return torch.stack(torch.broadcast_tensors(x0, x1, x2, x3), -1)


def words(
    seeds: Int[Tensor, " n"], steps: Int[Tensor, " n"], indices: Int[Tensor, " n"], count: int, stream: int
) -> Int[Tensor, "n count"]:
    """The first `count` random words of each (seed, step, mask index) in a stream, in [0, 2³²).

    Word j is word j mod 4 of Philox at counter (j // 4, mask index, step, stream), key (seed low 32, seed high 32).
    """
    block = torch.arange(-(-count // 4), device=seeds.device)
    counter = (block, indices[:, None], steps[:, None], torch.full_like(block, stream))
    key = torch.stack((seeds & U32, seeds >> 32 & U32), -1)
    return philox(torch.stack(torch.broadcast_tensors(*counter), -1), key[:, None]).flatten(1)[:, :count]


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
    _check_mask(shape, keep_probability, kind, grid)
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
    indices = torch.arange(first, first + count, device=device)
    return draw(seeds, steps, indices, shape, keep_probability=keep_probability, kind=kind, grid=grid)


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
    _check_similarity(a, b, kind, score, window, sigma, data_range)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    match kind, score:
        case "cosine", "local":
            return F.cosine_similarity(a, b, dim=-3)
        case "cosine", "global":
            return F.cosine_similarity(a.flatten(-3), b.flatten(-3), dim=-1)
        case _, "local":
            return _statistic(a, b, kind, partial(_window_mean, window=window, sigma=sigma), data_range).mean(1)
        case _:
            return _statistic(a, b, kind, _pixel_mean, data_range).mean((1, 2, 3))


def _statistic(a: Tensor, b: Tensor, kind: str, average: Callable[[Tensor], Tensor], data_range: float) -> Tensor:
    """Eqs. 5 to 7 per channel, under any `average`: σ_ab = E[ab] − E[a] E[b]."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    c3 = c2 / 2
    # A variance does not see an offset, but float32 does: without it E[a²] − E[a]² keeps its bits.
    offset_a, offset_b = _pixel_mean(a), _pixel_mean(b)
    a, b = a - offset_a, b - offset_b
    mean_a, mean_b = average(a), average(b)
    var_a = (average(a * a) - mean_a**2).clamp(min=0)
    var_b = (average(b * b) - mean_b**2).clamp(min=0)
    cov = average(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + offset_a, mean_b + offset_b
    std_product = (var_a * var_b).sqrt()

    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    contrast_structure = (2 * cov + c2) / (var_a + var_b + c2)
    match kind:
        case "structure":
            return (cov + c3) / (std_product + c3)
        case "luminance":
            return luminance
        case "contrast_structure":
            return contrast_structure
        case "contrast":
            return (2 * std_product + c2) / (var_a + var_b + c2)
        case _:
            return luminance * contrast_structure


def _pixel_mean(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n 1 1"]:
    return x.mean((-2, -1), keepdim=True)


def _window_mean(x: Float[Tensor, "*n h w"], window: int, sigma: float) -> Float[Tensor, "*n h w"]:
    """Σ_k g_k x_{λ+k} / Σ_k g_k over the k for which λ + k is inside the image, g_k = exp(−|k|² / 2σ²).

    Shifted sums, not a convolution, which a GPU may round to TF32: ten bits are too few to take E[a]² from E[a²].
    """
    h, w = x.shape[-2:]
    r = window // 2
    g = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-r, r + 1)]

    def weighted(x: Tensor) -> Tensor:
        x = F.pad(x, (r, r, r, r))
        x = sum((g_k * x[..., k : k + h, :] for k, g_k in enumerate(g)), x.new_zeros(()))
        return sum((g_k * x[..., k : k + w] for k, g_k in enumerate(g)), x.new_zeros(()))

    return weighted(x) / weighted(x.new_ones(h, w))


# What the caller may get wrong ---------------------------------------------------------------------------------------


def _check_mask(shape: tuple[int, int], keep_probability: float, kind: str, grid: int) -> None:
    if kind not in MASK_KINDS:
        raise ValueError(f"unknown kind of mask {kind!r}: choose one of {', '.join(MASK_KINDS)}")
    if not 0 < keep_probability < 1:
        raise ValueError(f"keep_probability {keep_probability} is outside (0, 1): 0.5 keeps half of the pixels")
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"mask shape {tuple(shape)}: give (h, w) of the latent, both at least 1")
    if grid < 1:
        raise ValueError(f"grid {grid} is not a number of cells: give 1 or more (RISE uses 8)")


def _check_similarity(
    a: Tensor, b: Tensor, kind: str, score: str, window: int, sigma: float, data_range: float
) -> None:
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
