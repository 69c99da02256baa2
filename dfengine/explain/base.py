"""What every explainer is: frozen settings that say what they will make, and make it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.tokens import Tokens

#: The paper's equations, or what the authors' released code does instead.
BEHAVIOURS = ("paper", "xdiffusion")


def check_behaviour(behaviour: str) -> None:
    """Raise ValueError for a behaviour that is not known."""
    if behaviour not in BEHAVIOURS:
        raise ValueError(f"behaviour {behaviour!r} is not known: expected one of {', '.join(BEHAVIOURS)}")


@dataclass(frozen=True)
class StepMap:
    """What one explainer makes of one step of one item: float32, on the CPU, before any normalisation."""

    item: int
    """index among the trajectories given to the explainer"""
    step: int
    """index in the item's list of time-steps"""
    method: str
    saliency: Float[Tensor, "h w"]
    error: Float[Tensor, "h w"] | None = None
    """standard error per pixel, infinite where nothing was measured, for methods that have one"""
    scores: Float[Tensor, " masks"] | None = None
    """of methods with masks, each mask's (mean) score, NaN for masks that an early stop spared"""
    layers: Mapping[str, Float[Tensor, "_ _"]] = field(default_factory=dict)
    """of DF-CAM, each layer's map at its own resolution"""
    relevance: Float[Tensor, " tokens"] | None = None
    """of relevance, each token's"""
    word_maps: Float[Tensor, "words h w"] | None = None
    """of attention, each word's map"""


@dataclass(frozen=True)
class OutputSpec:
    """What an explainer's step maps of one job will hold beside their saliency."""

    num_masks: int = 0
    has_error: bool = False
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """each layer's resolution"""
    tokens: Tokens | None = None
    """those that relevance is given for"""
    words: Sequence[str] = ()
    """those that have maps"""


@runtime_checkable
class Explainer(Protocol):
    """A frozen dataclass of settings; `dataclasses.asdict` of it runs it again."""

    @property
    def name(self) -> str:
        """What its maps are filed under."""
        ...

    def num_forwards(self, num_steps: int) -> int:
        """Forwards of one latent that so many steps of one item cost, at most: what a job's time is predicted from."""
        ...

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """What it will make of a job. Raises ValueError for what this model or this prompt does not have."""
        ...

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of all trajectories as they are made, leaving out the (item, step) pairs in `done`."""
        ...
