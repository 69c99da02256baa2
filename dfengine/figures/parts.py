"""What figures are put together from: rows of pictures, lines with names, titles and labels."""

from __future__ import annotations

import re
import textwrap
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

from dfengine.figures.choosing import chosen_steps
from dfengine.result import COMBINED, Explanation, model_name

#: Perceptually uniform, and readable without colour.
COLOUR_MAP = "inferno"
#: Of standard errors, which nobody shall take for a heat map.
ERROR_MAP = "viridis"
#: How much of the heat map covers the picture beneath it.
OPACITY = 0.6
#: Points, of which 6 are left where five columns of pictures are as wide as one of two columns of text; and inches.
FONT_SIZE = 13
LINE = 1.2 * FONT_SIZE / 72
CELL = 0.9
GAP = 0.06
#: Okabe and Ito's colours, which all can tell apart, with grey for their yellow; dashes and markers need no colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")

#: Letters of a prompt in titles, at most.
_LONGEST = 240

#: By its label, a row of heat maps, one for each step.
Rows = Mapping[str, Sequence[ndarray]]


class Figure(plain.Figure):
    """A figure that a notebook shows as a cell's last value; by itself it shows those of pyplot only."""

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The heat map in colour over the image in grey, float [H, W, 3] in [0, 1]; grey alone where it is NaN."""
    grey = ((image / 255) @ np.array([0.299, 0.587, 0.114]))[..., None]
    colour = matplotlib.colormaps[COLOUR_MAP](heat)[..., :3]
    return np.where(np.isnan(heat)[..., None], grey, (1 - OPACITY) * grey + OPACITY * colour)


def colour_table() -> UInt8[ndarray, "256 3"]:
    """The heat maps' colours, from least to most."""
    return np.rint(matplotlib.colormaps[COLOUR_MAP](np.arange(256))[:, :3] * 255).astype(np.uint8)


def cell(result: Explanation) -> tuple[float, float]:
    """Width and height of a picture in inches; a landscape's has three lines of text beside it."""
    height, width = result.image.shape[:2]
    across = CELL * max(1, 0.75 * width / height)
    return across, across * height / width


def table(result: Explanation, steps: list[int], rows: Rows, above: float = 0) -> Figure:
    """The predicted x0 at a row of steps, and rows of maps over it; so many inches `above` are a subfigure's."""
    (width, height), labels = cell(result), [line for label in ("predicted x0", *rows) for line in label.split("\n")]
    columns = max(len(steps), 4 if above else 1)
    width = (width + GAP) * columns + 0.45 * LINE * max(map(len, labels)) + 0.8
    height = (height + GAP) * (len(rows) + 1) + 2.5 * LINE
    heading = title(result, width, FONT_SIZE)
    size = (width, height + above + LINE * (heading.count("\n") + 1.5))
    figure = Figure(size, layout=ConstrainedLayoutEngine(h_pad=GAP / 2, w_pad=GAP / 2, hspace=0, wspace=0))
    figure.suptitle(heading, fontsize=FONT_SIZE, parse_math=False)
    if above:
        figure.subfigures(2, height_ratios=[above, height])
    part = figure.subfigs[1] if above else figure
    axes = part.subplots(len(rows) + 1, columns, squeeze=False)
    for unused in axes[:, len(steps) :].flat:
        unused.remove()
    axes = axes[:, : len(steps)]
    fill(axes, result, steps, rows, FONT_SIZE, rotation=0, ha="right", va="center")
    colour_bar(part, axes, FONT_SIZE)
    for axis in axes.flat:  # towards the labels: the bar has drawn them to itself
        axis.set_anchor("W")
    return figure


def fill(
    axes: ndarray, result: Explanation, steps: list[int], rows: Rows, fontsize: float, between: str = "\n", **label: Any
) -> None:
    """The predicted x0 of each step, and below it its heat maps over it."""
    bare(axes)
    for column, step in enumerate(steps):
        beneath = result.image if result.previews is None else result.previews[step]
        axes[0, column].imshow(beneath)
        axes[0, column].set_title(f"step {step + 1}{between}t = {result.timesteps[step]}", fontsize=fontsize)
        for row, heat in enumerate(rows.values(), start=1):
            axes[row, column].imshow(overlay(beneath, heat[column]))
    axes[0, 0].set_ylabel("image" if result.previews is None else "predicted $x_0$", fontsize=fontsize, **label)
    for axis, text in zip(axes[1:, 0], rows, strict=True):
        axis.set_ylabel(text, fontsize=fontsize, parse_math=False, **label)


