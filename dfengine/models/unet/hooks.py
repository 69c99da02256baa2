"""What networks have inside: the feature maps of a UNet's layers, the attention of a text encoder; who looks there."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from dfengine.diffusion.denoiser import AttentionHook, Condition, Layer

#: Names of the modules whose feature maps are looked at.
_LAYER = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.\d+")


def layers_of(unet: Any, latent: tuple[int, int, int], condition: Condition) -> dict[str, Layer]:
    """The UNet's layers in the order in which a forward calls them; nothing is computed, and no memory needed."""
    names = {module: name for name, module in unet.named_modules() if _LAYER.fullmatch(name)}
    found: dict[str, Layer] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        found[names[module]] = Layer(module, tuple(feature.shape[1:]))

    hooks = [module.register_forward_hook(keep) for module in names]
    try:
        weights = {name: value.to("meta") for name, value in unet.state_dict(keep_vars=True).items()}
        told = {name: value[:1].to("meta") for name, value in condition.tensors.items()}
        x, t = torch.empty(1, *latent, device="meta", dtype=unet.dtype), torch.zeros(1, device="meta")
        options = {"encoder_hidden_states": told.pop("text"), "added_cond_kwargs": told}
        functional_call(unet, weights, (x, t), options)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def shown_to(watch: AttentionHook) -> Any:
    """A hook of a text encoder's attention, whose output is made anew of the probabilities that `watch` returns."""

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        probabilities = watch(output[1], (1, hidden.shape[1]))
        values = module.v_proj(hidden).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        return (module.out_proj((probabilities @ values).transpose(1, 2).flatten(2)), *output[1:])

    return hook


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see the module called, or its gradient."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds) or hasattr(module, "_hf_hook")


def is_replaced(module: nn.Module) -> bool:
    """Whether its forward is not its class's own."""
    return "forward" in vars(module)
