"""A result as an xarray.Dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.result import COMBINED, Explanation
from dfengine.store import DATASETS

if TYPE_CHECKING:
    import xarray


def dataset(result: Explanation) -> xarray.Dataset:
    """All arrays of one image in memory, with the names and axes that they have in a file.

    Raises ValueError if xarray is not installed or the image is not generated yet.
    """
    try:
        import xarray
    except ImportError:
        raise ValueError("to_xarray requires xarray: pip install 'dfengine[xarray]'") from None
    texts = {"method": list(result.maps), "word": list(result.words)}
    texts["token"] = [] if result.tokens is None else list(result.tokens.texts)
    coordinates = {axis: (axis, values) for axis, values in texts.items() if values}
    variables: dict[str, Any] = {}
    for path, values in _arrays(result):
        axes = DATASETS[path].axis_names[1:]
        variables[path.rpartition("/")[2]] = axes, np.asarray(values), {"long_name": DATASETS[path].long_name}
    for (u, v), layers in _layers(result).items():
        path, axes = "cam/{u}x{v}/saliency", tuple(f"{axis}_{u}x{v}" for axis in ("layer", "u", "v"))
        coordinates[axes[0]] = axes[0], list(layers)
        stacked = np.stack([np.asarray(maps) for maps in layers.values()])
        variables[f"cam_{u}x{v}"] = (axes[0], "step", *axes[1:]), stacked, {"long_name": DATASETS[path].long_name}
    return xarray.Dataset(variables, coordinates, _attributes(result))


def _arrays(result: Explanation) -> Iterator[tuple[str, Any]]:
    """The available arrays except layers' maps, with their paths in a file; NaN for methods without values."""
    yield "images/rgb", result.image
    yield "schedule/timestep", result.timesteps
    yield "schedule/signal", result.signal
    yield "schedule/noise", result.noise
    yield "latents/latent", result.latents
    yield "latents/epsilon", result.epsilon
    maps = {name: result.saliency(name) for name in result.maps}
    for path, by_method in (("maps/saliency", maps), ("maps/error", result.errors), ("scores/score", result.scores)):
        if by_method:
            yield path, _stacked(by_method, list(maps))
    for path, values in (
        ("images/preview", result.previews),
        ("curves/relevance", result.relevance),
        ("curves/heat", result.word_maps),
        ("curves/heat_error", result.word_errors),
    ):
        if values is not None:
            yield path, values


def _stacked(by_method: Mapping[str, Any], methods: list[str]) -> Float[ndarray, "methods steps *rest"]:
    """One array for all methods, padded with NaN for methods without values or with fewer masks."""
    arrays = {name: np.asarray(values) for name, values in by_method.items()}
    shape = np.max([values.shape for values in arrays.values()], axis=0)
    stacked = np.full((len(methods), *shape), np.nan, np.float32)
    for name, values in arrays.items():
        stacked[methods.index(name)][tuple(map(slice, values.shape))] = values
    return stacked


def _layers(result: Explanation) -> dict[tuple[int, int], dict[str, Any]]:
    """Layers' maps by resolution and layer."""
    layers: dict[tuple[int, int], dict[str, Any]] = {}
    for maps in result.maps.values():
        for name, values in maps.items() if isinstance(maps, Mapping) else ():
            if name != COMBINED:
                layers.setdefault(values.shape[1:], {})[name] = values
    return layers


def _attributes(result: Explanation) -> dict[str, Any]:
    """Prompts, seed, model, and the methods' settings as JSON."""
    attributes = {"prompt": result.prompt, "seed": result.seed, "model": result.model}
    if negative_prompt := getattr(result, "negative_prompt", ""):
        attributes["negative_prompt"] = negative_prompt
    attributes["settings"] = json.dumps({name: dict(result.settings_of(name)) for name in result.maps}, default=repr)
    return attributes
