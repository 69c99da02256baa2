"""From the engine's events to what is kept of them: results in memory and, with a writer, the same in a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dfengine import store
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory, restore, to_bytes
from dfengine.display import Result
from dfengine.events import Event, Finished, Generated
from dfengine.explain import StepMap
from dfengine.plan import Plan
from dfengine.result import COMBINED


class Recorder:
    """Keeps the results of a plan's jobs; starts with what an interrupted file already has of them."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        *,
        previews: bool = True,
        writer: store.Writer | None = None,
        items: Sequence[int] | None = None,
    ) -> None:
        """`items` are the places of the jobs in the writer's plan, by default in order.

        Raises ValueError if two explainers would fill what a result holds once.
        """
        plan.check_result()
        places = range(len(plan)) if items is None else items
        self._items = [
            _ItemRecorder(denoiser, plan, item, previews, writer, place) for item, place in enumerate(places)
        ]

    @property
    def restored(self) -> dict[int, Trajectory]:
        """The trajectories that the file already had, by item."""
        return {i: one.restored for i, one in enumerate(self._items) if one.restored is not None}

    @property
    def done(self) -> set[tuple[int, str, int]]:
        """(item, explainer's name, step) of every map that the file already had."""
        return {(i, *done) for i, one in enumerate(self._items) for done in one.done}

    @property
    def results(self) -> list[Result]:
        """The result of each job, as far as it is computed."""
        return [one.result for one in self._items]

    def take(self, event: Event) -> None:
        """Keep what an event brings."""
        item = self._items[event.item]
        match event:
            case Generated():
                item.take_trajectory(event.trajectory)
            case StepMap():
                item.take_map(event)
            case Finished():
                item.finish(event.seconds)


