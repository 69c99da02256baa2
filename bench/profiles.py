"""`dfengine profile` of each model on this device, recorded.

    python bench/profiles.py                                  # the embedded model
    python bench/profiles.py shapes sd15 sdxl                 # and published architectures with random weights

Each model is profiled uncompiled and compiled, after a map from its complete batches was compared with one from
small, uncompiled batches. Replaces the rows of this device in bench/results/profiles.json. To add your own card, run
it there and send that file, bench/README.md and docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import record
import torch
from scipy.stats import spearmanr
from throughput import AGREEMENT, NUM_CHECK_MASKS

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import trajectories
from dfengine.models.architectures import ARCHITECTURES
from dfengine.profile import Profile, format_profile, profile

SMALL_BATCH = 4


def measure(recorder: record.Recorder, model: str, compiled: bool, seconds: float) -> record.Row:
    """The profile of a model on this device; its waterfall of stages is printed."""
    engine = Engine.from_pretrained(model, random_weights=model in ARCHITECTURES, compile=compiled)
    prompt = "a red circle" if model == "shapes" else "a photo of a cat"
    measured = profile(engine, Rise.paper(), engine.job(prompt, num_steps=30), seconds=seconds)
    check(engine, prompt, measured)
    print("\n".join(format_profile(measured)), "\n", file=sys.stderr)
    return recorder.environment(engine.denoiser.device) | dataclasses.asdict(measured)


def check(engine: Engine, prompt: str, measured: Profile) -> None:
    """Exit unless batches as profiled give the map of small uncompiled ones, at a speed that the device can have."""
    share = measured.share_of_ceiling
    record.check(0 < share <= 1, f"{measured.model} reaches {share:.0%} of a matrix product's speed")
    denoiser = engine.denoiser
    (trajectory,) = trajectories(denoiser, [engine.job(prompt, num_steps=1)])
    rise = Rise.paper(num_masks=NUM_CHECK_MASKS)
    (profiled,) = rise.explain(denoiser, [trajectory])
    denoiser.batch_size, denoiser.compiled = SMALL_BATCH, False
    (reference,) = rise.explain(denoiser, [trajectory])
    rank = float(spearmanr(profiled.saliency.numpy().ravel(), reference.saliency.numpy().ravel()).statistic)
    expected = AGREEMENT[denoiser.dtype]
    record.check(
        rank >= expected,
        f"{measured.model}: rank correlation with the map from batches of {SMALL_BATCH} is {rank:.4f}, "
        f"expected at least {expected}",
    )


def table(rows: Sequence[record.Row]) -> str:
    """All rows, one line each."""
    columns = [
        "device",
        "commit",
        "model",
        "dtype",
        "attention",
        "compiled",
        "batch size",
        "masks per second",
        "TFLOP/s",
    ]
    columns += ["of a matrix product", "outside the U-Net", "peak GiB", "30 steps × 500 masks"]
    shown = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["device"], f"`{row['commit']}`", row["model"], row["dtype"], row["attention"]]
        cells += ["yes" if row["compiled"] else "no", str(row["batch_size"])]
        cells += [f"**{row['masks_per_second']:.3g}**", f"{row['tflop_s']:.3g}", f"{row['share_of_ceiling']:.0%}"]
        cells += [f"{row['outside_network']:.1%}", f"{row['peak_gib']:.2f}", f"{row['job']['seconds']:,.0f} s"]
        shown.append("| " + " | ".join(cells) + " |")
    return "\n".join(shown) + "\n"


def curves(rows: Sequence[record.Row]) -> str:
    """Masks per second of the network alone by batch size, one line for each row."""
    sizes = sorted({point["batch"] for row in rows for point in row["curve"]})
    shown = ["| batch size | commit | " + " | ".join(map(str, sizes)) + " |", "|---" * (2 + len(sizes)) + "|"]
    for row in rows:
        rates = {point["batch"]: f"{point['masks_per_second']:.3g}" for point in row["curve"]}
        name = f"{row['model']}, {row['dtype']}{', compiled' * row['compiled']}, {row['device']}"
        shown.append(f"| {name} | `{row['commit']}` | {' | '.join(rates.get(size, '') for size in sizes)} |")
    return "\n".join(shown) + "\n"


def example(rows: Sequence[record.Row]) -> str:
    """What `dfengine profile` prints, of the newest uncompiled row of the embedded model."""
    row = next((row for row in reversed(rows) if row["model"] == "shapes" and not row["compiled"]), None)
    if row is None:
        return record.NOT_MEASURED
    measured = Profile(**{field.name: row[field.name] for field in dataclasses.fields(Profile)})
    return "\n".join([f"Commit `{row['commit']}`:", "", "```", *format_profile(measured), "```", ""])


TABLES = {
    ("bench/README.md", "profiles"): table,
    ("docs/performance.md", "curves"): curves,
    ("docs/performance.md", "profile"): example,
}


def main() -> None:
    """Measure, record and print."""
    parser = record.parser(__doc__)
    parser.add_argument("models", nargs="*", default=["shapes"])
    parser.add_argument("--seconds", type=float, default=3.0, help="approximate duration of each measurement")
    parser.add_argument("--eager", action="store_true", help="uncompiled only, where compiling takes too long")
    options = parser.parse_args()
    recorder = record.Recorder("profiles", TABLES, record=not options.no_record)
    rows = []
    for model in options.models:
        for compiled in (False,) if options.eager else (False, True):
            rows.append(measure(recorder, model, compiled, options.seconds))
            recorder.replace(rows, ("device", "model", "dtype", "compiled"))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(table(rows), end="")


if __name__ == "__main__":
    main()
