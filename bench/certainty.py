"""How many masks, and how long, a map takes until it is certain: DF-RISE's default, and the authors' way.

    OMP_NUM_THREADS=1 python bench/certainty.py
    OMP_NUM_THREADS=1 python bench/certainty.py --reduced     # Stable Diffusion 1.5 at an eighth of its width, 64×64

A map is certain once its rank correlation (Spearman, over pixels) with a converged map of other masks stays at or above
0.95. The authors' way is one mask a forward with its guidance pair and the printed sum (bench/plain.py); its masks are
counted by the engine, whose maps are the same (checked first), and timed in its own loop. Random weights show what the
shapes of latents and masks do, not what a trained network does. Replaces the rows of this model in
bench/results/certainty.json.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import record
import torch
from estimators import needed
from jaxtyping import Float
from plain import Plain, random_masks
from scipy.stats import spearmanr
from throughput import AGREEMENT, agreement
from torch import Tensor

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.explain.rise_forwards import RiseForwards

sys.path.insert(0, str(record.ROOT / "tests"))
import reduced

PROMPTS = (
    "a red circle above a blue square on a gray background",
    "a yellow star left of a purple ring on a black background",
)
STEPS, NUM_STEPS = (3, 8), 12
BATCH, PLAIN_MASKS = 64, 24
CERTAIN = 0.95
COUNTS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072)
#: Each way's settings, and the masks of each of the two maps that are compared, at most.
WAYS = {
    "the default": ({}, 1024),
    "the default, independent masks": ({"design": "iid"}, 2048),
    "the authors'": (None, 3072),
}


def rise_of(way: str, most: int, name: str = "rise") -> Rise:
    """A way's settings with so many masks."""
    settings, _ = WAYS[way]
    if settings is None:
        return Rise.paper(num_masks=most, estimator="sum", target="guided", name=name)
    return Rise(num_masks=most, name=name, **settings)


def nested_maps(
    engine: Engine, rise: Rise, paths: Sequence[Trajectory], counts: Sequence[int]
) -> tuple[list[list[Float[Tensor, "h w"]]], float]:
    """Every row's map after each number of masks, and the seconds of a mask."""
    forwards = RiseForwards(rise, engine.denoiser, paths)
    forwards.start()
    rows = range(len(forwards.rows))
    maps: list[list[Tensor]] = [[] for _ in rows]
    begin = time.perf_counter()
    for first, last in pairwise((0, *counts)):
        for _ in forwards.run_masks(list(rows), first, last - first):
            pass
        for row in rows:
            maps[row].append(forwards.estimate(row, last)[0].cpu())
    return maps, (time.perf_counter() - begin) / (counts[-1] * len(rows))


def measure(engine: Engine, way: str, most: int, paths: Sequence[Trajectory]) -> record.Row:
    """The masks that every step needs."""
    counts = [count for count in COUNTS if count <= most]
    others = [dataclasses.replace(path, job=dataclasses.replace(path.job, seed=path.job.seed ^ 1)) for path in paths]
    tested, seconds = nested_maps(engine, rise_of(way, most), paths, counts)
    converged, _ = nested_maps(engine, rise_of(way, most), others, [most])
    curves = [
        [round(float(spearmanr(one.flatten(), reference.flatten()).statistic), 4) for one in maps]
        for maps, (reference,) in zip(tested, converged, strict=True)
    ]
    masks = [needed(counts, curve, CERTAIN) for curve in curves]
    return {"way": way, "most": most, "needed": masks, "curves": curves, "seconds": seconds}


def plain_seconds(engine: Engine, path: Trajectory) -> float:
    """Seconds of a mask in the authors' loop, the median of three."""
    denoiser, step = engine.denoiser, path.steps[0]
    explained = (path.latents[step], path.job.timesteps[step], path.job.guidance)
    loop = Plain(denoiser.pipeline, path.job.prompt, *explained, guided=True)  # type: ignore[attr-defined]  # shapes, SD
    times = []
    for _ in range(4):  # the first warms up
        begin = time.perf_counter()
        loop.maps(random_masks(denoiser.latent_shape[1:], PLAIN_MASKS))
        times.append((time.perf_counter() - begin) / PLAIN_MASKS)
    return statistics.median(times[1:])


