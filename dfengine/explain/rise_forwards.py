"""DF-RISE's hot loop: masked forwards, their scores, and the maps that the sums of those give."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import dfkernels
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import StepMap
from dfengine.explain.masking import MASKS_BETWEEN_CHECKS, MaskedForwards
from dfengine.runtime.batching import PADDING

if TYPE_CHECKING:
    from dfengine.explain.rise import Rise


class RiseForwards(MaskedForwards):
    """DF-RISE: similarity scores, summed over the masks of each row."""

    def __init__(
        self,
        rise: Rise,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        done: Collection[tuple[int, int]] = (),
    ) -> None:
        super().__init__(
            denoiser,
            trajectories,
            done,
            name=rise.name,
            num_masks=rise.num_masks,
            target=rise.target,
            output=rise.resolved_output,
            stop_at_error=rise.stop_at_error,
        )
        self.rise = rise
        self.distribution = rise.distribution(self.shape)
        size = self.distribution.randomisation
        self.masks_between_checks = size * -(-MASKS_BETWEEN_CHECKS // size) if size else MASKS_BETWEEN_CHECKS
        count = -(-rise.num_masks // size) if size else 0
        self.sums = dfkernels.Sums.zeros(len(self.rows), self.shape, denoiser.device, randomisations=count)
        self.fill = self._fill(trajectories) if rise.fill == "noise" else None
        self.outputs = torch.empty_like(self.references) if rise.baseline == "frozen" else None

    def _fill(self, trajectories: Sequence[Trajectory]) -> Float[Tensor, "rows c_and_one"]:
        """a·c and b of each row: the mean and the scale of a noisy latent without content."""
        paths = [(trajectories[i], k) for i, k in self.rows]
        means = torch.stack([path.signal[k] * path.mean_colour for path, k in paths])
        return torch.cat([means, torch.stack([path.noise[k] for path, k in paths])[:, None]], 1)

    def predict(
        self, masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output, or what a null baseline has in its place."""
        if self.rise.baseline == "identity":
            return masked
        return super().predict(masked, rows, item) if self.outputs is None else self.outputs[rows]

    def compute_references(self, rows: Int[Tensor, " n"], known: range) -> None:
        if self.outputs is not None:
            self.outputs[rows] = super().predict(self.latents[rows.clamp(min=0)], rows, None).float()
        super().compute_references(rows, known)

    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        return dfkernels.apply_masks(
            self.latents, self.seeds, self.steps, rows, indices, self.distribution, fill=self.fill
        )

    def accumulate(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        if isinstance(self.rise.similarity, str) and self.rise.similarity != "frechet":
            return dfkernels.accumulate(
                outputs,
                self.references[:-1],
                self.sums,
                self.seeds,
                self.steps,
                rows,
                indices,
                self.distribution,
                similarity=self.rise.similarity,
                score=self.rise.score,
                window=self.rise.window,
                sigma=self.rise.sigma,
                inputs=None if self.is_output else masked,
                reading=None if self.is_output else self.reading,
            )
        compared = self.read(outputs, masked, rows)
        if self.rise.similarity == "frechet":
            scores = self._frechet(compared, rows.clamp(min=0))
        else:
            scores = self._call_user_similarity(compared, rows)
        return self.add(scores, rows, indices)

    def add(
        self, scores: Float[Tensor, " n *pixels"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Add scores to the sums of their rows; returns each mask's mean score."""
        dfkernels.add(self.sums, scores, self.seeds, self.steps, rows, indices, self.distribution)
        return scores.flatten(1).mean(1) if scores.ndim > 1 else scores

    def _call_user_similarity(self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]) -> Tensor:
        """The caller's own similarity, called once for each row of the batch, without the padding."""
        assert callable(self.rise.similarity)
        shape = self.shape if self.rise.score == "local" else ()
        scores = outputs.new_full((len(rows), *shape), torch.nan)
        for row in rows[rows != PADDING].unique().tolist():
            some = outputs[rows == row]
            values = self.rise.similarity(some, self.references[row])
            if not isinstance(values, Tensor):
                raise TypeError(f"the similarity returned {type(values).__name__}, expected a tensor of scores")
            if values.shape != (len(some), *shape):
                raise ValueError(
                    f"the similarity returned {tuple(values.shape)} for {len(some)} masks, but "
                    f"score={self.rise.score!r} expects {('n', *shape)}"
                )
            scores[rows == row] = values.to(scores)
        return scores

    def _frechet(self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """−(‖f₁ − f₂‖² + (s₁ − s₂)²) of features of the images decoded from two x0."""
        extract = self.denoiser.features
        assert extract is not None

        def features(x0: Tensor) -> Tensor:
            return extract(self.denoiser.decode(self.denoiser.schedule.threshold_x0(x0))).float()

        masked, reference = features(outputs), features(self.references[rows])
        return -((masked - reference).square().sum(1) + (masked.std(1) - reference.std(1)).square())

    def estimate(self, row: int, num_masks: int) -> tuple[Tensor, ...]:
        """The map and its standard error."""
        if self.rise.resolved_estimator == "ridge":
            seed, step = self.mask_seeds[row], self.rows[row][1]
            return dfkernels.ridge(self.scores[row, :num_masks], seed, step, self.shape, self.distribution)
        count = self.sums.randomisations
        rows = slice(row * count, (row + 1) * count) if count else slice(row, row + 1)
        sums = dfkernels.Sums(self.sums.moments[rows], count)
        saliency, error = dfkernels.estimate(sums, self.rise.resolved_estimator)
        return saliency[0], error[0]

    def converged(self, rows: Sequence[int], num_masks: int) -> set[int]:
        """The rows whose mean standard error is below `stop_at_error` times the standard deviation of their signal.

        The signal's variance is the map's, less what its errors add. A ridge of fewer masks than twice the cells is
        still far from the map of many, whatever its errors.
        """
        if not rows or num_masks < self.rise.min_masks(self.shape):
            return set()
        estimates = [self.estimate(row, num_masks) for row in rows]
        below = torch.stack([relative_error(*one) for one in estimates]) < torch.tensor(self.stop_at_error)
        return {row for row, is_below in zip(rows, below.tolist(), strict=True) if is_below}

    def to_step_map(self, row: int, tensors: Sequence[Tensor], scores: Float[Tensor, " masks"]) -> StepMap:
        (item, step), (saliency, error) = self.rows[row], tensors
        if not saliency.isfinite().all():
            warnings.warn("a map is not finite: the similarity returned NaN or infinite scores", stacklevel=2)
        return StepMap(item, step, self.name, saliency=saliency.float(), error=error.float(), scores=scores)


def relative_error(saliency: Float[Tensor, "h w"], error: Float[Tensor, "h w"]) -> Float[Tensor, ""]:
    """The mean standard error as a share of the signal's standard deviation: ∞ where a map is nothing but noise."""
    signal = (saliency.var() - error.square().mean()).clamp(min=0).sqrt()
    return error.mean() / signal
