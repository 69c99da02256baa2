"""How many masks does each estimator of a DF-RISE map need? Rank correlation over pixels with maps of other masks.

    OMP_NUM_THREADS=1 python bench/estimators.py   # writes bench/results/estimators.json, the table in bench/README.md
    python bench/estimators.py --model sd15 --random-weights --device cuda --half 12000

Two halves of equally many masks are scored for each prompt and step. Maps of the first 10, 15, 20, 30 … masks of one
half are compared with two maps of the whole other half: the same estimator's ("own") and the score's default
estimator's ("reference"). Verified first: maps summed a few masks at a time are those of one sum, and the engine's own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dfkernels
import record
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import Trajectory, trajectories

sys.path.insert(0, str(record.ROOT / "tests"))
from tolerance import tolerance

PROMPTS = (
    "a red circle above a blue square on a gray background",
    "a yellow star left of a purple ring on a black background",
    "a green triangle on a white background",
    "an orange cross below a cyan circle on a brown background",
)
STEPS, NUM_STEPS = (3, 12, 21, 28), 30
BATCH = 64
THRESHOLDS = (0.95, 0.99)
#: score → the estimators that make a map of it
ESTIMATORS = {"local": ("sum", "coverage", "contrast"), "global": ("sum", "coverage", "contrast", "ridge")}
#: score → the estimator of the reference map
REFERENCE = {"local": "coverage", "global": "ridge"}
#: what a map is compared with, by its name in the rows and in the table
CONVERGED = {"own": "own map", "reference": "reference"}
#: Standard errors that a map may be from the engine's: its batches hold other latents, by which half precision rounds.
ROUNDING = 0.05


def counts(half: int) -> tuple[int, ...]:
    """10, 15, 20, 30, 45, 70, 100 … below `half`, and `half`."""
    grid = (lead * 10**power // 10 for power in range(1, 9) for lead in (10, 15, 20, 30, 45, 70))
    return (*itertools.takewhile(lambda count: count < half, grid), half)


def needed(counts: Sequence[int], curve: Sequence[float], threshold: float) -> int | None:
    """The smallest of the counts from which on the curve stays at or above the threshold; None if there is none."""
    backwards = zip(reversed(counts), reversed(curve), strict=True)
    return min((count for count, value in itertools.takewhile(lambda at: at[1] >= threshold, backwards)), default=None)


def agreement(one: Float[Tensor, "h w"], other: Float[Tensor, "h w"]) -> float:
    """Spearman's correlation over pixels, to four digits."""
    return round(float(spearmanr(one.flatten().cpu(), other.flatten().cpu()).statistic), 4)


def scores_of(engine: Engine, path: Trajectory, step: int, first: int, count: int) -> dict[str, Tensor]:
    """Local score maps [n, h, w] and global scores [n] of the masks first … first + count − 1 of one step."""
    denoiser, device = engine.denoiser, engine.denoiser.device
    network, latent = denoiser.with_prompts(path.prompt), path.latents[step : step + 1]
    seeds, steps = (torch.tensor([number], device=device) for number in (path.job.mask_seed, step))

    def epsilon(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        t = torch.full((len(x),), path.job.timesteps[step], device=device)
        return denoiser.schedule.epsilon(network(x, t, 0), x, t)

    unmasked = epsilon(latent)[0]
    scores: dict[str, list[Tensor]] = {score: [] for score in ESTIMATORS}
    for indices in torch.arange(first, first + count, device=device).split(BATCH):
        answers = epsilon(dfkernels.apply_masks(latent, seeds, steps, torch.zeros_like(indices), indices))
        for score, found in scores.items():
            found.append(dfkernels.similarity(answers, unmasked, score=score))
    return {score: torch.cat(found) for score, found in scores.items()}


def maps_of(
    scores: Float[Tensor, "n h w"] | Float[Tensor, " n"],
    seed: int,
    step: int,
    shape: tuple[int, int],
    counts: Sequence[int],
    *,
    first: int = 0,
) -> dict[str, list[Tensor]]:
    """Every estimator's maps of so many scores, those of the masks first, first + 1, …; each mask is added once."""
    device = scores.device
    sums = dfkernels.Sums.zeros(1, shape, device)
    found: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS["local" if scores.ndim == 3 else "global"]}
    seeds, steps = torch.tensor([seed], device=device), torch.tensor([step], device=device)
    for begin, end in itertools.pairwise((0, *counts)):
        indices = torch.arange(first + begin, first + end, device=device)
        dfkernels.add(sums, scores[begin:end], seeds, steps, torch.zeros_like(indices), indices)
        for estimator, maps in found.items():
            if estimator == "ridge":
                maps.append(dfkernels.ridge(scores[:end], seed, step, shape, first=first)[0])
            else:
                maps.append(dfkernels.estimate(sums, estimator)[0][0])
    return found


