"""How often is an image of the embedded model right? 200 captions it never saw, judged attribute by attribute.

python bench/shapes_model.py          # writes bench/results/shapes_model.json and prints the table
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from scipy.stats import binomtest

from dfengine import Engine
from dfengine.diffusion.trajectory import trajectories
from dfengine.shapes import GUIDANCE
from dfengine.shapes.judge import ATTRIBUTES, Judge
from dfengine.shapes.world import render, sample_scenes

CAPTIONS = 200
STEPS = 30
RESULT = Path(__file__).parent / "results" / "shapes_model.json"


def main() -> None:
    """Measure, record and print."""
    engine, judge = Engine.from_pretrained("shapes", device="cpu", batch_size=50), Judge.load()
    scenes = sample_scenes(CAPTIONS, torch.Generator().manual_seed(2024), held_out=True)
    captions = scenes.captions
    jobs = [engine.job(str(caption), seed=seed, num_steps=STEPS) for seed, caption in enumerate(captions)]
    images = []
    for first in range(0, CAPTIONS, 50):
        images += [path.image for path in trajectories(engine.denoiser, jobs[first : first + 50])]
    agrees = judge.agrees(torch.stack(images).permute(0, 3, 1, 2) / 255, captions)
    rendered = judge.agrees(render(scenes)[0], captions)
    record = {
        "what": f"{CAPTIONS} held-out captions, {STEPS} steps, guidance {GUIDANCE}; rates with 95 % Wilson intervals",
        "torch": torch.__version__,
        "every attribute": rate(agrees.all(1)),
        **{name: rate(agrees[:, i]) for i, name in enumerate(ATTRIBUTES)},
        "judge on rendered scenes of the same captions": rate(rendered.all(1)),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def rate(right: torch.Tensor) -> list[float]:
    """Share of right answers with its 95 % Wilson interval."""
    test = binomtest(int(right.sum()), len(right))
    interval = test.proportion_ci(method="wilson")
    return [round(float(value), 3) for value in (test.statistic, interval.low, interval.high)]


def table(record: dict) -> str:
    """The record in Markdown."""
    rows = [(name, value) for name, value in record.items() if isinstance(value, list)]
    lines = [f"| {name} | {share:.1%} | {low:.1%} – {high:.1%} |" for name, (share, low, high) in rows]
    return "\n".join(["| right in | rate | 95 % interval |", "|---|---|---|", *lines])


if __name__ == "__main__":
    main()
