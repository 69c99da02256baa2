"""How relevance passes through attention, for two modalities, image s and text q (Chefer, Gur & Wolf 2021).

R_ss is the relevance of image positions to each other, R_sq that of text positions to image positions, both on the grid
of the finest attention; for a coarser attention they are averaged down (D) and repeated up (U).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class GradientTap(torch.autograd.Function):
    """The identity on attention probabilities that calls `keep(probabilities, gradient)` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(probabilities)
        ctx.keep = keep
        return probabilities.view_as(probabilities)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.keep(ctx.saved_tensors[0], gradient)
        return gradient, None


def relevance_weights(
    probabilities: Float[Tensor, "n heads s t"], gradient: Float[Tensor, "n heads s t"]
) -> Float[Tensor, "n s t"]:
    """Ā, the mean over heads of (∇A ⊙ A)⁺, in float32."""
    total = probabilities.new_zeros((len(probabilities), *probabilities.shape[2:]), dtype=torch.float32)
    # One head at a time: in float32 all heads together would be the largest tensor of the computation.
    for head in range(probabilities.shape[1]):
        total += (gradient[:, head].float() * probabilities[:, head].float()).clamp_(min=0)
    return total / probabilities.shape[1]


class RelevanceRules:
    """The relevance of a batch, updated layer by layer in the forward's order.

    R_ss and R_qq are stored as R − I: next to the ones, float32 would lose the small numbers that R̄ consists of.
    """

    def __init__(self, grid: tuple[int, int], text: Float[Tensor, "n q q"]) -> None:
        """`grid` is the grid of the finest attention, `text` is R_qq − I."""
        self.grid = grid
        self._text = normalize_rows(text)
        self._image: Tensor | None = None
        self.text_to_image = text.new_zeros(len(text), grid[0] * grid[1], text.shape[1])
        """R_sq"""

    def self_attention(self, attention: Float[Tensor, "n c c"], grid: tuple[int, int]) -> None:
        """R_ss ← R_ss + U Ā D R_ss,  R_sq ← R_sq + U Ā D R_sq."""
        index = coarse_positions(self.grid, grid, attention.device)
        update = attention[:, :, index] / index.bincount()[index]  # Ā D
        if self._image is None:
            self._image = update[:, index]
        else:
            self._image += (update + attention @ average_rows(self._image, index))[:, index]
        self.text_to_image += (attention @ average_rows(self.text_to_image, index))[:, index]

    def cross_attention(self, attention: Float[Tensor, "n c q"], grid: tuple[int, int]) -> None:
        """R_sq ← R_sq + R̄_ssᵀ U Ā R̄_qq."""
        update = attention[:, coarse_positions(self.grid, grid, attention.device)]
        update = update + update @ self._text
        self.text_to_image += update
        if self._image is not None:
            self.text_to_image += normalize_rows(self._image).transpose(1, 2) @ update


def self_relevance(attentions: list[Float[Tensor, "n q q"]]) -> Float[Tensor, "n q q"]:
    """R_qq − I after R_qq ← R_qq + Ā R_qq over the layers of a text encoder, starting from R_qq = I."""
    relevance = torch.zeros_like(attentions[0])
    for attention in attentions:
        relevance += attention + attention @ relevance
    return relevance


def normalize_rows(relevance: Float[Tensor, "n s s"]) -> Float[Tensor, "n s s"]:
    """R̄ − I from R − I: rows divided by their sums, rows of zeros unchanged."""
    sums = relevance.sum(2, keepdim=True)
    return torch.where(sums > 0, relevance / sums, 0)


def coarse_positions(fine: tuple[int, int], coarse: tuple[int, int], device: torch.device) -> Int[Tensor, " s"]:
    """For each position of the fine grid, the position of the coarse grid that contains it."""
    (height, width), (u, v) = fine, coarse
    rows = torch.arange(height, device=device) * u // height
    columns = torch.arange(width, device=device) * v // width
    return (rows[:, None] * v + columns).flatten()


def average_rows(relevance: Float[Tensor, "n s t"], index: Int[Tensor, " s"]) -> Float[Tensor, "n c t"]:
    """Rows averaged over each position of the coarse grid (D); `index` is from `coarse_positions`."""
    counts = torch.bincount(index)
    sums = relevance.new_zeros(len(relevance), len(counts), relevance.shape[2])
    return sums.index_add_(1, index, relevance) / counts[:, None]
