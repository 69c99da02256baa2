"""Seconds per prompt for Table 1, compared with plain implementations, and the table itself.

    python bench/games.py [--prompts 200]

The plain implementations (one latent in a forward, one image in a feature pass) are timed on the first prompt, on one
in the middle and on the last one, after their curves and their DF-CAM map were compared with the engine's. The hours
for 1000 prompts are also predicted from the first 16. Replaces the rows of this device and model in
bench/results/games.json.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import plain_gradients
import record
import torch
from diffusers import DDIMScheduler
from explainers import spread
from plain import Plain, random_masks
from plain_games import Games, lime
from scipy.stats import spearmanr

from dfengine import Cam, Engine
from dfengine.diffusion.trajectory import start_noise
from dfengine.evaluate import TABLES as PAPER_TABLES
from dfengine.evaluate import GameCache, captions, default_step, make_methods, play_games, summarise_games
from dfengine.evaluate.games import play

NUM_STEPS, MASKS, SAMPLES, FIRST = 30, 500, 1000, 16
#: The largest relative difference of features, and the lowest rank correlation of maps, of both implementations.
FEATURES_AGREE, MAPS_AGREE = 1e-3, 0.999


class Baseline:
    """The work of Table 1 for one prompt, by the plain implementations."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.denoiser: Any = engine.denoiser
        self.pipeline = self.denoiser.pipeline
        self.pipeline.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.scheduler.set_timesteps(NUM_STEPS)
        self.seconds: list[float] = []

    def __call__(self, prompt: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """method → the map and the features of both curves. Adds to `seconds`."""
        start = time.perf_counter()
        # Sampling takes a second; both implementations need it.
        (trajectory,) = self.engine.sample([self.engine.job(prompt, num_steps=NUM_STEPS)])
        step = default_step(NUM_STEPS)
        explained = (trajectory.latents[step], trajectory.job.timesteps[step], self.engine.guidance)
        tests = Games(self.pipeline, prompt, *explained, self.denoiser.features)
        network = Plain(self.pipeline, prompt, *explained, guided=False)
        shape = self.denoiser.latent_shape[1:]
        noise = start_noise(0, self.denoiser.latent_shape)[None]
        generation = plain_gradients.Generation(self.pipeline, prompt, noise, self.engine.guidance, NUM_STEPS)
        layers = plain_gradients.cam(generation, list(self.denoiser.layers()))
        maps = {
            "random": np.random.default_rng(0).random(shape),
            "lime": lime(network, trajectory.image.numpy(), SAMPLES),
            "rise": network.maps(random_masks(shape, MASKS, seed=0))[1],
            "cam": combined({name: maps[step] for name, maps in layers.items()}, shape),
        }
        curves = {name: (saliency, tests.curves(saliency)) for name, saliency in maps.items()}
        self.seconds.append(time.perf_counter() - start)
        print(f"baseline: {self.seconds[-1]:.1f} s per prompt", flush=True)
        return curves


def combined(layers: dict[str, torch.Tensor], shape: tuple[int, int]) -> np.ndarray:
    """The sum of all layers' maps, each at the latent's size and scaled to [0, 1]."""
    total = np.zeros(shape)
    for layer in layers.values():
        resized = torch.nn.functional.interpolate(layer[None, None], size=shape, mode="bilinear")[0, 0].numpy()
        if np.ptp(resized) > 0:
            total += (resized - resized.min()) / np.ptp(resized)
    return total


def check(engine: Engine, prompt: str, expected: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Exit unless both DF-CAM maps agree, and both curves of the same map."""
    (trajectory,) = engine.sample([engine.job(prompt, num_steps=NUM_STEPS)])
    trajectory = dataclasses.replace(trajectory, explain_steps=(default_step(NUM_STEPS),))
    (cam,) = Cam().explain(engine.denoiser, [trajectory])
    ranks = float(spearmanr(cam.saliency.numpy().ravel(), expected["cam"][0].ravel()).statistic)
    record.check(ranks > MAPS_AGREE, f"rank correlation of the DF-CAM maps is {ranks:.5f}, expected > {MAPS_AGREE}")
    maps = {name: torch.from_numpy(saliency).float()[None] for name, (saliency, _) in expected.items()}
    features = engine.denoiser.features
    if features is None:
        raise ValueError(f"{engine.denoiser.name} has no feature extractor, which the curves need")
    for name, (curves,) in play(engine.denoiser, [trajectory], maps, features).items():
        difference = np.abs(curves.features.numpy() - expected[name][1]).max() / np.abs(expected[name][1]).max()
        record.check(
            difference < FEATURES_AGREE, f"curves of {name} differ by {difference}, expected < {FEATURES_AGREE}"
        )


def main() -> None:
    """Compare, measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    recorder = record.Recorder("games", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained("shapes")
    baseline, prompts = Baseline(engine), captions(options.prompts)
    check(engine, prompts[0], baseline(prompts[0]))
    explainers = make_methods(PAPER_TABLES[1], num_masks=MASKS, num_samples=SAMPLES)
    jobs = [engine.job(text, num_steps=NUM_STEPS, seed=seed) for seed, text in enumerate(prompts)]
    cache, seconds, predicted = GameCache(), 0.0, 0.0
    engine.prepare(engine.plan(jobs[:1], explainers))
    for count in (FIRST, len(jobs) // 2, len(jobs)):
        start = time.perf_counter()
        results = play_games(engine.denoiser, engine.sample, jobs[:count], explainers, cache=cache)
        seconds += time.perf_counter() - start
        predicted = predicted or 1000 * seconds / count
        print(f"dfengine: {count} prompts in {seconds:.0f} s", flush=True)
        if count != FIRST:
            baseline(prompts[count - 1])
    start = time.perf_counter()
    summary = summarise_games(results)
    row = recorder.environment(engine.denoiser.device) | {
        "model": "shapes",
        "prompts": len(jobs),
        "steps": NUM_STEPS,
        "masks": MASKS,
        "samples": SAMPLES,
        "baseline_seconds": spread(baseline.seconds),
        "seconds": round(seconds / len(jobs), 3),
        "ratio": round(statistics.median(baseline.seconds) / (seconds / len(jobs)), 1),
        "predicted_hours_for_1000": round(predicted / 3600, 3),
        "measured_hours_for_1000": round(1000 * seconds / len(jobs) / 3600, 3),
        "summary_seconds": round(time.perf_counter() - start, 1),
        "table": summary.table().splitlines(),
    }
    recorder.replace([row], ("device", "model"))
    print(table([row]))


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each, and Table 1 of the last one."""
    lines = [
        "| model | device | commit | prompts | baseline, s per prompt | dfengine, s per prompt | × "
        f"| 1000 prompts, predicted from {FIRST} | measured |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        low, median, high = row["baseline_seconds"]
        lines.append(
            f"| {row['model']} | {row['device']} | `{row['commit']}` | {row['prompts']} "
            f"| {low:.1f} **{median:.1f}** {high:.1f} | **{row['seconds']:.2f}** | {row['ratio']} "
            f"| {row['predicted_hours_for_1000']:.2f} h | {row['measured_hours_for_1000']:.2f} h |"
        )
    return "\n".join([*lines, "", *rows[-1]["table"]]) + "\n"


TABLES = {("bench/README.md", "games"): table}

if __name__ == "__main__":
    main()
