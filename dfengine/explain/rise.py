"""DF-RISE: which places of a noisy latent must be visible for the prediction to keep its structure (Algorithm 1).

Random masks hide parts of the latent, the network predicts from each masked latent, and a pixel's saliency is how much
more similar those predictions are to the unmasked one with the pixel kept than with it hidden.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dfkernels
import torch
from dfkernels import MaskDistribution
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.guidance import TARGETS
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.registry import checked, register
from dfengine.explain.rise_forwards import RiseForwards

SIMILARITIES = (*dfkernels.SIMILARITIES, "frechet")
ESTIMATORS = (*dfkernels.ESTIMATORS, "ridge")
OUTPUTS = ("x0", "epsilon")
BASELINES = ("identity", "frozen")

#: The settings of the paper's equations.
PAPER: dict[str, Any] = {
    "num_masks": 500,
    "output": "epsilon",
    "similarity": "structure",
    "score": "local",
    "estimator": "coverage",
    "cell": 1,
    "shifted": False,
    "design": "iid",
    "fill": "zero",
    "target": "conditional",
}

#: Masks a step, at most: the score of each is stored.
_MAX_MASKS = 2**24
#: Cells a side of a rise mask, and the side of a window: more than any latent has pixels.
_MAX_CELLS, _MAX_WINDOW = 4096, 4095
#: With a stop, masks are divided into so many times more randomisations.
_LOOKS = 4


def _hot(rise: Rise) -> str:
    """What high values of a map of DF-RISE mean; coverage and sum of local scores are base rates."""
    if rise.baseline is not None:
        null = "f is the identity" if rise.baseline == "identity" else "f(R) whatever is masked"
        return f"nothing of the network, a baseline to hold its map against ({null})."
    measure = rise.similarity if isinstance(rise.similarity, str) else "a function of the caller's"
    is_structure = measure == "structure"
    keeps = "keeps its structure" if is_structure else f"stays similar ({measure})"
    keeps_more = "keeps more of its structure" if is_structure else f"stays more similar ({measure})"
    what = "clean latent" if rise.resolved_output == "x0" else "noise"
    predicted = "predicted" if rise.target == "conditional" else f"{rise.target} predicted"
    place = "this pixel" if rise.mask_kind == "rise" or set(rise.cells) == {1} else "this place"
    if rise.resolved_estimator in ("contrast", "ridge"):
        subject = f"the {predicted} {what} here" if rise.score == "local" else f"the whole {predicted} {what}"
        return f"{subject} {keeps_more} with {place} kept than with it hidden."
    masks = "summed over" if rise.resolved_estimator == "sum" else "under"
    if rise.score == "global":
        return f"{masks} the masks that keep {place}, the whole {predicted} {what} {keeps}."
    return f"{masks} the masks that keep {place}, the {predicted} {what} {keeps} here: a base rate, no attribution."


@register("rise", label="DF-RISE", hot=_hot)
@dataclass(frozen=True)
class Rise(Explainer):
    """Which places must be visible for the prediction to keep its structure, by random masks (Eqs. 8, 9).

    The map of a step is the mean score with a pixel kept minus the mean with it dropped ("contrast"), Σ M·s / Σ M
    ("coverage"), Σ M·s ("sum", as printed), or the ridge regression of a global score on the masks ("ridge"). Coverage
    and sum of local scores are base rates, not attributions: they show where structure survives anything.

    Errors of an orthogonal design are the spread of its randomisations, and infinite for fewer than four of them; those
    of independent masks follow from the scores.
    """

    num_masks: int = option(256, "masks a step; with stop_at_error, at most")
    output: str = option("x0", "what is compared: x0 (the clean latent that a prediction implies) or epsilon")
    similarity: str | Callable[[Tensor, Tensor], Tensor] = option("structure", ", ".join(SIMILARITIES))
    """by name, or a function (a [n, c, h, w], b [c, h, w]) → scores, [n, h, w] if local and [n] if global"""
    score: str = option("local", "local (a map of scores a mask) or global (a number a mask)")
    estimator: str | None = option(
        None, "sum, coverage, contrast or ridge; by default contrast (local) or ridge (global)"
    )
    cell: Sequence[int] | int = option(
        (4,), "side in latent pixels of a gaussian mask's cells; several sizes: a pyramid"
    )
    shifted: bool = option(
        True,
        "move the grid by half a cell every other time, so that cells overlap; never for ridge, which needs one grid",
    )
    design: str | None = option(
        None, "orthogonal (balanced masks) or iid (independent ones); orthogonal by default, if gaussian with p = 0.5"
    )
    keep_probability: float = option(0.5, "share of latent pixels that a mask keeps, in (0, 1)")
    mask_kind: str = option("gaussian", "gaussian (every cell independently) or rise (a smooth random grid)")
    grid: int = option(8, "cells a side of a rise mask")
    fill: str = option("zero", "what a dropped pixel becomes: zero, or noise (a noisy latent without content)")
    window: int = option(11, "side in pixels of the Gaussian window of local statistics, odd")
    sigma: float = option(1.5, "standard deviation of that window in latent pixels")
    target: str = option("conditional", "prediction to explain: conditional, guided or unconditional")
    stop_at_error: float | None = option(
        None, "end a step once its mean standard error is this share of the signal's standard deviation, at most 1"
    )
    baseline: str | None = option(
        None, "in the network's place: identity (f(x) = x) or frozen (f(R) whatever is masked), to hold a map against"
    )
    name: str = option("rise", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are out of range or exclude each other."""
        super().__post_init__()
        check_num_masks(self.num_masks)
        if not 2**-32 <= self.keep_probability <= 1 - 2**-32:
            raise ValueError(
                f"keep_probability {self.keep_probability} is outside (0, 1): a mask keeps some pixels and hides some"
            )
        if not 1 <= self.grid <= _MAX_CELLS:
            raise ValueError(f"grid {self.grid} is not possible: expected 1 to {_MAX_CELLS} cells a side")
        if not 1 <= self.window <= _MAX_WINDOW or self.window % 2 == 0:
            raise ValueError(f"window {self.window} has no middle pixel: expected an odd number up to {_MAX_WINDOW}")
        if not self.sigma > 0:
            raise ValueError(f"sigma {self.sigma} is not possible: expected more than 0")
        if self.stop_at_error is not None and not 0 < self.stop_at_error <= 1:
            raise ValueError(
                f"stop_at_error {self.stop_at_error} is outside (0, 1]: beyond 1 a map may be nothing but noise"
            )
        self._check_choice("output", OUTPUTS)
        self._check_choice("mask_kind", dfkernels.MASK_KINDS)
        if self.design is not None:
            self._check_choice("design", dfkernels.DESIGNS)
        self._check_choice("fill", dfkernels.FILLS)
        self._check_choice("score", dfkernels.SCORES)
        self._check_choice("target", TARGETS)
        if not callable(self.similarity):
            self._check_choice("similarity", SIMILARITIES)
        if self.estimator is not None:
            self._check_choice("estimator", ESTIMATORS)
        if self.baseline is not None:
            self._check_choice("baseline", BASELINES)
        if self.score == "local" and self.estimator == "ridge":
            raise ValueError("the ridge estimator regresses one score a mask: it needs score='global'")
        if self.score == "local" and self.similarity == "frechet":
            raise ValueError("the Fréchet similarity compares whole images: it needs score='global'")
        self._distribution()

    @classmethod
    def paper(cls, **settings: Any) -> Rise:
        """The equations as printed: masks of independent pixels, structure of ε, the sum in its scale-free form."""
        printed = PAPER if settings.get("score") != "global" else PAPER | {"estimator": None}
        return cls(**printed | checked(cls, settings))

    @classmethod
    def xdiffusion(cls, **settings: Any) -> Explainer:
        """What the authors' released code computes. Raises ValueError for a setting that it does not have."""
        from dfengine.explain.xdiffusion import XDiffusionRise

        return XDiffusionRise(**checked(XDiffusionRise, settings))

    @property
    def resolved_estimator(self) -> str:
        """The estimator in force."""
        return self.estimator or ("contrast" if self.score == "local" else "ridge")

    @property
    def resolved_output(self) -> str:
        """What is compared: the Fréchet similarity is one of images, so of x0."""
        return "x0" if self.similarity == "frechet" else self.output

    @property
    def cells(self) -> tuple[int, ...]:
        """The sizes of cells."""
        return (self.cell,) if isinstance(self.cell, int) else tuple(self.cell)

    @classmethod
    def completed(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Before there were cells and x0, maps were those of `paper`."""
        if "output" in settings:
            return settings
        estimator = settings.get("estimator") or ("ridge" if settings.get("score") == "global" else "coverage")
        return PAPER | dict(settings) | {"estimator": estimator}

    def distribution(self, shape: tuple[int, int]) -> MaskDistribution:
        """What the masks of a latent of (h, w) pixels are drawn from."""
        law = self._distribution()
        if law.design == "iid":
            return law
        # A stop looks once a randomisation: there have to be some.
        num_masks = self.num_masks if self.stop_at_error is None else self.num_masks // _LOOKS
        return dataclasses.replace(law, block=dfkernels.orthogonal_block(num_masks, shape, law))

    def _distribution(self) -> MaskDistribution:
        """The distribution whatever the latent. Raises ValueError for settings that exclude each other."""
        is_gaussian = self.mask_kind == "gaussian"
        by_default = "orthogonal" if is_gaussian and self.keep_probability == 0.5 else "iid"
        return MaskDistribution(
            self.keep_probability,
            self.mask_kind,
            self.grid,
            cells=self.cells if is_gaussian else (1,),
            shifted=self.shifted and is_gaussian and self.resolved_estimator != "ridge",
            design=self.design or by_default,
        )

    def min_masks(self, shape: tuple[int, int]) -> int:
        """The masks that a good map wants at least: of a ridge twice the cells that it tells apart."""
        if self.resolved_estimator != "ridge":
            return 1
        return 2 * math.prod(self.distribution(shape).field(shape)[1])

    def num_forwards(self, num_steps: int) -> int:
        return num_forwards(num_steps, self.num_masks, self.target)

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a mask, and errors.

        Raises ValueError if the similarity needs features and the model has none, and for a cell that is larger than
        the latent.
        """
        self._check_features(denoiser)
        h, w = denoiser.latent_shape[1:]
        if max(self.cells) > max(h, w) and self.mask_kind == "gaussian":
            raise ValueError(
                f"cell {max(self.cells)} is larger than the latent of {denoiser.name}, {h}×{w} pixels: a mask would "
                "hide all or nothing"
            )
        return OutputSpec(num_masks=self.num_masks, has_error=True)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Batches fill across masks, steps and items."""
        self._check_features(denoiser)
        wanted = self.min_masks(denoiser.latent_shape[1:])
        if self.num_masks < wanted:
            warnings.warn(
                f"{self.num_masks} masks are few for the ridge of a global score with {wanted // 2} unknowns: "
                f"it wants {wanted} or more",
                stacklevel=2,
            )
        yield from RiseForwards(self, denoiser, trajectories, done).run()

    def _check_choice(self, setting: str, choices: Sequence[str]) -> None:
        if getattr(self, setting) not in choices:
            raise ValueError(f"{setting} {getattr(self, setting)!r} is not known: expected one of {', '.join(choices)}")

    def _check_features(self, denoiser: Denoiser) -> None:
        if self.similarity == "frechet" and denoiser.features is None:
            raise ValueError(
                f"the Fréchet similarity compares image features, and {denoiser.name} comes with no extractor: "
                "set denoiser.features to one"
            )


def check_num_masks(num_masks: int, what: str = "masks") -> None:
    """Raise ValueError for a number of masks below 1, or more than can be stored."""
    if not 1 <= num_masks <= _MAX_MASKS:
        raise ValueError(f"{num_masks} {what} are not possible: expected at least 1 and at most {_MAX_MASKS}")


def num_forwards(num_steps: int, num_masks: int, target: str) -> int:
    """Forwards of one latent for every mask and for f(R), twice as many with guidance, if no step stops early."""
    return num_steps * (num_masks + 1) * (2 if target == "guided" else 1)
