"""No bad value is accepted, and each is refused in one line that names it; the values are those of `bad_inputs`."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run_cases(folder: Path, stride: int) -> list[list[str]]:
    """(what is called, parameter, value, outcome, message) of every so many cases."""
    process = subprocess.run(
        [sys.executable, "bad_inputs.py", str(folder), str(stride)],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_bad_values_are_refused_by_name(tmp_path: Path, stride: int) -> None:
    """On the command line and in Python, before a model is read unless only the model knows what is possible."""
    cases = run_cases(tmp_path, stride)
    assert [case for case in cases if case[3] != "refused"] == []
    by_face = Counter(case[0].startswith("dfengine ") for case in cases)
    assert min(by_face.values()) > 1200 // stride
