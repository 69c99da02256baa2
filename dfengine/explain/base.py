"""What every explainer is: frozen settings that declare what they produce, and produce it step by step."""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jaxtyping import Float
from torch import Tensor

import dfengine.checks as checks
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.tokens import Tokens


def option(default: Any, help: str) -> Any:
    """A setting of an explainer: a dataclass field whose default and help are declared here alone.

    The command line, sweeps, the stored settings and the documentation derive from it.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class StepMap:
    """What one explainer produced for one step of one item: float32, on the CPU, before any normalisation."""

    item: int
    """index among the trajectories given to the explainer"""
    step: int
    """index in the item's list of time-steps, from 0"""
    method: str
    """the explainer's `name`"""
    saliency: Float[Tensor, "h w"]
    error: Float[Tensor, "h w"] | None = None
    """standard error per pixel, infinite where nothing was measured"""
    scores: Float[Tensor, " masks"] | None = None
    """each mask's (mean) score, NaN for masks that an early stop skipped"""
    layers: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict)
    """each layer's map at its own resolution"""
    relevance: Float[Tensor, " tokens"] | None = None
    """each token's relevance"""
    word_maps: Float[Tensor, "words h w"] | None = None
    """each word's map"""
    word_errors: Float[Tensor, "words h w"] | None = None
    """standard error of each word's map, infinite where nothing was measured"""


@dataclass(frozen=True)
class OutputSpec:
    """What the step maps of one job will hold besides their saliency."""

    num_masks: int = 0
    has_error: bool = False
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """each layer's resolution"""
    tokens: Tokens | None = None
    """the tokens that `relevance` has a value for"""
    words: Sequence[str] = ()
    """the words that `word_maps` has a map for"""
    has_word_errors: bool = False
    """whether the words' maps have errors; the same for every job of a run"""
    num_forwards: int | None = None
    """network evaluations a step, if the prompt decides how many; None where `Explainer.num_forwards` says it"""


@dataclass(frozen=True)
class Explainer(ABC):
    """Base of all explainers: a frozen dataclass whose fields are its settings, declared with `option`.

    `explain.registry.register` makes one available by name.
    """

    def __post_init__(self) -> None:
        """Make every setting a plain value of its declared type, if it is from NumPy too; subclasses call this first.

        Raises ValueError for a value of another type, a number that is not finite, and an empty name.
        """
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _plain(name, getattr(self, name), hint))
        if not self.name.strip() or not self.name.isprintable():
            raise ValueError(f"name {self.name!r} is not possible: expected text that can be printed")

    @property
    @abstractmethod
    def name(self) -> str:
        """The name its maps are stored under; two explainers of one run need different names."""

    @classmethod
    def completed(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of a file, with those that it is too old to have as they were in effect when it was written."""
        return settings

    def num_forwards(self, num_steps: int) -> int:
        """Network evaluations of one latent that so many steps cost at most, from which running time is predicted."""
        return num_steps

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """What it will produce for a job. Raises ValueError if the model or the prompt lacks what it needs."""
        return OutputSpec()

    @abstractmethod
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of every trajectory's steps, except the (item, step) pairs in `done`."""


@cache
def _hints(explainer: type[Explainer]) -> dict[str, Any]:
    """The declared type of every setting; none if annotations name what is not there when the program runs."""
    try:
        hints = typing.get_type_hints(explainer)
    except NameError:
        return {}
    return {one.name: hints[one.name] for one in dataclasses.fields(explainer) if one.init}


class FrozenMapping(dict[str, tuple[str, ...]]):
    """A mapping among the settings, hashable like all of them; to JSON it is a plain object."""

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none, since it may change
        return hash(frozenset(self.items()))


_CHECKS: dict[Any, Callable[[str, Any], Any]] = {
    int: checks.whole_number,
    float: checks.finite_number,
    bool: checks.switch,
    str: checks.text,
    Sequence[int]: checks.whole_numbers,
    Sequence[str]: checks.texts,
    Mapping[str, Sequence[str]]: lambda name, value: FrozenMapping(checks.texts_by_text(name, value)),
}


def _plain(name: str, value: Any, hint: Any) -> Any:
    """A setting as a plain value of its type, a sequence as a tuple, a mapping as a hashable one.

    Raises ValueError for a value of another type.
    """
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = list(typing.get_args(hint)) if is_union else [hint]
    if value is None and type(None) in kinds:
        return None
    if callable(value) and any(typing.get_origin(kind) is Callable for kind in kinds):
        return value
    kinds = [kind for kind in kinds if kind is not type(None) and typing.get_origin(kind) is not Callable]
    known = [kind for kind in kinds if kind in _CHECKS]
    if not known or len(known) < len(kinds):
        return value  # of a type that is checked by its explainer, if at all
    for kind in known[:-1]:
        with suppress(ValueError):
            return _CHECKS[kind](name, value)
    return _CHECKS[known[-1]](name, value)
