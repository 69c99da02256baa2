"""How fast the reference is on this processor, which is what runs where there is no GPU; beside scikit-image's SSIM.

    OMP_NUM_THREADS=1 python bench/scores.py        # writes bench/results/scores.json and the table in bench/README.md

What is timed is verified first: SSIM equals scikit-image's away from the border (where that one reflects and this one
renormalises), and `accumulate` in one batch equals it in parts.
"""

import statistics
import sys
import time
from collections.abc import Callable

import dfkernels
import numpy as np
import record
import skimage
import torch
from dfkernels import estimators, reference
from skimage.metrics import structural_similarity
from torch import Tensor

sys.path.insert(0, str(record.ROOT / "tests"))
from tolerance import tolerance

#: Batches of masks: the embedded model's latents, Stable Diffusion's, and Stable Diffusion XL's.
SHAPES = ((64, 4, 16, 16), (256, 4, 16, 16), (32, 4, 64, 64), (16, 4, 128, 128))
REPEATS = 15


def by_scikit_image(a: Tensor, b: Tensor) -> np.ndarray:
    """SSIM maps [n, h, w], one image at a time: the Gaussian window of the original, mean over channels."""
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    images = (structural_similarity(x, b.numpy(), channel_axis=0, full=True, **settings)[1] for x in a.numpy())
    return np.stack([image.mean(0) for image in images])


def cases(n: int, c: int, h: int, w: int) -> dict[str, Callable[[], object]]:
    """What is timed on one batch, verified."""
    g = torch.Generator().manual_seed(0)
    b = torch.rand(c, h, w, generator=g)
    a = (0.5 * b + 0.5 * torch.rand(n, c, h, w, generator=g)).contiguous(memory_format=torch.channels_last)
    seed, step = torch.tensor([7]), torch.tensor([3])
    rows, indices = torch.zeros(n, dtype=torch.int64), torch.arange(n)
    sums = dfkernels.Sums.zeros(1, (h, w))

    def accumulate(sums: dfkernels.Sums, part: slice) -> None:
        estimators.accumulate(a[part], b[None], sums, seed, step, rows[part], indices[part])

    inside = (slice(None), slice(5, -5), slice(5, -5))
    ours = reference.similarity(a, b, "ssim").numpy()
    np.testing.assert_allclose(ours[inside], by_scikit_image(a, b)[inside], **tolerance("similarity"))
    whole, parts = (dfkernels.Sums.zeros(1, (h, w)) for _ in range(2))
    accumulate(whole, slice(0, n))
    for part in (slice(0, 5), slice(5, n)):
        accumulate(parts, part)
    torch.testing.assert_close(whole.moments, parts.moments, **tolerance("similarity"))

    return {
        "scikit-image SSIM": lambda: by_scikit_image(a, b),
        "similarity ssim": lambda: reference.similarity(a, b, "ssim"),
        "similarity structure": lambda: reference.similarity(a, b),
        "similarity structure, global": lambda: reference.similarity(a, b, score="global"),
        "draw_masks": lambda: reference.draw_masks(seed[rows], step[rows], indices, (h, w)),
        "apply_masks": lambda: reference.apply_masks(b[None], seed, step, rows, indices),
        "accumulate": lambda: accumulate(sums, slice(0, n)),
    }


def microseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Lowest, median and highest of the repeats, after two that do not count."""
    times = []
    for repeat in range(REPEATS + 2):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
        if repeat == 1:
            times.clear()
    return min(times), statistics.median(times), max(times)


def table(rows: list[dict]) -> str:
    """Microseconds a mask, the median."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    lines = ["| µs a mask | " + " | ".join("×".join(map(str, shape)) for shape in shapes) + " |"]
    lines.append("|---" * (len(shapes) + 1) + "|")
    for name in names:
        cells = (f"{row['median_us'] / row['shape'][0]:.1f}" for row in rows if row["op"] == name)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Verify, measure, record and print."""
    here = record.environment(torch.device("cpu")) | {"scikit-image": skimage.__version__}
    rows = []
    for shape in SHAPES:
        for name, run in cases(*shape).items():
            low, median, high = microseconds(run)
            row = {"op": name, "shape": shape, "median_us": round(median), "low_us": round(low), "high_us": round(high)}
            rows.append(row | here)
            print(row, file=sys.stderr)
    record.write("scores", rows)
    record.place(table(rows), "bench/README.md", "scores")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
