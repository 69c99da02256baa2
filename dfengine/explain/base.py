"""What every explainer is: frozen settings that declare what they produce, and produce it step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

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


@dataclass(frozen=True)
class Explainer(ABC):
    """Base of all explainers: a frozen dataclass whose fields are its settings, declared with `option`.

    `explain.registry.register` makes one available by name.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name its maps are stored under; two explainers of one run need different names."""

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
