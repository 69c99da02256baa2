"""Building blocks of figures: rows of pictures, lines with labels, titles and colour bars."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import figure as plain
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy import ndarray

from dfengine.figures import lettering
from dfengine.figures.selection import evenly_spaced
from dfengine.result import COMBINED, Explanation, model_name

#: Perceptually uniform, and readable without colour.
COLOUR_MAP = "inferno"
#: Standard errors have their own, so that nobody mistakes them for a heat map.
ERROR_MAP = "viridis"
#: Opacity of a heat map over its picture.
OPACITY = 0.6
#: Points. Six remain when a figure of five pictures across is printed in one of two columns of text.
FONT_SIZE = 13
#: Inches: height of a line of text, shorter side of a picture, gap between pictures.
LINE = 1.2 * FONT_SIZE / 72
CELL = 0.9
GAP = 0.06
#: Okabe and Ito (2008), safe for colour-blind readers, with grey instead of yellow. Dashes and markers help in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")

#: What pictures say about the range of their maps, and about a map that is the same everywhere.
OWN_RANGE = "Each map has its own range."
BLANK = "nothing here"
BLANK_STYLE: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "color": "black",
    "bbox": {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
}

#: Maximum number of columns of a prompt in a title.
_PROMPT_LENGTH = 240

#: Heat maps of each step, by the label of their row.
Rows = Mapping[str, Sequence[ndarray]]


class Figure(plain.Figure):
    """A matplotlib figure in any script, which notebooks display as a cell's last value, without pyplot."""

    def draw(self, renderer: Any) -> None:
        """Draw all texts in fonts that have their letters."""
        with lettering.readable(self):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A heat map in colour over the image in grey, float [H, W, 3] in [0, 1]; only grey where the map is NaN."""
    grey = ((image / 255) @ np.array([0.299, 0.587, 0.114]))[..., None]
    colour = matplotlib.colormaps[COLOUR_MAP](heat)[..., :3]
    return np.where(np.isnan(heat)[..., None], grey, (1 - OPACITY) * grey + OPACITY * colour)


def colour_table() -> UInt8[ndarray, "256 3"]:
    """The colours of heat maps, from 0 to 1."""
    return np.rint(matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).astype(np.uint8)


def cell_size(result: Explanation) -> tuple[float, float]:
    """Width and height of a picture in inches; wide images stay tall enough for three lines of text beside them."""
    height, width = result.image.shape[:2]
    cell_width = CELL * max(1, 0.75 * width / height)
    return cell_width, cell_width * height / width


def picture_at(result: Explanation, step: int) -> UInt8[ndarray, "H W 3"]:
    """The predicted x0 at a step, or the final image of a result without previews."""
    return result.image if result.previews is None else np.asarray(result.previews[step])


def picture_label(result: Explanation) -> str:
    """What `picture_at` shows."""
    return "image" if result.previews is None else "predicted $x_0$"


def step_label(step: int, timesteps: Any, separator: str = ", ") -> str:
    """The step, counted from 0, with its time-step t."""
    return f"step {step}{separator}t = {timesteps[step]:g}"


def table(result: Explanation, steps: list[int], rows: Rows, method: str, label: str = "", above: float = 0) -> Figure:
    """A column per step: the picture at the step, then a row of a method's maps over it for each of `rows`.

    The title includes `label`. With `above`, the figure has two subfigures: that many inches to draw in, and below them
    the table.
    """
    width, height = cell_size(result)
    labels = [line for label in ("predicted x0", *rows) for line in label.split("\n")]
    columns = max(len(steps), 4 if above else 1)
    width = (width + GAP) * columns + 0.45 * LINE * max(map(lettering.columns, labels)) + 0.8
    height = (height + GAP) * (len(rows) + 1) + 2.5 * LINE
    heading, below = title(result, width, FONT_SIZE, label), caption({method: result.hot(method)}, width, FONT_SIZE)
    size = (width, height + above + LINE * (heading.count("\n") + below.count("\n") + 3))
    figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=GAP / 2, w_pad=GAP / 2, hspace=0, wspace=0))
    figure.suptitle(heading, fontsize=FONT_SIZE, parse_math=False)
    draw_caption(figure, below, FONT_SIZE)
    if above:
        figure.subfigures(2, height_ratios=[above, height])
    part = figure.subfigs[1] if above else figure
    axes = part.subplots(len(rows) + 1, columns, squeeze=False)
    for unused in axes[:, len(steps) :].flat:
        unused.remove()
    axes = axes[:, : len(steps)]
    fill(axes, result, steps, rows, FONT_SIZE, rotation=0, ha="right", va="center")
    colour_bar(part, axes, FONT_SIZE)
    for axis in axes.flat:  # next to the labels: the colour bar has set their anchor to its own side
        axis.set_anchor("W")
    return figure


def fill(
    axes: ndarray,
    result: Explanation,
    steps: list[int],
    rows: Rows,
    fontsize: float,
    separator: str = "\n",
    **label: Any,
) -> None:
    """Draw the picture at each step in the first row of `axes`, and heat maps over it in the rows below."""
    hide_axes(axes)
    for column, step in enumerate(steps):
        picture = picture_at(result, step)
        axes[0, column].imshow(picture)
        axes[0, column].set_title(step_label(step, result.timesteps, separator), fontsize=fontsize)
        for row, heat in enumerate(rows.values(), start=1):
            draw_heat(axes[row, column], picture, heat[column], fontsize)
    axes[0, 0].set_ylabel(picture_label(result), fontsize=fontsize, **label)
    for axis, text in zip(axes[1:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=fontsize, parse_math=False, **label)


def draw_lines(
    axis: Axes, height: float, result: Explanation, lines: Mapping[str, Float[ndarray, " steps"]], steps: Sequence[int]
) -> None:
    """Draw lines over the steps, labelled at their right ends, and mark `steps`; `height` of the axis in inches."""
    count = len(result.timesteps)
    every, right = max(1, count // 6), 1.05 * count - 0.5
    ends = {name: np.flatnonzero(np.isfinite(line))[-1] for name, line in lines.items()}
    label_heights = spread_labels([line[ends[name]] for name, line in lines.items()], LINE / height)
    styles = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    for number, (name, y, (colour, dash, marker)) in enumerate(zip(lines, label_heights, styles, strict=False)):
        (line,) = axis.plot(np.arange(count), lines[name], dash, color=colour, label=name, clip_on=False)
        line.set(marker=marker, markevery=(number % every, every))
        leader = [ends[name], right], [lines[name][ends[name]], y]
        axis.plot(*leader, color=colour, linewidth=0.8, clip_on=False)
        axis.text(right, y, f" {name}", va="center", fontsize=FONT_SIZE, parse_math=False)
    gap = 0.03 + 0.025 * len(str(count - 1))
    for step, x in zip(steps, spread_labels([(step + 0.5) / count for step in steps], gap) * count - 0.5, strict=True):
        axis.plot([step, step, x], [0, 1, 1.06], color="0.5", linewidth=0.8, clip_on=False, zorder=0)
        axis.text(x, 1.08, str(step), ha="center", fontsize=FONT_SIZE)
    ticks = evenly_spaced(count)
    # t is given only at both ends: between them there is no room.
    ends_with_t = {0, count - 1} if count > 1 else set()
    names = [f"{step}\nt = {result.timesteps[step]:g}" if step in ends_with_t else str(step) for step in ticks]
    axis.set_xticks(ticks, names, fontsize=FONT_SIZE)
    axis.set_xlabel("step", fontsize=FONT_SIZE, labelpad=-1.1 * FONT_SIZE)
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=FONT_SIZE)
    axis.set_ylabel("relevance, share of\nthe highest word", fontsize=FONT_SIZE)
    axis.tick_params("x", pad=6)
    axis.set(xlim=(-0.5, count - 0.5), ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)


def spread_labels(positions: Sequence[float], gap: float) -> Float[ndarray, " positions"]:
    """Positions in [0, 1] moved as little as possible to be at least `gap` apart (isotonic regression)."""
    order, gaps, indices = np.argsort(positions, kind="stable"), gap * np.arange(len(positions)), range(len(positions))
    targets = np.asarray(positions)[order] - gaps
    fitted = [max(min(targets[a : b + 1].mean() for b in indices[i:]) for a in indices[: i + 1]) for i in indices]
    spread = np.empty(len(positions))
    spread[order] = np.clip(fitted, 0, max(0, 1 - gaps[-1])) + gaps
    return spread


def hide_axes(axes: ndarray) -> None:
    """Remove ticks and frames."""
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)


def colour_bar(
    figure: Figure | SubFigure,
    axes: ndarray,
    fontsize: float,
    colours: str = COLOUR_MAP,
    maximum: float = 1,
    ends: tuple[str, str] = ("least", "most"),
) -> None:
    """Add a colour bar from 0 to `maximum` beside a row or grid of maps."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, maximum), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, ticks=[0, maximum])
    bar.ax.set_yticklabels(ends, fontsize=fontsize)


