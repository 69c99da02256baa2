"""Local statistics inside kernels: a Gaussian window over a tile of pixels, and the terms of SSIM computed from it.

Device functions only. A program is one warp and computes a tile of TILE_H × TILE_W pixels, one column per thread. The
window is separable: the taps of an input row are summed once in registers, and the sum is added to the tile's rows with
the window's vertical weights. Neither shared memory nor barriers; pixels that neighbouring tiles share are read again
from the caches.
"""

import triton
import triton.language as tl

#: A tile's height and width: a thread holds one column of TILE_H pixels, a warp reads TILE_W neighbours at a time.
TILE_H, TILE_W = tl.constexpr(4), tl.constexpr(32)
#: Taps of a row loaded together.
TAPS = tl.constexpr(8)
#: Lower bound of a norm in the cosine, as in torch.
EPSILON = tl.constexpr(1e-8)


@triton.jit
def tile_pixels(tile, h, w):
    """The rows y [TILE_H] and columns x [TILE_W] of a tile; tiles are numbered in row-major order."""
    across = tl.cdiv(w, TILE_W)
    y = tile // across * TILE_H + tl.arange(0, TILE_H)
    x = tile % across * TILE_W + tl.arange(0, TILE_W)
    return y, x


@triton.jit
def term(KIND: tl.constexpr, mean_a, mean_b, var_a, var_b, cov, c1, c2):
    """Eq. 5, Eq. 6, Eq. 7, contrast or SSIM of one channel; see `reference.similarity`."""
    if KIND == "structure":
        deviations = tl.sqrt_rn(var_a * var_b)
        # |σ_ab| ≤ σ_a σ_b, whatever the rounding of a variance near 0.
        cov = tl.clamp(cov, -deviations, deviations, propagate_nan=tl.PropagateNan.ALL)
        value = (cov + c2 / 2) / (deviations + c2 / 2)
    elif KIND == "contrast":
        value = (2 * tl.sqrt_rn(var_a * var_b) + c2) / (var_a + var_b + c2)
    elif KIND == "contrast_structure":
        value = (2 * cov + c2) / (var_a + var_b + c2)
    else:
        value = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
        if KIND == "ssim":
            value *= (2 * cov + c2) / (var_a + var_b + c2)
    return value


@triton.jit
def clamped(variance):
    """max(variance, 0), propagating NaN."""
    return tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def cosine(ab, aa, bb):
    """a·b / (‖a‖ ‖b‖) from a·b, a·a and b·b; 0 where a or b is 0."""
    return ab / (tl.maximum(tl.sqrt_rn(aa), EPSILON) * tl.maximum(tl.sqrt_rn(bb), EPSILON))


