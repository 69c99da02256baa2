"""The steps, concepts and layers that a figure shows when none are named."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.result import COMBINED, Explanation, finite_steps, normalised
from dfengine.tokens import content_words, word_spans


def evenly_spaced(length: int, count: int = 6) -> list[int]:
    """Up to `count` indices below `length`, evenly spaced from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(count, length))})


def computed(maps: Any) -> list[int]:
    """The steps at which maps [steps, h, w] have a value that is not NaN."""
    return np.flatnonzero(~np.isnan(np.asarray(maps)).all(axis=(1, 2))).tolist()


def common(*steps: Iterable[int]) -> list[int]:
    """The steps that are in all of the lists, in rising order."""
    return sorted(set[int].intersection(*map(set, steps)))


def within(steps: Iterable[int], total: int, finished: Container[int]) -> list[int]:
    """Those of the steps, negative ones counted from the end of `total`, that are finished."""
    return [step % total for step in steps if -total <= step < total and step % total in finished]


def resolve_steps(
    result: Explanation, steps: Sequence[int] | None, finished: Sequence[int] = (), count: int = 6
) -> list[int]:
    """Steps as indices from 0; if None, up to `count` evenly spaced over the finished ones (or over all).

    Raises ValueError for no step, or one out of range.
    """
    total = len(result.timesteps)
    if steps is None:
        candidates = finished or range(total)
        return [candidates[index] for index in evenly_spaced(len(candidates), count)]
    if not len(steps):
        raise ValueError("got no steps: name at least one, or pass None to choose them automatically")
    for step in steps:
        if not -total <= step < total:
            raise ValueError(f"step {step} is outside [0, {total - 1}]: steps are indices into `timesteps`")
    return [step % total for step in steps]


def concept_lines(result: Explanation, concepts: Sequence[str] | None = None) -> dict[str, Float[ndarray, " steps"]]:
    """Each concept's relevance at each step, in [0, 1]: min–max over the prompt's tokens as in Table 3, then the mean
    over the concept's tokens; NaN where it is not computed. By default, the prompt's words without stop words.

    Raises ValueError if the result has no relevance, or not of such a concept.
    """
    rows = _rows(result, concepts)
    shares = normalised(np.asarray(result.relevance, dtype=np.float64), result.tokens)
    return {name: shares[rows[name]].mean(0) for name in rows}


def relative_lines(result: Explanation, concepts: Sequence[str] | None = None) -> dict[str, Float[ndarray, " steps"]]:
    """Each concept's relevance as a share of the highest at the same step, of these concepts and of the prompt's words
    without stop words, so that a line reaches 1 at every step. Concepts, NaN and errors as in `concept_lines`.
    """
    rows = _rows(result, concepts)
    relevance = finite_steps(np.asarray(result.relevance, dtype=np.float64), result.tokens)
    lines = {name: relevance[rows[name]].mean(0) for name in rows}
    highest = np.max([*lines.values(), *(relevance[one].mean(0) for one in _rows(result, None).values())], axis=0)
    return {name: line / np.where(highest > 0, highest, 1) for name, line in lines.items()}


def _rows(result: Explanation, concepts: Sequence[str] | None) -> dict[str, list[int]]:
    """The tokens of each concept, by default of the prompt's words without stop words. Raises as `concept_lines`."""
    if result.tokens is None:
        raise ValueError("the result has no relevance: explain with Relevance()")
    prompt = result.prompt
    if concepts is None:
        names = content_words(prompt[slice(*span)] for span in word_spans(prompt))
    else:
        names = [concepts] if isinstance(concepts, str) else list(concepts)
    rows = {name: result.tokens.find(name) for name in names}
    # A text encoder truncates long prompts: words beyond its limit have no tokens.
    truncated = [name for name in rows if not rows[name]]
    if truncated and (concepts is not None or len(truncated) == len(rows)):
        raise ValueError(f"{truncated[0]!r} is beyond the tokens that the model reads of its prompt: leave it out")
    if not rows:
        raise ValueError(f"the prompt {prompt!r} has no words: there is no relevance to draw")
    if np.isnan(finite_steps(np.asarray(result.relevance), result.tokens)).all():
        raise ValueError("no step's relevance is computed yet")
    return {name: places for name, places in rows.items() if places}


def available_lines(result: Explanation) -> dict[str, Float[ndarray, " steps"]]:
    """`concept_lines`, or an empty dictionary where it raises because there is nothing to draw."""
    if result.tokens is None:
        return {}
    np.asarray(result.relevance)  # an unreadable file still raises
    try:
        return concept_lines(result)
    except ValueError:
        return {}


def relevance_method(result: Explanation) -> str:
    """The method whose maps show where relevance lies. Raises ValueError if the result has none."""
    method = next((name for name in result.maps if result.form(name) == "tokens"), None)
    if method is None:
        raise ValueError("the result has no maps of relevance: explain with Relevance()")
    return method


def informative_steps(lines: Mapping[str, Float[ndarray, " steps"]], count: int = 4) -> list[int]:
    """Up to `count` steps: the peaks of the two highest lines and their first and last crossing, then those farthest
    from the steps chosen so far."""
    finished = np.flatnonzero(np.isfinite([*lines.values()]).all(0)).tolist()
    top = list(top_by_mean(lines, 2).values())
    is_ahead = top[0] > top[-1]
    crossings = [step for previous, step in pairwise(finished) if is_ahead[step] != is_ahead[previous]]
    peaks = [int(np.nanargmax(line)) for line in top]
    steps = list(dict.fromkeys([*peaks, *crossings[:1], *crossings[-1:]]))
    while len(steps) < min(count, len(finished)):
        steps.append(max(finished, key=lambda step: min(abs(step - other) for other in steps)))
    return sorted(steps[:count])


def top_by_mean(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The `count` entries with the largest means, in their original order."""
    kept = sorted(values, key=lambda name: -np.nanmean(values[name]))[:count]
    return {name: values[name] for name in values if name in kept}


def main_layers(maps: Mapping[str, Any], count: int = 5) -> list[str]:
    """Up to `count` representative layers, evenly spaced.

    Of each block the last layer; of consecutive blocks with the same resolution the middle one.
    """
    names = [name for name in maps if name != COMBINED]
    if len(names) <= count:
        return names
    candidates = [name for name in names if "samplers." not in name] or names
    last = {name.rsplit(".", 2)[0]: name for name in candidates}
    stages = [list(run) for _, run in groupby(last.values(), key=lambda name: maps[name].shape[1:])]
    return [stages[index][len(stages[index]) // 2] for index in evenly_spaced(len(stages), count)]
