"""The specification of similarity scores in plain PyTorch, short enough to read as mathematics.

Symbols: n masks in a batch, r rows (one row per item and step), c channels, λ a pixel of the h × w latent, M a mask,
s a score. `rows[i]` is the row of batch entry i; −1 marks padding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

#: "contrast" is SSIM's comparison of σ_a with σ_b, unrelated to the estimator of that name (`estimators.ESTIMATORS`).
SIMILARITIES = ("structure", "luminance", "contrast_structure", "contrast", "ssim", "cosine", "mse")
SCORES = ("local", "global")

#: Elements scored at a time on a CPU, so that they and the intermediate results stay in its cache.
CHUNK_ELEMENTS = 2**16

#: The average E of [n, c, h, w]: over all pixels, or over a window around each pixel.
Average = Callable[[Tensor], Tensor]


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
        mse                  −E[(a − b)²], negated so that it is a similarity, at most 0

    All others in [−1, 1]. Statistics are computed per channel over all pixels (`global`) or over a Gaussian window
    (`local`; `window` pixels wide, standard deviation `sigma`) whose weights are renormalised inside the border; scores
    are the mean over channels. L is `data_range`, a constant, so that a score does not depend on the rest of its batch.
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
    b_statistics = None if kind in ("cosine", "mse") else _statistics(b, average)
    chunk = max(1, CHUNK_ELEMENTS // a[:1].numel()) if a.device.type == "cpu" and a.numel() else max(1, len(a))

    scores = []
    for start in range(0, max(1, len(a)), chunk):
        x, row = a[start : start + chunk].to(dtype, memory_format=torch.channels_last), rows[start : start + chunk]
        if kind == "mse":
            value = -average((x - b[row]).square().mean(1, keepdim=True))[:, 0]
            scores.append(value if score == "local" else value[:, 0, 0])
        elif b_statistics is None:
            x, y = (x, b[row]) if score == "local" else (x.flatten(1), b[row].flatten(1))
            scores.append(F.cosine_similarity(x, y))
        else:
            y_statistics = _Statistics(*(statistic[row] for statistic in b_statistics))
            value = _ssim_term(_statistics(x, average), y_statistics, kind, average, data_range)
            scores.append(value.mean(1) if score == "local" else value.mean((1, 2, 3)))
    return torch.cat(scores)


def read(
    outputs: Float[Tensor, "n c h w"],
    inputs: Float[Tensor, "n c h w"] | None,
    reading: Float[Tensor, "r 2"] | None,
    rows: Int[Tensor, " n"],
) -> Float[Tensor, "n c h w"]:
    """reading[row_i, 0] · outputs[i] + reading[row_i, 1] · inputs[i], float32; the outputs if there is no reading."""
    if inputs is None or reading is None:
        return outputs
    of_output, of_input = reading[rows, :, None, None, None].unbind(1)
    return of_output * outputs.to(of_output.dtype) + of_input * inputs.to(of_input.dtype)


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
            deviations = (a.variance * b.variance).sqrt()
            # |σ_ab| ≤ σ_a σ_b, whatever the rounding of a variance near 0.
            return (covariance().clamp(-deviations, deviations) + c3) / (deviations + c3)
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


def check_reading(outputs: Tensor, inputs: Tensor | None, reading: Tensor | None) -> None:
    if (inputs is None) != (reading is None):
        raise ValueError("got a reading without inputs, or inputs without a reading: give both, or neither")
    if inputs is not None and inputs.shape != outputs.shape:
        raise ValueError(f"got inputs {tuple(inputs.shape)} for outputs {tuple(outputs.shape)}, expected one shape")


def check_window(window: int, sigma: float) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} is not a positive odd number: give its width in pixels (11 by default)")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} is not positive: give the Gaussian window's standard deviation in pixels")
