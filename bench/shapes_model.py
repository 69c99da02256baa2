"""How often an image of the embedded model is right: captions it was not trained on, judged attribute by attribute.

python bench/shapes_model.py
"""

from __future__ import annotations

from collections.abc import Sequence

import record
import torch
from scipy.stats import binomtest

from dfengine import Engine
from dfengine.diffusion.trajectory import trajectories
from dfengine.shapes import GUIDANCE
from dfengine.shapes.judge import ATTRIBUTES, Judge
from dfengine.shapes.world import render, sample_scenes

STEPS, GROUP = 30, 50
#: The judge must read this share of rendered scenes correctly, or its verdict on generated ones means nothing.
JUDGE_IS_RIGHT = 0.98


def main() -> None:
    """Check, measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("--captions", type=int, default=200)
    options = parser.parse_args()
    recorder = record.Recorder("shapes_model", TABLES, record=not options.no_record)
    engine, judge = Engine.from_pretrained("shapes", device="cpu", batch_size=GROUP), Judge.load()
    scenes = sample_scenes(options.captions, torch.Generator().manual_seed(2024), held_out=True)
    captions = scenes.captions
    rendered = judge.agrees(render(scenes)[0], captions)
    share = float(rendered.float().mean())
    record.check(
        share >= JUDGE_IS_RIGHT, f"the judge reads {share:.1%} of rendered scenes, expected {JUDGE_IS_RIGHT:.0%}"
    )
    jobs = [engine.job(str(caption), seed=seed, num_steps=STEPS) for seed, caption in enumerate(captions)]
    images = []
    for first in range(0, len(jobs), GROUP):
        images += [path.image for path in trajectories(engine.denoiser, jobs[first : first + GROUP])]
    generated = judge.agrees(torch.stack(images).permute(0, 3, 1, 2) / 255, captions)
    rates = {
        "every attribute": rate(generated.all(1)),
        **{name: rate(generated[:, number]) for number, name in enumerate(ATTRIBUTES)},
        "judge on rendered scenes of the same captions": rate(rendered.all(1)),
    }
    settings = {"captions": len(jobs), "steps": STEPS, "guidance": GUIDANCE}
    environment = recorder.environment(torch.device("cpu"))
    rows = [{"right": name, "rate": values} | settings | environment for name, values in rates.items()]
    recorder.replace(rows)
    print(table(rows), end="")


def rate(right: torch.Tensor) -> list[float]:
    """The share of right answers with its 95 % Wilson interval."""
    test = binomtest(int(right.sum()), len(right))
    interval = test.proportion_ci(method="wilson")
    return [round(float(value), 3) for value in (test.statistic, interval.low, interval.high)]


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each."""
    lines = ["| right in | rate | 95 % interval |", "|---|---|---|"]
    for row in rows:
        share, low, high = row["rate"]
        lines.append(f"| {row['right']} | {share:.1%} | {low:.1%} – {high:.1%} |")
    first = rows[0]
    settings = f"{first['captions']} captions, {first['steps']} steps, guidance {first['guidance']}."
    return "\n".join([*lines, "", f"{settings} {record.provenance(rows)}"])


TABLES = {("bench/README.md", "shapes_model"): table}

if __name__ == "__main__":
    main()
