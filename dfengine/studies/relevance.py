"""Relevance of concepts at each stage: Table 3, Figure 11."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dfengine import evaluate
from dfengine import figures as drawing
from dfengine.checks import mistake, one_of
from dfengine.diffusion.denoiser import HasTokens, require
from dfengine.engine import Engine
from dfengine.explain import registry
from dfengine.figures import Figure
from dfengine.prompts import Prompt
from dfengine.studies.base import OnProgress, Study, check_request, no_progress, stream, texts_of

SCHEDULES = ("uniform", "early", "latter")


@dataclass(frozen=True)
class ConceptsStudy(Study):
    """Table 3: one `ConceptSummary` of all prompts with roles, and one of each other prompt by its words."""

    model: str

    def table(self) -> str:
        """The tables, each under its title."""
        return "\n\n".join(f"{one.title}, {self.model}:\n\n{one.table()}" for one in self.summaries)

    def figures(self) -> dict[str, Figure]:
        """ "concepts": Figure 11."""
        parts = []
        for one in self.summaries:
            totals = {s: {role: total.band for role, total in by.items()} for s, by in one.relevance.items()}
            parts.append((one.title, one.lines, totals))
        return {"concepts": drawing.concepts(parts, self.summaries[0].timesteps)}


def concepts(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    *,
    schedules: Sequence[str] = SCHEDULES,
    preset: str = "default",
    num_seeds: int = 1,
    num_steps: int = 30,
    gamma: float = 60,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> ConceptsStudy:
    """Relevance of the prompts' concepts, their words by default, at each step of several schedules.

    Every prompt is generated with `num_seeds` seeds from `seed` on. With the preset "xdiffusion", a concept's relevance
    is the sum over its tokens. Raises ValueError, before anything is computed, for input that is not possible.
    """
    check_request(
        engine, preset=preset, num_seeds=num_seeds, num_steps=num_steps, gamma=gamma, seed=seed, on_progress=on_progress
    )
    texts_of(prompts)
    if not isinstance(schedules, list | tuple) or not schedules:
        raise mistake("schedules", schedules, f"some of {', '.join(SCHEDULES)}")
    for schedule in schedules:
        one_of("schedules", schedule, SCHEDULES)
    named = evaluate.with_concepts([one if isinstance(one, Prompt) else Prompt(one) for one in prompts])
    places, seeds = range(len(named)), range(seed, seed + num_seeds)
    records = [evaluate.ConceptRecord(s, place, number) for s in schedules for place in places for number in seeds]
    jobs = [
        engine.job(named[one.prompt].text, seed=one.seed, num_steps=num_steps, sampling=one.schedule, gamma=gamma)
        for one in records
    ]
    tokenize = require(engine.denoiser, HasTokens, "relevance").tokens
    for prompt in named:
        tokenize(prompt.text)  # raises ValueError if the model cannot encode it
    events = stream(engine, jobs, [registry.make("relevance", preset=preset)], "measuring", on_progress)
    evaluate.measure_concepts(events, records, named, tokenize, summed=preset == "xdiffusion")
    timesteps = {one.schedule: job.timesteps for one, job in zip(records, jobs, strict=True)}
    return ConceptsStudy(evaluate.summarise_concepts(records, named, timesteps), engine.denoiser.name)