class _ItemRecorder:
    """Keeps one job's trajectory and maps."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        item: int,
        previews: bool,
        writer: store.Writer | None,
        place: int,
    ) -> None:
        """The job is the plan's given item, and has the given place in the writer's plan."""
        self._denoiser, self._planned, self._previews = denoiser, plan.jobs[item], previews
        self._writer, self._item = writer, place
        self.done: set[tuple[str, int]] = set()
        self.restored: Trajectory | None = None
        self.result = _empty_result(denoiser, plan, item)
        if writer is not None and writer.has_trajectory(place):
            self._restore(writer, writer.stored(place))

    def _restore(self, writer: store.Writer, stored: store.StoredItem) -> None:
        """Take over the trajectory and every map that is stored with all that belongs to it."""
        latents, epsilon = (torch.from_numpy(np.asarray(part)) for part in (stored.latents, stored.epsilon))
        self.restored = restore(self._denoiser, self._planned.job, latents, epsilon, torch.from_numpy(stored.image))
        previews = None if stored.previews is None else np.asarray(stored.previews)
        self.result = dataclasses.replace(self.result, previews=previews)
        for name, steps in stored.done.items():
            spec = self._planned.outputs[name]
            for step in np.flatnonzero(steps).tolist():
                if (
                    (not spec.layers or writer.has_cam(self._item, step))
                    and (spec.tokens is None or writer.has_relevance(self._item, step))
                    and (not spec.words or writer.has_word_maps(self._item, step))
                ):
                    self.done.add((name, step))
                    self._keep(self._stored_map(stored, name, step))

    def _stored_map(self, stored: store.StoredItem, name: str, step: int) -> StepMap:
        spec = self._planned.outputs[name]
        tensor = torch.from_numpy
        return StepMap(
            self._item,
            step,
            name,
            saliency=tensor((stored.maps[name][COMBINED] if spec.layers else stored.maps[name])[step]),
            error=tensor(stored.errors[name][step]) if spec.has_error else None,
            scores=tensor(stored.scores[name][step]) if spec.num_masks else None,
            layers={layer: tensor(stored.cam[layer][step]) for layer in spec.layers},
            relevance=tensor(stored.relevance[:, step]) if spec.tokens and stored.relevance is not None else None,
            word_maps=tensor(stored.word_maps[:, step]) if spec.words and stored.word_maps is not None else None,
            word_errors=tensor(stored.word_errors[:, step]) if spec.words and stored.word_errors is not None else None,
        )

    def take_trajectory(self, trajectory: Trajectory) -> None:
        """Keep the trajectory, and decode its previews."""
        result = dataclasses.replace(
            self.result,
            image=trajectory.image.numpy(),
            signal=trajectory.signal.cpu().numpy(),
            noise=trajectory.noise.cpu().numpy(),
            latents=trajectory.latents.cpu().numpy(),
            epsilon=trajectory.epsilon.cpu().numpy(),
        )
        if self._previews and trajectory.x0 is not None:
            with self._denoiser.exclusive():
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

    def take_map(self, step_map: StepMap) -> None:
        """Keep one step of one explainer."""
        self._keep(step_map)
        if self._writer is None:
            return
        names = ("saliency", "error", "scores", "relevance", "word_maps", "word_errors")
        values = {name: value.numpy() for name in names if (value := getattr(step_map, name)) is not None}
        if step_map.layers:
            layers = {name: part.numpy() for name, part in step_map.layers.items()}
            self._writer.cam(self._item, step_map.step, layers)
        curves = {name: values.pop(name, None) for name in ("relevance", "word_maps", "word_errors")}
        self._writer.curves(self._item, step_map.step, **curves)
        # Last, since it marks the step as done.
        self._writer.step(self._item, step_map.method, step_map.step, **values)

    def _keep(self, step_map: StepMap) -> None:
        """Put a map into the result in memory."""
        result, name, step = self.result, step_map.method, step_map.step
        maps = result.maps[name]
        (maps[COMBINED] if step_map.layers else maps)[step] = step_map.saliency.numpy()
        for layer, saliency in step_map.layers.items():
            maps[layer][step] = saliency.numpy()
        if step_map.error is not None:
            result.errors[name][step] = step_map.error.numpy()
        if step_map.scores is not None:
            result.scores[name][step] = step_map.scores.numpy()
        if step_map.relevance is not None and result.relevance is not None:
            result.relevance[:, step] = step_map.relevance.numpy()
        if step_map.word_maps is not None and result.word_maps is not None:
            result.word_maps[:, step] = step_map.word_maps.numpy()
        if step_map.word_errors is not None and result.word_errors is not None:
            result.word_errors[:, step] = step_map.word_errors.numpy()

    def finish(self, seconds: float) -> None:
        """Note that the item is complete."""
        if self._writer is not None:
            self._writer.finish(self._item, seconds)


def _empty_result(denoiser: Denoiser, plan: Plan, item: int) -> Result:
    """A result with room for everything that is planned, NaN."""
    planned = plan.jobs[item]
    job, outputs, tokens, words = planned.job, planned.outputs, planned.tokens, planned.words
    height, width = denoiser.latent_shape[1:]

    def empty(*size: int) -> np.ndarray:
        return np.full((len(job.timesteps), *size), np.nan, np.float32)

    maps: dict[str, Any] = {name: empty(height, width) for name in outputs}
    for name, spec in outputs.items():
        if spec.layers:
            maps[name] = {COMBINED: maps[name]} | {layer: empty(*size) for layer, size in spec.layers.items()}
    return Result(
        prompt=job.prompt,
        seed=job.seed,
        model=denoiser.name,
        image=np.zeros((*denoiser.image_shape, 3), np.uint8),
        timesteps=np.array(job.timesteps),
        signal=empty(),
        noise=empty(),
        latents=empty(*denoiser.latent_shape),
        epsilon=empty(*denoiser.latent_shape),
        maps=maps,
        errors={name: empty(height, width) for name, spec in outputs.items() if spec.has_error},
        scores={name: empty(spec.num_masks) for name, spec in outputs.items() if spec.num_masks},
        tokens=tokens,
        relevance=None if tokens is None else empty(len(tokens)).T,
        words=words,
        word_maps=empty(len(words), height, width).swapaxes(0, 1) if words else None,
        word_errors=empty(len(words), height, width).swapaxes(0, 1) if words and planned.has_word_errors else None,
        settings={explainer.name: explainer for explainer in plan.explainers},
        labels=plan.labels,
        forms=plan.forms,
        hots=plan.hots,
    )
