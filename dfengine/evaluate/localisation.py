"""Whether maps lie on what they should: every method's map of every step against the true areas of the concepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from dfengine.evaluate.concepts import RightOnes
from dfengine.evaluate.intervals import Interval, interval, rate
from dfengine.evaluate.truth import area, auroc, has_distinct_colours, overlap, pointed_at
from dfengine.explain import StepMap
from dfengine.result import heatmap
from dfengine.shapes.world import Caption, render, sample_scenes

#: The concepts whose areas are looked for.
TARGETS = ("subject", "object", "both")
#: What is measured of a map, and what it says.
MEASURES = {
    "auroc": "probability that a pixel of the area is hotter than one outside",
    "pointing": "whether the hottest pixel is in the area",
    "iou": "of the area and the hottest pixels, as many as it has",
}

#: The true area of each target in an image.
Areas = Mapping[str, Bool[ndarray, "H W"]]


@dataclass(frozen=True)
class Localisation:
    """Means over images of each measure of each method's maps; intervals are over images."""

    source: str
    steps: Mapping[str, Mapping[str, Mapping[str, Sequence[Interval]]]]
    """by method, target and measure, at each step"""
    overall: Mapping[str, Mapping[str, Mapping[str, Interval]]]
    """the same of each image's mean over its steps"""
    timesteps: Sequence[float]
    num_images: int
    left_out: int
    """images that are not what was asked for, or whose shapes are not told by their colours"""
    unranked: Mapping[str, int]
    """by method, maps that are the same everywhere or not finite: they have no measure"""


@dataclass(frozen=True)
class Scene:
    """A drawn image whose areas are known exactly."""

    prompt: str
    image: UInt8[ndarray, "H W 3"]
    areas: Areas


def scenes(count: int, seed: int = 0) -> list[Scene]:
    """Rendered scenes of the embedded world."""
    drawn = sample_scenes(count, torch.Generator().manual_seed(seed))
    images, coverage = render(drawn)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [
        Scene(str(caption), image, _areas(caption, list(masks)))
        for caption, image, masks in zip(drawn.captions, pixels, (coverage > 0.5).numpy(), strict=True)
    ]


