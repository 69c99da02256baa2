"""Between the tensors that a pipeline passes on and latents of [c, h, w], and between latents and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

#: How much a latent's proportions may differ from its image's, which a pipeline may have resized and cropped.
_PROPORTION = 0.02


@dataclass(frozen=True)
class Layout:
    """How an image's latent of [c, h, w] lies in a tensor of the scheduler's: so, with axes of 1, or as tokens."""

    own: tuple[int, ...]
    """the tensor's shape"""
    latent: tuple[int, int, int]

    @classmethod
    def of(cls, shape: Sequence[int], image: tuple[int, int]) -> Layout:
        """The layout of a tensor whose image has (height, width) pixels: both axes have as many tokens to the pixel.

        Raises ValueError for a tensor that is no image's, such as a video's, or of a part of the image.
        """
        sizes = tuple(size for size in shape if size > 1) if len(shape) > 3 else tuple(shape)
        if len(sizes) == 3:
            if abs(sizes[1] * image[1] / (sizes[2] * image[0]) - 1) > _PROPORTION:
                raise ValueError(
                    f"the latent of {sizes[1]}×{sizes[2]} has not the proportions of the image, {image[0]}×{image[1]} "
                    "pixels, which was cropped or pasted: record a call without"
                )
            return cls(tuple(shape), sizes)
        if len(sizes) == 2:
            tokens, channels = sizes
            height = round((tokens * image[0] / image[1]) ** 0.5)
            if height and tokens % height == 0 and height * image[1] == tokens // height * image[0]:
                return cls(tuple(shape), (channels, height, tokens // height))
            raise ValueError(f"{tokens} tokens are no grid over an image of {image[0]}×{image[1]} pixels")
        raise ValueError(
            f"latents of shape {tuple(shape)} are no image's: expected one frame of channels, height, width"
        )

    @property
    def has_tokens(self) -> bool:
        """Whether a latent is a row of tokens."""
        return len(self.own) == 2

    def to_latents(self, values: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """Latents of the scheduler's tensors."""
        if self.has_tokens:
            return values.transpose(1, 2).unflatten(2, self.latent[1:])
        return values.reshape(len(values), *self.latent)

    def to_own(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """The scheduler's tensors of latents."""
        if self.has_tokens:
            return latents.flatten(2).transpose(1, 2)
        return latents.reshape(len(latents), *self.own)


@dataclass(frozen=True)
class Decoding:
    """What the image codec was given, from the latents of the last step: scaled, shifted, and patches put in place."""

    patch: int
    """pixels a side of the codec's latent in one of ours"""
    is_channels_first: bool
    """whether a latent's channels count the codec's channel first, then the place in the patch"""
    scale: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]
    own: tuple[int, ...]
    """the shape of one latent as the codec takes it"""
    dtype: torch.dtype
    """of what the codec was given"""

    def __call__(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        z = latents * self.scale[:, None, None].to(latents) + self.shift[:, None, None].to(latents)
        if not self.is_channels_first:
            n, c, h, w = z.shape
            z = z.view(n, self.patch**2, -1, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.pixel_shuffle(z, self.patch).reshape(len(z), *self.own).to(self.dtype)

    @classmethod
    def between(cls, latent: Float[Tensor, "c h w"], given: Tensor) -> Decoding | None:
        """What leads from a latent to what the codec was given for it; None if nothing of this form does."""
        own, (c, h, w) = tuple(given.shape), latent.shape
        z = given.reshape([size for size in own if size > 1] if len(own) > 3 else own).double()
        if z.ndim != 3 or z.shape[1] % h or z.numel() != latent.numel():
            return None
        patch = z.shape[1] // h
        packed = F.pixel_unshuffle(z, patch)  # the codec's channel first
        x = latent.double().flatten(1)
        dx = x - x.mean(1, keepdim=True)
        best: tuple[float, Decoding] | None = None
        for is_channels_first in (True, False) if patch > 1 else (True,):
            y = packed if is_channels_first else packed.view(-1, patch**2, h, w).transpose(0, 1).reshape(c, h, w)
            y = y.flatten(1)
            dy = y - y.mean(1, keepdim=True)
            scale = (dx * dy).sum(1) / (dx * dx).sum(1).clamp(min=1e-30)
            residual = float((dy - scale[:, None] * dx).norm() / dy.norm().clamp(min=1e-30))
            if best is None or residual < best[0]:
                shift = y.mean(1) - scale * x.mean(1)
                best = residual, cls(patch, is_channels_first, scale.float(), shift.float(), own, given.dtype)
        return best[1] if best is not None and best[0] < 1e-2 else None


def images_of(output: Any) -> list[UInt8[Tensor, "H W 3"]]:
    """The images that a pipeline returned: PIL images, arrays or tensors in [0, 1]. Empty if it returned none."""
    images: Any = output[0] if isinstance(output, tuple) else getattr(output, "images", None)
    if isinstance(images, Tensor):
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            return []
        images = images.permute(0, 2, 3, 1).float().cpu().numpy()
    if images is None or not len(images) or isinstance(images[0], list):
        return []
    return [_to_bytes(image) for image in images]


def _to_bytes(image: Any) -> UInt8[Tensor, "H W 3"]:
    values = np.asarray(image)
    if values.dtype != np.uint8:
        values = (np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    if values.ndim == 2:
        values = values[:, :, None]
    return torch.from_numpy(np.broadcast_to(values[:, :, :3], (*values.shape[:2], 3)).copy())
