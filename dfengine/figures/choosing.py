"""What a figure shows where nothing is named: the steps, concepts and layers that tell most."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.result import COMBINED, Explanation, normalised
from dfengine.tokens import content_words, word_spans


def chosen_steps(num_steps: int, count: int = 6) -> list[int]:
    """Up to `count` steps, spread evenly from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, num_steps - 1, min(count, num_steps))})


def computed(maps: Any) -> list[int]:
    """The steps of maps [steps, h, w] that are not NaN throughout."""
    return np.flatnonzero(~np.isnan(np.asarray(maps)).all(axis=(1, 2))).tolist()


def finished_steps(result: Explanation, method: str) -> list[int]:
    """The steps of which all is computed that a method's form shows; none where there is no such map."""
    if method not in result.maps:
        return []
    match result.explainer_name(method):
        case "Cam":
            maps = result.maps[method]
            return _common(computed(maps[name]) for name in (COMBINED, *main_layers(maps)))
        case "Relevance" if result.tokens is not None:
            lines = [*lines_of(result).values()]
            finite = np.flatnonzero(np.isfinite(lines).all(0)).tolist() if lines else []
            return _common([computed(result.saliency(beneath(result))), finite])
        case "Attention":
            return _common(computed(maps) for maps in np.asarray(result.word_maps)) if result.words else []
    return computed(result.saliency(method))


def within(steps: Iterable[int], total: int, finished: Container[int]) -> list[int]:
    """Those of the steps that are finished, counted from the start of so many."""
    return [step % total for step in steps if -total <= step < total and step % total in finished]


def _common(steps: Iterable[Sequence[int]]) -> list[int]:
    return sorted(set[int].intersection(*map(set, steps)))


def lines_of(result: Explanation) -> dict[str, Float[ndarray, " steps"]]:
    """`concept_lines`, nothing where there are none: no relevance, no words that the model reads, or no step yet."""
    if result.tokens is None:
        return {}
    np.asarray(result.relevance)  # what cannot be read is an error all the same
    try:
        return concept_lines(result)
    except ValueError:
        return {}


def beneath(result: Explanation) -> str:
    """The method whose map stands below the lines of relevance: of those with a finished step DF-CAM if it is there,
    else DF-RISE, else relevance itself."""
    preferred = {"Cam": 0, "Rise": 1, "Relevance": 2}
    return min(
        result.maps,
        key=lambda name: (not computed(result.saliency(name)), preferred.get(result.explainer_name(name), 3)),
    )


def concept_lines(result: Explanation, concepts: Sequence[str] | None = None) -> dict[str, Float[ndarray, " steps"]]:
    """Each concept's relevance at each step, in [0, 1]: min–max over the prompt's own tokens as in Table 3, then the
    mean over the concept's; NaN where it is not computed. Without `concepts`, the prompt's words but for stop words.

    Raises ValueError where there is no relevance, or no such concept.
    """
    if result.tokens is None:
        raise ValueError("there is no relevance: explain with Relevance()")
    prompt = result.prompt
    wanted = content_words(prompt[slice(*span)] for span in word_spans(prompt)) if concepts is None else concepts
    wanted = [wanted] if isinstance(wanted, str) else wanted
    places = {concept: result.tokens.find(concept) for concept in wanted}
    # A text encoder reads so many tokens, and none of what stands behind them.
    unread = [concept for concept in places if not places[concept]]
    if unread and (concepts is not None or len(unread) == len(places)):
        raise ValueError(f"{unread[0]!r} is not among the tokens that the model reads of its prompt: leave it out")
    if not places:
        raise ValueError(f"the prompt {prompt!r} has no words: there is no relevance to draw")
    shares = normalised(np.asarray(result.relevance, dtype=np.float64), result.tokens)
    if np.isnan(shares).all():
        raise ValueError("no step's relevance is computed yet")
    return {concept: shares[places[concept]].mean(0) for concept in places if concept not in unread}


def telling_steps(lines: Mapping[str, Float[ndarray, " steps"]], count: int = 4) -> list[int]:
    """Where the two highest lines of all are highest, and where they cross first and last; then, up to `count`, what is
    farthest from those."""
    finished = np.flatnonzero(np.isfinite([*lines.values()]).all(0)).tolist()
    top = list(leading(lines, 2).values())
    ahead = top[0] > top[-1]
    crossed = [step for before, step in pairwise(finished) if ahead[step] != ahead[before]]
    chosen = list(dict.fromkeys([*(int(np.nanargmax(line)) for line in top), *crossed[:1], *crossed[-1:]]))
    while len(chosen) < min(count, len(finished)):
        chosen.append(max(finished, key=lambda step: min(abs(step - other) for other in chosen)))
    return sorted(chosen[:count])


def leading(values: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Those `count` with the largest means, in the order given."""
    kept = sorted(values, key=lambda name: -np.nanmean(values[name]))[:count]
    return {name: values[name] for name in values if name in kept}


def main_layers(maps: Mapping[str, Any], count: int = 5) -> list[str]:
    """Up to `count` layers: the last of each block, of neighbours with one resolution the middle one, spread evenly."""
    names = [name for name in maps if name != COMBINED]
    if len(names) <= count:
        return names
    parts = [name for name in names if "samplers." not in name] or names
    last = {name.rsplit(".", 2)[0]: name for name in parts}
    runs = [list(run) for _, run in groupby(last.values(), key=lambda name: maps[name].shape[1:])]
    return [runs[place][len(runs[place]) // 2] for place in chosen_steps(len(runs), count)]
