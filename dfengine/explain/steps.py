"""What explainers share that evaluate each step once: batches across steps and items, and loss scaling."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.runtime.batching import in_batches

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A backward pass keeps activations that a forward alone frees, so its batches begin this many times smaller.
_BATCH_DIVISOR = 4
#: Where float16 gradients overflow, the loss is scaled down by this factor, so many times at most.
_BACKOFF, _MAX_BACKOFFS = 16, 5


@dataclass
class Steps:
    """A batch of steps of some items. Samples do not interact: a step's result does not depend on its batch."""

    latents: Float[Tensor, "n c h w"]
    """R_t"""
    timesteps: Shaped[Tensor, " n"]
    items: Int[Tensor, " n"]
    """the index of each step's trajectory"""
    condition: Condition
    """of each step's prompt"""


@dataclass
class _Batches:
    """A batch size of its own, so that running out of memory here does not shrink the batches of masks."""

    batch_size: int
    device: torch.device


def by_steps(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    done: Collection[tuple[int, int]],
    compute: Callable[[Steps], Mapping[str, Tensor]],
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Call `compute` on the steps of all trajectories in batches; yields item, step and its tensors, on the CPU.

    `compute` returns tensors with the steps along the first axis. Batches do not depend on `done`, so that an
    interrupted run ends in the same bits.
    """
    rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
    device = denoiser.device
    conditions = Condition.cat([path.prompt for path in trajectories])

    def run(_: Tensor, known: range) -> dict[str, Tensor]:
        batch = [rows[row] for row in known]
        items = torch.tensor([i for i, _ in batch], device=device)
        steps = Steps(
            torch.stack([trajectories[i].latents[k] for i, k in batch]),
            torch.tensor([trajectories[i].job.timesteps[k] for i, k in batch], device=device),
            items,
            conditions[items],
        )
        return {name: value.cpu() for name, value in compute(steps).items()}

    def is_needed(known: range) -> bool:
        return any(rows[row] not in done for row in known)

    batches = _Batches(max(1, denoiser.batch_size // _BATCH_DIVISOR), device)
    for known, tensors in in_batches(len(rows), batches, run, is_needed):
        for place, row in enumerate(known):
            if tensors is not None and rows[row] not in done:
                yield *rows[row], {name: value[place] for name, value in tensors.items()}


def check_loss_scale(loss_scale: float) -> None:
    """Raises ValueError if the loss scale is not finite and positive."""
    if not 0 < loss_scale < float("inf"):
        raise ValueError(f"loss_scale {loss_scale} is not possible: expected a finite number above 0")


def with_loss_scaling(
    dtype: torch.dtype, loss_scale: float, compute: Callable[[float], T], tensors: Callable[[T], Iterable[Tensor]]
) -> T:
    """What `compute` returns for a loss scale: 1, or in float16 the given one, lowered while `tensors` overflow."""
    scale = loss_scale if dtype == torch.float16 else 1.0
    result = compute(scale)
    for _ in range(_MAX_BACKOFFS if dtype == torch.float16 else 0):
        if all(part.isfinite().all() for part in tensors(result)):
            break
        scale /= _BACKOFF
        log.info("gradients overflow in float16: their loss is scaled by %g", scale)
        result = compute(scale)
    return result
