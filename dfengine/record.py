"""From the engine's events to what is kept of them: a result in memory and, with a writer, the same in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dfengine import store
from dfengine.denoiser import Denoiser
from dfengine.explain import Explainer, StepMap, describe
from dfengine.result import Result
from dfengine.trajectory import Job, Trajectory, restore, to_bytes


class Recorder:
    """Keeps one job's trajectory and maps; begins with what an interrupted file already has of them."""

    def __init__(
        self,
        denoiser: Denoiser,
        job: Job,
        explainers: Sequence[Explainer],
        *,
        previews: bool,
        writer: store.Writer | None = None,
    ) -> None:
        """The job is item 0 of the writer's plan."""
        self._denoiser, self._writer, self._previews = denoiser, writer, previews
        self.done: set[tuple[int, str, int]] = set()
        """(item, explainer's name, step) of every map that is stored"""
        self.restored: Mapping[int, Trajectory] = {}
        """the stored trajectory, by item"""
        steps, (height, width) = len(job.timesteps), denoiser.latent_shape[1:]

        def empty(*size: int) -> np.ndarray:
            return np.full((steps, *size), np.nan, np.float32)

        names = [explainer.name for explainer in explainers]
        self.result = Result(
            prompt=job.prompt,
            seed=job.seed,
            model=denoiser.name,
            image=np.zeros((*denoiser.image_shape, 3), np.uint8),
            timesteps=np.array(job.timesteps),
            alpha_bar=empty(),
            latents=empty(*denoiser.latent_shape),
            epsilon=empty(*denoiser.latent_shape),
            maps={name: empty(height, width) for name in names},
            errors={name: empty(height, width) for name in names},
            scores={explainer.name: empty(num_masks(explainer)) for explainer in explainers},
            settings={explainer.name: explainer for explainer in explainers},
        )
        if writer is not None and writer.has_trajectory(0):
            self._restore(job, writer.stored(0))

    def _restore(self, job: Job, stored: store.StoredItem) -> None:
        latents, epsilon = (torch.from_numpy(np.asarray(part)) for part in (stored.latents, stored.epsilon))
        self.restored = {0: restore(self._denoiser, job, latents, epsilon, torch.from_numpy(stored.image))}
        previews = None if stored.previews is None else np.asarray(stored.previews)
        self.result = dataclasses.replace(self.result, previews=previews)
        for name, steps in stored.done.items():
            for step in np.flatnonzero(steps).tolist():
                self.done.add((0, name, step))
                self.result.maps[name][step] = stored.maps[name][step]
                self.result.errors[name][step] = stored.errors[name][step]
                self.result.scores[name][step] = stored.scores[name][step]

    def begin(self, trajectory: Trajectory) -> None:
        """The trajectory is known: keep it, and decode its previews."""
        result = dataclasses.replace(
            self.result,
            image=trajectory.image.numpy(),
            alpha_bar=trajectory.alpha_bar.cpu().numpy(),
            latents=trajectory.latents.cpu().numpy(),
            epsilon=trajectory.epsilon.cpu().numpy(),
        )
        if self._previews and trajectory.x0 is not None:
            with torch.no_grad():
                result = dataclasses.replace(result, previews=to_bytes(self._denoiser.decode(trajectory.x0)).numpy())
        self.result = result
        if self._writer is not None and not self.restored:
            self._writer.trajectory(
                0,
                timesteps=result.timesteps,
                alpha_bar=result.alpha_bar,
                latents=result.latents,
                epsilon=result.epsilon,
                image=result.image,
                previews=result.previews,
            )

    def add(self, step_map: StepMap) -> None:
        """One more map."""
        saliency, error, scores = (part.numpy() for part in (step_map.saliency, step_map.error, step_map.scores))
        method, step = step_map.method, step_map.step
        self.result.maps[method][step] = saliency
        self.result.errors[method][step] = error
        self.result.scores[method][step] = scores
        if self._writer is not None:
            self._writer.step(0, method, step, saliency=saliency, error=error, scores=scores)

    def finish(self, seconds: float) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.finish(0, seconds)


def plan(
    denoiser: Denoiser,
    jobs: Sequence[Job],
    explainers: Sequence[Explainer],
    *,
    previews: bool,
    mantissa_bits: int = 23,
) -> store.Plan:
    """What a file of these jobs will hold. They must have equally many steps."""
    settings = {explainer.name: describe(explainer) for explainer in explainers}
    return store.Plan(
        items=tuple(
            store.Item(
                item_key(denoiser, job, settings),
                job.prompt,
                job.negative_prompt,
                job.seed,
                settings=job.settings,
            )
            for job in jobs
        ),
        methods=tuple(
            store.Method(explainer.name, settings[explainer.name], num_masks=num_masks(explainer), has_error=True)
            for explainer in explainers
        ),
        num_steps=len(jobs[0].timesteps),
        latent=denoiser.latent_shape,
        image=denoiser.image_shape,
        previews=previews,
        model=denoiser.name,
        mantissa_bits=mantissa_bits,
        settings={"dtype": str(denoiser.dtype).removeprefix("torch.")},
    )


def num_masks(explainer: Explainer) -> int:
    """How many scores a step an explainer makes."""
    return getattr(explainer, "num_masks", 0)


def item_key(denoiser: Denoiser, job: Job, settings: dict[str, Any]) -> str:
    """SHA-256 of the canonical description of an item: equal keys are equal work."""
    described = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        **job.settings,
        "model": denoiser.name,
        "dtype": str(denoiser.dtype),
        "explainers": settings,
        "schema": store.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def device_name(device: torch.device) -> str:
    """The device as a person would name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
