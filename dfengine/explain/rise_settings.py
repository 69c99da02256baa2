"""What DF-RISE can be asked for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import dfkernels
from torch import Tensor

from dfengine.diffusion.guidance import TARGETS

SIMILARITIES = (*dfkernels.SIMILARITIES, "frechet")
ESTIMATORS = (*dfkernels.ESTIMATORS, "ridge")

#: A step; the score of each is kept.
_MOST_MASKS = 2**24


@dataclass(frozen=True)
class RiseSettings:
    """The fields of `Rise`. Raises ValueError for what is not possible."""

    num_masks: int = 1000
    """N a step; the most there are if `stop_at_error` is set"""
    keep_probability: float = 0.5
    """share of latent pixels that a mask keeps, in (0, 1)"""
    masks: str = "gaussian"
    """"gaussian": every pixel by itself; "rise": a smooth random grid"""
    grid: int = 8
    """cells a side of a "rise" mask"""
    similarity: str | Callable[[Tensor, Tensor], Tensor] = "structure"
    """by name, or a function (a [n, c, h, w], b [c, h, w]) → scores, [n, h, w] if local and [n] if global"""
    score: str = "local"
    """a map of scores a mask, or one scalar a mask"""
    estimator: str | None = None
    """None is "coverage" for local and "ridge" for global scores"""
    window: int = 11
    """pixels a side of the Gaussian window of local statistics, odd"""
    sigma: float = 1.5
    """of that window, in latent pixels"""
    target: str = "conditional"
    """which prediction is explained"""
    stop_at_error: float | None = None
    """stop a step once the mean standard error is below this share of its map's range"""
    name: str = "rise"

    def __post_init__(self) -> None:
        def choice(field: str, options: Sequence[str]) -> None:
            if getattr(self, field) not in options:
                raise ValueError(f"{field} {getattr(self, field)!r} is not known: expected one of {', '.join(options)}")

        # Plain numbers, so that settings from NumPy compare, store and print like any other.
        object.__setattr__(self, "num_masks", operator.index(self.num_masks))
        object.__setattr__(self, "keep_probability", float(self.keep_probability))
        if not 1 <= self.num_masks <= _MOST_MASKS:
            raise ValueError(f"{self.num_masks} masks are not possible: expected at least 1 and at most {_MOST_MASKS}")
        if not 2**-32 <= self.keep_probability <= 1 - 2**-32:
            raise ValueError(
                f"keep probability {self.keep_probability} is outside (0, 1): a mask keeps some pixels and hides some"
            )
        if self.grid < 1:
            raise ValueError(f"a grid of {self.grid} cells is not possible: expected at least 1")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"window {self.window} has no middle pixel: expected an odd number")
        if not self.sigma > 0:
            raise ValueError(f"sigma {self.sigma} is not possible: expected more than 0")
        if self.stop_at_error is not None and not self.stop_at_error > 0:
            raise ValueError(f"stop_at_error {self.stop_at_error} is not possible: expected more than 0")
        choice("masks", dfkernels.MASK_KINDS)
        choice("score", dfkernels.SCORES)
        choice("target", TARGETS)
        if not callable(self.similarity):
            choice("similarity", SIMILARITIES)
        if self.estimator is not None:
            choice("estimator", ESTIMATORS)
        if self.score == "local" and self.estimator == "ridge":
            raise ValueError("the ridge estimator regresses one score a mask: it needs score='global'")
        if self.score == "local" and self.similarity == "frechet":
            raise ValueError("the Fréchet similarity compares whole images: it needs score='global'")

    @property
    def estimates(self) -> str:
        """The estimator in force."""
        return self.estimator or ("coverage" if self.score == "local" else "ridge")
