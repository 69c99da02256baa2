"""What each optimisation is worth, added one at a time: speed, memory, and how far the maps stay those of float32.

    python bench/waterfall.py                                 # the embedded model
    python bench/waterfall.py sd15 --random-weights           # on a GPU

Every stage runs in a process of its own, all of them in turn, round after round; its map of one step is compared (rank
correlation over pixels) with the float32 map of the same masks. Rows of this model and device are replaced in
bench/results/waterfall.json, and the table in bench/README.md is made anew.
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
from torch import Tensor

from dfengine import Engine, Rise
from dfengine.diffusion.denoiser import PromptedDenoiser
from dfengine.diffusion.trajectory import trajectories
from dfengine.models.unet import cpu
from dfengine.profile.clock import peak_memory
from dfengine.runtime.tuning import synchronize

PROMPT = {"shapes": "a red circle above a blue square on a gray background"}
STEP, ROUNDS = 12, 3
#: Below this a stage is no optimisation.
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
    ours: bool = True
    keeps_memory: bool = True
    pieces: bool = True
    transposed: bool = True
    folded: bool = True
    attention: str = "sdpa"
    compiled: bool = False


def stages(on_gpu: bool) -> list[Stage]:
    """From the plain loop to all there is; on a CPU bfloat16 comes last, which is never a default there."""
    loop = Stage("plain loop, a guidance pair a mask", plain=True, target="guided", batched=False, ours=False)
    loop = replace(loop, layout=torch.contiguous_format, keeps_memory=False)
    loop = replace(loop, pieces=False, transposed=False, folded=False)
    one = replace(loop, name="one conditional forward a mask", target="conditional")
    batch = replace(one, name="batches; masks, scores and sums on the device", plain=False, batched=True)
    found = [loop, one, batch]

    def add(name: str, **change: Any) -> None:
        found.append(replace(found[-1], name=name, **change))

    add("channels-last", layout=torch.channels_last)
    if on_gpu:
        add("float16", dtype="float16")
    add("our own way through the U-Net", ours=True)
    if on_gpu:
        add("cuDNN's attention where it is faster", attention="auto")
    else:
        add("freed memory is kept", keeps_memory=True)
        add("feed-forward layers in pieces", pieces=True)
        add("upsampling as one transposed convolution", transposed=True)
        add("the text's attention as two products", folded=True)
    add("torch.compile", compiled=True)
    if not on_gpu:
        add("bfloat16 (on request)", dtype="bfloat16")
    return found


class Theirs(PromptedDenoiser):
    """diffusers' own forward, of a text for each latent, in whatever layout."""

    layout = torch.contiguous_format

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        unet: Any = self.denoiser.unet  # type: ignore[attr-defined]
        rows = torch.full_like(timesteps, rows) if isinstance(rows, int) else rows
        told = self.condition[rows].tensors
        added = {name: value for name, value in told.items() if name != "text"}
        x = x_t.to(unet.dtype, memory_format=self.layout)
        return unet(x, timesteps, told["text"], added_cond_kwargs=added, return_dict=False)[0]


