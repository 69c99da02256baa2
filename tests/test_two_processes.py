"""Two processes that run one verb with the same output at the same time: it is complete, whoever wrote it."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import xarray
from commands import dfengine_command, dfengine_fork
from hostile import write
from marks import soak
from PIL import Image

from dfengine import store

PROMPT = "a red circle above a blue square on a gray background"
SPEC = f"""
prompts: ["{PROMPT}", a blue square]
explainers: random
num_steps: 2
models: [{{model: shapes, image_size: [32, 32]}}]
"""


def check_hdf5(out: Path) -> None:
    with store.open(out) as run:
        assert run.finished


def check_zarr(out: Path) -> None:
    with xarray.open_zarr(out) as opened:
        assert {"saliency", "error", "score", "heat", "rgb", "relevance"} <= set(opened)
        opened.load()


def check_page(out: Path) -> None:
    assert out.read_text().rstrip().endswith("</html>")


def check_picture(out: Path) -> None:
    with Image.open(out) as image:
        image.load()


def check_pictures(out: Path) -> None:
    assert len(list(out.glob("*.pdf"))) > 3
    for path in out.glob("*.png"):
        check_picture(path)


def check_study(out: Path) -> None:
    assert (out / "table.md").read_text().endswith("\n")
    assert len(list((out / "cache").glob("*.npz"))) == 1
    for path in out.glob("*.png"):
        check_picture(path)


EXPLAIN = ("explain", PROMPT, "-o", "{out}", "--num-steps", "2", "--num-masks", "4")
GAMES = ("evaluate", "games", "--prompt", PROMPT, "--method", "random", "--num-steps", "2", "--distance", "mse")
#: Arguments, ending of the output, and what a complete one is.
VERBS: dict[str, tuple[tuple[str, ...], str, Callable[[Path], None]]] = {
    "merge": (("merge", "{run}", "-o", "{out}"), ".h5", check_hdf5),
    "merge over": (("merge", "{run}", "-o", "{out}", "--overwrite"), ".h5", check_hdf5),
    "export": (("export", "{run}", "-o", "{out}"), ".zarr", check_zarr),
    "export over": (("export", "{run}", "-o", "{out}", "--overwrite"), ".zarr", check_zarr),
    "report": (("report", "{run}", "-o", "{out}"), ".html", check_page),
    "figures": (("figures", "{run}", "-o", "{out}"), ".figures", check_pictures),
    "one figure": (("figures", "{run}", "-o", "{out}"), ".png", check_picture),
    "explain": (EXPLAIN, ".h5", check_hdf5),
    "explain over": ((*EXPLAIN, "--overwrite"), ".h5", check_hdf5),
    "sample": (("sample", PROMPT, "-o", "{out}", "--num-steps", "2"), ".png", check_picture),
    "games": ((*GAMES, "-o", "{out}"), ".games", check_study),
    "sweep": (("sweep", "{spec}", "-o", "{out}", "--device", "cpu"), ".run", check_hdf5),
}
#: What a process may be told that is not the first.
REFUSED = ("is being written by another run", "exists already", "holds an interrupted run")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("verb", [verb if verb in ("merge", "export", "report") else soak(verb) for verb in VERBS])
def test_two_processes_end_with_one_complete_result(tmp_path: Path, verb: str) -> None:
    arguments, ending, check = VERBS[verb]
    run, out = write(tmp_path / "run.h5"), tmp_path / f"out{ending}"
    (tmp_path / "spec.yaml").write_text(SPEC)
    values = [one.format(run=run, out=out, spec=tmp_path / "spec.yaml") for one in arguments]
    start = time.time() + 0.3
    forks = [dfengine_fork(*values, before=lambda: time.sleep(max(0, start - time.time()))) for _ in range(2)]
    ended = [(*fork.communicate(timeout=120), fork.returncode) for fork in forks]
    assert 0 in {status for _, _, status in ended}, ended
    for _, errors, status in ended:
        lines = [line for line in errors.splitlines() if not line.startswith("dfengine: note: ")]
        if status:
            (line,) = [line for line in lines if "skipped" not in line] or lines[:1]
            assert any(reason in line for reason in REFUSED), errors
    check(out)
    assert {path.name for path in tmp_path.iterdir()} == {"run.h5", "spec.yaml", out.name}, "no leftovers"
    again = dfengine_command(*values)
    assert again.returncode in (0, 2), again.stderr
    check(out)
