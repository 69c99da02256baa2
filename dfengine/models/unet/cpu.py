"""Parts of a UNet in the form that a CPU computes fastest: the same numbers up to rounding, less work or less memory.

A part whose modules somebody looks into, or that is more than it seems, is left as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfengine.models.unet.hooks import is_hooked, is_replaced

#: Of a feed-forward layer's widest activation a thread computes so many elements at a time, 1 MiB, to stay in its
#: cache; all threads together at least so many rows, as every piece reads the weights.
_PIECE, _FEWEST_ROWS = 2**18, 512
#: A row (column) that "nearest" has doubled, under each row of a transposed kernel: the 3×3 kernel's rows that read it.
_READ_BY = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


class Folded(NamedTuple):
    """A cross-attention of p prompts with the weights on both sides of it in their keys and values.

    Σ_heads softmax(x W_q Kᵀ / √d) V W_o + b, of which W_q Kᵀ / √d and V W_o depend on the prompt alone.
    """

    keys: Float[Tensor, "p heads tokens c"]
    values: Float[Tensor, "p heads tokens c"]

    def __call__(self, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
        """n is a multiple of p: as many latents of the first prompt, then as many of the next."""
        x_p = x.reshape(len(self.keys), -1, x.shape[-1])
        # Scores are [tokens, positions]: along the outer of two axes a softmax is twice as fast.
        weights = (self.keys.flatten(1, 2) @ x_p.mT).unflatten(1, self.keys.shape[1:3]).softmax(2)
        return (weights.flatten(1, 2).mT @ self.values.flatten(1, 2)).reshape(x.shape)


def folded(
    attention: Any, key: Float[Tensor, "p tokens inner"], value: Float[Tensor, "p tokens inner"]
) -> Folded | None:
    """A cross-attention, folded; None where its products become more, or its linear layers are not plain."""
    to_q, to_out, heads = attention.to_q, attention.to_out[0], attention.heads
    if not (_is_bare(to_q) and _is_bare(to_out)) or to_q.bias is not None:
        return None
    (channels, inner), tokens = (to_q.in_features, to_q.out_features), key.shape[1]
    # Of one position: with every head's every key as wide as x, or with them as they are, queries and output beside.
    if heads * tokens * channels > inner * (channels + tokens):
        return None
    key, value = (part.unflatten(-1, (heads, -1)) for part in (key, value))
    keys = torch.einsum("pthd,hdc->phtc", key * attention.scale, to_q.weight.unflatten(0, (heads, -1)))
    values = torch.einsum("pthd,chd->phtc", value, to_out.weight.unflatten(1, (heads, -1)))
    if to_out.bias is not None:  # the weights of each head's values sum to 1
        values = values + to_out.bias / heads
    return Folded(keys.contiguous(), values.contiguous())


def transposed(conv: nn.Module) -> Float[Tensor, "c d 4 4"] | None:
    """The kernel by which "nearest" upsampling to twice the size and a 3×3 convolution are one, transposed.

    A value is multiplied once with the sum of the weights that read its copies: 4/9 of the products. None for a
    convolution that is not plain.
    """
    if not (isinstance(conv, nn.Conv2d) and _is_bare(conv)):
        return None
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if shape != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return None
    read_by = torch.tensor(_READ_BY).to(conv.weight)
    kernel = torch.einsum("dckl,mk,nl->cdmn", conv.weight, read_by, read_by)
    return kernel.contiguous(memory_format=torch.channels_last)


def feed_forward(layers: Any, x: Float[Tensor, "n s c"]) -> Float[Tensor, "n s c"]:
    """A feed-forward layer; a GEGLU on a CPU in pieces, so that its widest activation never leaves the cache."""
    if x.device.type != "cpu" or not _is_geglu(layers):
        return layers(x)
    proj, out = layers.net[0].proj, layers.net[2]
    if torch.compiler.is_compiling():
        # The bias apart from the product, so that it is added where the gate is computed.
        hidden, gate = F.linear(x, proj.weight).chunk(2, dim=-1)
        bias, gate_bias = proj.bias.chunk(2)
        return out((hidden + bias) * F.gelu(gate + gate_bias))
    rows, gated = max(_FEWEST_ROWS, torch.get_num_threads() * _PIECE // proj.out_features), []
    for piece in x.flatten(0, 1).split(rows):
        # A product that begins with its bias takes longer than both.
        hidden, gate = F.linear(piece, proj.weight).add_(proj.bias).chunk(2, dim=-1)
        gated.append(F.linear(F.gelu(gate) * hidden, out.weight))
    return torch.cat(gated).add_(out.bias).view_as(x)


def _is_geglu(layers: Any) -> bool:
    """Whether a feed-forward layer is a gate of GELU between two plain linear layers, and nobody looks inside."""
    parts = (layers, *getattr(layers, "net", ()))
    if [type(part).__name__ for part in parts] != ["FeedForward", "GEGLU", "Dropout", "Linear"]:
        return False
    if any(is_hooked(part) or is_replaced(part) or not _is_known(part) for part in parts):
        return False
    proj, out = parts[1].proj, parts[3]
    return _is_bare(proj) and _is_bare(out) and proj.bias is not None and out.bias is not None


def _is_known(module: nn.Module) -> bool:
    """Whether its class is diffusers' or torch's, not somebody's of the same name."""
    return type(module).__module__.startswith(("diffusers.", "torch."))


def _is_bare(module: nn.Module) -> bool:
    """Whether a layer is torch's own and nobody looks into it: then its weights are all there is of it."""
    return type(module) in (nn.Linear, nn.Conv2d) and not (is_hooked(module) or is_replaced(module))
