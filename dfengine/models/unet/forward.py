"""The forward of a UNet2DConditionModel for many latents at once: diffusers' weights, our own way through them.

What depends on neither latent nor mask is made apart, once: the embedding of a time-step, the keys and values of a
prompt. Latents that share a prompt share its keys and values, the batch folded into the queries. A latent under several
prompts is one latent until they are read. Activations stay channels-last from end to end; diffusers' own forward leaves
that layout behind every attention block. On a CPU some parts take another form (`cpu`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dfengine.models.attention import Attend
from dfengine.models.unet import cpu
from dfengine.models.unet.cpu import Folded
from dfengine.models.unet.hooks import is_hooked, is_replaced

#: Keys and values of one cross-attention, [p, tokens, heads · d] each.
KeysValues = tuple[Tensor, Tensor]

#: Processors that compute plain attention, which `forward` does in their stead.
_PLAIN = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"}
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
#: What a module of a kind must be like for `forward` to be its forward: attribute → value.
_EXPECTED: Mapping[str, Mapping[str, Any]] = {
    "ResnetBlock2D": {
        "upsample": None,
        "downsample": None,
        "time_embedding_norm": "default",
        "skip_time_act": False,
        "output_scale_factor": 1.0,
    },
    "Transformer2DModel": {"is_input_continuous": True},
    "BasicTransformerBlock": {
        "norm_type": "layer_norm",
        "pos_embed": None,
        "only_cross_attention": False,
        "_chunk_size": None,
    },
    "Attention": {
        "group_norm": None,
        "spatial_norm": None,
        "norm_q": None,
        "norm_k": None,
        "norm_cross": None,
        "residual_connection": False,
        "rescale_output_factor": 1.0,
    },
    "Downsample2D": {"use_conv": True, "padding": 1, "norm": None},
    "Upsample2D": {"use_conv": True, "use_conv_transpose": False, "interpolate": True, "norm": None},
}
_CONFIG = {"center_input_sample": False, "encoder_hid_dim_type": None, "time_embedding_act_fn": None}


def difference(unet: Any) -> str | None:
    """What of a UNet `forward` does not know, so that diffusers' own has to serve; None if there is nothing."""
    for name, value in _CONFIG.items():
        if unet.config.get(name) != value:
            return f"its {name} is {unet.config.get(name)!r}"
    if unet.class_embedding is not None or unet.config.addition_embed_type not in (None, "text_time"):
        return "it is told of more than a prompt and a size"
    if unet.mid_block is None:
        return "it has no mid block"
    if any(module.training for module in unet.modules()):
        return "it is in training mode"
    for block in _blocks(unet):
        if type(block).__name__ not in _BLOCKS:
            return f"it has a {type(block).__name__}"
        parts = ("resnets", "attentions", "downsamplers", "upsamplers")
        for part in (module for name in parts for module in getattr(block, name, None) or ()):
            inner = [child for child in getattr(part, "transformer_blocks", ()) if child is not None]
            attentions = [getattr(child, name, None) for child in inner for name in ("attn1", "attn2")]
            for module in (part, *inner, *attentions):
                if type(module).__name__ not in _EXPECTED:
                    return f"it has a {type(module).__name__}"
        if getattr(block, "s1", None):
            return "FreeU is on"
    for name, module in unet.named_modules():
        if changed := _changed(name, module, is_passed_by=module is unet or _is_passed_by(name, module)):
            return changed
    return None


def _is_passed_by(name: str, module: nn.Module) -> bool:
    """Whether `forward` does a module's work in its stead, or does it once for many latents."""
    kind = type(module).__name__
    made_once = name.endswith(("attn2.to_k", "attn2.to_v")) or name.startswith(("time_", "add_"))
    return kind in _BLOCKS or kind in _EXPECTED or kind == "Dropout" or made_once


