"""Figures of one method's maps of one image, in the paper's forms, and which form draws which maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.figures import lettering
from dfengine.figures.panels import (
    CELL,
    ERROR_MAP,
    LINE,
    Figure,
    caption,
    cell_size,
    colour_bar,
    draw_caption,
    draw_heat,
    draw_lines,
    fill,
    hide_axes,
    layer_label,
    method_label,
    method_title,
    table,
    title,
)
from dfengine.figures.selection import (
    available_lines,
    common,
    computed,
    informative_steps,
    main_layers,
    relative_lines,
    relevance_method,
    resolve_steps,
    top_by_mean,
)
from dfengine.files import published
from dfengine.result import COMBINED, Explanation, heatmap
from dfengine.tokens import content_words, folded

#: Width of a two-column page in inches, and the smallest font size in points when a figure is printed that wide.
_PAGE_WIDTH, _MIN_FONT_SIZE = 7.2, 6.0


@dataclass(frozen=True)
class Form:
    """How the maps of one form are drawn."""

    draw: Callable[[Explanation, str, Sequence[int] | None, Sequence[str] | None], Figure]
    """of (result, method, steps, rows)"""
    finished_steps: Callable[[Explanation, str], list[int]]
    """the steps at which all that is drawn of a method is computed"""
    rows: str | None = None
    """name of the argument that selects rows, if there is one"""


def form_of(result: Explanation, method: str) -> Form:
    """The form of a method's maps; that of saliency maps for a form that is not known here.

    Raises ValueError if the result has no maps of the method.
    """
    if method not in result.maps:
        raise ValueError(f"there is no map {method!r}: expected one of {', '.join(result.maps) or 'none'}")
    return FORMS.get(result.form(method), FORMS["saliency"])


def draw(
    result: Explanation, method: str, steps: Sequence[int] | None = None, rows: Sequence[str] | None = None
) -> Figure:
    """A method's maps in the form that suits them: `strip`, `layers`, `relevance` or `attention`.

    `rows` are names of layers, of concepts or of words, for a form that has them. Raises ValueError for a method, step
    or row that the result does not have or has not finished.
    """
    form = form_of(result, method)
    if rows is not None and form.rows is None:
        raise ValueError(f"the figure of {method!r} has no rows to choose: leave out {', '.join(rows)}")
    return form.draw(result, method, steps, rows)


def strip(result: Explanation, method: str = "rise", steps: Sequence[int] | None = None) -> Figure:
    """Figure 7: the image, then for each step the predicted x0 and the heat map over it.

    A third row shows each pixel's standard error as a share of its map's range, for methods that estimate it. On a page
    of two columns the text has at least 5.5 points; choose two steps for a single column. Raises ValueError for a map
    or step that the result does not have or has not finished.
    """
    steps = resolve_steps(result, steps, _finished_maps(result, method))
    heat, shares = [result.heatmap(method, step) for step in steps], error_shares(result, method, steps)
    columns, rows, label = len(steps) + 1, 3 if shares else 2, method_title(result, method)
    ratio, width = result.image.shape[0] / result.image.shape[1], 1.5 * columns + 0.75
    is_crowded = columns > 7  # "step" and "t" then need a line each, and labels a place beside the rows
    is_beside = is_crowded or ratio < 0.8
    if is_beside:
        width += max(1.0, 0.1 * width)
    size = max(9.0, _MIN_FONT_SIZE * width / _PAGE_WIDTH)
    heading, below = title(result, width, size + 1), caption({method: result.hot(method)}, width, size)
    text_height = (heading.count("\n") + 1) * (size + 1) + (below.count("\n") + (4.5 if is_crowded else 3.5)) * size
    figure = Figure((width, (1.5 * ratio + 0.12) * rows + 1.2 * text_height / 72 + 0.2), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    beside: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"} if is_beside else {}
    if is_beside or lettering.columns(label) > 18:
        label = label.replace(", ", ",\n")
    fill(axes[:2, 1:], result, steps, {label: heat}, size, "\n" if is_crowded else ", ", **beside)
    hide_axes(axes[:, 0])
    axes[0, 0].imshow(result.image)
    axes[0, 0].set_title("image", fontsize=size)
    draw_heat(axes[1, 0], result.image, np.nanmean(heat, axis=0), size)
    axes[1, 0].set_title("mean" if is_crowded else "mean of these maps", fontsize=size)
    colour_bar(figure, axes[1, :], size)
    if shares:
        _draw_errors(figure, axes[2], shares, size)
        axes[2, 1].set_ylabel("standard error,\nshare of range", fontsize=size, **beside)
    figure.suptitle(heading, fontsize=size + 1, parse_math=False)
    draw_caption(figure, below, size)
    return figure


def error_shares(result: Explanation, method: str, steps: Sequence[int]) -> list[Float[ndarray, "H W"]]:
    """The standard error of each step's map divided by the map's range (max − min), resized bilinearly to the image.

    NaN where a map is constant or an error is not finite; an empty list for a method without errors.
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
        # `heatmap` scales to [0, 1]; bilinear interpolation commutes with scaling back.
        shares.append((heatmap(error, size) * (high - low) + low) / spread)
    return shares if np.isfinite(shares).any() else []


