"""A method's maps through all steps, as an animation."""

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
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy import ndarray
from PIL import Image

from dfengine.figures.choosing import computed, within
from dfengine.figures.parts import COLOUR_MAP, bare, heading, label_of, overlay, shortened
from dfengine.result import Explanation

#: Inches of a picture's longer side, of margins and across at least; points of letters, and pixels an inch.
_SIDE, _MARGIN, _LEAST, _SIZE, _DPI = 2.6, 0.15, 4.5, 11, 110
_LINE = 1.25 * _SIZE / 72
#: Seconds for which the last frame stays.
_HELD = 2.0


def animate(
    result: Explanation,
    method: str,
    path: str | Path,
    seconds_per_step: float = 0.3,
    steps: Sequence[int] | None = None,
) -> Path:
    """Write a GIF that shows, step by step, the predicted x0 and beside it the method's heat map over it.

    It goes through all finished steps, or those of `steps`, holds the last for two seconds and begins again. Of DF-CAM
    all layers are shown together, of relevance where it lies. Raises ValueError for a map that the result does not
    have, no finished step, a name that does not end in .gif, or a folder that is not there.
    """
    path = Path(path)
    if path.suffix.lower() != ".gif":
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}: expected .gif")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist: make it first")
    if not (0.01 <= seconds_per_step < math.inf):
        raise ValueError(f"{seconds_per_step} seconds a step are not possible: expected at least 0.01")
    if method not in result.maps:
        raise ValueError(f"there is no map {method!r}: expected one of {', '.join(result.maps) or 'none'}")
    finished = computed(result.saliency(method))
    shown = finished if steps is None else within(steps, len(result.timesteps), finished)
    if not shown:
        raise ValueError(f"there is nothing to animate: no step of {method!r} is computed yet")
    first, *others = _indexed(list(_frames(result, method, shown)))
    durations = [round(1000 * seconds_per_step)] * len(others) + [round(1000 * max(_HELD, seconds_per_step))]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, optimize=False)
    return path


def _frames(result: Explanation, method: str, steps: Sequence[int]) -> Iterator[UInt8[ndarray, "y x 3"]]:
    """One figure, of which the two pictures and the line of the step change."""
    figure, line, axes = _layout(result)
    canvas = FigureCanvasAgg(figure)
    axes[0].set_title("image" if result.previews is None else "predicted $x_0$", fontsize=_SIZE)
    axes[1].set_title(label_of(result, method), fontsize=_SIZE, parse_math=False)
    pictures = [axis.imshow(np.zeros_like(result.image)) for axis in axes]
    timesteps = [int(t) for t in result.timesteps]
    for step in steps:
        beneath = result.image if result.previews is None else np.asarray(result.previews[step])
        pictures[0].set_data(beneath)
        pictures[1].set_data(overlay(beneath, result.heatmap(method, step)))
        number, t = _padded(step + 1, len(timesteps)), _padded(timesteps[step], max(timesteps))
        line.set_text(f"step {number} of {len(timesteps)}, t = {t}")
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _layout(result: Explanation) -> tuple[Figure, Text, list[Axes]]:
    """Title, a line for the step, and two axes with the colour bar beside them, all in fixed places."""
    height, width = (_SIDE * side / max(result.image.shape[:2]) for side in result.image.shape[:2])
    across = max(2 * width + 3 * _MARGIN + 0.8, _LEAST)
    told = heading(result.prompt, f"{shortened(result.model)}, seed {result.seed}", across - 2 * _MARGIN, _SIZE)
    top = (told.count("\n") + 1) * _LINE
    down = height + top + 2.2 * _LINE + 3 * _MARGIN
    figure = Figure((across, down), dpi=_DPI)
    left = _MARGIN / across
    figure.text(left, 1 - _MARGIN / down, told, va="top", fontsize=_SIZE, parse_math=False)
    line = figure.text(left, 1 - (1.5 * _MARGIN + top) / down, "", va="top", fontsize=_SIZE)
    starts, widths = [_MARGIN, 2 * _MARGIN + width, 2.5 * _MARGIN + 2 * width], [width, width, 0.1]
    *axes, beside = (
        figure.add_axes((start / across, _MARGIN / down, wide / across, height / down))
        for start, wide in zip(starts, widths, strict=True)
    )
    bare(np.array(axes))
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), COLOUR_MAP), cax=beside, ticks=[0, 1])
    bar.ax.set_yticklabels(["least", "most"], fontsize=_SIZE)
    return figure, line, axes


def _padded(number: int, most: int) -> str:
    """With spaces as wide as a digit, so that nothing moves."""
    return str(number).rjust(len(str(most)), "\u2007")


def _indexed(frames: Sequence[UInt8[ndarray, "y x 3"]]) -> list[Image.Image]:
    """The frames in one palette without dithering, so that what is the same in two of them stays the same."""
    sample = Image.fromarray(np.concatenate([frame[::2, ::2] for frame in frames]))
    own = sample.quantize(253, Image.Quantize.MEDIANCUT, kmeans=3).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 255, 255, 0, 0, 0, *own[: 3 * 253]])
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
