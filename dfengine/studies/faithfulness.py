"""Deletion and insertion: Tables 1 and 2, Figures 3 to 5."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from dfengine import evaluate, models
from dfengine import figures as drawing
from dfengine.checks import mistake, one_of, whole_number
from dfengine.diffusion.denoiser import Denoiser, Features
from dfengine.engine import Engine
from dfengine.explain import hot
from dfengine.figures import Figure
from dfengine.prompts import Prompt
from dfengine.result import heatmap, model_name
from dfengine.studies.base import Method, OnProgress, Study, check_request, make_jobs, no_progress, texts_of

#: Images that the figures show.
_NUM_SHOWN = 4


@dataclass(frozen=True)
class GamesStudy(Study):
    """Tables 1 and 2, one `Faithfulness` for each explained step, and the games behind them."""

    runs: Sequence[evaluate.GamesRun]
    """for each step"""
    labels: Sequence[str]
    """of the images, by item: prompt and seed"""
    images: Mapping[int, UInt8[ndarray, "H W 3"]]
    """those that the figures show, by item"""
    hots: Mapping[str, str] = field(default_factory=dict)
    """what high values of each method's maps mean"""

    def figures(self) -> dict[str, Figure]:
        """ "curves" (Figure 4), "comparison" (Figure 3) and, with several kinds of DF-RISE, "ablation" (Figure 5).

        With several steps, each name begins with the step, as in "step-07-curves".
        """
        drawn: dict[str, Figure] = {}
        for summary, run in zip(self.summaries, self.runs, strict=True):
            prefix = f"step-{run.step:02}-" if len(self.runs) > 1 else ""
            drawn |= {prefix + name: figure for name, figure in self._figures_of_step(summary, run)}
        return drawn

    def _figures_of_step(self, summary: evaluate.Faithfulness, run: evaluate.GamesRun) -> Iterator[tuple[str, Figure]]:
        subtitle = f"{model_name(run.model)}, step {summary.step}, t = {summary.timestep}"
        bands = {
            name: {game: _band(score) for game, score in by_game.items()} for name, by_game in summary.methods.items()
        }
        yield "curves", drawing.curves(bands, f"{subtitle}: {summary.num_items} images, {summary.distance}")
        items = run.valid_items()[:_NUM_SHOWN]
        images, labels = [self.images[item] for item in items], [self.labels[item] for item in items]
        heat = {
            name: [heatmap(results[item].saliency.numpy(), images[0].shape[:2]) for item in items]
            for name, results in run.results.items()
        }
        yield "comparison", drawing.comparison(images, heat, labels, subtitle, hots=self.hots)
        kinds = [name for name in run.results if name == "rise" or name in evaluate.VARIATIONS]
        if len(kinds) > 1:
            distance = "frechet-single" if summary.distance == "frechet-set" else summary.distance
            rows = {}
            for name in kinds:
                (curves,) = evaluate.min_max(evaluate.item_curves([run.results[name][items[0]]], distance))
                rows[name] = (heat[name][0], *curves)
            yield "ablation", drawing.ablation(images[0], rows, f"{labels[0]}: {subtitle}, {distance}", self.hots)


