"""`dfengine evaluate`."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import games as faithful
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
    games: Annotated[
        bool, typer.Option("--games", help="areas under the deletion and insertion curves (Tables 1 and 2)")
    ] = False,
    truth: Annotated[
        bool, typer.Option("--truth", help="do maps lie on the subject and the object? (of the embedded world)")
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
    steps: Annotated[int, typer.Option(help="denoising steps, but for --sanity's own")] = 30,
    step: Annotated[
        list[int] | None,
        typer.Option(help="--games: step to explain, from 0; repeat for several; by default 0.75 l - 1"),
    ] = None,
    gamma: Annotated[float, typer.Option(help="--concepts: shift of early and latter sampling")] = 60,
    masks: Annotated[
        int | None,
        typer.Option(
            help="masks of DF-RISE, a step: by default 60 for --sanity, 500 for --games, 250 for --recovery and --truth"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="--games and --truth: samples of LIME")] = 1000,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="--games and --truth: random, lime, rise, cam, relevance, attention, rise-global, -grid, -frechet, "
            "-cosine, -contrast, -luminance, -contrast_structure, -ssim; repeat for several"
        ),
    ] = None,
    tables: Annotated[
        list[int] | None, typer.Option("--table", help="--games: the methods of Table 1 or 2; 1 by default")
    ] = None,
    given_maps: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=FILE.npy", help="--games: another tool's maps (prompts, height, width)"),
    ] = None,
    distance: Annotated[
        str, typer.Option(help="--games: frechet-set, or frechet-single, features, mse for few images")
    ] = "frechet-set",
    features: Annotated[
        Path | None,
        typer.Option(
            help="--games: a transformers vision folder, or Inception-v3's weights; the model's own by default"
        ),
    ] = None,
    behaviour: options.Behaviour = "paper",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="--games: a folder for tables and figures, to go on from, too")
    ] = None,
    batch_size: options.BatchSize = "auto",
    figure: Annotated[
        Path | None, typer.Option(help="--concepts (Figure 11), --recovery and --truth: a picture, too")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that maps can be trusted (exit status 1 where they cannot), or say what they tell of many prompts."""
    from dfengine import evaluate as evaluation
    from dfengine import figures
    from dfengine.explain import check_behaviour
    from dfengine.prompts import Prompt, read

    if sanity + concepts + recovery + games + truth != 1:
        raise ValueError("say one thing to evaluate: --sanity, --concepts, --recovery, --games or --truth")
    check_behaviour(behaviour)
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
        batch_size=batch_size,
    )
    texts = [one.text for one in given] or evaluation.captions(limit, seed)
    if sanity:
        _sanity(engine, texts, seed, 60 if masks is None else masks, as_json)
    if recovery:
        _recovery(engine, texts, seed, steps, 250 if masks is None else masks, figure, as_json)
    if games:
        names = [*(method or []), *(name for table in tables or [] for name in _of_table(table))]
        played = faithful.play(
            engine,
            texts,
            seed=seed,
            steps=steps,
            explained=step or [],
            names=names if names or given_maps else evaluation.TABLES[1],
            masks=500 if masks is None else masks,
            samples=samples,
            given=given_maps or [],
            features=features,
            distance=distance,
            behaviour=behaviour,
            out=out,
        )
        lines = [line for part in played for line in evaluation.faithfulness_table(part)]
        _tell([dataclasses.asdict(part) for part in played], lines, as_json)
    if truth:
        names = method or ["random", "lime", "rise", "cam", "relevance", "attention"]
        masks = 250 if masks is None else masks
        located = faithful.locate(engine, texts, seed=seed, steps=steps, names=names, masks=masks, samples=samples)
        lines = [line for part in located for line in evaluation.localisation_table(part)]
        _tell([dataclasses.asdict(part) for part in located], lines, as_json)
        if figure is not None:
            panels = figures.recovery(_located(located), located[0].timesteps, columns=3, limits=(0, 1))
            figures.save(panels, figure)
    if not concepts:
        return
    given = evaluation.with_concepts(given) or evaluation.embedded_prompts(limit, seed)
    _concepts(engine, given, range(seed, seed + seeds), steps, gamma, behaviour, figure, as_json)


def _of_table(number: int) -> tuple[str, ...]:
    from dfengine.evaluate import TABLES

    if number not in TABLES:
        raise ValueError(f"table {number} is not one of the games': expected 1 or 2")
    return TABLES[number]


def _located(found: list[Any]) -> dict[str, Any]:
    """AUROC of each method at each step, a panel a target and source."""
    bands: dict[str, Any] = {}
    for part in found:
        for method, by_target in part.steps.items():
            for target, by_measure in by_target.items():
                values = [(one.mean, one.low, one.high) for one in by_measure["auroc"]]
                bands.setdefault(method, {})[f"AUROC, {target},\n{part.source}"] = values
    return bands


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
    behaviour: str,
    figure: Path | None,
    as_json: bool,
) -> None:
    from dfengine import Relevance, figures
    from dfengine import evaluate as evaluation
    from dfengine.diffusion.denoiser import HasTokens, require

    schedules = ("uniform", "early", "latter")
    planned = [
        evaluation.Measured(s, place, seed) for s in schedules for place in range(len(prompts)) for seed in seeds
    ]
    jobs = [
        engine.job(
            prompts[one.prompt].text,
            seed=one.seed,
            num_steps=steps,
            sampling=one.schedule,
            gamma=gamma,
        )
        for one in planned
    ]
    tokens = require(engine.denoiser, HasTokens, "relevance").tokens
    for one in prompts:
        tokens(one.text)
    events = screen.counted(engine.stream(jobs, Relevance()), "measuring", len(jobs) * (steps + 2))
    measured = evaluation.measure(events, planned, prompts, tokens, behaviour)
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
