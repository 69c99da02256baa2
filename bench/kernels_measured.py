"""The fused operations on a GPU: GB/s and the share of a copy's bandwidth, next to the eager and compiled reference.

    python bench/kernels_measured.py        # records bench/results/kernels_measured.json

Each operation is verified first and not timed if it is wrong. Bytes are what an ideal kernel moves: kernels/README.md.
Inputs are random and rotate through more memory than the cache holds; times are medians of device events after a
warm-up. Without a GPU nothing is measured or recorded. (This file must not be called kernels.py: scripts in this folder
would import it in place of Hugging Face's package of that name.)
"""

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import record
import torch
from torch import Tensor

sys.path[:0] = [str(record.ROOT / "kernels"), str(record.ROOT / "tests")]
from dfkernels import MaskDistribution, Sums, designs, dispatch, estimators, games, reference  # noqa: E402
from tolerance import tolerance  # noqa: E402

#: Entries, channels and sides of a batch: Stable Diffusion's latents, Stable Diffusion XL's, small ones.
SHAPES = ((4096, 4, 64, 64), (1024, 4, 128, 128), (65536, 4, 16, 16))
ROWS = 8
CALLS, ROUNDS = 10, 10
SETS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One operation: `inputs` returns fresh inputs, `bytes` is what an ideal kernel moves."""

    name: str
    module: str
    operation: Callable[..., Any]
    inputs: Callable[[], dict[str, Any]]
    bytes: int
    tolerance: str

    def fused(self) -> Callable[..., Any]:
        kernels = dispatch.load_fused(self.module)
        if kernels is None:
            sys.exit("triton is not installed: pip install triton")
        return getattr(kernels, self.operation.__name__)


def cases(n: int, c: int, h: int, w: int) -> Iterator[Case]:
    """Every fused operation in half precision, as the engine runs them."""
    pixels, half = n * h * w, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    def counters() -> dict[str, Tensor]:
        row = torch.arange(ROWS, device=DEVICE)
        order = torch.randperm(n, device=DEVICE)
        return {"seeds": row * 7919, "steps": row, "rows": order % ROWS, "indices": order}

    def apply_masks(kind: str) -> dict[str, Any]:
        return {
            "latents": random(ROWS, c, h, w),
            **counters(),
            "distribution": MaskDistribution(kind=kind),
            "dtype": torch.float16,
        }

    def outputs() -> Tensor:
        return random(n, c, h, w).half().contiguous(memory_format=torch.channels_last)

    def accumulate(score: str) -> dict[str, Any]:
        sums = Sums.zeros(ROWS, (h, w), DEVICE)
        return {"outputs": outputs(), "references": random(ROWS, c, h, w), "sums": sums, **counters(), "score": score}

    def perturb() -> dict[str, Any]:
        start = {"latents": random(ROWS, c, h, w), "ranks": games.ranks(random(ROWS, h, w)), "dtype": torch.float16}
        point = torch.arange(n, device=DEVICE)
        return start | {"rows": point % ROWS, "indices": point % (h + 1), "fill": random(ROWS, c, h, w)}

    def draw_masks() -> dict[str, Any]:
        index = torch.arange(n, device=DEVICE)
        return {"seeds": index * 31, "steps": index % 50, "indices": index, "shape": (h, w)}

    def similarity(score: str) -> dict[str, Any]:
        return {"a": outputs(), "b": random(c, h, w), "score": score}

    def add() -> dict[str, Any]:
        return {"sums": Sums.zeros(ROWS, (h, w), DEVICE), "scores": random(n, h, w), **counters()}

    latent_bytes = half * c * pixels
    yield Case("draw_masks", "apply_masks", designs.draw_masks, draw_masks, pixels, "masks")
    for kind, name in (("gaussian", "apply_masks"), ("rise", "apply_masks_rise_float16")):
        inputs = partial(apply_masks, kind)
        yield Case(f"apply_masks, {kind}", "apply_masks", designs.apply_masks, inputs, latent_bytes, name)
    yield Case("perturb", "perturb", games.perturb, perturb, latent_bytes, "perturb")
    for score, written in (("local", 4 * pixels), ("global", 4 * n)):
        inputs = partial(similarity, score)
        moved = latent_bytes + written
        yield Case(f"similarity, {score}", "similarity", reference.similarity, inputs, moved, "similarity_fused")
    yield Case("add", "accumulate", estimators.add, add, 4 * pixels, "add")
    for score in reference.SCORES:
        inputs = partial(accumulate, score)
        yield Case(
            f"accumulate, {score}", "accumulate", estimators.accumulate, inputs, latent_bytes, "accumulate_fused"
        )


def result(run: Callable[..., Any], inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """What a call returns, and the sums it updated from zero, divided by the number of masks."""
    sums = inputs.get("sums")
    if sums is not None:
        sums.moments.zero_()
    returned = run(**inputs)
    changed = () if sums is None else (sums.moments / sums.count.clamp(min=1)[:, None, None, None, None],)
    return changed if returned is None else (returned, *changed)


def milliseconds(run: Callable[[dict[str, Any]], object], sets: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The 10th percentile, median and 90th percentile of a call; a busy device hides the launch overhead."""
    for inputs in sets * 2:
        run(inputs)
    times = []
    for _ in range(ROUNDS):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(CALLS)]
        torch.cuda._sleep(20_000_000)  # cycles: about 10 ms
        for call, (start, stop) in enumerate(events):
            start.record()
            run(sets[call % len(sets)])
            stop.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(stop) for start, stop in events]
    tenths = statistics.quantiles(times, n=10)
    return tenths[0], statistics.median(times), tenths[-1]


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, read and written."""
    source, target = (torch.randn(2**28, device=DEVICE) for _ in range(2))
    _, median, _ = milliseconds(
        lambda inputs: inputs["target"].copy_(inputs["source"]), [{"source": source, "target": target}]
    )
    return 2 * source.nbytes / median / 1e6


def measure(case: Case, shape: tuple[int, ...], copy: float) -> Iterator[record.Row]:
    """Rows for the fused, eager and compiled operation; a single row with the error if the check fails."""
    sets = [case.inputs() for _ in range(SETS)]
    fused = case.fused()
    row = {"op": case.name, "shape": shape, "bytes": case.bytes, "copy_gb_s": round(copy)}
    try:
        for actual, expected in zip(result(fused, sets[0]), result(case.operation, sets[0]), strict=True):
            torch.testing.assert_close(actual, expected, **tolerance(case.tolerance), equal_nan=True)
    except AssertionError as error:
        yield row | {"implementation": "fused", "wrong": str(error).split("\n")[0]}
        return
    implementations = {"fused": fused, "eager": case.operation}
    if shape == SHAPES[0]:  # compiling takes longer than measuring
        implementations["compiled"] = torch.compile(case.operation)
    for name, run in implementations.items():
        try:
            low, median, high = milliseconds(lambda inputs, run=run: run(**inputs), sets)
        except Exception as error:
            yield row | {"implementation": name, "failed": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
            continue
        speed = case.bytes / median / 1e6
        times = {"median_ms": round(median, 4), "low_ms": round(low, 4), "high_ms": round(high, 4)}
        yield row | {"implementation": name, **times, "gb_s": round(speed), "share_of_copy": round(speed / copy, 3)}


def table(rows: Sequence[record.Row]) -> str:
    """Milliseconds of each implementation, and the fused one's bandwidth."""
    lines = ["| op | n × c × h × w | fused ms | GB/s | share of a copy | eager ms | compiled ms |", "|---" * 7 + "|"]
    for key in dict.fromkeys((row["op"], tuple(row["shape"])) for row in rows):
        mine = {row["implementation"]: row for row in rows if (row["op"], tuple(row["shape"])) == key}

        def cell(name: str, column: str, mine: dict[str, record.Row] = mine) -> str:
            row = mine.get(name, {})
            return str(row.get(column, "wrong" if "wrong" in row else "failed" if "failed" in row else "not measured"))

        fused = " | ".join(cell("fused", column) for column in ("median_ms", "gb_s", "share_of_copy"))
        others = " | ".join(cell(name, "median_ms") for name in ("eager", "compiled"))
        lines.append(f"| {key[0]} | {'×'.join(map(str, key[1]))} | {fused} | {others} |")
    return "\n".join(lines) + "\n"


