"""The maps of several methods side by side, of results: over a few steps of one image, or over images (Figure 3)."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.figures.choosing import chosen_steps, computed, within
from dfengine.figures.games import comparison
from dfengine.figures.parts import Figure, quoted, shortened
from dfengine.result import Explanation


def compare_steps(
    result: Explanation, methods: Sequence[str], steps: Sequence[int] | None = None, count: int = 4
) -> Figure | None:
    """A row a step: the predicted x0 and each method's map over it; None where fewer than two methods have maps.

    Without `steps`, up to `count` spread evenly over those that most of the methods have finished.
    """
    finished = _finished([result], methods)
    if len(finished) < 2:
        return None
    shared, total = _shared(finished), len(result.timesteps)
    if steps is None:
        chosen = [shared[place] for place in chosen_steps(len(shared), count)]
    elif not (chosen := within(steps, total, {step for each in finished.values() for step in each})):
        return None
    images = [result.image if result.previews is None else np.asarray(result.previews[step]) for step in chosen]
    return comparison(
        images,
        {method: [_heat(result, method, step) for step in chosen] for method in finished},
        [_together(f"step {step + 1}", f"t = {result.timesteps[step]}") for step in chosen],
        f"{quoted(result.prompt)}, {shortened(result.model)}, seed {result.seed}: a step a row",
        "image" if result.previews is None else "predicted x0",
    )


def compare_images(
    results: Sequence[Explanation], methods: Sequence[str], steps: Sequence[int] | None = None
) -> dict[int, Figure]:
    """By step, a row an image with each method's map over it; nothing where fewer than two methods have maps.

    Images are of one size and model, with equally many steps. Without `steps`, of those that most maps have finished
    the nearest to three quarters of the process, which the tables of games are of.
    """
    finished = _finished(results, methods)
    if len(finished) < 2:
        return {}
    total, model = len(results[0].timesteps), shortened(results[0].model)
    if steps is None:
        usual = max(0, int(0.75 * total) - 1)
        chosen = [min(_shared(finished), key=lambda step: abs(step - usual))]
    else:
        chosen = within(steps, total, {step for each in finished.values() for step in each})
    return {
        step: comparison(
            [result.image for result in results],
            {method: [_heat(result, method, step) for result in results] for method in finished},
            [f"{_shown(one)}, {_together(f'seed {one.seed}', f't = {one.timesteps[step]}')}" for one in results],
            f"{model}, step {step + 1} of {total}: an image a row",
        )
        for step in chosen
    }


def _shown(result: Explanation) -> str:
    """A prompt that may stand beside a picture."""
    return textwrap.shorten(result.prompt, 120, placeholder=" …") or "a given image"


def _together(*parts: str) -> str:
    """Parts of a label, none of which goes over two lines."""
    return ", ".join(part.replace(" ", "\u00a0") for part in parts)


def _finished(results: Sequence[Explanation], methods: Sequence[str]) -> dict[str, list[int]]:
    """The finished steps of every image's map, by method, of those that have any."""
    found = {
        method: [step for one in results if method in one.maps for step in computed(one.saliency(method))]
        for method in methods
    }
    return {method: steps for method, steps in found.items() if steps}


def _shared(finished: dict[str, list[int]]) -> list[int]:
    """The steps that most of the maps have finished."""
    counts = Counter(step for steps in finished.values() for step in steps)
    return sorted(step for step in counts if counts[step] == max(counts.values()))


def _heat(result: Explanation, method: str, step: int) -> Float[ndarray, "H W"]:
    """The heat map, NaN where it is not computed."""
    if method in result.maps and not np.isnan(np.asarray(result.saliency(method)[step])).all():
        return result.heatmap(method, step)
    return np.full(result.image.shape[:2], np.nan, dtype=np.float32)
