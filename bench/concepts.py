"""Seconds per prompt for Table 3, compared with a plain implementation that explains one prompt at a time.

    python bench/concepts.py

The relevance of the first prompt's concepts is compared first; then both implementations are timed in turn. Replaces
the rows of this device and model in bench/results/concepts.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import plain_gradients as plain
import record
from diffusers import DDIMScheduler
from explainers import AGREEMENT, NUM_STEPS, spread, timed

from dfengine import Engine, ExponentialDDIMScheduler, Relevance
from dfengine.diffusion.trajectory import start_noise
from dfengine.evaluate import ConceptRecord, ConceptSummary, embedded_prompts, measure_concepts, summarise_concepts
from dfengine.evaluate.concepts import concept_relevance
from dfengine.result import normalised

SCHEDULES, PROMPTS, ROUNDS = ("uniform", "early", "latter"), 16, 2


def main() -> None:
    """Compare, measure, record and print."""
    options = record.parser(__doc__).parse_args()
    recorder = record.Recorder("concepts", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained("shapes")
    denoiser: Any = engine.denoiser
    pipeline, prompts = denoiser.pipeline, embedded_prompts(PROMPTS)
    positions = denoiser.encode_prompts([""]).tensors["text"].shape[1]
    config = DDIMScheduler.from_config(pipeline.scheduler.config).config
    noise = start_noise(0, denoiser.latent_shape)[None]

    def all_prompts() -> tuple[list[ConceptRecord], list[ConceptSummary]]:
        records = [ConceptRecord(schedule, number, 0) for schedule in SCHEDULES for number in range(len(prompts))]
        jobs = [engine.job(prompts[one.prompt].text, num_steps=NUM_STEPS, sampling=one.schedule) for one in records]
        measure_concepts(engine.stream(jobs, Relevance()), records, prompts, denoiser.tokens)
        return records, summarise_concepts(records, prompts, dict.fromkeys(SCHEDULES, (0,) * NUM_STEPS))

    def first_prompt() -> list[np.ndarray]:
        """The baseline: relevance of the first prompt's positions, [positions, steps], for each schedule."""
        values = []
        for stage in SCHEDULES:
            pipeline.scheduler = ExponentialDDIMScheduler.from_config(config, stage=stage)
            generation = plain.Generation(pipeline, prompts[0].text, noise, engine.guidance, NUM_STEPS)
            values.append(np.stack([step.numpy() for step in plain.relevance(generation, positions)], axis=1))
        return values

    measured, _ = all_prompts()
    tokens = denoiser.tokens(prompts[0].text)
    tolerance = 10 * (1 - AGREEMENT[denoiser.dtype])
    for schedule, values in zip(SCHEDULES, first_prompt(), strict=True):
        # The engine adds up the positions from the end of the text on.
        ends = values[: len(tokens) - 1]
        padding = values[len(ends) :].sum(0, keepdims=True)
        expected = concept_relevance(np.concatenate([ends, padding]), tokens, prompts[0])
        record.check(bool(np.isfinite(normalised(ends, tokens)).all()), f"{schedule}: relevance is not finite")
        (first,) = [one for one in measured if one.schedule == schedule and one.prompt == 0]
        for role, line in expected.items():
            worst = float(np.abs(line - first.relevance[role]).max())
            record.check(worst < tolerance, f"{schedule}, {role}: relevance differs by {worst}, expected < {tolerance}")
    rounds = []
    for _ in range(ROUNDS):
        seconds = timed(all_prompts, denoiser.device)[0] / PROMPTS
        rounds.append((seconds, timed(first_prompt, denoiser.device)[0]))
        print(f"{rounds[-1][0]:.2f} s per prompt, baseline {rounds[-1][1]:.1f} s", flush=True)
    row = recorder.environment(denoiser.device) | {
        "model": "shapes",
        "prompts": PROMPTS,
        "steps": NUM_STEPS,
        "seconds": spread([fast for fast, _ in rounds]),
        "baseline_seconds": spread([slow for _, slow in rounds]),
        "ratio": round(statistics.median(slow / fast for fast, slow in rounds), 1),
    }
    recorder.replace([row], ("device", "model"))
    print(table([row]))


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each."""
    lines = ["| model | device | commit | baseline, s per prompt | dfengine, s per prompt | × |", "|---" * 6 + "|"]
    for row in rows:
        slow, fast = (
            f"{low:.2f} **{median:.2f}** {high:.2f}" for low, median, high in (row["baseline_seconds"], row["seconds"])
        )
        lines.append(
            f"| {row['model']} | {row['device']} | `{row['commit']}` | {slow} | {fast} ({row['prompts']} together) "
            f"| {row['ratio']} |"
        )
    return "\n".join(lines) + "\n"


TABLES = {("bench/README.md", "concepts"): table}

if __name__ == "__main__":
    main()
