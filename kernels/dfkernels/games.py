"""The perturbed latents of the deletion and insertion games: one or many complete curves in a batch.

Symbols as in `reference`: r rows (one row per item and step) and n batch entries; `rows[i]` is the row of entry i (−1
marks padding) and `indices[i]` its point on the curve.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfkernels.reference import check_window


def ranks(saliency: Float[Tensor, "r h w"]) -> Int[Tensor, "r h w"]:
    """Each pixel's rank in descending order of saliency, int32: 0 for the most salient; ties in pixel order."""
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, rank).to(torch.int32).view(saliency.shape)


def blur(latents: Float[Tensor, "r c h w"], *, window: int = 11, sigma: float = 5.0) -> Float[Tensor, "r c h w"]:
    """The blurred latents that insertion starts from: Σ_k g_k x_{λ+k}, g_k ∝ exp(−|k|² / 2σ²), Σ_k g_k = 1.

    The window is `window` × `window` pixels. Borders are reflected about the image's edge (d c b a | a b c d | d c b a;
    scipy's `reflect`, numpy's `symmetric`), which is defined for every size and preserves the mean. Computed in at
    least float32. Raises ValueError if `window` or `sigma` is out of range.
    """
    check_window(window, sigma)
    r = window // 2
    g = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-r, r + 1)]
    x = latents.to(torch.promote_types(latents.dtype, torch.float32))
    for dim in (-2, -1):
        size = x.shape[dim]
        position = torch.arange(-r, size + r, device=x.device) % (2 * size)
        padded = x.index_select(dim, torch.minimum(position, 2 * size - 1 - position))
        x = torch.stack([g_k / sum(g) * padded.narrow(dim, k, size) for k, g_k in enumerate(g)]).sum(0)
    return x.to(latents.dtype)


def perturb(
    latents: Float[Tensor, "r c h w"],
    ranks: Int[Tensor, "r h w"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    fill: Float[Tensor, "r c h w"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """Point k = index_i of row_i's curve: x_i(λ) = fill(λ) where rank(λ) < k·w, else R(λ); channels-last.

    k runs from 0 (nothing replaced) to h (everything): each point replaces the w next most salient pixels by `fill`, 0
    by default. Deletion is perturb(R, ranks, …), insertion perturb(blur(R), ranks, …, fill=R). Padding yields zeros.
    `dtype` defaults to the latents' own. Raises ValueError if the shapes of `ranks` or `fill` do not match.
    """
    check_perturb(latents, ranks, fill)
    row, w = rows.clamp(min=0), latents.shape[-1]
    is_replaced = (ranks[row] < (indices * w)[:, None, None])[:, None]
    x = torch.where(is_replaced, 0.0 if fill is None else fill[row], latents[row])
    x = torch.where((rows >= 0)[:, None, None, None], x, 0.0)
    return x.to(dtype or latents.dtype).contiguous(memory_format=torch.channels_last)


def check_perturb(latents: Tensor, ranks: Tensor, fill: Tensor | None) -> None:
    r, _, h, w = latents.shape
    if ranks.shape != (r, h, w):
        raise ValueError(
            f"got ranks {tuple(ranks.shape)} for latents {tuple(latents.shape)}, expected {(r, h, w)}: use ranks()"
        )
    if fill is not None and fill.shape != latents.shape:
        raise ValueError(f"got fill {tuple(fill.shape)}, expected the latents' shape {tuple(latents.shape)}")
