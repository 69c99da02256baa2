"""The kernels' benchmarks: every case passes its check, and every kernel compiles without a GPU and without spills."""

import os
import subprocess
import sys
from pathlib import Path

import kernels_measured
import pytest
import torch
from marks import soak
from torch.testing import assert_close

ROOT = Path(__file__).parent.parent

CASES = list(kernels_measured.cases(5, 4, 7, 13))


@pytest.mark.grid
@pytest.mark.parametrize(
    "case", [soak(case) if "local" in case.name else case for case in CASES], ids=[case.name for case in CASES]
)
def test_every_case_runs_and_passes_its_check(case: kernels_measured.Case) -> None:
    inputs = case.inputs()
    ours, theirs = (kernels_measured.result(run, inputs) for run in (case.fused(), case.operation))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, **kernels_measured.tolerance(case.tolerance), equal_nan=True)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_nothing_is_measured() -> None:
    script = ROOT / "bench/kernels_measured.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[0] == "no CUDA device: nothing was measured or recorded"
    assert len(lines) > 10
    assert all(line.count("not measured") == 5 for line in lines[3:])


def test_the_table_marks_wrong_and_failed_rows() -> None:
    shape = {"op": "apply_masks", "shape": (1, 2, 3, 4)}
    rows = [
        {**shape, "implementation": "fused", "median_ms": 0.5, "gb_s": 400, "share_of_copy": 0.1},
        {**shape, "implementation": "eager", "median_ms": 2.5},
        {**shape, "implementation": "compiled", "failed": "RuntimeError: no"},
        {**shape, "op": "perturb", "implementation": "fused", "wrong": "not equal"},
    ]
    masked, perturbed = kernels_measured.table(rows).splitlines()[2:]
    assert masked == "| apply_masks | 1×2×3×4 | 0.5 | 400 | 0.1 | 2.5 | failed |"
    assert perturbed == "| perturb | 1×2×3×4 | wrong | wrong | wrong | not measured | not measured |"


@pytest.mark.soak
def test_one_configuration_of_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is an extra")
    command = [sys.executable, ROOT / "bench/kernels_compiled.py", "--first", "--arch", "80", "90", "120"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    kernels = {line.split("`")[1] for line in run.stdout.splitlines() if line.startswith("| `")}
    assert kernels == {
        *("apply_masks", "draw_masks", "perturb"),
        *("local_score", "global_score", "segment_sums", "add_segments"),
    }
