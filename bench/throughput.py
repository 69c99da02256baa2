"""Masks per second at each batch size, compared with a plain implementation of DF-RISE (bench/plain.py).

    python bench/throughput.py                                # the embedded model
    python bench/throughput.py sd15 --random-weights          # the architecture of Stable Diffusion 1.5, on a GPU

First, the plain loop's map is checked against the engine's map from the same masks. Then all configurations are timed
in turn, in several rounds; a ratio is the median of the rounds' ratios. Replaces the rows of this model, device and
dtype in bench/results/throughput.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import dfkernels
import record
import torch
from plain import Plain, random_masks
from scipy.stats import spearmanr

from dfengine import Engine, Rise
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.profile.clock import Clock, matmul_ceiling
from dfengine.profile.operations import flops_by_kind
from dfengine.runtime.tuning import synchronize

PROMPT = {"shapes": "a red circle above a blue square on a gray background"}
STEP, ROUNDS = 12, 5
#: Masks of the check, and the rank correlation that the maps must reach.
NUM_CHECK_MASKS, AGREEMENT = 128, {torch.float32: 0.9999, torch.float16: 0.99, torch.bfloat16: 0.97}


@dataclass(frozen=True)
class Configuration:
    """One way to explain a step. `run` explains it with that many masks; `masks` of them are timed in each round."""

    name: str
    target: str
    batch: int
    masks: int
    run: Callable[[int], object]
    compiled: bool = False


def configurations(
    engine: Engine, plain: dict[str, Plain], trajectory: Trajectory, batches: Sequence[int], plain_masks: int
) -> list[Configuration]:
    """The plain loops, the engine at each batch size, and the engine compiled at its own batch size."""
    denoiser, own = engine.denoiser, engine.denoiser.batch_size
    shape = denoiser.latent_shape[1:]

    def plain_loop(target: str, loop: Plain) -> Configuration:
        return Configuration("plain loop", target, 1, plain_masks, lambda count: loop.maps(random_masks(shape, count)))

    def dfengine(target: str, batch: int, compiled: bool) -> Configuration:
        def run(masks: int) -> list[Any]:
            denoiser.batch_size, denoiser.compiled = batch, compiled
            return list(Rise.paper(num_masks=masks, target=target).explain(denoiser, [trajectory]))

        # Complete batches, at least four, and enough of them to be timed.
        return Configuration("dfengine", target, batch, batch * max(4, -(-plain_masks // batch)), run, compiled)

    return [
        *(plain_loop(target, loop) for target, loop in plain.items()),
        *(dfengine("conditional", batch, False) for batch in sorted({*batches, own})),
        dfengine("guided", own, False),
        *(dfengine(target, own, True) for target in ("guided", "conditional")),
    ]


def agreement(engine: Engine, plain: Plain, trajectory: Trajectory, target: str) -> float:
    """The rank correlation, at the one explained step, of the plain loop's map and the engine's from the same masks."""
    shape, (step,) = engine.denoiser.latent_shape[1:], trajectory.explain_steps
    masks = dfkernels.masks(trajectory.job.mask_seed, step, 0, NUM_CHECK_MASKS, shape).numpy()
    expected, _ = plain.maps(iter(masks))
    rise = Rise.paper(num_masks=NUM_CHECK_MASKS, target=target, estimator="sum")
    (step_map,) = rise.explain(engine.denoiser, [trajectory])
    return float(spearmanr(expected.ravel(), step_map.saliency.numpy().ravel()).statistic)


@torch.no_grad()
def measure(
    engine: Engine, plain: dict[str, Plain], trajectory: Trajectory, batches: Sequence[int], plain_masks: int
) -> list[record.Row]:
    """One row for each configuration, with its ratios to the plain loop of the released code and of the same target."""
    denoiser = engine.denoiser
    agreed = {target: agreement(engine, loop, trajectory, target) for target, loop in plain.items()}
    check(agreed, denoiser.dtype)
    ceiling = matmul_ceiling(Clock(denoiser.device), denoiser.dtype)
    flops = count_flops(engine, plain, trajectory)
    own = denoiser.batch_size
    compared = configurations(engine, plain, trajectory, batches, plain_masks)
    compile_seconds = warm_up(denoiser, compared)
    for configuration in compared:
        if configuration.name == "dfengine":
            denoiser.batch_size, denoiser.compiled = configuration.batch, configuration.compiled
            target = configuration.target
            agreed[target] = min(agreed[target], agreement(engine, plain[target], trajectory, target))
    check(agreed, denoiser.dtype)
    rounds = [[seconds_per_mask(one, denoiser.device) for one in compared] for _ in range(ROUNDS)]
    denoiser.batch_size, denoiser.compiled = own, False
    rows = []
    for number, configuration in enumerate(compared):
        rates = [1 / seconds[number] for seconds in rounds]
        to_pair = [seconds[0] / seconds[number] for seconds in rounds]
        to_same_target = [seconds[configuration.target == "conditional"] / seconds[number] for seconds in rounds]
        executed = flops[configuration.name, configuration.target] * statistics.median(rates)
        rows.append(
            {
                "way": configuration.name,
                "target": configuration.target,
                "batch": configuration.batch,
                "compiled": configuration.compiled,
                "masks_s": [round(value, 2) for value in (min(rates), statistics.median(rates), max(rates))],
                "times_plain_pair": round(statistics.median(to_pair), 2),
                "times_plain_alike": round(statistics.median(to_same_target), 2),
                "share_of_ceiling": round(executed / ceiling, 3),
                "ceiling_tflop_s": round(ceiling / 1e12, 3),
                "compile_s": round(compile_seconds, 1) if configuration.compiled else None,
                "agreement_with_plain": round(agreed[configuration.target], 5),
            }
        )
    return rows


def count_flops(engine: Engine, plain: dict[str, Plain], trajectory: Trajectory) -> dict[tuple[str, str], int]:
    """(name of a configuration, target) → FLOPs per mask."""
    denoiser = engine.denoiser
    latent = torch.zeros(1, *denoiser.latent_shape, device=denoiser.device)
    timesteps = torch.tensor([5], device=denoiser.device)
    flops = {}
    for target, loop in plain.items():
        guided = GuidedDenoiser(denoiser, trajectory.prompt, trajectory.negative, target, [trajectory.job.guidance])
        forwards = {
            "dfengine": partial(guided.epsilon, latent, timesteps, 0),
            "plain loop": partial(loop.predict, latent),
        }
        flops |= {(name, target): sum(flops_by_kind(forward).values()) for name, forward in forwards.items()}
    return flops


def check(agreed: dict[str, float], dtype: torch.dtype) -> None:
    """Exit unless the engine's maps are the plain loop's, at every batch size."""
    for target, rank in agreed.items():
        record.check(
            rank >= AGREEMENT[dtype],
            f"rank correlation of the {target} maps of the plain loop and the engine is {rank:.4f}, "
            f"expected at least {AGREEMENT[dtype]}",
        )


def warm_up(denoiser: Any, compared: Sequence[Configuration]) -> float:
    """Run each configuration once. Returns the seconds of the first compiled one, compilation included."""
    seconds = 0.0
    for configuration in compared:
        compiles = configuration.compiled and not seconds
        if compiles:
            denoiser.batch_size = configuration.batch
            denoiser.compile()
        start = time.perf_counter()
        configuration.run(configuration.batch if configuration.name == "dfengine" else 2)
        synchronize(denoiser.device)
        if compiles:
            seconds = time.perf_counter() - start
    return seconds


def seconds_per_mask(configuration: Configuration, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    configuration.run(configuration.masks)
    synchronize(device)
    return (time.perf_counter() - start) / configuration.masks


def groups(rows: Sequence[record.Row]) -> list[list[record.Row]]:
    """The rows of each model and device."""
    keys = dict.fromkeys((row["model"], row["device"]) for row in rows)
    return [[row for row in rows if (row["model"], row["device"]) == key] for key in keys]


def table(rows: Sequence[record.Row]) -> str:
    """All rows, by model and device."""
    lines = []
    for group in groups(rows):
        first = group[0]
        lines += [f"**{first['model']}**, {first['dtype']}, on {first['device']}, commit `{first['commit']}`:", ""]
        columns = ["", "target", "batch size", "masks per second", "× plain loop, as released"]
        lines.append("| " + " | ".join([*columns, "× plain loop, same target", "share of the ceiling"]) + " |")
        lines.append("|---" * 7 + "|")
        for row in group:
            low, median, high = row["masks_s"]
            name = f"**{row['way']}, compiled**" if row["compiled"] else row["way"]
            lines.append(
                f"| {name} | {row['target']} | {row['batch']} | {low:.0f} **{median:.0f}** {high:.0f} "
                f"| {row['times_plain_pair']:.1f} | {row['times_plain_alike']:.1f} | {row['share_of_ceiling']:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def summary(rows: Sequence[record.Row]) -> str:
    """The plain loop as released and the engine by default, one line for each model and device."""
    columns = [
        "masks per second",
        "plain loop, guidance pair",
        "dfengine, by default",
        "",
        "compiled, as for long jobs",
        "",
    ]
    lines = ["| " + " | ".join([*columns, "commit"]) + " |", "|---" * 7 + "|"]
    for group in groups(rows):
        compiled = next(row for row in group if row["compiled"] and row["target"] == "conditional")
        same = {"compiled": False, "target": "conditional", "batch": compiled["batch"], "way": "dfengine"}
        default = next(row for row in group if same.items() <= row.items())
        first = group[0]
        cells = [f"{first['model']}, {first['dtype']}, {first['device']}", f"{first['masks_s'][1]:.0f}"]
        for row in (default, compiled):
            cells += [f"{row['masks_s'][1]:.0f}", f"{row['times_plain_pair']:.1f} ×"]
        lines.append("| " + " | ".join([*cells, f"`{first['commit']}`"]) + " |")
    return "\n".join(lines) + "\n"


TABLES = {("bench/README.md", "throughput"): table, ("README.md", "speed"): summary}


def main() -> None:
    """Measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="latents in a forward")
    parser.add_argument("--plain-masks", type=int, default=100, help="masks of the plain loop in a round")
    options = parser.parse_args()
    recorder = record.Recorder("throughput", TABLES, record=not options.no_record)
    engine, other = (
        Engine.from_pretrained(options.model, random_weights=options.random_weights, dtype=options.dtype)
        for _ in range(2)
    )
    pipeline = other.denoiser.pipeline
    pipeline.unet.to(memory_format=torch.contiguous_format)  # as diffusers loads it
    job = engine.job(PROMPT.get(options.model, "a photo of a cat"), num_steps=30)
    engine.prepare(engine.plan([], Rise.paper()))
    (trajectory,) = trajectories(engine.denoiser, [job])
    trajectory = replace(trajectory, explain_steps=[STEP])
    step = (trajectory.latents[STEP], job.timesteps[STEP], job.guidance)
    plain = {target: Plain(pipeline, job.prompt, *step, target == "guided") for target in ("guided", "conditional")}
    measured = measure(engine, plain, trajectory, options.batches, options.plain_masks)
    model = {"model": engine.denoiser.name, "dtype": str(engine.denoiser.dtype).removeprefix("torch.")}
    rows = [recorder.environment(engine.denoiser.device) | model | row for row in measured]
    recorder.replace(rows, ("model", "device", "dtype"))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