def _draw_errors(figure: Figure, row: ndarray, shares: Sequence[Float[ndarray, "H W"]], fontsize: float) -> None:
    """Draw a row of standard errors with a colour bar from 0 to the largest."""
    maximum = float(np.nanmax(shares))
    hide_axes(row)
    row[0].set_visible(False)
    for axis, share in zip(row[1:], shares, strict=True):
        axis.imshow(share, cmap=ERROR_MAP, vmin=0, vmax=maximum or 1)
    colour_bar(figure, row, fontsize, ERROR_MAP, maximum or 1, ("0", f"{maximum:.2g}"))


def layers(
    result: Explanation, method: str = "cam", steps: Sequence[int] | None = None, names: Sequence[str] | None = None
) -> Figure:
    """Figure 8: for each step the predicted x0, and over it the maps of all layers combined and of single layers.

    `names` are `main_layers` by default. Raises ValueError for a method, layer or step that the result does not have or
    has not finished.
    """
    steps = _table_steps(result, steps, _finished_layers(result, method))
    heat = {COMBINED: [result.heatmap(method, step, COMBINED) for step in steps]}
    maps = result.maps[method]
    names = main_layers(maps) if names is None else [names] if isinstance(names, str) else names
    heat |= {name: [result.heatmap(method, step, name) for step in steps] for name in names}
    rows = {layer_label(name, *maps[name].shape[1:]): heat[name] for name in heat}
    return table(result, steps, rows, method, method_label(result, method))


def relevance(result: Explanation, concepts: Sequence[str] | None = None, steps: Sequence[int] | None = None) -> Figure:
    """Figure 9: each concept's relevance over the steps, and for a few steps the predicted x0 and where it lies.

    Each line is a share of the highest at the same step (`relative_lines`). By default the concepts are the prompt's
    words without stop words (the eight most relevant), and the steps `informative_steps`. Raises ValueError for a
    concept or step that the result does not have or has not finished.
    """
    lines, method = relative_lines(result, concepts), relevance_method(result)
    if concepts is None:
        lines = top_by_mean(lines, 8)
    if steps is None:
        is_finished = np.isin(np.arange(len(result.timesteps)), computed(result.saliency(method)))
        steps = informative_steps({name: np.where(is_finished, line, np.nan) for name, line in lines.items()})
    steps = resolve_steps(result, steps)
    height = max(2.6, LINE * len(lines))
    rows = {lettering.fill(method_label(result, method), 14): [result.heatmap(method, step) for step in steps]}
    figure = table(result, steps, rows, method, above=height + 3 * LINE)
    draw_lines(figure.subfigs[0].subplots(), height, result, lines, steps)
    return figure


