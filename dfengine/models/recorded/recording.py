"""Recording what a call of a diffusers pipeline asks its networks at every step, and what the scheduler makes of it.

Nothing is asked about the pipeline's class: torch's forward hooks see what the networks are given, and the one boundary
that all pipelines share is `scheduler.step`. What is recorded does not change the call, and nothing is left behind.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfengine.diffusion.fingerprint import fingerprint
from dfengine.models.recorded.call import Call, Forward, State, Step, first_of
from dfengine.models.recorded.layout import images_of
from dfengine.models.scheduler import path_of

#: Where diffusers has the networks that predict; a component of another place counts if it has one of these names.
_PACKAGES = ("diffusers.models.unets.", "diffusers.models.transformers.")
_NAMES = ("unet", "transformer")


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that predict, by name. Raises ValueError if there is none."""
    if isinstance(pipeline, type) or not isinstance(getattr(pipeline, "components", None), Mapping):
        given = pipeline.__name__ if isinstance(pipeline, type) else type(pipeline).__name__
        what = "a class" if isinstance(pipeline, type) else "no diffusers pipeline"
        raise ValueError(f"{given} is {what}: give the pipeline object whose call to explain")
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
    networks_of(pipeline)
    if not _schedulers_of(pipeline):
        raise ValueError(
            f"{type(pipeline).__name__} has no scheduler, whose steps separate one prediction from the next"
        )
    calls: list[Call] = []
    with _patched_method(pipeline, "__call__", _Recorder(pipeline, calls).call):
        yield calls


def _schedulers_of(pipeline: Any) -> list[Any]:
    return [part for part in pipeline.components.values() if hasattr(part, "step") and hasattr(part, "config")]


