"""`dfengine evaluate --games` and `--truth`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfengine.cli import screen

if TYPE_CHECKING:
    from dfengine.engine import Engine
    from dfengine.evaluate import Faithfulness, Games

#: Images that the figures show.
_SHOWN = 4


def play(
    engine: Engine,
    texts: Sequence[str],
    *,
    seed: int,
    steps: int,
    explained: Sequence[int],
    names: Sequence[str],
    masks: int,
    samples: int,
    given: Sequence[str],
    features: Path | None,
    distance: str,
    behaviour: str,
    out: Path | None,
) -> list[Faithfulness]:
    """Tables 1 and 2 of each explained step, and with a folder their figures."""
    from dfengine import evaluate as evaluation
    from dfengine import models
    from dfengine.explain import to_xdiffusion

    if distance not in evaluation.DISTANCES:
        raise ValueError(f"distance {distance!r} is not known: expected one of {', '.join(evaluation.DISTANCES)}")
    if distance == "frechet-set" and len(texts) < evaluation.FEWEST_IN_A_SET:
        raise ValueError(
            f"{len(texts)} images are too few for frechet-set: expected at least {evaluation.FEWEST_IN_A_SET} "
            "(--limit), or --distance frechet-single"
        )
    explained = list(dict.fromkeys(explained)) or [evaluation.explained_step(steps)]
    if outside := [step for step in explained if not 0 <= step < steps]:
        raise ValueError(f"step {outside[0]} is outside [0, {steps - 1}]: steps index the time-steps")
    explainers = evaluation.methods(names, num_masks=masks, num_samples=samples)
    if behaviour == "xdiffusion":
        explainers = [to_xdiffusion(explainer) for explainer in explainers]
    jobs = [engine.job(text, seed=seed + number, num_steps=steps) for number, text in enumerate(texts)]
    maps = dict(map(_map, given))
    extract: Any = None if features is None else models.load_features(features, device=engine.denoiser.device)
    if distance == "mse" and extract is None and engine.denoiser.features is None:
        extract = evaluation.NoFeatures()
    evaluation.features_of(engine.denoiser, extract)
    engine.denoiser.features = engine.denoiser.features or extract  # of DF-RISE's Fréchet similarity, too
    kept = evaluation.Kept(None if out is None else out / "turns")
    summaries = []
    others = {(item, one.name, k) for item in range(len(jobs)) for one in explainers for k in range(1, steps)}
    engine.prepare(engine.plan(jobs, explainers), done=others)
    with screen.bar("playing", len(explained) * len(jobs) * (len(explainers) + len(maps))) as (shown, task):
        for step in explained:
            found = evaluation.games(
                engine.denoiser,
                engine.sample,
                jobs,
                explainers,
                maps=maps,
                step=step,
                features=extract,
                behaviour=behaviour,
                kept=kept,
                tell=lambda: shown.advance(task),
            )
            summaries.append(evaluation.faithfulness(found, distance))
            if out is not None:
                folder = out if len(explained) == 1 else out / f"step-{step + 1:02}"
                folder.mkdir(exist_ok=True)
                write(folder, engine, jobs, found, summaries[-1])
    return summaries


def locate(
    engine: Engine, texts: Sequence[str], *, seed: int, steps: int, names: Sequence[str], masks: int, samples: int
) -> list[Any]:
    """Every method's maps against the true areas: of generated images, and of rendered scenes noised to each step."""
    from dfengine import Attention
    from dfengine import evaluate as evaluation

    evaluation.check_world(engine.denoiser.image_shape, texts)
    explainers = evaluation.methods(names, num_masks=masks, num_samples=samples)
    drawn = evaluation.scenes(len(texts), seed)
    generated = evaluation.GeneratedAreas(texts)

    def words(prompt: str) -> Sequence[str]:
        return Attention().output_spec(engine.denoiser, engine.job(prompt, num_steps=steps)).words

    jobs = [engine.job(text, seed=seed + number, num_steps=steps) for number, text in enumerate(texts)]
    noised = [
        engine.job(scene.prompt, image=scene.image, seed=seed + number, num_steps=steps)
        for number, scene in enumerate(drawn)
    ]
    found = []
    for source, these, areas in (
        ("generated images", jobs, generated),
        ("rendered scenes", noised, lambda item, _: drawn[item].areas),
    ):
        total = len(these) * (len(explainers) * steps + 2)
        events = screen.counted(engine.stream(these, explainers), f"explaining {source}", total)
        prompts = [job.prompt for job in these]
        found.append(evaluation.localisation(events, areas, prompts, these[0].timesteps, words, source))
    return found


def _map(given: str) -> tuple[str, np.ndarray]:
    """A name and its maps, from NAME=FILE."""
    name, equals, path = given.partition("=")
    if not (name and equals and Path(path).suffix == ".npy"):
        raise ValueError(f"map {given!r} is not understood: expected NAME=FILE.npy, an array (images, height, width)")
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError:
        raise ValueError(f"{path!r} is not a file of a NumPy array: write it with numpy.save") from None
    return name, array[None] if array.ndim == 2 else array


def write(out: Path, engine: Engine, jobs: Sequence[Any], found: Games, summary: Faithfulness) -> None:
    """The table as Markdown and JSON, Figures 3 and 4 and, of several kinds of DF-RISE, Figure 5."""
    from dfengine import evaluate as evaluation
    from dfengine import figures
    from dfengine.result import heatmap, model_name

    (out / "table.md").write_text("\n".join(evaluation.faithfulness_table(summary)) + "\n")
    (out / "table.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    where = f"step {summary.step + 1} of {summary.num_steps}, t = {summary.timestep}"
    curves = {name: {game: score.curve for game, score in by.items()} for name, by in summary.methods.items()}
    title = f"{model_name(summary.model)}: {summary.num_items} images, {where}, {summary.distance}"
    figures.save_both(figures.curves(_arrays(curves), title), out / "curves")
    items = found.shared()[:_SHOWN]
    images = [path.image.numpy() for path in engine.sample([jobs[item] for item in items])]
    size = images[0].shape[:2]
    heat = {
        name: [heatmap(turns[item].saliency.numpy(), size) for item in items] for name, turns in found.turns.items()
    }
    shown = [f"{jobs[item].prompt}, seed {jobs[item].seed}" for item in items]
    model = model_name(summary.model)
    figures.save_both(figures.comparison(images, heat, shown, f"{model}, {where}"), out / "comparison")
    kinds = [name for name in found.turns if name.startswith("rise")]
    if len(kinds) > 1:
        distance = "frechet-single" if summary.distance == "frechet-set" else summary.distance
        rows = {}
        for name in kinds:
            (both,) = evaluation.normalised(evaluation.item_curves([found.turns[name][items[0]]], distance))
            rows[name] = (heat[name][0], *both)
        figures.save_both(
            figures.ablation(images[0], rows, f"{shown[0]}: {model}, {where}, {distance}"), out / "ablation"
        )


def _arrays(curves: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {game: tuple(map(np.array, band)) for game, band in by.items()} for name, by in curves.items()}
