"""Which concepts of the prompt each stage of the process relies on (Table 3, Figure 11), and which come out right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from dfengine.evaluate.checks import captions
from dfengine.evaluate.intervals import Interval, interval, rate
from dfengine.explain import StepMap, check_behaviour
from dfengine.prompts import ROLES, Prompt
from dfengine.result import normalised
from dfengine.shapes.judge import ATTRIBUTES, Judge, attribute_indices
from dfengine.shapes.world import SIZE, Caption
from dfengine.tokens import Tokens, content_words, word_spans

#: Table 3 of the paper: subject, relation and object, summed over 30 steps.
PAPER = {"uniform": (21.61, 2.99, 17.61), "early": (19.98, 3.04, 18.51), "latter": (21.30, 2.40, 17.98)}


@dataclass
class Measured:
    """One image: its schedule and prompt, each concept's relevance at each step, and which concepts came out right."""

    schedule: str
    prompt: int
    seed: int
    lines: dict[str, Float[ndarray, " steps"]] = field(default_factory=dict)
    """by role, in [0, 1]: min–max over the prompt's own tokens, mean over the concept's"""
    right: dict[str, bool] = field(default_factory=dict)
    """by role, in the embedded world"""


@dataclass(frozen=True)
class Concepts:
    """Table 3 and what belongs to it; intervals are over prompts."""

    title: str

    relevance: Mapping[str, Mapping[str, Interval]]
    """by schedule and role, summed over the steps"""
    right: Mapping[str, Mapping[str, Interval]]
    """by schedule and role, the share of images in which it came out right; empty outside the embedded world"""
    agreement: Mapping[str, Interval]
    """by role, the probability that its relevance is higher in an image where it came out right than in another of the
    same prompt, over prompts that have both"""
    lines: Mapping[str, Mapping[str, Sequence[float]]]
    """by schedule and role, the mean at each step"""
    timesteps: Mapping[str, Sequence[float]]
    """by schedule"""
    num_prompts: int
    num_seeds: int


def lines_of(
    relevance: Float[ndarray, "tokens steps"], tokens: Tokens, prompt: Prompt, behaviour: str = "paper"
) -> dict[str, ndarray]:
    """Each concept's line: the mean over its tokens of what `normalised` makes; in the released code, the sum."""
    shares, over = normalised(relevance, tokens), np.sum if behaviour == "xdiffusion" else np.mean
    return {role: over(shares[tokens.find(concept)], axis=0) for role, concept in prompt.concepts.items()}


class RightOnes:
    """Says which concepts of an embedded-world caption an image shows."""

    def __init__(self) -> None:
        self._judge = Judge.load()

    @staticmethod
    def _read(image: UInt8[ndarray, "H W 3"]) -> Tensor:
        """An image as the judge takes it. Raises ValueError for one of another size than the world's."""
        if image.shape != (SIZE, SIZE, 3):
            raise ValueError(f"an image of {image.shape} is not of the embedded world: expected ({SIZE}, {SIZE}, 3)")
        return torch.from_numpy(image).permute(2, 0, 1)[None] / 255

    def agrees(self, image: UInt8[ndarray, "H W 3"], caption: Caption) -> bool:
        """Whether an image is what its caption says in every attribute. Raises ValueError as `__call__` does."""
        return bool(self._judge.agrees(self._read(image), [caption]).all())

    @torch.no_grad()
    def __call__(self, image: UInt8[ndarray, "H W 3"], caption: Caption) -> dict[str, bool]:
        """Subject and object: whether they are there, in colour and kind. Relation: whether they stand as it says.

        A picture is read as an arrangement of a first (upper or left) and a second shape. Raises ValueError for an
        image of another size than the world's.
        """
        logits = self._judge(self._read(image))
        seen = dict(zip(ATTRIBUTES, (int(one.argmax()) for one in logits.values()), strict=True))
        wanted = dict(zip(ATTRIBUTES, attribute_indices([caption])[0].tolist(), strict=True))
        places = ("first", "second") if caption.relation not in ("below", "right of") else ("second", "first")

        def shape(values: Mapping[str, int], place: str) -> tuple[int, int]:
            return values[f"{place} colour"], values[f"{place} kind"]

        # Of a single shape the judge's word on a second one means nothing.
        there = ("first",) if ATTRIBUTES["arrangement"][seen["arrangement"]] == "single" else ("first", "second")
        shapes = [shape(seen, place) for place in there]
        if caption.object is None:
            return {"subject": shapes[0] == shape(wanted, "first")}
        subject, other = (shape(wanted, place) for place in places)
        in_place = shape(seen, places[0]) == subject or shape(seen, places[1]) == other
        return {
            "subject": subject in shapes,
            "relation": seen["arrangement"] == wanted["arrangement"] and in_place,
            "object": other in shapes,
        }


def measure(
    events: Iterable[Any],
    planned: Sequence[Measured],
    prompts: Sequence[Prompt],
    tokens: Callable[[str], Tokens],
    behaviour: str = "paper",
) -> list[Measured]:
    """Fill in what was planned, an item each, from the events of an engine's stream with `Relevance` (and no other).

    `tokens` says how a model divides a prompt. Raises ValueError for a behaviour that is not known.
    """
    check_behaviour(behaviour)
    judge = RightOnes()
    told: dict[int, Tokens] = {}
    steps: dict[int, dict[int, ndarray]] = {}
    for event in events:
        one = planned[event.item]
        prompt = prompts[one.prompt]
        if isinstance(event, StepMap):
            assert event.relevance is not None
            steps.setdefault(event.item, {})[event.step] = event.relevance.numpy()
        elif trajectory := getattr(event, "trajectory", None):
            with suppress(ValueError):  # of another world
                one.right = judge(trajectory.image.numpy(), Caption.parse(prompt.text))
        else:
            told[one.prompt] = told.get(one.prompt) or tokens(prompt.text)
            made = steps.pop(event.item)
            relevance = np.stack([made[step] for step in sorted(made)], axis=1)
            one.lines = lines_of(relevance, told[one.prompt], prompt, behaviour)
    return list(planned)


