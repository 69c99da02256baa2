"""Images of the same prompts and seeds under several schedules, with the schedules' time-steps (Figures 6 and 10)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.image import imsave
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy import ndarray

from dfengine.figures.parts import COLOURS, FONT_SIZE, GAP, LINE, Figure, bare, heading

#: Inches of a picture, and of a schedule's line of time-steps.
_SIDE, _LINE_HEIGHT = 1.5, 0.32
_MOST_LETTERS, _TITLE_LETTERS = 24, 14


def samples(
    images: Mapping[str, Sequence[UInt8[ndarray, "H W 3"]]],
    lists: Mapping[str, Sequence[float]],
    last: int = 999,
    title: tuple[str, str] | None = None,
) -> Figure:
    """A row of images for each label (a prompt and seed), a column for each schedule, and its time-steps beneath.

    `lists` has each schedule's time-steps, in [0, `last`], in the order of the images of every row.
    A title has a prompt and what else is told.
    """
    labels = ["\n".join(textwrap.wrap(label, _MOST_LETTERS)) for label in images]
    names = [textwrap.fill(name, _TITLE_LETTERS) for name in lists]
    height, width = next(iter(images.values()))[0].shape[:2]
    side = _SIDE * height / width
    margin = 0.45 * LINE * max(max(map(len, label.split("\n"))) for label in labels) + 0.2
    beneath = _LINE_HEIGHT * len(lists) + 2.6 * LINE
    width = max(margin + (_SIDE + GAP) * len(lists), 5)
    told = heading(*title, width, FONT_SIZE) if title else ""
    lines = 0.5 + max(name.count("\n") + 1 for name in names) + (told.count("\n") + 1.5 if told else 0)
    figure = Figure(
        (width, (side + GAP) * len(images) + LINE * lines + beneath),
        layout=ConstrainedLayoutEngine(h_pad=GAP / 2, w_pad=GAP / 2, hspace=0, wspace=0),
    )
    if told:
        figure.suptitle(told, fontsize=FONT_SIZE, parse_math=False)
    above, below = np.asarray(figure.subfigures(2, height_ratios=[figure.get_figheight() - beneath, beneath]))
    axes = above.subplots(len(images), len(lists), squeeze=False)
    bare(axes)
    for row, (label, pictures) in enumerate(zip(labels, images.values(), strict=True)):
        for axis, picture in zip(axes[row], pictures, strict=True):
            axis.imshow(picture)
        axes[row, 0].set_ylabel(label, fontsize=FONT_SIZE, rotation=0, ha="right", va="center", parse_math=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=FONT_SIZE)
    schedule = below.subplots()
    for place, steps in enumerate(lists.values()):
        height_of = len(lists) - place
        schedule.plot([0, last], [height_of] * 2, color="0.85", linewidth=0.8, zorder=0)
        schedule.plot(steps, np.full(len(steps), height_of), "|", color=COLOURS[place % len(COLOURS)], markersize=10)
    schedule.set_yticks(range(len(lists), 0, -1), list(lists), fontsize=FONT_SIZE)
    schedule.set(xlim=(last * 1.01, -last * 0.01), ylim=(0.5, len(lists) + 0.5))
    schedule.tick_params("x", labelsize=FONT_SIZE)
    schedule.set_xlabel("time-step t, from noise to image", fontsize=FONT_SIZE)
    schedule.spines[["top", "right", "left"]].set_visible(False)
    schedule.tick_params("y", length=0)
    return figure


def save_images(images: Mapping[str, UInt8[ndarray, "H W 3"]], folder: Path) -> Path:
    """Write images as PNG by their names, into a folder that is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        imsave(folder / f"{name}.png", image)
    return folder
