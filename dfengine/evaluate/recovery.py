"""The paper's first claim in figures: does what a model relies on begin as structure and spread into detail?

Of the maps of many generations, step by step: how much of the image they take up, how they move, and how far they lie
on what is truly there.
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

from dfengine.evaluate.concepts import RightOnes
from dfengine.evaluate.intervals import Interval, interval
from dfengine.evaluate.truth import area, auroc, has_distinct_colours, overlap
from dfengine.explain import StepMap
from dfengine.result import heatmap
from dfengine.shapes.world import SIZE, Caption

#: What is measured of a map, and what it says.
MEASURES = {
    "area": "share of pixels above half of the map's range",
    "entropy": "of the map as a distribution over pixels, as a share of the most there can be",
    "shift": "how far the map's centre moves from the step before, in image widths",
    "overlap": "IoU of the hottest pixels with the shapes, as many as these have",
    "auroc": "probability that a pixel of the shapes is hotter than one of the background",
}


#: Images that a verdict is given on.
_FEWEST = 5


@dataclass(frozen=True)
class Recovery:
    """Means over images of each measure at each step, and how it goes along the steps; intervals are over images."""

    steps: Mapping[str, Mapping[str, Sequence[Interval]]]
    """by method and measure, at each step"""
    trend: Mapping[str, Mapping[str, Interval]]
    """by method and measure, the rank correlation with the step's number: 1 rises all along, −1 falls"""
    timesteps: Sequence[float]
    num_images: int
    left_out: int
    """images of another world, that are not what was asked for, or whose shapes are not told by their colours"""


def measures(
    heat: Float[ndarray, "H W"], before: Float[ndarray, "H W"] | None, true: Bool[ndarray, "H W"]
) -> dict[str, float]:
    """All of `MEASURES` of one map in [0, 1]; NaN for a map that is the same everywhere, and for the first's shift."""
    if np.ptp(heat) == 0:
        return dict.fromkeys(MEASURES, float("nan"))
    shares = heat / heat.sum()
    return {
        "area": float((heat > 0.5).mean()),
        "entropy": float(stats.entropy(shares.ravel()) / np.log(heat.size)),
        "shift": float("nan") if before is None or np.ptp(before) == 0 else _distance(centre(heat), centre(before)),
        "overlap": overlap(heat, true),
        "auroc": auroc(heat, true),
    }


def centre(heat: Float[ndarray, "H W"]) -> tuple[float, float]:
    """The centre of mass (y, x), in image heights and widths."""
    shares = heat / heat.sum()
    rows, columns = (np.arange(size) + 0.5 for size in heat.shape)
    return float(shares.sum(1) @ rows / heat.shape[0]), float(shares.sum(0) @ columns / heat.shape[1])


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    return float(np.hypot(a[0] - b[0], a[1] - b[1]))


def check_world(image_shape: tuple[int, int], prompts: Sequence[str]) -> None:
    """Raise ValueError, before anything is computed, where no image's shapes will be known."""
    for prompt in prompts:
        with suppress(ValueError):
            if image_shape == (SIZE, SIZE) and has_distinct_colours(Caption.parse(prompt)):
                return
    raise ValueError(
        f"there is no image whose shapes are known: they are in the embedded world alone, of {SIZE}×{SIZE} "
        "pixels and captions such as 'a red circle above a blue square on a gray background'"
    )


