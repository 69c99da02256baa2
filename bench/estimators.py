"""How many masks each estimator of a DF-RISE map needs, by rank correlation over pixels with maps from other masks.

    OMP_NUM_THREADS=1 python bench/estimators.py
    python bench/estimators.py --model sd15 --random-weights --device cuda --half 12000

Two halves of equally many masks are scored for each prompt and step. Maps from the first 10, 15, 20, 30 … masks of
one half are compared with two maps from all masks of the other half: the same estimator's ("own") and that of the
score's default estimator ("reference"). Checked first: maps from partial sums are those from one sum, and the
engine's own. Replaces the rows of this model and kind of device in bench/results/estimators.json.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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
#: score → the estimators of a map from it
ESTIMATORS = {"local": ("sum", "coverage", "contrast"), "global": ("sum", "coverage", "contrast", "ridge")}
#: score → the estimator of the reference map
REFERENCE = {"local": "coverage", "global": "ridge"}
#: what a map is compared with: its name in the rows → its name in the table
CONVERGED = {"own": "own map", "reference": "reference"}
#: The distance from the engine's map that is allowed, in standard errors: half precision rounds differently where other
#: latents share the batch.
ROUNDING = 0.05


def counts(half: int) -> tuple[int, ...]:
    """10, 15, 20, 30, 45, 70, 100 … below `half`, and `half`."""
    grid = (lead * 10**power // 10 for power in range(1, 9) for lead in (10, 15, 20, 30, 45, 70))
    return (*itertools.takewhile(lambda count: count < half, grid), half)


def needed(counts: Sequence[int], curve: Sequence[float], threshold: float) -> int | None:
    """The smallest of the counts from which on the curve stays at or above the threshold; None if there is none."""
    points = zip(reversed(counts), reversed(curve), strict=True)
    return min((count for count, _ in itertools.takewhile(lambda point: point[1] >= threshold, points)), default=None)


def agreement(one: Float[Tensor, "h w"], other: Float[Tensor, "h w"]) -> float:
    """Spearman's rank correlation over pixels, rounded to four digits."""
    return round(float(spearmanr(one.flatten().cpu(), other.flatten().cpu()).statistic), 4)


def scores_of(engine: Engine, trajectory: Trajectory, step: int, first: int, count: int) -> dict[str, Tensor]:
    """Local score maps [n, h, w] and global scores [n] of the masks first … first + count − 1 of one step."""
    denoiser, device = engine.denoiser, engine.denoiser.device
    network, latent = denoiser.with_prompts(trajectory.prompt), trajectory.latents[step : step + 1]
    seeds, steps = (torch.tensor([number], device=device) for number in (trajectory.job.mask_seed, step))

    def epsilon(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        t = torch.full((len(x),), trajectory.job.timesteps[step], device=device)
        return denoiser.schedule.epsilon(network(x, t, 0), x, t)

    unmasked = epsilon(latent)[0]
    scores: dict[str, list[Tensor]] = {score: [] for score in ESTIMATORS}
    for indices in torch.arange(first, first + count, device=device).split(BATCH):
        epsilons = epsilon(dfkernels.apply_masks(latent, seeds, steps, torch.zeros_like(indices), indices))
        for score, parts in scores.items():
            parts.append(dfkernels.similarity(epsilons, unmasked, score=score))
    return {score: torch.cat(parts) for score, parts in scores.items()}


def maps_of(
    scores: Float[Tensor, "n h w"] | Float[Tensor, " n"],
    seed: int,
    step: int,
    shape: tuple[int, int],
    counts: Sequence[int],
    *,
    first: int = 0,
) -> dict[str, list[Tensor]]:
    """Each estimator's maps from the first so many scores, of the masks first, first + 1, …, one map for each count."""
    device = scores.device
    sums = dfkernels.Sums.zeros(1, shape, device)
    by_estimator: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS["local" if scores.ndim == 3 else "global"]}
    seeds, steps = torch.tensor([seed], device=device), torch.tensor([step], device=device)
    for begin, end in itertools.pairwise((0, *counts)):
        indices = torch.arange(first + begin, first + end, device=device)
        dfkernels.add(sums, scores[begin:end], seeds, steps, torch.zeros_like(indices), indices)
        for estimator, maps in by_estimator.items():
            if estimator == "ridge":
                maps.append(dfkernels.ridge(scores[:end], seed, step, shape, first=first)[0])
            else:
                maps.append(dfkernels.estimate(sums, estimator)[0][0])
    return by_estimator