def draw_lines(
    axis: Axes, height: float, result: Explanation, lines: Mapping[str, Float[ndarray, " steps"]], steps: Sequence[int]
) -> None:
    """The lines over the steps, each named at its right end, and the chosen steps marked; `height` is in inches."""
    count = len(result.timesteps)
    every, right = max(1, count // 6), 0.5 + 1.05 * count
    ends = {name: np.flatnonzero(np.isfinite(line))[-1] for name, line in lines.items()}
    places = apart([line[ends[name]] for name, line in lines.items()], LINE / height)
    looks = zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS), strict=False)
    for turn, (name, place, (colour, dash, marker)) in enumerate(zip(lines, places, looks, strict=False)):
        (line,) = axis.plot(np.arange(1, count + 1), lines[name], dash, color=colour, label=name, clip_on=False)
        line.set(marker=marker, markevery=(turn % every, every))
        leader = [ends[name] + 1, right], [lines[name][ends[name]], place]
        axis.plot(*leader, color=colour, linewidth=0.8, clip_on=False)
        axis.text(right, place, f" {name}", va="center", fontsize=FONT_SIZE, parse_math=False)
    places = apart([(step + 0.5) / count for step in steps], 0.03 + 0.025 * len(str(count))) * count + 0.5
    for step, place in zip(steps, places, strict=True):
        axis.plot([step + 1, step + 1, place], [0, 1, 1.06], color="0.5", linewidth=0.8, clip_on=False, zorder=0)
        axis.text(place, 1.08, str(step + 1), ha="center", fontsize=FONT_SIZE)
    ticks, outer = chosen_steps(count), {0, count - 1} if count > 1 else set()
    names = [f"{step + 1}\n" + (f"t = {result.timesteps[step]}" if step in outer else " ") for step in ticks]
    axis.set_xticks([step + 1 for step in ticks], names, fontsize=FONT_SIZE)
    axis.set_xlabel("step", fontsize=FONT_SIZE, labelpad=-1.1 * FONT_SIZE)
    axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=FONT_SIZE)
    axis.set_ylabel("relevance\n(min–max over tokens)", fontsize=FONT_SIZE)
    axis.tick_params("x", pad=6)
    axis.set(xlim=(0.5, count + 0.5), ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)


def apart(places: Sequence[float], gap: float) -> Float[ndarray, " places"]:
    """Places in [0, 1], at least so far apart, moved as little as that needs: isotonic regression without the gaps."""
    order, gaps, turns = np.argsort(places, kind="stable"), gap * np.arange(len(places)), range(len(places))
    wanted = np.asarray(places)[order] - gaps
    fitted = [max(min(wanted[a : b + 1].mean() for b in turns[turn:]) for a in turns[: turn + 1]) for turn in turns]
    moved = np.empty(len(places))
    moved[order] = np.clip(fitted, 0, max(0, 1 - gaps[-1])) + gaps
    return moved


def bare(axes: ndarray) -> None:
    """No ticks, no frames."""
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)


def colour_bar(
    figure: Figure | SubFigure,
    axes: ndarray,
    fontsize: float,
    colours: str = COLOUR_MAP,
    most: float = 1,
    ends: tuple[str, str] = ("least", "most"),
) -> None:
    """What the colours of a row or grid of maps stand for, from 0 to `most`."""
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, most), colours)
    bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, ticks=[0, most])
    bar.ax.set_yticklabels(ends, fontsize=fontsize)


def title(result: Explanation, width: float, fontsize: float) -> str:
    """Prompt, model and seed, on as many lines of so many inches as they need."""
    return heading(result.prompt, f"{shortened(result.model)}, seed {result.seed}", width, fontsize)


def shortened(model: str) -> str:
    """A model's name: of a folder its own, of a long one the end."""
    name = model_name(model)
    return name if len(name) <= 40 else "…" + name[-39:]


def heading(prompt: str, about: str, width: float, fontsize: float) -> str:
    """A prompt and what else is told, on as many lines of so many inches as they need."""
    letters, told = int(width * 72 / (0.55 * fontsize)), quoted(prompt)
    if len(told) + len(about) + 5 <= letters:
        return f"{told}  ·  {about}"
    return "\n".join(textwrap.fill(part, letters) for part in (told, about))


def quoted(prompt: str) -> str:
    """A prompt as titles have it: of a very long one the beginning; where there is none, that the image was given."""
    return f"“{textwrap.shorten(prompt, _LONGEST, placeholder=' …')}”" if prompt.strip() else "a given image"


def label_of(result: Explanation, method: str) -> str:
    """A method's name, and what its map is of."""
    if result.explainer_name(method) == "Cam":
        return f"{method}, {COMBINED}"
    return f"{method}, {result.scores[method].shape[-1]} masks" if method in result.scores else method


def layer_label(name: str, *size: int) -> str:
    """Name and resolution, a line each for the block, its part and the resolution."""
    return re.sub(r"\.(?=[^.]+\.[^.]+$)", ".\n", name) + ",\n{}×{}".format(*size)