def attention(result: Explanation, words: Sequence[str] | None = None, steps: Sequence[int] | None = None) -> Figure:
    """For each step the predicted x0, and each word's map over it: its cross-attention, or what it changes.

    `words` are by default all but stop words, at most the six with the highest maps at these steps. Raises ValueError
    for a word or step that the result does not have or has not finished.
    """
    methods = [method for method in result.maps if result.form(method) == "words"]
    if not result.words:
        remedy = "explain with Counterfactual() or Attention()"
        reason = f"the prompt {result.prompt!r} has no words" if methods else remedy
        raise ValueError(f"the result has no maps of words: {reason}")
    steps = _table_steps(result, steps, _finished_words(result))
    names = content_words(result.words) if words is None else [words] if isinstance(words, str) else words
    maps = {name: [_word_map(result, name, step) for step in steps] for name in names}
    if words is None:
        maps = top_by_mean(maps, 6)
    size = result.image.shape[:2]
    rows = {lettering.fill(name, 14): [heatmap(one, size) for one in maps[name]] for name in maps}
    method = methods[0] if methods else ""
    return table(result, steps, rows, method, method_label(result, method) if methods else "")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG according to its suffix. Raises ValueError as `check_name` does."""
    path = check_name(path)
    with published(path) as temporary:
        figure.savefig(temporary, dpi=200)
    return path


def save_both(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write a figure as `stem`.png and `stem`.pdf. Raises ValueError as `save` does."""
    return save(figure, f"{stem}.png"), save(figure, f"{stem}.pdf")


def check_name(path: str | Path, suffixes: Sequence[str] = (".png", ".pdf", ".svg")) -> Path:
    """The path of a file to write. Raises ValueError for another suffix, or a folder that does not exist."""
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        *others, last = suffixes
        expected = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}: expected {expected}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist: create it first")
    return path


def _table_steps(result: Explanation, steps: Sequence[int] | None, finished: Sequence[int]) -> list[int]:
    """`resolve_steps` for a `table`: by default as many columns as fit where five square pictures would."""
    return resolve_steps(result, steps, finished, count=max(1, int(5 * CELL / cell_size(result)[0])))


def _finished_maps(result: Explanation, method: str) -> list[int]:
    return computed(result.saliency(method)) if method in result.maps else []


def _finished_layers(result: Explanation, method: str) -> list[int]:
    """The steps at which the combined map and those of the main layers are computed."""
    maps = result.maps.get(method)
    if not isinstance(maps, Mapping):
        return []
    return common(*(computed(maps[name]) for name in (COMBINED, *main_layers(maps))))


def _finished_tokens(result: Explanation, method: str) -> list[int]:
    """The steps at which the lines and the maps of relevance are computed."""
    lines = available_lines(result)
    if not lines:
        return []
    finite = np.flatnonzero(np.isfinite([*lines.values()]).all(0)).tolist()
    return common(computed(result.saliency(method)), finite)


def _finished_words(result: Explanation, method: str = "") -> list[int]:
    return common(*map(computed, np.asarray(result.word_maps))) if result.words else []


def _word_map(result: Explanation, word: str, step: int) -> Float[ndarray, "h w"]:
    """A word's raw map, the mean over its occurrences. `Explanation.heatmap` prefers a method of the same name."""
    rows = [row for row, one in enumerate(result.words) if folded(one) == folded(word)]
    if not rows:
        known = ", ".join(dict.fromkeys(result.words)) or "none"
        raise ValueError(f"there is no map of the word {word!r}: expected one of {known}")
    saliency = np.asarray(result.word_maps)[rows, step].mean(0)
    if np.isnan(saliency).all():
        raise ValueError(f"step {step} of {word!r} is not computed yet")
    return saliency


#: The figure of each form that an explainer can declare.
FORMS = {
    "saliency": Form(lambda result, method, steps, _: strip(result, method, steps), _finished_maps),
    "layers": Form(layers, _finished_layers, "layers"),
    "tokens": Form(lambda result, _, steps, rows: relevance(result, rows, steps), _finished_tokens, "concepts"),
    "words": Form(lambda result, _, steps, rows: attention(result, rows, steps), _finished_words, "words"),
}
