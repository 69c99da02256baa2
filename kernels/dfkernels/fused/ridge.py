"""`estimators.ridge` on a GPU: products of Gaussian masks are counts, exact on half-precision matrix units."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dfkernels import estimators
from dfkernels.distribution import PIXELS, MaskDistribution
from dfkernels.fused.apply_masks import masks

#: Masks per matrix product. Half precision represents every integer up to 2¹¹, so a sum of this many zeros and ones is
#: exact whatever the summation order, the accumulator's width or the way the library splits the product.
EXACT_COUNT = 2**11


def ridge(
    scores: Float[Tensor, " n"],
    seed: int,
    step: int,
    shape: tuple[int, int],
    distribution: MaskDistribution = PIXELS,
    *,
    penalty: float = 1.0,
    first: int = 0,
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """`estimators.ridge`, to which fewer masks than cells, orthogonal designs and RISE masks are left."""
    field, cells = distribution.field(shape)
    if not field.is_binary or field.design != "iid" or len(scores) < cells[0] * cells[1]:
        return estimators.ridge(scores, seed, step, shape, distribution, penalty=penalty, first=first)
    estimators.check_ridge(scores, penalty)
    y = scores.double() - scores.double().mean()
    gram, projected = normal_equations(y, seed, step, cells, field, first)
    solved = estimators.solve_normal_equations(gram, projected, y, penalty)
    beta, error = (distribution.to_pixels(x.unflatten(0, cells).float(), shape) for x in solved)
    return beta, error


def normal_equations(
    y: Float64[Tensor, " n"], seed: int, step: int, shape: tuple[int, int], distribution: MaskDistribution, first: int
) -> tuple[Float64[Tensor, "hw hw"], Float64[Tensor, " hw"]]:
    """XᵀX and Xᵀy for X = M − p: XᵀX = MᵀM − p (m 1ᵀ + 1 mᵀ) + N p², m = Σ_n M_n, which is the diagonal of MᵀM."""
    pixels, keep_probability = shape[0] * shape[1], distribution.keep_probability
    gram, projected = y.new_zeros(pixels, pixels), y.new_zeros(pixels)
    for start in range(0, len(y), EXACT_COUNT):
        part = y[start : start + EXACT_COUNT]
        m = masks(seed, step, first + start, len(part), shape, distribution, device=y.device).flatten(1)
        half = m.half()
        with torch.autocast(y.device.type, enabled=False):  # bfloat16 rounds integers above 2⁸
            gram += half.T @ half
        projected += part @ m.double()
    counts = keep_probability * gram.diagonal()
    gram += len(y) * keep_probability**2 - counts - counts[:, None]
    return gram, projected - keep_probability * y.sum()
