"""How soon does an estimator of a DF-RISE map settle? Agreement of two halves of many masks on the embedded model.

    python bench/estimators.py            # writes bench/results/estimators.json and prints the table

Two halves of 3000 masks each are drawn for a few prompts and steps; every estimator's map of one half is compared (rank
correlation over pixels) with its map of the other, and with fewer masks of its own.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path

import dfkernels
import torch
from scipy.stats import spearmanr
from torch import Tensor

from dfengine import Engine
from dfengine.trajectory import Trajectory, trajectories

PROMPTS = (
    "a red circle above a blue square on a gray background",
    "a yellow star left of a purple ring on a black background",
    "a green triangle on a white background",
)
STEPS = (3, 12, 21, 28)
HALF = 3000
COUNTS = (30, 100, 300, 1000, HALF)
RESULT = Path(__file__).parent / "results" / "estimators.json"

#: score → the estimators that make a map of it
ESTIMATORS = {"local": ("sum", "coverage", "contrast"), "global": ("sum", "coverage", "contrast", "ridge")}


def scores_of(
    engine: Engine, path: Trajectory, step: int, first: int, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Mask indices, local score maps and global scores of a range of masks of one step, in batches."""
    denoiser, size = engine.denoiser, 250
    latent = path.latents[step : step + 1]
    t = torch.tensor([path.job.timesteps[step]])
    seeds, steps = torch.tensor([path.job.mask_seed]), torch.tensor([step])
    reference = denoiser(latent, t, path.prompt)[0]
    rows = torch.zeros(size, dtype=torch.int64)
    for begin in range(first, first + count, size):
        indices = torch.arange(begin, begin + size)
        masked = dfkernels.blend(latent, seeds, steps, rows, indices)
        answers = denoiser(masked, t.expand(size), path.prompt[rows])
        local = dfkernels.similarity(answers, reference)
        yield indices, local, dfkernels.similarity(answers, reference, score="global")


def maps_of(engine: Engine, path: Trajectory, step: int, first: int) -> dict[tuple[str, str, int], Tensor]:
    """Every estimator's map of the first few and of all masks of one half, by (score, estimator, number of masks)."""
    shape = engine.denoiser.latent_shape[1:]
    seed = path.job.mask_seed
    batches = list(scores_of(engine, path, step, first, HALF))
    indices, local, scalar = (torch.cat(column) for column in zip(*batches, strict=True))
    found = {}
    for count in COUNTS:
        part = slice(0, count)
        for score, values in (("local", local), ("global", scalar)):
            sums = dfkernels.Sums.zeros(1, shape)
            where = (torch.tensor([seed]), torch.tensor([step]), torch.zeros(count, dtype=torch.int64), indices[part])
            dfkernels.add(sums, values[part], *where)
            for estimator in ESTIMATORS[score]:
                if estimator == "ridge":
                    found[score, estimator, count] = dfkernels.ridge(scalar[part], seed, step, shape, first=first)[0]
                else:
                    found[score, estimator, count] = dfkernels.estimate(sums, estimator)[0][0]
    return found


@torch.no_grad()
def main() -> None:
    """Measure, record and print."""
    engine = Engine.from_pretrained("shapes", device="cpu")
    paths = trajectories(engine.denoiser, [engine.job(prompt, seed=7) for prompt in PROMPTS])
    agreement: dict[str, list[float]] = {}
    for path in paths:
        for step in STEPS:
            one, other = (maps_of(engine, path, step, first) for first in (0, HALF))
            for (score, estimator, count), saliency in one.items():
                settled = other[score, estimator, HALF].flatten()
                rank = spearmanr(saliency.flatten(), settled).statistic
                agreement.setdefault(f"{score} {estimator} {count}", []).append(round(float(rank), 4))
    record = {
        "what": "Spearman correlation over pixels with the same estimator's map of 3000 other masks",
        "model": "shapes",
        "prompts": PROMPTS,
        "steps": STEPS,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "agreement": agreement,
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def table(record: dict) -> str:
    """The recorded figures in Markdown: lowest, median and highest over prompts and steps."""
    lines = ["| score | estimator | " + " | ".join(f"{count} masks" for count in COUNTS) + " |", "|---" * 7 + "|"]
    for score, estimators in ESTIMATORS.items():
        for estimator in estimators:
            cells = []
            for count in COUNTS:
                values = torch.tensor(record["agreement"][f"{score} {estimator} {count}"])
                cells.append(f"{values.min():.2f} **{values.median():.2f}** {values.max():.2f}")
            lines.append(f"| {score} | `{estimator}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
