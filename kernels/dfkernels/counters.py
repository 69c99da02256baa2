"""Random numbers by counter: each is a function of what it is for, whatever the device, the batch or the order.

The specification, in plain PyTorch; `fused/mask.py` has the same inside kernels.
"""

import torch
from jaxtyping import Int
from torch import Tensor

#: The last word of the counter: each use of random numbers has its own stream.
GAUSSIAN_STREAM, RISE_GRID_STREAM, RISE_SHIFT_STREAM, LIME_STREAM, RANDOM_STREAM = 0, 1, 2, 3, 4

U32 = 0xFFFFFFFF


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
