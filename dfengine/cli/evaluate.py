"""`dfengine evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    from dfengine.engine import Engine
    from dfengine.prompts import Prompt


def evaluate(
    sanity: Annotated[bool, typer.Option("--sanity", help="do maps depend on the model and the prompt?")] = False,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="relevance of subject, relation and object by schedule (Table 3)")
    ] = False,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="do maps begin on the shapes and spread? (of the embedded world)")
    ] = False,
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt; repeat for several; the embedded world's own by default")
    ] = None,
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="prompts of the file or of the embedded world, at most")] = 50,
    seed: options.Seed = 0,
    seeds: Annotated[int, typer.Option(help="--concepts: images a prompt and schedule")] = 1,
    steps: Annotated[int, typer.Option(help="--concepts and --recovery: denoising steps")] = 30,
    gamma: Annotated[float, typer.Option(help="--concepts: shift of early and latter sampling")] = 60,
    masks: Annotated[
        int | None, typer.Option(help="masks of DF-RISE, a step: 60 by default for --sanity, 250 for --recovery")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="--concepts (Figure 11) and --recovery: a picture, too")] = None,
    as_json: options.Json = False,
) -> None:
    """Check that maps can be trusted (exit status 1 where they cannot), or say what they tell of many prompts."""
    from dfengine import evaluate as evaluation
    from dfengine import figures
    from dfengine.prompts import Prompt, read

    if sanity + concepts + recovery != 1:
        raise ValueError("nothing to evaluate was named, or two things: say --sanity, --concepts or --recovery")
    if min(limit, seeds) < 1:
        raise ValueError(f"{limit} prompts and {seeds} seeds are not possible: expected at least 1")
    if figure is not None:
        figures.check_name(figure)
    given = [*map(Prompt, prompt or []), *([] if prompts is None else read(prompts, limit))]
    engine = options.engine(
        model,
        device=device,
        dtype=dtype,
        variant=variant,
        revision=revision,
        random_weights=random_weights,
        image_size=image_size,
    )
    texts = [one.text for one in given] or evaluation.captions(limit, seed)
    if sanity:
        _sanity(engine, texts, seed, 60 if masks is None else masks, as_json)
    if recovery:
        _recovery(engine, texts, seed, steps, 250 if masks is None else masks, figure, as_json)
        return
    given = evaluation.with_concepts(given) or evaluation.embedded_prompts(limit, seed)
    _concepts(engine, given, range(seed, seed + seeds), steps, gamma, figure, as_json)


def _sanity(engine: Engine, texts: list[str], seed: int, masks: int, as_json: bool) -> None:
    from dfengine import evaluate as evaluation

    with screen.err.status("checking") as status:
        found = evaluation.sanity(
            engine.denoiser,
            [engine.job(text, seed=seed + number, num_steps=evaluation.STEPS) for number, text in enumerate(texts)],
            num_masks=masks,
            tell=lambda what: status.update(f"checking {what}"),
        )
    _tell(dataclasses.asdict(found), evaluation.lines(found), as_json)
    raise typer.Exit(0 if found.passed else 1)


def _concepts(
    engine: Engine,
    prompts: list[Prompt],
    seeds: Iterable[int],
    steps: int,
    gamma: float,
    figure: Path | None,
    as_json: bool,
) -> None:
    from dfengine import Relevance, figures
    from dfengine import evaluate as evaluation

    schedules = ("uniform", "early", "latter")
    planned = [
        evaluation.Measured(s, place, seed) for s in schedules for place in range(len(prompts)) for seed in seeds
    ]
    jobs = [
        engine.job(prompts[one.prompt].text, seed=one.seed, num_steps=steps, sampling=one.schedule, gamma=gamma)
        for one in planned
    ]
    for one in prompts:
        engine.denoiser.tokens(one.text)
    events = screen.counted(engine.stream(jobs, Relevance()), "measuring", len(jobs) * (steps + 2))
    measured = evaluation.measure(events, planned, prompts, engine.denoiser.tokens)
    timesteps = {one.schedule: job.timesteps for one, job in zip(planned, jobs, strict=True)}
    found = evaluation.summarise(measured, prompts, timesteps)
    lines = [line for part in found for line in (f"{part.title}, {engine.denoiser.name}:", *evaluation.table(part), "")]
    _tell([dataclasses.asdict(part) for part in found], lines, as_json)
    if figure is not None:
        sums = [
            {s: {name: (i.mean, i.low, i.high) for name, i in by.items()} for s, by in part.relevance.items()}
            for part in found
        ]
        parts = [(part.title, part.lines, each) for part, each in zip(found, sums, strict=True)]
        figures.save(figures.concepts(parts, timesteps), figure)


def _recovery(
    engine: Engine, texts: list[str], seed: int, steps: int, masks: int, figure: Path | None, as_json: bool
) -> None:
    from dfengine import Cam, Rise, figures
    from dfengine import evaluate as evaluation

    evaluation.check_world(engine.denoiser.image_shape, texts)
    jobs = [engine.job(text, seed=seed + number, num_steps=steps) for number, text in enumerate(texts)]
    stream = engine.stream(jobs, [Rise(masks), Cam()])
    events = screen.counted(stream, "measuring", len(jobs) * (2 * steps + 2))
    found = evaluation.recovery(events, texts, jobs[0].timesteps)
    _tell(dataclasses.asdict(found), evaluation.recovery_table(found), as_json)
    if figure is not None:
        bands = {
            method: {name: [(i.mean, i.low, i.high) for i in values] for name, values in by.items()}
            for method, by in found.steps.items()
        }
        figures.save(figures.recovery(bands, found.timesteps), figure)


def _tell(found: Any, lines: Iterable[str], as_json: bool) -> None:
    print(json.dumps(_without_nan(found), indent=2, ensure_ascii=False) if as_json else "\n".join(lines))


def _without_nan(value: Any) -> Any:
    """The same with null for what is not a number, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
