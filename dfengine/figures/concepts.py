"""Relevance of concepts under several schedules: lines over the steps, and their sums (Figure 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dfengine.figures.lettering import columns
from dfengine.figures.panels import COLOURS, DASHES, FONT_SIZE, MARKERS, Figure, step_label
from dfengine.figures.selection import evenly_spaced

#: Width of a schedule's panel and of the bars, in inches.
_PANEL, _BARS = 2.4, 3.2
_GREYS = ("0.25", "0.55", "0.8", "0.4", "0.7", "0.9")
#: By schedule and concept: the relevance at each step; and the mean and the ends of the interval of its sum.
Lines = Mapping[str, Mapping[str, Sequence[float]]]
Sums = Mapping[str, Mapping[str, tuple[float, float, float]]]


def concepts(
    parts: Sequence[tuple[str, Lines, Sums]], timesteps: Mapping[str, Sequence[float]], errors: Sequence[Lines] = ()
) -> Figure:
    """A row per part (title, lines, sums): a panel of lines per schedule, then bars of the sums.

    `errors` has, for each part, the half-widths of the bands around its lines. Sized for a page of two columns.
    """
    schedules = list(timesteps)
    figure = Figure((width(len(schedules)), 2.9 * len(parts) + 0.3), layout="constrained")
    rows = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for number, (row, (title, lines, sums)) in enumerate(zip(rows, parts, strict=True)):
        row.suptitle(title, fontsize=FONT_SIZE, parse_math=False)
        axes = row.subplots(1, len(schedules) + 1, width_ratios=[_PANEL] * len(schedules) + [_BARS])
        for axis, schedule in zip(axes, schedules, strict=False):
            _draw_lines(axis, lines[schedule], errors[number][schedule] if errors else {})
            _format_panel(axis, schedule, timesteps[schedule])
        axes[0].set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0].set_ylabel("relevance (min–max)", fontsize=FONT_SIZE)
        _draw_sums(axes[-1], sums)
        legend = row.legend(
            axes[0].get_lines(),
            [*lines[schedules[0]]],
            loc="outside lower left",
            ncols=8,
            fontsize=FONT_SIZE - 2,
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        for axis in axes:
            axis.tick_params(labelsize=FONT_SIZE - 2)
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def width(num_schedules: int) -> float:
    """Width of the figure in inches."""
    return _PANEL * num_schedules + _BARS + 2


def _draw_lines(axis: Axes, lines: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]) -> None:
    """Draw a line per concept, distinguished by colour, dash and marker, with its band."""
    for number, (name, line) in enumerate(lines.items()):
        steps, values = np.arange(len(line)), np.asarray(line)
        colour, every = COLOURS[number % len(COLOURS)], max(1, len(line) // 5)
        (curve,) = axis.plot(steps, values, DASHES[number % len(DASHES)], color=colour, label=name)
        curve.set(marker=MARKERS[number % len(MARKERS)], markevery=(number % every, every))
        if errors:
            axis.fill_between(steps, values - errors[name], values + errors[name], color=colour, alpha=0.2, linewidth=0)


def _format_panel(axis: Axes, schedule: str, timesteps: Sequence[float]) -> None:
    ticks = evenly_spaced(len(timesteps), 3)
    # Between the first and the last there is no room for another t.
    names = [step_label(step, timesteps, "\n") if step in (ticks[0], ticks[-1]) else str(step) for step in ticks]
    axis.set_xticks(ticks, names)
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[-1].set_horizontalalignment("right")
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.5, 1], [])
    axis.set_title(schedule, fontsize=FONT_SIZE)


def _draw_sums(axis: Axes, sums: Sums) -> None:
    """Draw a group of bars per concept, with a bar per schedule."""
    names, bar_width = list(next(iter(sums.values()))), 0.8 / len(sums)
    for number, (schedule, by_name) in enumerate(sums.items()):
        mean, low, high = np.array([by_name[name] for name in names]).T
        x = np.arange(len(names)) + (number - (len(sums) - 1) / 2) * bar_width
        grey = _GREYS[number % len(_GREYS)]
        axis.bar(x, mean, bar_width, yerr=[mean - low, high - mean], capsize=2, color=grey, label=schedule)
    is_crowded = max(map(columns, names)) * 0.6 * (FONT_SIZE - 2) / 72 > 0.95 * _BARS / len(names)
    axis.set_xticks(range(len(names)), names, rotation=30 if is_crowded else 0, ha="right" if is_crowded else "center")
    axis.set_title("sum over the steps", fontsize=FONT_SIZE)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=FONT_SIZE - 2, frameon=False)
