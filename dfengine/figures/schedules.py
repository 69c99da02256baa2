"""Images of one prompt under several schedules, grouped into figures (Figures 6, 10 and 11)."""

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
from dfengine.figures.concepts import concepts, width
from dfengine.figures.panels import FONT_SIZE, Figure, heading, short_model_name
from dfengine.figures.samples import samples
from dfengine.figures.selection import available_lines, top_by_mean
from dfengine.result import Explanation

#: Maximum number of seeds and of concepts in a figure.
_MAX_SEEDS, _MAX_CONCEPTS = 8, 8

Timesteps = tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """Images of one model and prompt: for each seed, one per schedule."""

    prompt: str
    details: str
    """the model and the other settings that all images share"""
    timesteps: Mapping[str, Timesteps]
    """by the schedule's name"""
    rows: Mapping[int, Sequence[Explanation]]
    """by seed, in the order of the schedules"""

    def samples(self) -> Figure:
        """Figures 6 and 10: a row of images per seed."""
        seeds = list(self.rows)[:_MAX_SEEDS]
        omitted = "" if len(seeds) == len(self.rows) else f", the first {len(seeds)} of {len(self.rows)} seeds"
        return samples(
            {f"seed {seed}": [one.image for one in self.rows[seed]] for seed in seeds},
            self.timesteps,
            max(999, *chain.from_iterable(self.timesteps.values())),
            (self.prompt, self.details + omitted),
        )

    def concepts(self) -> Figure | None:
        """Figure 11: means and standard errors over the seeds with complete relevance; None if there are none.

        The concepts are the prompt's words without stop words; of more than eight, the most relevant.
        """
        complete = {seed: lines for seed, row in self.rows.items() if (lines := _complete_lines(row))}
        if not complete:
            return None
        rows = [*complete.values()]
        by_concept = {name: np.concatenate([lines[name] for row in rows for lines in row]) for name in rows[0][0]}
        names = top_by_mean(by_concept, _MAX_CONCEPTS)
        means: dict[str, dict[str, list[float]]] = {}
        errors: dict[str, dict[str, list[float]]] = {}
        sums: dict[str, dict[str, tuple[float, float, float]]] = {}
        for column, schedule in enumerate(self.timesteps):
            by_name = {name: np.array([row[column][name] for row in rows]) for name in names}
            means[schedule] = {name: values.mean(0).tolist() for name, values in by_name.items()}
            errors[schedule] = {name: standard_error(values).tolist() for name, values in by_name.items()}
            sums[schedule] = {name: _sum_interval(values) for name, values in by_name.items()}
        details = f"{self.details}, {_describe_seeds([*complete])}"
        title = heading(self.prompt, details, width(len(self.timesteps)), FONT_SIZE)
        return concepts([(title, means, sums)], self.timesteps, [errors] if len(rows) > 1 else [])


def groups(items: Iterable[Explanation]) -> Iterator[Group]:
    """Images that differ only in their seeds and schedules, with the same schedules for every seed.

    Seeds with other schedules form groups of their own; duplicates are left out. Guidance and negative prompt are
    unknown for results in memory, which are compared by model and prompt.
    """
    by_request: dict[tuple[str, ...], dict[int, dict[Timesteps, Explanation]]] = {}
    for item in items:
        by_seed = by_request.setdefault(_request(item), {})
        by_seed.setdefault(int(item.seed), {}).setdefault(tuple(np.asarray(item.timesteps).tolist()), item)
    for (model, prompt, negative_prompt, settings), by_seed in by_request.items():
        seeds_by_lists: dict[frozenset[Timesteps], list[int]] = {}
        for seed, images in by_seed.items():
            seeds_by_lists.setdefault(frozenset(images), []).append(seed)
        guidance = json.loads(settings).get("guidance")
        details = short_model_name(model) + ("" if guidance is None else f", guidance {guidance:g}")
        details += f", negative prompt “{negative_prompt}”" if negative_prompt else ""
        for seeds in seeds_by_lists.values():
            lists = list(by_seed[seeds[0]])
            if len(lists) > 1:
                rows = {seed: [by_seed[seed][timesteps] for timesteps in lists] for seed in seeds}
                yield Group(prompt, details, dict(zip(schedule_names(lists), lists, strict=True)), rows)


def _request(item: Explanation) -> tuple[str, str, str, str]:
    """Model, prompt, negative prompt and, as JSON, a stored item's other settings except its schedule."""
    stored = getattr(item, "item", None)
    settings = {} if stored is None else {name: value for name, value in stored.settings.items() if name != "timesteps"}
    return item.model, item.prompt, getattr(item, "negative_prompt", ""), json.dumps(settings, sort_keys=True)


def schedule_names(lists: Sequence[Timesteps]) -> list[str]:
    """A unique name for each list of time-steps: duplicates get their lengths, and if necessary numbers."""
    names = [schedule_name(timesteps) for timesteps in lists]
    counts = Counter(names)
    names = [
        f"{name}, {len(timesteps)} steps" if counts[name] > 1 else name
        for name, timesteps in zip(names, lists, strict=True)
    ]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def standard_error(values: Float[ndarray, "seeds values"]) -> Float[ndarray, " values"]:
    """Standard error of the mean over seeds, s/√n with n − 1 in s; zeros for one seed."""
    count = len(values)
    return values.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros_like(values[0])


def _complete_lines(row: Sequence[Explanation]) -> list[dict[str, Float[ndarray, " steps"]]]:
    """The lines of relevance of each image; empty if any image has none or lacks a step."""
    lines = [available_lines(item) for item in row]
    return lines if all(one and np.isfinite([*one.values()]).all() for one in lines) else []


def _sum_interval(lines: Float[ndarray, "seeds steps"]) -> tuple[float, float, float]:
    """The mean over seeds of the sum over steps, and that mean minus and plus its standard error."""
    sums = lines.sum(1, keepdims=True)
    mean, error = float(sums.mean()), float(standard_error(sums)[0])
    return mean, mean - error, mean + error


def _describe_seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    names = ", ".join(map(str, seeds)) if len(seeds) <= 4 else f"{seeds[0]} … {seeds[-1]}"
    return f"mean of {len(seeds)} seeds ({names}) ± standard error"
