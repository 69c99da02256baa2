"""Assembles the page: skeleton, style and script, and each image's description and bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dfengine.figures.forms import check_name
from dfengine.figures.panels import COLOURS, OPACITY, colour_table
from dfengine.files import published
from dfengine.report.packing import pack
from dfengine.result import Explanation
from dfengine.store import StoredItem

_SCRIPTS = ("maps.js", "chart.js", "pane.js", "page.js")


def write(
    items: Explanation | Iterable[Explanation],
    out: str | Path,
    *,
    title: str = "",
    on_progress: Callable[[], None] = lambda: None,
) -> Path:
    """Write one HTML page of images, in memory or from files, with the maps of every step; returns its path.

    `title` is by default the prompt, or the run's name if prompts differ; `on_progress` is called after each image.
    Maps and errors of methods are exact, those of layers and words are rounded to 1/255 of their range, and images of
    more than 256 pixels are WebP: a few MB for 30 steps of Stable Diffusion with all layers. An existing page is
    replaced only when the new one is complete.

    Raises ValueError for a suffix other than .html, a folder that does not exist, or no image.
    """
    out, items = check_name(out, (".html", ".htm")), [items] if isinstance(items, Explanation) else list(items)
    if not items:
        raise ValueError("there is no image to show: pass at least one that is generated")
    with published(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_parts(items, title or _title(items), on_progress))
    return out


def _title(items: Sequence[Explanation]) -> str:
    if len({item.prompt for item in items}) == 1:
        return items[0].prompt or "a given image"
    return next((item.source.name for item in items if isinstance(item, StoredItem)), f"{len(items)} images")


def _parts(items: Sequence[Explanation], title: str, on_progress: Callable[[], None]) -> Iterator[str]:
    """The page in parts, with one image in memory at a time."""
    style, script = _read("page.css"), "\n".join(map(_read, _SCRIPTS))
    before, after = _read("page.html").split("{{images}}")
    values = {"title": escape(title), "style": style, "style_hash": _hash(style), "script_hash": _hash(script)}
    yield _fill(before, values)
    descriptions: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        description, data = pack(item, index)
        descriptions.append(description)
        yield f'<script type="text/plain" id="bytes-{index}">{base64.b64encode(data).decode()}</script>\n'
        on_progress()
    page = {
        "opacity": OPACITY,
        "colours": base64.b64encode(colour_table().tobytes()).decode(),
        "lines": COLOURS,
        "items": descriptions,
    }
    text = json.dumps(page, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Without "<" no prompt can close the script element that holds the data.
    yield _fill(after, {"data": text.replace("<", "\\u003c"), "script": script})


def _fill(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _hash(text: str) -> str:
    """The hash by which the page's content security policy admits an element (newlines around the text included)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(f"\n{text}\n".encode()).digest()).decode()


def _read(name: str) -> str:
    return files("dfengine.report").joinpath("page", name).read_text(encoding="utf-8")
