"""What a run will produce, worked out once: the jobs, the explainers, and the shape of everything they will output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfengine import store
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.explain import Explainer, OutputSpec, describe, entry_of, hot
from dfengine.tokens import Tokens


@dataclass(frozen=True)
class PlannedJob:
    """A job and what each explainer, by its name, will output for it."""

    job: Job
    outputs: Mapping[str, OutputSpec]

    @property
    def tokens(self) -> Tokens | None:
        """The tokens that relevance is computed for."""
        return next((spec.tokens for spec in self.outputs.values() if spec.tokens), None)

    @property
    def words(self) -> tuple[str, ...]:
        """The words that have maps."""
        return tuple(word for spec in self.outputs.values() for word in spec.words)

    @property
    def has_word_errors(self) -> bool:
        """Whether the words' maps have errors."""
        return any(spec.has_word_errors for spec in self.outputs.values())

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """The layers that have maps, and their resolutions."""
        return {name: size for spec in self.outputs.values() for name, size in spec.layers.items()}

    def num_forwards(self, explainer: Explainer, num_steps: int) -> int:
        """Network evaluations of one latent that an explainer takes for so many steps of the job, at most."""
        per_step = self.outputs[explainer.name].num_forwards
        return explainer.num_forwards(num_steps) if per_step is None else per_step * num_steps


@dataclass(frozen=True)
class Plan:
    """The jobs of a run, in order, and its explainers."""

    jobs: tuple[PlannedJob, ...]
    explainers: tuple[Explainer, ...]

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def labels(self) -> dict[str, str]:
        """How each explainer's maps are labelled, by its name: its name itself if it is not registered."""
        entries = {explainer.name: entry_of(explainer) for explainer in self.explainers}
        return {name: entry.label if entry else name for name, entry in entries.items()}

    @property
    def forms(self) -> dict[str, str]:
        """How each explainer's maps are drawn, by its name: "saliency" if it is not registered."""
        entries = {explainer.name: entry_of(explainer) for explainer in self.explainers}
        return {name: entry.form if entry else "saliency" for name, entry in entries.items()}

    @property
    def hots(self) -> dict[str, str]:
        """What high values of each explainer's maps mean, by its name: empty if it is not registered."""
        return {explainer.name: hot(explainer) for explainer in self.explainers}

    def check_result(self) -> None:
        """Raise ValueError if two explainers would fill what a result holds once."""
        for planned in self.jobs:
            for what in ("layers", "tokens", "words"):
                names = [name for name, spec in planned.outputs.items() if getattr(spec, what)]
                if len(names) > 1:
                    raise ValueError(
                        f"{' and '.join(names)} both output {what}, and a result holds one set: run them apart"
                    )

    def select(self, items: Sequence[int]) -> Plan:
        """Some of the jobs, as a plan of their own."""
        return Plan(tuple(self.jobs[item] for item in items), self.explainers)

    def file_plan(
        self, denoiser: Denoiser, *, previews: bool, mantissa_bits: int = 23, weights: str | None = None
    ) -> store.Plan:
        """What a file of the run will hold. Jobs must have equally many steps.

        `weights` is `denoiser.fingerprint()`, if that is known already. Raises ValueError as `check_result`.
        """
        self.check_result()
        first, settings = self.jobs[0], {one.name: describe(one) for one in self.explainers}
        weights = denoiser.fingerprint() if weights is None else weights
        return store.Plan(
            items=tuple(
                store.Item(
                    item_key(denoiser, weights, planned.job, settings),
                    planned.job.prompt,
                    planned.job.negative_prompt,
                    planned.job.seed,
                    tokens=planned.tokens.texts if planned.tokens else (),
                    spans=planned.tokens.spans if planned.tokens else (),
                    words=planned.words,
                    settings=planned.job.settings,
                )
                for planned in self.jobs
            ),
            methods=tuple(
                store.Method(
                    explainer.name,
                    settings[explainer.name],
                    spec.num_masks,
                    has_error=spec.has_error,
                    has_word_error=spec.has_word_errors,
                    has_layers=bool(spec.layers),
                    label=self.labels[explainer.name],
                    form=self.forms[explainer.name],
                    hot=self.hots[explainer.name],
                )
                for explainer, spec in zip(self.explainers, first.outputs.values(), strict=True)
            ),
            layers=tuple(first.layers.items()),
            num_steps=len(first.job.timesteps),
            latent=denoiser.latent_shape,
            image=denoiser.image_shape,
            previews=previews,
            model=denoiser.name,
            mantissa_bits=mantissa_bits,
            settings={"dtype": str(denoiser.dtype).removeprefix("torch."), "weights": weights},
        )


def plan(denoiser: Denoiser, jobs: Sequence[Job], explainers: Sequence[Explainer]) -> Plan:
    """Work out what a run will produce; nothing is computed. Raises ValueError for what the model or a prompt lacks."""
    by_prompt: dict[str, Mapping[str, OutputSpec]] = {}
    for job in jobs:
        if job.prompt not in by_prompt:
            by_prompt[job.prompt] = {explainer.name: explainer.output_spec(denoiser, job) for explainer in explainers}
    return Plan(tuple(PlannedJob(job, by_prompt[job.prompt]) for job in jobs), tuple(explainers))


def item_key(denoiser: Denoiser, weights: str, job: Job, settings: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical description of an item: equal keys are equal work.

    `weights` is `denoiser.fingerprint()`, which a plan of many items takes once.
    """
    description = {
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        **job.settings,
        "model": denoiser.name,
        "weights": weights,
        "dtype": str(denoiser.dtype),
        "explainers": settings,
        "schema": store.FORMAT_VERSION,
    }
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
