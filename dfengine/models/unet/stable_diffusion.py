"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel conditioned on a prompt by one CLIP text encoder."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dfengine.diffusion.denoiser import AttentionHook, Condition, Denoiser, Layer, PromptedDenoiser
from dfengine.models.attention import attention_backend, hooked_attention
from dfengine.models.codec import Codec
from dfengine.models.registry import adapter
from dfengine.models.scheduler import noise_schedule, path_of
from dfengine.models.tokenizers import check_prompt, tokens_of
from dfengine.models.unet.cached import CachedUNet
from dfengine.models.unet.forward import TextInput, feature_grids, forward, unsupported_reason
from dfengine.models.unet.hooks import (
    as_written,
    attention_output_hook,
    gradient_obstacle,
    layers_of,
    unusual_weights,
    unwrap,
)
from dfengine.tokens import Tokens

log = logging.getLogger(__name__)

#: Latent pixels in one forward by default: enough to keep a GPU busy, few enough for a CPU's cache.
_PIXELS_IN_BATCH = {"cuda": 64 * 64 * 64, "cpu": 16 * 16 * 128}
#: Latent pixels a side, and tokens of a prompt, at most: what is beyond comes of a damaged configuration.
_MAX_SIDE, _MAX_TOKENS = 4096, 2**20
#: Compiler options by device: with a single shape, searching for the fastest kernels pays off on a GPU.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {
        "max_autotune": True,
        "triton.cudagraphs": False,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
    }
}


