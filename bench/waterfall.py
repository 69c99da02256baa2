"""What each optimisation gains, added one at a time: speed, memory, and agreement with the float32 map.

    python bench/waterfall.py                                 # the embedded model
    python bench/waterfall.py sd15 --random-weights           # on a GPU

Every stage runs in its own process, all stages in turn, in several rounds. Its map of one step is compared by rank
correlation with the float32 map from the same masks. Replaces the rows of this model and device in
bench/results/waterfall.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dfkernels
import numpy as np
import record
import torch
from jaxtyping import Float, Int
from plain import Plain
from scipy.stats import spearmanr
from throughput import PROMPT, STEP
from torch import Tensor

from dfengine import Engine, Rise
from dfengine.diffusion.denoiser import PromptedDenoiser
from dfengine.diffusion.trajectory import trajectories
from dfengine.models.unet import cpu
from dfengine.profile.clock import peak_memory
from dfengine.runtime.tuning import synchronize

ROUNDS = 3
#: The rank correlation that every stage's map must reach.
AGREEMENT = 0.97


@dataclass(frozen=True)
class Stage:
    """One more optimisation than the stage before it."""

    name: str
    dtype: str = "float32"
    plain: bool = False
    target: str = "conditional"
    batched: bool = True
    layout: torch.memory_format = torch.channels_last
    own_forward: bool = True
    keeps_memory: bool = True
    chunked: bool = True
    transposed: bool = True
    folded: bool = True
    attention: str = "sdpa"
    compiled: bool = False


def stages(on_gpu: bool) -> list[Stage]:
    """From the plain loop to all optimisations. bfloat16, which is not a default on a CPU, is the last stage there."""
    loop = Stage(
        "plain loop, a guidance pair per mask",
        plain=True,
        target="guided",
        batched=False,
        layout=torch.contiguous_format,
        own_forward=False,
        keeps_memory=False,
        chunked=False,
        transposed=False,
        folded=False,
    )
    conditional = replace(loop, name="one conditional forward per mask", target="conditional")
    batched = replace(conditional, name="batches; masks, scores and sums on the device", plain=False, batched=True)
    result = [loop, conditional, batched]

    def add(name: str, **change: Any) -> None:
        result.append(replace(result[-1], name=name, **change))

    add("channels-last", layout=torch.channels_last)
    if on_gpu:
        add("float16", dtype="float16")
    add("our own forward of the U-Net", own_forward=True)
    if on_gpu:
        add("cuDNN attention where it is faster", attention="auto")
    else:
        add("freed memory is kept", keeps_memory=True)
        add("feed-forward layers in chunks", chunked=True)
        add("upsampling as one transposed convolution", transposed=True)
        add("the text's attention as two products", folded=True)
    add("torch.compile", compiled=True)
    if not on_gpu:
        add("bfloat16 (on request)", dtype="bfloat16")
    return result


class DiffusersForward(PromptedDenoiser):
    """diffusers' own forward, with one text for each latent, in any memory layout."""

    layout = torch.contiguous_format

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        denoiser: Any = self.denoiser
        rows = torch.full_like(timesteps, rows) if isinstance(rows, int) else rows
        tensors = self.condition[rows].tensors
        added = {name: value for name, value in tensors.items() if name != "text"}
        x = x_t.to(denoiser.unet.dtype, memory_format=self.layout)
        return denoiser.unet(x, timesteps, tensors["text"], added_cond_kwargs=added, return_dict=False)[0]


def disable(stage: Stage, denoiser: Any) -> None:
    """Switch off, in this process, the optimisations that a stage does not have yet."""
    if not stage.chunked:
        override(cpu, "feed_forward", lambda layers, x: layers(x))
    if not stage.transposed:
        override(cpu, "transposed_kernel", lambda conv: None)
    if not stage.folded:
        override(cpu, "fold_attention", lambda attention, key, value: None)
    if not stage.own_forward:
        forward = type("DiffusersForwardInLayout", (DiffusersForward,), {"layout": stage.layout})
        override(denoiser, "with_prompts", lambda condition: forward(denoiser, condition))


def override(owner: Any, name: str, value: object) -> None:
    """Set an attribute that must exist: under another name the stage would measure the optimisation it leaves out."""
    getattr(owner, name)
    setattr(owner, name, value)


