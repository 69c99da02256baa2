"""Every figure that results allow, in the forms of the paper, under names that sort."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Protocol, TypeVar, runtime_checkable

from dfengine.figures.choosing import finished_steps, within
from dfengine.figures.comparing import compare_images, compare_steps
from dfengine.figures.forms import draw
from dfengine.figures.grouping import groups
from dfengine.figures.parts import Figure
from dfengine.result import Explanation

T = TypeVar("T")


@runtime_checkable
class Results(Protocol):
    """Results in memory, an open file or an open run folder."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Explanation: ...

    def __iter__(self) -> Iterator[Explanation]: ...


@dataclass(frozen=True)
class Drawing:
    """A figure of one method's maps of one image."""

    name: str
    result: Explanation
    method: str
    steps: Sequence[int] | None
    """None for those that the form chooses"""


def every(
    results: Results,
    *,
    only: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[tuple[str, Figure]]:
    """Every figure that results in memory or items of a file allow, each with its name.

    Of each image every method in its form (`draw`); of several methods the `comparison`; of images that differ in their
    schedules alone `samples`, and of their relevance `concepts`. `only` are the places of the images; without, the
    first `limit` have figures of their own, and a warning tells of the others. What is not finished is left out. Raises
    ValueError for an image, or a method or step that none of them has.
    """
    shown = _shown(results, only, limit)
    _check(shown, methods, steps)
    return _every(results, shown, only is not None, methods, steps, limit)


def drawings(
    results: Results,
    *,
    only: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[Drawing]:
    """What `every` draws of one method and image each. Raises ValueError as it does."""
    shown = _shown(results, only, limit)
    _check(shown, methods, steps)
    return _drawings(shown, len(results), methods, steps)


def _every(
    results: Results,
    shown: Mapping[int, Explanation],
    is_chosen: bool,
    methods: Sequence[str] | None,
    steps: Sequence[int] | None,
    limit: int | None,
) -> Iterator[tuple[str, Figure]]:
    for one in _drawings(shown, len(results), methods, steps):
        yield one.name, draw(one.result, one.method, one.steps)
    for name, part in _alike(shown, len(results)).items():
        named = [method for method in dict.fromkeys(m for one in part for m in one.maps) if _is_in(method, methods)]
        if len(part) == 1:
            drawn = compare_steps(part[0], named, steps)
            yield from [] if drawn is None else [(name, drawn)]
        else:
            compared = compare_images(part, named, steps)
            for step, figure in compared.items():
                yield f"{name}-step-{step:03}" if len(compared) > 1 else name, figure
    yield from _of_groups([*shown.values()] if is_chosen else results, methods, limit)


def _drawings(
    shown: Mapping[int, Explanation], total: int, methods: Sequence[str] | None, steps: Sequence[int] | None
) -> Iterator[Drawing]:
    for place, result in shown.items():
        for method, name in _file_names(result.maps).items():
            finished = finished_steps(result, method) if _is_in(method, methods) else []
            wanted = finished if steps is None else within(steps, len(result.timesteps), finished)
            if wanted:
                yield Drawing(_name(place, total) + name, result, method, None if steps is None else wanted)


def _file_names(methods: Iterable[str]) -> dict[str, str]:
    """A file's name for each method, unlike all others on any disk."""
    names, taken = {}, {"comparison", "samples", "concepts"}
    for method in methods:
        plain = re.sub(r"[^\w+-]", "-", method) or "-"
        numbered = chain([plain], (f"{plain}-{number}" for number in count(2)))
        names[method] = next(name for name in numbered if name.casefold() not in taken)
        taken.add(names[method].casefold())
    return names


def _of_groups(
    results: Iterable[Explanation], methods: Sequence[str] | None, limit: int | None
) -> Iterator[tuple[str, Figure]]:
    """Samples where no method is named, and concepts where relevance is not left out."""
    is_there = [result for result in results if generated(result)]
    found = [] if methods and not _has_relevance(is_there, methods) else list(groups(is_there))
    for number, group in enumerate(_limited(found, limit, "prompts")):
        name = f"prompt-{number:03}-" if len(found) > 1 else ""
        if methods is None:
            yield f"{name}samples", group.samples()
        if (drawn := group.concepts()) is not None:
            yield f"{name}concepts", drawn


def _has_relevance(results: Sequence[Explanation], methods: Sequence[str]) -> bool:
    return any(one.explainer_name(method) == "Relevance" for one in results for method in one.maps if method in methods)


def _alike(shown: Mapping[int, Explanation], total: int) -> dict[str, list[Explanation]]:
    """By the name of their comparison, images of one model and size with equally many steps."""
    found: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
    for place, result in shown.items():
        found.setdefault((result.model, result.image.shape, len(result.timesteps)), []).append(place)
    alone = {f"{_name(one, total)}comparison": [shown[one]] for one, *others in found.values() if not others}
    several = [[shown[place] for place in places] for places in found.values() if len(places) > 1]
    names = [f"comparison-{number}" if len(several) > 1 else "comparison" for number in range(len(several))]
    return alone | dict(zip(names, several, strict=True))


def _shown(results: Results, only: Sequence[int] | None, limit: int | None) -> dict[int, Explanation]:
    """By their places the images that have figures of their own, without those that are not generated yet."""
    total = len(results)
    for place in only or []:
        if not -total <= place < total:
            raise ValueError(f"item {place} is not there: expected one of 0 to {total - 1}")
    wanted = range(total) if only is None else dict.fromkeys(place % total for place in only)
    there = [place for place in wanted if generated(results[place])]
    return {place: results[place] for place in (_limited(there, limit, "images") if only is None else there)}


def _limited(things: list[T], limit: int | None, what: str) -> list[T]:
    if limit is None or len(things) <= limit:
        return things
    left = len(things) - limit
    warnings.warn(
        f"the first {limit} of {len(things)} {what} are drawn, {left} left out: raise the limit", stacklevel=4
    )
    return things[:limit]


def generated(result: Explanation) -> bool:
    """Whether there is an image yet; always, of a result in memory."""
    return bool(getattr(result, "has_trajectory", True))


def _check(shown: Mapping[int, Explanation], methods: Sequence[str] | None, steps: Sequence[int] | None) -> None:
    """Raises ValueError for a method or a step that none of the images has."""
    if not shown:
        return
    known = dict.fromkeys(method for result in shown.values() for method in result.maps)
    for method in methods or []:
        if method not in known:
            raise ValueError(f"there is no map {method!r}: expected one of {', '.join(known) or 'none'}")
    most = max(len(result.timesteps) for result in shown.values())
    for step in steps or []:
        if not -most <= step < most:
            raise ValueError(f"step {step} is outside [0, {most - 1}]: steps are indices into `timesteps`")


def _is_in(method: str, methods: Sequence[str] | None) -> bool:
    return methods is None or method in methods


def _name(place: int, total: int) -> str:
    """What the names of an image's figures begin with, where it is one of several."""
    return f"item-{place:0{max(3, len(str(total - 1)))}}-" if total > 1 else ""
