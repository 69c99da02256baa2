"""The paper's first claim, measured: does what a model relies on begin as structure and spread into detail?

Step by step, over the maps of many generations: how much of the image they cover, how they move, and how far they lie
on the shapes that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

from dfengine.evaluate.intervals import CORRELATIONS, SHARES, Interval, mean_interval
from dfengine.evaluate.truth import ConceptJudge, auroc, top_k_iou
from dfengine.explain import StepMap
from dfengine.result import heatmap
from dfengine.shapes.world import Caption

#: The measures of a map, and what each is.
MEASURES = {
    "area": "share of pixels above half of the map's range",
    "entropy": "of the map as a distribution over pixels, as a share of the largest possible",
    "shift": "distance of the map's centre from that of the step before, in image widths",
    "overlap": "IoU of the shapes and the hottest pixels, as many as they have",
    "auroc": "probability that a pixel of the shapes is hotter than one of the background",
}

#: With fewer images, no verdict is given.
_MIN_IMAGES = 5


@dataclass(frozen=True)
class Recovery:
    """Means over images of each measure at each step, and their trend over the steps; intervals are over images."""

    steps: Mapping[str, Mapping[str, Sequence[Interval]]]
    """by method and measure, at each step"""
    trend: Mapping[str, Mapping[str, Interval]]
    """by method and measure, the rank correlation with the step: 1 if it always rises, −1 if it always falls"""
    timesteps: Sequence[float]
    num_images: int
    num_excluded: int
    """images that do not match an embedded-world caption, or whose shapes are not distinguished by their colours"""

    def verdict(self, method: str) -> str:
        """Whether the claim holds for a method: its map begins on the shapes and covers more and more of the image."""
        trend, first = self.trend[method]["area"], self.steps[method]["auroc"][0]
        spread = "grows" if trend.low > 0 else "shrinks" if trend.high < 0 else "neither grows nor shrinks"
        start = "on the shapes" if first.low > 0.5 else "beside them" if first.high < 0.5 else "anywhere"
        if min(trend.count, first.count) < _MIN_IMAGES:
            return f"{method}: {min(trend.count, first.count)} images are too few for a verdict"
        holds = trend.low > 0 and first.low > 0.5
        return f"{method}: the map begins {start} and {spread}; the claim {'holds' if holds else 'does not hold'}"

    def table(self) -> str:
        """The first, middle and last step of every measure, and its trend, in Markdown."""
        return "\n".join(_table(self))


def measure_recovery(events: Iterable[Any], prompts: Sequence[str], timesteps: Sequence[float]) -> Recovery:
    """Measure the maps of an engine's stream of events, one item for each prompt; all have the same time-steps.

    Raises ValueError if no image has known areas.
    """
    judge = ConceptJudge()
    shapes: dict[int, ndarray] = {}
    maps: dict[tuple[str, int], dict[int, ndarray]] = {}
    measured: dict[str, list[list[dict[str, float]]]] = {}
    for event in events:
        if isinstance(event, StepMap):
            maps.setdefault((event.method, event.item), {})[event.step] = event.saliency.numpy()
        elif trajectory := getattr(event, "trajectory", None):
            with suppress(ValueError):  # outside the embedded world
                areas = judge.areas(trajectory.image.numpy(), Caption.parse(prompts[event.item]))
                if areas is not None:
                    shapes[event.item] = areas["both"]
        else:
            for method in [name for name, item in maps if item == event.item]:
                by_step = maps.pop((method, event.item))
                if event.item in shapes:
                    area = shapes[event.item]
                    heat = [heatmap(by_step[step], area.shape) for step in range(len(timesteps))]
                    rows = [
                        recovery_measures(one, last, area) for one, last in zip(heat, [None, *heat[:-1]], strict=True)
                    ]
                    measured.setdefault(method, []).append(rows)
    if not measured:
        raise ValueError("no image has shapes whose areas are known: recovery is measured in the embedded world")
    return Recovery(
        steps={method: {name: _at_each_step(rows, name) for name in MEASURES} for method, rows in measured.items()},
        trend={method: {name: _trend(rows, name) for name in MEASURES} for method, rows in measured.items()},
        timesteps=list(timesteps),
        num_images=len(shapes),
        num_excluded=len(prompts) - len(shapes),
    )


def recovery_measures(
    heat: Float[ndarray, "H W"], before: Float[ndarray, "H W"] | None, area: Bool[ndarray, "H W"]
) -> dict[str, float]:
    """All of `MEASURES` of one map in [0, 1]; NaN if the map is constant, and for the first map's shift."""
    if np.ptp(heat) == 0:
        return dict.fromkeys(MEASURES, float("nan"))
    shares = heat / heat.sum()
    shift = float("nan")
    if before is not None and np.ptp(before) > 0:
        shift = float(np.linalg.norm(centre_of_mass(heat) - centre_of_mass(before)))
    return {
        "area": float((heat > 0.5).mean()),
        "entropy": float(stats.entropy(shares.ravel()) / np.log(heat.size)),
        "shift": shift,
        "overlap": top_k_iou(heat, area),
        "auroc": auroc(heat, area),
    }


def centre_of_mass(heat: Float[ndarray, "H W"]) -> Float[ndarray, " 2"]:
    """(y, x), in image heights and widths."""
    shares = heat / heat.sum()
    rows, columns = (np.arange(size) + 0.5 for size in heat.shape)
    return np.array([shares.sum(1) @ rows / heat.shape[0], shares.sum(0) @ columns / heat.shape[1]])


def _at_each_step(items: Sequence[Sequence[Mapping[str, float]]], name: str) -> list[Interval]:
    limits = (0, np.inf) if name == "shift" else SHARES
    return [mean_interval([one[name] for one in step], limits) for step in zip(*items, strict=True)]


def _trend(items: Sequence[Sequence[Mapping[str, float]]], name: str) -> Interval:
    def correlation(rows: Sequence[Mapping[str, float]]) -> float:
        values = np.array([row[name] for row in rows])
        known = np.isfinite(values)
        if known.sum() < 3 or np.ptp(values[known]) == 0:
            return float("nan")
        return float(stats.spearmanr(np.flatnonzero(known), values[known]).statistic)

    return mean_interval([correlation(rows) for rows in items], CORRELATIONS)


def _table(summary: Recovery) -> Iterator[str]:
    shown = sorted({0, len(summary.timesteps) // 2, len(summary.timesteps) - 1})
    heads = [f"step {step}, t = {summary.timesteps[step]}" for step in shown]
    for method, by_measure in summary.steps.items():
        yield f"| {method} | {' | '.join(heads)} | trend |"
        yield f"|---|{'---|' * (len(shown) + 1)}"
        for name, values in by_measure.items():
            yield f"| {name} | {' | '.join(str(values[step]) for step in shown)} | {summary.trend[method][name]} |"
        yield ""
        yield summary.verdict(method)
        yield ""
    excluded = f", {summary.num_excluded} excluded" if summary.num_excluded else ""
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in MEASURES.items())
    yield f"{summary.num_images} images{excluded}. {meanings}. trend: rank correlation with the step."