def games(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method] = (),
    *,
    table: int | Sequence[int] = (),
    maps: Mapping[str, Float[ndarray, "items a b"]] | None = None,
    preset: str = "default",
    num_masks: int | None = None,
    num_samples: int | None = None,
    steps: Sequence[int] = (),
    num_steps: int = 30,
    seed: int = 0,
    distance: str = "frechet-set",
    refill: str = "zero",
    features: Features | str | Path | None = None,
    cache: evaluate.GameCache | None = None,
    on_progress: OnProgress = no_progress,
) -> GamesStudy:
    """Areas under the deletion and insertion curves of the given methods and of Table 1 or 2; of Table 1 by default.

    Image i is generated with seed + i. `maps` are another tool's, by its name: one for each prompt, at the latent's or
    the image's size. `steps` are those to explain, from 0: by default ⌊0.75·num_steps⌋ − 1. `features` is an extractor
    or a file or folder of one's weights, by default the model's own. With the preset "xdiffusion", the games too are
    those of the released code. Deleted pixels become 0, or with `refill="noise"` noise without content, which keeps
    latents in the data's distribution.

    Raises ValueError, before anything is computed, for input that is not possible.
    """
    check_request(
        engine,
        methods=methods,
        maps=maps,
        preset=preset,
        num_masks=num_masks,
        num_samples=num_samples,
        num_steps=num_steps,
        seed=seed,
        features=features,
        on_progress=on_progress,
    )
    if not isinstance(cache, evaluate.GameCache | None):
        raise mistake("cache", cache, "a GameCache")
    texts, maps = texts_of(prompts), maps or {}
    evaluate.check_distance(distance, len(texts))
    one_of("refill", refill, evaluate.REFILLS)
    tables = table if isinstance(table, Sequence) and not isinstance(table, str) else [table]
    names = [*methods, *(name for number in tables for name in _table_methods(number))]
    explainers = evaluate.make_methods(
        names or ([] if maps else evaluate.TABLES[1]), preset=preset, num_masks=num_masks, num_samples=num_samples
    )
    if not isinstance(steps, Iterable):
        raise mistake("steps", steps, "a list of steps")
    steps = [whole_number("step", step) for step in dict.fromkeys(steps)] or [evaluate.default_step(num_steps)]
    if outside := [step for step in steps if not 0 <= step < num_steps]:
        raise ValueError(f"step {outside[0]} is outside [0, {num_steps - 1}]: steps index the time-steps")
    jobs = make_jobs(engine, texts, seed, num_steps)
    extract: Any = features
    if isinstance(features, str | Path):
        extract = models.load_features(features, device=engine.denoiser.device)
    if distance == "mse" and extract is None and engine.denoiser.features is None:
        extract = evaluate.NoFeatures()
    evaluate.resolve_features(engine.denoiser, extract)
    cache = evaluate.GameCache() if cache is None else cache
    total, done = len(steps) * len(jobs) * (len(explainers) + len(maps)), count(1)
    with _default_features(engine.denoiser, extract):
        if explainers:
            # One step of each item is explained at a time: to `prepare`, the others count as done.
            rest = range(1, num_steps)
            others = {(item, one.name, k) for item in range(len(jobs)) for one in explainers for k in rest}
            engine.prepare(engine.plan(jobs, explainers), done=others, times=len(steps))
        runs = [
            evaluate.play_games(
                engine.denoiser,
                engine.sample,
                jobs,
                explainers,
                maps=maps,
                step=step,
                features=extract,
                preset=preset,
                refill=refill,
                cache=cache,
                on_progress=lambda: on_progress("playing", next(done), total),
            )
            for step in steps
        ]
    summaries = [evaluate.summarise_games(run, distance) for run in runs]
    shown = sorted({item for run in runs for item in run.valid_items()[:_NUM_SHOWN]})
    sampled = engine.sample([jobs[item] for item in shown])
    return GamesStudy(
        summaries,
        runs,
        [f"{job.prompt}, seed {job.seed}" for job in jobs],
        {item: trajectory.image.numpy() for item, trajectory in zip(shown, sampled, strict=True)},
        {one.name: hot(one) for one in explainers},
    )


def _band(score: evaluate.GameScore) -> tuple[ndarray, ndarray, ndarray]:
    mean, low, high = map(np.array, score.curve)
    return mean, low, high


def _table_methods(number: Any) -> tuple[str, ...]:
    if isinstance(number, bool) or number not in evaluate.TABLES:
        raise ValueError(f"table {number!r} is not one of the games: expected 1 or 2")
    return evaluate.TABLES[number]


@contextmanager
def _default_features(denoiser: Denoiser, extract: Features | None) -> Iterator[None]:
    """Inside, DF-RISE's Fréchet similarity too uses an extractor if the model comes with none."""
    own = denoiser.features
    denoiser.features = own or extract
    try:
        yield
    finally:
        denoiser.features = own
