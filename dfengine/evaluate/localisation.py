"""Do maps lie on the concepts? Every method's map of every step against the concepts' true areas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from dfengine.checks import whole_number
from dfengine.evaluate.intervals import SHARES, Interval, mean_interval, proportion_interval
from dfengine.evaluate.truth import Areas, auroc, pointing_hit, to_areas, top_k_iou
from dfengine.explain import StepMap
from dfengine.result import heatmap
from dfengine.shapes.world import Caption, render, sample_scenes

#: The concepts whose areas are looked for.
TARGETS = ("subject", "object", "both")
#: The scores of a map, and what each is.
SCORES = {
    "auroc": "probability that a pixel of the area is hotter than one outside",
    "pointing": "whether the hottest pixel is in the area",
    "iou": "of the area and the hottest pixels, as many as it has",
}


@dataclass(frozen=True)
class Localisation:
    """Means over images of each score of each method's maps; intervals are over images."""

    source: str
    steps: Mapping[str, Mapping[str, Mapping[str, Sequence[Interval]]]]
    """by method, target and score, at each step"""
    overall: Mapping[str, Mapping[str, Mapping[str, Interval]]]
    """by method, target and score, of each image's mean over its steps"""
    timesteps: Sequence[float]
    num_images: int
    num_excluded: int
    """images that do not match their caption, or whose shapes are not distinguished by their colours"""
    unranked: Mapping[str, int]
    """by method, maps that are constant or not finite, which have no score"""

    def best(self, target: str, score: str = "auroc") -> tuple[str, int]:
        """The method and step whose maps locate a target best."""
        pairs = [(method, step) for method in self.steps for step in range(len(self.timesteps))]
        return max(pairs, key=lambda pair: np.nan_to_num(self.steps[pair[0]][target][score][pair[1]].mean, nan=-1))

    def table(self) -> str:
        """A Markdown table for each target: scores over all steps, and the AUROC at some steps and the best."""
        return "\n".join(_table(self))


@dataclass(frozen=True)
class Scene:
    """A rendered image whose areas are known exactly."""

    prompt: str
    image: UInt8[ndarray, "H W 3"]
    areas: Areas


def scenes(count: int, seed: int = 0) -> list[Scene]:
    """Rendered scenes of the embedded world with their exact areas."""
    count, seed = whole_number("count", count, 1, 10**6), whole_number("seed", seed, 0, 2**63 - 1)
    sampled = sample_scenes(count, torch.Generator().manual_seed(seed))
    images, coverage = render(sampled)
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    masks = (coverage > 0.5).numpy()
    return [
        Scene(str(caption), image, to_areas(list(both[: 1 if caption.object is None else 2])))
        for caption, image, both in zip(sampled.captions, pixels, masks, strict=True)
    ]


def measure_localisation(
    events: Iterable[Any],
    areas_of: Callable[[int, UInt8[ndarray, "H W 3"]], Areas | None],
    prompts: Sequence[str],
    timesteps: Sequence[float],
    words_of: Callable[[str, int], Sequence[str]],
    source: str,
) -> Localisation:
    """Score the maps of an engine's stream of events; items have equally many steps.

    `areas_of` returns the true areas of an item and its image, or None to exclude it. Methods with maps of words are
    scored by that of the target's phrase ("red circle"), or of its noun alone; `words_of` lists the words that a method
    has maps of, for an item.
    Raises ValueError if every image is excluded.
    """
    areas: dict[int, Areas | None] = {}
    scores: dict[str, dict[int, dict[int, dict[str, dict[str, float]]]]] = {}
    unranked: dict[str, int] = {}
    for event in events:
        if (trajectory := getattr(event, "trajectory", None)) is not None:
            areas[event.item] = areas_of(event.item, trajectory.image.numpy())
        elif isinstance(event, StepMap) and (true := areas[event.item]) is not None:
            maps = _maps_by_target(event, Caption.parse(prompts[event.item]), words_of)
            by_target = {target: localisation_scores(maps[target].astype(np.float64), true[target]) for target in true}
            unranked[event.method] = unranked.get(event.method, 0) + any(not _ranks(maps[target]) for target in true)
            scores.setdefault(event.method, {}).setdefault(event.item, {})[event.step] = by_target
    num_images = sum(true is not None for true in areas.values())
    if not num_images:
        raise ValueError(
            f"all {len(areas)} images are excluded: they do not match their caption, or its colours do not distinguish "
            "the shapes"
        )

    def values(method: str, target: str, score: str) -> Float[ndarray, "items steps"]:
        items = [by_step for by_step in scores[method].values() if target in by_step[0]]
        rows = [[by_step[step][target][score] for step in range(len(timesteps))] for by_step in items]
        return np.array(rows).reshape(-1, len(timesteps))

    def at_each_step(method: str, target: str, score: str) -> list[Interval]:
        columns = values(method, target, score).T.tolist()
        return [proportion_interval(one) if score == "pointing" else mean_interval(one, SHARES) for one in columns]

    def over_steps(method: str, target: str, score: str) -> Interval:
        rows = values(method, target, score)
        means = [float(row[np.isfinite(row)].mean()) for row in rows if np.isfinite(row).any()]
        return mean_interval(means, SHARES)

    def tabulate(cell: Callable[[str, str, str], Any]) -> dict[str, Any]:
        return {m: {t: {score: cell(m, t, score) for score in SCORES} for t in TARGETS} for m in scores}

    return Localisation(
        source=source,
        steps=tabulate(at_each_step),
        overall=tabulate(over_steps),
        timesteps=list(timesteps),
        num_images=num_images,
        num_excluded=len(areas) - num_images,
        unranked={method: count for method, count in unranked.items() if count},
    )