def recovery(events: Iterable[Any], prompts: Sequence[str], timesteps: Sequence[float]) -> Recovery:
    """Measure an engine's stream of maps, an item a prompt; all have the same time-steps.

    Raises ValueError where there is no image of the embedded world whose shapes are known.
    """
    judge = RightOnes()
    truth: dict[int, ndarray] = {}
    maps: dict[tuple[str, int], dict[int, ndarray]] = {}
    found: dict[str, list[list[dict[str, float]]]] = {}
    for event in events:
        if isinstance(event, StepMap):
            maps.setdefault((event.method, event.item), {})[event.step] = event.saliency.numpy()
        elif trajectory := getattr(event, "trajectory", None):
            if (true := _true(trajectory.image.numpy(), prompts[event.item], judge)) is not None:
                truth[event.item] = true
        else:
            for method in [name for name, item in maps if item == event.item]:
                made = maps.pop((method, event.item))
                if event.item in truth:
                    true = truth[event.item]
                    heat = [heatmap(made[step], true.shape) for step in range(len(timesteps))]
                    before = [None, *heat[:-1]]
                    rows = [measures(one, last, true) for one, last in zip(heat, before, strict=True)]
                    found.setdefault(method, []).append(rows)
    if not found:
        raise ValueError("there is no image whose shapes are known: recovery is measured in the embedded world")
    return Recovery(
        steps={method: {name: _at_each_step(items, name) for name in MEASURES} for method, items in found.items()},
        trend={method: {name: _trend(items, name) for name in MEASURES} for method, items in found.items()},
        timesteps=list(timesteps),
        num_images=len(truth),
        left_out=len(prompts) - len(truth),
    )


def _true(image: ndarray, prompt: str, judge: RightOnes) -> ndarray | None:
    """The pixels of the shapes, where image and caption tell them."""
    try:
        caption = Caption.parse(prompt)
        if not has_distinct_colours(caption) or not judge.agrees(image, caption):
            return None
    except ValueError:
        return None
    colours = [shape[0] for shape in (caption.subject, caption.object) if shape is not None]
    return np.any([area(image, colour) for colour in colours], axis=0)


def _at_each_step(items: Sequence[Sequence[Mapping[str, float]]], name: str) -> list[Interval]:
    return [interval([one[name] for one in at]) for at in zip(*items, strict=True)]


def _trend(items: Sequence[Sequence[Mapping[str, float]]], name: str) -> Interval:
    def correlation(rows: Sequence[Mapping[str, float]]) -> float:
        values = np.array([row[name] for row in rows])
        known = np.isfinite(values)
        if known.sum() < 3 or np.ptp(values[known]) == 0:
            return float("nan")
        return float(stats.spearmanr(np.flatnonzero(known), values[known]).statistic)

    return interval([correlation(rows) for rows in items])


def verdict(found: Recovery, method: str) -> str:
    """Whether the claim holds for a method: its map begins on the shapes and takes up more and more of the image."""
    trend, first = found.trend[method]["area"], found.steps[method]["auroc"][0]
    spreads = "grows" if trend.low > 0 else "shrinks" if trend.high < 0 else "neither grows nor shrinks"
    begins = "on the shapes" if first.low > 0.5 else "beside them" if first.high < 0.5 else "anywhere"
    if min(trend.count, first.count) < _FEWEST:
        return f"{method}: {min(trend.count, first.count)} images are too few to tell whether the claim holds"
    holds = trend.low > 0 and first.low > 0.5
    return f"{method}: the map begins {begins} and {spreads}; the claim {'holds' if holds else 'does not hold'}"


def recovery_table(found: Recovery) -> Iterator[str]:
    """First, middle and last step of every measure, and its trend, in Markdown."""
    at = sorted({0, len(found.timesteps) // 2, len(found.timesteps) - 1})
    heads = [f"step {step + 1}, t = {found.timesteps[step]}" for step in at]
    for method, by_measure in found.steps.items():
        yield f"| {method} | {' | '.join(heads)} | along the steps |"
        yield f"|---|{'---|' * (len(at) + 1)}"
        for name, values in by_measure.items():
            cells = [str(values[step]) for step in at]
            yield f"| {name} | {' | '.join(cells)} | {found.trend[method][name]} |"
        yield ""
        yield verdict(found, method)
        yield ""
    left_out = f", {found.left_out} left out" if found.left_out else ""
    told = "; ".join(f"{name}: {what}" for name, what in MEASURES.items())
    yield f"{found.num_images} images{left_out}. {told}."