def rows_of(engine: Engine, trajectory: Trajectory, step: int, half: int) -> Iterator[record.Row]:
    """The rows of one step, one for each score and estimator."""
    masks = (trajectory.job.mask_seed, step, engine.denoiser.latent_shape[1:])
    grid = counts(half)
    one, other = (scores_of(engine, trajectory, step, first, half) for first in (0, half))
    for score, estimator in REFERENCE.items():
        tested = maps_of(one[score], *masks, grid)
        converged = {name: maps[0] for name, maps in maps_of(other[score], *masks, (half,), first=half).items()}
        reliability = agreement(tested[estimator][-1], converged[estimator])
        for name, maps in tested.items():
            references = {"own": converged[name], "reference": converged[estimator]}
            curves = {
                what: [agreement(saliency, reference) for saliency in maps] for what, reference in references.items()
            }
            row = {"prompt": trajectory.job.prompt, "step": step, "score": score, "estimator": name, "half": half}
            for what, threshold in itertools.product(curves, THRESHOLDS):
                row[needed_key(what, threshold)] = needed(grid, curves[what], threshold)
            yield row | {"reliability": reliability, "agreement": {"counts": grid, **curves}}


def needed_key(what: str, threshold: float) -> str:
    return f"needed_{threshold * 100:.0f}_{what}"


def check(engine: Engine, trajectory: Trajectory, step: int) -> None:
    """Exit unless maps from partial sums are those from one sum, and the engine's own."""
    count = 5 * BATCH
    other_steps = {(0, other) for other in range(len(trajectory)) if other != step}
    for score, values in scores_of(engine, trajectory, step, 0, count).items():
        scored = (values, trajectory.job.mask_seed, step, engine.denoiser.latent_shape[1:])
        partial, single = maps_of(*scored, (7, 100, count)), maps_of(*scored, (count,))
        for estimator in ESTIMATORS[score]:
            with record.checked(f"{score} {estimator} maps from partial sums"):
                torch.testing.assert_close(partial[estimator][-1], single[estimator][0], **tolerance("estimate"))
        rise = Rise.paper(num_masks=count, score=score, estimator="coverage")
        (step_map,) = rise.explain(engine.denoiser, [trajectory], other_steps)
        distance = float(((single["coverage"][0].cpu() - step_map.saliency).abs() / step_map.error).max())
        record.check(
            distance <= ROUNDING,
            f"{score} maps are {distance:.3f} standard errors from the engine's, expected at most {ROUNDING}",
        )


def table(rows: Sequence[record.Row]) -> str:
    """Masks needed over prompts and steps, and the references' reliability, for each model and kind of device."""
    models: dict[tuple[str, str], list[record.Row]] = {}
    for row in rows:
        models.setdefault((row["model"], row["device_type"]), []).append(row)
    return "\n".join(part for group in models.values() for part in table_of(group))


def table_of(rows: Sequence[record.Row]) -> Iterator[str]:
    """The parts of the table of one model and kind of device."""
    columns = list(itertools.product(CONVERGED, THRESHOLDS))
    prompts, steps = (len({row[name] for row in rows}) for name in ("prompt", "step"))
    first = rows[0]
    yield (
        f"{first['model']} ({first['device_type']}, commit `{first['commit']}`): {prompts} prompts × {steps} steps, "
        f"halves of {first['half']} masks.\n"
    )
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
    """Median [lowest–highest], and in how many cases the threshold is reached; the others count as infinite."""
    values = [math.inf if count is None else count for count in numbers]

    def shown(count: float) -> str:
        return "never" if math.isinf(count) else f"{count:.0f}"

    reached = sum(map(math.isfinite, values))
    if not reached:
        return f"**never**, 0 of {len(values)}"
    lowest, highest = shown(min(values)), shown(max(values))
    return f"**{shown(statistics.median(values))}** [{lowest}–{highest}], {reached} of {len(values)}"


TABLES = {("bench/README.md", "estimators"): table}


@torch.no_grad()
def main() -> None:
    """Check, measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--model", default="shapes", help="shapes, a diffusers folder, or sd15 with --random-weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--half", type=int, default=3000, help="masks in each of the two halves")
    options = parser.parse_args()
    recorder = record.Recorder("estimators", TABLES, record=not options.no_record)
    engine = Engine.from_pretrained(
        options.model, device=options.device, random_weights=options.random_weights, batch_size=BATCH
    )
    jobs = [engine.job(prompt, seed=7, num_steps=NUM_STEPS) for prompt in PROMPTS]
    sampled = trajectories(engine.denoiser, jobs)
    check(engine, sampled[0], STEPS[0])

    device = engine.denoiser.device
    # A folder is recorded by its name, not by its path.
    model = engine.denoiser.name.replace(options.model, Path(options.model).name)
    measured_on = {"model": model, "device_type": device.type}
    rows: list[record.Row] = []
    for trajectory, step in itertools.product(sampled, STEPS):
        measured = rows_of(engine, trajectory, step, options.half)
        rows += [measured_on | row | recorder.environment(device) for row in measured]
        reliability = rows[-1]["reliability"]
        print(f"{trajectory.job.prompt}, step {step}: reliability of ridge {reliability}", file=sys.stderr, flush=True)
    recorder.replace(rows, tuple(measured_on))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
