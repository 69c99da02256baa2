"""How maps change over the steps, over many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dfengine.figures.choosing import chosen_steps
from dfengine.figures.parts import COLOURS, DASHES, FONT_SIZE, Figure

#: By method and measure, the mean with the ends of its interval at each step.
Bands = Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]]


def recovery(
    bands: Bands, timesteps: Sequence[float], columns: int | None = None, limits: tuple[float, float] | None = None
) -> Figure:
    """A panel a measure, a line with its interval a method; so many panels side by side, all unless given.

    `limits` are the ends of every panel's axis, by default its own.
    """
    names = list(next(iter(bands.values())))
    columns = len(names) if columns is None else min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure((2.9 * columns, 2.6 * rows + 0.6), layout="constrained")
    places, ticks = np.arange(1, len(timesteps) + 1), chosen_steps(len(timesteps), 2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        for turn, (method, by_measure) in enumerate(bands.items()):
            mean, low, high = np.array(by_measure[name]).T
            colour = COLOURS[turn % len(COLOURS)]
            axis.plot(places, mean, DASHES[turn % len(DASHES)], color=colour, label=method)
            axis.fill_between(places, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.set_title(name, fontsize=FONT_SIZE)
        if limits is not None:
            axis.set_ylim(limits)
        axis.set_xticks([step + 1 for step in ticks], [f"{step + 1}\nt = {timesteps[step]}" for step in ticks])
        for label, side in zip(axis.get_xticklabels(), ("left", "right"), strict=False):
            label.set_horizontalalignment(side)
        axis.tick_params(labelsize=FONT_SIZE - 2)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=FONT_SIZE - 2, frameon=False)
    return figure
