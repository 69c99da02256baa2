"""What an explanation is to the one who asked for it: arrays, and pictures of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch.nn import functional as F


class Explanation:
    """What a result in memory and an item of a file have in common."""

    prompt: Any
    seed: Any
    model: Any
    image: Any
    timesteps: Any
    previews: Any
    maps: Any
    scores: Any

    def heatmap(self, name: str, step: int) -> Float[ndarray, "H W"]:
        """The map of one step in [0, 1], at the image's size: min–max [9], then bilinear.

        Raises ValueError for a map or a step that is not there, or not computed yet.
        """
        if name not in self.maps:
            raise ValueError(f"there is no map {name!r}: expected one of {', '.join(self.maps) or 'none'}")
        maps = self.maps[name]
        if not -len(maps) <= step < len(maps):
            raise ValueError(f"step {step} is outside [0, {len(maps) - 1}]: steps are indices into `timesteps`")
        saliency = np.asarray(maps[step])
        if np.isnan(saliency).all():
            raise ValueError(f"step {step} of {name!r} is not computed yet")
        return heatmap(saliency, self.image.shape[:2])


@dataclass(frozen=True)
class Result(Explanation):
    """The explanation of one image. Maps are raw: float32, before any normalisation, NaN where not computed."""

    prompt: str
    seed: int
    model: str
    image: UInt8[ndarray, "H W 3"]
    timesteps: Int[ndarray, " steps"]
    alpha_bar: Float[ndarray, " steps"]
    latents: Float[ndarray, "steps c h w"]
    """R_t"""
    epsilon: Float[ndarray, "steps c h w"]
    """ε(R_t), with guidance"""
    previews: UInt8[ndarray, "steps H W 3"] | None = None
    """the image predicted at each step (x0, decoded)"""
    maps: Mapping[str, Float[ndarray, "steps h w"]] = field(default_factory=dict)
    errors: Mapping[str, Float[ndarray, "steps h w"]] = field(default_factory=dict)
    """the standard error of each map, per pixel"""
    scores: Mapping[str, Float[ndarray, "steps masks"]] = field(default_factory=dict)
    """each mask's mean score"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """each explainer, under the name its maps are filed by"""


def heatmap(saliency: Float[ndarray, "h w"], size: tuple[int, int]) -> Float[ndarray, "H W"]:
    """Min–max to [0, 1] [9], a constant map to zeros, then bilinear to `size` (half-pixel centres)."""
    low, high = np.nanmin(saliency), np.nanmax(saliency)
    scaled = (saliency - low) / (high - low) if high > low else np.zeros_like(saliency)
    grid = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))[None, None]
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
