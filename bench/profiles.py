"""What a card makes of each model: `dfengine profile`, recorded.

    python bench/profiles.py                                  # the embedded model
    python bench/profiles.py shapes sd15 sdxl                 # with the published architectures, random weights

Rows of this device are replaced in bench/results/profiles.json, and the tables in bench/README.md and
docs/performance.md are made anew. To add those of your own card, run it there and send the three files.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import record
import torch

from dfengine import Engine, Rise
from dfengine.models.architectures import ARCHITECTURES
from dfengine.profile import Profile, format_profile, profile


def measure(model: str, compiled: bool, seconds: float) -> dict[str, Any]:
    """The profile of a model on this device, with its waterfall of stages printed."""
    engine = Engine.from_pretrained(model, random_weights=model in ARCHITECTURES, compile=compiled)
    job = engine.job("a red circle" if model == "shapes" else "a photo of a cat", num_steps=30)
    found = profile(engine, Rise(500), job, seconds=seconds)
    print("\n".join(format_profile(found)), "\n", file=sys.stderr)
    return record.environment(engine.denoiser.device) | dataclasses.asdict(found)


def table(rows: list[dict[str, Any]]) -> str:
    """Every recorded profile in a line."""
    columns = ["device", "model", "dtype", "attention", "compiled", "latents a forward", "masks a second", "TFLOP/s"]
    columns += ["of a matrix product", "outside the U-Net", "GiB at most", "30 steps × 500 masks"]
    shown = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["device"], row["model"], row["dtype"], row["attention"], "yes" if row["compiled"] else "no"]
        cells += [str(row["batch_size"]), f"**{row['masks_per_second']:.3g}**", f"{row['tflop_s']:.3g}"]
        cells += [f"{row['share_of_ceiling']:.0%}", f"{row['outside_network']:.1%}", f"{row['peak_gib']:.2f}"]
        shown.append("| " + " | ".join([*cells, f"{row['job']['seconds']:,.0f} s"]) + " |")
    return "\n".join(shown) + "\n"


def curves(rows: list[dict[str, Any]]) -> str:
    """The network alone, masks a second by latents a forward, a recorded profile in a line."""
    sizes = sorted({point["batch"] for row in rows for point in row["curve"]})
    shown = ["| latents a forward | " + " | ".join(map(str, sizes)) + " |", "|---" * (1 + len(sizes)) + "|"]
    for row in rows:
        made = {point["batch"]: f"{point['masks_per_second']:.3g}" for point in row["curve"]}
        name = f"{row['model']}, {row['dtype']}{', compiled' * row['compiled']}, {row['device']}"
        shown.append(f"| {name} | {' | '.join(made.get(size, '') for size in sizes)} |")
    return "\n".join(shown) + "\n"


def printed(row: dict[str, Any]) -> str:
    """What `dfengine profile` says of a recorded profile."""
    found = Profile(**{field.name: row[field.name] for field in dataclasses.fields(Profile)})
    if ", threads: " in found.device:  # a CPU's, whose peak says nothing of one batch; rows once had it
        found = dataclasses.replace(found, curve=[point | {"peak_gib": None} for point in found.curve])
    return "\n".join(["```", *format_profile(found), "```", ""])


def example(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row that is shown whole: the newest of the embedded model, uncompiled."""
    return next(row for row in reversed(rows) if row["model"] == "shapes" and not row["compiled"])


def main() -> None:
    """Measure, record and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["shapes"])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement, about")
    parser.add_argument("--eager", action="store_true", help="not compiled, where compiling takes too long")
    options = parser.parse_args()
    for model in options.models:
        for compiled in (False,) if options.eager else (False, True):
            row = measure(model, compiled, options.seconds)
            every = record.replace("profiles", [row], ("device", "model", "dtype", "compiled"))
            record.place(table(every), "bench/README.md", "profiles")
            record.place(curves(every), "docs/performance.md", "curves")
            record.place(printed(example(every)), "docs/performance.md", "profile")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(table([row for row in every if row["device"] == record.environment(torch_device())["device"]]), end="")


def torch_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
