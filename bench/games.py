"""Seconds a prompt for Table 1, beside one latent a forward and one image a feature pass; and the table itself.

    python bench/games.py [--prompts 200] [--out a folder for the table's figures]

The obvious way is timed on one prompt before, one amid and one after dfengine's, after its curves and its DF-CAM and
DF-RISE maps were held against dfengine's. Seconds for 1000 prompts are predicted from the first 16. Rows of this device
are replaced in bench/results/games.json, and the tables in bench/README.md are made anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import plain_gradients
import record
import torch
from diffusers import DDIMScheduler
from explainers import spread
from plain import Plain
from plain_games import Games, drawn, lime
from scipy.stats import spearmanr

from dfengine import Cam, Engine, studies
from dfengine.diffusion.trajectory import start_noise
from dfengine.evaluate import TABLES, GameCache, captions, default_step, make_methods, play_games, summarise_games
from dfengine.evaluate.games import play

NUM_STEPS, MASKS, SAMPLES, FIRST = 30, 500, 1000, 16
#: Features of one point of both ways, and their maps' ranks, agree so far.
FEATURES_AGREE, MAPS_AGREE = 1e-3, 0.999


class Obvious:
    """Table 1's work for one prompt."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.denoiser = engine, engine.denoiser
        self.pipeline: Any = engine.denoiser.pipeline  # type: ignore[attr-defined]
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.scheduler.set_timesteps(NUM_STEPS)

    def __call__(self, prompt: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By method, the map and the features of both curves."""
        (path,) = self.engine.sample([self.engine.job(prompt, num_steps=NUM_STEPS)])  # a second; both ways need it
        step = default_step(NUM_STEPS)
        where = (path.latents[step], path.job.timesteps[step], self.engine.guidance)
        board = Games(self.pipeline, prompt, *where, self.denoiser.features)
        network = Plain(self.pipeline, prompt, *where, guided=False)
        shape = self.denoiser.latent_shape[1:]
        noise = start_noise(0, self.denoiser.latent_shape)[None]
        generation = plain_gradients.Generation(self.pipeline, prompt, noise, self.engine.guidance, NUM_STEPS)
        layers = plain_gradients.cam(generation, list(self.denoiser.layers()))
        maps = {
            "random": np.random.default_rng(0).random(shape),
            "lime": lime(network, path.image.numpy(), SAMPLES),
            "rise": network.maps(drawn(shape, MASKS))[1],
            "cam": combined({name: maps[step] for name, maps in layers.items()}, shape),
        }
        return {name: (saliency, board.curves(saliency)) for name, saliency in maps.items()}


def combined(layers: dict[str, torch.Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The sum of layers, each at the latent's size and in [0, 1]."""
    total = np.zeros(shape)
    for one in layers.values():
        resized = torch.nn.functional.interpolate(one[None, None], size=shape, mode="bilinear")[0, 0].numpy()
        if np.ptp(resized) > 0:
            total += (resized - resized.min()) / np.ptp(resized)
    return total


def check(engine: Engine, prompt: str, theirs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Both ways' DF-CAM is one map, and of one map both ways' curves are the same."""
    (path,) = engine.sample([engine.job(prompt, num_steps=NUM_STEPS)])
    path = dataclasses.replace(path, explain_steps=(default_step(NUM_STEPS),))
    (cam,) = Cam().explain(engine.denoiser, [path])
    ranks = float(spearmanr(cam.saliency.numpy().ravel(), theirs["cam"][0].ravel()).statistic)
    assert ranks > MAPS_AGREE, f"DF-CAM of both ways agrees by {ranks} only"
    maps = {name: torch.from_numpy(saliency).float()[None] for name, (saliency, _) in theirs.items()}
    assert engine.denoiser.features is not None
    for name, (one,) in play(engine.denoiser, [path], maps, engine.denoiser.features).items():
        off = float(np.abs(one.features.numpy() - theirs[name][1]).max() / np.abs(theirs[name][1]).max())
        assert off < FEATURES_AGREE, f"curves of {name} differ by {off}"


def main() -> None:
    """Compare, measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    engine = Engine.from_pretrained("shapes")
    obvious, prompts = Obvious(engine), captions(given.prompts)
    slow: list[float] = []

    def time_obvious(prompt: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        began = time.perf_counter()
        found = obvious(prompt)
        slow.append(time.perf_counter() - began)
        print(f"the obvious way: {slow[-1]:.1f} s a prompt", flush=True)
        return found

    check(engine, prompts[0], time_obvious(prompts[0]))
    explainers = make_methods(TABLES[1], num_masks=MASKS, num_samples=SAMPLES)
    jobs = [engine.job(text, num_steps=NUM_STEPS, seed=seed) for seed, text in enumerate(prompts)]
    cache, seconds, done = GameCache(), 0.0, 0
    predicted = 0.0
    engine.prepare(engine.plan(jobs[:1], explainers))
    for size in (FIRST, len(jobs) // 2, len(jobs)):
        began = time.perf_counter()
        found = play_games(engine.denoiser, engine.sample, jobs[:size], explainers, cache=cache)
        seconds, done = seconds + time.perf_counter() - began, size
        predicted = predicted or 1000 * seconds / done
        print(f"dfengine: {done} prompts in {seconds:.0f} s", flush=True)
        if size != FIRST:
            time_obvious(prompts[size - 1])
    began = time.perf_counter()
    summary = summarise_games(found)
    row = record.environment(engine.denoiser.device) | {
        "model": "shapes",
        "prompts": len(jobs),
        "steps": NUM_STEPS,
        "masks": MASKS,
        "samples": SAMPLES,
        "obvious_seconds": spread(slow),
        "seconds": round(seconds / len(jobs), 3),
        "ratio": round(statistics.median(slow) / (seconds / len(jobs)), 1),
        "predicted_hours_for_1000": round(predicted / 3600, 3),
        "measured_hours_for_1000": round(1000 * seconds / len(jobs) / 3600, 3),
        "summary_seconds": round(time.perf_counter() - began, 1),
        "table": summary.table().splitlines(),
    }
    every = record.replace("games", [row], ("device", "model"))
    record.place(table(every), "bench/README.md", "games")
    print(table(every))
    if given.out is not None:
        studies.games(engine, prompts, explainers, num_steps=NUM_STEPS, cache=cache).save(given.out)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, and the last one's table."""
    lines = [
        "| model | device | prompts | one at a time, s a prompt | dfengine, s a prompt | × | 1000 prompts, from "
        f"{FIRST} | from all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = row["obvious_seconds"]
        lines.append(
            f"| {row['model']} | {row['device']} | {row['prompts']} | {low:.1f} **{middle:.1f}** {high:.1f} | "
            f"**{row['seconds']:.2f}** | {row['ratio']} | {row['predicted_hours_for_1000']:.2f} h | "
            f"{row['measured_hours_for_1000']:.2f} h |"
        )
    return "\n".join([*lines, "", *rows[-1]["table"]]) + "\n"


if __name__ == "__main__":
    main()
