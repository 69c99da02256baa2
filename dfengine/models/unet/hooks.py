"""Access to the inside of networks: a UNet's feature maps, a text encoder's attention, and whether others hook them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dfengine.diffusion.denoiser import AttentionHook, Condition, Layer

#: What makes a module run otherwise than it is written, and the value that turns it off.
_SHORTCUTS = {"_compiled_call_impl": None, "gradient_checkpointing": False}
#: Packages whose quantised weights have gradients with respect to a layer's input.
_DIFFERENTIABLE = ("bitsandbytes.", "optimum.quanto.", "torchao.")
#: Names of the modules whose feature maps are explained.
_LAYER = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(resnets|attentions|downsamplers|upsamplers)\.\d+")


def unwrap(module: Any) -> Any:
    """The module inside the wrappers of `torch.compile` and of data parallelism."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in getattr(module, "_modules", {}):
            module = module._orig_mod
        else:
            return module


def unusual_weights(network: nn.Module) -> str | None:
    """What makes a network's weights more than floating-point tensors on its device; None if nothing does.

    Such weights must not be moved or substituted: quantised ones convert themselves, offloaded ones are elsewhere.
    """
    for name, module in network.named_modules():
        if hasattr(module, "_diffusers_hook"):
            return f"diffusers' hooks ({', '.join(module._diffusers_hook.hooks)}) cast or move its weights"
        if hasattr(module, "_hf_hook"):
            return f"accelerate moves the weights of {name or 'it'} between devices"
    for name, value in network.state_dict(keep_vars=True).items():
        if type(value) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(value).__name__}"
        if value.is_meta or value.itemsize == 1:
            return f"{name} is {'on the meta device' if value.is_meta else value.dtype}"
    return None


def gradient_obstacle(network: nn.Module) -> str | None:
    """Why gradients through a network would be wrong or crash; None if nothing is known against them.

    Group offloading and layerwise casting replace the data of weights that a backward pass still needs. Of quantised
    layers those of `_DIFFERENTIABLE` pass gradients on; others cut them off without an error.
    """
    for name, module in network.named_modules():
        if hasattr(module, "_diffusers_hook"):
            return f"diffusers' hooks ({', '.join(module._diffusers_hook.hooks)}) cast or move its weights"
        for weight in module.parameters(recurse=False):
            kind, rounds_inputs = type(weight), getattr(weight, "act_quant_kwargs", None)
            is_known = kind in (Tensor, nn.Parameter) or kind.__module__.startswith(_DIFFERENTIABLE)
            if rounds_inputs or not is_known:
                return f"the weights of {name} are quantised ({kind.__name__})"
        if type(module).__module__.startswith("torch.ao."):
            return f"{name} is quantised ({type(module).__module__}.{type(module).__name__})"
    return None


@contextmanager
def as_written(network: nn.Module) -> Iterator[None]:
    """While inside, modules run as they are written: not compiled, and without gradient checkpointing."""
    before = [
        (module, name, vars(module)[name])
        for module in network.modules()
        for name, off in _SHORTCUTS.items()
        if vars(module).get(name, off) is not off
    ]
    try:
        for module, name, _ in before:
            setattr(module, name, _SHORTCUTS[name])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def layers_of(unet: Any, latent_shape: tuple[int, int, int], condition: Condition) -> dict[str, Layer]:
    """The UNet's layers by name, in the order of its forward.

    Found by a forward on the meta device, which computes and allocates nothing; with `unusual_weights` by one on the
    condition's device.
    """
    names = {module: name for name, module in unet.named_modules() if _LAYER.fullmatch(name)}
    layers: dict[str, Layer] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        feature = output[0] if isinstance(output, tuple) else output
        layers[names[module]] = Layer(module, tuple(feature.shape[1:]))

    device = condition.tensors["text"].device if unusual_weights(unet) else torch.device("meta")
    hooks = [module.register_forward_hook(record) for module in names]
    try:
        added = {name: value[:1].to(device) for name, value in condition.tensors.items()}
        x, t = torch.zeros(1, *latent_shape, device=device, dtype=unet.dtype), torch.zeros(1, device=device)
        options = {"encoder_hidden_states": added.pop("text"), "added_cond_kwargs": added}
        with torch.no_grad(), as_written(unet):
            if device.type == "meta":
                weights = {name: value.to("meta") for name, value in unet.state_dict(keep_vars=True).items()}
                functional_call(unet, weights, (x, t), options)
            else:
                unet(x, t, **options)
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
    """Whether the instance has a forward of its own in place of its class's, which accelerate may have put back."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward
