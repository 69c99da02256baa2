"""What every explainer is: frozen settings with one method."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from dfengine.denoiser import Denoiser
from dfengine.trajectory import Trajectory


@dataclass(frozen=True)
class StepMap:
    """One explainer's map of one step of one item, raw and exact: float32, on the CPU, before any normalisation."""

    item: int
    """index among the trajectories given to the explainer"""
    step: int
    """index in the item's list of time-steps"""
    method: str
    saliency: Float[Tensor, "h w"]
    error: Float[Tensor, "h w"]
    """standard error per pixel; infinite where nothing was measured"""
    scores: Float[Tensor, " masks"]
    """each mask's (mean) score, NaN for masks that an early stop spared"""


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

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of all trajectories as they are made, leaving out the (item, step) pairs in `done`."""
        ...
