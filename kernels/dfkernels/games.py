"""The perturbed latents of the deletion and the insertion game: a whole curve, or many items' curves, in one batch.

Symbols as in `reference`: r rows (a row is one item at one step), n entries of a batch, of which `rows[i]` says whose
entry i is (−1 is padding) and `indices[i]` which point of the curve.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranks(saliency: Float[Tensor, "r h w"]) -> Int[Tensor, "r h w"]:
    """How many pixels go before each: 0 for the most salient, h·w − 1 for the least; of equals the first goes first."""
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).to(torch.int32).view(saliency.shape)


def blur(latents: Float[Tensor, "r c h w"], *, window: int = 11, sigma: float = 5.0) -> Float[Tensor, "r c h w"]:
    """Σ_k g_k x_{λ+k} over a window × window square, g_k ∝ exp(−|k|² / 2σ²), Σ_k g_k = 1: what insertion starts from.

    Borders are reflected about the image's edge (d c b a | a b c d | d c b a; scipy's `reflect`, numpy's `symmetric`):
    defined for every size, and the mean stays, as no pixel counts for more than another. float32 at least inside.
    """
    check_blur(window, sigma)
    r = window // 2
    g = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-r, r + 1)]
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    for dim in (-2, -1):
        size = x.shape[dim]
        place = torch.arange(-r, size + r, device=x.device) % (2 * size)
        padded = x.index_select(dim, torch.minimum(place, 2 * size - 1 - place))
        x = torch.stack([g_k / sum(g) * padded.narrow(dim, k, size) for k, g_k in enumerate(g)]).sum(0)
    return x.to(latents.dtype)


def erase(
    latents: Float[Tensor, "r c h w"],
    ranks: Int[Tensor, "r h w"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    fill: Float[Tensor, "r c h w"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """Point k = index_i of row_i's curve: x_i(λ) = fill(λ) where rank(λ) < k·w, else R(λ); channels-last; zeros for −1.

    k runs from 0 (nothing erased) to h (everything), one row's count of pixels at a time, the most salient first; what
    is erased goes to 0, or to `fill`. Deletion: erase(R, ranks, …). Insertion: erase(blur(R), ranks, …, fill=R).
    `dtype` is the latents' own unless given.
    """
    check_erase(latents, ranks, fill)
    row, w = rows.clamp(min=0), latents.shape[-1]
    erased = (ranks[row] < (indices * w)[:, None, None])[:, None]
    x = torch.where(erased, 0.0 if fill is None else fill[row], latents[row])
    x = torch.where((rows >= 0)[:, None, None, None], x, 0.0)
    return x.to(dtype or latents.dtype).contiguous(memory_format=torch.channels_last)


def check_blur(window: int, sigma: float) -> None:
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window} has no middle pixel: give a positive odd number (11 by default)")
    if not sigma > 0:
        raise ValueError(f"sigma {sigma} is not positive: it is the blur's width in pixels (5 by default)")


def check_erase(latents: Tensor, ranks: Tensor, fill: Tensor | None) -> None:
    r, _, h, w = latents.shape
    if ranks.shape != (r, h, w):
        raise ValueError(f"ranks {tuple(ranks.shape)} of latents {tuple(latents.shape)}: give {(r, h, w)}, see ranks()")
    if fill is not None and fill.shape != latents.shape:
        raise ValueError(f"fill {tuple(fill.shape)}, latents {tuple(latents.shape)}: give a fill of the latents' shape")
