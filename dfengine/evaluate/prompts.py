"""Prompts of the embedded world, and the concepts that the studies look for in any prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from dfengine.checks import whole_number
from dfengine.evaluate.truth import has_distinct_colours
from dfengine.prompts import ROLES, Prompt
from dfengine.shapes.world import BACKGROUNDS, COLOURS, KINDS, RELATIONS, SIZE, Caption, sample_scenes
from dfengine.tokens import content_words, word_spans

#: Each round samples four times as many captions as are requested; after this many rounds there are too few.
_MAX_ROUNDS = 50


def captions(count: int, seed: int = 0) -> list[str]:
    """Distinct captions of the embedded world whose subject and object differ in colour and in kind.

    Raises ValueError if there are fewer than `count`.
    """
    count, seed = whole_number("count", count, 1, 10**6), whole_number("seed", seed, 0, 2**63 - 1)
    shapes = len(KINDS) * len(COLOURS)
    if count > shapes * len(BACKGROUNDS) * (1 + len(RELATIONS) * shapes):
        raise ValueError(f"the embedded world has fewer than {count} captions")
    generator, distinct = torch.Generator().manual_seed(seed), dict[str, None]()
    rounds = 0
    while len(distinct) < count:
        rounds += 1
        if rounds > _MAX_ROUNDS:
            raise ValueError(f"the embedded world has fewer than {count} captions: {len(distinct)} were found")
        for caption in sample_scenes(4 * count, generator).captions:
            differ = caption.object is None or caption.object[1] != caption.subject[1]
            if differ and has_distinct_colours(caption) and len(distinct) < count:
                distinct[str(caption)] = None
    return list(distinct)


def embedded_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """Distinct captions of the embedded world that have a subject, a relation and an object, with these as concepts."""
    count = whole_number("count", count, 1, 10**6)
    num_sampled, pairs = 3 * count, list[Caption]()
    while len(pairs) < count:
        sampled = map(Caption.parse, captions(num_sampled, seed))
        pairs = [caption for caption in sampled if caption.object is not None][:count]
        num_sampled *= 2
    return [Prompt(str(caption), {role: caption.concepts[role] for role in ROLES}) for caption in pairs]


def with_concepts(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts; one without concepts gets each of its words that is not a stop word."""

    def concepts_of(text: str) -> dict[str, str]:
        return {word: word for word in content_words(text[start:stop] for start, stop in word_spans(text))}

    return [prompt if prompt.concepts else Prompt(prompt.text, concepts_of(prompt.text)) for prompt in prompts]


def check_has_truth(image_shape: tuple[int, int], prompts: Sequence[str]) -> None:
    """Raise ValueError, before anything is computed, if no image can have known areas."""
    for prompt in prompts:
        with suppress(ValueError):
            if image_shape == (SIZE, SIZE) and has_distinct_colours(Caption.parse(prompt)):
                return
    raise ValueError(
        f"no image has shapes whose areas are known: they are known in the embedded world alone, for {SIZE}×{SIZE} "
        "pixels and captions such as 'a red circle above a blue square on a gray background'"
    )
