"""Relevance by its rules, written out: the full matrices, in float64, one sample at a time.

Chefer, Gur & Wolf 2021, bi-modal attention, with s the positions of the finest grid of the image and q the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Grid = tuple[int, int]


@dataclass
class AttentionLayer:
    """An attention of one sample, with the gradient of y with respect to its probabilities."""

    kind: str
    """"image": positions look at positions; "cross": positions look at tokens; "text": tokens look at tokens"""
    probabilities: np.ndarray
    """[heads, s, t]"""
    gradient: np.ndarray
    grid: Grid = (1, 1)
    """(height, width) that the positions s lie on"""


def literal_relevance(
    layers: Sequence[AttentionLayer], finest: Grid, num_tokens: int, text_layers: Sequence[AttentionLayer] = ()
) -> np.ndarray:
    """R_sq [positions of the finest grid, tokens], the layers being in the order of the forward."""
    num_positions = finest[0] * finest[1]
    R_ss, R_qq, R_sq = np.eye(num_positions), np.eye(num_tokens), np.zeros((num_positions, num_tokens))
    for layer in text_layers:
        R_qq = R_qq + mean_positive(layer) @ R_qq
    for layer in layers:
        U, D = repeat(finest, layer.grid), average(finest, layer.grid)
        if layer.kind == "image":
            A = U @ mean_positive(layer) @ D
            R_ss, R_sq = R_ss + A @ R_ss, R_sq + A @ R_sq
        else:
            A = U @ mean_positive(layer)
            R_sq = R_sq + normalised(R_ss).T @ A @ normalised(R_qq)
    return R_sq


def mean_positive(layer: AttentionLayer) -> np.ndarray:
    """Ā = the mean over the heads of (∇A ⊙ A)⁺."""
    heads, rows, columns = layer.probabilities.shape
    A = np.zeros((rows, columns))
    for head in range(heads):
        product = layer.gradient[head].astype(np.float64) * layer.probabilities[head].astype(np.float64)
        A = A + np.maximum(product, 0) / heads
    return A


def normalised(R: np.ndarray) -> np.ndarray:
    """R̄ = R̂ + I, R̂ being R − I with every row divided by its sum, and a row of zeros left as it is."""
    normal = np.zeros_like(R)
    for i, row in enumerate(R - np.eye(len(R))):
        if row.sum() != 0:
            normal[i] = row / row.sum()
    return normal + np.eye(len(R))


def repeat(fine: Grid, coarse: Grid) -> np.ndarray:
    """U [fine, coarse]: 1 where the fine position lies on the coarse one: rows i·u // h, columns j·v // w."""
    (h, w), (u, v) = fine, coarse
    U = np.zeros((h * w, u * v))
    for i in range(h):
        for j in range(w):
            U[i * w + j, (i * u // h) * v + j * v // w] = 1
    return U


def average(fine: Grid, coarse: Grid) -> np.ndarray:
    """D [coarse, fine]: the mean of the fine positions that lie on a coarse one."""
    on = repeat(fine, coarse).T
    return on / on.sum(axis=1, keepdims=True)
