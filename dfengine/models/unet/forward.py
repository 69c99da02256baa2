"""The forward of a UNet2DConditionModel for many latents at once: diffusers' weights on a faster path.

What depends on neither latent nor mask is computed separately, once: time-step embeddings, and the keys and values of a
prompt. Latents that share a prompt share its keys and values, with the batch folded into the queries. A latent under
several prompts is computed once up to the first cross-attention. Activations stay channels-last from end to end,
whereas diffusers' own forward leaves that layout after every attention block. On a CPU some parts take another form
(`cpu`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dfengine.models.attention import AttentionFunction
from dfengine.models.unet import cpu
from dfengine.models.unet.cpu import FoldedAttention
from dfengine.models.unet.hooks import has_patched_forward, is_hooked

#: Keys and values of one cross-attention, [p, tokens, heads · d] each.
KeysValues = tuple[Tensor, Tensor]
#: What a cross-attention needs of its prompts.
TextInput = KeysValues | FoldedAttention

#: Processors that compute plain attention, as `forward` does.
_PLAIN_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor"}
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
#: The attributes with which a module of each class computes what `forward` computes.
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


def unsupported_reason(unet: Any) -> str | None:
    """Why diffusers' own forward has to run this UNet instead of `forward`; None if nothing prevents `forward`."""
    for name, value in _CONFIG.items():
        if unet.config.get(name) != value:
            return f"its {name} is {unet.config.get(name)!r}"
    if unet.class_embedding is not None or unet.config.addition_embed_type not in (None, "text_time"):
        return "it takes more conditions than a prompt and an image size"
    if unet.mid_block is None:
        return "it has no mid block"
    if any(module.training for module in unet.modules()):
        return "it is in training mode"
    for block in _blocks(unet):
        if reason := _unsupported_block(block):
            return reason
    for name, module in unet.named_modules():
        if reason := _unsupported_module(name, module, is_inlined=module is unet or _is_inlined(name, module)):
            return reason
    return None


def _unsupported_block(block: Any) -> str | None:
    if type(block).__name__ not in _BLOCKS:
        return f"it contains a {type(block).__name__}"
    parts = ("resnets", "attentions", "downsamplers", "upsamplers")
    for part in (module for name in parts for module in getattr(block, name, None) or ()):
        inner = [child for child in getattr(part, "transformer_blocks", ()) if child is not None]
        attentions = [getattr(child, name, None) for child in inner for name in ("attn1", "attn2")]
        for module in (part, *inner, *attentions):
            if type(module).__name__ not in _EXPECTED:
                return f"it contains a {type(module).__name__}"
    return "FreeU is enabled" if getattr(block, "s1", None) else None


def _is_inlined(name: str, module: nn.Module) -> bool:
    """Whether `forward` does a module's work without calling it, or calls it once for many latents."""
    kind = type(module).__name__
    is_cached = name.endswith(("attn2.to_k", "attn2.to_v")) or name.startswith(("time_", "add_"))
    return kind in _BLOCKS or kind in _EXPECTED or kind == "Dropout" or is_cached


def _unsupported_module(name: str, module: Any, *, is_inlined: bool) -> str | None:
    """What about a module differs from what `forward` assumes."""
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
        if processor.__name__ not in _PLAIN_PROCESSORS or not processor.__module__.startswith("diffusers."):
            return f"{name} has a {processor.__name__} from {processor.__module__}"
        if abs(module.scale - (module.inner_dim // module.heads) ** -0.5) > 1e-6:
            return f"scale of {name} is {module.scale}"
    # A hook or patched forward only has an effect if the module is called.
    if is_inlined and is_hooked(module):
        return f"{name or 'it'} has a hook"
    if is_inlined and has_patched_forward(module):
        return f"the forward of {name or 'it'} has been replaced"
    return None


def embed_times(unet: Any, timesteps: Shaped[Tensor, " s"]) -> Float[Tensor, "s e"]:
    """The embedding of each time-step."""
    return unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))


def embed_added(unet: Any, added: Mapping[str, Tensor]) -> Float[Tensor, "p e"] | None:
    """The embedding of SDXL's added conditions for each prompt, to be added to `embed_times`; None for other UNets."""
    if unet.config.addition_embed_type is None:
        return None
    sizes = unet.add_time_proj(added["time_ids"].flatten()).unflatten(0, added["time_ids"].shape).flatten(1)
    return unet.add_embedding(torch.cat([added["text_embeds"], sizes.to(unet.dtype)], dim=-1))


