"""The page put together: its skeleton, style and script, and for each image its description and its bytes."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dfengine.figures.parts import COLOUR_MAP, COLOURS, OPACITY
from dfengine.report.packing import pack
from dfengine.result import Explanation

_SCRIPTS = ("maps.js", "chart.js", "pane.js", "page.js")


def write(
    items: Iterable[Explanation],
    out: str | Path,
    *,
    title: str = "",
    source: str = "",
    numbers: Sequence[int] | None = None,
) -> Path:
    """Write one page (.html) of images, in memory or of files, with every step's maps; returns its path.

    `title` is by default the first image's prompt; `source` is the file that the page's lines of Python open, `numbers`
    the images' places in it. The page holds methods' maps and errors exactly, layers' and words' maps to 1/255 of each
    one's range, images above 256 pixels as WebP: a few MB for 30 steps of Stable Diffusion with all layers. It is there
    once it is whole.

    Raises ValueError for another ending, a folder that is not there, or no image.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{str(out)!r} ends in {out.suffix!r}: expected .html")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {str(out.parent)!r} does not exist: make it first")
    fresh = out.with_name(f".{out.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            for part in _parts(items, title, source, numbers):
                file.write(part)
        os.replace(fresh, out)
    finally:
        fresh.unlink(missing_ok=True)
    return out


def _parts(items: Iterable[Explanation], title: str, source: str, numbers: Sequence[int] | None) -> Iterator[str]:
    """The page, an image at a time."""
    described: list[dict[str, Any]] = []
    images = _images(items, numbers, described)
    first = next(images, "")
    if not first:
        raise ValueError("there is no image to show: give at least one whose generation is done")
    page = _read("page.html")
    filled = {
        "title": escape(title or described[0]["prompt"] or "dfengine"),
        "style": _read("page.css"),
        "script": "\n".join(map(_read, _SCRIPTS)),
    }
    before, after = page.split("{{images}}")
    yield re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], before)
    yield first
    yield from images
    colours = np.rint(matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).astype(np.uint8)
    whole = {
        "source": source,
        "opacity": OPACITY,
        "colours": base64.b64encode(colours.tobytes()).decode(),
        "lines": COLOURS,
        "items": described,
    }
    filled["data"] = json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace(
        "<", "\\u003c"
    )
    yield re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], after)


def _images(
    items: Iterable[Explanation], numbers: Sequence[int] | None, described: list[dict[str, Any]]
) -> Iterator[str]:
    """Each image's bytes as an element of the page; its description is added to `described`."""
    for place, item in enumerate(items):
        told, data = pack(item, place if numbers is None else numbers[place])
        described.append(told)
        yield f'<script type="text/plain" id="bytes-{place}">{base64.b64encode(data).decode()}</script>\n'


def _read(name: str) -> str:
    return files("dfengine.report").joinpath("page", name).read_text(encoding="utf-8")
