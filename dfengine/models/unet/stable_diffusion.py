"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel told of the prompt by one CLIP text encoder."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dfengine.diffusion.denoiser import AttentionHook, Condition, Denoiser, Layer, PromptedDenoiser
from dfengine.models.attention import attention, watched
from dfengine.models.scheduler import noise_schedule
from dfengine.models.tokenizers import check_prompt, tokens_of
from dfengine.models.unet import forward as fast
from dfengine.models.unet.cached import CachedUNet
from dfengine.models.unet.cpu import Folded
from dfengine.models.unet.hooks import layers_of, shown_to
from dfengine.tokens import Tokens

log = logging.getLogger(__name__)

#: The codec is memory-bound and its activations are large: at most so many images, and pixels, at a time.
_IMAGES_AT_ONCE, _PIXELS_AT_ONCE = 8, 1024 * 1024
#: Latent pixels in one forward, by default: what keeps a GPU busy, and what stays in a CPU's cache.
_PIXELS_IN_BATCH = {"cuda": 64 * 64 * 64, "cpu": 16 * 16 * 128}
#: What the compiler is told on a GPU: one shape, so that searching for its fastest kernels is worth it.
_COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
    "cuda": {
        "max_autotune": True,
        "triton.cudagraphs": False,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
    }
}


