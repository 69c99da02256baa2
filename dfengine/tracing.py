"""Explaining any call of any diffusers pipeline.

    with dfengine.trace(pipe) as trace:
        image = pipe("a cat holding a sign", image=..., num_inference_steps=8).images[0]
    result = trace.explain(Rise(num_masks=256), out="call.h5")

The call is what it would have been. Afterwards its network is called again with the recorded arguments and masked
latents; nothing is asked about the pipeline's class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import dfengine.checks as checks
from dfengine.diffusion.fingerprint import fingerprint
from dfengine.display import Result
from dfengine.engine import Engine, Explainers
from dfengine.events import Event
from dfengine.explain import Rise
from dfengine.files import published
from dfengine.models.recorded import Call, Recorded, from_plain, kept_steps, networks_of, recorded, to_plain

_VERSION = 1


def trace(pipeline: Any) -> Trace:
    """Record the calls of a diffusers pipeline inside `with`, to be explained afterwards.

    Images are bit for bit what they would have been, and nothing is left behind on the pipeline. What the networks are
    given is kept on their device, once if it is the same at every step (`Trace.nbytes`). Raises ValueError for a
    pipeline without a network that predicts, or without a scheduler.
    """
    networks_of(pipeline)
    return Trace(pipeline)


class Trace:
    """The recorded calls of a pipeline, which are recorded while inside."""

    def __init__(self, pipeline: Any, calls: Sequence[Call] = ()) -> None:
        self.pipeline, self.calls = pipeline, calls
        self._recording = ExitStack()

    def __enter__(self) -> Trace:
        self.calls = self._recording.enter_context(recorded(self.pipeline))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._recording.close()

    @property
    def nbytes(self) -> int:
        """Memory of what is recorded."""
        return sum(call.nbytes for call in self.calls)

    def explain(
        self,
        explainers: Explainers = Rise(),  # noqa: B008  # settings are frozen
        *,
        image: int = 0,
        call: int = -1,
        steps: str | Sequence[int] = "all",
        batch_size: int | None = None,
        previews: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        on_event: Callable[[Event], None] | None = None,
        progress: bool | None = None,
    ) -> Result:
        """Explain one image of a call, the last one by default, at all of its steps or some (counted from 0).

        Before any map is made the network is asked what it was asked, and has to answer what it answered. Otherwise as
        `Engine.explain`. Raises ValueError for an image, call or step that is not there, for a pipeline that has
        changed since, and for what the numbers of the call do not tell.
        """
        denoiser = self.denoiser(image=image, call=call, steps=steps, batch_size=batch_size)
        engine = Engine(denoiser, batch_size=batch_size)
        plan = engine.plan([denoiser.job], explainers)
        for explainer in plan.explainers:
            denoiser.check_target(getattr(explainer, "target", "conditional"))
        return engine.explain_plan(
            plan,
            denoiser.trajectory(),
            previews=previews and denoiser.has_previews,
            out=out,
            overwrite=overwrite,
            on_event=on_event,
            progress=progress,
        )

    def denoiser(
        self, *, image: int = 0, call: int = -1, steps: str | Sequence[int] = "all", batch_size: int | None = None
    ) -> Recorded:
        """One image of a call as a network that predicts. Raises ValueError as `explain` does."""
        checks.whole_number("image", image)
        checks.whole_number("call", call)
        if not self.calls:
            raise ValueError("no call is recorded: call the pipeline inside `with dfengine.trace(pipe)`")
        if not -len(self.calls) <= call < len(self.calls):
            raise ValueError(f"call {call} is not there: {len(self.calls)} are recorded, counted from 0")
        one, own = self.calls[call], type(self.pipeline).__name__
        if one.pipeline != own:
            raise ValueError(f"the call is one of {one.pipeline}, and the pipeline {own}: give the one that made it")
        count = len(kept_steps(one))
        chosen = None if isinstance(steps, str) and steps == "all" else _steps(steps, count)
        if fingerprint(networks_of(self.pipeline)) != one.weights:
            raise ValueError("the networks' weights have changed since the call: record it again")
        denoiser = Recorded(self.pipeline, one, image, steps=chosen, batch_size=batch_size)
        with denoiser.exclusive():
            denoiser.check()
        return denoiser

    def save(self, path: str | Path) -> None:
        """Write the recorded calls, without the pipeline's weights, to be explained later by `replay`."""
        state = {"version": _VERSION, "calls": [to_plain(call) for call in self.calls]}
        with published(Path(path).expanduser()) as new:
            torch.save(state, new)


def replay(pipeline: Any, path: str | Path) -> Trace:
    """The calls that `Trace.save` wrote, of the pipeline that made them.

    Raises ValueError for a file that is none of these, and FileNotFoundError where there is none.
    """
    networks = networks_of(pipeline)
    device = next(next(iter(networks.values())).parameters()).device
    try:
        state = torch.load(Path(path).expanduser(), map_location=device, weights_only=True)
        version = state["version"]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is not there: write it with Trace.save") from None
    except Exception as error:  # whatever the unpickler raises
        raise ValueError(f"{path} is no recorded call: expected a file that Trace.save wrote") from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version} and this dfengine reads {_VERSION}: record the call again")
    return Trace(pipeline, [from_plain(call) for call in state["calls"]])


def _steps(steps: Any, count: int) -> list[int]:
    several = steps.tolist() if hasattr(steps, "tolist") else steps
    if isinstance(several, str) or not isinstance(several, Sequence) or not several:
        raise checks.mistake("steps", steps, "'all' or a list of steps, counted from 0")
    for step in several:
        checks.whole_number("step", step)
        if not 0 <= step < count:
            raise ValueError(f"step {step} is outside [0, {count - 1}]: the call took {count} steps")
    return sorted(set(several))
