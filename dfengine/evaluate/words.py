"""Do maps find what a word changes? On any model that takes prompts, with counterfactual maps as the standard."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy import stats

from dfengine.evaluate.intervals import CORRELATIONS, SHARES, Interval, mean_interval
from dfengine.evaluate.truth import auroc
from dfengine.explain import Counterfactual, Explainer, StepMap, option
from dfengine.tokens import find_occurrences, folded, word_spans

#: The scores of a word's map, and what each is.
SCORES = {
    "auroc": "probability that a pixel of the word's area is hotter than one outside",
    "correlation": "rank correlation with how much the word changes",
    "leakage": "auroc of the subject's map against the object's area",
}
#: The name of the counterfactual maps that the others are compared with.
STANDARD = "standard"


@dataclass(frozen=True)
class ConceptCounterfactual(Counterfactual):
    """Counterfactual maps of each prompt's own concepts."""

    by_prompt: Mapping[str, Sequence[str]] | None = option(None, "the words and phrases of each prompt to map")

    def concepts(self, prompt: str) -> Sequence[str] | None:
        """Those of the prompt; the words of all prompts where it has none of its own."""
        return (self.by_prompt or {}).get(prompt, self.words)


def with_phrases(explainers: Iterable[Explainer], phrases: Mapping[str, Sequence[str]]) -> list[Explainer]:
    """The explainers, where those by counterfactuals of every word map each prompt's phrases instead."""

    def adapted(explainer: Explainer) -> Explainer:
        if type(explainer) is not Counterfactual or explainer.words is not None:
            return explainer
        settings = {one.name: getattr(explainer, one.name) for one in dataclasses.fields(explainer)}
        return ConceptCounterfactual(**settings, by_prompt=phrases)

    return list(map(adapted, explainers))


@dataclass(frozen=True)
class WordAgreement:
    """Means over prompts of each score of each method's maps; a prompt's is the mean over its concepts."""

    steps: Mapping[str, Mapping[str, Sequence[Interval]]]
    """by method and score, at each step"""
    overall: Mapping[str, Mapping[str, Interval]]
    """by method and score, of each prompt's mean over its steps"""
    timesteps: Sequence[float]
    num_prompts: int
    unranked: Mapping[str, int]
    """by method, maps that are constant or not finite, which have no score"""

    def table(self) -> str:
        """A row a method in Markdown: scores over all steps, and the AUROC at some steps."""
        return "\n".join(_table(self))


def measure_words(
    events: Iterable[Any],
    concepts: Sequence[Mapping[str, str]],
    prompts: Sequence[str],
    timesteps: Sequence[float],
    words_of: Callable[[str, int], Sequence[str]],
) -> WordAgreement:
    """Score the maps of an engine's stream of events by `STANDARD`'s, whose maps of an item come first.

    `concepts` has each item's words and phrases by their roles, of which "subject" and "object" are those that leakage
    is measured between. `words_of` lists the words that a method has maps of, for an item; a method without any is
    scored by the one map that it has. Items have equally many steps.
    """
    standards: dict[tuple[int, int], dict[str, ndarray]] = {}
    scores: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    unranked: dict[str, int] = {}
    for event in events:
        if not isinstance(event, StepMap):
            continue
        prompt, by_role = prompts[event.item], concepts[event.item]
        words = words_of(event.method, event.item)
        maps = {role: _map_of(event, words, prompt, concept) for role, concept in by_role.items()}
        place = event.item, event.step
        if event.method == STANDARD:
            standards[place] = {role: values for role, values in maps.items() if values is not None}
        unranked[event.method] = unranked.get(event.method, 0) + any(not _ranks(one) for one in maps.values())
        by_step = scores.setdefault(event.method, {}).setdefault(event.item, {})
        by_step[event.step] = _agreement(maps, standards[place])

    def values(method: str, score: str) -> Float[ndarray, "items steps"]:
        rows = scores[method].values()
        return np.array([[by_step[step][score] for step in range(len(timesteps))] for by_step in rows])

    def interval(score: str, one: Sequence[float]) -> Interval:
        return mean_interval(one, CORRELATIONS if score == "correlation" else SHARES)

    def over_steps(method: str, score: str) -> Interval:
        return interval(score, [_mean(row) for row in values(method, score)])

    def at_each_step(method: str, score: str) -> list[Interval]:
        return [interval(score, column) for column in values(method, score).T.tolist()]

    return WordAgreement(
        steps={method: {score: at_each_step(method, score) for score in SCORES} for method in scores},
        overall={method: {score: over_steps(method, score) for score in SCORES} for method in scores},
        timesteps=list(timesteps),
        num_prompts=len(prompts),
        unranked={method: count for method, count in unranked.items() if count},
    )


