"""How measures of maps change over the steps, averaged over many images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dfengine.figures.panels import COLOURS, DASHES, FONT_SIZE, Figure, step_label
from dfengine.figures.selection import evenly_spaced

#: By method and measure, the mean and the ends of its interval at each step.
Bands = Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]]


def recovery(
    bands: Bands, timesteps: Sequence[float], columns: int | None = None, limits: tuple[float, float] | None = None
) -> Figure:
    """A panel per measure with a line and its interval per method; by default all panels in one row.

    `limits` are the ends of every panel's vertical axis; by default each panel has its own.
    """
    names = list(next(iter(bands.values())))
    columns = len(names) if columns is None else min(columns, len(names))
    rows = -(-len(names) // columns)
    figure = Figure((2.9 * columns, 2.6 * rows + 0.6), layout="constrained")
    ticks = evenly_spaced(len(timesteps), 2)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(names) :]:
        axis.remove()
    for axis, name in zip(axes, names, strict=False):
        for number, (method, by_measure) in enumerate(bands.items()):
            mean, low, high = np.array(by_measure[name]).T
            colour = COLOURS[number % len(COLOURS)]
            axis.plot(mean, DASHES[number % len(DASHES)], color=colour, label=method)
            axis.fill_between(np.arange(len(timesteps)), low, high, color=colour, alpha=0.25, linewidth=0)
        axis.set_title(name, fontsize=FONT_SIZE)
        if limits is not None:
            axis.set_ylim(limits)
        axis.set_xticks(ticks, [step_label(step, timesteps, "\n") for step in ticks])
        for label, side in zip(axis.get_xticklabels(), ("left", "right"), strict=False):
            label.set_horizontalalignment(side)
        axis.tick_params(labelsize=FONT_SIZE - 2)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, fontsize=FONT_SIZE - 2, frameon=False)
    return figure
