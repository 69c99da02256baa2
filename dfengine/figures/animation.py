"""A method's maps at all steps as an animation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.text import Text
from numpy import ndarray
from PIL import Image

from dfengine.figures.forms import check_name
from dfengine.figures.panels import (
    BLANK,
    BLANK_STYLE,
    COLOUR_MAP,
    Figure,
    caption,
    heading,
    hide_axes,
    is_blank,
    method_title,
    overlay,
    picture_at,
    picture_label,
    short_model_name,
)
from dfengine.figures.selection import computed, within
from dfengine.files import published
from dfengine.result import Explanation

#: Inches: longer side of a picture, margins, minimum width of the figure. Then points of text and pixels per inch.
_SIDE, _MARGIN, _MIN_WIDTH, _SIZE, _DPI = 2.6, 0.15, 4.5, 11, 110
_LINE = 1.25 * _SIZE / 72
#: Minimum duration of the last frame in seconds.
_LAST_FRAME_SECONDS = 2.0


def animate(
    result: Explanation,
    method: str,
    path: str | Path,
    seconds_per_step: float = 0.3,
    steps: Sequence[int] | None = None,
) -> Path:
    """Write a looping GIF of the predicted x0 at each step, beside it the method's heat map over it; returns its path.

    `steps` are by default all finished ones; the last frame stays for two seconds. For maps by layer, all layers
    combined are shown. Raises ValueError for an unknown map, no finished step, a suffix other than .gif, or a folder
    that does not exist.
    """
    path = check_name(path, (".gif",))
    if not (0.01 <= seconds_per_step < math.inf):
        raise ValueError(f"got {seconds_per_step} seconds per step: expected at least 0.01")
    if method not in result.maps:
        raise ValueError(f"there is no map {method!r}: expected one of {', '.join(result.maps) or 'none'}")
    finished = computed(result.saliency(method))
    shown = finished if steps is None else within(steps, len(result.timesteps), finished)
    if not shown:
        raise ValueError(f"there is nothing to animate: no step of {method!r} is computed yet")
    first, *others = _quantized(list(_frames(result, method, shown)))
    last_seconds = max(_LAST_FRAME_SECONDS, seconds_per_step)
    durations = [round(1000 * seconds_per_step)] * len(others) + [round(1000 * last_seconds)]
    with published(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)
    return path


def _frames(result: Explanation, method: str, steps: Sequence[int]) -> Iterator[UInt8[ndarray, "y x 3"]]:
    """Render one figure again and again with other pictures and another step."""
    figure, line, axes = _layout(result, method)
    canvas = FigureCanvasAgg(figure)
    axes[0].set_title(picture_label(result), fontsize=_SIZE)
    axes[1].set_title(method_title(result, method), fontsize=_SIZE, parse_math=False)
    pictures = [axis.imshow(np.zeros_like(result.image)) for axis in axes]
    blank = axes[1].text(0.5, 0.5, BLANK, transform=axes[1].transAxes, **BLANK_STYLE)
    times = [f"{t:g}" for t in result.timesteps]
    for step in steps:
        picture = picture_at(result, step)
        pictures[0].set_data(picture)
        heat = result.heatmap(method, step)
        pictures[1].set_data(overlay(picture, np.full_like(heat, np.nan) if is_blank(heat) else heat))
        blank.set_visible(is_blank(heat))
        line.set_text(f"step {_pad(str(step), str(len(times) - 1))}, t = {_pad(times[step], *times)}")
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _layout(result: Explanation, method: str) -> tuple[Figure, Text, list[Axes]]:
    """A figure with the title, a line for the step, two axes with a colour bar, and a caption, all in fixed places."""
    picture_height, picture_width = (_SIDE * side / max(result.image.shape[:2]) for side in result.image.shape[:2])
    width = max(2 * picture_width + 3 * _MARGIN + 0.8, _MIN_WIDTH)
    details = f"{short_model_name(result.model)}, seed {result.seed}"
    title = heading(result.prompt, details, width - 2 * _MARGIN, _SIZE)
    title_height = (title.count("\n") + 1) * _LINE
    below = caption({method: result.hot(method)}, width - 2 * _MARGIN, _SIZE)
    bottom = (below.count("\n") + 1) * _LINE + 1.5 * _MARGIN
    height = picture_height + title_height + 2.2 * _LINE + 2 * _MARGIN + bottom
    figure = Figure((width, height), dpi=_DPI)
    left = _MARGIN / width
    figure.text(left, 1 - _MARGIN / height, title, va="top", fontsize=_SIZE, parse_math=False)
    line = figure.text(left, 1 - (1.5 * _MARGIN + title_height) / height, "", va="top", fontsize=_SIZE)
    figure.text(left, _MARGIN / height, below, va="bottom", fontsize=_SIZE, parse_math=False)
    starts = [_MARGIN, 2 * _MARGIN + picture_width, 2.5 * _MARGIN + 2 * picture_width]
    *axes, bar_axis = (
        figure.add_axes((start / width, bottom / height, axis_width / width, picture_height / height))
        for start, axis_width in zip(starts, [picture_width, picture_width, 0.1], strict=True)
    )
    hide_axes(np.array(axes))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOUR_MAP), cax=bar_axis, ticks=[0, 1])
    bar.ax.set_yticklabels(["least", "most"], fontsize=_SIZE)
    return figure, line, axes


def _pad(number: str, *others: str) -> str:
    """A number right-aligned with figure spaces to the longest of the others, so that the line does not move."""
    return number.rjust(max(map(len, others)), "\u2007")


def _quantized(frames: Sequence[UInt8[ndarray, "y x 3"]]) -> list[Image.Image]:
    """The frames in one palette without dithering, so that areas that do not change keep their colours."""
    sample = Image.fromarray(np.concatenate([frame[::2, ::2] for frame in frames]))
    colours = sample.quantize(253, Image.Quantize.MEDIANCUT, kmeans=3).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 255, 255, 0, 0, 0, *colours[: 3 * 253]])
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
