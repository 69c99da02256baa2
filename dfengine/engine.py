"""Jobs in, stored explanations out: the one place that puts the parts together."""

from __future__ import annotations

import dataclasses
import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from dfengine.display.progress import bar  # before diffusers, which has tqdm warn if a notebook lacks ipywidgets

# isort: split
import dfengine.checks as checks
from dfengine import models, shapes, store
from dfengine.arguments import check_arguments
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, check_image
from dfengine.display import Result
from dfengine.events import Event, Finished, Generated
from dfengine.explain import Explainer, Rise, is_serializable
from dfengine.explain.registry import make
from dfengine.plan import Plan, plan
from dfengine.recorder import Recorder
from dfengine.runtime import tuning
from dfengine.runtime.grouping import sample_groups
from dfengine.shapes import world
from dfengine.shapes.judge import Judge

log = logging.getLogger(__name__)

T = TypeVar("T")

#: One or several explainers, each with its settings or by its name ("rise") with its defaults.
Explainers = Explainer | str | Sequence[Explainer | str]

#: The guidance scale if neither the caller nor the model names one.
GUIDANCE = 7.5


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
        """Wrap a diffusers pipeline, on its device and in its dtype, or a `Denoiser` of your own.

        `image_size` is the (height, width) in pixels of a pipeline's images, by default the model's own. `batch_size`
        is how many masked latents one forward has, by default what keeps the device busy and fits; `attention` "auto",
        "sdpa", "cudnn" or "xformers"; `compile` whether to use `torch.compile`, by default if the job is long enough.
        The network runs with the weights that the pipeline has when a job starts (LoRAs included). On a CPU glibc is
        told to keep freed memory (`tuning.disable_malloc_trim`), unless a MALLOC_… variable is set. Threads may share
        an engine, and take turns with its network.
        Raises ValueError for a size or backend that the model cannot work with.
        """
        check_arguments(
            guidance=guidance, image_size=image_size, attention=attention, compile=compile, batch_size=batch_size
        )
        if isinstance(pipeline, Denoiser) and image_size not in (None, pipeline.image_shape):
            raise ValueError(
                f"image size {image_size} is not possible: the denoiser generates {pipeline.image_shape}; leave it out"
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
        self._is_batch_size_given, self._compile = batch_size is not None, compile
        self._forward_cost: tuning.ForwardCost | None = None
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

        With `random_weights`, "sd15", "sd21" and "sdxl" are built without a download, to measure speed and memory. The
        default device is the GPU if there is one; the default dtype is float16 on a GPU and float32 elsewhere. The
        other parameters are those of `Engine` itself. Raises ValueError for a model, device, dtype or size that is not
        available.
        """
        check_arguments(image_size=image_size, attention=attention, compile=compile, batch_size=batch_size)
        check_arguments(
            model=model, device=device, dtype=dtype, variant=variant, revision=revision, random_weights=random_weights
        )
        is_embedded = str(model) == "shapes" and not random_weights
        denoiser = models.load(
            shapes.FOLDER if is_embedded else model,
            device=device,
            dtype=dtype,
            variant=variant,
            revision=revision,
            random_weights=random_weights,
            image_size=image_size,
            attention=attention,
        )
        if is_embedded:
            denoiser.name = denoiser.name.replace(str(shapes.FOLDER), "shapes")
            denoiser.features = Judge.load().to(denoiser.device).features
            denoiser.alternatives = world.alternatives()
        guidance = shapes.GUIDANCE if is_embedded else None
        return cls(denoiser, batch_size=batch_size, guidance=guidance, compile=compile)

    def job(
        self,
        prompt: str = "",
        *,
        image: ArrayLike | None = None,
        negative_prompt: str | None = "",
        seed: int = 0,
        num_steps: int = 30,
        sampling: str | Iterable[float | SupportsIndex] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
    ) -> Job:
        """One image to generate and explain; `stream` takes many.

        `sampling` is "uniform" (what the model's scheduler visits), "early" or "latter" (exponential, with `gamma`), or
        a list of time-steps. `image` (uint8 [H, W, 3]) stands in for a generation. Raises ValueError for values out of
        range.
        """
        check_arguments(guidance=guidance, num_steps=num_steps, seed=seed)
        if image is not None and np.asarray(image).dtype.kind not in "uifb":
            raise checks.mistake("image", image, "an array, uint8 [H, W, 3]")
        pixels = None if image is None else torch.from_numpy(np.array(image))
        if pixels is not None:
            check_image(self.denoiser, pixels)
        return Job(
            prompt=prompt,
            timesteps=tuple(self.denoiser.schedule.timesteps(sampling, operator.index(num_steps), gamma)),
            seed=operator.index(seed),
            negative_prompt="" if negative_prompt is None else negative_prompt,
            guidance=self.guidance if guidance is None else float(guidance),
            image=pixels,
        )

    def plan(self, jobs: Sequence[Job], explainers: Explainers) -> Plan:
        """Work out what explaining the jobs will produce; nothing is computed.

        Raises ValueError for what the model or one of the prompts lacks, and for explainers that share a name.
        """
        check_arguments(jobs=jobs, explainers=explainers)
        given = [explainers] if isinstance(explainers, str | Explainer) else explainers
        several = [make(one) if isinstance(one, str) else one for one in given]
        if not several:
            raise ValueError("there is no explainer: give at least one, such as Rise()")
        names = [explainer.name for explainer in several]
        if len(set(names)) < len(names):
            raise ValueError(
                f"explainers share a name ({', '.join(names)}): give each its own, as in Rise(name='rise-global')"
            )
        with self.denoiser.exclusive():
            return plan(self.denoiser, jobs, several)

    def stream(self, jobs: Sequence[Job], explainers: Explainers) -> Iterator[Event]:
        """Explain many images and yield each result as soon as it is ready.

        Jobs are sampled in groups of neighbours with equally many steps, and masks of a group share their batches. For
        each item come `Generated`, a `StepMap` a step and explainer, and `Finished`.

        Raises ValueError, before anything is computed, for what the model or one of the prompts lacks.
        """
        yield from self.run(self.plan(jobs, explainers))

    def run(
        self,
        plan: Plan,
        *,
        restored: Mapping[int, Trajectory] = MappingProxyType({}),
        done: Collection[tuple[int, str, int]] = (),
    ) -> Iterator[Event]:
        """Carry out a plan, as `stream` does, without what an earlier run computed.

        `restored` has trajectories by item, `done` the (item, explainer's name, step) of every map that exists.
        """
        self.prepare(plan, done=done)
        groups = sample_groups(self.denoiser, [planned.job for planned in plan.jobs], restored)
        for started, group in self._one_at_a_time(groups):
            yield from self._one_at_a_time(self._explain_group(group, plan.explainers, done, started))

    def sample(self, jobs: Sequence[Job]) -> Iterator[Trajectory]:
        """Generate many images without explaining them, in the jobs' order."""
        check_arguments(jobs=jobs)
        for _, group in self._one_at_a_time(sample_groups(self.denoiser, jobs, {})):
            yield from group.values()

    def _one_at_a_time(self, values: Iterator[T]) -> Iterator[T]:
        """The same values; while each is computed, no other thread uses the network."""
        turn = self.denoiser.turns()
        while True:
            with turn():
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def prepare(self, plan: Plan, *, done: Collection[tuple[int, str, int]] = (), times: int = 1) -> None:
        """Set up the network for a plan, as `run` does by itself: find the batch that fits, compile if that pays.

        `times` is how many plans of this size are expected. Raises ValueError if compiling was asked for and fails.
        """
        computed = Counter((item, name) for item, name, _ in done)
        num_forwards = times * sum(
            planned.num_forwards(explainer, len(planned.job.timesteps) - computed[item, explainer.name])
            for item, planned in enumerate(plan.jobs)
            for explainer in plan.explainers
        )
        targets = {getattr(explainer, "target", "conditional") for explainer in plan.explainers}
        if not any(planned.job.guidance > 1 for planned in plan.jobs):
            targets = {"conditional" if target == "guided" else target for target in targets}
        with self.denoiser.exclusive():
            cost = self.forward_cost()
            tuning.maybe_compile(self.denoiser, num_forwards, cost, enabled=self._compile, targets=targets)

    def forward_cost(self) -> tuning.ForwardCost:
        """What a forward of the network costs here, measured once; the batch size is then what fits into memory."""
        with self.denoiser.exclusive():
            if self._forward_cost is None:
                self._forward_cost = tuning.tune(self.denoiser, keep_batch_size=self._is_batch_size_given)
            return self._forward_cost

    def _explain_group(
        self,
        group: Mapping[int, Trajectory],
        explainers: Sequence[Explainer],
        done: Collection[tuple[int, str, int]],
        started: float,
    ) -> Iterator[Event]:
        items = list(group)
        for item, trajectory in group.items():
            yield Generated(item, trajectory)
        for explainer in explainers:
            computed = {
                (items.index(item), step) for item, name, step in done if name == explainer.name and item in group
            }
            for step_map in explainer.explain(self.denoiser, list(group.values()), computed):
                yield dataclasses.replace(step_map, item=items[step_map.item])
        seconds = (time.monotonic() - started) / len(items)
        for item in items:
            yield Finished(item, seconds)

    def explain(
        self,
        prompt: str = "",
        explainers: Explainers = Rise(),  # noqa: B008  # settings are frozen
        *,
        image: ArrayLike | None = None,
        negative_prompt: str | None = "",
        seed: int = 0,
        num_steps: int = 30,
        sampling: str | Iterable[float | SupportsIndex] = "uniform",
        gamma: float = 60,
        guidance: float | None = None,
        previews: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        compression: str = "gzip",
        mantissa_bits: int = 23,
        on_event: Callable[[Event], None] | None = None,
        progress: bool | None = None,
    ) -> Result:
        """Generate an image (or take the given one) and explain every step of it.

        Explainers are given with their settings, as in `Rise(num_masks=256)`, or by name, as in "rise".
        With `out`, maps are written to that HDF5 file as they are computed: `.part.h5` until it is complete. Running an
        interrupted call again continues the file without computing anything twice (except with a similarity function of
        your own, since the file only knows its name). `previews` keeps the image predicted at each step; `compression`
        "none" makes a larger file, faster; `mantissa_bits` rounds errors, layer maps and word maps in the file, never
        the saliency. `on_event` is called with every event; `progress` shows a bar, by default in notebooks only.

        Raises ValueError for impossible input, before anything is computed or written.
        """
        check_arguments(previews=previews, overwrite=overwrite, compression=compression, mantissa_bits=mantissa_bits)
        check_arguments(out=out, on_event=on_event, progress=progress)
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
        return self.explain_plan(
            self.plan([job], explainers),
            out=out,
            overwrite=overwrite,
            previews=previews,
            compression=compression,
            mantissa_bits=mantissa_bits,
            on_event=on_event,
            progress=progress,
        )

    def explain_plan(
        self,
        plan: Plan,
        trajectory: Trajectory | None = None,
        *,
        previews: bool = True,
        out: str | Path | None = None,
        overwrite: bool = False,
        compression: str = "gzip",
        mantissa_bits: int = 23,
        on_event: Callable[[Event], None] | None = None,
        progress: bool | None = None,
    ) -> Result:
        """Carry out a plan of one job as `explain` does; its generation may exist already. Raises ValueError alike."""
        check_arguments(previews=previews, overwrite=overwrite, compression=compression, mantissa_bits=mantissa_bits)
        check_arguments(out=out, on_event=on_event, progress=progress)
        job, given = plan.jobs[0].job, {} if trajectory is None else {0: trajectory}
        with (
            torch.no_grad(),
            self.denoiser.exclusive(),
        ):  # a prompt that does not fit is refused before a file is created
            self.denoiser.condition([job])
            self.denoiser.condition([job], negative=True)
        file: AbstractContextManager[store.Writer | None] = nullcontext()
        if out is not None:
            file = store.Writer.create(
                Path(out).expanduser(),
                plan.file_plan(self.denoiser, previews=previews, mantissa_bits=mantissa_bits),
                overwrite=overwrite,
                compression=compression,
                resume=all(map(is_serializable, plan.explainers)),
                device=tuning.device_name(self.denoiser.device),
            )
        with file as writer:
            recorder = Recorder(self.denoiser, plan, previews=previews, writer=writer)
            with bar(len(job.timesteps) * len(plan.explainers), progress, len(recorder.done)) as show:
                for event in self.run(plan, restored=given or recorder.restored, done=recorder.done):
                    recorder.take(event)
                    show(event)
                    if on_event is not None:
                        on_event(event)
        return recorder.results[0]
