"""Microseconds per mask of the reference operations, which run where there is no GPU, and of scikit-image's SSIM.

    OMP_NUM_THREADS=1 python bench/scores.py        # records bench/results/scores.json

Checked first: SSIM equals scikit-image's away from the border (where scikit-image reflects and we renormalise), and
`accumulate` of one batch equals that of its parts.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import dfkernels
import numpy as np
import record
import skimage
import torch
from dfkernels import designs, estimators, reference
from skimage.metrics import structural_similarity
from torch import Tensor

sys.path.insert(0, str(record.ROOT / "tests"))
from tolerance import tolerance

#: Batches of masks: the embedded model's latents, Stable Diffusion's, and Stable Diffusion XL's.
SHAPES = ((64, 4, 16, 16), (256, 4, 16, 16), (32, 4, 64, 64), (16, 4, 128, 128))
REPEATS = 15


def by_scikit_image(a: Tensor, b: Tensor) -> np.ndarray:
    """SSIM maps [n, h, w] in a Gaussian window, mean over channels; one image at a time."""
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    images = (structural_similarity(x, b.numpy(), channel_axis=0, full=True, **settings)[1] for x in a.numpy())
    return np.stack([image.mean(0) for image in images])


def cases(n: int, c: int, h: int, w: int) -> dict[str, Callable[[], object]]:
    """The operations on one batch, checked."""
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
    with record.checked("SSIM and scikit-image's"):
        np.testing.assert_allclose(ours[inside], by_scikit_image(a, b)[inside], **tolerance("similarity"))
    single, partial = (dfkernels.Sums.zeros(1, (h, w)) for _ in range(2))
    accumulate(single, slice(0, n))
    for part in (slice(0, 5), slice(5, n)):
        accumulate(partial, part)
    with record.checked("accumulate of a batch and of its parts"):
        torch.testing.assert_close(single.moments, partial.moments, **tolerance("similarity"))

    return {
        "scikit-image SSIM": lambda: by_scikit_image(a, b),
        "similarity ssim": lambda: reference.similarity(a, b, "ssim"),
        "similarity structure": lambda: reference.similarity(a, b),
        "similarity structure, global": lambda: reference.similarity(a, b, score="global"),
        "draw_masks": lambda: designs.draw_masks(seed[rows], step[rows], indices, (h, w)),
        "apply_masks": lambda: designs.apply_masks(b[None], seed, step, rows, indices),
        "accumulate": lambda: accumulate(sums, slice(0, n)),
    }


def microseconds(run: Callable[[], object]) -> tuple[float, float, float]:
    """Lowest, median and highest of the repeats, after two untimed ones."""
    times = []
    for repeat in range(REPEATS + 2):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
        if repeat == 1:
            times.clear()
    return min(times), statistics.median(times), max(times)


def table(rows: Sequence[record.Row]) -> str:
    """Median microseconds per mask, one line for each operation."""
    names = list(dict.fromkeys(row["op"] for row in rows))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    lines = ["| µs per mask | " + " | ".join("×".join(map(str, shape)) for shape in shapes) + " |"]
    lines.append("|---" * (len(shapes) + 1) + "|")
    for name in names:
        cells = (f"{row['median_us'] / row['shape'][0]:.1f}" for row in rows if row["op"] == name)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", record.provenance(rows, "scikit-image")])


TABLES = {("bench/README.md", "scores"): table}


def main() -> None:
    """Check, measure, record and print."""
    options = record.parser(__doc__).parse_args()
    recorder = record.Recorder("scores", TABLES, record=not options.no_record)
    environment = recorder.environment(torch.device("cpu")) | {"scikit-image": skimage.__version__}
    rows = []
    for shape in SHAPES:
        for name, run in cases(*shape).items():
            low, median, high = microseconds(run)
            row = {"op": name, "shape": shape, "median_us": round(median), "low_us": round(low), "high_us": round(high)}
            rows.append(row | environment)
            print(row, file=sys.stderr)
    recorder.replace(rows)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