def summarise(
    measured: Sequence[Measured], prompts: Sequence[Prompt], timesteps: Mapping[str, Sequence[float]]
) -> list[Concepts]:
    """The tables of what was measured, of all prompts with roles together and of each other one by its words.

    Means over seeds first, then over prompts with their intervals.
    """
    with_roles = {place for place, prompt in enumerate(prompts) if set(prompt.concepts) <= set(ROLES)}
    groups = [with_roles, *({place} for place in range(len(prompts)) if place not in with_roles)]
    return [
        _summary(
            [one for one in measured if one.prompt in group], [prompts[place] for place in sorted(group)], timesteps
        )
        for group in groups
        if group
    ]


def _summary(
    measured: Sequence[Measured], prompts: Sequence[Prompt], timesteps: Mapping[str, Sequence[float]]
) -> Concepts:
    schedules = list(timesteps)
    roles = list(dict.fromkeys(role for prompt in prompts for role in prompt.concepts))

    def over_prompts(
        schedule: str, value: Callable[[Measured], float | None], summed: Callable[[list[float]], Interval] = interval
    ) -> Interval:
        each: dict[int, list[float]] = {}
        for one in measured:
            if one.schedule == schedule and (found := value(one)) is not None:
                each.setdefault(one.prompt, []).append(found)
        return summed([float(np.mean(values)) for values in each.values()])

    def total(role: str) -> Callable[[Measured], float | None]:
        return lambda one: float(one.lines[role].sum()) if role in one.lines else None

    def came_out(role: str) -> Callable[[Measured], float | None]:
        return lambda one: float(one.right[role]) if role in one.right else None

    def mean_line(schedule: str, role: str) -> list[float]:
        found = [one.lines[role] for one in measured if one.schedule == schedule and role in one.lines]
        return np.mean(found, axis=0).tolist() if found else []

    is_judged = any(role in one.right for one in measured for role in roles)
    return Concepts(
        title=f"“{prompts[0].text}”" if len(prompts) == 1 else f"{len(prompts)} prompts",
        relevance={s: {role: over_prompts(s, total(role)) for role in roles} for s in schedules},
        right={s: {role: over_prompts(s, came_out(role), rate) for role in roles} for s in schedules}
        if is_judged
        else {},
        agreement={role: interval(list(_agreement(measured, role))) for role in roles} if is_judged else {},
        lines={s: {role: mean_line(s, role) for role in roles} for s in schedules},
        timesteps={schedule: list(steps) for schedule, steps in timesteps.items()},
        num_prompts=len(prompts),
        num_seeds=len({one.seed for one in measured}),
    )


def _agreement(measured: Iterable[Measured], role: str) -> Iterator[float]:
    """For each prompt with images of both kinds: how often a right one's sum is higher than a wrong one's."""
    each: dict[int, tuple[list[float], list[float]]] = {}
    for one in measured:
        if role in one.right and role in one.lines:
            each.setdefault(one.prompt, ([], []))[one.right[role]].append(float(one.lines[role].sum()))
    for wrong, right in each.values():
        if wrong and right:
            differences = np.subtract.outer(right, wrong)
            yield float(((differences > 0) + 0.5 * (differences == 0)).mean())


def table(found: Concepts) -> Iterator[str]:
    """Table 3 in Markdown, the paper's figures beside it where it has the schedule."""
    roles = list(next(iter(found.relevance.values())))
    yield f"| relevance, summed over the steps | {' | '.join(roles)} |"
    yield f"|---|{'---|' * len(roles)}"
    for schedule, scores in found.relevance.items():
        yield f"| {schedule} | {' | '.join(str(scores[role]) for role in roles)} |"
        if set(roles) == set(ROLES) and (paper := PAPER.get(schedule.partition(",")[0])):
            told = dict(zip(ROLES, paper, strict=True))
            yield f"| {schedule}, the paper's | {' | '.join(f'{told[role]:.2f}' for role in roles)} |"
    if not found.right:
        return
    yield ""
    yield f"| share of images in which it came out right | {' | '.join(roles)} |"
    yield f"|---|{'---|' * len(roles)}"
    for schedule, scores in found.right.items():
        yield f"| {schedule} | {' | '.join(str(scores[role]) for role in roles)} |"
    counts = {role: found.agreement[role].count for role in roles}
    told_by = [f"{found.agreement[role]} ({counts[role]} prompt{'s' * (counts[role] != 1)})" for role in roles]
    yield f"| higher relevance where right, probability | {' | '.join(told_by)} |"


def with_concepts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, those that name no concepts with every word of theirs that is no stop word."""
    found = []
    for prompt in prompts:
        told = content_words(prompt.text[slice(*span)] for span in word_spans(prompt.text))
        found.append(prompt if prompt.concepts else Prompt(prompt.text, {word: word for word in told}))
    return found


def embedded_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Captions of the embedded world with a subject, a relation and an object, each once."""
    drawn, whole = 3 * count, list[Caption]()
    while len(whole) < count:
        found = [Caption.parse(text) for text in captions(drawn, seed)]
        whole = [caption for caption in found if caption.object is not None][:count]
        drawn *= 2
    return [Prompt(str(caption), {role: caption.concepts[role] for role in ROLES}) for caption in whole]
