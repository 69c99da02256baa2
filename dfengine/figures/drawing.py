"""Every figure that results have the data for, with names for their files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Protocol, TypeVar, runtime_checkable

from dfengine.figures.comparisons import compare_images, compare_steps
from dfengine.figures.forms import draw, form_of
from dfengine.figures.panels import Figure
from dfengine.figures.schedules import groups
from dfengine.figures.selection import within
from dfengine.result import Explanation

T = TypeVar("T")


@runtime_checkable
class Results(Protocol):
    """Results in memory, an open file or an open run folder."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Explanation: ...

    def __iter__(self) -> Iterator[Explanation]: ...


@dataclass(frozen=True)
class Drawing:
    """A figure with a name for its file."""

    name: str
    figure: Figure
    result: Explanation | None = None
    """the image whose maps it shows, for a figure of one method"""
    method: str = ""
    steps: Sequence[int] | None = None
    """the steps it shows, None if it chose them itself"""


def draw_all(
    results: Results,
    *,
    items: Sequence[int] | None = None,
    methods: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    limit: int | None = None,
) -> Iterator[Drawing]:
    """Every figure that results in memory or items of a file have the data for.

    For each image, every method in its form (`draw`); for several methods the `comparison`; for images that differ only
    in their schedules `samples`, and `concepts` if they have relevance. `items` selects images by index; otherwise the
    first `limit` images get figures of their own, and a warning counts the others. Unfinished maps are left out.

    Raises ValueError, before anything is drawn, for an image, method or step that the results do not have.
    """
    images = _select(results, items, limit)
    _check(images, methods, steps)
    return _draw_all(results, images, items is not None, methods, steps, limit)


def _draw_all(
    results: Results,
    images: Mapping[int, Explanation],
    is_selected: bool,
    methods: Sequence[str] | None,
    steps: Sequence[int] | None,
    limit: int | None,
) -> Iterator[Drawing]:
    total = len(results)
    for index, result in images.items():
        yield from _draw_methods(result, _prefix(index, total), methods, steps)
    for name, members in _comparable(images, total).items():
        names = [method for method in dict.fromkeys(chain(*(one.maps for one in members))) if _is_in(method, methods)]
        if len(members) == 1:
            figure = compare_steps(members[0], names, steps)
            yield from [] if figure is None else [Drawing(name, figure)]
        else:
            by_step = compare_images(members, names, steps)
            for step, figure in by_step.items():
                yield Drawing(f"{name}-step-{step:03}" if len(by_step) > 1 else name, figure)
    yield from _draw_groups([*images.values()] if is_selected else results, methods, limit)


def _draw_methods(
    result: Explanation, prefix: str, methods: Sequence[str] | None, steps: Sequence[int] | None
) -> Iterator[Drawing]:
    for method, name in _file_names(result.maps).items():
        finished = form_of(result, method).finished_steps(result, method) if _is_in(method, methods) else []
        chosen = finished if steps is None else within(steps, len(result.timesteps), finished)
        if chosen:
            shown = None if steps is None else chosen
            yield Drawing(prefix + name, draw(result, method, shown), result, method, shown)


def _file_names(methods: Iterable[str]) -> dict[str, str]:
    """A file name for each method, unique on case-insensitive file systems too."""
    names, taken = {}, {"comparison", "samples", "concepts"}
    for method in methods:
        plain = re.sub(r"[^\w+-]", "-", method) or "-"
        candidates = chain([plain], (f"{plain}-{number}" for number in count(2)))
        names[method] = next(name for name in candidates if name.casefold() not in taken)
        taken.add(names[method].casefold())
    return names


def _draw_groups(results: Iterable[Explanation], methods: Sequence[str] | None, limit: int | None) -> Iterator[Drawing]:
    """Samples unless methods are named, and concepts unless relevance is not among these methods."""
    generated = [result for result in results if is_generated(result)]
    found = list(groups(generated)) if methods is None or _has_relevance(generated, methods) else []
    for number, group in enumerate(_limited(found, limit, "prompts")):
        prefix = f"prompt-{number:03}-" if len(found) > 1 else ""
        if methods is None:
            yield Drawing(f"{prefix}samples", group.samples())
        if (figure := group.concepts()) is not None:
            yield Drawing(f"{prefix}concepts", figure)


def _has_relevance(results: Sequence[Explanation], methods: Sequence[str]) -> bool:
    return any(one.form(method) == "tokens" for one in results for method in one.maps if method in methods)


def _comparable(images: Mapping[int, Explanation], total: int) -> dict[str, list[Explanation]]:
    """Images of the same model, size and number of steps, by the name of their comparison."""
    alike: dict[tuple[str, tuple[int, ...], int], list[int]] = {}
    for index, result in images.items():
        alike.setdefault((result.model, result.image.shape, len(result.timesteps)), []).append(index)
    single = {f"{_prefix(index, total)}comparison": [images[index]] for index, *rest in alike.values() if not rest}
    several = [[images[index] for index in indices] for indices in alike.values() if len(indices) > 1]
    names = [f"comparison-{number}" if len(several) > 1 else "comparison" for number in range(len(several))]
    return single | dict(zip(names, several, strict=True))


def _select(results: Results, items: Sequence[int] | None, limit: int | None) -> dict[int, Explanation]:
    """The generated images that get figures of their own, by index."""
    total = len(results)
    for index in items or []:
        if not -total <= index < total:
            raise ValueError(f"there is no item {index}: expected one of 0 to {total - 1}")
    candidates = range(total) if items is None else dict.fromkeys(index % total for index in items)
    generated = [index for index in candidates if is_generated(results[index])]
    return {index: results[index] for index in (_limited(generated, limit, "images") if items is None else generated)}


def _limited(values: list[T], limit: int | None, kind: str) -> list[T]:
    if limit is None or len(values) <= limit:
        return values
    omitted = len(values) - limit
    warnings.warn(
        f"drawing the first {limit} of {len(values)} {kind}, leaving out {omitted}: raise the limit to draw more",
        stacklevel=4,
    )
    return values[:limit]


def is_generated(result: Explanation) -> bool:
    """Whether there is an image yet; always true for a result in memory."""
    return bool(getattr(result, "has_trajectory", True))


def _check(images: Mapping[int, Explanation], methods: Sequence[str] | None, steps: Sequence[int] | None) -> None:
    """Raises ValueError for a method or step that none of the images has."""
    if not images:
        return
    known = dict.fromkeys(method for result in images.values() for method in result.maps)
    for method in methods or []:
        if method not in known:
            raise ValueError(f"there is no map {method!r}: expected one of {', '.join(known) or 'none'}")
    most = max(len(result.timesteps) for result in images.values())
    for step in steps or []:
        if not -most <= step < most:
            raise ValueError(f"step {step} is outside [0, {most - 1}]: steps are indices into `timesteps`")


def _is_in(method: str, methods: Sequence[str] | None) -> bool:
    return methods is None or method in methods


def _prefix(index: int, total: int) -> str:
    """Beginning of the file names of an image's figures; empty if there is only one image."""
    return f"item-{index:0{max(3, len(str(total - 1)))}}-" if total > 1 else ""
