"""Parts of a UNet in the form that a CPU computes fastest: the same numbers up to rounding, less work or less memory.

A part keeps its original form if it has hooks, a patched forward or an unknown class, which the fast form would bypass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfengine.models.unet.hooks import has_patched_forward, is_hooked

#: Elements of a feed-forward layer's widest activation that a thread computes at a time: 1 MiB, to stay in its cache.
_PIECE_ELEMENTS = 2**18
#: Rows that all threads together compute at a time, at least: every piece reads the weights again.
_MIN_PIECE_ROWS = 512
#: Which rows (or columns) of a 3×3 kernel read each of the four input rows that a transposed kernel covers, after
#: "nearest" upsampling has doubled every row.
_READ_BY = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class FoldedAttention(NamedTuple):
    """A cross-attention of p prompts, with its query and output weights folded into its keys and values.

    Σ_heads softmax(x W_q Kᵀ / √d) V W_o + b, where W_q Kᵀ / √d and V W_o depend on the prompt alone.
    """

    keys: Float[Tensor, "p heads tokens c"]
    values: Float[Tensor, "p heads tokens c"]

    def __call__(self, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
        """n is a multiple of p: n/p latents of the first prompt, then n/p of the next."""
        x_p = x.reshape(len(self.keys), -1, x.shape[-1])
        # Scores are [tokens, positions]: a softmax along the outer of the two axes is twice as fast.
        weights = (self.keys.flatten(1, 2) @ x_p.mT).unflatten(1, self.keys.shape[1:3]).softmax(2)
        return (weights.flatten(1, 2).mT @ self.values.flatten(1, 2)).reshape(x.shape)


def fold_attention(
    attention: Any, key: Float[Tensor, "p tokens inner"], value: Float[Tensor, "p tokens inner"]
) -> FoldedAttention | None:
    """A cross-attention in folded form; None if that takes more products, or its linear layers are not plain."""
    to_q, to_out, heads = attention.to_q, attention.to_out[0], attention.heads
    if not (_is_plain(to_q) and _is_plain(to_out)) or to_q.bias is not None:
        return None
    (channels, inner), tokens = (to_q.in_features, to_q.out_features), key.shape[1]
    # Products per position and side: folded against unfolded, where the projection comes in addition.
    if heads * tokens * channels > inner * (channels + tokens):
        return None
    key, value = (part.unflatten(-1, (heads, -1)) for part in (key, value))
    keys = torch.einsum("pthd,hdc->phtc", key * attention.scale, to_q.weight.unflatten(0, (heads, -1)))
    values = torch.einsum("pthd,chd->phtc", value, to_out.weight.unflatten(1, (heads, -1)))
    if to_out.bias is not None:  # each head's probabilities sum to 1
        values = values + to_out.bias / heads
    return FoldedAttention(keys.contiguous(), values.contiguous())


def transposed_kernel(conv: nn.Module) -> Float[Tensor, "c d 4 4"] | None:
    """The transposed convolution that equals "nearest" upsampling to twice the size and then a 3×3 convolution.

    Each value is multiplied once by the sum of the weights that read its copies: 4/9 of the products. None for a
    convolution that is not plain.
    """
    if not (isinstance(conv, nn.Conv2d) and _is_plain(conv)):
        return None
    options = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if options != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return None
    read_by = torch.tensor(_READ_BY).to(conv.weight)
    kernel = torch.einsum("dckl,mk,nl->cdmn", conv.weight, read_by, read_by)
    return kernel.contiguous(memory_format=torch.channels_last)


def feed_forward(layers: Any, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
    """The output of a feed-forward layer; a GEGLU on a CPU in pieces, whose widest activation stays in the cache."""
    if x.device.type != "cpu" or not _is_geglu(layers):
        return layers(x)
    proj, out = layers.net[0].proj, layers.net[2]
    if torch.compiler.is_compiling():
        # The bias apart from the product, so that the compiler fuses its addition with the gate.
        hidden, gate = F.linear(x, proj.weight).chunk(2, dim=-1)
        bias, gate_bias = proj.bias.chunk(2)
        return out((hidden + bias) * F.gelu(gate + gate_bias))
    rows = max(_MIN_PIECE_ROWS, torch.get_num_threads() * _PIECE_ELEMENTS // proj.out_features)
    outputs = []
    for piece in x.flatten(0, 1).split(rows):
        # Adding the bias afterwards is faster than a linear layer with bias.
        hidden, gate = F.linear(piece, proj.weight).add_(proj.bias).chunk(2, dim=-1)
        outputs.append(F.linear(F.gelu(gate) * hidden, out.weight))
    return torch.cat(outputs).add_(out.bias).view_as(x)


def _is_geglu(layers: Any) -> bool:
    """Whether a feed-forward layer is a GEGLU between two plain linear layers with biases, and may be bypassed."""
    parts = (layers, *getattr(layers, "net", ()))
    if [type(part).__name__ for part in parts] != ["FeedForward", "GEGLU", "Dropout", "Linear"]:
        return False
    if any(is_hooked(part) or has_patched_forward(part) or not _is_known(part) for part in parts):
        return False
    proj, out = parts[1].proj, parts[3]
    return _is_plain(proj) and _is_plain(out) and proj.bias is not None and out.bias is not None


def _is_known(module: nn.Module) -> bool:
    """Whether the module's class is defined by diffusers or torch, rather than one of the same name elsewhere."""
    return type(module).__module__.startswith(("diffusers.", "torch."))


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer is torch's own, with plain weights and no hooks, so that its weights determine its output."""
    if type(module) not in (nn.Linear, nn.Conv2d) or is_hooked(module) or has_patched_forward(module):
        return False
    return type(module.weight) in (Tensor, nn.Parameter)
