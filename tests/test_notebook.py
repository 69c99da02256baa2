"""The bar that a notebook shows; figures as a cell's last value; the tutorial, which is run as it stands there.

`python tests/test_notebook.py` runs the tutorial and puts its outputs into the document.
"""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nbformat
import numpy as np
import pytest
from conftest import CAPTIONS
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image
from test_result import whole

from dfengine import Engine, Random, StepMap
from dfengine.display import progress

if TYPE_CHECKING:
    from dfengine.diffusion.denoiser import Denoiser

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs/tutorial.ipynb"


class Running(KernelSpecManager):
    """This interpreter, whatever kernels are installed."""

    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> list[nbformat.NotebookNode]:
    """Its code cells with their outputs, run in a folder by one thread. Raises CellExecutionError where one does."""
    manager = AsyncKernelManager(kernel_spec_manager=Running())
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, km=manager, timeout=300, resources=where, coalesce_streams=True)
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    client.execute(cleanup_kc=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """The MIME types of what a cell shows."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def text(cell: nbformat.NotebookNode, stream: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def draws(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell's last value is a figure."""
    return cell.source.splitlines()[-1].startswith(("result.plot(", "figures."))


@pytest.mark.soak
def test_the_tutorial_runs(tmp_path: Path) -> None:
    cells = execute(nbformat.read(TUTORIAL, 4), tmp_path)
    assert sum(map(draws, cells)) == 7
    for cell in cells:
        assert ("image/png" in kinds(cell)) == draws(cell), cell.source
        assert ("text/html" in kinds(cell)) == (cell.source.splitlines()[-1] in ("result", "stored")), cell.source
        assert "Warning" not in text(cell, "stderr"), text(cell, "stderr")
    assert (tmp_path / "tutorial.h5").exists()


def test_the_tutorial_in_the_document_was_run_in_order() -> None:
    notebook = nbformat.read(TUTORIAL, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"execute_result", "stream"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert all("image/png" in kinds(cell) for cell in cells if draws(cell))
    assert not [word for word in (str(Path.home()), "/tmp", "site-packages", "Warning") if word in str(outputs)]
    assert TUTORIAL.stat().st_size < 1_500_000


def test_the_links_of_the_tutorial_lead_somewhere() -> None:
    told = "".join(cell.source for cell in nbformat.read(TUTORIAL, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", told)
    assert links
    assert all((TUTORIAL.parent / link).exists() for link in links)


@pytest.mark.soak
def test_parts_are_imported_when_they_are_asked_for() -> None:
    script = (
        "import sys, dfengine; print({'torch', 'matplotlib', 'h5py'} & {*sys.modules}, 'figures' in dir(dfengine), "
        "dfengine.figures.draw.__name__, dfengine.studies.games.__name__, hasattr(dfengine, 'nothing'))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set() True draw games False", run.stderr


@pytest.mark.slow
def test_a_figure_is_a_picture_of_its_size() -> None:
    figure = whole().plot("rise")
    assert Image.open(io.BytesIO(figure._repr_png_())).size == tuple(map(int, figure.bbox.size))


@pytest.mark.soak
def test_a_figure_is_shown_without_pyplot(tmp_path: Path) -> None:
    source = "from test_result import whole\nfigure = whole().plot('rise')\nfigure"
    (cell,) = execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path)
    picture = Image.open(io.BytesIO(base64.b64decode(cell.outputs[0].data["image/png"])))
    assert picture.size == tuple(map(int, whole().plot("rise").bbox.size))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bars that are made, each drawn anew with every map."""
    made: list[Any] = []

    class Bar(progress.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, mininterval=0)
            made.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    return made


def in_kernel(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a bar has told, one line after the other, without what tells of time."""
    return [re.sub(r" \[.*", "", line).strip() for line in capsys.readouterr().err.split("\r")]


@pytest.mark.slow
def test_a_bar_counts_the_maps(tiny: Denoiser, lines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    explainers = [Random(), Random(name="other")]
    Engine(tiny).explain(CAPTIONS[0], explainers, num_steps=3, previews=False, progress=True)
    told = [re.sub(r"\|.*\|", "|", line) for line in shown(capsys)]
    assert told[1] == "generating:   0%| 0/6"
    assert "explaining: random, step 2:  50%| 3/6" in told
    assert "explaining: other, step 2: 100%| 6/6" in told
    assert told[-2:] == ["", ""]
    assert (lines[0].n, lines[0].total) == (6, 6)


def test_a_bar_goes_on_from_what_is_done(
    tiny: Denoiser, lines: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, StepMap) and event.step == 1:
            raise KeyboardInterrupt

    explained = partial(Engine(tiny).explain, CAPTIONS[0], Random(), num_steps=3, out=tmp_path / "run.h5")
    with pytest.raises(KeyboardInterrupt):
        explained(on_event=interrupt, progress=True)
    assert lines[0] not in progress.tqdm._instances
    assert shown(capsys)[-2:] == ["", ""]
    explained(progress=True)
    assert "2/3" in shown(capsys)[1]


@pytest.mark.parametrize(
    ("shell", "wanted", "told"),
    [
        (SimpleNamespace(kernel=object()), None, True),
        (SimpleNamespace(kernel=object()), False, False),
        (SimpleNamespace(), None, False),
        (None, None, False),
        (None, True, True),
    ],
)
def test_a_bar_is_shown_in_a_notebook_or_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shell: Any, wanted: bool | None, told: bool
) -> None:
    in_kernel(monkeypatch, shell)
    with progress.bar(3, wanted):
        pass
    assert ("generating" in capsys.readouterr().err) == told


def test_no_bar_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress.in_notebook()


def small(picture: str) -> str:
    """A picture with 64 levels a channel, which compress to half; base64 as it was."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), np.int64)
    file = io.BytesIO()
    Image.fromarray(np.minimum((pixels + 2) // 4 * 4, 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    document = nbformat.read(TUTORIAL, 4)
    with tempfile.TemporaryDirectory() as folder:
        for made in execute(document, Path(folder)):
            made.metadata.pop("execution", None)
            made.outputs = [output for output in made.outputs if output.get("name") != "stderr"]  # the bars
            for output in made.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small(output.data["image/png"])
    document.metadata.language_info = {"name": "python"}
    nbformat.write(document, TUTORIAL)
