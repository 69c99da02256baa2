"""Jobs in, stored explanations out: the one place that puts the parts together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from dfengine import models, shapes, store
from dfengine.denoiser import Denoiser
from dfengine.explain import Explainer, Rise, StepMap
from dfengine.result import Result
from dfengine.shapes.judge import Judge
from dfengine.trajectory import Job, Trajectory, check_image, to_bytes, trajectories

#: Used where neither the caller nor the model says otherwise.
GUIDANCE = 7.5


@dataclass(frozen=True)
class Generated:
    """A trajectory is finished; its maps follow."""

    item: int
    trajectory: Trajectory


@dataclass(frozen=True)
class Finished:
    """Every map of an item has been made; `seconds` is the item's share of its group's time."""

    item: int
    seconds: float


Event = Generated | StepMap | Finished


class Engine:
    """Explains generations of one model.

    engine = Engine.from_pretrained("shapes")
    result = engine.explain("a red circle above a blue square on a gray background", Rise(num_masks=256))
    result.heatmap("rise", step=3)
    """

    def __init__(self, pipeline: Any, *, batch_size: int | None = None, guidance: float | None = None) -> None:
        """Wrap a diffusers pipeline, on the device and in the dtype it has, or a `Denoiser` of one's own."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch size {batch_size} is not possible: expected at least 1")
        self.denoiser: Denoiser = (
            pipeline if isinstance(pipeline, Denoiser) else models.adapt(pipeline, batch_size=batch_size)
        )
        if batch_size is not None:
            self.denoiser.batch_size = batch_size
        self.guidance = GUIDANCE if guidance is None else guidance

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "shapes",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        batch_size: int | None = None,
    ) -> Engine:
        """Load "shapes" (the embedded model), a diffusers pipeline folder, or a hub id.

        The device is the GPU where there is one; the dtype is float16 on a GPU, float32 elsewhere.
        Raises ValueError where the model, device or dtype is not to be had.
        """
        embedded = str(model) == "shapes"
        folder = shapes.FOLDER if embedded else model
        denoiser = models.load(folder, device=device, dtype=dtype, variant=variant, revision=revision)
        if embedded:
            denoiser.name = "shapes"
            denoiser.features = Judge.load().to(denoiser.device).features
        return cls(denoiser, batch_size=batch_size, guidance=shapes.GUIDANCE if embedded else None)

    def job(
        self,
        prompt: str = "",
        *,
        image: ArrayLike | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_steps: int = 30,
        sampling: str | Sequence[int] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
    ) -> Job:
        """One image to generate and explain: `stream` takes many.

        `sampling` is "uniform" (the model's own spacing), "early" or "latter" (exponential, with `gamma`), or a list of
        time-steps. `image` (uint8 [H, W, 3]) stands in for a generation. Raises ValueError for what is not possible.
        """
        given = None if image is None else torch.from_numpy(np.array(image))
        if given is not None:
            check_image(self.denoiser, given)
        return Job(
            prompt=prompt,
            timesteps=tuple(self.denoiser.schedule.timesteps(sampling, num_steps, gamma)),
            seed=seed,
            negative_prompt=negative_prompt,
            guidance=self.guidance if guidance is None else guidance,
            image=given,
        )

    def stream(self, jobs: Sequence[Job], explainers: Explainer | Sequence[Explainer]) -> Iterator[Event]:
        """Generate and explain many images, telling of each thing as it is done.

        Jobs are sampled in groups of neighbours with equally many steps, and masks of a group share their batches. For
        each item come `Generated`, a `StepMap` a step and explainer, and `Finished`.
        """
        explainers = _several(explainers)
        group_size = max(1, self.denoiser.batch_size // 2)
        for _, neighbours in groupby(enumerate(jobs), key=lambda pair: len(pair[1].timesteps)):
            run = list(neighbours)
            for first in range(0, len(run), group_size):
                yield from self._explain_group(run[first : first + group_size], explainers)

    def _explain_group(self, group: Sequence[tuple[int, Job]], explainers: Sequence[Explainer]) -> Iterator[Event]:
        began = time.monotonic()
        items = [item for item, _ in group]
        finished = trajectories(self.denoiser, [job for _, job in group])
        for item, trajectory in zip(items, finished, strict=True):
            yield Generated(item, trajectory)
        for explainer in explainers:
            for step_map in explainer.explain(self.denoiser, finished):
                yield dataclasses.replace(step_map, item=items[step_map.item])
        seconds = (time.monotonic() - began) / len(items)
        for item in items:
            yield Finished(item, seconds)

    def explain(
        self,
        prompt: str = "",
        explainers: Explainer | Sequence[Explainer] = Rise(),  # noqa: B008  # settings are frozen
        *,
        image: ArrayLike | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_steps: int = 30,
        sampling: str | Sequence[int] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
        previews: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        on_event: Callable[[Event], None] | None = None,
    ) -> Result:
        """Generate an image (or take the given one) and explain every step of it.

        With `out`, maps are written to that HDF5 file as they are made; it exists under its name once it is complete,
        and as `.part.h5` until then. `previews` keeps the image predicted at each step. `on_event` is told of progress.

        Raises ValueError for input that is not possible, before anything is computed or written.
        """
        explainers = _several(explainers)
        job = self.job(
            prompt,
            image=image,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            sampling=sampling,
            gamma=gamma,
            guidance=guidance,
        )
        with torch.no_grad():
            self.denoiser.condition([prompt, negative_prompt])
        plan = self.plan([job], explainers, previews=previews)
        file = (
            nullcontext()
            if out is None
            else store.Writer.create(Path(out), plan, overwrite=overwrite, device=device_name(self.denoiser.device))
        )
        result: Result | None = None
        with file as writer:
            for event in self.stream([job], explainers):
                if isinstance(event, Generated):
                    result = self._begin(event.trajectory, explainers, previews)
                    if writer is not None:
                        writer.trajectory(
                            event.item,
                            timesteps=result.timesteps,
                            alpha_bar=result.alpha_bar,
                            latents=result.latents,
                            epsilon=result.epsilon,
                            image=result.image,
                            previews=result.previews,
                        )
                elif isinstance(event, StepMap):
                    assert result is not None
                    maps = (event.saliency.numpy(), event.error.numpy(), event.scores.numpy())
                    for kept, values in zip((result.maps, result.errors, result.scores), maps, strict=True):
                        kept[event.method][event.step] = values
                    if writer is not None:
                        saliency, error, scores = maps
                        writer.step(event.item, event.method, event.step, saliency=saliency, error=error, scores=scores)
                elif writer is not None:
                    writer.finish(event.item, event.seconds)
                if on_event is not None:
                    on_event(event)
        assert result is not None
        return result

    def plan(self, jobs: Sequence[Job], explainers: Sequence[Explainer], *, previews: bool) -> store.Plan:
        """What a file of these jobs will hold. They must have equally many steps."""
        settings = {explainer.name: describe(explainer) for explainer in explainers}
        return store.Plan(
            items=tuple(
                store.Item(item_key(self.denoiser.name, job, settings), job.prompt, job.negative_prompt, job.seed)
                for job in jobs
            ),
            methods=tuple(
                store.Method(name, given, num_masks=given.get("num_masks", 0), has_error=True)
                for name, given in settings.items()
            ),
            num_steps=len(jobs[0].timesteps),
            latent=self.denoiser.latent_shape,
            image=self.denoiser.image_shape,
            previews=previews,
            model=self.denoiser.name,
            settings={
                "guidance": [job.guidance for job in jobs],
                "timesteps": [list(job.timesteps) for job in jobs],
                "dtype": str(self.denoiser.dtype).removeprefix("torch."),
                "batch_size": self.denoiser.batch_size,
            },
        )

    def _begin(self, trajectory: Trajectory, explainers: Sequence[Explainer], previews: bool) -> Result:
        """A result with its maps still empty."""
        steps, (height, width) = len(trajectory), self.denoiser.latent_shape[1:]
        names = [explainer.name for explainer in explainers]
        masks = {explainer.name: describe(explainer).get("num_masks", 0) for explainer in explainers}

        def empty(size: tuple[int, ...]) -> np.ndarray:
            return np.full((steps, *size), np.nan, np.float32)

        with torch.no_grad():
            images = to_bytes(self.denoiser.decode(trajectory.x0)).numpy() if previews else None
        return Result(
            prompt=trajectory.job.prompt,
            seed=trajectory.job.seed,
            model=self.denoiser.name,
            image=trajectory.image.numpy(),
            timesteps=np.array(trajectory.job.timesteps),
            alpha_bar=trajectory.alpha_bar.cpu().numpy(),
            latents=trajectory.latents.cpu().numpy(),
            epsilon=trajectory.epsilon.cpu().numpy(),
            previews=images,
            maps={name: empty((height, width)) for name in names},
            errors={name: empty((height, width)) for name in names},
            scores={name: empty((masks[name],)) for name in names},
            settings={explainer.name: explainer for explainer in explainers},
        )


def _several(explainers: Explainer | Sequence[Explainer]) -> list[Explainer]:
    several = list(explainers) if isinstance(explainers, Sequence) else [explainers]
    names = [explainer.name for explainer in several]
    if not several:
        raise ValueError("there is no explainer: give at least one, such as Rise()")
    if len(set(names)) < len(names):
        raise ValueError(
            f"explainers share a name ({', '.join(names)}): give each its own, as in Rise(name='rise-global')"
        )
    return several


def describe(explainer: Explainer) -> dict[str, Any]:
    """An explainer's settings as JSON values; a function is told by its qualified name."""
    settings = {field.name: getattr(explainer, field.name) for field in dataclasses.fields(explainer)}  # type: ignore[arg-type]  # explainers are dataclasses
    return {"explainer": type(explainer).__name__} | {
        name: f"{value.__module__}.{value.__qualname__}" if callable(value) else value
        for name, value in settings.items()
    }


def item_key(model: str, job: Job, settings: dict[str, Any]) -> str:
    """SHA-256 of the canonical description of an item: equal keys are equal work."""
    described = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)} | {
        "image": None if job.image is None else hashlib.sha256(job.image.numpy().tobytes()).hexdigest(),
        "model": model,
        "explainers": settings,
        "schema": store.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