def _codecs_of(pipeline: Any) -> dict[str, nn.Module]:
    """The image codecs: vae, vqvae, movq."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and hasattr(part, "decode")}


@contextmanager
def _patched_method(owner: Any, name: str, record: Callable[..., Any]) -> Iterator[None]:
    """While inside, a method of one object is called through `record(method, *args, **kwargs)`.

    Its class is replaced by a subclass of the same name: Python looks up `__call__` there, and a copy of the object has
    its own method.
    """
    cls = type(owner)
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return record(functools.partial(original, self), *args, **kwargs)

    names = {name: method, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    owner.__class__ = type(cls.__name__, (cls,), names)
    try:
        yield
    finally:
        owner.__class__ = cls


@contextmanager
def _patched_attribute(owner: Any, name: str, record: Callable[..., Any]) -> Iterator[None]:
    """While inside, a function that is an attribute of one object is called through `record(function, …)`."""
    function, own = getattr(owner, name), vars(owner)
    had, before = name in own, own.get(name)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return record(function, *args, **kwargs)

    object.__setattr__(owner, name, wrapper)
    try:
        yield
    finally:
        object.__delattr__(owner, name)
        if had:
            object.__setattr__(owner, name, before)


def _noted(take: Callable[..., None]) -> Callable[..., None]:
    """A method that takes down a part of the call, if one is being recorded; what it raises is kept, not raised."""

    @functools.wraps(take)
    def noted(self: _Recorder, *args: Any) -> None:
        call = self.current
        if call is None or call.failure is not None:
            return
        try:
            take(self, call, *args)
        except ValueError as error:
            call.failure = str(error)
        except Exception as error:  # whatever an unusual pipeline makes of it: the call itself goes on
            call.failure = f"the call could not be recorded ({type(error).__name__}: {error})"

    return noted


class _Recorder:
    """Takes down what hooks and wrappers see."""

    def __init__(self, pipeline: Any, calls: list[Call]) -> None:
        self.current: Call | None = None
        self._pipeline, self._calls, self._copies = pipeline, calls, _Copies()
        self._arguments: list[Mapping[str, Any]] = []
        self._forwards: list[Forward] = []

    def call(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the pipeline; one inside another belongs to it. A call that fails is not kept."""
        if self.current is not None:
            return method(*args, **kwargs)
        self._forwards, self._arguments, self._copies = [], [], _Copies()
        with ExitStack() as patches:
            self._patch(patches)
            self.current = call = Call(type(self._pipeline).__name__)
            try:
                output = method(*args, **kwargs)
                self._finish(method, args, kwargs, output)
            finally:
                self.current = None
        self._calls.append(call)
        return output

    def _patch(self, patches: ExitStack) -> None:
        """Hook the networks, schedulers and codecs that the pipeline has now."""
        for name, network in networks_of(self._pipeline).items():
            signature = inspect.signature(type(unwrapped(network)).forward)
            if network._compiled_call_impl is not None:  # compiled in place, hooks included
                forward = functools.partial(self.forward, name, signature, network)
                patches.enter_context(_patched_attribute(network, "_compiled_call_impl", forward))
                continue
            before, after = functools.partial(self.before, name, signature), functools.partial(self.after, name)
            patches.callback(network.register_forward_pre_hook(before, with_kwargs=True).remove)
            patches.callback(network.register_forward_hook(after).remove)
        for scheduler in _schedulers_of(self._pipeline):
            patches.enter_context(_patched_method(scheduler, "step", functools.partial(self.step, scheduler)))
        for name, codec in _codecs_of(self._pipeline).items():
            patches.enter_context(_patched_attribute(codec, "decode", functools.partial(self.decode, name)))

    def before(self, name: str, signature: inspect.Signature, network: nn.Module, args: Any, kwargs: Any) -> None:
        """A hook of what a network is about to be given."""
        self._take_arguments(name, signature, network, args, kwargs)

    def after(self, name: str, network: nn.Module, _: Any, output: Any) -> None:
        """A hook of what it returns."""
        self._take_output(name, network, output)

    def forward(
        self, name: str, signature: inspect.Signature, network: nn.Module, compiled: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A call of a network that was compiled in place."""
        self._take_arguments(name, signature, network, args, kwargs)
        output = compiled(*args, **kwargs)
        self._take_output(name, network, output)
        return output

    def step(self, scheduler: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        """One step of the scheduler."""
        self._take_step(scheduler, method, args, kwargs)
        result = method(*args, **kwargs)
        self._take_next(result)
        return result

    def decode(self, name: str, method: Any, *args: Any, **kwargs: Any) -> Any:
        """What a codec decodes."""
        self._take_decoded(name, args[0] if args else next(iter(kwargs.values()), None))
        return method(*args, **kwargs)

    @_noted
    def _take_arguments(
        self, call: Call, name: str, signature: inspect.Signature, network: nn.Module, args: Any, kwargs: Any
    ) -> None:
        given = signature.bind(network, *args, **kwargs).arguments
        place = (name, len(self._forwards))
        self._arguments.append({key: self._copies.of(value, (*place, key)) for key, value in list(given.items())[1:]})

    @_noted
    def _take_output(self, call: Call, name: str, network: nn.Module, output: Any) -> None:
        inner, place = unwrapped(network), (name, len(self._forwards), "output")
        is_autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        state = State(inner.training, is_autocast, processors_of(inner))
        self._forwards.append(Forward(name, self._arguments.pop(), self._copies.of(first_of(output), place), state))

    @_noted
    def _take_step(self, call: Call, scheduler: Any, method: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        if missing := [name for name in ("model_output", "timestep", "sample") if name not in given]:
            raise ValueError(f"{type(scheduler).__name__} does not step from a {missing[0]}, which is not supported")
        if call.schedule is None:
            call.schedule = path_of(scheduler)
        timestep = float(torch.as_tensor(given["timestep"]).flatten()[0])
        sample, model_output = given["sample"].detach().clone(), given["model_output"].detach().clone()
        call.steps.append(Step(tuple(self._forwards), timestep, sample, model_output))
        self._forwards = []

    @_noted
    def _take_next(self, call: Call, result: Any) -> None:
        call.last_sample = (
            first_of(result if isinstance(result, tuple | Tensor) else result.prev_sample).detach().clone()
        )

    @_noted
    def _take_decoded(self, call: Call, name: str, latents: Any) -> None:
        call.decoded, call.codec = latents.detach().clone(), name

    @_noted
    def _finish(self, call: Call, method: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        call.prompts, call.negative_prompts = _texts(given.get("prompt")), _texts(given.get("negative_prompt"))
        call.seeds, call.images = _seeds(given.get("generator")), images_of(output)
        call.weights = fingerprint(networks_of(self._pipeline))


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
