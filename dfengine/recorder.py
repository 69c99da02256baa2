"""From the engine's events to what is kept of them: a result in memory and, with a writer, the same in a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dfengine import store
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory, restore, to_bytes
from dfengine.display import Result
from dfengine.explain import Explainer, OutputSpec, StepMap, describe
from dfengine.result import COMBINED
from dfengine.tokens import Tokens


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
        item: int = 0,
    ) -> None:
        """The job is the given item of the writer's plan."""
        self._denoiser, self._writer, self._previews, self._item = denoiser, writer, previews, item
        self.done: set[tuple[str, int]] = set()
        """(explainer's name, step) of every map that is stored"""
        self.restored: Trajectory | None = None
        """the stored trajectory"""
        steps, (height, width) = len(job.timesteps), denoiser.latent_shape[1:]

        def empty(*size: int) -> np.ndarray:
            return np.full((steps, *size), np.nan, np.float32)

        self._made = made = contents(denoiser, job, explainers)
        tokens, words = _tokens(made), _words(made)
        self.result = Result(
            prompt=job.prompt,
            seed=job.seed,
            model=denoiser.name,
            image=np.zeros((*denoiser.image_shape, 3), np.uint8),
            timesteps=np.array(job.timesteps),
            signal=empty(),
            noise=empty(),
            latents=empty(*denoiser.latent_shape),
            epsilon=empty(*denoiser.latent_shape),
            maps={name: _maps(empty(height, width), part, empty) for name, part in made.items()},
            errors={name: empty(height, width) for name, part in made.items() if part.has_error},
            scores={name: empty(part.num_masks) for name, part in made.items() if part.num_masks},
            tokens=tokens,
            relevance=None if tokens is None else empty(len(tokens)).T,
            words=words,
            word_maps=empty(len(words), height, width).swapaxes(0, 1) if words else None,
            settings={explainer.name: explainer for explainer in explainers},
        )
        if writer is not None and writer.has_trajectory(item):
            self._restore(job, writer.stored(item))

    def _restore(self, job: Job, stored: store.StoredItem) -> None:
        latents, epsilon = (torch.from_numpy(np.asarray(part)) for part in (stored.latents, stored.epsilon))
        self.restored = restore(self._denoiser, job, latents, epsilon, torch.from_numpy(stored.image))
        previews = None if stored.previews is None else np.asarray(stored.previews)
        self.result = dataclasses.replace(self.result, previews=previews)
        for name, steps in stored.done.items():
            for step in np.flatnonzero(steps).tolist():
                if self._writer is not None and self._is_whole(name, step):
                    self.done.add((name, step))
                    self._put(self._stored(stored, name, step))

    def _is_whole(self, name: str, step: int) -> bool:
        """Whether all that comes with a stored map is stored, too."""
        made, writer = self._made[name], self._writer
        assert writer is not None
        return (
            (not made.layers or writer.has_cam(self._item, step))
            and (made.tokens is None or writer.has_relevance(self._item, step))
            and (not made.words or writer.has_heat(self._item, step))
        )

    def _stored(self, stored: store.StoredItem, name: str, step: int) -> StepMap:
        """What was made of a step, from the file."""
        made = self._made[name]
        tensor = torch.from_numpy
        return StepMap(
            self._item,
            step,
            name,
            saliency=tensor((stored.maps[name][COMBINED] if made.layers else stored.maps[name])[step]),
            error=tensor(stored.errors[name][step]) if made.has_error else None,
            scores=tensor(stored.scores[name][step]) if made.num_masks else None,
            layers={layer: tensor(stored.cam[layer][step]) for layer in made.layers},
            relevance=None if stored.relevance is None or made.tokens is None else tensor(stored.relevance[:, step]),
            word_maps=None if stored.word_maps is None or not made.words else tensor(stored.word_maps[:, step]),
        )

    def begin(self, trajectory: Trajectory) -> None:
        """The trajectory is known: keep it, and decode its previews."""
        result = dataclasses.replace(
            self.result,
            image=trajectory.image.numpy(),
            signal=trajectory.signal.cpu().numpy(),
            noise=trajectory.noise.cpu().numpy(),
            latents=trajectory.latents.cpu().numpy(),
            epsilon=trajectory.epsilon.cpu().numpy(),
        )
        if self._previews and trajectory.x0 is not None:
            with torch.no_grad():
                result = dataclasses.replace(result, previews=to_bytes(self._denoiser.decode(trajectory.x0)).numpy())
        self.result = result
        if self._writer is not None and self.restored is None:
            self._writer.trajectory(
                self._item,
                timesteps=result.timesteps,
                signal=result.signal,
                noise=result.noise,
                latents=result.latents,
                epsilon=result.epsilon,
                image=result.image,
                previews=result.previews,
            )

    def add(self, made: StepMap) -> None:
        """What an explainer made of one more step."""
        self._put(made)
        if self._writer is None:
            return
        values = {name: value.numpy() for name, value in self._parts(made).items()}
        if made.layers:
            self._writer.cam(self._item, made.step, {name: part.numpy() for name, part in made.layers.items()})
        curves = {name: values.pop(name) for name in ("relevance", "word_maps") if name in values}
        self._writer.curves(self._item, made.step, **curves)
        # Last, since it is what marks the step as done.
        self._writer.step(self._item, made.method, made.step, **values)

    def _parts(self, made: StepMap) -> dict[str, Any]:
        """What there is of a step beside DF-CAM's layers, by name."""
        names = ("saliency", "error", "scores", "relevance", "word_maps")
        return {name: getattr(made, name) for name in names if getattr(made, name) is not None}

    def _put(self, made: StepMap) -> None:
        """Keep it in memory."""
        result, name, step = self.result, made.method, made.step
        maps = result.maps[name]
        (maps[COMBINED] if made.layers else maps)[step] = made.saliency.numpy()
        for layer, saliency in made.layers.items():
            maps[layer][step] = saliency.numpy()
        if made.error is not None:
            result.errors[name][step] = made.error.numpy()
        if made.scores is not None:
            result.scores[name][step] = made.scores.numpy()
        if made.relevance is not None and result.relevance is not None:
            result.relevance[:, step] = made.relevance.numpy()
        if made.word_maps is not None and result.word_maps is not None:
            result.word_maps[:, step] = made.word_maps.numpy()

    def finish(self, seconds: float) -> None:
        """Nothing more will come."""
        if self._writer is not None:
            self._writer.finish(self._item, seconds)


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
    made = [contents(denoiser, job, explainers) for job in jobs]
    tokens = [_tokens(parts) for parts in made]
    return store.Plan(
        items=tuple(
            store.Item(
                item_key(denoiser, job, settings),
                job.prompt,
                job.negative_prompt,
                job.seed,
                tokens=told.texts if told else (),
                spans=told.spans if told else (),
                words=_words(parts),
                settings=job.settings,
            )
            for job, parts, told in zip(jobs, made, tokens, strict=True)
        ),
        methods=tuple(
            store.Method(name, settings[name], part.num_masks, has_error=part.has_error, has_layers=bool(part.layers))
            for name, part in made[0].items()
        ),
        layers=tuple((name, size) for part in made[0].values() for name, size in part.layers.items()),
        num_steps=len(jobs[0].timesteps),
        latent=denoiser.latent_shape,
        image=denoiser.image_shape,
        previews=previews,
        model=denoiser.name,
        mantissa_bits=mantissa_bits,
        settings={"dtype": str(denoiser.dtype).removeprefix("torch.")},
    )


def contents(denoiser: Denoiser, job: Job, explainers: Sequence[Explainer]) -> dict[str, OutputSpec]:
    """What each explainer, by name, will make of a job.

    Raises ValueError for what the model or the prompt does not have, and where two explainers would keep what there is
    one place for.
    """
    made = {explainer.name: explainer.contents(denoiser, job) for explainer in explainers}
    for what in ("layers", "tokens", "words"):
        names = [name for name, part in made.items() if getattr(part, what)]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} both keep {what}, of which a result has one set: run them apart")
    return made


def _tokens(made: Mapping[str, OutputSpec]) -> Tokens | None:
    return next((part.tokens for part in made.values() if part.tokens), None)


def _words(made: Mapping[str, OutputSpec]) -> tuple[str, ...]:
    return tuple(word for part in made.values() for word in part.words)


def _maps(saliency: np.ndarray, made: OutputSpec, empty: Callable[..., np.ndarray]) -> Any:
    """Room for a method's maps: an array, or one for each layer and all of them combined."""
    layers = {name: empty(*size) for name, size in made.layers.items()}
    return {COMBINED: saliency, **layers} if layers else saliency


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