def draw_heat(axis: Axes, picture: UInt8[ndarray, "H W 3"], heat: Float[ndarray, "H W"], fontsize: float) -> None:
    """Draw a heat map over a picture, or for one that is the same everywhere that there is nothing to see in it."""
    if not is_blank(heat):
        axis.imshow(overlay(picture, heat))
        return
    axis.imshow(overlay(picture, np.full_like(heat, np.nan)))
    text = BLANK.replace(" ", "\n")
    axis.text(0.5, 0.5, text, transform=axis.transAxes, fontsize=min(fontsize, FONT_SIZE - 1), **BLANK_STYLE)


def is_blank(heat: Float[ndarray, "H W"]) -> bool:
    """Whether a map in [0, 1] is zero wherever it is computed, as that of a layer that adds nothing."""
    computed = np.isfinite(heat)
    return bool(computed.any()) and not heat[computed].any()


def caption(hots: Mapping[str, str], width: float, fontsize: float) -> str:
    """What stands below heat maps, wrapped to a width in inches: see `paragraphs`."""
    return "\n".join(lettering.fill(one, int((width - 0.2) * 72 / (0.55 * fontsize))) for one in paragraphs(hots))


def paragraphs(hots: Mapping[str, str]) -> list[str]:
    """How heat maps are scaled, and what is hot in them, by label; labels are named if there are several."""
    if len(hots) > 1:
        return [OWN_RANGE, *(f"Hot in {label}: {hot}" for label, hot in hots.items() if hot)]
    return [" ".join([OWN_RANGE, *(f"Hot: {hot}" for hot in hots.values() if hot)])]


