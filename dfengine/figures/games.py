"""Figures of deletion and insertion: curves of methods, their maps side by side, an ablation (Figures 4, 3 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy import ndarray

from dfengine.figures import lettering
from dfengine.figures.panels import (
    CELL,
    COLOUR_MAP,
    COLOURS,
    DASHES,
    FONT_SIZE,
    GAP,
    LINE,
    Figure,
    caption,
    draw_heat,
    hide_axes,
)

#: For each game, what happens to the pixels, and whether the distance should rise early (deletion) or fall early.
_GAMES = {"deletion": ("deleted", "higher is better"), "insertion": ("inserted", "lower is better")}
#: Inches. A figure of this width keeps 6 points when it is printed in one column of text. Then margins, and the sizes
#: of panels and colour bar.
_WIDTH, _MARGIN = 7.0, 0.1
_PANEL, _MIN_HEIGHT, _BAR = 1.3, 0.95, (2.4, 0.12)
#: Minimum and maximum number of characters per line of a column's title, a prompt and a row's label.
_TITLE_LENGTH, _PROMPT_LENGTH, _LABEL_LENGTH = (9, 14), (12, 20), (8, 14)

#: A mean with the low and high end of its interval, at 0, 1/(points − 1), …, 1 of the pixels.
Band = tuple[Float[ndarray, " points"], Float[ndarray, " points"], Float[ndarray, " points"]]
#: A heat map, and the curves of deletion and of insertion.
Row = tuple[Float[ndarray, "H W"], Float[ndarray, " points"], Float[ndarray, " points"]]


def curves(bands: Mapping[str, Mapping[str, Band]], title: str = "") -> Figure:
    """Figure 4: a panel per game, with a line and its interval per method; games that no method has are left out.

    `bands` has, by method and game ("deletion", "insertion"), a distance that grows as the result changes. Raises
    ValueError for no method, a method without a game, an unknown game, or a curve of fewer than two points.
    """
    _check_games(bands)
    games = [game for game in _GAMES if any(game in by_game for by_game in bands.values())]
    width = max(_WIDTH if len(games) > 1 else 0.6 * _WIDTH, max(map(_text_width, bands)) + 1)
    columns, heading = _legend_columns([*bands], width), _heading(title, width)
    height = 3.6 + 1.3 * LINE * -(-len(bands) // columns) + LINE * _line_count(heading)
    figure = Figure((width, height), layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=FONT_SIZE, parse_math=False)
    axes = dict(zip(games, figure.subplots(1, len(games), sharey=True, squeeze=False)[0], strict=True))
    handles = {}
    for number, (method, by_game) in enumerate(bands.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        for game, (mean, low, high) in by_game.items():
            shares = _shares(mean, f"the {game} curve of {method!r}")
            (handles[method],) = axes[game].plot(shares, mean, dash, color=colour, label=method)
            axes[game].fill_between(shares, low, high, color=colour, alpha=0.18, linewidth=0)
    lowest, highest = _limits([curve for by_game in bands.values() for band in by_game.values() for curve in band])
    for game, axis in axes.items():
        action, better = _GAMES[game]
        _format_axis(axis, lowest - 0.03, highest + 0.03)
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(f"{game}: {better}", fontsize=FONT_SIZE)
        axis.set_xlabel(f"share of pixels {action}", fontsize=FONT_SIZE)
    axes[games[0]].set_ylabel("distance to the\nunperturbed result (min–max)", fontsize=FONT_SIZE)
    legend = figure.legend(
        [*handles.values()],
        [*handles],
        loc="outside lower center",
        ncols=columns,
        fontsize=FONT_SIZE,
        frameon=False,
        handletextpad=0.5,
        columnspacing=1,
        borderpad=0.3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def comparison(
    images: Sequence[UInt8[ndarray, "H W 3"]],
    maps: Mapping[str, Sequence[Float[ndarray, "H W"]]],
    prompts: Sequence[str],
    subtitle: str = "",
    column: str = "image",
    hots: Mapping[str, str] | None = None,
) -> Figure:
    """Figure 3: a row per image, labelled with its prompt, and a column per method with its map in [0, 1] over it.

    `column` is the title of the images' column, and `hots` says what high values mean, by method. Images share one
    size; a map that is all NaN is marked "not computed". Four methods with short names fit a column of text, twelve fit
    a page. Raises ValueError for no image, no method, or a number of maps or prompts other than that of the images.
    """
    if not len(images) or not maps:
        raise ValueError(f"got {len(images)} images and {len(maps)} methods: pass at least one of each")
    counts = {"prompts": len(prompts), **{f"maps of {method!r}": len(heats) for method, heats in maps.items()}}
    for name, count in counts.items():
        if count != len(images):
            raise ValueError(f"got {count} {name}, expected {len(images)}: pass one for each image")
    titles = _wrap([column, *maps], _TITLE_LENGTH)
    shape = images[0].shape[:2]
    width = max(CELL * max(1, 0.75 * shape[1] / shape[0]), *map(_text_width, titles))
    height = width * shape[0] / shape[1]
    labels = _wrap(prompts, _PROMPT_LENGTH, height)
    overhang = max(0, LINE * _line_count(labels[0]) - height) / 2  # of the first label above its picture
    above = max(LINE * _line_count(*titles) + 2 * _MARGIN - overhang, _MARGIN)
    below = LINE + _BAR[1] + 2 * _MARGIN
    named = {name: (hots or {}).get(name, "") for name in maps}
    figure, axes, bottom = _grid(
        [width] * len(titles), [GAP] * len(maps), height, 2 * GAP, labels, (above, below), subtitle, named
    )
    hide_axes(axes)
    for row, image, label in zip(axes, images, labels, strict=True):
        row[0].imshow(image)
        row[0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    for axes_of, heats in zip(axes.T[1:], maps.values(), strict=True):
        for axis, image, heat in zip(axes_of, images, heats, strict=True):
            _draw_heat(axis, image, heat)
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=FONT_SIZE, parse_math=False)
    _draw_colour_bar(figure, axes[0, 0].get_position().x0, axes[0, -1].get_position().x1, bottom)
    return figure


def _draw_colour_bar(figure: Figure, left: float, right: float, bottom: float) -> None:
    """Draw a horizontal colour bar `bottom` inches above the bottom, centred between `left` and `right` in [0, 1]."""
    width, height = figure.get_size_inches()
    length = min(_BAR[0] / width, 0.6 * (right - left))
    axis = figure.add_axes(((left + right - length) / 2, (bottom + LINE + _MARGIN) / height, length, _BAR[1] / height))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOUR_MAP)
    figure.colorbar(scale, cax=axis, orientation="horizontal", ticks=[0, 1])
    axis.set_xticks([0, 1], ["least", "most"], fontsize=FONT_SIZE)


def ablation(
    image: UInt8[ndarray, "H W 3"],
    rows: Mapping[str, Row],
    title: str = "",
    hots: Mapping[str, str] | None = None,
) -> Figure:
    """Figure 5: a row per label, with its heat map over the image, and its curves with the areas under them.

    A map that is all NaN, or a curve with a NaN, is marked "not computed". Areas use the trapezoid rule over the share
    of pixels; for a distance in [0, 1] they are in [0, 1]. `hots` says what high values of a map mean, by row. Raises
    ValueError for no row, or a curve of fewer than two points.
    """
    if not rows:
        raise ValueError("got no row: pass at least one label with its heat map and its two curves")
    height = float(np.clip(_PANEL * image.shape[0] / image.shape[1], _MIN_HEIGHT, _PANEL))
    labels = _wrap([*rows], _LABEL_LENGTH, height)
    gaps = [_text_width("0.5") + 2.5 * _MARGIN, 2.5 * _MARGIN]
    panel = max(1.5, (_WIDTH - max(map(_text_width, labels)) - _PANEL - sum(gaps) - 4 * _MARGIN) / 2)
    margins = 2 * LINE + 2 * _MARGIN, 3.2 * LINE + _MARGIN
    named = {name: (hots or {}).get(name, "") for name in rows}
    figure, axes, _ = _grid([_PANEL, panel, panel], gaps, height, LINE, labels, margins, title, named)
    hide_axes(axes[:, 0])
    low, high = _limits([curve for _, *games in rows.values() for curve in games])
    for row, label, (name, (heat, *games)) in zip(axes, labels, rows.items(), strict=True):
        _draw_heat(row[0], image, heat)
        row[0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
        for axis, game, curve, colour in zip(row[1:], _GAMES, games, COLOURS, strict=False):
            _draw_area(axis, _shares(curve, f"the {game} curve of {name!r}"), curve, colour)
            _format_axis(axis, low, high)
            axis.set_xlim(0, 1)
            axis.tick_params("x", labelbottom=axis in axes[-1])
            axis.tick_params("y", labelleft=axis is row[1])
    axes[0, 0].set_title("heat map", fontsize=FONT_SIZE)
    for column, (game, (action, better)) in zip(axes.T[1:], _GAMES.items(), strict=True):
        column[0].set_title(f"{game}:\n{better}", fontsize=FONT_SIZE)
        column[-1].set_xlabel(f"share of pixels\n{action}", fontsize=FONT_SIZE)
    return figure


def _draw_heat(axis: Axes, image: UInt8[ndarray, "H W 3"], heat: Float[ndarray, "H W"]) -> None:
    if np.isfinite(heat).any():
        draw_heat(axis, image, heat, FONT_SIZE - 1)
        return
    axis.set_box_aspect(image.shape[0] / image.shape[1])
    axis.set_facecolor("0.94")
    _mark_not_computed(axis)


def _draw_area(axis: Axes, shares: Float[ndarray, " points"], curve: Float[ndarray, " points"], colour: str) -> None:
    """Draw a curve, the area under it, and its size in the corner farthest from the curve."""
    if not np.isfinite(curve).all():
        _mark_not_computed(axis)
        return
    axis.plot(shares, curve, color=colour, clip_on=False)
    axis.fill_between(shares, 0, curve, color=colour, alpha=0.15, linewidth=0)
    room: dict[tuple[float, float], float] = {}
    for x, half in ((0.96, curve[shares >= 0.4]), (0.04, curve[shares <= 0.6])):
        room |= {(x, 0.07): half.min(), (x, 0.95): 1 - half.max()}
    x, y = max(room, key=lambda corner: min(room[corner], 0.3))  # 0.3 is room enough: then the first, on the right
    ha, va = "left" if x < 0.5 else "right", "bottom" if y < 0.5 else "top"
    text = f"AUC {np.trapezoid(curve, shares):.2f}"
    axis.text(x, y, text, ha=ha, va=va, fontsize=FONT_SIZE, transform=axis.transAxes)


def _mark_not_computed(axis: Axes) -> None:
    axis.text(
        0.5,
        0.5,
        "not\ncomputed",
        transform=axis.transAxes,
        ha="center",
        va="center",
        fontsize=FONT_SIZE - 1,  # fits into the smallest picture
        color="0.35",
    )


def _format_axis(axis: Axes, low: float, high: float) -> None:
    axis.set_ylim(low, high)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.tick_params(labelsize=FONT_SIZE)
    axis.spines[["top", "right"]].set_visible(False)


def _grid(
    widths: list[float],
    gaps: list[float],
    height: float,
    row_gap: float,
    labels: list[str],
    margins: tuple[float, float],
    title: str,
    hots: Mapping[str, str],
) -> tuple[Figure, ndarray, float]:
    """A figure, its axes [labels, widths], and the height of the caption below them, all lengths in inches.

    Rows grow with their labels; `margins` are above and below the axes.
    """
    heights = [max(height, LINE * _line_count(label)) for label in labels]
    left = max(map(_text_width, labels)) + 2 * _MARGIN
    figure_width = left + sum(widths) + sum(gaps) + 2 * _MARGIN
    heading = _heading(title, figure_width)
    below = caption(hots, figure_width - 2 * _MARGIN, FONT_SIZE)
    bottom = LINE * _line_count(below) + _MARGIN
    top = bottom + margins[1] + sum(heights) + row_gap * (len(labels) - 1)
    figure_height = top + margins[0] + LINE * _line_count(heading)
    figure = Figure((figure_width, figure_height))
    figure.text(
        _MARGIN / figure_width, _MARGIN / figure_height, below, va="bottom", fontsize=FONT_SIZE, parse_math=False
    )
    if heading:
        figure.suptitle(heading, y=1 - _MARGIN / figure_height, va="top", fontsize=FONT_SIZE, parse_math=False)
    starts = left + np.cumsum([0, *(width + gap for width, gap in zip(widths, gaps, strict=False))])
    axes = np.empty((len(labels), len(widths)), object)
    for row, row_height in enumerate(heights):
        top -= row_height
        for column, (start, width) in enumerate(zip(starts, widths, strict=True)):
            box = start / figure_width, top / figure_height, width / figure_width, row_height / figure_height
            axes[row, column] = figure.add_axes(box)
        top -= row_gap
    return figure, axes, bottom


def _wrap(texts: Sequence[str], lengths: tuple[int, int], height: float = np.inf) -> list[str]:
    """Texts wrapped to the fewest characters per line in the range `lengths` that fit their words and the height."""
    least, most = lengths
    longest = max(lettering.columns(word) for one in texts for word in ("", *one.split()))
    for length in range(min(max(least, longest), most), most + 1):
        wrapped = [lettering.fill(one, length) for one in texts]
        if LINE * _line_count(*wrapped) <= height:
            break
    return wrapped


def _heading(title: str, width: float) -> str:
    return lettering.fill(title, int(width * 72 / (0.6 * FONT_SIZE)))


def _legend_columns(names: list[str], width: float) -> int:
    """The most columns of a legend that fit a width in inches."""
    widths = [_text_width(name) + 0.65 for name in names]
    fitting = (n for n in range(len(names), 1, -1) if sum(max(part) for part in np.array_split(widths, n)) <= width)
    return next(fitting, 1)


def _line_count(*texts: str) -> int:
    """The number of lines of the longest text; 0 for an empty one."""
    return max(len(one.split("\n")) if one else 0 for one in texts)


def _text_width(label: str) -> float:
    """Width of the widest line in inches."""
    font, lines = FontProperties(size=FONT_SIZE), lettering.measurable(label).split("\n")
    return max(text_to_path.get_text_width_height_descent(line, font, False)[0] for line in lines) / 72


def _shares(curve: Float[ndarray, " points"], name: str) -> Float[ndarray, " points"]:
    """The share of pixels at each point of a curve, k/(points − 1)."""
    if len(curve) < 2:
        raise ValueError(f"{name} has {len(curve)} points, expected two or more: from no pixel to all of them")
    return np.linspace(0, 1, len(curve))


def _limits(curves: Sequence[ndarray]) -> tuple[float, float]:
    """The range of the finite values, at least [0, 1]."""
    values = np.concatenate([[0.0, 1.0], *curves])
    values = values[np.isfinite(values)]
    return float(values.min()), float(values.max())


def _check_games(bands: Mapping[str, Mapping[str, Band]]) -> None:
    expected = " or ".join(_GAMES)
    if not bands:
        raise ValueError("got no method: pass the curves of at least one")
    for method, by_game in bands.items():
        if not by_game:
            raise ValueError(f"got no game for {method!r}, expected {expected}: leave the method out")
        for game in by_game:
            if game not in _GAMES:
                raise ValueError(f"got the game {game!r} for {method!r}, expected {expected}")
