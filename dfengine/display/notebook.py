"""How a notebook shows a result: its pictures and a table of what it is."""

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

from dfengine import figures
from dfengine.figures.choosing import computed
from dfengine.result import Explanation, as_call

#: CSS pixels of the longer side, at most: of the image, and of a picture at a step.
IMAGE, PICTURE = 192, 128
#: How many steps are shown.
STEPS = 5

_CELL = "text-align:left;vertical-align:top;padding:2px 6px"


def html(result: Explanation) -> str:
    """The image beside a table of what it is, and below them predicted x0 and heat maps of a few steps.

    What is not stored, not computed or not readable is left out.
    """
    image, maps = _read(result, "image"), _maps(result)
    shown = "" if image is None else f"<div>{_picture(image, IMAGE, 'image')}</div>"
    strip = "" if image is None else f'<div style="overflow-x:auto">{_strip(result, image, maps)}</div>'
    facts = f"{shown}{_facts(result, maps)}"
    row = f'<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start">{facts}</div>'
    return f"<div>{row}{strip}</div>"


def _read(result: Explanation, name: str) -> Any:
    """An array of a result, or None where it has none: not kept or not stored yet, its file damaged or closed."""
    with suppress(ValueError, OSError, RuntimeError, KeyError):
        values = getattr(result, name)
        return None if values is None else np.asarray(values)
    return None


def _maps(result: Explanation) -> dict[str, Float[ndarray, "steps h w"]]:
    """The raw maps of each method, of DF-CAM those of all layers; nothing for those that cannot be read."""
    found = {}
    for name in result.maps:
        with suppress(ValueError, OSError, RuntimeError, KeyError):
            found[name] = np.asarray(result.saliency(name))
    return found


def _facts(result: Explanation, every: Mapping[str, Float[ndarray, "steps h w"]]) -> str:
    """A table: prompts, seed, model, steps, sizes, and each method with its settings."""
    image, latents, timesteps = (_read(result, name) for name in ("image", "latents", "timesteps"))
    rows = [("prompt", result.prompt)]
    if negative := getattr(result, "negative_prompt", ""):
        rows.append(("negative prompt", negative))
    rows += [("seed", result.seed), ("model", result.model)]
    if image is None or latents is None or timesteps is None:
        rows.append(("image", "not generated yet, or not readable"))
    else:
        rows.append(("steps", f"{len(timesteps)}: t = {timesteps[0]} … {timesteps[-1]}"))
        rows.append(("size", f"image {_size(image.shape[:2])}, latent {_size(latents.shape[1:])}"))
    for name, maps in every.items():
        layers = f", {len(result.maps[name]) - 1} layers" if isinstance(result.maps[name], Mapping) else ""
        told = f"; {made}" if (made := as_call(result.settings_of(name))) else ""
        rows.append((name, f"{len(computed(maps))} of {len(maps)} maps, {_size(maps.shape[1:])}{layers}{told}"))
    cells = (
        f'<tr><th style="{_CELL}">{escape(name)}</th><td style="{_CELL}">{escape(str(text))}</td></tr>'
        for name, text in rows
    )
    return f'<table style="flex:1 1 20em;margin:0">{"".join(cells)}</table>'


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _strip(result: Explanation, image: UInt8[ndarray, "H W 3"], maps: Mapping[str, Float[ndarray, "steps h w"]]) -> str:
    """A column for each of a few steps, of those that have maps if any have: predicted x0 and the maps over it."""
    timesteps, previews = result.timesteps, _read(result, "previews")
    finished = {name: computed(values) for name, values in maps.items()}
    candidates = sorted({step for steps in finished.values() for step in steps}) or range(len(timesteps))
    steps = [candidates[place] for place in figures.chosen_steps(len(candidates), STEPS)]
    beneath = {step: image if previews is None else previews[step] for step in steps}
    rows = {} if previews is None else {"predicted x0": {step: previews[step] for step in steps}}
    for name in maps:
        rows[name] = {
            step: _bytes(figures.overlay(beneath[step], result.heatmap(name, step)))
            for step in steps
            if step in finished[name]
        }
    head = "".join(f'<td style="{_CELL}">step {step + 1}<br>t = {timesteps[step]}</td>' for step in steps)
    body = "".join(
        f'<tr><th style="{_CELL}">{escape(name)}</th>'
        + "".join(f'<td style="{_CELL}">{_cell(row.get(step), f"{name}, step {step + 1}")}</td>' for step in steps)
        + "</tr>"
        for name, row in rows.items()
    )
    return f'<table style="margin:8px 0 0"><tr><th></th>{head}</tr>{body}</table>' if rows else ""


def _bytes(pixels: Float[ndarray, "H W 3"]) -> UInt8[ndarray, "H W 3"]:
    return (pixels * 255).round().astype(np.uint8)


def _cell(pixels: UInt8[ndarray, "H W 3"] | None, alt: str) -> str:
    return "not computed" if pixels is None else _picture(pixels, PICTURE, alt)


def _picture(pixels: UInt8[ndarray, "H W 3"], side: int, alt: str) -> str:
    """An image element with the picture in it: a small one exact, its pixels shown as squares; a large one shrunk."""
    picture, file = Image.fromarray(pixels), BytesIO()
    kind = "png" if max(picture.size) <= side else "jpeg"
    picture.thumbnail((side, side))
    picture.save(file, kind, quality=85)
    scale = side // max(picture.size)
    width, height = (scale * length for length in picture.size)
    look = "max-width:none;margin:0" + (";image-rendering:pixelated" if scale > 1 else "")
    data = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<img src="{data}" width="{width}" height="{height}" alt="{escape(alt)}" style="{look}">'
