"""Images of one prompt under several schedules: what of many results stands side by side (Figures 6, 10 and 11)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.diffusion.path import schedule_name
from dfengine.figures.choosing import leading, lines_of
from dfengine.figures.concepts import concepts, width
from dfengine.figures.parts import FONT_SIZE, Figure, heading, shortened
from dfengine.figures.samples import samples
from dfengine.result import Explanation

#: Seeds whose images are shown, and concepts whose lines are.
_SEEDS, _CONCEPTS = 8, 8


@dataclass(frozen=True)
class Group:
    """Images of one model and prompt: by seed, one for each schedule."""

    prompt: str
    about: str
    """the model, and what else is the same of all"""
    timesteps: Mapping[str, tuple[int, ...]]
    """by the schedule's name"""
    rows: Mapping[int, Sequence[Explanation]]
    """by seed, in the order of the schedules"""

    def samples(self) -> Figure:
        """Figures 6 and 10: a row of images a seed."""
        shown = list(self.rows)[:_SEEDS]
        first = "" if len(shown) == len(self.rows) else f", the first {len(shown)} of {len(self.rows)} seeds"
        return samples(
            {f"seed {seed}": [one.image for one in self.rows[seed]] for seed in shown},
            self.timesteps,
            max(999, *chain.from_iterable(self.timesteps.values())),
            (self.prompt, self.about + first),
        )

    def concepts(self) -> Figure | None:
        """Figure 11: means over the seeds whose relevance is all there, with standard errors; None where there is none.

        Concepts are the prompt's words but for stop words; of more than eight concepts, the most relevant.
        """
        found = {seed: lines for seed, row in self.rows.items() if (lines := _whole_lines(row))}
        if not found:
            return None
        whole = [*found.values()]
        every = {name: np.concatenate([line[name] for row in whole for line in row]) for name in whole[0][0]}
        names = leading(every, _CONCEPTS)
        means: dict[str, dict[str, list[float]]] = {}
        errors: dict[str, dict[str, list[float]]] = {}
        sums: dict[str, dict[str, tuple[float, float, float]]] = {}
        for place, schedule in enumerate(self.timesteps):
            here = {name: np.array([row[place][name] for row in whole]) for name in names}
            means[schedule] = {name: each.mean(0).tolist() for name, each in here.items()}
            errors[schedule] = {name: standard_error(each).tolist() for name, each in here.items()}
            sums[schedule] = {name: _reach(each) for name, each in here.items()}
        told = f"{self.about}, {_counted([*found])}"
        title = heading(self.prompt, told, width(len(self.timesteps)), FONT_SIZE)
        return concepts([(title, means, sums)], self.timesteps, [errors] if len(whole) > 1 else [])


def groups(items: Iterable[Explanation]) -> Iterator[Group]:
    """What of these differs in its schedule alone: the same model, prompts, settings, and schedules for every seed.

    Of a result in memory, whose guidance and negative prompt are not known, the same model and prompt. A seed that has
    only some of the schedules is in a group of its own; a seed and schedule that come again are left out.
    """
    found: dict[tuple[str, ...], dict[int, dict[tuple[int, ...], Explanation]]] = {}
    for item in items:
        by_seed = found.setdefault(_asked(item), {})
        by_seed.setdefault(int(item.seed), {}).setdefault(tuple(int(t) for t in item.timesteps), item)
    for (model, prompt, negative, settings), by_seed in found.items():
        alike: dict[frozenset[tuple[int, ...]], list[int]] = {}
        for seed, images in by_seed.items():
            alike.setdefault(frozenset(images), []).append(seed)
        guidance = json.loads(settings).get("guidance")
        about = shortened(model) + ("" if guidance is None else f", guidance {guidance:g}")
        about += f", without “{negative}”" if negative else ""
        for lists in (list(by_seed[seeds[0]]) for seeds in alike.values()):
            if len(lists) > 1:
                rows = {seed: [by_seed[seed][steps] for steps in lists] for seed in alike[frozenset(lists)]}
                yield Group(prompt, about, dict(zip(schedule_names(lists), lists, strict=True)), rows)


def _asked(item: Explanation) -> tuple[str, str, str, str]:
    """Model, prompt, negative prompt and, as JSON, what else a stored item was made with, but for its schedule."""
    stored = getattr(item, "item", None)
    settings = (
        {} if stored is None else {name: stored.settings[name] for name in stored.settings if name != "timesteps"}
    )
    return item.model, item.prompt, getattr(item, "negative_prompt", ""), json.dumps(settings, sort_keys=True)


def schedule_names(lists: Sequence[tuple[int, ...]]) -> list[str]:
    """A name for each list of time-steps: with its length, then with a number, where others have the same."""
    names = [schedule_name(steps) for steps in lists]
    counts = Counter(names)
    names = [
        f"{name}, {len(steps)} steps" if counts[name] > 1 else name for name, steps in zip(names, lists, strict=True)
    ]
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def standard_error(values: Float[ndarray, "seeds values"]) -> Float[ndarray, " values"]:
    """Of the mean over seeds: s/√n, with n − 1 in s; 0 of a single one."""
    count = len(values)
    return values.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros_like(values[0])


def _whole_lines(row: Sequence[Explanation]) -> list[dict[str, Float[ndarray, " steps"]]]:
    """The lines of relevance of each image, nothing where one has a gap or no lines."""
    found = [lines_of(item) for item in row]
    return found if all(lines and np.isfinite([*lines.values()]).all() for lines in found) else []


def _reach(lines: Float[ndarray, "seeds steps"]) -> tuple[float, float, float]:
    """The mean of the sums over the steps, and the standard error below and above it."""
    sums = lines.sum(1, keepdims=True)
    mean, error = float(sums.mean()), float(standard_error(sums)[0])
    return mean, mean - error, mean + error


def _counted(seeds: Sequence[int]) -> str:
    """What is drawn of so many seeds."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    named = ", ".join(map(str, seeds)) if len(seeds) <= 4 else f"{seeds[0]} … {seeds[-1]}"
    return f"mean of {len(seeds)} seeds ({named}) ± standard error"
