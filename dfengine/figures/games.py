"""Deletion and insertion games: curves of methods, their maps side by side, an ablation (Figures 4, 3 and 5)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy import ndarray

from dfengine.figures.parts import CELL, COLOUR_MAP, COLOURS, DASHES, FONT_SIZE, GAP, LINE, Figure, bare, overlay

#: What happens to pixels in each game, and which end of the distance is the better one: deletion should raise it soon,
#: insertion lower it soon.
_GAMES = {"deletion": ("deleted", "higher is better"), "insertion": ("inserted", "lower is better")}
#: Inches: all of what is drawn for one column of text, where 6 of the points are left; margins; pictures and panels.
_WIDTH, _MARGIN = 7.0, 0.1
_PANEL, _LEAST_HEIGHT, _BAR = 1.3, 0.95, (2.4, 0.12)
#: Letters on a line of a column's title and of a row's label: as few as will do, and the most.
_TITLE_LETTERS, _PROMPT_LETTERS, _LABEL_LETTERS = (9, 12), (12, 20), (8, 14)

#: A mean with the low and high end of its interval, at 0, 1/(points − 1), …, 1 of the pixels.
Band = tuple[Float[ndarray, " points"], Float[ndarray, " points"], Float[ndarray, " points"]]
#: A heat map, and the curves of deletion and of insertion.
Row = tuple[Float[ndarray, "H W"], Float[ndarray, " points"], Float[ndarray, " points"]]


def curves(curves: Mapping[str, Mapping[str, Band]], title: str = "") -> Figure:
    """Figure 4: a panel a game, a line with its interval a method; a game that no method has is left out.

    `curves` has by method and game ("deletion", "insertion") a distance, larger the more the result has changed. Raises
    ValueError for no method, a method without a game, an unknown game, or a curve of fewer than two points.
    """
    _check_games(curves)
    games = [game for game in _GAMES if any(game in by_game for by_game in curves.values())]
    width = max(_WIDTH if len(games) > 1 else 0.6 * _WIDTH, max(map(_inches, curves)) + 1)
    columns, heading = _columns([*curves], width), _heading(title, width)
    height = 3.6 + 1.3 * LINE * -(-len(curves) // columns) + LINE * _lines(heading)
    figure = Figure((width, height), layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=FONT_SIZE, parse_math=False)
    axes = dict(zip(games, figure.subplots(1, len(games), sharey=True, squeeze=False)[0], strict=True))
    handles = {}
    for turn, (method, by_game) in enumerate(curves.items()):
        colour, dash = COLOURS[turn % len(COLOURS)], DASHES[turn % len(DASHES)]
        for game, (mean, low, high) in by_game.items():
            shares = _shares(mean, f"the {game} curve of {method!r}")
            (handles[method],) = axes[game].plot(shares, mean, dash, color=colour, label=method)
            axes[game].fill_between(shares, low, high, color=colour, alpha=0.18, linewidth=0)
    lowest, highest = _limits([part for by_game in curves.values() for band in by_game.values() for part in band])
    for game, axis in axes.items():
        done, better = _GAMES[game]
        _dress(axis, lowest - 0.03, highest + 0.03)
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(f"{game}: {better}", fontsize=FONT_SIZE)
        axis.set_xlabel(f"share of pixels {done}", fontsize=FONT_SIZE)
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
) -> Figure:
    """Figure 3: a row an image with its prompt beside it, a column a method with its map in [0, 1] over the image.

    `column` is the title of the images' own. Images are of one size; a map of NaN is not computed. Four methods
    with short names fit a column of text, twelve a page. Raises ValueError for no image, no method, or not as many maps
    or prompts as images.
    """
    if not len(images) or not maps:
        raise ValueError(f"got {len(images)} images and {len(maps)} methods: give at least one of each")
    counts = {"prompts": len(prompts), **{f"maps of {method!r}": len(heats) for method, heats in maps.items()}}
    for name, count in counts.items():
        if count != len(images):
            raise ValueError(f"got {count} {name}, expected {len(images)}: give one for each image")
    titles = _wrapped([column, *maps], _TITLE_LETTERS)
    shape = images[0].shape[:2]
    width = max(CELL * max(1, 0.75 * shape[1] / shape[0]), *map(_inches, titles))
    height = width * shape[0] / shape[1]
    labels = _wrapped(prompts, _PROMPT_LETTERS, height)
    beside = max(0, LINE * _lines(labels[0]) - height) / 2  # of the first label, above its picture
    above, beneath = max(LINE * _lines(*titles) + 2 * _MARGIN - beside, _MARGIN), LINE + _BAR[1] + 2 * _MARGIN
    figure, axes = _grid([width] * len(titles), [GAP] * len(maps), height, 2 * GAP, labels, (above, beneath), subtitle)
    bare(axes)
    for row, image, label in zip(axes, images, labels, strict=True):
        row[0].imshow(image)
        row[0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    for axes_of, heats in zip(axes.T[1:], maps.values(), strict=True):
        for axis, image, heat in zip(axes_of, images, heats, strict=True):
            _draw_heat(axis, image, heat)
    for axis, text in zip(axes[0], titles, strict=True):
        axis.set_title(text, fontsize=FONT_SIZE, parse_math=False)
    left, right, (across, down) = axes[0, 0].get_position().x0, axes[0, -1].get_position().x1, figure.get_size_inches()
    length = min(_BAR[0] / across, 0.6 * (right - left))
    place = figure.add_axes(((left + right - length) / 2, (LINE + _MARGIN) / down, length, _BAR[1] / down))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOUR_MAP)
    figure.colorbar(scale, cax=place, orientation="horizontal", ticks=[0, 1])
    place.set_xticks([0, 1], ["least", "most"], fontsize=FONT_SIZE)
    return figure


def ablation(image: UInt8[ndarray, "H W 3"], rows: Mapping[str, Row], title: str = "") -> Figure:
    """Figure 5: a row a label, with its heat map over the image and its curves, each with the area under it.

    A map of NaN, or a curve with one, is not computed. The area is by the trapezoid rule over the share of pixels,
    in [0, 1] for a distance in [0, 1]. Raises ValueError for no row, or a curve of fewer than two points.
    """
    if not rows:
        raise ValueError("got no row: give at least one label with its heat map and its two curves")
    height = float(np.clip(_PANEL * image.shape[0] / image.shape[1], _LEAST_HEIGHT, _PANEL))
    labels = _wrapped([*rows], _LABEL_LETTERS, height)
    gaps = [_inches("0.5") + 2.5 * _MARGIN, 2.5 * _MARGIN]
    panel = max(1.5, (_WIDTH - max(map(_inches, labels)) - _PANEL - sum(gaps) - 4 * _MARGIN) / 2)
    outer = 2 * LINE + 2 * _MARGIN, 3.2 * LINE + _MARGIN
    figure, axes = _grid([_PANEL, panel, panel], gaps, height, LINE, labels, outer, title)
    bare(axes[:, 0])
    low, high = _limits([curve for _, *games in rows.values() for curve in games])
    for turn, (row, label, (name, (heat, *games))) in enumerate(zip(axes, labels, rows.items(), strict=True), start=1):
        _draw_heat(row[0], image, heat)
        row[0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
        for axis, game, curve, colour in zip(row[1:], _GAMES, games, COLOURS, strict=False):
            _draw_area(axis, _shares(curve, f"the {game} curve of {name!r}"), curve, colour)
            _dress(axis, low, high)
            axis.set_xlim(0, 1)
            axis.tick_params("x", labelbottom=turn == len(rows))
            axis.tick_params("y", labelleft=axis is row[1])
    axes[0, 0].set_title("heat map", fontsize=FONT_SIZE)
    for column, (game, (done, better)) in zip(axes.T[1:], _GAMES.items(), strict=True):
        column[0].set_title(f"{game}:\n{better}", fontsize=FONT_SIZE)
        column[-1].set_xlabel(f"share of pixels\n{done}", fontsize=FONT_SIZE)
    return figure


def _draw_heat(axis: Axes, image: UInt8[ndarray, "H W 3"], heat: Float[ndarray, "H W"]) -> None:
    if np.isfinite(heat).any():
        axis.imshow(overlay(image, heat))
        return
    axis.set_box_aspect(image.shape[0] / image.shape[1])
    axis.set_facecolor("0.94")
    _say_absent(axis)


def _draw_area(axis: Axes, shares: Float[ndarray, " points"], curve: Float[ndarray, " points"], colour: str) -> None:
    """The curve, the area under it, and how large that is, in the first corner with room: right, then left."""
    if not np.isfinite(curve).all():
        _say_absent(axis)
        return
    axis.plot(shares, curve, color=colour, clip_on=False)
    axis.fill_between(shares, 0, curve, color=colour, alpha=0.15, linewidth=0)
    room: dict[tuple[float, float], float] = {}
    for x, end in ((0.96, curve[shares >= 0.4]), (0.04, curve[shares <= 0.6])):
        room |= {(x, 0.07): end.min(), (x, 0.95): 1 - end.max()}
    x, y = max(room, key=lambda corner: min(room[corner], 0.3))
    told, sides = (
        f"AUC {np.trapezoid(curve, shares):.2f}",
        ("left" if x < 0.5 else "right", "bottom" if y < 0.5 else "top"),
    )
    axis.text(x, y, told, ha=sides[0], va=sides[1], fontsize=FONT_SIZE, transform=axis.transAxes)


def _say_absent(axis: Axes) -> None:
    place, size = axis.transAxes, FONT_SIZE - 1  # as wide as a small picture
    axis.text(0.5, 0.5, "not\ncomputed", transform=place, ha="center", va="center", fontsize=size, color="0.35")


def _dress(axis: Axes, low: float, high: float) -> None:
    axis.set_ylim(low, high)
    axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axis.tick_params(labelsize=FONT_SIZE)
    axis.spines[["top", "right"]].set_visible(False)


def _grid(
    widths: list[float],
    gaps: list[float],
    height: float,
    between: float,
    labels: list[str],
    outer: tuple[float, float],
    title: str,
) -> tuple[Figure, ndarray]:
    """Axes [labels, widths] of so many inches, rows higher where a label is, with room above and beneath (`outer`)."""
    heights = [max(height, LINE * _lines(label)) for label in labels]
    left = max(map(_inches, labels)) + 2 * _MARGIN
    across = left + sum(widths) + sum(gaps) + 2 * _MARGIN
    heading = _heading(title, across)
    top = outer[1] + sum(heights) + between * (len(labels) - 1)
    down = top + outer[0] + LINE * _lines(heading)
    figure = Figure((across, down))
    if heading:
        figure.suptitle(heading, y=1 - _MARGIN / down, va="top", fontsize=FONT_SIZE, parse_math=False)
    starts = left + np.cumsum([0, *(wide + gap for wide, gap in zip(widths, gaps, strict=False))])
    axes = np.empty((len(labels), len(widths)), object)
    for row, tall in enumerate(heights):
        for column, (start, wide) in enumerate(zip(starts, widths, strict=True)):
            axes[row, column] = figure.add_axes((start / across, (top - tall) / down, wide / across, tall / down))
        top -= tall + between
    return figure, axes


def _wrapped(texts: Sequence[str], letters: tuple[int, int], height: float = np.inf) -> list[str]:
    """On lines of so many letters at least, of more where words are longer or the lines are too many for the height."""
    least, most = letters
    longest = max(len(word) for text in texts for word in ("", *text.split()))
    for count in range(min(max(least, longest), most), most + 1):
        wrapped = [textwrap.fill(text, count) for text in texts]
        if LINE * _lines(*wrapped) <= height:
            break
    return wrapped


def _heading(title: str, width: float) -> str:
    return textwrap.fill(title, int(width * 72 / (0.6 * FONT_SIZE)))


def _columns(names: list[str], width: float) -> int:
    """As many columns of a legend as are no wider than so many inches."""
    widths = [_inches(name) + 0.65 for name in names]
    fitting = (n for n in range(len(names), 1, -1) if sum(max(part) for part in np.array_split(widths, n)) <= width)
    return next(fitting, 1)


def _lines(*texts: str) -> int:
    """Of the longest text; an empty one has none."""
    return max(len(text.split("\n")) if text else 0 for text in texts)


def _inches(text: str) -> float:
    """How wide the widest line is."""
    font = FontProperties(size=FONT_SIZE)
    return max(text_to_path.get_text_width_height_descent(line, font, False)[0] for line in text.split("\n")) / 72


def _shares(curve: Float[ndarray, " points"], name: str) -> Float[ndarray, " points"]:
    """k/(points − 1): where each point of a curve is."""
    if len(curve) < 2:
        raise ValueError(f"{name} has {len(curve)} points, expected two or more: it runs from no pixel to all of them")
    return np.linspace(0, 1, len(curve))


def _limits(curves: Sequence[ndarray]) -> tuple[float, float]:
    """0 and 1, or whatever is beyond."""
    values = np.concatenate([[0.0, 1.0], *curves])
    values = values[np.isfinite(values)]
    return float(values.min()), float(values.max())


def _check_games(curves: Mapping[str, Mapping[str, Band]]) -> None:
    if not curves:
        raise ValueError("got no method: give the curves of at least one")
    for method, by_game in curves.items():
        if not by_game:
            raise ValueError(f"got no game of {method!r}, expected {' or '.join(_GAMES)}: leave the method out")
        for game in by_game:
            if game not in _GAMES:
                raise ValueError(f"got the game {game!r} of {method!r}, expected {' or '.join(_GAMES)}: rename it")
