"""Maps of several methods side by side: at a few steps of one image, or at one step of several images (Figure 3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.figures import lettering
from dfengine.figures.games import comparison
from dfengine.figures.panels import Figure, picture_at, quote, short_model_name, step_label, unique_labels
from dfengine.figures.selection import computed, evenly_spaced, within
from dfengine.result import Explanation


def compare_steps(
    result: Explanation, methods: Sequence[str], steps: Sequence[int] | None = None, count: int = 4
) -> Figure | None:
    """A row per step: the predicted x0 and each method's map over it; None if fewer than two methods have maps.

    By default up to `count` steps, evenly spaced over those that most of the methods have finished.
    """
    finished = _finished([result], methods)
    if len(finished) < 2:
        return None
    if steps is None:
        shared = _most_shared(finished)
        steps = [shared[index] for index in evenly_spaced(len(shared), count)]
    else:
        steps = within(steps, len(result.timesteps), set().union(*finished.values()))
        if not steps:
            return None
    return comparison(
        [picture_at(result, step) for step in steps],
        {label: [_heat(result, method, step) for step in steps] for method, label in _labels([result], finished)},
        [_unbroken(step_label(step, result.timesteps)) for step in steps],
        f"{quote(result.prompt)}, {short_model_name(result.model)}, seed {result.seed}: one row per step",
        "image" if result.previews is None else "predicted x0",
        {label: result.hot(method) for method, label in _labels([result], finished)},
    )


def compare_images(
    results: Sequence[Explanation], methods: Sequence[str], steps: Sequence[int] | None = None
) -> dict[int, Figure]:
    """By step, a figure with a row per image and each method's map over it; empty if fewer than two methods have maps.

    The images share size, model and number of steps. By default one step: of those that most maps have finished the
    nearest to three quarters of the process, the step that the tables of games use.
    """
    finished = _finished(results, methods)
    if len(finished) < 2:
        return {}
    total, model = len(results[0].timesteps), short_model_name(results[0].model)
    if steps is None:
        preferred = max(0, int(0.75 * total) - 1)
        steps = [min(_most_shared(finished), key=lambda step: abs(step - preferred))]
    else:
        steps = within(steps, total, set().union(*finished.values()))
    hots = {label: _common_hot(results, method) for method, label in _labels(results, finished)}
    return {
        step: comparison(
            [result.image for result in results],
            {label: [_heat(one, method, step) for one in results] for method, label in _labels(results, finished)},
            [_image_label(one, step) for one in results],
            f"{model}, step {step}: one row per image",
            hots=hots,
        )
        for step in steps
    }


def _labels(results: Sequence[Explanation], methods: Iterable[str]) -> Iterable[tuple[str, str]]:
    """Pairs of a method and its label in the first result that has it."""
    first = {method: next(one for one in results if method in one.maps) for method in methods}
    return unique_labels({method: first[method].label(method) for method in methods}).items()


def _common_hot(results: Sequence[Explanation], method: str) -> str:
    """What is hot in a method's maps; empty if the images were explained with settings that differ in that."""
    hots = {one.hot(method) for one in results if method in one.maps}
    return hots.pop() if len(hots) == 1 else ""


def _image_label(result: Explanation, step: int) -> str:
    prompt = lettering.shorten(result.prompt, 120) or "a given image"
    return f"{prompt}, {_unbroken(f'seed {result.seed}, t = {result.timesteps[step]:g}')}"


def _unbroken(label: str) -> str:
    """A label that breaks into lines only after commas."""
    return re.sub(r"(?<!,) ", "\u00a0", label)


def _finished(results: Sequence[Explanation], methods: Sequence[str]) -> dict[str, list[int]]:
    """The finished steps of all images' maps by method, for methods that have any."""
    steps = {
        method: [step for one in results if method in one.maps for step in computed(one.saliency(method))]
        for method in methods
    }
    return {method: steps[method] for method in methods if steps[method]}


def _most_shared(finished: Mapping[str, Sequence[int]]) -> list[int]:
    """The steps that most of the maps have finished."""
    counts = Counter(step for steps in finished.values() for step in steps)
    return sorted(step for step in counts if counts[step] == max(counts.values()))


def _heat(result: Explanation, method: str, step: int) -> Float[ndarray, "H W"]:
    """The heat map, NaN where it is not computed."""
    if method in result.maps and not np.isnan(np.asarray(result.saliency(method)[step])).all():
        return result.heatmap(method, step)
    return np.full(result.image.shape[:2], np.nan, dtype=np.float32)
