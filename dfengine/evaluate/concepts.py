"""Which concepts of the prompt each stage of the process relies on (Table 3, Figure 11), and which come out right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from dfengine.diffusion.path import exponential_timesteps
from dfengine.evaluate.intervals import SHARES, Interval, mean_interval, proportion_interval
from dfengine.evaluate.truth import ConceptJudge
from dfengine.explain import StepMap
from dfengine.prompts import ROLES, Prompt
from dfengine.result import normalised
from dfengine.shapes.world import Caption
from dfengine.tokens import Tokens

#: Table 3 of the paper: subject, relation and object of 50 prompts of Visual Genome, summed over 30 steps, with γ = 60.
PAPER = {"uniform": (21.61, 2.99, 17.61), "early": (19.98, 3.04, 18.51), "latter": (21.30, 2.40, 17.98)}
_PAPER_PROMPTS, _PAPER_STEPS, _PAPER_GAMMA = 50, 30, 60


@dataclass
class ConceptRecord:
    """One image of a study: what it is generated from and, once measured, what was found."""

    schedule: str
    prompt: int
    """index among the prompts"""
    seed: int
    relevance: dict[str, Float[ndarray, " steps"]] = field(default_factory=dict)
    """by role, in [0, 1] unless summed: `concept_relevance`"""
    is_right: dict[str, bool] = field(default_factory=dict)
    """by role, in the embedded world: whether the image shows the concept"""


@dataclass(frozen=True)
class ConceptSummary:
    """Table 3 for a group of prompts; intervals are over prompts."""

    title: str
    relevance: Mapping[str, Mapping[str, Interval]]
    """by schedule and role, summed over the steps"""
    right: Mapping[str, Mapping[str, Interval]]
    """by schedule and role, the share of images that show the concept; empty outside the embedded world"""
    agreement: Mapping[str, Interval]
    """by role, the probability that its relevance is higher in an image that shows the concept than in another image
    of the same prompt that does not, over prompts with both"""
    lines: Mapping[str, Mapping[str, Sequence[float]]]
    """by schedule and role, the mean relevance at each step"""
    timesteps: Mapping[str, Sequence[float]]
    """by schedule"""
    num_prompts: int
    num_seeds: int

    def table(self) -> str:
        """Table 3 in Markdown, with the paper's figures below ours if the settings are the paper's."""
        return "\n".join(_table(self))


def concept_relevance(
    relevance: Float[ndarray, "tokens steps"], tokens: Tokens, prompt: Prompt, *, summed: bool = False
) -> dict[str, Float[ndarray, " steps"]]:
    """By role, the relevance of the prompt's concepts at each step: the mean over a concept's tokens, or their sum.

    At each step, relevance is min–max normalised over the prompt's own tokens. The authors' released code sums.
    """
    shares, reduce = normalised(relevance, tokens), np.sum if summed else np.mean
    return {role: reduce(shares[tokens.find(concept)], axis=0) for role, concept in prompt.concepts.items()}


def measure_concepts(
    events: Iterable[Any],
    records: Sequence[ConceptRecord],
    prompts: Sequence[Prompt],
    tokenize: Callable[[str], Tokens],
    *,
    summed: bool = False,
) -> None:
    """Fill in the records, one for each item, from an engine's stream of events with `Relevance` alone."""
    judge = ConceptJudge()
    tokens: dict[int, Tokens] = {}
    steps: dict[int, dict[int, ndarray]] = {}
    for event in events:
        record = records[event.item]
        prompt = prompts[record.prompt]
        if isinstance(event, StepMap):
            assert event.relevance is not None
            steps.setdefault(event.item, {})[event.step] = event.relevance.numpy()
        elif trajectory := getattr(event, "trajectory", None):
            with suppress(ValueError):  # outside the embedded world
                record.is_right = judge(trajectory.image.numpy(), Caption.parse(prompt.text))
        else:
            if record.prompt not in tokens:
                tokens[record.prompt] = tokenize(prompt.text)
            by_step = steps.pop(event.item)
            relevance = np.stack([by_step[step] for step in sorted(by_step)], axis=1)
            record.relevance = concept_relevance(relevance, tokens[record.prompt], prompt, summed=summed)


def summarise_concepts(
    records: Sequence[ConceptRecord], prompts: Sequence[Prompt], timesteps: Mapping[str, Sequence[float]]
) -> list[ConceptSummary]:
    """One summary of all prompts with roles, and one of each other prompt by its words.

    Means are over seeds first, then over prompts.
    """
    with_roles = {place for place, prompt in enumerate(prompts) if set(prompt.concepts) <= set(ROLES)}
    groups = [with_roles, *({place} for place in range(len(prompts)) if place not in with_roles)]
    return [
        _summarise(
            [record for record in records if record.prompt in group],
            [prompts[place] for place in sorted(group)],
            timesteps,
        )
        for group in groups
        if group
    ]