@torch.no_grad()
def run(stage: Stage, options: argparse.Namespace) -> None:
    """Time one stage: prints masks per second and peak memory as JSON, and saves the coverage map to `options.out`."""
    engine = Engine.from_pretrained(
        options.model, random_weights=options.random_weights, dtype=stage.dtype, attention=stage.attention
    )
    denoiser: Any = engine.denoiser
    denoiser.unet.to(memory_format=stage.layout)
    engine.prepare(engine.plan([], Rise.paper()))
    disable(stage, denoiser)
    job = engine.job(PROMPT.get(options.model, "a photo of a cat"), num_steps=30)
    (trajectory,) = trajectories(denoiser, [job])
    trajectory = replace(trajectory, explain_steps=[STEP])
    masks = options.masks if stage.batched else options.plain_masks
    if not stage.batched:
        denoiser.batch_size = 1
    if stage.compiled:
        denoiser.compile()
    if stage.plain:
        explained = (trajectory.latents[STEP], job.timesteps[STEP], job.guidance)
        loop = Plain(denoiser.pipeline, job.prompt, *explained, stage.target == "guided")

    def explain(count: int) -> np.ndarray:
        if stage.plain:
            drawn = dfkernels.masks(job.mask_seed, STEP, 0, count, denoiser.latent_shape[1:])
            return loop.maps(iter(drawn.numpy()))[1]
        (step_map,) = Rise.paper(num_masks=count, target=stage.target).explain(denoiser, [trajectory])
        return step_map.saliency.numpy()

    explain(2 if stage.plain else denoiser.batch_size)
    if denoiser.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(denoiser.device)
    synchronize(denoiser.device)
    start = time.perf_counter()
    saliency = explain(masks)
    synchronize(denoiser.device)
    rate = masks / (time.perf_counter() - start)
    # Every stage compares the map of the same number of masks.
    np.save(options.out, saliency if masks == options.masks else explain(options.masks))
    measured = {"masks_s": rate, "batch": denoiser.batch_size, "peak_gib": peak_memory(denoiser.device) / 2**30}
    print(json.dumps(measured | {"model": denoiser.name}))


def run_in_process(number: int, stage: Stage, out: Path) -> record.Row:
    """What one stage measured, in a new process with our own arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--stage", str(number), "--out", str(out)]
    # A variable that has glibc's own default, which makes dfengine leave the allocator alone.
    variables = {} if stage.keeps_memory else {"MALLOC_ARENA_MAX": str(8 * (os.cpu_count() or 1))}
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables)
    record.check(process.returncode == 0, f"stage '{stage.name}' ended with status {process.returncode}")
    return json.loads(process.stdout.splitlines()[-1])


def measure(rounds: int, folder: Path) -> list[record.Row]:
    """One row for each stage, medians of the rounds."""
    every_stage = stages(torch.cuda.is_available())
    measured: list[list[record.Row]] = [[] for _ in every_stage]
    for round_ in range(rounds):
        for number, stage in enumerate(every_stage):
            measured[number].append(run_in_process(number, stage, folder / f"{number}.npy"))
            rate = measured[number][-1]["masks_s"]
            print(f"round {round_}: {stage.name}: {rate:.1f} masks per second", file=sys.stderr, flush=True)
    maps = [np.load(folder / f"{number}.npy").ravel() for number in range(len(every_stage))]
    expected = {"guided": maps[0], "conditional": maps[1]}
    first = statistics.median(row["masks_s"] for row in measured[0])
    rows = []
    for stage, mine, saliency in zip(every_stage, measured, maps, strict=True):
        rank = float(spearmanr(saliency, expected[stage.target]).statistic)
        record.check(rank >= AGREEMENT, f"{stage.name}: rank correlation {rank:.4f}, expected at least {AGREEMENT}")
        rates = sorted(row["masks_s"] for row in mine)
        rows.append(
            {
                "model": mine[0]["model"],
                "batch": mine[0]["batch"],
                "stage": stage.name,
                "dtype": stage.dtype,
                "masks_s": [round(rates[0], 2), round(statistics.median(rates), 2), round(rates[-1], 2)],
                "times_first": round(statistics.median(rates) / first, 2),
                "peak_gib": round(max(row["peak_gib"] for row in mine), 3),
                "rank_correlation": round(rank, 5),
            }
        )
    return rows


def table(rows: Sequence[record.Row]) -> str:
    """All rows, by model and device."""
    lines = []
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        lines += [f"**{model}** on {device}, commit `{mine[0]['commit']}`:", ""]
        lines.append(
            "| one more at a time | batch size | masks per second | × the first | peak GiB | rank correlation |"
        )
        lines.append("|---" * 6 + "|")
        for row in mine:
            low, median, high = row["masks_s"]
            lines.append(
                f"| {row['stage']} | {row['batch']} | {low:.0f} **{median:.0f}** {high:.0f} | {row['times_first']:.1f} "
                f"| {row['peak_gib']:.2f} | {row['rank_correlation']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


TABLES = {("bench/README.md", "waterfall"): table}


def main() -> None:
    """Measure, record and print; with --stage, run that stage."""
    parser = record.parser(__doc__)
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--masks", type=int, default=768, help="masks of the compared map")
    parser.add_argument("--plain-masks", type=int, default=150, help="masks that are timed where a forward has one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        run(stages(torch.cuda.is_available())[options.stage], options)
        return
    recorder = record.Recorder("waterfall", TABLES, record=not options.no_record)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options.rounds, Path(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [recorder.environment(device) | row for row in measured]
    recorder.replace(rows, ("model", "device"))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
