"""Pictures of explanations in the paper's forms."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from dfengine.figures.choosing import chosen_steps, concept_lines, leading, main_layers, telling_steps
from dfengine.figures.parts import (
    CELL,
    LINE,
    bare,
    cell,
    colour_bar,
    draw_lines,
    fill,
    layer_label,
    overlay,
    table,
    title,
)
from dfengine.result import COMBINED, Explanation, heatmap
from dfengine.words import content_words


def draw(result: Explanation, method: str, steps: Sequence[int] | None = None) -> Figure:
    """A method's maps in the form that suits it: `layers`, `relevance`, `attention`, or else `strip`.

    Raises ValueError for a method or step that the result does not have, or has not finished.
    """
    if method not in result.maps:
        raise ValueError(f"there is no map {method!r}: expected one of {', '.join(result.maps) or 'none'}")
    match _kind(result, method):
        case "Cam":
            return layers(result, method, steps)
        case "Relevance":
            return relevance(result, steps=steps)
        case "Attention":
            return attention(result, steps=steps)
    return strip(result, method, steps)


def strip(result: Explanation, method: str = "rise", steps: Sequence[int] | None = None) -> Figure:
    """Figure 7: the image, and for a row of steps the predicted x0 and the heat map over it.

    Raises ValueError for a map or step that the result does not have, or has not finished.
    """
    steps = _steps(result, steps)
    heat = [result.heatmap(method, step) for step in steps]
    columns = len(steps) + 1
    figure = Figure(figsize=(1.5 * columns + 0.4, 3.9), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    fill(axes[:, 1:], result, steps, {_label(result, method): heat}, fontsize=9, between=", ")
    bare(axes[:, 0])
    axes[0, 0].imshow(result.image)
    axes[0, 0].set_title("image", fontsize=9)
    axes[1, 0].imshow(overlay(result.image, np.nanmean(heat, axis=0)))
    axes[1, 0].set_title("mean of these maps", fontsize=9)
    colour_bar(figure, axes[1, :], fontsize=8)
    figure.suptitle(title(result, figure.get_figwidth(), 10), fontsize=10, parse_math=False)
    return figure


def layers(
    result: Explanation, method: str = "cam", steps: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Figure 8: for a row of steps the predicted x0, and over it DF-CAM's maps of all layers and of single ones.

    Without `names` those of `main_layers`. Raises ValueError for a method, layer or step that the result does not have,
    or has not finished.
    """
    steps = _steps(result, steps, count=max(1, int(5 * CELL / cell(result)[0])))
    heat = {COMBINED: [result.heatmap(method, step, COMBINED) for step in steps]}
    maps = result.maps[method]
    for name in main_layers(maps) if names is None else names:
        heat[name] = [result.heatmap(method, step, name) for step in steps]
    return table(result, steps, {layer_label(name, *maps[name].shape[1:]): heat[name] for name in heat})


def relevance(result: Explanation, concepts: Sequence[str] | None = None, steps: Sequence[int] | None = None) -> Figure:
    """Figure 9: each concept's relevance over the steps, and for a few of these the predicted x0 and a map over it.

    The map is DF-CAM's of all layers if there is one, else DF-RISE's, else the relevance's own. Without `concepts`, the
    prompt's words but for stop words; of more than eight, the most relevant. Without `steps`, `telling_steps`. Raises
    ValueError for a concept or step that the result does not have, or has not finished.
    """
    lines = concept_lines(result, concepts)
    if concepts is None:
        lines = leading(lines, 8)
    steps = telling_steps(lines) if steps is None else _steps(result, steps)
    preferred = {"Cam": 0, "Rise": 1, "Relevance": 2}
    method = min(result.maps, key=lambda name: preferred.get(_kind(result, name), 3))
    label = f"{method},\n{COMBINED}" if _kind(result, method) == "Cam" else _label(result, method).replace(", ", ",\n")
    height = max(2.6, LINE * len(lines))
    rows = {label: [result.heatmap(method, step) for step in steps]}
    figure = table(result, steps, rows, above=height + 3 * LINE)
    draw_lines(figure.subfigs[0].subplots(), height, result, lines, steps)
    return figure


def attention(result: Explanation, words: Sequence[str] | None = None, steps: Sequence[int] | None = None) -> Figure:
    """For a row of steps the predicted x0, and each word's cross-attention over it.

    Without `words`, all but stop words; of more than six, those with the most attention at these steps. Raises
    ValueError for a word or step that the result does not have, or has not finished.
    """
    steps = _steps(result, steps, count=max(1, int(5 * CELL / cell(result)[0])))
    if not result.words:
        asked = any(_kind(result, name) == "Attention" for name in result.maps)
        why = f"the prompt {result.prompt!r} has no words" if asked else "explain with Attention()"
        raise ValueError(f"there is no attention to a word: {why}")
    wanted = content_words(result.words) if words is None else [words] if isinstance(words, str) else words
    maps = {word: [_attention(result, word, step) for step in steps] for word in wanted}
    if words is None:
        maps = leading(maps, 6)
    size = result.image.shape[:2]
    rows = {textwrap.fill(word, 14): [heatmap(values, size) for values in maps[word]] for word in maps}
    return table(result, steps, rows)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG, by the name's ending. Raises ValueError where it cannot."""
    path = check_name(path)
    figure.savefig(path, dpi=200)
    return path


def check_name(path: str | Path) -> Path:
    """A figure's name. Raises ValueError for an ending that is not known, or a folder that is not there."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}: expected .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist: make it first")
    return path


def _steps(result: Explanation, steps: Sequence[int] | None, count: int = 6) -> list[int]:
    """The chosen steps, those counted from the end too, or so many spread evenly. ValueError for one outside."""
    total = len(result.timesteps)
    chosen = chosen_steps(total, count) if steps is None else list(steps)
    if not chosen:
        raise ValueError("no step is chosen: name at least one, or leave them out")
    for step in chosen:
        if not -total <= step < total:
            raise ValueError(f"step {step} is outside [0, {total - 1}]: steps are indices into `timesteps`")
    return [step % total for step in chosen]


def _kind(result: Explanation, method: str) -> str:
    """The name of a method's explainer; of what has maps by layer, DF-CAM's."""
    if isinstance(result.maps[method], Mapping):
        return "Cam"
    with suppress(ValueError):  # of a file whose explainers are not all known here
        return type(result.settings.get(method)).__name__
    return ""


def _attention(result: Explanation, word: str, step: int) -> Float[ndarray, "h w"]:
    """A word's raw map, all its occurrences together; `Explanation.heatmap` takes "rise" for a method's name."""
    rows = [row for row, one in enumerate(result.words) if one.casefold() == word.casefold()]
    if not rows:
        known = ", ".join(dict.fromkeys(result.words)) or "none"
        raise ValueError(f"there is no attention map of {word!r}: expected one of {known}")
    saliency = np.asarray(result.heat)[rows, step].mean(0)
    if np.isnan(saliency).all():
        raise ValueError(f"step {step} of {word!r} is not computed yet")
    return saliency


def _label(result: Explanation, method: str) -> str:
    return f"{method}, {result.scores[method].shape[-1]} masks" if method in result.scores else method
