"""The data of one image on the page: a description as JSON values, and the bytes that it refers to."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from dfengine.diffusion.path import schedule_name
from dfengine.explain import entry_of
from dfengine.figures.panels import unique_labels
from dfengine.figures.selection import top_by_mean
from dfengine.result import COMBINED, Explanation, as_call, model_name, normalised
from dfengine.store import StoredItem
from dfengine.tokens import content_words, folded, word_spans

#: Images up to this many pixels on the longer side are lossless; larger ones are WebP of this quality.
_LOSSLESS_SIDE, _QUALITY = 256, 85
#: Maximum number of words whose curves are shown at first.
_SHOWN_LINES = 8
#: Position and length of an array or picture in the bytes, and how to decode it.
Reference = dict[str, Any]


class Blob:
    """Concatenated arrays and pictures; each method appends one and returns its reference."""

    def __init__(self) -> None:
        self.data = bytearray()

    def _append(self, data: bytes, **decoding: Any) -> Reference:
        offset = len(self.data)
        self.data += data
        return {"at": offset, "bytes": len(data), **decoding}

    def exact(self, maps: Float[ndarray, "steps h w"]) -> Reference:
        """Float32, deflated byte plane by byte plane, which compresses better."""
        planes = np.ascontiguousarray(maps, dtype="<f4").view(np.uint8).reshape(-1, 4).T
        return self._append(zlib.compress(planes.tobytes(), 6), type="f4", shape=list(maps.shape))

    def rounded(self, maps: Float[ndarray, "steps h w"]) -> Reference:
        """Rounded to 1/255 of the range of each step's map; `exact` if any step is only partly finite."""
        flat = np.asarray(maps, dtype=np.float32).reshape(len(maps), -1)
        finite = np.isfinite(flat)
        computed = np.asarray(finite.all(1))
        if (finite.any(1) & ~computed).any():
            return self.exact(maps)
        flat = np.where(computed[:, None], flat, 0)
        low, high = flat.min(1), flat.max(1)
        span = np.where(high > low, high - low, 1)
        levels = np.rint((flat - low[:, None]) / span[:, None] * 255).astype(np.uint8)
        ranges = zip(low.tolist(), high.tolist(), computed, strict=True)
        ends = [[_short(a), _short(b)] if is_computed else None for a, b, is_computed in ranges]
        return self._append(zlib.compress(levels.tobytes(), 6), type="u1", shape=list(maps.shape), ends=ends)

    def picture(self, image: UInt8[ndarray, "H W 3"]) -> Reference:
        """PNG for small images, WebP for others."""
        file, is_small = io.BytesIO(), max(image.shape[:2]) <= _LOSSLESS_SIDE
        Image.fromarray(image).save(file, "PNG" if is_small else "WEBP", quality=_QUALITY)
        return self._append(file.getvalue(), type="image/png" if is_small else "image/webp")


def pack(item: Explanation, index: int) -> tuple[dict[str, Any], bytes]:
    """The description of an image, and its bytes. Raises ValueError if it is not generated yet."""
    blob, timesteps = Blob(), np.asarray(item.timesteps).tolist()
    labels = unique_labels({name: item.label(name) for name in item.maps})
    description = {
        "number": item.number if isinstance(item, StoredItem) else index,
        "source": item.source.name if isinstance(item, StoredItem) else "",
        "prompt": item.prompt,
        "seed": str(item.seed),
        "model": model_name(item.model),
        "schedule": schedule_name(timesteps),
        "timesteps": [_short(t) for t in timesteps],
        "start": first_step(item),
        "size": list(item.image.shape[:2]),
        "image": blob.picture(item.image),
        "previews": [] if item.previews is None else [blob.picture(image) for image in np.asarray(item.previews)],
        "methods": [_method(item, name, labels[name], blob) for name in item.maps],
        "lines": _lines(item),
        "facts": _facts(item),
    }
    return description, bytes(blob.data)


