"""Seconds to explain one image of 30 steps by DF-CAM, relevance and attention, compared with plain implementations.

    python bench/explainers.py                           # the embedded model
    python bench/explainers.py sd15 --random-weights     # the architecture of Stable Diffusion 1.5, on a GPU

The plain implementations (bench/plain_gradients.py) follow the authors' code: one generation for each layer of
DF-CAM, one for each step of relevance. Their maps are compared with the engine's first. Then they and the engine,
with one image and with a group of images whose steps share batches, are timed in turn, generation and decoding
included; a ratio is the median of the rounds' ratios. Replaces the rows of this model, device and dtype in
bench/results/explainers.json.
"""

from __future__ import annotations

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
#: The rank correlation that both implementations' maps must reach; in half precision both are rounded.
AGREEMENT = {torch.float32: 0.999, torch.float16: 0.95, torch.bfloat16: 0.9}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """The seconds that a call takes, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def agreement(maps: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The lowest rank correlation of pairs of maps; a constant map agrees with a constant map only."""
    return min(
        float(np.ptp(a) == np.ptp(b)) if np.ptp(b) == 0 else float(spearmanr(a.ravel(), b.ravel()).statistic)
        for a, b in zip(maps, expected, strict=True)
    )


def spread(values: Sequence[float]) -> list[float]:
    """Lowest, median and highest, rounded to milliseconds."""
    return [round(value, 3) for value in (min(values), statistics.median(values), max(values))]


def main() -> None:
    """Compare, measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--image-size", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=8, help="images that are explained together")
    options = parser.parse_args()
    recorder = record.Recorder("explainers", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained(
        options.model, random_weights=options.random_weights, dtype=options.dtype, image_size=options.image_size
    )
    denoiser: Any = engine.denoiser
    device, pipeline = denoiser.device, denoiser.pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    prompt = PROMPT.get(options.model, "a photo of an astronaut riding a horse")
    jobs = [engine.job(prompt, num_steps=NUM_STEPS, guidance=GUIDANCE, seed=seed) for seed in range(options.group)]
    noise = start_noise(jobs[0].seed, denoiser.latent_shape)[None]
    generation = plain.Generation(pipeline, prompt, noise, GUIDANCE, NUM_STEPS)
    layers, tokens = list(denoiser.layers()), denoiser.tokens(prompt)
    positions = denoiser.encode_prompts([prompt]).tensors["text"].shape[1]

    def engine_maps(explainer: Any, count: int = 1) -> Callable[[], list[Any]]:
        return lambda: list(explainer.explain(denoiser, trajectories(denoiser, jobs[:count])))

    def agreement_of(name: str, steps: list[Any], expected: Any) -> float:
        if name == "cam":
            return min(
                agreement([step.layers[layer].numpy() for step in steps], [one.numpy() for one in expected[layer]])
                for layer in layers
            )
        if name == "relevance":
            values = [step.relevance[tokens.own].numpy() for step in steps]
            return agreement(values, [one[tokens.own].numpy() for one in expected])
        return agreement(
            [step.saliency.numpy() for step in steps], [one[tokens.own].sum(0).numpy() for one in expected]
        )

    compared: dict[str, tuple[Any, Callable[[], Any], str]] = {
        "cam": (Cam(), lambda: plain.cam(generation, layers), f"{len(layers)} generations, one per layer"),
        "relevance": (
            Relevance(),
            lambda: plain.relevance(generation, positions),
            f"{NUM_STEPS} generations, one per step",
        ),
        "attention": (Attention(), lambda: plain.attention(generation, denoiser.latent_shape[1:]), "one generation"),
    }
    (trajectory,) = trajectories(denoiser, jobs[:1])
    rise, other_steps = Rise.paper(num_masks=MASKS), [(0, step) for step in range(1, NUM_STEPS)]
    rise_seconds = [timed(lambda: list(rise.explain(denoiser, [trajectory], other_steps)), device)[0] for _ in range(4)]
    rows = []
    for name, (explainer, baseline, description) in compared.items():
        agreed = agreement_of(name, engine_maps(explainer)(), baseline())
        print(f"{name}: rank correlation {agreed:.6f}", flush=True)
        expected = AGREEMENT[denoiser.dtype]
        record.check(agreed >= expected, f"{name}: rank correlation {agreed:.4f}, expected at least {expected}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rounds = []
        for _ in range(options.rounds):
            one = statistics.median(timed(engine_maps(explainer), device)[0] for _ in range(3))
            grouped = timed(engine_maps(explainer, options.group), device)[0] / options.group
            alone = statistics.median(
                timed(lambda: list(explainer.explain(denoiser, [trajectory])), device)[0]  # noqa: B023  # called here
                for _ in range(3)
            )
            rounds.append((one, grouped, timed(baseline, device)[0], alone))
            print(f"{name}: {one:.2f} s, {grouped:.2f} s in a group, baseline {rounds[-1][2]:.1f} s", flush=True)
        ones, in_group, baselines, alones = zip(*rounds, strict=True)
        rows.append(
            recorder.environment(device)
            | {
                "model": options.model,
                "image": list(denoiser.image_shape),
                "dtype": str(denoiser.dtype).removeprefix("torch."),
                "explainer": name,
                "steps": NUM_STEPS,
                "baseline": description,
                "baseline_seconds": spread(baselines),
                "seconds": spread(ones),
                "group": options.group,
                "seconds_in_a_group": spread(in_group),
                "ratio": round(statistics.median(slow / one for one, _, slow, _ in rounds), 1),
                "ratio_in_a_group": round(statistics.median(slow / each for _, each, slow, _ in rounds), 1),
                "explaining_seconds": round(statistics.median(alones), 3),
                "rise_step_seconds": round(statistics.median(rise_seconds[1:]), 3),
                "agreement": round(agreed, 6),
                "peak_gib": peak_gib(device),
            }
        )
    recorder.replace(rows, ("device", "model", "dtype", "explainer"))
    print(table(rows))


def peak_gib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each."""
    lines = [
        "| model | device | commit | explainer | baseline, s | | dfengine, one image, s | × | in a group, s per image "
        "| × | without the generation, s | one step of DF-RISE, 500 masks, s |",
        "|---" * 12 + "|",
    ]
    for row in rows:
        slow, one, each = (
            f"{low:.2f} **{median:.2f}** {high:.2f}"
            for low, median, high in (row["baseline_seconds"], row["seconds"], row["seconds_in_a_group"])
        )
        lines.append(
            f"| {row['model']}, {row['dtype']} | {row['device']} | `{row['commit']}` | {row['explainer']} | {slow} "
            f"| {row['baseline']} | {one} | {row['ratio']} | {each} ({row['group']} images) "
            f"| {row['ratio_in_a_group']} | {row['explaining_seconds']:.2f} | {row['rise_step_seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


TABLES = {("bench/README.md", "explainers"): table}

if __name__ == "__main__":
    main()
