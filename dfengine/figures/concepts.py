"""Relevance of concepts under several schedules: lines over the steps, and their sums (Figure 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from dfengine.figures.choosing import chosen_steps
from dfengine.figures.parts import COLOURS, DASHES, FONT_SIZE, MARKERS, Figure

#: Inches across of a schedule's panel, and of the bars.
_PANEL, _BARS = 2.4, 3.2
#: By schedule and concept: what it has at each step, and the mean, low and high end of its sum.
Lines = Mapping[str, Mapping[str, Sequence[float]]]
Sums = Mapping[str, Mapping[str, tuple[float, float, float]]]


def concepts(
    parts: Sequence[tuple[str, Lines, Sums]], timesteps: Mapping[str, Sequence[float]], errors: Sequence[Lines] = ()
) -> Figure:
    """A row for each part (a title, its lines and sums): a panel of lines a schedule, then bars of their sums.

    `errors` has, for each part, how far a band reaches above and below its lines. For a page of two columns.
    """
    schedules = list(timesteps)
    figure = Figure((width(len(schedules)), 2.9 * len(parts) + 0.3), layout="constrained")
    rows = figure.subfigures(len(parts), 1, squeeze=False)[:, 0]
    for turn, (row, (title, lines, sums)) in enumerate(zip(rows, parts, strict=True)):
        row.suptitle(title, fontsize=FONT_SIZE, parse_math=False)
        axes = row.subplots(1, len(schedules) + 1, width_ratios=[_PANEL] * len(schedules) + [_BARS])
        for axis, schedule in zip(axes, schedules, strict=False):
            _draw_lines(axis, lines[schedule], errors[turn][schedule] if errors else {})
            _dress(axis, schedule, timesteps[schedule])
        axes[0].set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes[0].set_ylabel("relevance", fontsize=FONT_SIZE)
        _draw_sums(axes[-1], sums)
        names = [*lines[schedules[0]]]
        legend = row.legend(
            axes[0].get_lines(), names, loc="outside lower left", ncols=8, fontsize=FONT_SIZE - 2, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        for axis in axes:
            axis.tick_params(labelsize=FONT_SIZE - 2)
            axis.spines[["top", "right"]].set_visible(False)
    return figure


def width(num_schedules: int) -> float:
    """Inches across."""
    return _PANEL * num_schedules + _BARS + 2


def _draw_lines(axis: Axes, lines: Mapping[str, Sequence[float]], errors: Mapping[str, Sequence[float]]) -> None:
    """A line a concept, told apart by colour, dash and marker, with its band."""
    for turn, (name, line) in enumerate(lines.items()):
        places, values = np.arange(1, len(line) + 1), np.asarray(line)
        colour, every = COLOURS[turn % len(COLOURS)], max(1, len(line) // 5)
        (drawn,) = axis.plot(places, values, DASHES[turn % len(DASHES)], color=colour, label=name)
        drawn.set(marker=MARKERS[turn % len(MARKERS)], markevery=(turn % every, every))
        if errors:
            low, high = values - errors[name], values + errors[name]
            axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)


def _dress(axis: Axes, schedule: str, timesteps: Sequence[float]) -> None:
    ticks = chosen_steps(len(timesteps), 3)
    names = [f"{step + 1}\nt = {timesteps[step]}" for step in ticks]
    if len(ticks) == 3:  # between these there is no room for another t
        names[1] = f"{ticks[1] + 1}"
    axis.set_xticks([step + 1 for step in ticks], names)
    *_, last = axis.get_xticklabels()
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.5, 1], [])
    axis.set_title(schedule, fontsize=FONT_SIZE)


def _draw_sums(axis: Axes, sums: Sums) -> None:
    """A group of bars a concept, a bar a schedule."""
    names, wide = list(next(iter(sums.values()))), 0.8 / len(sums)
    for turn, (schedule, by_name) in enumerate(sums.items()):
        low, mean, high = (np.array([by_name[name][part] for name in names]) for part in (1, 0, 2))
        places = np.arange(len(names)) + (turn - (len(sums) - 1) / 2) * wide
        shade = ("0.25", "0.55", "0.8", "0.4", "0.7", "0.9")[turn % 6]
        axis.bar(places, mean, wide, yerr=[mean - low, high - mean], capsize=2, color=shade, label=schedule)
    turned = max(map(len, names)) * 0.6 * (FONT_SIZE - 2) / 72 > 0.95 * _BARS / len(names)
    axis.set_xticks(range(len(names)), names, rotation=30 if turned else 0, ha="right" if turned else "center")
    axis.set_title("sum over the steps", fontsize=FONT_SIZE)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=FONT_SIZE - 2, frameon=False)
