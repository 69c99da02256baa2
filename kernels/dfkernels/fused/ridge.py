"""`estimators.ridge` on a GPU: products of Gaussian masks are counts, exact on half-precision matrix units."""

from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dfkernels import estimators
from dfkernels.fused.apply_masks import masks

#: Masks per matrix product. Half precision represents every integer up to 2¹¹, so a sum of this many zeros and ones is
#: exact whatever the summation order, the accumulator's width or the way the library splits the product.
EXACT_COUNT = 2**11


def ridge(
    scores: Float[Tensor, " n"],
    seed: int,
    step: int,
    shape: tuple[int, int],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
    penalty: float = 1.0,
    first: int = 0,
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """`estimators.ridge`, to which fewer masks than pixels and (fractional) RISE masks are left."""
    mask_settings: dict[str, Any] = {"keep_probability": keep_probability, "kind": kind, "grid": grid}
    if kind != "gaussian" or len(scores) < shape[0] * shape[1]:
        return estimators.ridge(scores, seed, step, shape, **mask_settings, penalty=penalty, first=first)
    estimators.check_ridge(scores, penalty)
    y = scores.double() - scores.double().mean()
    gram, projected = normal_equations(y, seed, step, shape, keep_probability, first)
    beta, error = estimators.solve_normal_equations(gram, projected, y, penalty)
    return beta.unflatten(0, shape).float(), error.unflatten(0, shape).float()


def normal_equations(
    y: Float64[Tensor, " n"], seed: int, step: int, shape: tuple[int, int], keep_probability: float, first: int
) -> tuple[Float64[Tensor, "hw hw"], Float64[Tensor, " hw"]]:
    """XᵀX and Xᵀy for X = M − p: XᵀX = MᵀM − p (m 1ᵀ + 1 mᵀ) + N p², m = Σ_n M_n, which is the diagonal of MᵀM."""
    pixels = shape[0] * shape[1]
    gram, projected = y.new_zeros(pixels, pixels), y.new_zeros(pixels)
    for start in range(0, len(y), EXACT_COUNT):
        part = y[start : start + EXACT_COUNT]
        m = masks(
            seed, step, first + start, len(part), shape, keep_probability=keep_probability, device=y.device
        ).flatten(1)
        half = m.half()
        with torch.autocast(y.device.type, enabled=False):  # bfloat16 rounds integers above 2⁸
            gram += half.T @ half
        projected += part @ m.double()
    counts = keep_probability * gram.diagonal()
    gram += len(y) * keep_probability**2 - counts - counts[:, None]
    return gram, projected - keep_probability * y.sum()