def rows_of(engine: Engine, path: Trajectory, step: int, half: int) -> Iterator[dict[str, Any]]:
    """One step's row of each score and estimator."""
    where = (path.job.mask_seed, step, engine.denoiser.latent_shape[1:])
    grid = counts(half)
    one, other = (scores_of(engine, path, step, first, half) for first in (0, half))
    for score, estimator in REFERENCE.items():
        tested = maps_of(one[score], *where, grid)
        whole = {name: maps[0] for name, maps in maps_of(other[score], *where, (half,), first=half).items()}
        reliability = agreement(tested[estimator][-1], whole[estimator])
        for name, maps in tested.items():
            against = {"own": whole[name], "reference": whole[estimator]}
            curves = {
                what: [agreement(saliency, converged) for saliency in maps] for what, converged in against.items()
            }
            row = {"prompt": path.job.prompt, "step": step, "score": score, "estimator": name, "half": half}
            for what, threshold in itertools.product(curves, THRESHOLDS):
                row[needed_key(what, threshold)] = needed(grid, curves[what], threshold)
            yield row | {"reliability": reliability, "agreement": {"counts": grid, **curves}}


def needed_key(what: str, threshold: float) -> str:
    return f"needed_{threshold * 100:.0f}_{what}"


def verify(engine: Engine, path: Trajectory, step: int) -> None:
    """Maps summed a few masks at a time are those of one sum, and the engine's own; or nothing is measured."""
    count = 5 * BATCH
    elsewhere = {(0, other) for other in range(len(path)) if other != step}
    for score, values in scores_of(engine, path, step, 0, count).items():
        where = (values, path.job.mask_seed, step, engine.denoiser.latent_shape[1:])
        parts, whole = maps_of(*where, (7, 100, count)), maps_of(*where, (count,))
        for estimator in ESTIMATORS[score]:
            torch.testing.assert_close(parts[estimator][-1], whole[estimator][0], **tolerance("estimate"))
        rise = Rise(num_masks=count, score=score, estimator="coverage")
        (theirs,) = rise.explain(engine.denoiser, [path], elsewhere)
        away = (whole["coverage"][0].cpu() - theirs.saliency).abs() / theirs.error
        assert (away <= ROUNDING).all(), f"{score} maps are {away.max():.3f} standard errors from the engine's"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Masks needed over prompts and steps and how reliable the references are, of each model and kind of device."""
    models: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        models.setdefault((row["model"], row["device_type"]), []).append(row)
    return "\n".join(
        part for (model, device_type), mine in models.items() for part in table_of(model, device_type, mine)
    )


def table_of(model: str, device_type: str, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The same of one model."""
    columns = list(itertools.product(CONVERGED, THRESHOLDS))
    prompts, steps = (len({row[name] for row in rows}) for name in ("prompt", "step"))
    yield f"{model} ({device_type}): {prompts} prompts × {steps} steps, halves of {rows[0]['half']} masks.\n"
    yield "| score | estimator | " + " | ".join(f"{CONVERGED[what]}: {threshold}" for what, threshold in columns) + " |"
    yield "|---" * (2 + len(columns)) + "|"
    for score, estimators in ESTIMATORS.items():
        for estimator in estimators:
            mine = [row for row in rows if (row["score"], row["estimator"]) == (score, estimator)]
            cells = (spread([row[needed_key(*column)] for row in mine]) for column in columns)
            yield f"| {score} | `{estimator}` | {' | '.join(cells)} |"
    halves = []
    for score, estimator in REFERENCE.items():
        mine = [row["reliability"] for row in rows if (row["score"], row["estimator"]) == (score, estimator)]
        middle = f"{min(mine):.3f} **{statistics.median(mine):.3f}** {max(mine):.3f}"
        halves.append(f"{score} `{estimator}` {middle}")
    yield f"\nSplit-half reliability of the references: {'; '.join(halves)}.\n"


def spread(numbers: Sequence[int | None]) -> str:
    """Median [lowest–highest], and in how many cases the threshold is reached; a case where it is not has ∞."""
    values = [math.inf if count is None else count for count in numbers]

    def told(count: float) -> str:
        return "never" if math.isinf(count) else f"{count:.0f}"

    reached = sum(map(math.isfinite, values))
    if not reached:
        return f"**never**, 0 of {len(values)}"
    lowest, highest = told(min(values)), told(max(values))
    return f"**{told(statistics.median(values))}** [{lowest}–{highest}], {reached} of {len(values)}"


@torch.no_grad()
def main() -> None:
    """Verify, measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="shapes", help="shapes, a diffusers folder, or sd15 with --random-weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--device", help="by default the GPU where there is one")
    parser.add_argument("--half", type=int, default=3000, help="masks in each of the two halves")
    options = parser.parse_args()
    engine = Engine.from_pretrained(
        options.model, device=options.device, random_weights=options.random_weights, batch_size=BATCH
    )
    paths = trajectories(engine.denoiser, [engine.job(prompt, seed=7, num_steps=NUM_STEPS) for prompt in PROMPTS])
    verify(engine, paths[0], STEPS[0])

    device = engine.denoiser.device
    # A folder by its own name, wherever it lies.
    model = engine.denoiser.name.replace(options.model, Path(options.model).name)
    here = {"model": model, "device_type": device.type}
    environment, rows = record.environment(device), []
    for path, step in itertools.product(paths, STEPS):
        rows += [here | row | environment for row in rows_of(engine, path, step, options.half)]
        print(
            f"{path.job.prompt}, step {step}: reliability of ridge {rows[-1]['reliability']}",
            file=sys.stderr,
            flush=True,
        )
    every = record.replace("estimators", rows, tuple(here))
    record.place(table(every), "bench/README.md", "estimators")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