def recorded_table(rows: Sequence[record.Row]) -> str:
    return f"{table(rows)}\n{record.provenance(rows, 'triton')}"


TABLES = {("kernels/README.md", "kernels_measured"): recorded_table}


def main() -> None:
    """Measure, record and print."""
    options = record.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        rows = [{"op": case.name, "shape": shape, "implementation": ""} for shape in SHAPES for case in cases(*shape)]
        print("no CUDA device: nothing was measured or recorded\n" + table(rows), end="")
        return
    import triton

    recorder = record.Recorder("kernels_measured", TABLES, record=not options.no_record)
    environment = recorder.environment(torch.device(DEVICE)) | {"triton": triton.__version__}
    copy, rows = copy_bandwidth(), []
    for shape in SHAPES:
        for case in cases(*shape):
            for row in measure(case, shape, copy):
                rows.append(environment | row)
                print(row, file=sys.stderr, flush=True)
            recorder.replace(rows)
            torch.compiler.reset()
            torch.cuda.empty_cache()
    print(f"copy: {copy:.0f} GB/s\n{table(rows)}", end="")
    wrong = ", ".join(dict.fromkeys(row["op"] for row in rows if "wrong" in row))
    record.check(not wrong, f"{wrong} differ from the reference and are not timed")


if __name__ == "__main__":
    main()
