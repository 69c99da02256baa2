"""DF-RISE: which pixels of a noisy latent must be seen for the noise prediction to keep its structure.

Algorithm 1 of the paper: random masks hide latent pixels, the denoiser answers each masked latent, and a pixel's
saliency is how well the answers agree with the unmasked one when that pixel is kept.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dfkernels
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfengine.batching import PADDING, in_batches
from dfengine.denoiser import TARGETS, Condition, Denoiser, Guided
from dfengine.explain.base import StepMap
from dfengine.trajectory import Trajectory

SIMILARITIES = (*dfkernels.SIMILARITIES, "frechet")
ESTIMATORS = (*dfkernels.ESTIMATORS, "ridge")

#: With an early stop, the standard error is looked at after every so many masks.
_MASKS_BETWEEN_CHECKS = 64
#: A step; the score of each is kept.
_MOST_MASKS = 2**24


@dataclass(frozen=True)
class Rise:
    """DF-RISE and its variations [8][9].

    Maps are Σ M·s ("sum", as printed), Σ M·s / Σ M ("coverage"), the mean score with a pixel kept minus the mean with
    it dropped ("contrast"), or the ridge regression of a global score on the masks ("ridge").
    """

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

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream a map for every step of every trajectory; batches fill across masks, steps and items.

        Raises ValueError where the similarity needs what the model does not come with.
        """
        _, height, width = denoiser.latent_shape
        if self.estimates == "ridge" and self.num_masks < 2 * height * width:
            warnings.warn(
                f"{self.num_masks} masks are few for the ridge of a global score on {height}×{width} pixels: "
                f"it wants {2 * height * width} or more",
                stacklevel=2,
            )
        rows = [(i, k) for i, path in enumerate(trajectories) for k in range(len(path))]
        if set(rows) - set(done):
            yield from _Masking(self, denoiser, trajectories, rows, done).run()


