"""The page put together: its skeleton, style and script, and for each image its description and its bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dfengine.figures.parts import COLOURS, OPACITY, colour_table
from dfengine.report.packing import pack
from dfengine.result import Explanation
from dfengine.store import StoredItem

_SCRIPTS = ("maps.js", "chart.js", "pane.js", "page.js")


def write(
    items: Explanation | Iterable[Explanation],
    out: str | Path,
    *,
    title: str = "",
    tell: Callable[[], None] = lambda: None,
) -> Path:
    """Write one page (.html) of images, in memory or of files, with every step's maps; returns its path.

    `title` is by default the prompt, or of several the run's name; `tell` is called after each image. The page holds
    methods' maps and errors exactly, layers' and words' maps to 1/255 of each one's range, images above 256 pixels as
    WebP: a few MB for 30 steps of Stable Diffusion with all layers. It is there once it is whole.

    Raises ValueError for another ending, a folder that is not there, or no image.
    """
    out, items = Path(out), [items] if isinstance(items, Explanation) else list(items)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{str(out)!r} ends in {out.suffix!r}: expected .html")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {str(out.parent)!r} does not exist: make it first")
    if not items:
        raise ValueError("there is no image to show: give at least one whose generation is done")
    fresh = out.with_name(f".{out.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            for part in _parts(items, title or _title(items), tell):
                file.write(part)
        os.replace(fresh, out)
    finally:
        fresh.unlink(missing_ok=True)
    return out


def _title(items: Sequence[Explanation]) -> str:
    if len({item.prompt for item in items}) == 1:
        return items[0].prompt or "a given image"
    return next((item.source.name for item in items if isinstance(item, StoredItem)), f"{len(items)} images")


def _parts(items: Sequence[Explanation], title: str, tell: Callable[[], None]) -> Iterator[str]:
    """The page, an image at a time."""
    style, script = _read("page.css"), "\n".join(map(_read, _SCRIPTS))
    before, after = _read("page.html").split("{{images}}")
    filled = {"title": escape(title), "style": style, "style_hash": _hash(style), "script_hash": _hash(script)}
    yield _fill(before, filled)
    described: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        told, data = pack(item, place)
        described.append(told)
        yield f'<script type="text/plain" id="bytes-{place}">{base64.b64encode(data).decode()}</script>\n'
        tell()
    whole = {
        "opacity": OPACITY,
        "colours": base64.b64encode(colour_table().tobytes()).decode(),
        "lines": COLOURS,
        "items": described,
    }
    told_as = json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Nothing that is told ends the element that it stands in.
    yield _fill(after, {"data": told_as.replace("<", "\\u003c"), "script": script})


def _fill(page: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], page)


def _hash(text: str) -> str:
    """What the page's policy knows an element by: of the text between its tags, newlines included."""
    return "sha256-" + base64.b64encode(hashlib.sha256(f"\n{text}\n".encode()).digest()).decode()


def _read(name: str) -> str:
    return files("dfengine.report").joinpath("page", name).read_text(encoding="utf-8")
