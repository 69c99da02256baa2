"""How fast the store writes, how large its files are, and the writer's share of the demo's time.

    python bench/store.py            # records bench/results/store.json

DF-RISE maps in the shapes of the embedded model and of Stable Diffusion, from a local average in the place of the
model (so that maps vary smoothly), are written with each compression, read back and compared, and timed: steps per
second, closing the file included, median of several files. Then the demo is run with a timer around every call of the
writer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dfkernels
import h5py
import numpy as np
import record
import torch
import torch.nn.functional as F

from dfengine import Engine, Rise, store

PROMPT = "a red circle above a blue square on a gray background"
STEPS, ITEMS, REPEATS = 30, 8, 7
#: Steps whose maps are computed (the others repeat them), and masks drawn for each.
DISTINCT, DRAWN = 5, 125

#: name → latent (c, h, w), image (H, W), masks a step
SHAPES = {
    "shapes": ((4, 16, 16), (64, 64), 256),
    "Stable Diffusion 1.5": ((4, 64, 64), (512, 512), 1000),
}
#: compression, mantissa bits of the errors
SETTINGS = (("gzip", 23), ("gzip", 10), ("none", 23))


def plan_of(shape: str, mantissa_bits: int) -> store.Plan:
    latent, image, masks = SHAPES[shape]
    return store.Plan(
        items=tuple(store.Item(f"{seed}", PROMPT, seed=seed) for seed in range(ITEMS)),
        methods=(store.Method("rise", num_masks=masks, has_error=True),),
        num_steps=STEPS,
        latent=latent,
        image=image,
        mantissa_bits=mantissa_bits,
    )


def maps_of(shape: str) -> dict[str, np.ndarray]:
    """An item's saliency, errors, scores and latents, [steps, …]: a few computed steps, repeated."""
    (channels, *size), _, masks = SHAPES[shape]
    latents = torch.randn(DISTINCT, channels, *size, generator=torch.Generator().manual_seed(0))
    sums = dfkernels.Sums.zeros(DISTINCT, (size[0], size[1]))
    seeds, steps, indices = torch.zeros(DISTINCT, dtype=torch.int64), torch.arange(DISTINCT), torch.arange(DRAWN)

    def model(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 5, 1, 2)

    scores = []
    for step in range(DISTINCT):
        where = (seeds, steps, torch.full((DRAWN,), step), indices)
        scores.append(dfkernels.accumulate(model(dfkernels.apply_masks(latents, *where)), model(latents), sums, *where))
    saliency, error = dfkernels.estimate(sums, "coverage")
    computed = {"saliency": saliency, "error": error, "latents": latents}
    repeated = {name: np.tile(part, (STEPS // DISTINCT, *[1] * (part.ndim - 1))) for name, part in computed.items()}
    return repeated | {"scores": np.tile(torch.stack(scores), (STEPS // DISTINCT, -(-masks // DRAWN)))[:, :masks]}


def write(path: Path, plan: store.Plan, compression: str, maps: dict[str, np.ndarray]) -> float:
    """Seconds to write a file."""
    image = np.random.default_rng(0).integers(256, size=(*plan.image, 3), dtype=np.uint8)
    rest = {
        "timesteps": np.arange(STEPS)[::-1],
        "signal": np.linspace(0, 1, STEPS),
        "noise": np.linspace(1, 0, STEPS),
        "image": image,
    }
    start = time.perf_counter()
    with store.Writer.create(path, plan, compression=compression, overwrite=True) as writer:
        for item in range(ITEMS):
            writer.trajectory(item, **rest, latents=maps["latents"], epsilon=maps["latents"])
            for step in range(STEPS):
                values = {name: maps[name][step] for name in ("saliency", "error", "scores")}
                writer.step(item, "rise", step, **values)
            writer.finish(item, 1.0)
    return time.perf_counter() - start


def check(path: Path, maps: dict[str, np.ndarray], exact: bool) -> None:
    """Exit unless the file reads as what was written."""
    with store.open(path) as run, record.checked(f"what {path.name} reads as"):
        record.check(run.finished, f"{path.name} is not finished")
        for item in run:
            np.testing.assert_array_equal(item.maps["rise"], maps["saliency"])
            np.testing.assert_array_equal(item.scores["rise"], maps["scores"])
            np.testing.assert_allclose(item.errors["rise"], maps["error"], rtol=0 if exact else 2**-11)


def speeds(folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each shape and compression."""
    for shape in SHAPES:
        maps = maps_of(shape)
        for compression, bits in SETTINGS:
            plan, path = plan_of(shape, bits), folder / "run.h5"
            seconds = [write(path, plan, compression, maps) for _ in range(REPEATS)]
            check(path, maps, exact=bits == 23)
            with h5py.File(path) as h5:
                stored = {name: h5["entry/maps"][name].id.get_storage_size() for name in ("saliency", "error")}
            per_second = sorted(ITEMS * STEPS / second for second in seconds)
            yield {
                "shape": shape,
                "compression": compression,
                "mantissa_bits": bits,
                "steps_per_second": [per_second[0], statistics.median(per_second), per_second[-1]],
                "bytes_per_item": path.stat().st_size // ITEMS,
                "ratio": {name: ITEMS * maps["saliency"].nbytes / size for name, size in stored.items()},
            }


@contextmanager
def writer_timed() -> Iterator[dict[str, float]]:
    """Seconds that callers spend in the writer ("held"), and processor time of its thread ("thread")."""
    spent = {"held": 0.0, "thread": 0.0}
    names = ("create", "trajectory", "step", "finish", "close")
    originals = {name: vars(store.Writer)[name] for name in (*names, "_work")}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent["held"] += time.perf_counter() - start

        return call

    def work(self: store.Writer) -> None:
        originals["_work"](self)
        spent["thread"] += time.thread_time()

    for name in names:
        original = originals[name]
        wrapped = classmethod(timed(original.__func__)) if name == "create" else timed(original)
        setattr(store.Writer, name, wrapped)
    store.Writer._work = work  # type: ignore[method-assign]  # restored below
    try:
        yield spent
    finally:
        for name, function in originals.items():
            setattr(store.Writer, name, function)


def demo(folder: Path) -> dict[str, Any]:
    """The demo's duration, and the store's share of it."""
    engine, path = Engine.from_pretrained("shapes", device="cpu"), folder / "demo.h5"
    engine.explain(PROMPT, Rise(num_masks=16), num_steps=2, out=folder / "warm-up.h5")
    with writer_timed() as spent:
        start = time.perf_counter()
        engine.explain(PROMPT, Rise(num_masks=256), num_steps=STEPS, seed=0, out=path)
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps_per_second": STEPS / seconds,
        "held_share": spent["held"] / seconds,
        "thread_share": spent["thread"] / seconds,
        "bytes_per_item": path.stat().st_size,
    }


def table(rows: Sequence[record.Row]) -> str:
    """Speeds and sizes for each shape and compression, and the demo's row, which is the last."""
    *written, run = rows
    lines = [
        "| shape | compression | mantissa of errors | steps per second | bytes per item | maps | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in written:
        low, middle, high = row["steps_per_second"]
        cells = [
            row["shape"],
            row["compression"],
            f"{row['mantissa_bits']} bits",
            f"{low:.0f} **{middle:.0f}** {high:.0f}",
        ]
        cells += [f"{row['bytes_per_item']:,}", *(f"{ratio:.2f} : 1" for ratio in row["ratio"].values())]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"The demo ({STEPS} steps, 256 masks each) computes {run['steps_per_second']:.2f} steps per second and takes "
        f"{run['seconds']:.1f} s. The engine waits for the writer for {run['held_share']:.2%} of that, creating and "
        f"closing the file included; the writer's thread works for {run['thread_share']:.2%} of it. The file has "
        f"{run['bytes_per_item']:,} bytes.",
        "",
        record.provenance(rows, "h5py"),
    ]
    return "\n".join(lines)


TABLES = {("bench/README.md", "store"): table}


def main() -> None:
    """Measure, record and print."""
    options = record.parser(__doc__).parse_args()
    recorder = record.Recorder("store", TABLES, record=not options.no_record)
    versions = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
    environment = recorder.environment(torch.device("cpu")) | versions
    build = record.ROOT / "build"  # on the same disk as the checkout, and ignored by git
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as folder:
        rows = [row | environment for row in (*speeds(Path(folder)), demo(Path(folder)))]
    recorder.replace(rows)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
