"""The hot loop of the explainers that mask: masked forwards in full batches, and maps as soon as they are complete.

Nothing in the loop waits for the device except finished maps, and those are fetched one batch later.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import dfkernels
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import StepMap
from dfengine.runtime.batching import PADDING, AsyncHostCopy, in_batches

if TYPE_CHECKING:
    from dfengine.explain.rise import Rise

#: With an early stop, the standard error is checked after every so many masks.
MASKS_BETWEEN_CHECKS = 64


class MaskedForwards(ABC):
    """The masks of some steps of some items, batched: a row is one step of one item, an entry one mask of one row.

    A method that explains by masking says how latents are masked (`mask`), what is kept of the network's output for
    each mask (`accumulate`), and how a row's map is made of that (`estimate` on the device, `to_step_map` on the host).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        done: Collection[tuple[int, int]],
        *,
        name: str,
        num_masks: int,
        target: str,
        stop_at_error: float | None = None,
    ) -> None:
        """`done` has the (item, step) pairs whose maps are not needed."""
        jobs = [trajectory.job for trajectory in trajectories]
        self.rows = rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
        device = denoiser.device
        self.denoiser, self.name, self.num_masks, self.stop_at_error = denoiser, name, num_masks, stop_at_error
        self.pending = [row not in done for row in rows]
        self.latents = torch.stack([trajectories[i].latents[k] for i, k in rows])
        self.mask_seeds = [jobs[i].mask_seed for i, _ in rows]
        self.items = torch.tensor([i for i, _ in rows], device=device)
        self.steps = torch.tensor([k for _, k in rows], device=device)
        self.seeds = torch.tensor(self.mask_seeds, device=device)
        self.timesteps = torch.tensor([jobs[i].timesteps[k] for i, k in rows], device=device)
        self.explained = GuidedDenoiser(
            denoiser,
            Condition.cat([trajectory.prompt for trajectory in trajectories]),
            Condition.cat([trajectory.negative for trajectory in trajectories]),
            target,
            [job.guidance for job in jobs],
        )
        self.shape = denoiser.latent_shape[1:]
        # Both have a spare last row, which padded entries (row −1) write to: no branch, and no synchronisation.
        self.references = torch.empty((len(rows) + 1, *denoiser.latent_shape), device=device)
        self.scores = torch.full((len(rows) + 1, num_masks), torch.nan, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @abstractmethod
    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """R ⊙ M of each entry (row, index of the mask), channels-last; zeros for padding."""

    @abstractmethod
    def accumulate(
        self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Keep what the map needs of f(R ⊙ M), and return each mask's (mean) score."""

    @abstractmethod
    def estimate(self, row: int, num_masks: int) -> tuple[Tensor, ...]:
        """The tensors on the device that a row's map is made of after so many masks, besides its scores."""

    @abstractmethod
    def to_step_map(self, row: int, tensors: Sequence[Tensor], scores: Float[Tensor, " masks"]) -> StepMap:
        """A row's map from what `estimate` returned, on the CPU."""

    def converged(self, rows: Sequence[int], num_masks: int) -> set[int]:
        """The rows that need no more masks, asked with an early stop only."""
        return set()

    def compute_references(self, rows: Int[Tensor, " n"], _: range) -> None:
        """f(R) of some rows, which every masked output is compared with."""
        self.references[rows] = self.predict(self.latents[rows.clamp(min=0)], rows, None)

    def start(self) -> None:
        """Compute the references of all rows."""
        for _ in in_batches(len(self.rows), self.denoiser, self.compute_references):
            pass

    def run(self) -> Iterator[StepMap]:
        """The maps of all pending rows."""
        if not any(self.pending):
            return
        self.start()
        rows, total = list(range(len(self.rows))), self.num_masks
        if self.stop_at_error is None:
            yield from self.step_maps(self.run_masks(rows, 0, total), total)
            return
        for first in range(0, total, MASKS_BETWEEN_CHECKS):
            count = min(MASKS_BETWEEN_CHECKS, total - first)
            for _ in self.run_masks(rows, first, count):
                pass
            rows = [row for row in rows if self.pending[row]]
            converged = set(rows) if first + count == total else self.converged(rows, first + count)
            yield from self.step_maps([[row for row in rows if row in converged]], first + count)
            rows = [row for row in rows if row not in converged]
            if not rows:
                return

    def run_masks(self, active: Sequence[int], first: int, count: int) -> Iterator[list[int]]:
        """Evaluate the masks first … first + count − 1 of the active rows.

        Yields after each batch, which the device may still be working on, the pending rows that it completes. Rows that
        are not pending keep their place, so the batches of the others are bit for bit the same with and without them.
        (After the first round of an early stop they drop out, and sums agree to rounding.)
        """
        table = torch.tensor(active, device=self.denoiser.device)

        def rows_in(entries: range) -> Sequence[int]:
            return active[entries.start // count : -(-entries.stop // count)]

        def forward(entries: Int[Tensor, " n"], known: range) -> tuple[Tensor, Tensor, Tensor]:
            rows = torch.where(entries == PADDING, PADDING, table[entries.clamp(min=0) // count])
            indices = first + entries % count
            items = {self.rows[row][0] for row in rows_in(known)}
            return self.forward(rows, indices, items.pop() if len(items) == 1 else None), rows, indices

        def is_needed(entries: range) -> bool:
            return any(self.pending[row] for row in rows_in(entries))

        complete = 0
        for known, batch in in_batches(len(active) * count, self.denoiser, forward, is_needed):
            if batch is not None:
                # Only once the whole batch has succeeded: a sum cannot be taken back.
                with record_function("dfengine: scores"):
                    self.score(*batch)
            before, complete = complete, known.stop // count
            yield [row for row in active[before:complete] if self.pending[row]]

    def forward(
        self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """f(R ⊙ M) of one batch; `item` if all of it belongs to one item."""
        with record_function("dfengine: masks"):
            masked = self.mask(rows, indices)
        with record_function("dfengine: network"):
            return self.predict(masked, rows, item)

    def predict(
        self, masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """f of masked latents."""
        real = rows.clamp(min=0)
        return self.explained.epsilon(masked, self.timesteps[real], self.items[real] if item is None else item)

    def score(self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> None:
        """Accumulate a batch of outputs and store each mask's score."""
        self.scores[rows, indices] = self.accumulate(outputs, rows, indices).float()

    def step_maps(self, completed: Iterable[list[int]], num_masks: int) -> Iterator[StepMap]:
        """The maps of rows as batches complete them, copied to the host while the device works on the next batch."""

        def fetch(row: int, copy: AsyncHostCopy) -> StepMap:
            *tensors, scores = copy.wait()
            return self.to_step_map(row, tensors, scores)

        copies: list[tuple[int, AsyncHostCopy]] = []
        for rows in completed:
            yield from itertools.starmap(fetch, copies)
            with record_function("dfengine: maps"):
                copies = [
                    (row, AsyncHostCopy(*self.estimate(row, num_masks), self.scores[row], stream=self._stream))
                    for row in rows
                ]
        yield from itertools.starmap(fetch, copies)


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
            stop_at_error=rise.stop_at_error,
        )
        self.rise = rise
        self.masks: dict[str, Any] = {
            "keep_probability": rise.keep_probability,
            "kind": rise.mask_kind,
            "grid": rise.grid,
        }
        self.sums = dfkernels.Sums.zeros(len(self.rows), self.shape, denoiser.device)

    def predict(
        self, masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """ε, or for the Fréchet similarity the clean latents x0, whose images it compares."""
        if self.rise.similarity != "frechet":
            return super().predict(masked, rows, item)
        real = rows.clamp(min=0)
        return self.explained(masked, self.timesteps[real], self.items[real] if item is None else item).x0

    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        return dfkernels.apply_masks(self.latents, self.seeds, self.steps, rows, indices, **self.masks)

    def accumulate(
        self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        entries = (self.seeds, self.steps, rows, indices)
        if isinstance(self.rise.similarity, str) and self.rise.similarity != "frechet":
            return dfkernels.accumulate(
                outputs,
                self.references[:-1],
                self.sums,
                *entries,
                similarity=self.rise.similarity,
                score=self.rise.score,
                window=self.rise.window,
                sigma=self.rise.sigma,
                keep_probability=self.rise.keep_probability,
                mask_kind=self.rise.mask_kind,
                grid=self.rise.grid,
            )
        if self.rise.similarity == "frechet":
            scores = self._frechet(outputs, rows.clamp(min=0))
        else:
            scores = self._call_user_similarity(outputs, rows)
        return self.add(scores, rows, indices)

    def add(
        self, scores: Float[Tensor, " n *pixels"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Add scores to the sums of their rows; returns each mask's mean score."""
        dfkernels.add(self.sums, scores, self.seeds, self.steps, rows, indices, **self.masks)
        return scores.flatten(1).mean(1) if scores.ndim > 1 else scores

    def _call_user_similarity(self, outputs: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]) -> Tensor:
        """The caller's own similarity, called once for each row of the batch, without the padding."""
        assert callable(self.rise.similarity)
        shape = self.shape if self.rise.score == "local" else ()
        scores = outputs.new_full((len(rows), *shape), torch.nan)
        for row in rows[rows != PADDING].unique().tolist():
            some = outputs[rows == row]
            values = torch.as_tensor(self.rise.similarity(some, self.references[row]))
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
            return dfkernels.ridge(self.scores[row, :num_masks], seed, step, self.shape, **self.masks)
        sums = dfkernels.Sums(self.sums.moments[row : row + 1])
        saliency, error = dfkernels.estimate(sums, self.rise.resolved_estimator)
        return saliency[0], error[0]

    def converged(self, rows: Sequence[int], num_masks: int) -> set[int]:
        """The rows whose mean standard error is below `stop_at_error` times the standard deviation of their signal.

        The signal's variance is the map's, less what its errors add. A ridge of fewer masks than twice the pixels is
        still far from the map of many, whatever its errors.
        """
        height, width = self.shape
        if not rows or (self.rise.resolved_estimator == "ridge" and num_masks < 2 * height * width):
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
