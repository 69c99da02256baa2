"""The explanation of one image: its arrays, and heat maps of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from numpy import ndarray
from torch.nn import functional as F

from dfengine.tokens import Tokens, folded

#: Name of DF-CAM's map of all layers together.
COMBINED = "combined"


class Explanation:
    """The interface that a result in memory and an item of a file share."""

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
    word_errors: Any
    labels: Mapping[str, str] = MappingProxyType({})
    forms: Mapping[str, str] = MappingProxyType({})
    hots: Mapping[str, str] = MappingProxyType({})

    def heatmap(self, name: str, step: int, layer: str | None = None) -> Float[ndarray, "H W"]:
        """One step's map in [0, 1] at the image's size: min–max (Eq. 9), then bilinear.

        `name` is a method, or a word that has maps (the mean over all its occurrences); `layer` is one of
        DF-CAM's layers, "combined" by default.
        Raises ValueError for an unknown map or step, or one that is not computed yet.
        """
        maps = self._maps(name, layer)
        if not -len(maps) <= step < len(maps):
            raise ValueError(f"step {step} is outside [0, {len(maps) - 1}]: steps are indices into `timesteps`")
        saliency = np.asarray(maps[step])
        if np.isnan(saliency).all():
            raise ValueError(f"step {step} of {name!r} is not computed yet")
        return heatmap(saliency, self.image.shape[:2])

    def _maps(self, name: str, layer: str | None) -> Any:
        """The raw maps [steps, h, w] of a method, layer or word."""
        rows = [row for row, word in enumerate(self.words) if folded(word) == folded(name)]
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

    def label(self, method: str) -> str:
        """The method's name for readers, such as "DF-RISE"; `method` itself where no label is known."""
        return self.labels.get(method, method)

    def form(self, method: str) -> str:
        """The kind of figure that suits a method's maps: "saliency", "layers" (a map per layer), "tokens" (relevance of
        the prompt's tokens) or "words" (a map per word)."""
        return self.forms.get(method) or ("layers" if isinstance(self.maps[method], Mapping) else "saliency")

    def hot(self, method: str) -> str:
        """What high values of the method's maps mean, after "Hot:"; empty where that is unknown."""
        return self.hots.get(method, "")

    def settings_of(self, method: str) -> Mapping[str, Any]:
        """A method's settings as plain values, with its class's name as "explainer"; empty where they are unknown."""
        explainer = self.settings.get(method)
        if not is_dataclass(explainer):
            return {}
        return {"explainer": type(explainer).__name__} | {
            one.name: getattr(explainer, one.name) for one in fields(explainer)
        }

    def saliency(self, method: str) -> Any:
        """A method's raw maps, [steps, h, w]; for maps by layer, those of all layers combined."""
        maps = self.maps[method]
        return maps[COMBINED] if isinstance(maps, Mapping) else maps

    def concept(self, concept: str, *, summed: bool = False) -> Float[ndarray, " steps"]:
        """Relevance of a word or phrase of the prompt at each step: the mean over its tokens, or with `summed` their
        sum (as in the authors' released code).

        Raises ValueError if the phrase is not in the prompt, or the result has no relevance.
        """
        if self.tokens is None:
            raise ValueError("the result has no relevance: explain with Relevance()")
        rows = np.asarray(self.relevance)[self.tokens.find(concept)]
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
    """The explanation of one image. Maps are raw float32, not normalised, NaN where not computed."""

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
    """by method, float [steps, h, w]; for DF-CAM by layer, float [steps, u, v], and "combined", float [steps, h, w]"""
    errors: Mapping[str, Float[ndarray, "steps h w"]] = field(default_factory=dict)
    """standard error of each pixel, for methods that estimate it"""
    scores: Mapping[str, Float[ndarray, "steps masks"]] = field(default_factory=dict)
    """mean score of each mask, for methods that use masks"""
    tokens: Tokens | None = None
    relevance: Float[ndarray, "tokens steps"] | None = None
    words: Sequence[str] = ()
    word_maps: Float[ndarray, "words steps h w"] | None = None
    """the map of each word; one row per occurrence unless words were named"""
    word_errors: Float[ndarray, "words steps h w"] | None = None
    """standard error of these maps, for methods that estimate it; infinite where nothing was measured"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """each explainer, by method"""
    labels: Mapping[str, str] = field(default_factory=dict)
    """each method's name for readers, e.g. DF-RISE"""
    forms: Mapping[str, str] = field(default_factory=dict)
    """the kind of figure that suits each method's maps: see `form`"""
    hots: Mapping[str, str] = field(default_factory=dict)
    """what high values of each method's maps mean: see `hot`"""


def model_name(model: str) -> str:
    """The name to display for a model: its hub id, or the last part of an absolute path."""
    return PurePath(model).name if PurePath(model).is_absolute() else model


def as_call(settings: Mapping[str, Any]) -> str:
    """Settings from `Explanation.settings_of` as a constructor call, without those that are None."""
    if not settings:
        return ""
    given = {name: value for name, value in settings.items() if name not in ("explainer", "name") and value is not None}
    return f"{settings.get('explainer', '')}({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def heatmap(saliency: Float[ndarray, "h w"], size: tuple[int, int]) -> Float[ndarray, "H W"]:
    """A map scaled to [0, 1] by min–max (Eq. 9; zeros if it is constant), then resized bilinearly to `size`
    (half-pixel centres).

    Values that are not finite become NaN, and so do pixels interpolated from them.
    """
    saliency = np.where(np.isfinite(saliency), saliency, np.nan)
    low, high = np.nanmin(saliency), np.nanmax(saliency)
    scaled = (saliency - low) / (high - low) if high > low else np.zeros_like(saliency)
    grid = torch.from_numpy(np.ascontiguousarray(scaled, dtype=np.float32))[None, None]
    return F.interpolate(grid, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def finite_steps(relevance: Float[ndarray, "tokens steps"], tokens: Tokens) -> Float[ndarray, "tokens steps"]:
    """Relevance, with NaN at each step at which any of the prompt's own tokens is not finite."""
    return np.where(np.isfinite(relevance[tokens.own]).all(0), relevance, np.nan)


def normalised(relevance: Float[ndarray, "tokens steps"], tokens: Tokens) -> Float[ndarray, "tokens steps"]:
    """Relevance scaled by min–max at each step over the prompt's own tokens, as in Table 3; zeros where they are equal.

    A step is NaN if any of those tokens is not finite there.
    """
    relevance = finite_steps(relevance, tokens)
    own = relevance[tokens.own]
    low, high = own.min(0), own.max(0)
    return (relevance - low) / np.where(high > low, high - low, 1)
