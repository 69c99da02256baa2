"""What a call of a diffusers pipeline asked its networks at every step, and what the scheduler made of the answers.

Nothing is asked about the pipeline's class: torch's forward hooks see what the networks are given, and the one boundary
that all pipelines share is `scheduler.step`. What is recorded does not change the call, and nothing is left behind.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from dfengine.models.recorded.layout import images_of

#: Where diffusers has the networks that predict; a component of another place counts if it has one of these names.
_PACKAGES = ("diffusers.models.unets.", "diffusers.models.transformers.")
_NAMES = ("unet", "transformer")


@dataclass(frozen=True)
class State:
    """What a network's answer depends on besides its arguments and weights."""

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

    prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] = ()
    """as given: one for all images, one for each, or none"""
    seeds: Sequence[int] = ()
    """of the generators that it was given"""
    steps: list[Step] = field(default_factory=list)
    images: Sequence[UInt8[Tensor, "H W 3"]] = ()
    """that the pipeline returned; none if it returned latents"""
    decoded: Tensor | None = None
    """what the image codec was given last"""
    last_sample: Tensor | None = None
    """where the last step ended"""

    @property
    def nbytes(self) -> int:
        """The memory of all that is kept, each tensor once."""
        kept = [[forward.arguments, forward.output] for step in self.steps for forward in step.forwards]
        kept += [[step.sample, step.model_output] for step in self.steps]
        tensors = {id(one): one for one in leaves(kept)}
        return sum(one.numel() * one.element_size() for one in tensors.values())


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that predict, by name. Raises ValueError if there is none."""
    components = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {
        name: part
        for name, part in components.items()
        if type(unwrapped(part)).__module__.startswith(_PACKAGES) or name.split("_")[0] in _NAMES
    }
    if not found:
        raise ValueError(
            f"{type(pipeline).__name__} has no network to record: expected a component 'unet' or 'transformer', got "
            f"{', '.join(components) or 'no networks at all'}"
        )
    return found


def unwrapped(network: nn.Module) -> nn.Module:
    """The module itself of one that `torch.compile` has wrapped."""
    return getattr(network, "_orig_mod", network)


def processors_of(network: nn.Module) -> list[str]:
    """The classes of a network's attention processors, in order."""
    return [type(part.processor).__name__ for part in network.modules() if hasattr(part, "processor")]


@contextmanager
def recorded(pipeline: Any) -> Iterator[list[Call]]:
    """While inside, every call of the pipeline is recorded, in the list.

    Raises ValueError for a pipeline without networks or without a scheduler.
    """
    calls: list[Call] = []
    with ExitStack() as patches:
        recorder = _Recorder(calls)
        for name, network in networks_of(pipeline).items():
            signature = inspect.signature(type(unwrapped(network)).forward)
            before = functools.partial(recorder.before, name, signature)
            patches.callback(network.register_forward_pre_hook(before, with_kwargs=True).remove)
            after = functools.partial(recorder.after, name)
            patches.callback(network.register_forward_hook(after).remove)
        schedulers = [
            part for part in pipeline.components.values() if hasattr(part, "step") and hasattr(part, "config")
        ]
        if not schedulers:
            raise ValueError(
                f"{type(pipeline).__name__} has no scheduler, whose steps tell one prediction from the next"
            )
        for scheduler in schedulers:
            patches.enter_context(_wrapped(scheduler, "step", recorder.step))
        codec = pipeline.components.get("vae")
        if codec is not None:
            patches.enter_context(_wrapped(codec, "decode", recorder.decode))
        patches.enter_context(_called(pipeline, recorder.call))
        yield calls


