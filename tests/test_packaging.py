"""A wheel holds both packages and the weights, and works away from the sources."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("dfengine", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_holds_every_source_configuration_and_weight(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, base in ((ROOT / "dfengine", ROOT), (ROOT / "kernels/dfkernels", ROOT / "kernels")):
        sources = [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
        assert {path.relative_to(base).as_posix() for path in sources} <= names
    for data in ("models/configs", "shapes/weights"):
        files = [path for path in (ROOT / "dfengine" / data).rglob("*") if path.is_file()]
        assert len(files) > 5
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {"dfengine/py.typed", "dfkernels/py.typed"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dfengine", "dfkernels"}


def test_the_wheel_works_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import dfengine, dfkernels, sys; "
        "assert dfengine.__file__.startswith(sys.argv[1]) and dfkernels.__file__.startswith(sys.argv[1]); "
        "result = dfengine.Engine.from_pretrained('shapes', device='cpu').explain("
        "'a red circle on a gray background', dfengine.Rise(2), num_steps=1); "
        "print(result.maps['rise'].shape)"
    )
    site = str(tmp_path / "site")
    run = subprocess.run(
        [sys.executable, "-c", script, site], cwd=tmp_path, env={"PYTHONPATH": site}, capture_output=True, text=True
    )
    assert run.stdout.strip() == "(1, 16, 16)", run.stderr
