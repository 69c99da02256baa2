"""Images of the same prompts and seeds under several schedules, with the schedules' time-steps (Figures 6 and 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.image import imsave
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy import ndarray

from dfengine.figures import lettering
from dfengine.figures.panels import COLOURS, FONT_SIZE, GAP, LINE, Figure, heading, hide_axes
from dfengine.files import published

#: Width of a picture and height of a schedule's row of time-steps, in inches.
_SIDE, _LINE_HEIGHT = 1.5, 0.32
#: Maximum number of characters in a line of a row's label and of a column's title.
_LABEL_LENGTH, _TITLE_LENGTH = 24, 14


def samples(
    images: Mapping[str, Sequence[UInt8[ndarray, "H W 3"]]],
    lists: Mapping[str, Sequence[float]],
    last: float = 999,
    title: tuple[str, str] | None = None,
) -> Figure:
    """A row of images per label (a prompt or seed), a column per schedule, and below them the schedules' time-steps.

    `lists` has each schedule's time-steps, in [0, `last`], in the order of the images in every row. A title consists of
    a prompt and further details.
    """
    labels = [lettering.fill(label, _LABEL_LENGTH) for label in images]
    names = [lettering.fill(name, _TITLE_LENGTH) for name in lists]
    image_height, image_width = next(iter(images.values()))[0].shape[:2]
    cell_height = _SIDE * image_height / image_width
    margin = 0.45 * LINE * max(lettering.columns(line) for label in labels for line in label.split("\n")) + 0.2
    schedule_height = _LINE_HEIGHT * len(lists) + 2.6 * LINE
    width = max(margin + (_SIDE + GAP) * len(lists), 5)
    suptitle = heading(*title, width, FONT_SIZE) if title else ""
    lines = 0.5 + max(name.count("\n") + 1 for name in names) + (suptitle.count("\n") + 1.5 if suptitle else 0)
    figure = Figure(
        (width, (cell_height + GAP) * len(images) + LINE * lines + schedule_height),
        layout=ConstrainedLayoutEngine(h_pad=GAP / 2, w_pad=GAP / 2, hspace=0, wspace=0),
    )
    if suptitle:
        figure.suptitle(suptitle, fontsize=FONT_SIZE, parse_math=False)
    ratios = [figure.get_figheight() - schedule_height, schedule_height]
    above, below = np.asarray(figure.subfigures(2, height_ratios=ratios))
    axes = above.subplots(len(images), len(lists), squeeze=False)
    hide_axes(axes)
    for row, (label, pictures) in enumerate(zip(labels, images.values(), strict=True)):
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture)
        axes[row, 0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=FONT_SIZE)
    _draw_schedules(below.subplots(), lists, last)
    return figure


def _draw_schedules(axis: Axes, lists: Mapping[str, Sequence[float]], last: float) -> None:
    """Draw a row of marks per schedule, one mark per time-step, from noise on the left to the image on the right."""
    for number, steps in enumerate(lists.values()):
        y = len(lists) - number
        axis.plot([0, last], [y, y], color="0.85", linewidth=0.8, zorder=0)
        axis.plot(steps, np.full(len(steps), y), "|", color=COLOURS[number % len(COLOURS)], markersize=10)
    axis.set_yticks(range(len(lists), 0, -1), list(lists), fontsize=FONT_SIZE)
    axis.set(xlim=(last * 1.01, -last * 0.01), ylim=(0.5, len(lists) + 0.5))
    axis.tick_params("x", labelsize=FONT_SIZE)
    axis.set_xlabel("time-step t, from noise to image", fontsize=FONT_SIZE)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params("y", length=0)


def save_images(images: Mapping[str, UInt8[ndarray, "H W 3"]], folder: Path) -> Path:
    """Write images as `name`.png into a folder, which is created if necessary; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        with published(folder / f"{name}.png") as temporary:
            imsave(temporary, image)
    return folder
