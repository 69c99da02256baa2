"""What the explainers share that ask once about a step: steps of all items in batches, and gradients within range."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.runtime.batching import in_batches

log = logging.getLogger(__name__)

T = TypeVar("T")

#: A backward pass keeps what a forward alone lets go of: it begins with batches so many times smaller.
_SHARE = 4
#: While gradients are beyond float16 their target is made so many times smaller, so often at most.
_SMALLER, _TRIES = 16, 5


@dataclass
class Steps:
    """Some steps of some items, each of which is done by itself whatever is in a batch with it."""

    latents: Float[Tensor, "n c h w"]
    """R_t"""
    timesteps: Shaped[Tensor, " n"]
    items: Int[Tensor, " n"]
    """whose trajectory each is of"""


@dataclass
class _Batches:
    """Their own size, so that running out of memory here does not make the masks' batches smaller."""

    batch_size: int
    device: torch.device


def by_steps(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    done: Collection[tuple[int, int]],
    work: Callable[[Steps], Mapping[str, Tensor]],
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """Do some work on the steps of all trajectories: yields item, step and what `work` made of it, on the CPU.

    `work` returns tensors with the steps along the first axis. Batches are the same whatever is in `done`, so that a
    run that was cut off ends in the same bits.
    """
    rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
    device = denoiser.device

    def run(_: Tensor, known: range) -> dict[str, Tensor]:
        chosen = [rows[row] for row in known]
        steps = Steps(
            torch.stack([trajectories[i].latents[k] for i, k in chosen]),
            torch.tensor([trajectories[i].job.timesteps[k] for i, k in chosen], device=device),
            torch.tensor([i for i, _ in chosen], device=device),
        )
        return {name: value.cpu() for name, value in work(steps).items()}

    def needed(known: range) -> bool:
        return any(rows[row] not in done for row in known)

    batches = _Batches(max(1, denoiser.batch_size // _SHARE), device)
    for known, made in in_batches(len(rows), batches, run, needed):
        for place, row in enumerate(known):
            if made is not None and rows[row] not in done:
                yield *rows[row], {name: value[place] for name, value in made.items()}


def check_scale(scale: float) -> None:
    """Raise ValueError for a scale that gradients cannot have."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale {scale} is not possible: expected a finite number above 0")


def in_range(
    dtype: torch.dtype, scale: float, compute: Callable[[float], T], told: Callable[[T], Iterable[Tensor]]
) -> T:
    """What `compute` makes with gradients of a target times a scale: 1, but in float16 the given one.

    Where a tensor that is `told` of the result is not finite, it is computed again with a smaller scale.
    """
    scale = scale if dtype == torch.float16 else 1.0
    result = compute(scale)
    for _ in range(_TRIES if dtype == torch.float16 else 0):
        if all(part.isfinite().all() for part in told(result)):
            break
        scale /= _SMALLER
        log.info("gradients overflow in float16: their target is scaled by %g", scale)
        result = compute(scale)
    return result
