"""Masks a second at each batch size, beside DF-RISE written the obvious way (bench/plain.py).

    python bench/throughput.py                                # the embedded model
    python bench/throughput.py sd15 --random-weights          # Stable Diffusion 1.5's architecture, on a GPU

The plain loop's map of some masks is compared with the engine's of the same masks first. All ways are timed in turn,
round after round; a ratio is the median of the rounds' ratios. Rows of this model and device are replaced in
bench/results/throughput.json, and the table in bench/README.md is made anew.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import dfkernels
import record
import torch
from plain import Plain, drawn
from scipy.stats import spearmanr

from dfengine import Engine, Rise
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.profile.clock import Clock, matmul_ceiling
from dfengine.profile.operations import flops_by_kind
from dfengine.runtime.tuning import synchronize

PROMPT = {"shapes": "a red circle above a blue square on a gray background"}
STEP, ROUNDS = 12, 5
#: Masks of the check, and how well the maps must agree.
CHECKED, AGREEMENT = 128, {torch.float32: 0.9999, torch.float16: 0.99, torch.bfloat16: 0.97}


@dataclass(frozen=True)
class Way:
    """One way of explaining a step: its name, forwards a mask, latents a forward, masks a round, and how it is run."""

    name: str
    target: str
    batch: int
    masks: int
    run: Callable[[int], object]
    compiled: bool = False


def ways(engine: Engine, plain: dict[str, Plain], path: Trajectory, batches: list[int], plain_masks: int) -> list[Way]:
    """The plain loop, then the engine at each batch size, then compiled at its own."""
    denoiser, own = engine.denoiser, engine.denoiser.batch_size
    shape = denoiser.latent_shape[1:]
    found = []
    for target, slow in plain.items():
        found.append(Way("plain loop", target, 1, plain_masks, lambda n, slow=slow: slow.maps(drawn(shape, n))))

    def engine_way(target: str, batch: int, compiled: bool) -> Way:
        def run(masks: int) -> list[Any]:
            denoiser.batch_size, denoiser.compiled = batch, compiled
            rise = Rise(masks, target=target)
            return list(rise.explain(denoiser, [path]))

        # Whole batches, at least four, and long enough to be timed.
        return Way("dfengine", target, batch, batch * max(4, -(-plain_masks // batch)), run, compiled)

    found += [engine_way("conditional", batch, False) for batch in sorted({*batches, own})]
    found.append(engine_way("guided", own, False))
    found += [engine_way(target, own, True) for target in ("guided", "conditional")]
    return found


def agreement(engine: Engine, slow: Plain, path: Trajectory, target: str) -> float:
    """The rank correlation of the plain loop's map and the engine's, of the same masks."""
    masks = dfkernels.masks(path.job.mask_seed, STEP, 0, CHECKED, engine.denoiser.latent_shape[1:]).numpy()
    printed, _ = slow.maps(iter(masks))
    (ours,) = Rise(CHECKED, target=target, estimator="sum").explain(engine.denoiser, [path])
    return float(spearmanr(printed.ravel(), ours.saliency.numpy().ravel()).statistic)


@torch.no_grad()
def measure(
    engine: Engine, plain: dict[str, Plain], path: Trajectory, batches: list[int], plain_masks: int
) -> list[dict[str, Any]]:
    """A row a way, each with its ratio to the plain loop of the released code and to that of its own target."""
    denoiser = engine.denoiser
    agreed = {target: agreement(engine, slow, path, target) for target, slow in plain.items()}
    check(agreed, denoiser.dtype)
    clock = Clock(denoiser.device)
    ceiling = matmul_ceiling(clock, denoiser.dtype)
    own, one = denoiser.batch_size, torch.zeros(1, *denoiser.latent_shape, device=denoiser.device)
    timesteps, scale = (torch.tensor([value], device=denoiser.device) for value in (5, path.job.guidance))
    flops: dict[tuple[str, str], int] = {}
    for target, slow in plain.items():
        explained = GuidedDenoiser(denoiser, path.prompt, path.negative, target, scale)
        work = {"dfengine": partial(explained.epsilon, one, timesteps, 0), "plain loop": partial(slow.answer, one)}
        flops |= {(name, target): sum(flops_by_kind(forward).values()) for name, forward in work.items()}
    every = ways(engine, plain, path, batches, plain_masks)
    compile_seconds = first_of(denoiser, every)
    for way in every:
        if way.name == "dfengine":
            denoiser.batch_size, denoiser.compiled = way.batch, way.compiled
            agreed[way.target] = min(agreed[way.target], agreement(engine, plain[way.target], path, way.target))
    check(agreed, denoiser.dtype)
    seconds = [[timed(way, denoiser.device) for way in every] for _ in range(ROUNDS)]
    denoiser.batch_size, denoiser.compiled = own, False
    rows = []
    for number, way in enumerate(every):
        rates = [1 / took[number] for took in seconds]
        pair = [round_[0] / round_[number] for round_ in seconds]
        alike = [round_[way.target == "conditional"] / round_[number] for round_ in seconds]
        rows.append(
            {
                "way": way.name,
                "target": way.target,
                "batch": way.batch,
                "compiled": way.compiled,
                "masks_s": [round(value, 2) for value in (min(rates), statistics.median(rates), max(rates))],
                "times_plain_pair": round(statistics.median(pair), 2),
                "times_plain_alike": round(statistics.median(alike), 2),
                "share_of_ceiling": round(flops[way.name, way.target] * statistics.median(rates) / ceiling, 3),
                "ceiling_tflop_s": round(ceiling / 1e12, 3),
                "compile_s": round(compile_seconds, 1) if way.compiled else None,
                "agreement_with_plain": round(agreed[way.target], 5),
            }
        )
    return rows


def check(agreed: dict[str, float], dtype: torch.dtype) -> None:
    """Leave where the engine's maps, in whatever batches, are not the plain loop's."""
    for target, rank in agreed.items():
        if rank < AGREEMENT[dtype]:
            sys.exit(
                f"the {target} maps of the plain loop and the engine agree by {rank:.4f} only: nothing is reported"
            )


def first_of(denoiser: Any, every: list[Way]) -> float:
    """Run each way once, untimed. Returns the seconds that the first compiled one took."""
    took = 0.0
    for way in every:
        if way.compiled and not took:
            denoiser.batch_size = way.batch
            denoiser.compile()
        began = time.perf_counter()
        way.run(way.batch if way.name == "dfengine" else 2)
        synchronize(denoiser.device)
        if way.compiled and not took:
            took = time.perf_counter() - began
    return took


def timed(way: Way, device: torch.device) -> float:
    """Seconds a mask."""
    synchronize(device)
    began = time.perf_counter()
    way.run(way.masks)
    synchronize(device)
    return (time.perf_counter() - began) / way.masks


def table(rows: list[dict[str, Any]]) -> str:
    """Every recorded row, by device and model."""
    lines = []
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        lines += [f"**{model}**, {mine[0]['dtype']}, on {device}:", ""]
        columns = ["", "explained", "latents a forward", "masks a second", "× plain, as released"]
        lines.append("| " + " | ".join([*columns, "× plain, like for like", "of the ceiling"]) + " |")
        lines.append("|---" * 7 + "|")
        for row in mine:
            low, median, high = row["masks_s"]
            name = f"**{row['way']}, compiled**" if row["compiled"] else row["way"]
            lines.append(
                f"| {name} | {row['target']} | {row['batch']} | {low:.0f} **{median:.0f}** {high:.0f} "
                f"| {row['times_plain_pair']:.1f} | {row['times_plain_alike']:.1f} | {row['share_of_ceiling']:.0%} |"
            )
        lines.append("")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """The plain loop as released and the engine as shipped, a line a model and device."""
    columns = [
        "masks a second",
        "plain loop, a guidance pair a mask",
        "dfengine, as shipped",
        "",
        "compiled, as long jobs are",
    ]
    lines = ["| " + " | ".join([*columns, ""]) + " |", "|---" * 6 + "|"]
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        compiled = next(row for row in mine if row["compiled"] and row["target"] == "conditional")
        same = {"compiled": False, "target": "conditional", "batch": compiled["batch"], "way": "dfengine"}
        shipped = next(row for row in mine if same.items() <= row.items())
        cells = [f"{model}, {mine[0]['dtype']}, {device}", f"{mine[0]['masks_s'][1]:.0f}"]
        for row in (shipped, compiled):
            cells += [f"{row['masks_s'][1]:.0f}", f"{row['times_plain_pair']:.1f} ×"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--dtype")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 16, 64, 256], help="latents a forward")
    parser.add_argument("--plain-masks", type=int, default=100, help="of the plain loop, a round")
    options = parser.parse_args()
    engine, other = (
        Engine.from_pretrained(options.model, random_weights=options.random_weights, dtype=options.dtype)
        for _ in range(2)
    )
    pipeline = other.denoiser.pipeline
    pipeline.unet.to(memory_format=torch.contiguous_format)  # as diffusers loads it
    job = engine.job(PROMPT.get(options.model, "a photo of a cat"), num_steps=30)
    engine.prepare(engine.plan([], Rise()))
    (path,) = (replace(path, explain_steps=[STEP]) for path in trajectories(engine.denoiser, [job]))
    where = (path.latents[STEP], job.timesteps[STEP], job.guidance)
    plain = {target: Plain(pipeline, job.prompt, *where, target == "guided") for target in ("guided", "conditional")}
    rows = measure(engine, plain, path, options.batches, options.plain_masks)
    told = {"model": engine.denoiser.name, "dtype": str(engine.denoiser.dtype).removeprefix("torch.")}
    rows = [record.environment(engine.denoiser.device) | told | row for row in rows]
    every = record.replace("throughput", rows, ("model", "device", "dtype"))
    record.place(table(every), "bench/README.md", "throughput")
    record.place(summary(every), "README.md", "speed")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
