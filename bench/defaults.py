"""What DF-RISE's defaults are worth: one setting changed at a time, compared by ground truth and by both tests.

    OMP_NUM_THREADS=1 python bench/defaults.py

Maps of generated images and of rendered scenes, at every step of a short generation, are compared with the true area
of the shapes; deletion and insertion are computed at one step. Differences from the defaults are over the same
images, with confidence intervals. Checked first: the engine's map is the plain loop's (bench/plain.py), and a scene's
true area itself has an AUROC of 1. Rows are recorded after each variation, in bench/results/defaults.json.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch
from plain import Plain
from throughput import AGREEMENT, agreement

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import trajectories
from dfengine.evaluate import ConceptJudge, Scene, captions, play_games, scenes, summarise_games
from dfengine.evaluate.intervals import Interval, mean_interval
from dfengine.evaluate.localisation import localisation_scores
from dfengine.explain import StepMap
from dfengine.shapes.world import Caption

NUM_STEPS, MASKS, GAME_STEP = 4, 250, 2
DEFAULT = Rise(MASKS)
VARIATIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "score global": {"score": "global", "num_masks": 2 * MASKS + 12},
    "target guided": {"target": "guided"},
    "window 5": {"window": 5, "sigma": 0.75},
    "window 21": {"window": 21, "sigma": 3.0},
    "keep probability 0.3": {"keep_probability": 0.3},
    "keep probability 0.7": {"keep_probability": 0.7},
    "100 masks": {"num_masks": 100},
    "600 masks": {"num_masks": 600},
}


def main() -> None:
    """Measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--images", type=int, default=12, help="generated images, and as many rendered scenes")
    options = parser.parse_args()
    recorder = record.Recorder("defaults", TABLES, record=not options.no_record)
    engine, texts, rendered = Engine.from_pretrained("shapes"), captions(options.images), scenes(options.images)
    check_areas(rendered)
    check_map(engine)
    generated = [engine.job(text, num_steps=NUM_STEPS, seed=seed) for seed, text in enumerate(texts)]
    noised = [
        engine.job(scene.prompt, image=scene.image, num_steps=NUM_STEPS, seed=seed)
        for seed, scene in enumerate(rendered)
    ]
    judge = ConceptJudge()
    paths = list(engine.sample([*generated, *noised]))
    known = [judge.areas(path.image.numpy(), Caption.parse(path.job.prompt)) for path in paths[: len(texts)]]
    shapes = [None if area is None else area["both"] for area in [*known, *(scene.areas for scene in rendered)]]
    of_defaults: np.ndarray | None = None
    rows = []
    for name, settings in VARIATIONS.items():
        rise = dataclasses.replace(DEFAULT, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = auroc(list(rise.explain(engine.denoiser, paths)), shapes)
            played = play_games(engine.denoiser, engine.sample, generated, [rise], step=GAME_STEP)
            areas_under = summarise_games(played, "frechet-single").methods[rise.name]
        of_defaults = values if of_defaults is None else of_defaults
        count = len(texts)
        rows.append(
            recorder.environment(engine.denoiser.device)
            | {
                "model": "shapes",
                "variation": name,
                "masks": rise.num_masks,
                "steps": NUM_STEPS,
                "images": [int(np.isfinite(part).sum()) for part in (values[:count], values[count:])],
                "auroc_generated": rounded(mean_interval(values[:count].tolist())),
                "auroc_scenes": rounded(mean_interval(values[count:].tolist())),
                "difference": rounded(mean_interval((values - of_defaults).tolist())),
                "deletion": rounded(areas_under["deletion"].auc),
                "insertion": rounded(areas_under["insertion"].auc),
            }
        )
        recorder.replace(rows, ("device", "model"))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


def check_areas(rendered: Sequence[Scene]) -> None:
    """Exit unless the true areas themselves have an AUROC of 1."""
    for scene in rendered:
        area = scene.areas["both"]
        value = localisation_scores(area.astype(float), area)["auroc"]
        record.check(value == 1, f"the true area of '{scene.prompt}' has AUROC {value}, expected 1")


def check_map(engine: Engine) -> None:
    """Exit unless the engine's map is the plain loop's."""
    denoiser: Any = engine.denoiser
    job = engine.job("a red circle above a blue square on a gray background", num_steps=NUM_STEPS)
    (trajectory,) = trajectories(denoiser, [job])
    trajectory = dataclasses.replace(trajectory, explain_steps=[GAME_STEP])
    explained = (trajectory.latents[GAME_STEP], job.timesteps[GAME_STEP], job.guidance)
    plain = Plain(denoiser.pipeline, job.prompt, *explained, guided=False)
    rank, expected = agreement(engine, plain, trajectory, "conditional"), AGREEMENT[torch.float32]
    record.check(rank >= expected, f"rank correlation with the plain loop is {rank:.5f}, expected at least {expected}")


def auroc(step_maps: Sequence[StepMap], shapes: Sequence[Any]) -> np.ndarray:
    """Each item's AUROC, mean over the steps; NaN where the true area is not known."""
    by_item: dict[int, list[float]] = {}
    for one in step_maps:
        area = shapes[one.item]
        value = float("nan") if area is None else localisation_scores(one.saliency.double().numpy(), area)["auroc"]
        by_item.setdefault(one.item, []).append(value)
    return np.array([np.mean(by_item[item]) for item in sorted(by_item)])


def rounded(one: Interval) -> list[float]:
    return [round(value, 4) for value in (one.mean, one.low, one.high)]


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each."""
    lines = [
        "| model | device | commit | changed | AUROC, generated | AUROC, scenes | difference from the defaults "
        "| deletion ↑ | insertion ↓ |",
        "|---" * 9 + "|",
    ]
    columns = ("auroc_generated", "auroc_scenes", "difference", "deletion", "insertion")
    for row in rows:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) for name in columns]
        start = [row["model"], row["device"], f"`{row['commit']}`", row["variation"]]
        lines.append("| " + " | ".join(start + cells) + " |")
    return "\n".join(lines) + "\n"


TABLES = {("bench/README.md", "defaults"): table}

if __name__ == "__main__":
    main()