class GeneratedAreas:
    """The true areas of generated images, by colour."""

    def __init__(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for a prompt of another world."""
        self._captions, self._right = [Caption.parse(prompt) for prompt in prompts], RightOnes()

    def __call__(self, item: int, image: UInt8[ndarray, "H W 3"]) -> Areas | None:
        """None for an image that is not what its caption says, or whose shapes are not told by their colours."""
        caption = self._captions[item]
        if not has_distinct_colours(caption) or not self._right.agrees(image, caption):
            return None
        shapes = [shape for shape in (caption.subject, caption.object) if shape is not None]
        masks = [area(image, colour) for colour, _ in shapes]
        return _areas(caption, masks) if all(mask.any() for mask in masks) else None


def _areas(caption: Caption, masks: Sequence[Bool[ndarray, "H W"]]) -> Areas:
    if caption.object is None:
        return {"subject": masks[0], "both": masks[0]}
    return {"subject": masks[0], "object": masks[1], "both": masks[0] | masks[1]}


def localisation(
    events: Iterable[Any],
    areas: Callable[[int, UInt8[ndarray, "H W 3"]], Areas | None],
    prompts: Sequence[str],
    timesteps: Sequence[float],
    words: Callable[[str], Sequence[str]],
    source: str,
) -> Localisation:
    """Measure the maps of an engine's stream, in which items are explained at equally many steps.

    `areas` tells an item's true ones, or None. Attention is measured by the map of the target's own noun, of which
    `words` says in which row of the word maps it is. Raises ValueError where no image is left.
    """
    true: dict[int, Areas | None] = {}
    found: dict[str, dict[int, dict[int, dict[str, dict[str, float]]]]] = {}
    unranked: dict[str, int] = {}
    for event in events:
        if (trajectory := getattr(event, "trajectory", None)) is not None:
            true[event.item] = areas(event.item, trajectory.image.numpy())
        elif isinstance(event, StepMap) and (known := true[event.item]) is not None:
            maps = _by_target(event, prompts[event.item], words)
            rows = {target: measures(maps[target].astype(np.float64), mask) for target, mask in known.items()}
            unranked[event.method] = unranked.get(event.method, 0) + any(not _ranks(maps[target]) for target in known)
            found.setdefault(event.method, {}).setdefault(event.item, {})[event.step] = rows
    kept = [item for item, known in true.items() if known is not None]
    if not kept:
        raise ValueError(
            f"of {len(true)} images none is left: they are not what was asked for, or of two equal colours"
        )
    num_steps = len(timesteps)

    def values(method: str, target: str, measure: str) -> Float[ndarray, "items steps"]:
        return np.array(
            [
                [by_step[step][target][measure] for step in range(num_steps)]
                for by_step in found[method].values()
                if target in by_step[0]
            ]
        ).reshape(-1, num_steps)

    def at_steps(method: str, target: str, measure: str) -> list[Interval]:
        summed = rate if measure == "pointing" else interval
        return [summed(column.tolist()) for column in values(method, target, measure).T]

    def over_steps(method: str, target: str, measure: str) -> Interval:
        each = values(method, target, measure)
        return interval([float(row[np.isfinite(row)].mean()) for row in each if np.isfinite(row).any()])

    def every(make: Callable[[str, str, str], Any]) -> dict[str, Any]:
        return {m: {t: {name: make(m, t, name) for name in MEASURES} for t in TARGETS} for m in found}

    return Localisation(
        source=source,
        steps=every(at_steps),
        overall=every(over_steps),
        timesteps=list(timesteps),
        num_images=len(kept),
        left_out=len(true) - len(kept),
        unranked={method: count for method, count in unranked.items() if count},
    )


def measures(saliency: Float[ndarray, "h w"], true: Bool[ndarray, "H W"]) -> dict[str, float]:
    """All of `MEASURES` of one map; NaN for a map that ranks no pixels, and for an area of nothing or everything."""
    if not _ranks(saliency) or true.all() or not true.any():
        return dict.fromkeys(MEASURES, float("nan"))
    heat = heatmap(saliency, true.shape)
    return {"auroc": auroc(heat, true), "pointing": float(pointed_at(heat, true)), "iou": overlap(heat, true)}


def _ranks(saliency: Float[ndarray, "h w"]) -> bool:
    """Whether a map puts any pixel before another."""
    return bool(np.isfinite(saliency).all() and np.ptp(saliency) > 0)


def _by_target(made: StepMap, prompt: str, words: Callable[[str], Sequence[str]]) -> dict[str, ndarray]:
    """The map that a target is looked for in."""
    saliency = made.saliency.numpy()
    maps = dict.fromkeys(TARGETS, saliency)
    if made.word_maps is None:
        return maps
    caption, told = Caption.parse(prompt), [word.casefold() for word in words(prompt)]
    rows = {"subject": told.index(caption.subject[1])}
    if caption.object is not None:
        rows["object"] = len(told) - 1 - told[::-1].index(caption.object[1])
    heat = made.word_maps.numpy()
    return maps | {target: heat[row] for target, row in rows.items()} | {"both": heat[list(rows.values())].mean(0)}


def best(found: Localisation, target: str, measure: str = "auroc") -> tuple[str, int]:
    """The method and step whose maps find a target best."""
    pairs = [(method, step) for method in found.steps for step in range(len(found.timesteps))]
    return max(pairs, key=lambda pair: np.nan_to_num(found.steps[pair[0]][target][measure][pair[1]].mean, nan=-1))


def localisation_table(found: Localisation) -> Iterator[str]:
    """A table a target: each measure over all steps, and the AUROC at the first, middle, last and best step."""
    at = sorted({0, len(found.timesteps) // 2, len(found.timesteps) - 1})
    for target in TARGETS:
        heads = [f"auroc, step {step + 1}, t = {found.timesteps[step]}" for step in at]
        yield f"| {target}, {found.source} | {' | '.join(MEASURES)} | {' | '.join(heads)} | best step |"
        yield f"|---|{'---|' * (len(MEASURES) + len(at) + 1)}"
        for method, by_target in found.steps.items():
            values, overall = by_target[target]["auroc"], found.overall[method][target]
            means = np.array([one.mean for one in values])
            top = int(np.nanargmax(means)) if np.isfinite(means).any() else None
            told = "–" if top is None else f"{top + 1}: {values[top]}"
            cells = [*(str(overall[name]) for name in MEASURES), *(str(values[step]) for step in at), told]
            yield f"| {method} | {' | '.join(cells)} |"
        yield ""
        method, step = best(found, target)
        score = found.steps[method][target]
        if score["auroc"][step].count:
            hit = f"AUROC {score['auroc'][step]}, hit by the hottest pixel {score['pointing'][step]}"
            yield f"{target}: found best by {method} at step {step + 1}, {hit}."
            yield ""
    told = "; ".join(f"{name}: {what}" for name, what in MEASURES.items())
    yield (
        f"{found.num_images} images ({found.left_out} left out), {len(found.timesteps)} steps; without a step: means "
        f"over all. {told}."
    )
    if found.unranked:
        counts = ", ".join(f"{count} of {method}" for method, count in found.unranked.items())
        yield f"Maps that rank no pixels have no measure: {counts}."