@torch.no_grad()
def run(stage: Stage, options: argparse.Namespace, out: Path) -> None:
    """One stage, timed: masks a second, the peak of memory, and its coverage map in a file."""
    engine = Engine.from_pretrained(
        options.model, random_weights=options.random_weights, dtype=stage.dtype, attention=stage.attention
    )
    denoiser: Any = engine.denoiser
    denoiser.unet.to(memory_format=stage.layout)
    engine.prepare(engine.plan([], Rise()))
    # This process runs one stage alone.
    if not stage.pieces:
        cpu.feed_forward = lambda layers, x: layers(x)
    if not stage.transposed:
        cpu.transposed_kernel = lambda conv: None
    if not stage.folded:
        cpu.fold_attention = lambda attention, key, value: None
    if not stage.ours:
        theirs = type("TheirsInLayout", (Theirs,), {"layout": stage.layout})
        denoiser.bind = lambda condition: theirs(denoiser, condition)
    job = engine.job(PROMPT.get(options.model, "a photo of a cat"), num_steps=30)
    (path,) = (replace(path, explain_steps=[STEP]) for path in trajectories(denoiser, [job]))
    masks = options.masks if stage.batched else options.plain_masks
    if not stage.batched:
        denoiser.batch_size = 1
    if stage.compiled:
        denoiser.compile()
    if stage.plain:
        where = (path.latents[STEP], job.timesteps[STEP], job.guidance)
        slow = Plain(denoiser.pipeline, job.prompt, *where, stage.target == "guided")

    def explain(count: int) -> np.ndarray:
        if stage.plain:
            drawn = dfkernels.masks(job.mask_seed, STEP, 0, count, denoiser.latent_shape[1:])
            return slow.maps(iter(drawn.numpy()))[1]
        (found,) = Rise(count, target=stage.target).explain(denoiser, [path])
        return found.saliency.numpy()

    explain(2 if stage.plain else denoiser.batch_size)
    if denoiser.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize(denoiser.device)
    began = time.perf_counter()
    saliency = explain(masks)
    synchronize(denoiser.device)
    rate = masks / (time.perf_counter() - began)
    # The map that is compared is of the same masks in every stage.
    np.save(out, saliency if masks == options.masks else explain(options.masks))
    told = {"masks_s": rate, "batch": denoiser.batch_size, "peak_gib": peak_memory(denoiser.device) / 2**30}
    print(json.dumps(told | record.environment(denoiser.device) | {"model": denoiser.name}))


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row a stage, medians of the rounds."""
    found = stages(torch.cuda.is_available())
    told: list[list[dict[str, Any]]] = [[] for _ in found]
    for round_ in range(options.rounds):
        for number, stage in enumerate(found):
            command = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--stage",
                str(number),
                "--out",
                f"{folder}/{number}.npy",
            ]
            # glibc's own default, which tells dfengine to leave the allocator alone.
            set_by_hand = {} if stage.keeps_memory else {"MALLOC_ARENA_MAX": str(8 * (os.cpu_count() or 1))}
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | set_by_hand)
            told[number].append(json.loads(ran.stdout.splitlines()[-1]))
            print(f"round {round_}: {stage.name}: {told[number][-1]['masks_s']:.1f}", file=sys.stderr, flush=True)
    maps = [np.load(folder / f"{number}.npy").ravel() for number in range(len(found))]
    exact = {"guided": maps[0], "conditional": maps[1]}
    first = statistics.median(row["masks_s"] for row in told[0])
    ranks = [
        float(spearmanr(saliency, exact[stage.target]).statistic) for stage, saliency in zip(found, maps, strict=True)
    ]
    if min(ranks) < AGREEMENT:
        sys.exit(f"a stage's map agrees with float32's by {min(ranks):.4f} only: nothing is recorded")
    rows = []
    for stage, mine, rank in zip(found, told, ranks, strict=True):
        rates = sorted(row["masks_s"] for row in mine)
        rows.append(
            {name: mine[0][name] for name in ("commit", "device", "torch", "python", "model", "batch")}
            | {
                "stage": stage.name,
                "dtype": stage.dtype,
                "masks_s": [round(rates[0], 2), round(statistics.median(rates), 2), round(rates[-1], 2)],
                "times_first": round(statistics.median(rates) / first, 2),
                "peak_gib": round(max(row["peak_gib"] for row in mine), 3),
                "rank_correlation": round(rank, 5),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Every recorded row, by device and model."""
    lines = []
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in rows):
        lines += [f"**{model}** on {device}:", ""]
        lines.append(
            "| one more at a time | latents a forward | masks a second | × the first | GiB at most | rank correlation |"
        )
        lines.append("|---" * 6 + "|")
        for row in (row for row in rows if (row["model"], row["device"]) == (model, device)):
            low, median, high = row["masks_s"]
            lines.append(
                f"| {row['stage']} | {row['batch']} | {low:.0f} **{median:.0f}** {high:.0f} | {row['times_first']:.1f} "
                f"| {row['peak_gib']:.2f} | {row['rank_correlation']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, record and print; with --stage, run one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="shapes")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--masks", type=int, default=768, help="of the map that is compared, in batches")
    parser.add_argument("--plain-masks", type=int, default=150, help="timed where a forward has one mask")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is not None:
        run(stages(torch.cuda.is_available())[options.stage], options, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options, Path(folder))
    every = record.replace("waterfall", rows, ("model", "device"))
    record.place(table(every), "bench/README.md", "waterfall")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