def first_step(item: Explanation) -> int:
    """The step at which the page opens: where the first method's map says most; the last step if there is no map.

    For a method with errors that is the step of the largest signal, the variance of the map's pixels minus their mean
    squared error; for others that of the largest variance in the later half of the steps, since early steps are noise.
    """
    name = next(iter(item.maps), None)
    if name is None:
        return len(item.timesteps) - 1
    maps, errors = np.asarray(item.saliency(name)), item.errors.get(name)
    signals = {step: one[np.isfinite(one)].var() for step, one in enumerate(maps) if np.isfinite(one).any()}
    if errors is None:
        signals = {step: value for step, value in signals.items() if step >= len(maps) // 2} or signals
    else:
        for step, error in ((step, np.asarray(errors[step])) for step in signals):
            signals[step] -= np.square(error[np.isfinite(error)]).sum() / max(1, np.isfinite(error).sum())
    return max(signals, key=lambda step: signals[step], default=0)


def _method(item: Explanation, name: str, label: str, blob: Blob) -> dict[str, Any]:
    """A method and its variants: the main map, then maps by layer or by word if it has them."""
    form, maps = item.form(name), item.maps[name]
    layers = {layer: maps[layer] for layer in maps if layer != COMBINED} if isinstance(maps, Mapping) else {}
    words = item.words if form == "words" else ()
    main = {
        "name": "",
        "label": "all layers" if layers else "all words" if words else "the map",
        **blob.exact(np.asarray(item.saliency(name))),
    }
    if name in item.errors:
        main["error"] = blob.exact(np.asarray(item.errors[name]))
    variants = [{"name": layer, "label": layer, **blob.rounded(np.asarray(layers[layer]))} for layer in layers]
    return {
        "name": name,
        "label": label,
        "form": form,
        "about": _summary(item, name),
        "hot": item.hot(name),
        "variants": [main, *variants, *_word_variants(item, words, blob)],
    }


def _summary(item: Explanation, name: str) -> str:
    """What a method's explainer says about itself; its label where it is not registered here."""
    entry = entry_of(str(item.settings_of(name).get("explainer")))
    return entry.summary if entry else item.label(name)


def _word_variants(item: Explanation, words: Sequence[str], blob: Blob) -> Iterator[dict[str, Any]]:
    """The map of each word; repeated words are numbered."""
    keys = [folded(word) for word in words]
    for row, (word, key) in enumerate(zip(words, keys, strict=True)):
        occurrence = keys[: row + 1].count(key)
        name = word if occurrence == 1 else f"{word} ({occurrence})"
        # `Explanation.heatmap` averages repeated words and prefers methods: such maps are addressed by their row.
        is_unique = keys.count(key) == 1 and word not in item.maps
        maps = blob.rounded(np.asarray(item.word_maps[row]))
        more: dict[str, Any] = {} if is_unique else {"row": row}
        if item.word_errors is not None:
            more["error"] = blob.rounded(np.asarray(item.word_errors[row]))
        yield {"name": name, "label": name, **maps, **more}


def _lines(item: Explanation) -> list[dict[str, Any]]:
    """The relevance of each word of the prompt at each step: raw, and min–max over the prompt's own tokens."""
    if item.tokens is None or not item.tokens.own:
        return []
    raw = np.asarray(item.relevance, dtype=np.float64)
    scales = {"raw": raw, "normalised": normalised(raw, item.tokens)}
    distinct: dict[str, str] = {}
    for span in word_spans(item.prompt):
        word = item.prompt[slice(*span)]
        distinct.setdefault(folded(word), word)
    rows_of = {word: rows for word in distinct.values() if (rows := item.tokens.find(word))}
    means = {word: raw[rows_of[word]].mean(0) for word in content_words(distinct.values()) if word in rows_of}
    shown = top_by_mean({word: line for word, line in means.items() if np.isfinite(line).any()}, _SHOWN_LINES)
    styles = {word: number for number, word in enumerate([*shown, *(word for word in rows_of if word not in shown)])}
    return [
        {"word": word, "shown": word in shown, "style": styles[word]}
        | {scale: [_short(value) for value in lines[rows].mean(0)] for scale, lines in scales.items()}
        for word, rows in rows_of.items()
    ]


def _facts(item: Explanation) -> list[tuple[str, str]]:
    """Settings and versions, as rows of a table."""
    facts = [("prompt", item.prompt), ("negative prompt", getattr(item, "negative_prompt", ""))]
    facts += [("seed", item.seed), ("model", model_name(item.model)), ("steps", len(item.timesteps))]
    facts.append(("time-steps", ", ".join(f"{t:g}" for t in item.timesteps)))
    if isinstance(item, StoredItem):
        facts += [("guidance", item.item.settings.get("guidance")), ("key", item.key)]
    facts += [(name, as_call(item.settings_of(name))) for name in item.maps]
    if isinstance(item, StoredItem):
        facts += item.environment.items()
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _short(value: float) -> float | None:
    """The value to seven digits, as many as float32 has; None if it is not finite."""
    return float(f"{value:.7g}") if np.isfinite(value) else None
