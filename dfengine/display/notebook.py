"""How a notebook displays a result: a table of facts, and pictures of a few steps."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from dfengine.figures.panels import BLANK, is_blank, overlay, paragraphs, step_label, unique_labels
from dfengine.figures.selection import computed, evenly_spaced
from dfengine.result import Explanation, as_call

#: Maximum length of the longer side, in CSS pixels: of the image, and of a picture at a step.
IMAGE_SIDE, PICTURE_SIDE = 192, 128
#: Maximum number of steps.
NUM_STEPS = 5

_CELL = "text-align:left;vertical-align:top;padding:2px 6px"
#: What reading an item may raise: not stored, a damaged or closed file.
_UNREADABLE = (ValueError, OSError, RuntimeError, KeyError)


def html(result: Explanation) -> str:
    """The image beside a table of facts, and below them the predicted x0 and heat maps of a few steps.

    What is not stored, not computed or not readable is left out.
    """
    image, maps = _read(result, "image"), _readable_maps(result)
    picture = "" if image is None else f"<div>{_picture(image, IMAGE_SIDE, 'image')}</div>"
    strip = "" if image is None else f'<div style="overflow-x:auto">{_strip(result, image, maps)}</div>'
    facts = picture + _facts(result, maps)
    row = f'<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start">{facts}</div>'
    return f"<div>{row}{strip}</div>"


def _read(result: Explanation, name: str) -> Any:
    """An array of a result, or None if it has none or it cannot be read."""
    with suppress(*_UNREADABLE):
        values = getattr(result, name)
        return None if values is None else np.asarray(values)
    return None


def _readable_maps(result: Explanation) -> dict[str, Float[ndarray, "steps h w"]]:
    """Each method's raw maps (of all layers combined), without those that cannot be read."""
    maps = {}
    for name in result.maps:
        with suppress(*_UNREADABLE):
            maps[name] = np.asarray(result.saliency(name))
    return maps


def _facts(result: Explanation, maps: Mapping[str, Float[ndarray, "steps h w"]]) -> str:
    """A table of prompts, seed, model, steps, sizes, and each method with its settings."""
    image, latents, timesteps = (_read(result, name) for name in ("image", "latents", "timesteps"))
    rows = [("prompt", result.prompt)]
    if negative_prompt := getattr(result, "negative_prompt", ""):
        rows.append(("negative prompt", negative_prompt))
    rows += [("seed", result.seed), ("model", result.model)]
    if image is None or latents is None or timesteps is None:
        rows.append(("image", "not generated yet, or not readable"))
    else:
        rows.append(("steps", f"{len(timesteps)}: t = {timesteps[0]:g} … {timesteps[-1]:g}"))
        rows.append(("size", f"image {_size(image.shape[:2])}, latent {_size(latents.shape[1:])}"))
    for name, values in maps.items():
        layers = f", {len(result.maps[name]) - 1} layers" if isinstance(result.maps[name], Mapping) else ""
        call = as_call(result.settings_of(name))
        settings = f"; {call}" if call else ""
        rows.append(
            (name, f"{len(computed(values))} of {len(values)} maps, {_size(values.shape[1:])}{layers}{settings}")
        )
    cells = (
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{escape(str(text))}</td></tr>'
        for name, text in rows
    )
    return f'<table style="flex:1 1 20em;margin:0">{"".join(cells)}</table>'


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _strip(result: Explanation, image: UInt8[ndarray, "H W 3"], maps: Mapping[str, Float[ndarray, "steps h w"]]) -> str:
    """A column for each of a few steps (of those with maps, if any) with the predicted x0 and the maps over it."""
    previews = _read(result, "previews")
    finished = {name: computed(values) for name, values in maps.items()}
    candidates = sorted({step for steps in finished.values() for step in steps}) or range(len(result.timesteps))
    steps = [candidates[index] for index in evenly_spaced(len(candidates), NUM_STEPS)]
    pictures = {step: image if previews is None else previews[step] for step in steps}
    rows: dict[str, Any] = {} if previews is None else {"predicted x0": pictures}
    labels = unique_labels({name: result.label(name) for name in maps})
    for name, label in labels.items():
        heats = {step: result.heatmap(name, step) for step in steps if step in finished[name]}
        rows[label] = {step: _heat(pictures[step], heat) for step, heat in heats.items()}
    head = "".join(f'<td style="{_CELL}">{step_label(step, result.timesteps, "<br>")}</td>' for step in steps)
    body = "".join(
        f'<tr><th style="{_CELL}">{escape(label)}</th>'
        + "".join(f'<td style="{_CELL}">{_cell(row.get(step), f"{label}, step {step}")}</td>' for step in steps)
        + "</tr>"
        for label, row in rows.items()
    )
    table = f'<table style="margin:8px 0 0"><tr><th></th>{head}</tr>{body}</table>' if rows else ""
    meanings = paragraphs({label: result.hot(name) for name, label in labels.items()}) if labels else []
    return table + "".join(f'<div style="padding:2px 6px">{escape(one)}</div>' for one in meanings)


def _heat(picture: UInt8[ndarray, "H W 3"], heat: Float[ndarray, "H W"]) -> UInt8[ndarray, "H W 3"] | str:
    """A heat map over a picture, or what is said of one that is the same everywhere."""
    return BLANK if is_blank(heat) else (overlay(picture, heat) * 255).round().astype(np.uint8)


def _cell(pixels: UInt8[ndarray, "H W 3"] | str | None, alt: str) -> str:
    if isinstance(pixels, str):
        return pixels
    return "not computed" if pixels is None else _picture(pixels, PICTURE_SIDE, alt)


def _picture(pixels: UInt8[ndarray, "H W 3"], side: int, alt: str) -> str:
    """An image element with inline data: small pictures are exact and enlarged by whole pixels, large ones shrunk."""
    picture, file = Image.fromarray(pixels), BytesIO()
    kind = "png" if max(picture.size) <= side else "jpeg"
    picture.thumbnail((side, side))
    picture.save(file, kind, quality=85)
    scale = side // max(picture.size)
    width, height = (scale * length for length in picture.size)
    style = "max-width:none;margin:0" + (";image-rendering:pixelated" if scale > 1 else "")
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img src="{data}" width="{width}" height="{height}" alt="{escape(alt)}" style="{style}">'
