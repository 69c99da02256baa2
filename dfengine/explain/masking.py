"""The hot loop of the explainers that mask: masked forwards in full batches, and maps as soon as they are complete.

Nothing in the loop waits for the device except finished maps, and those are fetched one batch later.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from dfkernels import reference
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import StepMap
from dfengine.runtime.batching import PADDING, AsyncHostCopy, in_batches

#: With an early stop, the standard error is checked after so many masks, or as many more as complete a design.
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
        output: str = "epsilon",
        stop_at_error: float | None = None,
    ) -> None:
        """`done` has the (item, step) pairs whose maps are not needed; `output` is what is compared, ε or x0."""
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
        self.is_output = denoiser.schedule.is_output(output)
        self.reading = torch.stack(denoiser.schedule.reading(output, self.timesteps), 1).view(-1, 2).float()
        # Both have a spare last row, which padded entries (row −1) write to: no branch, and no synchronisation.
        self.references = torch.empty((len(rows) + 1, *denoiser.latent_shape), device=device)
        self.scores = torch.full((len(rows) + 1, num_masks), torch.nan, device=device)
        self.masks_between_checks = MASKS_BETWEEN_CHECKS
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @abstractmethod
    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """R ⊙ M of each entry (row, index of the mask), channels-last; zeros for padding."""

    @abstractmethod
    def accumulate(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """Keep what the map needs of f(R ⊙ M) and R ⊙ M, and return each mask's (mean) score."""

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
        """What f(R) of some rows says, which every masked forward is compared with."""
        latents = self.latents[rows.clamp(min=0)]
        self.references[rows] = self.read(self.predict(latents, rows, None), latents, rows)

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
        for first in range(0, total, self.masks_between_checks):
            count = min(self.masks_between_checks, total - first)
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

        def forward(entries: Int[Tensor, " n"], known: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            rows = torch.where(entries == PADDING, PADDING, table[entries.clamp(min=0) // count])
            indices = first + entries % count
            items = {self.rows[row][0] for row in rows_in(known)}
            return *self.forward(rows, indices, items.pop() if len(items) == 1 else None), rows, indices

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
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """f(R ⊙ M) and R ⊙ M of one batch; `item` if all of it belongs to one item."""
        with record_function("dfengine: masks"):
            masked = self.mask(rows, indices)
        with record_function("dfengine: network"):
            return self.predict(masked, rows, item), masked

    def predict(
        self, masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], item: int | None
    ) -> Float[Tensor, "n c h w"]:
        """f of masked latents: the network's own output."""
        real = rows.clamp(min=0)
        return self.explained.output(masked, self.timesteps[real], self.items[real] if item is None else item)

    def read(
        self, outputs: Float[Tensor, "n c h w"], masked: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """ε or x0, as the settings say, of outputs and the network's inputs."""
        if self.is_output:
            return outputs.float()
        return reference.read(outputs, masked, self.reading, rows.clamp(min=0))

    def score(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> None:
        """Accumulate a batch of outputs and store each mask's score."""
        self.scores[rows, indices] = self.accumulate(outputs, masked, rows, indices).float()

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