def check(engine: Engine, path: Trajectory) -> None:
    """Exit unless the engine's map of the authors' way is that of the plain loop."""
    denoiser, step = engine.denoiser, path.steps[0]
    explained = (path.latents[step], path.job.timesteps[step], path.job.guidance)
    loop = Plain(denoiser.pipeline, path.job.prompt, *explained, guided=True)  # type: ignore[attr-defined]  # shapes, SD
    rank = agreement(engine, loop, dataclasses.replace(path, explain_steps=(step,)), "guided")
    expected = AGREEMENT[torch.float32]
    record.check(rank >= expected, f"rank correlation with the plain loop is {rank:.5f}, expected at least {expected}")


def table(rows: Sequence[record.Row]) -> str:
    """Masks and time to a certain map, each way of each model."""
    lines = [
        "| model | way | masks to a certain map | ms a mask | seconds to a certain map | × |",
        "|---" * 6 + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        slowest = next((row for row in mine if row["way"] == "the authors'"), None)
        for row in mine:
            masks, most = needed_masks(row), row["most"]
            is_bound = masks is None
            masks = most if masks is None else masks
            seconds = masks * row["seconds"]
            times = "–"
            if slowest is not None and slowest is not row and not is_bound:
                other = needed_masks(slowest)
                bound = "" if other else "more than "
                times = f"{bound}{(other or slowest['most']) * slowest['seconds'] / seconds:.0f}"
            more = "> " if is_bound else ""
            spread = ", ".join("never" if one is None else str(one) for one in row["needed"])
            lines.append(
                f"| {model} | {row['way']} | {more}{masks} ({spread}) | {1000 * row['seconds']:.1f} "
                f"| {more}{seconds:.2f} | {times} |"
            )
    commits = ", ".join(sorted({f"`{row['commit']}`" for row in rows}))
    return "\n".join(lines) + f"\n\nCommit {commits}; {rows[0]['device']}, one thread. Median (each prompt and step).\n"


def needed_masks(row: record.Row) -> int | None:
    """The median over prompts and steps; None if more than half are not certain with all masks."""
    median = statistics.median_high(one if one is not None else 2**31 for one in row["needed"])
    return None if median == 2**31 else median


TABLES = {("bench/README.md", "certainty"): table}


@torch.no_grad()
def main() -> None:
    """Check, measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--reduced", action="store_true", help="Stable Diffusion 1.5's architecture, narrow, random")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    recorder = record.Recorder("certainty", TABLES, record=not options.no_record)
    torch.set_num_threads(1)
    if options.reduced:
        with tempfile.TemporaryDirectory() as folder:
            built = reduced.reduced("sd15", Path(folder), {"unet": {"sample_size": 64}})
            engine = Engine(reduced.random_pipeline(built), batch_size=BATCH)
        model, prompts, steps = "sd15, an eighth wide, random", PROMPTS[:1], STEPS[:1]
        limits = {"the default": 256, "the default, independent masks": 256}
    else:
        engine, model, prompts, steps = (
            Engine.from_pretrained("shapes", device="cpu", batch_size=BATCH),
            "shapes",
            PROMPTS,
            STEPS,
        )
        limits = {way: most for way, (_, most) in WAYS.items()}
    jobs = [engine.job(prompt, seed=7, num_steps=NUM_STEPS) for prompt in prompts]
    paths = [dataclasses.replace(path, explain_steps=steps) for path in trajectories(engine.denoiser, jobs)]
    check(engine, paths[0])
    rows = []
    for way, most in limits.items():
        row = measure(engine, way, most, paths)
        if way == "the authors'":
            row["seconds"] = plain_seconds(engine, paths[0])
        rows.append({"model": model} | row | recorder.environment(engine.denoiser.device))
        print(f"{way}: {row['needed']}, {1000 * row['seconds']:.1f} ms a mask", file=sys.stderr, flush=True)
    recorder.replace(rows, ("model",))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
