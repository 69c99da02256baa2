"""Pictures of explanations in the paper's forms."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.figures.choosing import (
    beneath,
    chosen_steps,
    computed,
    concept_lines,
    finished_steps,
    leading,
    main_layers,
    telling_steps,
)
from dfengine.figures.parts import (
    CELL,
    ERROR_MAP,
    LINE,
    Figure,
    bare,
    cell,
    colour_bar,
    draw_lines,
    fill,
    label_of,
    layer_label,
    overlay,
    table,
    title,
)
from dfengine.result import COMBINED, Explanation, heatmap
from dfengine.tokens import content_words

#: Inches across a page of two columns of text, and the points that letters have there at least.
_PAGE, _LEAST = 7.2, 6.0


def draw(result: Explanation, method: str, steps: Sequence[int] | None = None) -> Figure:
    """A method's maps in the form that suits it: `layers`, `relevance`, `attention`, or else `strip`.

    Raises ValueError for a method or step that the result does not have, or has not finished.
    """
    if method not in result.maps:
        raise ValueError(f"there is no map {method!r}: expected one of {', '.join(result.maps) or 'none'}")
    match result.explainer_name(method):
        case "Cam":
            return layers(result, method, steps)
        case "Relevance":
            return relevance(result, steps=steps)
        case "Attention":
            return attention(result, steps=steps)
    return strip(result, method, steps)


def strip(result: Explanation, method: str = "rise", steps: Sequence[int] | None = None) -> Figure:
    """Figure 7: the image, and for a row of steps the predicted x0 and the heat map over it.

    Where the method has standard errors, a third row has each pixel's as a share of its map's range. As wide as a page
    its letters have 5.5 points at least; for one column name two steps. Raises ValueError for a map or step that the
    result does not have, or has not finished.
    """
    steps = _steps(result, steps, finished_steps(result, method))
    heat, shares = [result.heatmap(method, step) for step in steps], error_shares(result, method, steps)
    columns, rows, label = len(steps) + 1, 3 if shares else 2, label_of(result, method)
    ratio, width = result.image.shape[0] / result.image.shape[1], 1.5 * columns + 0.75
    is_tight = columns > 7  # letters as large as a page wants them need lines of their own
    is_beside = is_tight or ratio < 0.8
    if is_beside:
        width += max(1.0, 0.1 * width)
    size = max(9.0, _LEAST * width / _PAGE)
    heading = title(result, width, size + 1)
    lines = (heading.count("\n") + 1) * (size + 1) + (3 if is_tight else 2) * size
    figure = Figure((width, (1.5 * ratio + 0.12) * rows + 1.2 * lines / 72 + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    beside: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"} if is_beside else {}
    if is_beside or len(label) > 18:
        label = label.replace(", ", ",\n")
    fill(axes[:2, 1:], result, steps, {label: heat}, size, "\n" if is_tight else ", ", **beside)
    bare(axes[:, 0])
    axes[0, 0].imshow(result.image)
    axes[0, 0].set_title("image", fontsize=size)
    axes[1, 0].imshow(overlay(result.image, np.nanmean(heat, axis=0)))
    axes[1, 0].set_title("mean" if is_tight else "mean of these maps", fontsize=size)
    colour_bar(figure, axes[1, :], size)
    if shares:
        _draw_errors(figure, axes[2], shares, size)
        axes[2, 1].set_ylabel("standard error,\nshare of range", fontsize=size, **beside)
    figure.suptitle(heading, fontsize=size + 1, parse_math=False)
    return figure


def error_shares(result: Explanation, method: str, steps: Sequence[int]) -> list[Float[ndarray, "H W"]]:
    """The standard error of a method's map at each step over the map's range (max − min), bilinear to the image's size.

    NaN where a map is constant or a pixel has no finite error; nothing of a method without errors.
    """
    if method not in result.errors:
        return []
    size, shares = result.image.shape[:2], []
    for step in steps:
        error, saliency = np.asarray(result.errors[method][step]), np.asarray(result.saliency(method)[step])
        error = np.where(np.isfinite(error), error, np.nan)
        spread = np.nanmax(saliency) - np.nanmin(saliency)
        if np.isnan(error).all() or not spread > 0:
            shares.append(np.full(size, np.nan, dtype=np.float32))
            continue
        low, high = np.nanmin(error), np.nanmax(error)
        # What is bilinear may be scaled to [0, 1] before, and back.
        shares.append((heatmap(error, size) * (high - low) + low) / spread)
    return shares if np.isfinite(shares).any() else []


def _draw_errors(figure: Figure, row: ndarray, shares: Sequence[Float[ndarray, "H W"]], fontsize: float) -> None:
    """A row of standard errors, with a colour bar of its own from 0 to the largest."""
    most = float(np.nanmax(shares))
    bare(row)
    row[0].set_visible(False)
    for axis, share in zip(row[1:], shares, strict=True):
        axis.imshow(share, cmap=ERROR_MAP, vmin=0, vmax=most or 1)
    colour_bar(figure, row, fontsize, ERROR_MAP, most or 1, ("0", f"{most:.2g}"))


def layers(
    result: Explanation, method: str = "cam", steps: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Figure 8: for a row of steps the predicted x0, and over it DF-CAM's maps of all layers and of single ones.

    Without `names` those of `main_layers`. Raises ValueError for a method, layer or step that the result does not have,
    or has not finished.
    """
    steps = _steps(result, steps, finished_steps(result, method), count=max(1, int(5 * CELL / cell(result)[0])))
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
    method = beneath(result)
    if steps is None:
        finished = computed(result.saliency(method))
        drawn = {name: np.where(np.isin(np.arange(len(line)), finished), line, np.nan) for name, line in lines.items()}
        steps = telling_steps(drawn)
    steps = _steps(result, steps)
    label = label_of(result, method).replace(", ", ",\n")
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
    by_word = [name for name in result.maps if result.explainer_name(name) == "Attention"]
    finished = finished_steps(result, by_word[0]) if by_word else []
    steps = _steps(result, steps, finished, count=max(1, int(5 * CELL / cell(result)[0])))
    if not result.words:
        why = f"the prompt {result.prompt!r} has no words" if by_word else "explain with Attention()"
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