class _Masking:
    """The running sums of one call: a row is one step of one item, an entry one mask of one row."""

    def __init__(
        self,
        rise: Rise,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        rows: Sequence[tuple[int, int]],
        done: Collection[tuple[int, int]],
    ) -> None:
        def column(values: list[int]) -> Int[Tensor, " rows"]:
            return torch.tensor(values, dtype=torch.int64, device=denoiser.device)

        jobs = [trajectory.job for trajectory in trajectories]
        self.rise, self.denoiser, self.rows = rise, denoiser, rows
        self.wanted = [row not in done for row in rows]
        self.latents = torch.stack([trajectories[i].latents[k] for i, k in rows])
        self.items = column([i for i, _ in rows])
        self.steps = column([k for _, k in rows])
        self.seeds = column([jobs[i].mask_seed for i, _ in rows])
        self.timesteps = column([jobs[i].timesteps[k] for i, k in rows])
        self.explained = Guided(
            denoiser,
            Condition.cat([trajectory.prompt for trajectory in trajectories]),
            Condition.cat([trajectory.negative for trajectory in trajectories]),
            rise.target,
            torch.tensor([job.guidance for job in jobs], device=denoiser.device),
        )
        self.masks: dict[str, Any] = {
            "keep_probability": rise.keep_probability,
            "kind": rise.masks,
            "grid": rise.grid,
        }
        self.shape = denoiser.latent_shape[1:]
        self.sums = dfkernels.Sums.zeros(len(rows), self.shape, denoiser.device)
        # Both have a spare last row, which padded entries (row −1) write to: no branch, and no synchronisation.
        self.references = torch.empty((len(rows) + 1, *denoiser.latent_shape), device=denoiser.device)
        self.scores = torch.full((len(rows) + 1, rise.num_masks), torch.nan, device=denoiser.device)
        for _ in in_batches(len(rows), denoiser.batch_size, self._refer, denoiser.device):
            pass

    def run(self) -> Iterator[StepMap]:
        """Rounds of masks over the rows that still want some; without an early stop there is one round."""
        total = self.rise.num_masks
        masks_a_round = total if self.rise.stop_at_error is None else _MASKS_BETWEEN_CHECKS
        active = list(range(len(self.rows)))
        for first in range(0, total, masks_a_round):
            count = min(masks_a_round, total - first)
            unfinished = []
            for row in self._round(active, first, count):
                saliency, error = self._estimate(row, first + count)
                if first + count == total or self._converged(saliency, error):
                    yield self._step_map(row, saliency, error)
                else:
                    unfinished.append(row)
            active = unfinished

    def _round(self, active: Sequence[int], first: int, count: int) -> Iterator[int]:
        """Measure the masks first … first + count − 1 of the active rows; yields each wanted row once it has them all.

        Rows that are done keep their place: the batches of the others are the same as without them, to the bit. (After
        an early stop's first round they drop out, and sums agree to rounding.)
        """
        table = torch.tensor(active, dtype=torch.int64, device=self.denoiser.device)

        def measure(entries: Int[Tensor, " n"]) -> None:
            rows = torch.where(entries == PADDING, PADDING, table[entries.clamp(min=0) // count])
            self._measure(rows, first + entries % count)

        def needed(begin: int, end: int) -> bool:
            return any(self.wanted[row] for row in active[begin // count : -(-end // count)])

        seen = 0
        total, size = len(active) * count, self.denoiser.batch_size
        for entries in in_batches(total, size, measure, self.denoiser.device, needed):
            yield from (row for row in active[seen : entries // count] if self.wanted[row])
            seen = entries // count

    def _refer(self, rows: Int[Tensor, " n"]) -> None:
        """f(R) of some rows, the answer that every masked one is compared with."""
        real = rows.clamp(min=0)
        self.references[rows] = self.explained(self.latents[real], self.timesteps[real], self.items[real]).epsilon

    def _measure(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> None:
        """f(R ⊙ M), its scores and their sums, for one batch."""
        real = rows.clamp(min=0)
        masked = dfkernels.blend(self.latents, self.seeds, self.steps, rows, indices, **self.masks)
        answers = self.explained(masked, self.timesteps[real], self.items[real]).epsilon
        where = (self.seeds, self.steps, rows, indices)
        if isinstance(self.rise.similarity, str) and self.rise.similarity != "frechet":
            means = dfkernels.accumulate(
                answers,
                self.references[:-1],
                self.sums,
                *where,
                similarity=self.rise.similarity,
                score=self.rise.score,
                window=self.rise.window,
                sigma=self.rise.sigma,
                keep_probability=self.rise.keep_probability,
                mask_kind=self.rise.masks,
                grid=self.rise.grid,
            )
        else:
            scores = self._frechet(answers, real) if self.rise.similarity == "frechet" else self._ask(answers, rows)
            dfkernels.add(self.sums, scores, *where, **self.masks)
            means = scores.flatten(1).mean(1) if scores.ndim > 1 else scores
        self.scores[rows, indices] = means.float()

    def _ask(self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]) -> Tensor:
        """The caller's own similarity, called once for each row in the batch; padding is not shown to it."""
        assert callable(self.rise.similarity)
        wanted = self.shape if self.rise.score == "local" else ()
        scores = answers.new_full((len(rows), *wanted), torch.nan)
        for row in rows[rows != PADDING].unique().tolist():
            asked = answers[rows == row]
            given = torch.as_tensor(self.rise.similarity(asked, self.references[row]))
            if given.shape != (len(asked), *wanted):
                raise ValueError(
                    f"the similarity returned {tuple(given.shape)} for {len(asked)} masks, but "
                    f"score={self.rise.score!r} expects {('n', *wanted)}"
                )
            scores[rows == row] = given.to(scores)
        return scores

    def _frechet(self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """−(‖f₁ − f₂‖² + (s₁ − s₂)²) between features of the images decoded from the x0 that two answers predict.

        Both x0 are read at the unmasked R, so that the images differ by the answers alone.
        """
        extract = self.denoiser.features
        if extract is None:
            raise ValueError(
                f"the Fréchet similarity compares image features, and {self.denoiser.name} comes with no extractor: "
                "set denoiser.features to one"
            )

        def look(epsilon: Tensor) -> Tensor:
            alpha_bar = self.denoiser.schedule.at(self.timesteps[rows])
            x0 = (self.latents[rows] - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
            return extract(self.denoiser.decode(self.denoiser.schedule.limit(x0))).float()

        ours, reference = look(answers), look(self.references[rows])
        return -((ours - reference).square().sum(1) + (ours.std(1) - reference.std(1)).square())

    def _estimate(self, row: int, num_masks: int) -> tuple[Tensor, Tensor]:
        """The map of one row and its standard error."""
        if self.rise.estimates == "ridge":
            seed, step = int(self.seeds[row]), self.rows[row][1]
            return dfkernels.ridge(self.scores[row, :num_masks], seed, step, self.shape, **self.masks)
        sums = dfkernels.Sums(self.sums.moments[row : row + 1])
        saliency, error = dfkernels.estimate(sums, self.rise.estimates)
        return saliency[0], error[0]

    def _converged(self, saliency: Float[Tensor, "h w"], error: Float[Tensor, "h w"]) -> bool:
        assert self.rise.stop_at_error is not None
        return bool(error.mean() < self.rise.stop_at_error * (saliency.max() - saliency.min()))

    def _step_map(self, row: int, saliency: Float[Tensor, "h w"], error: Float[Tensor, "h w"]) -> StepMap:
        item, step = self.rows[row]
        if not saliency.isfinite().all():
            warnings.warn("a map is not finite: the similarity returned NaN or infinite scores", stacklevel=2)
        return StepMap(
            item=item,
            step=step,
            method=self.rise.name,
            saliency=saliency.float().cpu(),
            error=error.float().cpu(),
            scores=self.scores[row].cpu(),
        )