@triton.jit
def read(a, input, at, at_input, of_output, of_input, inside, READS: tl.constexpr):
    """What the network's output says, float32, 0 outside; see `reference.read`."""
    value = tl.load(a + at, mask=inside, other=0.0).to(tl.float32)
    if READS:
        value = of_output * value + of_input * tl.load(input + at_input, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def row_sums(
    a, stride, input, input_stride, of_output, of_input, offset, b, y, x, w, rate,
    KIND: tl.constexpr, RADIUS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """Σ g, Σ g a, Σ g a² and Σ g a b over the taps of row y around each column x, with `offset` subtracted from a.

    Each of shape [TILE_W]. For the mean squared difference Σ g (a − b)² takes the place of Σ g a.
    """
    g_sum = tl.zeros((TILE_W,), tl.float32)
    a_sum = tl.zeros((TILE_W,), tl.float32)
    aa_sum = tl.zeros((TILE_W,), tl.float32)
    ab_sum = tl.zeros((TILE_W,), tl.float32)
    for first in range(-RADIUS, RADIUS + 1, TAPS):
        tap = first + tl.arange(0, TAPS)[:, None]
        column = x[None, :] + tap
        inside = (tap <= RADIUS) & (column >= 0) & (column < w)
        pixel = y * w + column
        value = read(a, input, pixel * stride, pixel * input_stride, of_output, of_input, inside, READS) - offset
        other = tl.load(b + pixel, mask=inside, other=0.0)
        weight = tl.where(inside, tl.exp2(rate * (tap * tap).to(tl.float32)), 0.0)
        g_sum += tl.sum(weight, 0)
        if KIND == "mse":
            a_sum += tl.sum(tl.where(inside, weight * (value - other) * (value - other), 0.0), 0)
        else:
            weighted = tl.where(inside, weight * value, 0.0)
            a_sum += tl.sum(weighted, 0)
            aa_sum += tl.sum(weighted * value, 0)
            ab_sum += tl.sum(weighted * other, 0)
    return g_sum, a_sum, aa_sum, ab_sum


@triton.jit
def window_means(
    a, stride, input, input_stride, of_output, of_input, offset, b, y, x, top, bottom, w, rate,
    KIND: tl.constexpr, RADIUS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """The window's means of a, a² and a b around each pixel of a tile, with `offset` subtracted from a.

    Each of shape [TILE_H, TILE_W]: Σ_k g_k x_{λ+k} / Σ_k g_k over the k for which λ + k is inside the image,
    g_k = 2^(rate·|k|²). Rows top … bottom − 1 are those within reach of the tile's windows.
    """
    norm = tl.zeros((TILE_H, TILE_W), tl.float32)
    mean_a = tl.zeros((TILE_H, TILE_W), tl.float32)
    mean_aa = tl.zeros((TILE_H, TILE_W), tl.float32)
    mean_ab = tl.zeros((TILE_H, TILE_W), tl.float32)
    for row in range(top, bottom):
        g_sum, a_sum, aa_sum, ab_sum = row_sums(
            a, stride, input, input_stride, of_output, of_input, offset, b, row, x, w, rate, KIND, RADIUS, READS
        )
        tap = row - y
        inside = (tap >= -RADIUS) & (tap <= RADIUS)
        weight = tl.where(inside, tl.exp2(rate * (tap * tap).to(tl.float32)), 0.0)[:, None]
        norm += weight * g_sum[None, :]
        mean_a += weight * a_sum[None, :]
        if KIND != "mse":
            mean_aa += weight * aa_sum[None, :]
            mean_ab += weight * ab_sum[None, :]
    # At least 1 (the centre tap) inside the image; it may be 0 outside, where nothing is stored.
    norm = tl.maximum(norm, 1.0)
    return mean_a / norm, mean_aa / norm, mean_ab / norm


@triton.jit
def local_score(
    a, stride_c, stride_p, input, input_c, input_p, of_output, of_input, b, mean, variance, offset,
    y, x, h, w, C, rate, c1, c2,
    KIND: tl.constexpr, RADIUS: tl.constexpr, READS: tl.constexpr,
):  # fmt: skip
    """s(λ) of one entry on a tile [TILE_H, TILE_W]: the mean over channels of an SSIM term, the cosine, or −MSE.

    `a` points to the entry's f(R⊙M) and `input` to its R⊙M (see `read`); `b`, `mean`, `variance` and `offset` to the
    `ReferenceStatistics` of its row.
    """
    inside = (y < h)[:, None] & (x < w)[None, :]
    pixel = y[:, None] * w + x[None, :]
    size = tl.sum(inside.to(tl.float32))
    top = tl.maximum(tl.min(y, 0) - RADIUS, 0)
    bottom = tl.minimum(tl.max(y, 0) + 1 + RADIUS, h)
    total = tl.zeros((TILE_H, TILE_W), tl.float32)
    aa = tl.zeros((TILE_H, TILE_W), tl.float32)
    bb = tl.zeros((TILE_H, TILE_W), tl.float32)
    for channel in range(C):
        a_c = a + tl.cast(channel, tl.int64) * stride_c
        input_channel = input + tl.cast(channel, tl.int64) * input_c
        at = tl.cast(channel, tl.int64) * (h * w)
        value = read(a_c, input_channel, pixel * stride_p, pixel * input_p, of_output, of_input, inside, READS)
        if KIND == "cosine":
            other = tl.load(b + at + pixel, mask=inside, other=0.0)
            total += value * other
            aa += value * value
            bb += other * other
        else:
            # Subtracting the tile's mean, which is close to every window's, keeps the digits of the variance.
            offset_a = tl.sum(value) / size
            if KIND == "mse":
                offset_a = 0.0
            mean_a, mean_aa, mean_ab = window_means(
                a_c, stride_p, input_channel, input_p, of_output, of_input, offset_a, b + at, y, x, top, bottom, w,
                rate, KIND, RADIUS, READS,
            )  # fmt: skip
            if KIND == "mse":
                total -= mean_a
            else:
                mean_b = tl.load(mean + at + pixel, mask=inside, other=0.0)
                var_b = tl.load(variance + at + pixel, mask=inside, other=0.0)
                offset_b = tl.load(offset + channel)
                var_a = clamped(mean_aa - mean_a * mean_a)
                cov = mean_ab - mean_a * mean_b
                total += term(KIND, mean_a + offset_a, mean_b + offset_b, var_a, var_b, cov, c1, c2)
    return cosine(total, aa, bb) if KIND == "cosine" else total / C
