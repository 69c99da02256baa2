"""What a call of a pipeline is recorded as, in memory and in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dfengine.diffusion.path import NoiseSchedule


@dataclass(frozen=True)
class State:
    """What a network's output depends on besides its arguments and weights."""

    is_training: bool
    has_autocast: bool
    processors: Sequence[str]
    """the classes of its attention processors"""


@dataclass(frozen=True)
class Forward:
    """One call of a network."""

    network: str
    """the component's name in the pipeline"""
    arguments: Mapping[str, Any]
    """by the name of the forward's parameters"""
    output: Any
    """a tensor, or a list of tensors"""
    state: State

    @property
    def inputs(self) -> tuple[str, Any]:
        """The name and value of the first argument, which has the latent."""
        return next(iter(self.arguments.items()))


@dataclass(frozen=True)
class Step:
    """One step of the scheduler, and the networks' calls since the one before."""

    forwards: tuple[Forward, ...]
    timestep: float
    sample: Tensor
    """what the scheduler stepped from"""
    model_output: Tensor
    """what the pipeline made of the networks' outputs"""


@dataclass
class Call:
    """One call of a pipeline."""

    pipeline: str
    """its class"""
    prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] = ()
    """as given: one for all images, one for each, or none"""
    seeds: Sequence[int] = ()
    """of the generators that it was given"""
    schedule: NoiseSchedule | None = None
    steps: list[Step] = field(default_factory=list)
    images: Sequence[UInt8[Tensor, "H W 3"]] = ()
    """that the pipeline returned; none if it returned latents"""
    decoded: Tensor | None = None
    """what the image codec was given last"""
    codec: str | None = None
    """the component that decoded it"""
    last_sample: Tensor | None = None
    """where the last step ended"""
    weights: str = ""
    """the networks' fingerprint at the end of the call"""
    failure: str | None = None
    """why the call could not be recorded"""

    @property
    def nbytes(self) -> int:
        """The memory of all that is kept, each tensor once."""
        kept: list[Any] = [self.images, self.decoded, self.last_sample]
        kept += [[step.sample, step.model_output] for step in self.steps]
        kept += [[forward.arguments, forward.output] for step in self.steps for forward in step.forwards]
        tensors = {id(one): one for one in leaves(kept)}
        return sum(one.numel() * one.element_size() for one in tensors.values())


def first_of(output: Any) -> Any:
    """The prediction in what a network returns: a tensor, or a list of them, alone or first in a tuple."""
    return output if isinstance(output, Tensor | list) else first_of(output[0])


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from leaves(one)


def kept_steps(call: Call) -> list[Step]:
    """The steps of a call, those at one time-step once. Raises ValueError if there is none, or none could be recorded.

    Samplers of second order try a step, and take it from what they predict at its end: the first of two predictions at
    one time-step is of the trial.
    """
    if call.failure is not None:
        raise ValueError(call.failure)
    steps: list[Step] = []
    is_doubled = _is_doubled(call)
    for step in call.steps:
        if not step.forwards:
            continue
        if steps and step.timestep > steps[-1].timestep:
            raise ValueError("the call goes from the image to noise: only calls that go to the image can be explained")
        if steps and step.timestep == steps[-1].timestep:
            steps.pop()
        steps.append(_first_half(step) if is_doubled else step)
    if not steps:
        raise ValueError("the call took no step with a network: there is nothing to explain")
    return steps


def _is_doubled(call: Call) -> bool:
    """Whether the scheduler steps every image twice, as DiT's does: once for each half of the guidance."""

    def has_equal_halves(values: Tensor) -> bool:
        return len(values) == 2 * len(call.images) and torch.equal(*values.chunk(2))

    return all(has_equal_halves(value) for step in call.steps for value in (step.sample, step.model_output))


def _first_half(step: Step) -> Step:
    half = len(step.sample) // 2
    return dataclasses.replace(step, sample=step.sample[:half], model_output=step.model_output[:half])


def to_plain(value: Any) -> Any:
    """A recorded call as dicts, lists, numbers and tensors. Raises ValueError for an argument of another kind."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_plain(getattr(value, one.name)) for one in dataclasses.fields(value) if one.init}
    if isinstance(value, Mapping):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(one) for one in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if value is None or isinstance(value, Tensor | str | int | float | torch.dtype | torch.device):
        return value
    raise ValueError(
        f"the network was given a {type(value).__name__}, which cannot be saved: explain the call as it is"
    )


def from_plain(value: Mapping[str, Any]) -> Call:
    """The call that `to_plain` was given."""

    def step(parts: Mapping[str, Any]) -> Step:
        return Step(**dict(parts) | {"forwards": tuple(forward(one) for one in parts["forwards"])})

    def forward(parts: Mapping[str, Any]) -> Forward:
        return Forward(**dict(parts) | {"state": State(**parts["state"])})

    schedule = None if value["schedule"] is None else NoiseSchedule(**value["schedule"])
    return Call(**dict(value) | {"steps": [step(one) for one in value["steps"]], "schedule": schedule})