def otsu_area(change: Float[ndarray, "h w"]) -> Bool[ndarray, "h w"]:
    """The pixels that a word changes: those above the threshold with the largest variance between both sides (Otsu).

    Empty for a constant map. Of a fixed share it would depend how large a word's area may be.
    """
    ordered = np.sort(change, axis=None).astype(np.float64)
    counts = np.arange(1, len(ordered))
    below, total = ordered.cumsum()[:-1], ordered.sum()
    means = below / counts, (total - below) / counts[::-1]
    variance = counts * counts[::-1] * (means[1] - means[0]) ** 2
    return change > ordered[variance.argmax()]


def _map_of(step_map: StepMap, words: Sequence[str], prompt: str, concept: str) -> Float[ndarray, "h w"] | None:
    """The map in which a concept is looked for: its own, the mean of its words', or the one map that a method has.

    None where a method maps other words only.
    """
    if step_map.word_maps is None:
        return step_map.saliency.numpy()
    rows = [row for row, word in enumerate(words) if folded(word) == folded(concept)]
    spans = word_spans(prompt)
    if not rows and list(words) == [prompt[start:stop] for start, stop in spans]:
        places = find_occurrences(prompt, concept)
        rows = [row for row, (a, b) in enumerate(spans) if any(start <= a and b <= stop for start, stop in places)]
    return step_map.word_maps[rows].mean(0).numpy() if rows else None


def _ranks(saliency: ndarray | None) -> bool:
    return saliency is not None and bool(np.isfinite(saliency).all() and np.ptp(saliency) > 0)


def _agreement(maps: Mapping[str, ndarray | None], standard: Mapping[str, ndarray]) -> dict[str, float]:
    """All of `SCORES`, means over the concepts; NaN where no map can be ranked."""
    ranked = {role: one for role, one in maps.items() if one is not None and _ranks(one) and _ranks(standard.get(role))}
    areas = {role: otsu_area(standard[role]) for role in ranked}
    leakage = float("nan")
    if {"subject", "object"} <= areas.keys():
        leakage = auroc(ranked["subject"], areas["object"])
    correlations = [stats.spearmanr(one.ravel(), standard[role].ravel()).statistic for role, one in ranked.items()]
    return {
        "auroc": _mean([auroc(one, areas[role]) for role, one in ranked.items()]),
        "correlation": _mean(correlations),
        "leakage": leakage,
    }


def _mean(values: Sequence[float] | ndarray) -> float:
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    return float(finite.mean()) if len(finite) else float("nan")


def _table(summary: WordAgreement) -> Iterator[str]:
    shown = sorted({0, len(summary.timesteps) // 2, len(summary.timesteps) - 1})
    heads = [f"auroc, step {step}, t = {summary.timesteps[step]}" for step in shown]
    yield f"| what a word changes, {summary.num_prompts} prompts | {' | '.join(SCORES)} | {' | '.join(heads)} |"
    yield f"|---|{'---|' * (len(SCORES) + len(shown))}"
    for method, overall in summary.overall.items():
        cells = [*map(str, overall.values()), *(str(summary.steps[method]["auroc"][step]) for step in shown)]
        yield f"| {method} | {' | '.join(cells)} |"
    yield ""
    meanings = "; ".join(f"{score}: {meaning}" for score, meaning in SCORES.items())
    yield (
        f"{len(summary.timesteps)} steps; columns without a step are means over all. {meanings}. {STANDARD}: the "
        "counterfactual maps themselves; a word's area is where they are above Otsu's threshold."
    )
    if summary.unranked:
        counts = ", ".join(f"{count} of {method}" for method, count in summary.unranked.items())
        yield f"Steps with maps that are constant or not finite, which have no score: {counts}."