@adapter("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
class StableDiffusion(Denoiser):
    """Adapter of Stable Diffusion pipelines, loaded LoRAs and textual inversions included.

    Img2img and inpainting pipelines of the text-to-image UNet are the same model. `image_size` is (height, width) in
    pixels, by default the size the model was trained for. Raises ValueError for an image size that no latent has, or a
    UNet with more inputs than a latent, a time-step and a prompt.
    """

    text_encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    """names of the pipeline's components that encode prompts"""
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer",)
    upcasts: ClassVar[bool] = False
    """whether a float16 codec whose configuration says `force_upcast` runs in float32"""

    def __init__(
        self,
        pipeline: Any,
        *,
        name: str,
        batch_size: int | None = None,
        image_size: tuple[int, int] | None = None,
        attention_backend: str = "auto",
    ) -> None:
        _check_parts(pipeline, ("unet", "vae", "scheduler", *self.text_encoders, *self.tokenizers))
        self.pipeline = pipeline
        self.unet, self.vae = unwrap(pipeline.unet), unwrap(pipeline.vae)
        _check_unet(self.unet.config, self.vae.config)
        for network in (self.unet, self.vae):
            if unusual_weights(network) is None:
                network.to(memory_format=torch.channels_last)
        self.schedule = noise_schedule(pipeline.scheduler)
        own = _own_size(self.unet)
        size = own if image_size is None else _latent_size(pipeline.vae_scale_factor, image_size)
        if size is None:
            raise ValueError("the UNet does not tell its size (sample_size is null): give image_size, (height, width)")
        height, width = size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        self.image_shape = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        is_default_size = (height, width) == own
        self.name = name if is_default_size else f"{name} ({_format_size(self.image_shape)} pixels)"
        # Of an offloaded UNet the pipeline knows the device; with a wrapped one it does not know its own.
        self.device, self.dtype = getattr(pipeline, "_execution_device", self.unet.device), self.unet.dtype
        pixels = _PIXELS_IN_BATCH.get(self.device.type, _PIXELS_IN_BATCH["cpu"])
        self.batch_size = batch_size or max(1, pixels // (height * width))
        self.use_attention(attention_backend)
        self._codec = Codec(self.vae, self.image_shape, upcasts=self.upcasts)
        self._compiled: Any = None
        self._compiled_size = 0
        self._logged_reason: str | None = None
        self._layers: dict[str, Layer] | None = None

    @classmethod
    def check_configurations(cls, parts: Mapping[str, Any]) -> None:
        """Raise ValueError for a scheduler or UNet that is not supported, as far as the parts are known."""
        if "scheduler" in parts:
            path_of(parts["scheduler"])
        if "unet" in parts and "vae" in parts:
            _check_unet(parts["unet"], parts["vae"])

    @property
    def networks(self) -> dict[str, nn.Module]:
        encoders = {part: unwrap(getattr(self.pipeline, part)) for part in self.text_encoders}
        return {"unet": self.unet, "vae": self.vae, **encoders}

    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        x_t = x_t.to(self.dtype, memory_format=torch.channels_last)
        # All tensors but the text have the names of the UNet's added conditions.
        added = {name: value for name, value in condition.tensors.items() if name != "text"}
        text = condition.tensors["text"]
        with self._attention.activated(), _cudnn_benchmark(len(x_t) == self.batch_size):
            return self.unet(x_t, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The encoding of each prompt. Raises ValueError for one that is too long for a text encoder."""
        self.check_prompts(prompts)
        text, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return Condition({"text": text.to(self.dtype)})

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that a text encoder cannot represent completely."""
        for prompt in prompts:
            for part in self.tokenizers:
                check_prompt(getattr(self.pipeline, part), prompt)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        return self._codec.decode(latents)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        return self._codec.encode(images)

    def with_prompts(self, condition: Condition) -> PromptedDenoiser:
        """The UNet with fixed prompts, on the faster forward of `models.unet` if that supports it.

        Hooks and weights are read now: after changing them, call this again.
        """
        reason = unsupported_reason(self.unet)
        if reason and reason != self._logged_reason:
            log.info("the UNet falls back to diffusers' own forward, which is slower: %s", reason)
        self._logged_reason = reason
        self.compiled = self.compiled and not reason
        return PromptedDenoiser(self, condition) if reason else CachedUNet(self, condition)

    def layers(self) -> dict[str, Layer]:
        """Every resnet, transformer, down- and upsampler, by module name."""
        if self._layers is None:
            self._layers = layers_of(self.unet, self.latent_shape, self.encode_prompts([""]))
        return self._layers

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Replaces xformers' attention processors by torch's, since `torch.func` cannot differentiate xformers."""
        from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

        before = self.unet.attn_processors
        replaced = {name: AttnProcessor2_0() for name, one in before.items() if isinstance(one, XFormersAttnProcessor)}
        self.unet.set_attn_processor({**before, **replaced})
        try:
            with as_written(self.unet):
                yield
        finally:
            self.unet.set_attn_processor(before)

    def tokens(self, prompt: str) -> Tokens:
        """Raises ValueError, too, if the tokenizers divide the prompt differently: positions would be ambiguous."""
        self.check_prompts([prompt])
        tokens = [tokens_of(self.pipeline, getattr(self.pipeline, part), prompt) for part in self.tokenizers]
        if any(other.spans != tokens[0].spans for other in tokens):
            raise ValueError(
                f"the tokenizers of {self.name} divide {prompt!r} differently, so its tokens have no unique positions"
            )
        return tokens[0]

    def zero_tokens(self, condition: Condition, places: Sequence[int]) -> Condition:
        text = condition.tensors["text"].clone()
        text[:, places] = 0
        return Condition({**condition.tensors, "text": text})

    def require_gradients(self, purpose: str) -> None:
        if reason := gradient_obstacle(self.unet):
            raise ValueError(
                f"{purpose} needs gradients, which {self.name} does not give: {reason}; load it otherwise, or use an "
                "explainer that only needs predictions, such as rise"
            )

    def require_attention(self) -> None:
        if reason := unsupported_reason(self.unet):
            raise ValueError(
                f"the attention of {self.name} cannot be seen: {reason}; undo that (unet.disable_freeu(), "
                "unet.set_default_attn_processor(), removing the hook, loading without offloading or casting) or load "
                "the UNet again"
            )

    def with_attention_hook(
        self, condition: Condition, text: AttentionHook, image: AttentionHook | None = None
    ) -> PromptedDenoiser:
        self.require_attention()
        grids = feature_grids(self.unet, self.latent_shape[1:])
        attend = self._attention.attend if image is None else hooked_attention(image, grids)
        return CachedUNet(self, condition, partial(forward, attend=attend, cross=hooked_attention(text, grids)))

    def with_text_attention_hook(self, prompts: Sequence[str], hook: AttentionHook) -> Condition:
        if len(self.text_encoders) > 1:
            raise ValueError(
                f"{self.name} has {len(self.text_encoders)} text encoders, and relevance passes through one only: "
                "leave text_attention out"
            )
        encoder = unwrap(self.pipeline.text_encoder)
        modules = [module for name, module in encoder.named_modules() if name.endswith("self_attn")]
        before = encoder.config._attn_implementation
        encoder.set_attn_implementation("eager")  # the other implementations do not return probabilities
        handles = [module.register_forward_hook(attention_output_hook(hook), with_kwargs=True) for module in modules]
        try:
            return self.encode_prompts(prompts)
        finally:
            for handle in handles:
                handle.remove()
            encoder.set_attn_implementation(before)

    def use_attention(self, backend: str) -> None:
        self._attention = attention_backend(backend, self.device, self.dtype)
        self.attention_backend = self._attention.name

    def performance_warnings(self) -> list[str]:
        warnings = []
        if reason := unsupported_reason(self.unet):
            warnings.append(f"the UNet falls back to diffusers' own forward: {reason}")
        if self.compiled and self._compiled_size != self.batch_size:
            warnings.append(f"compiled for batches of {self._compiled_size}, but batches have {self.batch_size}")
        return warnings

    def compile(self) -> None:
        if reason := unsupported_reason(self.unet):
            raise ValueError(f"{self.name} cannot be compiled: {reason}")
        options = _COMPILER_OPTIONS.get(self.device.type)
        self._compiled = torch.compile(forward, dynamic=False, fullgraph=True, options=options)
        self.compiled, self._compiled_size = True, self.batch_size

    def run(
        self,
        x: Float[Tensor, "n c h w"],
        embedding: Float[Tensor, "m e"],
        texts: Sequence[TextInput],
        kernels: Sequence[Tensor | None],
    ) -> Float[Tensor, "m c h w"]:
        """`unet.forward.forward`, compiled for the one frequent shape: a full batch under one prompt, or a pair.

        For that shape cuDNN searches for its fastest kernels, too.
        """
        is_shared = len(texts[0][0]) == len(embedding) // len(x)
        is_compiled = self.compiled and len(embedding) == self._compiled_size and is_shared
        function = self._compiled if is_compiled else forward
        with self._attention.activated(), _cudnn_benchmark(len(embedding) == self.batch_size):
            return function(self.unet, x, embedding, texts, self._attention.attend, kernels=kernels)


@contextmanager
def _cudnn_benchmark(is_on: bool) -> Iterator[None]:
    """Let cuDNN try its kernels on the first batch of each shape and keep the fastest, unless already enabled."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or is_on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check_parts(pipeline: Any, parts: Sequence[str]) -> None:
    """Raise ValueError for a pipeline without one of its parts, or with a network that tells nothing of itself."""
    if missing := [part for part in parts if getattr(pipeline, part, None) is None]:
        raise ValueError(f"the pipeline has no {' and no '.join(missing)}: load it with all of its parts")
    for part in ("unet", "vae"):
        network = unwrap(getattr(pipeline, part))
        if not hasattr(network, "config"):
            raise ValueError(
                f"the {part} is a {type(network).__name__}: give the pipeline diffusers' own model, untraced"
            )
    for part in parts:
        if getattr(getattr(pipeline, part), "model_max_length", 0) > _MAX_TOKENS:
            raise ValueError(f"the {part} does not tell how many tokens it takes: its folder is missing or incomplete")


def _check_unet(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Raise ValueError for the configuration of a UNet with more inputs than a latent, a time-step and a prompt."""
    own, channels = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if own != channels:
        raise ValueError(
            f"the UNet takes {own} channels but latents have {channels}: UNets for inpainting or "
            "editing are not supported; use the text-to-image model"
        )
    if unet.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "the UNet is conditioned on the guidance scale (a latent consistency model), which is not supported; use "
            "the model it was distilled from"
        )


def _own_size(unet: Any) -> tuple[int, int] | None:
    """(height, width) of the latents that a UNet was trained for, None if it does not tell.

    Raises ValueError for a size that no latent has.
    """
    size = unet.config.sample_size
    sides = size if isinstance(size, list | tuple) else (size, size)
    if size is None:
        return None
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in sides):
        raise ValueError(f"the UNet's sample_size is {size!r}: expected one or two whole numbers up to {_MAX_SIDE}")
    return sides[0], sides[1]


def _latent_size(factor: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the latents of an image size in pixels. Raises ValueError for one that no latent has."""
    sides = tuple(map(operator.index, image_size))
    if len(sides) != 2 or any(side % factor or not factor <= side <= factor * _MAX_SIDE for side in sides):
        raise ValueError(
            f"images of {_format_size(sides)} pixels are not possible: expected height × width in multiples of "
            f"{factor} up to {factor * _MAX_SIDE}"
        )
    return sides[0] // factor, sides[1] // factor


def _format_size(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))
