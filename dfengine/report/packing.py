"""What the page shows of an image: a description as JSON values, and the bytes that it points into."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from dfengine.diffusion.path import schedule_name
from dfengine.figures.choosing import leading
from dfengine.result import COMBINED, Explanation, as_call, model_name, normalised
from dfengine.store import StoredItem
from dfengine.tokens import content_words, word_spans

#: Sides in pixels up to which images are kept as they are; larger ones are WebP, of this quality.
_LOSSLESS_SIDE, _QUALITY = 256, 85
#: Words whose curves are drawn at first, at most.
_SHOWN_LINES = 8
#: What a map says, by its explainer.
_ABOUT = {
    "Rise": "DF-RISE: where the prediction keeps its structure if the pixel is seen",
    "Cam": "DF-CAM: what a layer's features add to the predicted noise",
    "Relevance": "relevance: where the influence of the prompt's own words lies",
    "Attention": "cross-attention: where a word is attended to",
    "Lime": "LIME: which segments the prediction's structure needs",
    "Random": "random numbers, to compare with",
}

#: A place in the bytes, with what is there.
Reference = dict[str, Any]


class Bytes:
    """Arrays and pictures, one behind the other; each addition returns where it is."""

    def __init__(self) -> None:
        self.data = bytearray()

    def _add(self, data: bytes, **what: Any) -> Reference:
        place = len(self.data)
        self.data += data
        return {"at": place, "bytes": len(data), **what}

    def exact(self, maps: Float[ndarray, "steps h w"]) -> Reference:
        """Float32, the four bytes of the numbers apart (they deflate better so)."""
        apart = np.ascontiguousarray(maps, dtype="<f4").view(np.uint8).reshape(-1, 4).T
        return self._add(zlib.compress(apart.tobytes(), 6), type="f4", shape=list(maps.shape))

    def rounded(self, maps: Float[ndarray, "steps h w"]) -> Reference:
        """To 1/255 of the range of each step's map; exactly, where some values of a step are not finite."""
        flat = np.asarray(maps, dtype=np.float32).reshape(len(maps), -1)
        finite = np.isfinite(flat)
        there = np.asarray(finite.all(1))
        if (finite.any(1) & ~there).any():
            return self.exact(maps)
        flat = np.where(there[:, None], flat, 0)
        low, high = flat.min(1), flat.max(1)
        span = np.where(high > low, high - low, 1)
        levels = np.rint((flat - low[:, None]) / span[:, None] * 255).astype(np.uint8)
        pairs = zip(low.tolist(), high.tolist(), strict=True)
        ends = [[_short(a), _short(b)] if known else None for (a, b), known in zip(pairs, there, strict=True)]
        return self._add(zlib.compress(levels.tobytes(), 6), type="u1", shape=list(maps.shape), ends=ends)

    def picture(self, image: UInt8[ndarray, "H W 3"]) -> Reference:
        """PNG of small images, WebP of others."""
        file, small = io.BytesIO(), max(image.shape[:2]) <= _LOSSLESS_SIDE
        Image.fromarray(image).save(file, "PNG" if small else "WEBP", quality=_QUALITY)
        return self._add(file.getvalue(), type="image/png" if small else "image/webp")


def pack(item: Explanation, place: int) -> tuple[dict[str, Any], bytes]:
    """The description of an image, and its bytes. ValueError where its trajectory is not stored yet."""
    kept, timesteps = Bytes(), [int(t) for t in item.timesteps]
    described = {
        "number": item.number if isinstance(item, StoredItem) else place,
        "source": item.source.name if isinstance(item, StoredItem) else "",
        "prompt": item.prompt,
        "seed": str(item.seed),
        "model": model_name(item.model),
        "schedule": schedule_name(timesteps),
        "timesteps": timesteps,
        "size": list(item.image.shape[:2]),
        "image": kept.picture(item.image),
        "previews": [] if item.previews is None else [kept.picture(image) for image in np.asarray(item.previews)],
        "methods": [_method(item, name, kept) for name in item.maps],
        "lines": _lines(item),
        "facts": _facts(item, timesteps),
    }
    return described, bytes(kept.data)


def _method(item: Explanation, name: str, kept: Bytes) -> dict[str, Any]:
    """A method with its variants: DF-CAM's layers, attention's words, or the one map there is."""
    kind, maps = item.explainer_name(name), item.maps[name]
    layers = {layer: maps[layer] for layer in maps if layer != COMBINED} if isinstance(maps, Mapping) else {}
    words = item.words if kind == "Attention" else ()
    label = "all layers" if layers else "all words" if words else "the map"
    whole = {"name": "", "label": label, **kept.exact(np.asarray(item.saliency(name)))}
    if name in item.errors:
        whole["error"] = kept.exact(np.asarray(item.errors[name]))
    variants = [{"name": layer, "label": layer, **kept.rounded(np.asarray(layers[layer]))} for layer in layers]
    names = [word.casefold() for word in words]
    for row, word in enumerate(words):
        again = names[: row + 1].count(names[row])
        told = word if again == 1 else f"{word} ({again})"
        # What `heatmap` has another map of under this name is called by its row.
        alone = names.count(names[row]) == 1 and word not in item.maps
        maps_of = kept.rounded(np.asarray(item.word_maps[row]))
        variants.append({"name": told, "label": told, **maps_of, **({} if alone else {"row": row})})
    return {"name": name, "kind": kind, "about": _ABOUT.get(kind, ""), "variants": [whole, *variants]}


def _lines(item: Explanation) -> list[dict[str, Any]]:
    """The relevance of each word of the prompt at each step, raw and min–max over the prompt's own tokens."""
    if item.tokens is None or not item.tokens.own:
        return []
    raw = np.asarray(item.relevance, dtype=np.float64)
    scales = {"raw": raw, "normalised": normalised(raw, item.tokens)}
    distinct: dict[str, str] = {}
    for span in word_spans(item.prompt):
        word = item.prompt[slice(*span)]
        distinct.setdefault(word.casefold(), word)
    places = {word: found for word in distinct.values() if (found := item.tokens.find(word))}
    telling = {word: raw[places[word]].mean(0) for word in content_words(distinct.values()) if word in places}
    shown = leading({word: line for word, line in telling.items() if np.isfinite(line).any()}, _SHOWN_LINES)
    looks = {word: place for place, word in enumerate([*shown, *(word for word in places if word not in shown)])}
    return [
        {"word": word, "shown": word in shown, "look": looks[word]}
        | {scale: [_short(value) for value in lines[rows].mean(0)] for scale, lines in scales.items()}
        for word, rows in places.items()
    ]


def _facts(item: Explanation, timesteps: Sequence[float]) -> list[tuple[str, str]]:
    """Settings and versions, as rows of a table."""
    facts = [("prompt", item.prompt), ("negative prompt", getattr(item, "negative_prompt", ""))]
    facts += [("seed", item.seed), ("model", model_name(item.model)), ("steps", len(timesteps))]
    facts.append(("time-steps", ", ".join(map(str, timesteps))))
    if isinstance(item, StoredItem):
        facts += [("guidance", item.item.settings.get("guidance")), ("key", item.key)]
    facts += [(name, as_call(item.settings_of(name))) for name in item.maps]
    if isinstance(item, StoredItem):
        facts += item.environment.items()
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _short(value: float) -> float | None:
    """Seven digits, as float32 has; None for what is not a number."""
    return float(f"{value:.7g}") if np.isfinite(value) else None
