"""Counter-based random numbers: the same on every device, for every batch size and in every order.

The specification in plain PyTorch; `fused/mask.py` computes the same numbers inside kernels.
"""

import torch
from jaxtyping import Int
from torch import Tensor

# Streams: the last word of the counter. Each use of random numbers has its own, so that no two uses share numbers.

GAUSSIAN_STREAM = 0
"""Bernoulli masks (kind "gaussian"): one number per pixel, in row-major order"""
RISE_GRID_STREAM = 1
"""RISE masks: one number per cell of the coarse grid, in row-major order"""
RISE_SHIFT_STREAM = 2
"""RISE masks: number 0 gives the vertical shift, number 1 the horizontal shift"""
LIME_STREAM = 3
"""LIME: one number per segment; the mask index is the sample"""
RANDOM_STREAM = 4
"""The random baseline: one number per pixel, in row-major order"""
PERMUTATION_STREAM = 5
"""Orthogonal designs: four words per tile; the mask index is the block"""
SIGN_STREAM = 6
"""Orthogonal designs: one number per cell, in row-major order; the mask index is the block"""
FILL_STREAM = 7
"""Noise in place of dropped pixels: four words per pixel and four channels"""

UINT32_MASK = 0xFFFFFFFF


def philox(counter: Int[Tensor, "... 4"], key: Int[Tensor, "... 2"]) -> Int[Tensor, "... 4"]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words per counter and key, which broadcast.

        x₀ x₁ x₂ x₃ ← hi(B·x₂) ⊕ x₁ ⊕ k₀,  lo(B·x₂),  hi(A·x₀) ⊕ x₃ ⊕ k₁,  lo(A·x₀)       ten rounds
        k₀ k₁ ← k₀ + 0x9E3779B9,  k₁ + 0xBB67AE85

    Every word is an unsigned 32-bit integer stored in an int64.
    """
    x0, x1, x2, x3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which leaves the bits of the unsigned product intact.
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            (b >> 32 & UINT32_MASK) ^ x1 ^ k0,
            b & UINT32_MASK,
            (a >> 32 & UINT32_MASK) ^ x3 ^ k1,
            a & UINT32_MASK,
        )
        k0, k1 = k0 + 0x9E3779B9 & UINT32_MASK, k1 + 0xBB67AE85 & UINT32_MASK
    return torch.stack(torch.broadcast_tensors(x0, x1, x2, x3), -1)


def random_uint32(
    seeds: Int[Tensor, " n"], steps: Int[Tensor, " n"], indices: Int[Tensor, " n"], count: int, stream: int
) -> Int[Tensor, "n count"]:
    """The first `count` random integers in [0, 2³²) for each (seed, step, mask index) of a stream, as int64.

    Number j is word j mod 4 of Philox at counter (j // 4, mask index, step, stream), key (seed low 32, seed high 32).
    """
    block = torch.arange(-(-count // 4), device=seeds.device)
    counter = (block, indices[:, None], steps[:, None], torch.full_like(block, stream))
    key = torch.stack((seeds & UINT32_MASK, seeds >> 32 & UINT32_MASK), -1)
    return philox(torch.stack(torch.broadcast_tensors(*counter), -1), key[:, None]).flatten(1)[:, :count]
