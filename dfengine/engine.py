"""Jobs in, stored explanations out: the one place that puts the parts together."""

from __future__ import annotations

import dataclasses
import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
import torch
from numpy.typing import ArrayLike

from dfengine.display.progress import bar  # before diffusers, which has tqdm warn where a notebook has no ipywidgets

# isort: split
from dfengine import models, shapes, store
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory, check_image, trajectories
from dfengine.display import Result
from dfengine.explain import Explainer, Rise, StepMap, check_behaviour, is_serializable, to_xdiffusion
from dfengine.recorder import Recorder, contents, device_name, plan
from dfengine.runtime import tuning
from dfengine.runtime.batching import is_out_of_memory
from dfengine.shapes.judge import Judge

log = logging.getLogger(__name__)

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

    def __init__(
        self,
        pipeline: Any,
        *,
        batch_size: int | None = None,
        guidance: float | None = None,
        image_size: tuple[int, int] | None = None,
        attention: str = "auto",
        compile: bool | None = None,
    ) -> None:
        """Wrap a diffusers pipeline, on the device and in the dtype it has, or a `Denoiser` of one's own.

        `image_size` is the (height, width) in pixels of a pipeline's images, by default the model's own. `batch_size`
        is how many masked latents one forward has, by default what keeps the device busy and fits; `attention` "auto",
        "sdpa", "cudnn" or "xformers"; `compile` whether `torch.compile` is used, by default where a job repays it.
        The network runs on the weights that the pipeline has when a job begins (LoRAs included). On a CPU glibc is told
        to keep the memory that this process frees (`tuning.disable_malloc_trim`), unless a MALLOC_… variable is set.
        """
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch size {batch_size} is not possible: expected at least 1")
        if isinstance(pipeline, Denoiser) and image_size not in (None, pipeline.image_shape):
            raise ValueError(
                f"image size {image_size} is not possible: the denoiser makes {pipeline.image_shape}; leave it out"
            )
        self.denoiser: Denoiser = (
            pipeline
            if isinstance(pipeline, Denoiser)
            else models.adapt(pipeline, batch_size=batch_size, image_size=image_size, attention=attention)
        )
        if isinstance(pipeline, Denoiser) and attention != "auto":
            self.denoiser.use_attention(attention)
        if batch_size is not None:
            self.denoiser.batch_size = batch_size
        self._batch_is_given, self._compile = batch_size is not None, compile
        self._pace: tuning.ForwardCost | None = None
        if self.denoiser.device.type == "cpu":
            tuning.disable_malloc_trim()
        self.guidance = float(GUIDANCE if guidance is None else guidance)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "shapes",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        revision: str | None = None,
        random_weights: bool = False,
        image_size: tuple[int, int] | None = None,
        batch_size: int | None = None,
        attention: str = "auto",
        compile: bool | None = None,
    ) -> Engine:
        """Load "shapes" (the embedded model), a diffusers pipeline folder, or a hub id.

        With `random_weights`, "sd15", "sd21" and "sdxl" are built without a download, to measure what they cost.
        The device is the GPU where there is one; the dtype is float16 on a GPU, float32 elsewhere. `image_size` is
        (height, width) in pixels, by default the model's own. The last three are as for `Engine` itself.
        Raises ValueError where the model, device, dtype or size is not to be had.
        """
        embedded = str(model) == "shapes" and not random_weights
        denoiser = models.load(
            shapes.FOLDER if embedded else model,
            device=device,
            dtype=dtype,
            variant=variant,
            revision=revision,
            random_weights=random_weights,
            image_size=image_size,
            attention=attention,
        )
        if embedded:
            denoiser.name = denoiser.name.replace(str(shapes.FOLDER), "shapes")
            denoiser.features = Judge.load().to(denoiser.device).features
        return cls(denoiser, batch_size=batch_size, guidance=shapes.GUIDANCE if embedded else None, compile=compile)

    def job(
        self,
        prompt: str = "",
        *,
        image: ArrayLike | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        num_steps: int = 30,
        sampling: str | Iterable[float | SupportsIndex] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
        behaviour: str = "paper",
    ) -> Job:
        """One image to generate and explain: `stream` takes many.

        `sampling` is "uniform" (the model's own spacing), "early" or "latter" (exponential, with `gamma`), or a list of
        time-steps; with the behaviour "xdiffusion" a `gamma` of 0 is uniform, as in the released code. `image` (uint8
        [H, W, 3]) stands in for a generation. Raises ValueError for what is not possible.
        """
        check_behaviour(behaviour)
        if isinstance(sampling, str) and sampling in ("early", "latter") and gamma == 0 and behaviour == "xdiffusion":
            sampling = "uniform"
        given = None if image is None else torch.from_numpy(np.array(image))
        if given is not None:
            check_image(self.denoiser, given)
        return Job(
            prompt=prompt,
            timesteps=tuple(self.denoiser.schedule.timesteps(sampling, operator.index(num_steps), gamma)),
            seed=operator.index(seed),
            negative_prompt=negative_prompt,
            guidance=self.guidance if guidance is None else float(guidance),
            image=given,
        )

    def stream(
        self,
        jobs: Sequence[Job],
        explainers: Explainer | Sequence[Explainer],
        *,
        restored: Mapping[int, Trajectory] = MappingProxyType({}),
        done: Collection[tuple[int, str, int]] = (),
    ) -> Iterator[Event]:
        """Generate and explain many images, telling of each thing as it is done.

        Jobs are sampled in groups of neighbours with equally many steps, and masks of a group share their batches. For
        each item come `Generated`, a `StepMap` a step and explainer, and `Finished`. Work of an earlier run is not done
        again: trajectories in `restored`, by item, and maps in `done`, as (item, explainer's name, step).

        Raises ValueError, before anything is computed, for what the model or one of the prompts does not have.
        """
        explainers = _several(explainers)
        for job in {job.prompt: job for job in jobs}.values():
            contents(self.denoiser, job, explainers)
        self.prepare(jobs, explainers, done=done)
        for began, group in self._groups(jobs, restored):
            yield from self._explain_group(group, explainers, done, began)

    def record(
        self, jobs: Sequence[Job], explainers: Sequence[Explainer], recorders: Sequence[Recorder]
    ) -> Iterator[Event]:
        """`stream`, with all of it kept by the jobs' recorders, and what they have already not done again."""
        for event in self.stream(
            jobs,
            explainers,
            restored={item: one.restored for item, one in enumerate(recorders) if one.restored is not None},
            done={(item, *done) for item, one in enumerate(recorders) for done in one.done},
        ):
            if isinstance(event, Generated):
                recorders[event.item].begin(event.trajectory)
            elif isinstance(event, StepMap):
                recorders[event.item].add(event)
            else:
                recorders[event.item].finish(event.seconds)
            yield event

    def sample(self, jobs: Sequence[Job]) -> Iterator[Trajectory]:
        """Generate many images without explaining them, in groups as `stream` does, in the jobs' order."""
        for _, group in self._groups(jobs, {}):
            yield from group.values()

    @property
    def group_size(self) -> int:
        """How many images are generated together: a forward has both halves of their guidance."""
        return max(1, self.denoiser.batch_size // 2)

    def _groups(
        self, jobs: Sequence[Job], restored: Mapping[int, Trajectory]
    ) -> Iterator[tuple[float, dict[int, Trajectory]]]:
        """Trajectories by item, of neighbours with equally many steps, and when each group was begun."""
        for _, neighbours in groupby(enumerate(jobs), key=lambda pair: len(pair[1].timesteps)):
            left, most = list(neighbours), self.group_size
            while left:
                group = dict(left[:most])
                began = time.monotonic()
                paths = self._sample(group, restored)
                if paths is None:
                    most = len(group) // 2
                    continue
                left = left[len(group) :]
                yield began, dict(zip(group, paths, strict=True))

    def prepare(
        self,
        jobs: Sequence[Job],
        explainers: Sequence[Explainer],
        *,
        done: Collection[tuple[int, str, int]] = (),
        times: int = 1,
    ) -> None:
        """Set up the network for jobs, as `stream` does by itself: find the batch that fits; compile if that repays.

        `times` is how many as large ones are expected.

        Raises ValueError where compiling was asked for and is not possible.
        """
        pace = self.pace()
        already = Counter((item, name) for item, name, _ in done)
        num_forwards = times * sum(
            explainer.num_forwards(len(job.timesteps) - already[item, explainer.name])
            for item, job in enumerate(jobs)
            for explainer in explainers
        )
        targets = {getattr(explainer, "target", "conditional") for explainer in explainers} or {"conditional"}
        tuning.maybe_compile(self.denoiser, num_forwards, pace, wanted=self._compile, targets=targets)

    def pace(self) -> tuning.ForwardCost:
        """How fast the network is here, found by a few forwards the first time, and with it the batch that fits."""
        if self._pace is None:
            self._pace = tuning.tune(self.denoiser, is_given=self._batch_is_given)
        return self._pace

    def _sample(self, group: Mapping[int, Job], restored: Mapping[int, Trajectory]) -> list[Trajectory] | None:
        """The trajectories of a group, those that are not restored sampled together; None if they do not fit."""
        new = [item for item in group if item not in restored]
        try:
            made = trajectories(self.denoiser, [group[item] for item in new]) if new else []
        except RuntimeError as error:
            if len(group) == 1 or not is_out_of_memory(error):
                raise
            log.info("%d images do not fit into memory together: going on with %d", len(group), len(group) // 2)
            return None
        sampled = dict(zip(new, made, strict=True))
        return [restored[item] if item in restored else sampled[item] for item in group]

    def _explain_group(
        self,
        group: Mapping[int, Trajectory],
        explainers: Sequence[Explainer],
        done: Collection[tuple[int, str, int]],
        began: float,
    ) -> Iterator[Event]:
        items = list(group)
        for item, trajectory in group.items():
            yield Generated(item, trajectory)
        for explainer in explainers:
            left_out = {
                (items.index(item), step) for item, name, step in done if name == explainer.name and item in group
            }
            for step_map in explainer.explain(self.denoiser, list(group.values()), left_out):
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
        sampling: str | Iterable[float | SupportsIndex] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
        behaviour: str = "paper",
        previews: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        compression: str = "gzip",
        mantissa_bits: int = 23,
        on_event: Callable[[Event], None] | None = None,
        progress: bool | None = None,
    ) -> Result:
        """Generate an image (or take the given one) and explain every step of it.

        With `out`, maps are written to that HDF5 file as they are made; it exists under its name once it is complete,
        and as `.part.h5` until then. A run of the same settings that was cut off is gone on with: nothing that is done
        is computed again (except with a similarity of the caller's own, which a file cannot tell from another of its
        name). `previews` keeps the image predicted at each step; `compression` "none" makes a larger file, faster;
        `mantissa_bits` rounds errors, layers' and words' maps in the file, never the saliency. `on_event` is told of
        progress; a bar shows it in a notebook, with `progress` True everywhere, with False nowhere. `behaviour`
        "xdiffusion" makes explainers what they are in the authors' released code (`to_xdiffusion`).

        Raises ValueError for input that is not possible, before anything is computed or written.
        """
        check_behaviour(behaviour)
        explainers = _several(explainers)
        if behaviour == "xdiffusion":
            explainers = [to_xdiffusion(explainer) for explainer in explainers]
        job = self.job(
            prompt,
            image=image,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            sampling=sampling,
            gamma=gamma,
            guidance=guidance,
            behaviour=behaviour,
        )
        with torch.no_grad():
            self.denoiser.condition([prompt, negative_prompt])
        file: AbstractContextManager[store.Writer | None] = nullcontext()
        if out is not None:
            file = store.Writer.create(
                Path(out),
                plan(self.denoiser, [job], explainers, previews=previews, mantissa_bits=mantissa_bits),
                overwrite=overwrite,
                compression=compression,
                resume=all(map(is_serializable, explainers)),
                device=device_name(self.denoiser.device),
            )
        with file as writer:
            recorder = Recorder(self.denoiser, job, explainers, previews=previews, writer=writer)
            with bar(len(job.timesteps) * len(explainers), progress, len(recorder.done)) as follow:
                for event in self.record([job], explainers, [recorder]):
                    follow(event)
                    if on_event is not None:
                        on_event(event)
        return recorder.result


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