class StableDiffusion(Denoiser):
    """Brings a `StableDiffusionPipeline` (loaded LoRAs and textual inversions included) to the convention.

    `image_size` is (height, width) in pixels; by default the size that the model was trained for. Raises ValueError for
    a size or a UNet that it cannot work with.
    """

    text_encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    """the pipeline's parts that read prompts"""
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
        backend: str = "auto",
    ) -> None:
        self.pipeline = pipeline
        self.unet, self.vae = pipeline.unet, pipeline.vae
        _check_unet(pipeline)
        for network in (self.unet, self.vae, *(getattr(pipeline, part) for part in self.text_encoders)):
            network.eval().requires_grad_(False)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.schedule = noise_schedule(pipeline.scheduler)
        height, width = _latent_size(pipeline, image_size)
        self.latent_shape = (self.unet.config.in_channels, height, width)
        self.image_shape = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        self.name = name if (height, width) == _latent_size(pipeline) else f"{name} ({_times(self.image_shape)} pixels)"
        self.device, self.dtype = self.unet.device, self.unet.dtype
        pixels = _PIXELS_IN_BATCH.get(self.device.type, _PIXELS_IN_BATCH["cpu"])
        self.batch_size = batch_size or max(1, pixels // (height * width))
        self.use_attention(backend)
        self._compiled: Any = None
        self._compiled_size = 0
        self._told: str | None = None
        self._layers: dict[str, Layer] | None = None
        self._images_at_once = max(1, min(_IMAGES_AT_ONCE, _PIXELS_AT_ONCE // math.prod(self.image_shape)))

    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        x_t = x_t.to(self.dtype, memory_format=torch.channels_last)
        # What a condition holds beside the text is named as the UNet names its added conditions.
        added = {name: value for name, value in condition.tensors.items() if name != "text"}
        text = condition.tensors["text"]
        with self._attention.chosen(), _searching(len(x_t) == self.batch_size):
            return self.unet(x_t, timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]

    def with_prompts(self, condition: Condition) -> PromptedDenoiser:
        """The UNet's own weights by `models.unet`, which makes the prompts' keys and values once.

        A UNet that is more than that module knows runs by diffusers' own forward, as in `predict`. Hooks and weights
        are those of this moment: whoever changes them binds anew.
        """
        different = fast.difference(self.unet)
        if different and different != self._told:
            log.info("the UNet runs by diffusers' own forward, which is slower: %s", different)
        self._told = different
        self.compiled = self.compiled and not different
        return PromptedDenoiser(self, condition) if different else CachedUNet(self, condition)

    def layers(self) -> dict[str, Layer]:
        """Every resnet, transformer, down- and upsampler."""
        if self._layers is None:
            self._layers = layers_of(self.unet, self.latent_shape, self.encode_prompts([""]))
        return self._layers

    def require_attention(self) -> None:
        if different := fast.difference(self.unet):
            raise ValueError(
                f"the attention of {self.name} cannot be seen: {different}; undo that (unet.eval(), "
                "unet.disable_freeu(), unet.set_default_attn_processor(), removing the hook) or load the UNet afresh"
            )

    def with_attention_hook(
        self, condition: Condition, text: AttentionHook, image: AttentionHook | None = None
    ) -> PromptedDenoiser:
        self.require_attention()
        grids = fast.grids(self.unet, self.latent_shape[1:])
        attend = self._attention.attend if image is None else watched(image, grids)
        return CachedUNet(self, condition, partial(fast.forward, attend=attend, cross=watched(text, grids)))

    def zero_tokens(self, condition: Condition, places: Sequence[int]) -> Condition:
        text = condition.tensors["text"].clone()
        text[:, places] = 0
        return Condition({**condition.tensors, "text": text})

    def with_text_attention_hook(self, prompts: Sequence[str], watch: AttentionHook) -> Condition:
        if len(self.text_encoders) > 1:
            raise ValueError(
                f"{self.name} has {len(self.text_encoders)} text encoders, and relevance passes through one: leave "
                "text_attention out"
            )
        encoder = self.pipeline.text_encoder
        parts = [module for name, module in encoder.named_modules() if name.endswith("self_attn")]
        before = encoder.config._attn_implementation
        encoder.set_attn_implementation("eager")  # the others do not tell their probabilities
        hooks = [part.register_forward_hook(shown_to(watch), with_kwargs=True) for part in parts]
        try:
            return self.encode_prompts(prompts)
        finally:
            for hook in hooks:
                hook.remove()
            encoder.set_attn_implementation(before)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """With torch's attention in place of xformers', which `torch.func` cannot see through."""
        from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor

        before = self.unet.attn_processors
        torchs = {name: AttnProcessor2_0() for name, one in before.items() if isinstance(one, XFormersAttnProcessor)}
        self.unet.set_attn_processor({**before, **torchs})
        try:
            yield
        finally:
            self.unet.set_attn_processor(before)

    def use_attention(self, backend: str) -> None:
        self._attention = attention(backend, self.device, self.dtype)
        self.attention_backend = self._attention.name

    def performance_warnings(self) -> list[str]:
        different, slower = fast.difference(self.unet), []
        if different:
            slower.append(f"the UNet runs by diffusers' own forward: {different}")
        if self.compiled and self._compiled_size != self.batch_size:
            slower.append(f"compiled for batches of {self._compiled_size}, and batches are of {self.batch_size}")
        return slower

    def compile(self) -> None:
        if different := fast.difference(self.unet):
            raise ValueError(f"{self.name} cannot be compiled: {different}")
        options = _COMPILER_OPTIONS.get(self.device.type)
        self._compiled = torch.compile(fast.forward, dynamic=False, fullgraph=True, options=options)
        self.compiled, self._compiled_size = True, self.batch_size

    def run(
        self,
        x: Float[Tensor, "n c h w"],
        embedding: Float[Tensor, "m e"],
        texts: Sequence[fast.KeysValues | Folded],
        kernels: Sequence[Tensor | None],
    ) -> Float[Tensor, "m c h w"]:
        """`unet.forward`, compiled for the one size that is worth it: a whole batch of one prompt, or of a pair.

        For that size cuDNN, too, looks for its fastest kernels.
        """
        shares = len(texts[0][0]) == len(embedding) // len(x)
        is_compiled = self.compiled and len(embedding) == self._compiled_size and shares
        forward = self._compiled if is_compiled else fast.forward
        with self._attention.chosen(), _searching(len(embedding) == self.batch_size):
            return forward(self.unet, x, embedding, texts, self._attention.attend, kernels=kernels)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self.check(prompts)
        text, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return Condition({"text": text.to(self.dtype)})

    def tokens(self, prompt: str) -> Tokens:
        """Raises ValueError, too, where text encoders divide the prompt differently: positions would be ambiguous."""
        self.check([prompt])
        read = [tokens_of(self.pipeline, getattr(self.pipeline, part), prompt) for part in self.tokenizers]
        if any(other.spans != read[0].spans for other in read):
            raise ValueError(f"the tokenizers of {self.name} divide {prompt!r} differently: a token has no one place")
        return read[0]

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ValueError for a prompt that one of the text encoders cannot be told whole."""
        for prompt in prompts:
            for part in self.tokenizers:
                check_prompt(getattr(self.pipeline, part), prompt)

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        mean, std = self._normalisation
        with self._codec() as vae:
            parts = (latents * std / vae.config.scaling_factor + mean).to(vae.dtype).split(self._images_at_once)
            images = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        mean, std = self._normalisation
        with self._codec() as vae:
            parts = (2 * images - 1).to(vae.dtype).split(self._images_at_once)
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
        return (latents.float() - mean) / std * vae.config.scaling_factor

    @property
    def _normalisation(self) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
        """Mean and standard deviation of the codec's latents; 0 and 1 where its configuration names none."""

        def column(values: Sequence[float] | None, default: float) -> Tensor:
            values = values or [default] * self.latent_shape[0]
            return torch.tensor(values, dtype=torch.float32, device=self.device)[None, :, None, None]

        config = self.vae.config
        return column(config.get("latents_mean"), 0.0), column(config.get("latents_std"), 1.0)

    @contextmanager
    def _codec(self) -> Iterator[Any]:
        """The VAE, for as long as it is used in float32 if it would overflow in float16."""
        if not (self.upcasts and self.vae.config.force_upcast and self.vae.dtype == torch.float16):
            yield self.vae
            return
        # diffusers' own `to` prints a warning at every change of dtype.
        nn.Module.to(self.vae, torch.float32)
        try:
            yield self.vae
        finally:
            nn.Module.to(self.vae, torch.float16)


@contextmanager
def _searching(is_on: bool) -> Iterator[None]:
    """While inside, cuDNN tries its kernels on the first batch of a shape and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or is_on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check_unet(pipeline: Any) -> None:
    """Raise ValueError for a UNet that wants to be told of more than a latent, a time-step and a prompt."""
    config, channels = pipeline.unet.config, pipeline.vae.config.latent_channels
    if config.in_channels != channels:
        raise ValueError(
            f"the UNet takes {config.in_channels} channels and a latent has {channels}: a UNet for inpainting or "
            "editing is not supported; use the text-to-image model"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "the UNet is told the guidance scale (a latent consistency model), which is not supported; use the model "
            "it was distilled from"
        )


def _latent_size(pipeline: Any, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """(height, width) of latents. Raises ValueError for an image size, in pixels, that no latent has."""
    if image_size is None:
        size = pipeline.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)
    factor = pipeline.vae_scale_factor
    if any(side < factor or side % factor for side in image_size):
        raise ValueError(
            f"images of {_times(image_size)} pixels are not possible: expected height × width in multiples of {factor}"
        )
    height, width = map(operator.index, image_size)
    return height // factor, width // factor


def _times(sides: Sequence[int]) -> str:
    return "×".join(map(str, sides))
