"""What an explanation is to the one who asked for it: arrays, and pictures of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from numpy import ndarray
from torch.nn import functional as F

from dfengine.tokens import Tokens

#: DF-CAM's map of all layers together.
COMBINED = "combined"


class Explanation:
    """What a result in memory and an item of a file have in common."""

    prompt: Any
    seed: Any
    model: Any
    image: Any
    timesteps: Any
    signal: Any
    noise: Any
    latents: Any
    epsilon: Any
    previews: Any
    maps: Any
    errors: Any
    scores: Any
    settings: Any
    tokens: Any
    relevance: Any
    words: Any
    word_maps: Any

    def heatmap(self, name: str, step: int, layer: str | None = None) -> Float[ndarray, "H W"]:
        """The map of one step in [0, 1], at the image's size: min–max [9], then bilinear.

        `name` is a method's, or a word's that has attention maps (all its occurrences together); `layer` is one of
        DF-CAM's, by default all "combined".
        Raises ValueError for a map or a step that is not there, or not computed yet.
        """
        maps = self._maps(name, layer)
        if not -len(maps) <= step < len(maps):
            raise ValueError(f"step {step} is outside [0, {len(maps) - 1}]: steps are indices into `timesteps`")
        saliency = np.asarray(maps[step])
        if np.isnan(saliency).all():
            raise ValueError(f"step {step} of {name!r} is not computed yet")
        return heatmap(saliency, self.image.shape[:2])

    def _maps(self, name: str, layer: str | None) -> Any:
        """The raw maps of a method, a layer or a word, with the steps along the first axis."""
        rows = [row for row, word in enumerate(self.words) if word.casefold() == name.casefold()]
        if rows and name not in self.maps:
            if layer is not None:
                raise ValueError(f"the map of the word {name!r} has no layers: leave {layer!r} out")
            return np.asarray(self.word_maps)[rows].mean(0)
        if name not in self.maps:
            known = ", ".join([*self.maps, *self.words]) or "none"
            raise ValueError(f"there is no map {name!r}: expected one of {known}")
        maps = self.maps[name]
        if not isinstance(maps, Mapping):
            if layer is not None:
                raise ValueError(f"the maps of {name!r} have no layers: leave {layer!r} out")
            return maps
        if (layer or COMBINED) not in maps:
            raise ValueError(f"{name!r} has no layer {layer!r}: expected one of {', '.join(maps)}")
        return maps[layer or COMBINED]

    def settings_of(self, method: str) -> Mapping[str, Any]:
        """A method's settings as plain values, and as "explainer" its class's name; nothing of what is not known."""
        explainer = self.settings.get(method)
        if not is_dataclass(explainer):
            return {}
        return {"explainer": type(explainer).__name__} | {
            one.name: getattr(explainer, one.name) for one in fields(explainer)
        }

    def explainer_name(self, method: str) -> str:
        """The name of a method's explainer, as of the paper's form ("Rise" of `XDiffusionRise`); "" where not known.

        What has maps by layer is "Cam".
        """
        if isinstance(self.maps[method], Mapping):
            return "Cam"
        return str(self.settings_of(method).get("explainer", "")).removeprefix("Released")

    def saliency(self, method: str) -> Any:
        """A method's raw maps, [steps, h, w]: of DF-CAM, those of all layers together."""
        maps = self.maps[method]
        return maps[COMBINED] if isinstance(maps, Mapping) else maps

    def concept(self, concept: str, *, summed: bool = False) -> Float[ndarray, " steps"]:
        """The relevance of a word or phrase of the prompt at each step: the mean over its tokens, or their sum (as in
        the authors' released code).

        Raises ValueError where the prompt does not have it, or no relevance was asked for.
        """
        if self.tokens is None:
            raise ValueError("there is no relevance: explain with Relevance()")
        places = self.tokens.find(concept)
        rows = np.asarray(self.relevance)[places]
        return rows.sum(0) if summed else rows.mean(0)

    def __repr__(self) -> str:
        counts = {name: len(maps) - 1 for name, maps in self.maps.items() if isinstance(maps, Mapping)}
        maps = [f"{name} ({counts[name]} layers)" if name in counts else name for name in self.maps]
        prompt = textwrap.shorten(self.prompt, 80, placeholder=" …")
        return (
            f"{type(self).__name__}({prompt!r}, seed {self.seed}, {self.model}: "
            f"{len(self.latents)} steps; {', '.join(maps) or 'no maps'})"
        )


@dataclass(frozen=True, repr=False)
class Result(Explanation):
    """The explanation of one image. Maps are raw: float32, before any normalisation, NaN where not computed."""

    prompt: str
    seed: int
    model: str
    image: UInt8[ndarray, "H W 3"]
    timesteps: Shaped[ndarray, " steps"]
    signal: Float[ndarray, " steps"]
    """a of each step, R_t = a·x0 + b·n"""
    noise: Float[ndarray, " steps"]
    """b of each step"""
    latents: Float[ndarray, "steps c h w"]
    """R_t"""
    epsilon: Float[ndarray, "steps c h w"]
    """ε(R_t), with guidance"""
    previews: UInt8[ndarray, "steps H W 3"] | None = None
    """the image predicted at each step (x0, decoded)"""
    maps: Mapping[str, Any] = field(default_factory=dict)
    """by method, float [steps, h, w]; of DF-CAM by layer, float [steps, u, v], and "combined", float [steps, h, w]"""
    errors: Mapping[str, Float[ndarray, "steps h w"]] = field(default_factory=dict)
    """the standard error of each map, per pixel, of methods that have one"""
    scores: Mapping[str, Float[ndarray, "steps masks"]] = field(default_factory=dict)
    """each mask's mean score, of methods with masks"""
    tokens: Tokens | None = None
    relevance: Float[ndarray, "tokens steps"] | None = None
    words: Sequence[str] = ()
    word_maps: Float[ndarray, "words steps h w"] | None = None
    """cross-attention map of each word, a row for each occurrence unless words were named"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """each explainer, under the name its maps are filed by"""


def model_name(model: str) -> str:
    """What a model is called where it is shown: its hub id, or the name of its folder without the path to it."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def as_call(told: Mapping[str, Any]) -> str:
    """A method's settings (`Explanation.told`) as they would be given, without those that are left open."""
    given = {name: told[name] for name in told if name not in ("explainer", "name") and told[name] is not None}
    settings = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return f"{told.get('explainer', '')}({settings})" if told else ""


def heatmap(saliency: Float[ndarray, "h w"], size: tuple[int, int]) -> Float[ndarray, "H W"]:
    """Min–max to [0, 1] [9], a constant map to zeros, then bilinear to `size` (half-pixel centres).

    What is not finite is NaN, and so is what lies between it and its neighbours.
    """
    saliency = np.where(np.isfinite(saliency), saliency, np.nan)
    low, high = np.nanmin(saliency), np.nanmax(saliency)
    scaled = (saliency - low) / (high - low) if high > low else np.zeros_like(saliency)
    grid = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))[None, None]
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def normalised(relevance: Float[ndarray, "tokens steps"], tokens: Tokens) -> Float[ndarray, "tokens steps"]:
    """Min–max at each step over all tokens between the special ones, as in Table 3; zeros where those are all the same.

    A step that is not computed, or not finite, is NaN.
    """
    relevance = np.where(np.isfinite(relevance[tokens.own]).all(0), relevance, np.nan)
    own = relevance[tokens.own]
    low, high = own.min(0), own.max(0)
    return (relevance - low) / np.where(high > low, high - low, 1)