def draw_caption(figure: Figure, text: str, fontsize: float) -> None:
    """Draw a caption at the bottom left of a figure with constrained layout."""
    left = 0.1 / figure.get_figwidth()
    figure.supxlabel(text, x=left, ha="left", fontsize=fontsize, multialignment="left", parse_math=False)


def title(result: Explanation, width: float, fontsize: float, label: str = "") -> str:
    """Prompt, label, model and seed, wrapped to a width in inches."""
    details = f"{label}, " if label else ""
    return heading(result.prompt, f"{details}{short_model_name(result.model)}, seed {result.seed}", width, fontsize)


def short_model_name(model: str) -> str:
    """`model_name`, of which only the last 40 characters."""
    name = model_name(model)
    return name if len(name) <= 40 else "…" + name[-39:]


def heading(prompt: str, details: str, width: float, fontsize: float) -> str:
    """A prompt in quotation marks and further details, wrapped to a width in inches."""
    characters, quoted = int(width * 72 / (0.55 * fontsize)), quote(prompt)
    if lettering.columns(quoted) + lettering.columns(details) + 5 <= characters:
        return f"{quoted}  ·  {details}"
    return "\n".join(lettering.fill(part, characters) for part in (quoted, details))


def quote(prompt: str, length: int = _PROMPT_LENGTH) -> str:
    """A prompt in quotation marks, shortened to `length` columns; "a given image" for an empty one."""
    return f"“{lettering.shorten(prompt, length)}”" if prompt.strip() else "a given image"


def unique_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels by method; methods that share one have their names added."""
    counts = Counter(labels.values())
    return {method: f"{label} ({method})" if counts[label] > 1 else label for method, label in labels.items()}


def method_label(result: Explanation, method: str) -> str:
    """A method's label, unique in its result."""
    return unique_labels({name: result.label(name) for name in result.maps})[method]


def method_title(result: Explanation, method: str) -> str:
    """A method's label, with the number of its masks, or with "combined" where it has maps by layer."""
    label = method_label(result, method)
    if result.form(method) == "layers":
        return f"{label}, {COMBINED}"
    return f"{label}, {result.scores[method].shape[-1]} masks" if method in result.scores else label


def layer_label(name: str, *size: int) -> str:
    """A layer's name and resolution, on one line each: its block, its part, its resolution."""
    return re.sub(r"\.(?=[^.]+\.[^.]+$)", ".\n", name) + ",\n{}×{}".format(*size)
