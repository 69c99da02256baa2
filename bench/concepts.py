"""Seconds a prompt for Table 3, beside one generation a step and schedule.

    python bench/concepts.py

Both ways' lines of the first prompt are compared first; then they are timed in turn. Rows of this device are replaced
in bench/results/concepts.json, and the table in bench/README.md is made anew.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import plain_gradients as plain
import record
from diffusers import DDIMScheduler
from explainers import AGREEMENT, NUM_STEPS, clocked, spread

from dfengine import Engine, ExponentialDDIMScheduler, Relevance
from dfengine.diffusion.trajectory import start_noise
from dfengine.evaluate import ConceptRecord, ConceptSummary, embedded_prompts, measure_concepts, summarise_concepts
from dfengine.evaluate.concepts import concept_relevance
from dfengine.result import normalised

SCHEDULES, PROMPTS, ROUNDS = ("uniform", "early", "latter"), 16, 2


def main() -> None:
    """Compare, measure, record and print."""
    engine = Engine.from_pretrained("shapes")
    denoiser, prompts = engine.denoiser, embedded_prompts(PROMPTS)
    pipeline: Any = denoiser.pipeline  # type: ignore[attr-defined]
    positions = denoiser.encode_prompts([""]).tensors["text"].shape[1]
    config = DDIMScheduler.from_config(pipeline.scheduler.config).config
    noise = start_noise(0, denoiser.latent_shape)[None]

    def ours() -> tuple[list[ConceptRecord], list[ConceptSummary]]:
        planned = [ConceptRecord(schedule, place, 0) for schedule in SCHEDULES for place in range(len(prompts))]
        jobs = [engine.job(prompts[one.prompt].text, num_steps=NUM_STEPS, sampling=one.schedule) for one in planned]
        measure_concepts(engine.stream(jobs, Relevance()), planned, prompts, denoiser.tokens)
        return planned, summarise_concepts(planned, prompts, dict.fromkeys(SCHEDULES, (0,) * NUM_STEPS))

    def obvious() -> list[np.ndarray]:
        found = []
        for stage in SCHEDULES:
            pipeline.scheduler = ExponentialDDIMScheduler.from_config(config, stage=stage)
            one = plain.Generation(pipeline, prompts[0].text, noise, engine.guidance, NUM_STEPS)
            found.append(np.stack([step.numpy() for step in plain.relevance(one, positions)], axis=1))
        return found

    measured, _ = ours()
    tokens = denoiser.tokens(prompts[0].text)
    for schedule, values in zip(SCHEDULES, obvious(), strict=True):
        ends = values[: len(tokens) - 1]
        padding = values[len(ends) :].sum(0, keepdims=True)
        expected = concept_relevance(np.concatenate([ends, padding]), tokens, prompts[0])
        assert np.isfinite(normalised(ends, tokens)).all()
        (first,) = [one for one in measured if one.schedule == schedule and one.prompt == 0]
        for role, line in expected.items():
            worst = float(np.abs(line - first.relevance[role]).max())
            assert worst < 10 * (1 - AGREEMENT[denoiser.dtype]), f"{schedule}, {role}: the two ways differ by {worst}"
    rounds = []
    for _ in range(ROUNDS):
        rounds.append((clocked(ours, denoiser.device)[0] / PROMPTS, clocked(obvious, denoiser.device)[0]))
        print(f"{rounds[-1][0]:.2f} s a prompt, the obvious way {rounds[-1][1]:.1f} s", flush=True)
    row = record.environment(denoiser.device) | {
        "model": "shapes",
        "prompts": PROMPTS,
        "steps": NUM_STEPS,
        "seconds": spread([fast for fast, _ in rounds]),
        "obvious_seconds": spread([slow for _, slow in rounds]),
        "ratio": round(statistics.median(slow / fast for fast, slow in rounds), 1),
    }
    every = record.replace("concepts", [row], ("device", "model"))
    record.place(table(every), "bench/README.md", "concepts")
    print(table(every))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| model | device | one at a time, s a prompt | dfengine, s a prompt | × |", "|---|---|---|---|---|"]
    for row in rows:
        both = (row["obvious_seconds"], row["seconds"])
        slow, fast = (f"{low:.2f} **{middle:.2f}** {high:.2f}" for low, middle, high in both)
        lines.append(
            f"| {row['model']} | {row['device']} | {slow} | {fast} (of {row['prompts']} together) | {row['ratio']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
