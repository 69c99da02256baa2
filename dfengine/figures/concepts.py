"""Relevance of concepts under several schedules: lines over the steps, and their sums (Figure 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from dfengine.figures.choosing import chosen_steps
from dfengine.figures.parts import COLOURS, DASHES, FONT_SIZE, MARKERS

#: By schedule and concept: what it has at each step, and the mean, low and high end of its sum.
Lines = Mapping[str, Mapping[str, Sequence[float]]]
Sums = Mapping[str, Mapping[str, tuple[float, float, float]]]


def concepts(parts: Sequence[tuple[str, Lines, Sums]], timesteps: Mapping[str, Sequence[int]]) -> Figure:
    """A row for each part (a title, its lines and sums): a panel of lines a schedule, then bars of their sums."""
    schedules = list(timesteps)
    figure = Figure((3.1 * len(schedules) + 4.2, 2.9 * len(parts) + 0.3), layout="constrained")
    rows = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for row, (title, lines, sums) in zip(rows, parts, strict=True):
        row.suptitle(title, fontsize=FONT_SIZE, parse_math=False)
        axes = row.subplots(1, len(schedules) + 1, width_ratios=[1.0] * len(schedules) + [1.3])
        names = list(next(iter(lines.values())))
        for axis, schedule in zip(axes, schedules, strict=False):
            steps = timesteps[schedule]
            for turn, name in enumerate(names):
                look = {"color": COLOURS[turn % len(COLOURS)], "linestyle": DASHES[turn % len(DASHES)]}
                every = max(1, len(steps) // 5)
                marker = {"marker": MARKERS[turn % len(MARKERS)], "markevery": (turn % every, every)}
                axis.plot(np.arange(1, len(steps) + 1), lines[schedule][name], label=name, **look, **marker)
            ticks = chosen_steps(len(steps), 3)
            axis.set_xticks([step + 1 for step in ticks], [f"{step + 1}\nt = {steps[step]}" for step in ticks])
            for label, side in zip(axis.get_xticklabels(), ("left", "center", "right"), strict=False):
                label.set_horizontalalignment(side)
            axis.set_ylim(-0.03, 1.03)
            axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"] if axis is axes[0] else [])
            axis.set_title(schedule, fontsize=FONT_SIZE)
        axes[0].set_ylabel("relevance", fontsize=FONT_SIZE)
        bars, width = axes[-1], 0.8 / len(schedules)
        for turn, schedule in enumerate(schedules):
            low, mean, high = (np.array([sums[schedule][name][part] for name in names]) for part in (1, 0, 2))
            places = np.arange(len(names)) + (turn - (len(schedules) - 1) / 2) * width
            shade = ("0.25", "0.55", "0.8", "0.4", "0.7", "0.9")[turn % 6]
            bars.bar(places, mean, width, yerr=[mean - low, high - mean], capsize=2, color=shade, label=schedule)
        bars.set_xticks(
            range(len(names)), names, rotation=30 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center"
        )
        bars.set_title("sum over the steps", fontsize=FONT_SIZE)
        bars.legend(fontsize=FONT_SIZE - 3, frameon=False)
        handles, labels = axes[0].get_legend_handles_labels()
        row.legend(handles, labels, loc="outside lower left", ncols=8, fontsize=FONT_SIZE - 2, frameon=False)
        for axis in axes:
            axis.tick_params(labelsize=FONT_SIZE - 2)
            axis.spines[["top", "right"]].set_visible(False)
    return figure
