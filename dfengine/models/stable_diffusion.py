"""Stable Diffusion 1.x and 2.x: a UNet2DConditionModel told of the prompt by one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfengine.denoiser import Condition, Denoiser
from dfengine.schedule import NoiseSchedule

#: Decoding is memory-bound and its activations are large: this many images at a time.
_IMAGES_AT_ONCE = 8


class StableDiffusion(Denoiser):
    """Brings a `StableDiffusionPipeline` (loaded LoRAs and textual inversions included) to the convention."""

    def __init__(self, pipeline: Any, *, name: str, batch_size: int | None = None) -> None:
        self.pipeline = pipeline
        self.name = name
        self.unet, self.vae = pipeline.unet, pipeline.vae
        for network in (self.unet, self.vae, pipeline.text_encoder):
            network.eval().requires_grad_(False)
        self.unet.to(memory_format=torch.channels_last)
        self.vae.to(memory_format=torch.channels_last)
        self.schedule = NoiseSchedule.from_config(pipeline.scheduler.config)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (self.unet.config.in_channels, height, width)
        self.image_shape = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
        self.device, self.dtype = self.unet.device, self.unet.dtype
        self.batch_size = batch_size or max(1, 64 * 64 * 64 // (height * width) if self.device.type == "cuda" else 64)

    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        x_t = x_t.to(self.dtype, memory_format=torch.channels_last)
        return self.unet(x_t, timesteps, encoder_hidden_states=condition.tensors["text"], return_dict=False)[0]

    def condition(self, prompts: Sequence[str]) -> Condition:
        for prompt in prompts:
            check_prompt(self.pipeline.tokenizer, prompt)
        text, _ = self.pipeline.encode_prompt(list(prompts), self.device, 1, do_classifier_free_guidance=False)
        return Condition({"text": text.to(self.dtype)})

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        parts = (latents / self.vae.config.scaling_factor).to(self.vae.dtype).split(_IMAGES_AT_ONCE)
        images = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        parts = (2 * images - 1).to(self.vae.dtype).split(_IMAGES_AT_ONCE)
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return latents.float() * self.vae.config.scaling_factor


def check_prompt(tokenizer: Any, prompt: str) -> None:
    """Raise ValueError for a prompt that is too long, or has a word outside a closed vocabulary."""
    vocabulary = tokenizer.init_kwargs.get("words")
    if vocabulary:
        unknown = [word for word in prompt.lower().split() if word not in vocabulary]
        if unknown:
            raise ValueError(
                f"the model does not know {', '.join(map(repr, unknown))}; its words are: {' '.join(vocabulary)}"
            )
    tokens = tokenizer(prompt, truncation=False, return_offsets_mapping=True, verbose=False)
    limit = tokenizer.model_max_length
    if len(tokens.input_ids) > limit:
        # The last of the tokens that fit is the end-of-text token.
        cut = prompt[tokens.offset_mapping[limit - 1][0] :]
        raise ValueError(
            f"the prompt has {len(tokens.input_ids) - 2} tokens and the model takes {limit - 2}: "
            f"{cut!r} would be cut; shorten it"
        )
