"""Access to the inside of networks: a UNet's feature maps, a text encoder's attention, and whether others hook them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dfengine.diffusion.denoiser import AttentionHook, Condition, Layer

#: Names of the modules whose feature maps are explained.
_LAYER = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.\d+")


def layers_of(unet: Any, latent_shape: tuple[int, int, int], condition: Condition) -> dict[str, Layer]:
    """The UNet's layers by name, in the order of its forward.

    Found by a forward on the meta device, which computes and allocates nothing.
    """
    names = {module: name for name, module in unet.named_modules() if _LAYER.fullmatch(name)}
    layers: dict[str, Layer] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        layers[names[module]] = Layer(module, tuple(feature.shape[1:]))

    hooks = [module.register_forward_hook(record) for module in names]
    try:
        weights = {name: value.to("meta") for name, value in unet.state_dict(keep_vars=True).items()}
        added = {name: value[:1].to("meta") for name, value in condition.tensors.items()}
        x, t = torch.empty(1, *latent_shape, device="meta", dtype=unet.dtype), torch.zeros(1, device="meta")
        options = {"encoder_hidden_states": added.pop("text"), "added_cond_kwargs": added}
        functional_call(unet, weights, (x, t), options)
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def attention_output_hook(hook: AttentionHook) -> Any:
    """A forward hook for a text encoder's self-attention: its output, recomputed from the probabilities of `hook`."""

    def forward_hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        probabilities = hook(output[1], (1, hidden.shape[1]))
        values = module.v_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return (module.out_proj((probabilities @ values).transpose(1, 2).flatten(2)), *output[1:])

    return forward_hook


def is_hooked(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks, those of accelerate included."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or hasattr(module, "_hf_hook")


def has_patched_forward(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own in place of its class's."""
    return "forward" in vars(module)