def _summarise(
    records: Sequence[ConceptRecord], prompts: Sequence[Prompt], timesteps: Mapping[str, Sequence[float]]
) -> ConceptSummary:
    schedules = list(timesteps)
    roles = list(dict.fromkeys(role for prompt in prompts for role in prompt.concepts))

    def over_prompts(
        schedule: str,
        value_of: Callable[[ConceptRecord], float | None],
        interval: Callable[[list[float]], Interval] = mean_interval,
    ) -> Interval:
        by_prompt: dict[int, list[float]] = {}
        for record in records:
            if record.schedule == schedule and (value := value_of(record)) is not None:
                by_prompt.setdefault(record.prompt, []).append(value)
        return interval([float(np.mean(values)) for values in by_prompt.values()])

    def total(role: str) -> Callable[[ConceptRecord], float | None]:
        return lambda record: float(record.relevance[role].sum()) if role in record.relevance else None

    def is_right(role: str) -> Callable[[ConceptRecord], float | None]:
        return lambda record: float(record.is_right[role]) if role in record.is_right else None

    def mean_line(schedule: str, role: str) -> list[float]:
        lines = [one.relevance[role] for one in records if one.schedule == schedule and role in one.relevance]
        return np.mean(lines, axis=0).tolist() if lines else []

    is_judged = any(role in record.is_right for record in records for role in roles)
    return ConceptSummary(
        title=f"“{prompts[0].text}”" if len(prompts) == 1 else f"{len(prompts)} prompts",
        relevance={s: {role: over_prompts(s, total(role)) for role in roles} for s in schedules},
        right={s: {role: over_prompts(s, is_right(role), proportion_interval) for role in roles} for s in schedules}
        if is_judged
        else {},
        agreement={role: mean_interval(list(_agreement(records, role)), SHARES) for role in roles} if is_judged else {},
        lines={s: {role: mean_line(s, role) for role in roles} for s in schedules},
        timesteps={schedule: list(steps) for schedule, steps in timesteps.items()},
        num_prompts=len(prompts),
        num_seeds=len({record.seed for record in records}),
    )


def _agreement(records: Iterable[ConceptRecord], role: str) -> Iterator[float]:
    """For each prompt with images of both kinds: how often a right image's total is higher than a wrong one's."""
    totals: dict[int, tuple[list[float], list[float]]] = {}
    for record in records:
        if role in record.is_right and role in record.relevance:
            by_kind = totals.setdefault(record.prompt, ([], []))
            by_kind[record.is_right[role]].append(float(record.relevance[role].sum()))
    for wrong, right in totals.values():
        if wrong and right:
            differences = np.subtract.outer(right, wrong)
            yield float(((differences > 0) + 0.5 * (differences == 0)).mean())


def _differences(summary: ConceptSummary) -> list[str]:
    """What the paper's Table 3 has otherwise, as far as a summary tells; the prompts themselves are not compared."""
    here = {len(timesteps) for timesteps in summary.timesteps.values()}
    differences = [] if here == {_PAPER_STEPS} else [f"{_PAPER_STEPS} steps"]
    if summary.num_prompts != _PAPER_PROMPTS:
        differences.append(f"{_PAPER_PROMPTS} prompts")
    if summary.right:  # only the embedded world's images can be judged
        differences.append("images of Stable Diffusion for prompts of Visual Genome")
    for stage in ("early", "latter"):
        timesteps = summary.timesteps.get(stage)
        if (
            here == {_PAPER_STEPS}
            and timesteps
            and list(timesteps) != exponential_timesteps(_PAPER_STEPS, _PAPER_GAMMA, stage)
        ):
            differences.append(f"γ = {_PAPER_GAMMA}")
            break
    return differences


def _table(summary: ConceptSummary) -> Iterator[str]:
    roles = list(next(iter(summary.relevance.values())))
    has_roles = set(roles) == set(ROLES)
    differences = _differences(summary) if has_roles else []
    yield f"| relevance, summed over the steps | {' | '.join(roles)} |"
    yield f"|---|{'---|' * len(roles)}"
    for schedule, totals in summary.relevance.items():
        yield f"| {schedule} | {' | '.join(str(totals[role]) for role in roles)} |"
        if has_roles and not differences and (paper := PAPER.get(schedule)):
            printed = dict(zip(ROLES, paper, strict=True))
            yield f"| {schedule}, paper | {' | '.join(f'{printed[role]:.2f}' for role in roles)} |"
    if differences:
        yield ""
        yield f"The paper's figures are left out, since its Table 3 has {', '.join(differences)}."
    if not summary.right:
        return
    yield ""
    yield f"| share of images that show it | {' | '.join(roles)} |"
    yield f"|---|{'---|' * len(roles)}"
    for schedule, shares in summary.right.items():
        yield f"| {schedule} | {' | '.join(str(shares[role]) for role in roles)} |"
    counts = {role: summary.agreement[role].count for role in roles}
    cells = [f"{summary.agreement[role]} ({counts[role]} prompt{'s' * (counts[role] != 1)})" for role in roles]
    yield f"| probability that relevance is higher in images that show it | {' | '.join(cells)} |"
