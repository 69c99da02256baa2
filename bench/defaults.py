"""What DF-RISE's defaults are worth: one setting changed at a time, against ground truth and in both games.

    OMP_NUM_THREADS=1 python bench/defaults.py

Maps of generated images and of rendered scenes, at every step of a short generation, are held against the true area of
the shapes; and of one step both games are played. Differences from the defaults are of the same images, with their
interval. Rows are written as they are made, and the table in bench/README.md is made anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import record

from dfengine import Engine, Rise
from dfengine.evaluate import ConceptJudge, captions, play_games, scenes, summarise_games
from dfengine.evaluate.intervals import Interval, bootstrap_interval
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=12, help="generated, and as many rendered")
    given = parser.parse_args()
    engine, texts, drawn = Engine.from_pretrained("shapes"), captions(given.images), scenes(given.images)
    generated = [engine.job(text, num_steps=NUM_STEPS, seed=seed) for seed, text in enumerate(texts)]
    noised = [
        engine.job(scene.prompt, image=scene.image, num_steps=NUM_STEPS, seed=seed) for seed, scene in enumerate(drawn)
    ]
    judge = ConceptJudge()
    paths = list(engine.sample([*generated, *noised]))
    true = [judge.areas(path.image.numpy(), Caption.parse(path.job.prompt)) for path in paths[: len(texts)]]
    shapes = [None if known is None else known["both"] for known in [*true, *(scene.areas for scene in drawn)]]
    base: np.ndarray | None = None
    rows = []
    for name, settings in VARIATIONS.items():
        rise = dataclasses.replace(DEFAULT, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = auroc(list(rise.explain(engine.denoiser, paths)), shapes)
            played = summarise_games(
                play_games(engine.denoiser, engine.sample, generated, [rise], step=GAME_STEP), "frechet-single"
            ).methods[rise.name]
        base = found if base is None else base
        half = len(texts)
        row = record.environment(engine.denoiser.device) | {
            "model": "shapes",
            "variation": name,
            "masks": rise.num_masks,
            "steps": NUM_STEPS,
            "images": [int(np.isfinite(part).sum()) for part in (found[:half], found[half:])],
            "auroc_generated": _told(found[:half]),
            "auroc_scenes": _told(found[half:]),
            "difference": _told(found - base),
            "deletion": _values(played["deletion"].auc),
            "insertion": _values(played["insertion"].auc),
        }
        rows.append(row)
        every = record.replace("defaults", rows, ("device", "model"))
        record.place(table(every), "bench/README.md", "defaults")
        print(table([row]).splitlines()[-1], flush=True)
    print(table(rows))


def auroc(made: Sequence[StepMap], shapes: Sequence[Any]) -> np.ndarray:
    """Each item's mean over the steps, NaN where the true area is not known."""
    each: dict[int, list[float]] = {}
    for one in made:
        true = shapes[one.item]
        value = float("nan") if true is None else localisation_scores(one.saliency.double().numpy(), true)["auroc"]
        each.setdefault(one.item, []).append(value)
    return np.array([np.mean(each[item]) for item in sorted(each)])


def _told(values: np.ndarray) -> list[float]:
    return _values(bootstrap_interval(values.tolist()))


def _values(found: Interval) -> list[float]:
    return [round(value, 4) for value in (found.mean, found.low, found.high)]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | device | changed | AUROC, generated | AUROC, scenes | difference from the defaults | deletion ↑ | "
        "insertion ↓ |",
        "|---|---|---|---|---|---|---|---|",
    ]
    columns = ("auroc_generated", "auroc_scenes", "difference", "deletion", "insertion")
    for row in rows:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[name]) for name in columns]
        lines.append(f"| {row['model']} | {row['device']} | {row['variation']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