def keys_values(unet: Any, text: Float[Tensor, "p tokens d"]) -> list[KeysValues]:
    """Keys and values of every cross-attention, in the order of the forward."""
    return [(attention.to_k(text), attention.to_v(text)) for attention in _cross_attentions(unet)]


def fold_attentions(unet: Any, texts: Sequence[KeysValues]) -> list[FoldedAttention | None]:
    """Every cross-attention in folded form; None if that is more work. See `cpu.fold_attention`."""
    return [cpu.fold_attention(module, *pair) for module, pair in zip(_cross_attentions(unet), texts, strict=True)]


def upsampling_kernels(unet: Any) -> list[Float[Tensor, "c d 4 4"] | None]:
    """Every upsampler's kernel as a transposed convolution; None if it has no such form."""
    upsamplers = [upsampler for block in unet.up_blocks for upsampler in block.upsamplers or ()]
    return [cpu.transposed_kernel(upsampler.conv) for upsampler in upsamplers]


def forward(
    unet: Any,
    x: Float[Tensor, "n c h w"],
    embedding: Float[Tensor, "m e"],
    texts: Sequence[TextInput],
    attend: AttentionFunction,
    cross: AttentionFunction | None = None,
    kernels: Sequence[Tensor | None] = (),
) -> Float[Tensor, "m c h w"]:
    """The network's output for latents (channels-last) under prompts.

    `embedding` has a row for each output: n, or a multiple m of n if every latent is under several prompts, all latents
    under the first, then all under the second. `texts` have m rows, or one for each of the m/n prompts. `cross`
    computes cross-attention if it differs from `attend`. `kernels` (`upsampling_kernels`) replace the upsamplers'.
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
            x = _resnet(resnet, torch.cat([x, _repeat(skips.pop(), len(x))], dim=1), embedding)
            x = _transform(transformer, x, text, attend, len(embedding))
        for upsampler in block.upsamplers or ():
            x = _upsample(upsampler.conv, x, skips[-1].shape[2:], next(kernel, None))
    if unet.conv_norm_out is not None:
        x = unet.conv_act(unet.conv_norm_out(x))
    return unet.conv_out(x)


def feature_grids(unet: Any, latent_size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """(height, width) of the feature maps at every level, by their number of positions."""
    sizes = [latent_size]
    for block in unet.down_blocks:
        for _ in block.downsamplers or ():
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return {height * width: (height, width) for height, width in sizes}


def _pairs(block: Any) -> Iterator[tuple[Any, Any]]:
    """A block's resnets, each with the transformer after it or None."""
    return zip(block.resnets, getattr(block, "attentions", None) or [None] * len(block.resnets), strict=True)


def _blocks(unet: Any) -> list[Any]:
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


def _cross_attentions(unet: Any) -> list[Any]:
    """Every cross-attention, in the order of the forward."""
    transformers = [module for block in _blocks(unet) for module in getattr(block, "attentions", ())]
    return [block.attn2 for transformer in transformers for block in transformer.transformer_blocks]


def _repeat(x: Float[Tensor, "n ..."], count: int) -> Float[Tensor, "m ..."]:
    """The batch repeated to `count` rows."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


def _upsample(
    conv: Any, x: Float[Tensor, "n c h w"], size: Sequence[int], kernel: Tensor | None
) -> Float[Tensor, "n c H W"]:
    """Upsampled to the size of the next skip connection, which need not be twice that of x."""
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
    text: Iterator[tuple[TextInput, AttentionFunction]],
    attend: AttentionFunction,
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
        tokens = _repeat(tokens + _attention(block.attn1, block.norm1(tokens), None, attend), count)
        tokens = tokens + _attention(block.attn2, block.norm2(tokens), *next(text))
        tokens = tokens + cpu.feed_forward(block.ff, block.norm3(tokens))
    if transformer.use_linear_projection:
        tokens = transformer.proj_out(tokens)
    image = tokens.unflatten(1, (h, w)).permute(0, 3, 1, 2)
    return _repeat(x, count) + (image if transformer.use_linear_projection else transformer.proj_out(image))


def _attention(
    attention: nn.Module, x: Float[Tensor, "n s d"], text: TextInput | None, attend: AttentionFunction
) -> Float[Tensor, "n s d"]:
    if isinstance(text, FoldedAttention):
        return text(x)
    module: Any = attention
    query = module.to_q(x)
    key, value = (module.to_k(x), module.to_v(x)) if text is None else text
    # Softmax goes over the keys, so latents that share a prompt can be folded into the queries.
    query = query.reshape(len(key), -1, query.shape[-1])
    q, k, v = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in (query, key, value))
    return module.to_out[0](attend(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))