def localisation_scores(saliency: Float[ndarray, "h w"], area: Bool[ndarray, "H W"]) -> dict[str, float]:
    """All of `SCORES` of one map.

    NaN if the map is constant or not finite, or the area is empty or covers the image.
    """
    if not _ranks(saliency) or area.all() or not area.any():
        return dict.fromkeys(SCORES, float("nan"))
    heat = heatmap(saliency, area.shape)
    return {"auroc": auroc(heat, area), "pointing": float(pointing_hit(heat, area)), "iou": top_k_iou(heat, area)}


def _ranks(saliency: Float[ndarray, "h w"]) -> bool:
    return bool(np.isfinite(saliency).all() and np.ptp(saliency) > 0)


def _maps_by_target(
    step_map: StepMap, caption: Caption, words_of: Callable[[str, int], Sequence[str]]
) -> dict[str, Float[ndarray, "h w"]]:
    """The map in which each target is looked for."""
    saliency = step_map.saliency.numpy()
    maps = dict.fromkeys(TARGETS, saliency)
    if step_map.word_maps is None:
        return maps
    words = [word.casefold() for word in words_of(step_map.method, step_map.item)]
    phrases = caption.concepts
    rows = {"subject": words.index(phrases["subject"] if phrases["subject"] in words else caption.subject[1])}
    if caption.object is not None:
        own = phrases["object"] if phrases["object"] in words else caption.object[1]
        rows["object"] = len(words) - 1 - words[::-1].index(own)
    word_maps = step_map.word_maps.numpy()
    by_noun = {target: word_maps[row] for target, row in rows.items()}
    return maps | by_noun | {"both": word_maps[list(rows.values())].mean(0)}


def _table(summary: Localisation) -> Iterator[str]:
    shown = sorted({0, len(summary.timesteps) // 2, len(summary.timesteps) - 1})
    for target in TARGETS:
        heads = [f"auroc, step {step}, t = {summary.timesteps[step]}" for step in shown]
        yield f"| {target}, {summary.source} | {' | '.join(SCORES)} | {' | '.join(heads)} | best step |"
        yield f"|---|{'---|' * (len(SCORES) + len(shown) + 1)}"
        for method, by_target in summary.steps.items():
            values, overall = by_target[target]["auroc"], summary.overall[method][target]
            means = np.array([one.mean for one in values])
            top = int(np.nanargmax(means)) if np.isfinite(means).any() else None
            best = "–" if top is None else f"{top}: {values[top]}"
            cells = [*(str(overall[score]) for score in SCORES), *(str(values[step]) for step in shown), best]
            yield f"| {method} | {' | '.join(cells)} |"
        yield ""
        method, step = summary.best(target)
        by_score = summary.steps[method][target]
        if by_score["auroc"][step].count:
            scores = f"AUROC {by_score['auroc'][step]}, pointing game {by_score['pointing'][step]}"
            yield f"{target}: located best by {method} at step {step} (t = {summary.timesteps[step]}), {scores}."
            yield ""
    meanings = "; ".join(f"{score}: {meaning}" for score, meaning in SCORES.items())
    yield (
        f"{summary.num_images} images ({summary.num_excluded} excluded), {len(summary.timesteps)} steps; columns "
        f"without a step are means over all. {meanings}."
    )
    if summary.unranked:
        counts = ", ".join(f"{count} of {method}" for method, count in summary.unranked.items())
        yield f"Maps that are constant or not finite have no score: {counts}."
