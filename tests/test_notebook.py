"""Progress bars in a notebook, figures as the last value of a cell, and the tutorial, which is run as published.

`python tests/test_notebook.py` runs the tutorial and writes its outputs into the document.
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
from test_result import complete_result

from dfengine import Engine, Random, StepMap
from dfengine.display import progress

if TYPE_CHECKING:
    from dfengine.diffusion.denoiser import Denoiser

ROOT = Path(__file__).parent.parent
TUTORIAL = ROOT / "docs/tutorial.ipynb"


class CurrentInterpreter(KernelSpecManager):
    """Runs kernels with this interpreter, regardless of the installed kernels."""

    def get_kernel_spec(self, kernel_name):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(notebook: nbformat.NotebookNode, folder: Path) -> list[nbformat.NotebookNode]:
    """Run a notebook in a folder with one thread; return its code cells. Raises CellExecutionError if one fails."""
    manager = AsyncKernelManager(kernel_spec_manager=CurrentInterpreter())
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, km=manager, timeout=300, resources=resources, coalesce_streams=True)
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "tests"))
    client.execute(cleanup_kc=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: nbformat.NotebookNode) -> set[str]:
    """The MIME types of the outputs of a cell."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def text(cell: nbformat.NotebookNode, stream: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def is_figure(cell: nbformat.NotebookNode) -> bool:
    """Whether the last value of a cell is a figure."""
    return cell.source.splitlines()[-1].startswith(("result.plot(", "figures."))


@pytest.mark.soak
def test_the_tutorial_runs(tmp_path: Path) -> None:
    cells = execute(nbformat.read(TUTORIAL, 4), tmp_path)
    assert sum(map(is_figure, cells)) == 7
    for cell in cells:
        assert ("image/png" in kinds(cell)) == is_figure(cell), cell.source
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
    assert all("image/png" in kinds(cell) for cell in cells if is_figure(cell))
    assert not [word for word in (str(Path.home()), "/tmp", "site-packages", "Warning") if word in str(outputs)]
    assert TUTORIAL.stat().st_size < 1_500_000


def test_links_in_the_tutorial_exist() -> None:
    markdown = "".join(cell.source for cell in nbformat.read(TUTORIAL, 4).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", markdown)
    assert links
    assert all((TUTORIAL.parent / link).exists() for link in links)


@pytest.mark.soak
def test_submodules_are_imported_lazily() -> None:
    script = (
        "import sys, dfengine; print({'torch', 'matplotlib', 'h5py'} & {*sys.modules}, 'figures' in dir(dfengine), "
        "dfengine.figures.draw.__name__, dfengine.studies.games.__name__, hasattr(dfengine, 'nothing'))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "set() True draw games False", run.stderr


@pytest.mark.slow
def test_the_png_of_a_figure_has_its_size() -> None:
    figure = complete_result().plot("rise")
    assert Image.open(io.BytesIO(figure._repr_png_())).size == tuple(map(int, figure.bbox.size))


@pytest.mark.soak
def test_a_figure_is_shown_without_pyplot(tmp_path: Path) -> None:
    source = "from test_result import complete_result\nfigure = complete_result().plot('rise')\nfigure"
    (cell,) = execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path)
    picture = Image.open(io.BytesIO(base64.b64decode(cell.outputs[0].data["image/png"])))
    assert picture.size == tuple(map(int, complete_result().plot("rise").bbox.size))


@pytest.fixture
def progress_bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The progress bars created, each redrawn after every map."""
    bars: list[Any] = []

    class Bar(progress.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, mininterval=0)
            bars.append(self)

    monkeypatch.setattr(progress, "tqdm", Bar)
    return bars


def in_kernel(monkeypatch: pytest.MonkeyPatch, shell: Any) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))


def bar_lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The successive lines printed by a bar, without times and rates."""
    return [re.sub(r" \[.*", "", line).strip() for line in capsys.readouterr().err.split("\r")]


@pytest.mark.slow
def test_a_bar_counts_the_maps(tiny: Denoiser, progress_bars: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    explainers = [Random(), Random(name="other")]
    Engine(tiny).explain(CAPTIONS[0], explainers, num_steps=3, previews=False, progress=True)
    output = [re.sub(r"\|.*\|", "|", line) for line in bar_lines(capsys)]
    assert output[1] == "generating:   0%| 0/6"
    assert "explaining: random, step 2:  50%| 3/6" in output
    assert "explaining: other, step 2: 100%| 6/6" in output
    assert output[-2:] == ["", ""]
    assert (progress_bars[0].n, progress_bars[0].total) == (6, 6)


def test_the_bar_of_a_resumed_run_starts_at_the_completed_maps(
    tiny: Denoiser, progress_bars: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(event: object) -> None:
        if isinstance(event, StepMap) and event.step == 1:
            raise KeyboardInterrupt

    explain = partial(Engine(tiny).explain, CAPTIONS[0], Random(), num_steps=3, out=tmp_path / "run.h5")
    with pytest.raises(KeyboardInterrupt):
        explain(on_event=interrupt, progress=True)
    assert progress_bars[0] not in progress.tqdm._instances
    assert bar_lines(capsys)[-2:] == ["", ""]
    explain(progress=True)
    assert "2/3" in bar_lines(capsys)[1]


@pytest.mark.parametrize(
    ("shell", "requested", "expected"),
    [
        (SimpleNamespace(kernel=object()), None, True),
        (SimpleNamespace(kernel=object()), False, False),
        (SimpleNamespace(), None, False),
        (None, None, False),
        (None, True, True),
    ],
)
def test_a_bar_is_shown_in_notebooks_or_on_request(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    shell: Any,
    requested: bool | None,
    expected: bool,
) -> None:
    in_kernel(monkeypatch, shell)
    with progress.bar(3, requested):
        pass
    assert ("generating" in capsys.readouterr().err) == expected


def test_no_bar_without_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress.in_notebook()


def quantise(picture: str) -> str:
    """Quantise a base64 picture to 64 levels per channel, which halves its compressed size."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), np.int64)
    buffer = io.BytesIO()
    Image.fromarray(np.minimum((pixels + 2) // 4 * 4, 255).astype(np.uint8)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    document = nbformat.read(TUTORIAL, 4)
    with tempfile.TemporaryDirectory() as folder:
        for cell in execute(document, Path(folder)):
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]  # the bars
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = quantise(output.data["image/png"])
    document.metadata.language_info = {"name": "python"}
    nbformat.write(document, TUTORIAL)
