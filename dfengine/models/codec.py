"""The image codec of latent diffusion: an AutoencoderKL, with its latents' normalisation and its dtype."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

#: The codec is memory-bound with large activations: at most this many images, and pixels, at a time.
_MAX_IMAGES, _MAX_PIXELS = 8, 1024 * 1024


class Codec:
    """Converts between images in [0, 1] and latents, a few images at a time.

    With `upcasts`, a float16 VAE whose configuration says `force_upcast` runs in float32, where it does not overflow.
    """

    def __init__(self, vae: Any, image_shape: tuple[int, int], *, upcasts: bool = False) -> None:
        """`image_shape` is (height, width) in pixels."""
        self._vae, self._upcasts = vae, upcasts
        self._batch_size = max(1, min(_MAX_IMAGES, _MAX_PIXELS // math.prod(image_shape)))

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images in [0, 1], float32."""
        mean, std = self._latent_statistics(latents)
        with self._in_working_dtype() as vae:
            scaled = latents * std / vae.config.scaling_factor + mean
            parts = scaled.to(vae.dtype).split(self._batch_size)
            images = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """The latents of images in [0, 1], float32: their distribution's mode where the codec has one."""
        with self._in_working_dtype() as vae:
            parts = (2 * images - 1).to(vae.dtype).split(self._batch_size)
            latents = torch.cat([_latents(vae.encode(part)) for part in parts]).float()
            mean, std = self._latent_statistics(latents)
            return (latents - mean) / std * vae.config.scaling_factor

    def _latent_statistics(
        self, latents: Float[Tensor, "n c h w"]
    ) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
        """Mean and standard deviation of each latent channel, float32; 0 and 1 unless the configuration has them."""

        def channels(values: Sequence[float] | None, default: float) -> Tensor:
            values = values or [default] * latents.shape[1]
            return torch.tensor(values, dtype=torch.float32, device=latents.device)[None, :, None, None]

        config = self._vae.config
        return channels(config.get("latents_mean"), 0.0), channels(config.get("latents_std"), 1.0)

    @contextmanager
    def _in_working_dtype(self) -> Iterator[Any]:
        """The VAE, in float32 for the duration of the context if it has to be upcast."""
        if not (self._upcasts and self._vae.config.force_upcast and self._vae.dtype == torch.float16):
            yield self._vae
            return
        # diffusers' own `to` logs a warning at every change of dtype.
        nn.Module.to(self._vae, torch.float32)
        try:
            yield self._vae
        finally:
            nn.Module.to(self._vae, torch.float16)


def _latents(encoded: Any) -> Tensor:
    """Of a distribution of latents its mode."""
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents
