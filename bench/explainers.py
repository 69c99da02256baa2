"""Seconds for one image of thirty steps: DF-CAM, relevance and attention, beside the obvious way of each.

    python bench/explainers.py                           # the embedded model
    python bench/explainers.py sd15 --random-weights     # Stable Diffusion 1.5's architecture, on a GPU

The obvious way (bench/plain_gradients.py) is the authors': a whole generation a layer for DF-CAM, a whole generation a
step for relevance. Its maps are compared with the engine's first. Then it and the engine, with one image and with a
group of images whose steps share batches, are timed in turn, generation and decoding included; a ratio is the median of
the rounds' ratios. Rows of this model and device are replaced in
bench/results/explainers.json, and the table in bench/README.md is made anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import plain_gradients as plain
import record
import torch
from diffusers import DDIMScheduler
from scipy.stats import spearmanr

from dfengine import Attention, Cam, Engine, Relevance, Rise
from dfengine.diffusion.trajectory import start_noise, trajectories
from dfengine.runtime.tuning import synchronize

PROMPT = {"shapes": "a red circle above a blue square on a gray background"}
NUM_STEPS, MASKS, GUIDANCE = 30, 500, 5.0
#: How well the obvious way's maps and the engine's must agree, by rank: for float16 both are rounded.
AGREEMENT = {torch.float32: 0.999, torch.float16: 0.95, torch.bfloat16: 0.9}


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that some work takes, and its result."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - began, result


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The lowest rank correlation of maps in pairs; those that are the same everywhere must be so in both."""
    pairs = zip(ours, theirs, strict=True)
    return min(
        float(np.ptp(a) == np.ptp(b)) if np.ptp(b) == 0 else float(spearmanr(a.ravel(), b.ravel()).statistic)
        for a, b in pairs
    )


def main() -> None:
    """Compare, measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--image-size", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=8, help="images that are explained together")
    options = parser.parse_args()
    engine = Engine.from_pretrained(
        options.model, random_weights=options.random_weights, dtype=options.dtype, image_size=options.image_size
    )
    denoiser, device = engine.denoiser, engine.denoiser.device
    pipeline: Any = denoiser.pipeline  # type: ignore[attr-defined]
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    prompt = PROMPT.get(options.model, "a photo of an astronaut riding a horse")
    job = engine.job(prompt, num_steps=NUM_STEPS, guidance=GUIDANCE)
    obvious = plain.Generation(
        pipeline, prompt, start_noise(job.seed, denoiser.latent_shape)[None], GUIDANCE, NUM_STEPS
    )
    layers, tokens = list(denoiser.layers()), denoiser.tokens(prompt)
    positions = denoiser.encode_prompts([prompt]).tensors["text"].shape[1]

    jobs = [job, *(engine.job(prompt, num_steps=NUM_STEPS, guidance=GUIDANCE, seed=n) for n in range(1, options.group))]

    def ours(explainer: Any, count: int = 1) -> Callable[[], list[Any]]:
        return lambda: list(explainer.explain(denoiser, trajectories(denoiser, jobs[:count])))

    def gate(name: str, made: list[Any], theirs: Any) -> float:
        if name == "cam":
            return min(
                agreement([step.layers[layer].numpy() for step in made], [m.numpy() for m in theirs[layer]])
                for layer in layers
            )
        if name == "relevance":
            return agreement(
                [step.relevance[tokens.own].numpy() for step in made], [one[tokens.own].numpy() for one in theirs]
            )
        return agreement([step.saliency.numpy() for step in made], [one[tokens.own].sum(0).numpy() for one in theirs])

    ways: dict[str, tuple[Any, Callable[[], Any], str]] = {
        "cam": (Cam(), lambda: plain.cam(obvious, layers), f"{len(layers)} generations, one a layer"),
        "relevance": (Relevance(), lambda: plain.relevance(obvious, positions), f"{NUM_STEPS} generations, one a step"),
        "attention": (Attention(), lambda: plain.attention(obvious, denoiser.latent_shape[1:]), "one generation"),
    }
    rise = Rise(MASKS)
    (path,) = trajectories(denoiser, [job])
    one_step = [(0, step) for step in range(1, NUM_STEPS)]
    step_seconds = [clocked(lambda: list(rise.explain(denoiser, [path], one_step)), device)[0] for _ in range(4)]
    rows = []
    for name, (explainer, slow, how) in ways.items():
        made, theirs = ours(explainer)(), slow()
        agreed = gate(name, made, theirs)
        print(f"{name}: agreement {agreed:.6f}", flush=True)
        assert agreed >= AGREEMENT[denoiser.dtype], f"{name}: the two ways agree by {agreed} only"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rounds = []
        for _ in range(options.rounds):
            one = statistics.median(clocked(ours(explainer), device)[0] for _ in range(3))
            each = clocked(ours(explainer, options.group), device)[0] / options.group
            alone = statistics.median(
                clocked(lambda: list(explainer.explain(denoiser, [path])), device)[0]  # noqa: B023  # called here
                for _ in range(3)
            )
            rounds.append((one, each, clocked(slow, device)[0], alone))
            print(f"{name}: {one:.2f} s, {each:.2f} s in a group, the obvious way {rounds[-1][2]:.1f} s", flush=True)
        ones, eachs, slows, alones = zip(*rounds, strict=True)
        rows.append(
            record.environment(device)
            | {
                "model": options.model,
                "image": list(denoiser.image_shape),
                "dtype": str(denoiser.dtype).removeprefix("torch."),
                "explainer": name,
                "steps": NUM_STEPS,
                "obvious": how,
                "seconds": spread(ones),
                "group": options.group,
                "seconds_in_a_group": spread(eachs),
                "obvious_seconds": spread(slows),
                "ratio": round(statistics.median(slow / one for one, _, slow, _ in rounds), 1),
                "ratio_in_a_group": round(statistics.median(slow / each for _, each, slow, _ in rounds), 1),
                "explaining_seconds": round(statistics.median(alones), 3),
                "rise_step_seconds": round(statistics.median(step_seconds[1:]), 3),
                "agreement": round(agreed, 6),
                "peak_gib": _peak(device),
            }
        )
    every = record.replace("explainers", rows, ("device", "model", "dtype", "explainer"))
    record.place(table(every), "bench/README.md", "explainers")
    print(table(every))


def spread(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def _peak(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | device | explainer | the obvious way, s | | dfengine, one image, s | × | in a group, s an image | × "
        "| without the generation, s | one step of DF-RISE, 500 masks, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        slow, one, each = (
            f"{low:.2f} **{middle:.2f}** {high:.2f}"
            for low, middle, high in (row["obvious_seconds"], row["seconds"], row["seconds_in_a_group"])
        )
        lines.append(
            f"| {row['model']}, {row['dtype']} | {row['device']} | {row['explainer']} | {slow} | {row['obvious']} | "
            f"{one} | {row['ratio']} | {each} ({row['group']} images) | {row['ratio_in_a_group']} | "
            f"{row['explaining_seconds']:.2f} | {row['rise_step_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