def save_both(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as PDF, under a name without an ending. Raises ValueError as `save` does."""
    return save(figure, f"{stem}.png"), save(figure, f"{stem}.pdf")


def check_name(path: str | Path) -> Path:
    """A figure's name. Raises ValueError for an ending that is not known, or a folder that is not there."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}: expected .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist: make it first")
    return path


def _steps(result: Explanation, steps: Sequence[int] | None, finished: Sequence[int] = (), count: int = 6) -> list[int]:
    """The chosen steps, those counted from the end too, or so many spread evenly over the finished ones.

    Raises ValueError for one outside.
    """
    total = len(result.timesteps)
    among = finished or range(total)
    chosen = [among[place] for place in chosen_steps(len(among), count)] if steps is None else list(steps)
    if not chosen:
        raise ValueError("no step is chosen: name at least one, or leave them out")
    for step in chosen:
        if not -total <= step < total:
            raise ValueError(f"step {step} is outside [0, {total - 1}]: steps are indices into `timesteps`")
    return [step % total for step in chosen]


def _attention(result: Explanation, word: str, step: int) -> Float[ndarray, "h w"]:
    """A word's raw map, all its occurrences together; `Explanation.heatmap` takes "rise" for a method's name."""
    rows = [row for row, one in enumerate(result.words) if one.casefold() == word.casefold()]
    if not rows:
        known = ", ".join(dict.fromkeys(result.words)) or "none"
        raise ValueError(f"there is no attention map of {word!r}: expected one of {known}")
    saliency = np.asarray(result.word_maps)[rows, step].mean(0)
    if np.isnan(saliency).all():
        raise ValueError(f"step {step} of {word!r} is not computed yet")
    return saliency