@contextmanager
def _wrapped(owner: Any, name: str, record: Callable[..., Any]) -> Iterator[None]:
    """While inside, a method of one object is called through `record(method, *args, **kwargs)`."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return record(method, *args, **kwargs)

    had, own = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, wrapper)
    try:
        yield
    finally:
        object.__delattr__(owner, name)
        if had:
            object.__setattr__(owner, name, own)


@contextmanager
def _called(pipeline: Any, record: Callable[..., Any]) -> Iterator[None]:
    """While inside, the pipeline's call goes through `record(call, *args, **kwargs)`.

    Python looks up `__call__` in the class, so that one object's has to be that of a subclass, of the same name.
    """
    cls = type(pipeline)

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(functools.partial(cls.__call__, self), *args, **kwargs)

    names = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    pipeline.__class__ = type(cls.__name__, (cls,), names)
    try:
        yield
    finally:
        pipeline.__class__ = cls


class _Recorder:
    """Takes down what hooks and wrappers see."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = calls
        self._call: Call | None = None
        self._copies = _Copies()
        self._arguments: list[Mapping[str, Any]] = []
        self._forwards: list[Forward] = []

    def call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline; one inside another belongs to it. A call that fails is not kept."""
        if self._call is not None:
            return method(*args, **kwargs)
        self._forwards, self._arguments, self._copies = [], [], _Copies()
        self._call = call = Call()
        try:
            output = method(*args, **kwargs)
        finally:
            self._call = None
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        call.prompts, call.negative_prompts = _texts(given.get("prompt")), _texts(given.get("negative_prompt"))
        call.seeds, call.images = _seeds(given.get("generator")), images_of(output)
        self._calls.append(call)
        return output

    def before(self, name: str, signature: inspect.Signature, network: nn.Module, args: Any, kwargs: Any) -> None:
        """What a network is about to be given."""
        if self._call is None:
            return
        given = signature.bind(network, *args, **kwargs).arguments
        place = (name, len(self._forwards))
        self._arguments.append({key: self._copies.of(value, (*place, key)) for key, value in list(given.items())[1:]})

    def after(self, name: str, network: nn.Module, args: Any, output: Any) -> None:
        """What it answered."""
        if self._call is None:
            return
        place = (name, len(self._forwards), "output")
        inner = unwrapped(network)
        is_autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        state = State(inner.training, is_autocast, processors_of(inner))
        self._forwards.append(Forward(name, self._arguments.pop(), self._copies.of(first_of(output), place), state))

    def step(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """One step of the scheduler."""
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        sample, model_output = given["sample"].detach().clone(), given["model_output"].detach().clone()
        result = method(*args, **kwargs)
        if self._call is not None:
            forwards, self._forwards = tuple(self._forwards), []
            self._call.steps.append(Step(forwards, float(given["timestep"]), sample, model_output))
            self._call.last_sample = first_of(result).detach().clone()
        return result

    def decode(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """What the codec decodes."""
        result = method(*args, **kwargs)
        if self._call is not None:
            latents = args[0] if args else next(iter(kwargs.values()))
            self._call.decoded = latents.detach().clone()
        return result


class _Copies:
    """Copies of arguments, one of what does not change from step to step."""

    def __init__(self) -> None:
        #: The last copy at each place.
        self._last: dict[tuple[Any, ...], Tensor] = {}

    def of(self, value: Any, place: tuple[Any, ...]) -> Any:
        """A value whose tensors, lists and dicts are copies: networks change some of what they are given."""
        if isinstance(value, Tensor):
            last = self._last.get(place)
            if last is None or not _is_same(last, value):
                last = self._last[place] = value.detach().clone()
            return last
        if isinstance(value, dict):
            return {key: self.of(one, (*place, key)) for key, one in value.items()}
        if isinstance(value, list | tuple):
            parts = [self.of(one, (*place, at)) for at, one in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        return value


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _texts(given: Any) -> list[str]:
    several = given if isinstance(given, list | tuple) else [given]
    return [one for one in several if isinstance(one, str)]


def _seeds(given: Any) -> list[int]:
    several = given if isinstance(given, list | tuple) else [given]
    return [one.initial_seed() % 2**63 for one in several if isinstance(one, torch.Generator)]


def first_of(output: Any) -> Any:
    """The prediction of an output: a tensor or a list of them, of which tuples and diffusers' output classes have one.

    Flow transformers of lists return the list itself, in a tuple or not.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list):
        return output
    return first_of(output[0])


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


# In a file -----------------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """A recorded call as dicts, lists and tensors."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(one) for one in value)
    return value


def from_plain(value: Mapping[str, Any]) -> Call:
    """The call that `to_plain` was given."""

    def step(parts: Mapping[str, Any]) -> Step:
        return Step(**dict(parts) | {"forwards": tuple(forward(one) for one in parts["forwards"])})

    def forward(parts: Mapping[str, Any]) -> Forward:
        return Forward(**dict(parts) | {"state": State(**parts["state"])})

    return Call(**dict(value) | {"steps": [step(one) for one in value["steps"]]})