def _changed(name: str, module: Any, *, is_passed_by: bool) -> str | None:
    """What of a module is not as `forward` takes it to be."""
    kind = type(module).__name__
    for attribute, value in _EXPECTED.get(kind, {}).items():
        if getattr(module, attribute, value) != value:
            return f"{attribute} of {name} is {getattr(module, attribute)!r}"
    if (kind in _BLOCKS or kind in _EXPECTED) and not type(module).__module__.startswith("diffusers."):
        return f"{name} is not diffusers' own {kind}"
    if kind == "ResnetBlock2D" and type(module.nonlinearity) is not nn.SiLU:
        return f"the activation of {name} is {type(module.nonlinearity).__name__}"
    if kind == "Attention":
        processor = type(module.processor)
        if processor.__name__ not in _PLAIN or not processor.__module__.startswith("diffusers."):
            return f"{name} has a {processor.__name__} from {processor.__module__}"
        if abs(module.scale - (module.inner_dim // module.heads) ** -0.5) > 1e-6:
            return f"scale of {name} is {module.scale}"
    # Whoever hooks or replaces the forward of a module that is passed by wants to see it called.
    if is_passed_by and is_hooked(module):
        return f"{name or 'it'} has a hook"
    if is_passed_by and is_replaced(module):
        return f"the forward of {name or 'it'} is another's"
    return None


def embed_times(unet: Any, timesteps: Shaped[Tensor, " s"]) -> Float[Tensor, "s e"]:
    """What the network is told of each time-step."""
    return unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))


def embed_added(unet: Any, added: Mapping[str, Tensor]) -> Float[Tensor, "p e"] | None:
    """What it is told of each prompt beside its text (SDXL), to be added to `embed_times`; None for nothing."""
    if unet.config.addition_embed_type is None:
        return None
    sizes = unet.add_time_proj(added["time_ids"].flatten()).unflatten(0, added["time_ids"].shape).flatten(1)
    return unet.add_embedding(torch.cat([added["text_embeds"], sizes.to(unet.dtype)], dim=-1))


def keys_values(unet: Any, text: Float[Tensor, "p tokens d"]) -> list[KeysValues]:
    """Keys and values of every cross-attention, in the order of the forward."""
    blocks = [block for transformer in _transformers(unet) for block in transformer.transformer_blocks]
    return [(block.attn2.to_k(text), block.attn2.to_v(text)) for block in blocks]


def folded(unet: Any, texts: Sequence[KeysValues]) -> list[Folded | None]:
    """Every cross-attention of some prompts with its weights folded in; None where that is more work."""
    blocks = [block for transformer in _transformers(unet) for block in transformer.transformer_blocks]
    return [cpu.folded(block.attn2, *pair) for block, pair in zip(blocks, texts, strict=True)]


def transposed(unet: Any) -> list[Float[Tensor, "c d 4 4"] | None]:
    """The kernel of every upsampler as a transposed convolution; None where it is more than one."""
    upsamplers = [upsampler for block in unet.up_blocks for upsampler in block.upsamplers or ()]
    return [cpu.transposed(upsampler.conv) for upsampler in upsamplers]


