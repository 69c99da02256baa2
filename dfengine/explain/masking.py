"""The hot loop of DF-RISE: masked forwards in full batches, their scores, and the maps as they are completed.

Nothing in it waits for the device but the finished maps, and those are waited for one batch later.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import dfkernels
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import StepMap
from dfengine.explain.rise_settings import RiseSettings
from dfengine.runtime.batching import PADDING, AsyncHostCopy, in_batches

#: With an early stop, the standard error is looked at after every so many masks.
MASKS_BETWEEN_CHECKS = 64


class Masking:
    """The running sums of one call: a row is one step of one item, an entry one mask of one row."""

    def __init__(
        self,
        rise: RiseSettings,
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
        self.mask_seeds = [jobs[i].mask_seed for i, _ in rows]
        self.items = column([i for i, _ in rows])
        self.steps = column([k for _, k in rows])
        self.seeds = column(self.mask_seeds)
        self.timesteps = torch.tensor([jobs[i].timesteps[k] for i, k in rows], device=denoiser.device)
        self.explained = GuidedDenoiser(
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
        self.stream = torch.cuda.Stream(denoiser.device) if denoiser.device.type == "cuda" else None
        for _ in in_batches(len(rows), denoiser, self._refer):
            pass

    def run(self) -> Iterator[StepMap]:
        """Rounds of masks over the rows that still want some; without an early stop there is one round."""
        total = self.rise.num_masks
        if self.rise.stop_at_error is None:
            yield from self.step_maps(self._round(range(len(self.rows)), 0, total), total)
            return
        active = list(range(len(self.rows)))
        for first in range(0, total, MASKS_BETWEEN_CHECKS):
            count = min(MASKS_BETWEEN_CHECKS, total - first)
            for _ in self._round(active, first, count):
                pass
            active = [row for row in active if self.wanted[row]]
            sure = set(active if first + count == total else self._sure(active, first + count))
            yield from self.step_maps([[row for row in active if row in sure]], first + count)
            active = [row for row in active if row not in sure]
            if not active:
                return

    def _round(self, active: Sequence[int], first: int, count: int) -> Iterator[list[int]]:
        """Measure the masks first … first + count − 1 of the active rows.

        Yields after each batch, which the device may still be working on, the wanted rows that it completes. Rows that
        are done keep their place: the batches of the others are the same as without them, to the bit. (After an early
        stop's first round they drop out, and sums agree to rounding.)
        """
        table = torch.tensor(active, dtype=torch.int64, device=self.denoiser.device)

        def touched(entries: range) -> Sequence[int]:
            return active[entries.start // count : -(-entries.stop // count)]

        def measure(entries: Int[Tensor, " n"], known: range) -> tuple[Tensor, Tensor, Tensor]:
            rows = torch.where(entries == PADDING, PADDING, table[entries.clamp(min=0) // count])
            indices = first + entries % count
            items = {self.rows[row][0] for row in touched(known)}
            return self.measure(rows, indices, items.pop() if len(items) == 1 else None), rows, indices

        def needed(entries: range) -> bool:
            return any(self.wanted[row] for row in touched(entries))

        seen = 0
        for known, measured in in_batches(len(active) * count, self.denoiser, measure, needed):
            if measured is not None:
                # Not before the batch is whole: what is added cannot be taken back.
                with record_function("dfengine: scores"):
                    self.score(*measured)
            complete = known.stop // count
            yield [row for row in active[seen:complete] if self.wanted[row]]
            seen = complete

    def _refer(self, rows: Int[Tensor, " n"], _: range) -> None:
        """f(R) of some rows, the answer that every masked one is compared with."""
        real = rows.clamp(min=0)
        self.references[rows] = self.explained.epsilon(self.latents[real], self.timesteps[real], self.items[real])

    def measure(
        self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """f(R ⊙ M) of one batch; `item` if it is of one item only."""
        with record_function("dfengine: masks"):
            masked = self.mask(rows, indices)
        with record_function("dfengine: network"):
            return self.answer(masked, rows, item)

    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """R ⊙ M, channels-last; zeros for padding."""
        return dfkernels.blend(self.latents, self.seeds, self.steps, rows, indices, **self.masks)

    def answer(
        self, masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """f(R ⊙ M)."""
        real = rows.clamp(min=0)
        return self.explained.epsilon(masked, self.timesteps[real], self.items[real] if item is None else item)

    def score(self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> None:
        """Add each mask's scores to the sums, and keep its mean score."""
        self.scores[rows, indices] = self._accumulate(answers, rows, indices).float()

    def _accumulate(
        self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        where = (self.seeds, self.steps, rows, indices)
        if isinstance(self.rise.similarity, str) and self.rise.similarity != "frechet":
            return dfkernels.accumulate(
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
        frechet = self.rise.similarity == "frechet"
        scores = self._frechet(answers, rows.clamp(min=0)) if frechet else self._ask(answers, rows)
        dfkernels.add(self.sums, scores, *where, **self.masks)
        return scores.flatten(1).mean(1) if scores.ndim > 1 else scores

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
        assert extract is not None

        def look(epsilon: Tensor) -> Tensor:
            a, b = self.denoiser.schedule.coefficients(self.timesteps[rows])
            x0 = (self.latents[rows] - b * epsilon) / a
            return extract(self.denoiser.decode(self.denoiser.schedule.threshold_x0(x0))).float()

        ours, reference = look(answers), look(self.references[rows])
        return -((ours - reference).square().sum(1) + (ours.std(1) - reference.std(1)).square())

    def _estimate(self, row: int, num_masks: int) -> tuple[Tensor, ...]:
        """The map of one row and its standard error."""
        if self.rise.estimates == "ridge":
            seed, step = self.mask_seeds[row], self.rows[row][1]
            return dfkernels.ridge(self.scores[row, :num_masks], seed, step, self.shape, **self.masks)
        sums = dfkernels.Sums(self.sums.moments[row : row + 1])
        saliency, error = dfkernels.estimate(sums, self.rise.estimates)
        return saliency[0], error[0]

    def _sure(self, rows: Sequence[int], num_masks: int) -> list[int]:
        """Those rows whose mean standard error is below `stop_at_error` of their map's range."""
        assert self.rise.stop_at_error is not None
        shares = []
        for row in rows:
            saliency, error = self._estimate(row, num_masks)
            shares.append(error.mean() / (saliency.max() - saliency.min()))
        below = torch.stack(shares) < self.rise.stop_at_error if shares else torch.zeros(0)
        return [row for row, is_sure in zip(rows, below.tolist(), strict=True) if is_sure]

    def step_maps(self, completed: Iterable[list[int]], num_masks: int) -> Iterator[StepMap]:
        """The maps of rows, told of as batches complete them: fetched while the device works on the next batch."""
        coming: list[tuple[int, AsyncHostCopy]] = []
        for rows in completed:
            yield from itertools.starmap(self._step_map, coming)
            with record_function("dfengine: maps"):
                coming = [
                    (row, AsyncHostCopy(*self._estimate(row, num_masks), self.scores[row], stream=self.stream))
                    for row in rows
                ]
        yield from itertools.starmap(self._step_map, coming)

    def _step_map(self, row: int, download: AsyncHostCopy) -> StepMap:
        item, step = self.rows[row]
        saliency, error, scores = download.wait()
        if not saliency.isfinite().all():
            warnings.warn("a map is not finite: the similarity returned NaN or infinite scores", stacklevel=2)
        return StepMap(item, step, self.rise.name, saliency=saliency.float(), error=error.float(), scores=scores)