def forward(
    unet: Any,
    x: Float[Tensor, "n c h w"],
    embedding: Float[Tensor, "m e"],
    texts: Sequence[KeysValues | Folded],
    attend: Attend,
    cross: Attend | None = None,
    kernels: Sequence[Tensor | None] = (),
) -> Float[Tensor, "m c h w"]:
    """The network's output for latents (channels-last) under prompts.

    There are as many embeddings as outputs: n, or a multiple m of it where each latent is told of several prompts in
    turn, all latents of the first, then all of the second. What is made of the prompts has m rows, or one for each
    such turn. `cross` computes cross-attention, if anything else than `attend` does; `kernels` are `transposed`'s,
    where upsampling is to be done so.
    """
    embedding, text = F.silu(embedding), iter([(pair, cross or attend) for pair in texts])
    kernel = iter(kernels)
    x = unet.conv_in(x)
    skips = [x]
    for block in unet.down_blocks:
        for resnet, transformer in _pairs(block):
            x = _transform(transformer, _resnet(resnet, x, embedding), text, attend, len(embedding))
            skips.append(x)
        for downsampler in block.downsamplers or ():
            x = downsampler.conv(x)
            skips.append(x)
    first, *others = unet.mid_block.resnets
    x = _resnet(first, x, embedding)
    for transformer, resnet in zip(unet.mid_block.attentions, others, strict=True):
        x = _resnet(resnet, _transform(transformer, x, text, attend, len(embedding)), embedding)
    for block in unet.up_blocks:
        for resnet, transformer in _pairs(block):
            x = _resnet(resnet, torch.cat([x, _repeated(skips.pop(), len(x))], dim=1), embedding)
            x = _transform(transformer, x, text, attend, len(embedding))
        for upsampler in block.upsamplers or ():
            x = _upsample(upsampler.conv, x, skips[-1].shape[2:], next(kernel, None))
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def grids(unet: Any, size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """(height, width) of the feature maps at every level, by the number of their positions; `size` is a latent's."""
    found = [size]
    for block in unet.down_blocks:
        for _ in block.downsamplers or ():
            found.append(((found[-1][0] + 1) // 2, (found[-1][1] + 1) // 2))
    return {height * width: (height, width) for height, width in found}


def _pairs(block: Any) -> Iterator[tuple[Any, Any]]:
    """A block's resnets, each with the transformer behind it or None."""
    return zip(block.resnets, getattr(block, "attentions", None) or [None] * len(block.resnets), strict=True)


def _blocks(unet: Any) -> list[Any]:
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def _transformers(unet: Any) -> list[Any]:
    """Every transformer, in the order of the forward."""
    return [transformer for block in _blocks(unet) for transformer in getattr(block, "attentions", ())]


def _repeated(x: Float[Tensor, "n ..."], count: int) -> Float[Tensor, "m ..."]:
    """All of x, again and again, until there are so many."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


def _upsample(
    conv: Any, x: Float[Tensor, "n c h w"], size: Sequence[int], kernel: Tensor | None
) -> Float[Tensor, "n c H W"]:
    """To the size of what it meets next, which need not be twice its own."""
    if kernel is None or size != (2 * x.shape[2], 2 * x.shape[3]):
        return conv(F.interpolate(x, size=size, mode="nearest"))
    return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def _resnet(resnet: Any, x: Float[Tensor, "n c h w"], embedding: Float[Tensor, "m e"]) -> Float[Tensor, "n d h w"]:
    hidden = resnet.conv1(resnet.nonlinearity(resnet.norm1(x)))
    hidden = hidden + resnet.time_emb_proj(embedding[: len(x)])[:, :, None, None]
    hidden = resnet.conv2(resnet.nonlinearity(resnet.norm2(hidden)))
    return hidden + (x if resnet.conv_shortcut is None else resnet.conv_shortcut(x))


def _transform(
    transformer: Any,
    x: Float[Tensor, "n c h w"],
    text: Iterator[tuple[KeysValues | Folded, Attend]],
    attend: Attend,
    count: int,
) -> Float[Tensor, "m c h w"]:
    if transformer is None:
        return x
    n, _, h, w = x.shape
    tokens = transformer.norm(x)
    if not transformer.use_linear_projection:
        tokens = transformer.proj_in(tokens)
    tokens = tokens.permute(0, 2, 3, 1).reshape(n, h * w, -1)
    if transformer.use_linear_projection:
        tokens = transformer.proj_in(tokens)
    for block in transformer.transformer_blocks:
        tokens = _repeated(tokens + _attention(block.attn1, block.norm1(tokens), None, attend), count)
        tokens = tokens + _attention(block.attn2, block.norm2(tokens), *next(text))
        tokens = tokens + cpu.feed_forward(block.ff, block.norm3(tokens))
    if transformer.use_linear_projection:
        tokens = transformer.proj_out(tokens)
    image = tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)
    return _repeated(x, count) + (image if transformer.use_linear_projection else transformer.proj_out(image))


def _attention(
    attention: nn.Module, x: Float[Tensor, "n s d"], text: KeysValues | Folded | None, attend: Attend
) -> Float[Tensor, "n s d"]:
    if isinstance(text, Folded):
        return text(x)
    module: Any = attention
    query = module.to_q(x)
    key, value = (module.to_k(x), module.to_v(x)) if text is None else text
    # One prompt for all: softmax goes over the keys, so the batch may stand among the queries.
    query = query.reshape(len(key), -1, query.shape[-1])
    q, k, v = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (query, key, value))
    return module.to_out[0](attend(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))
