"""The sdist and the wheel are complete and work without the sources; an editable install is found from any folder."""

import builtins
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
#: The files that a build reads besides the sources.
METADATA = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt")


def build(kind: str, source: Path, out: Path) -> Path:
    """The file that setuptools builds from a source folder: kind is "wheel", "sdist" or "editable"."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (built,) = out.iterdir()
    return built


def python(code: str, *arguments: Path, cwd: Path, flags: tuple[str, ...] = (), **environment: str) -> list[str]:
    """The lines printed by a new interpreter, started in a folder, without our PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *flags, "-c", code, *map(str, arguments)]
    run = subprocess.run(command, cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in a folder called dfengine, as `git clone` names it."""
    folder = tmp_path_factory.mktemp("parent") / "dfengine"
    for name in ("dfengine", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in METADATA:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def sdist(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the source distribution unpacks to."""
    built = build("sdist", clone, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none
        archive.extractall(unpacked)
    (folder,) = unpacked.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel"))


def test_the_sdist_holds_what_its_wheel_needs_and_the_tested_versions(sdist: Path) -> None:
    assert all((sdist / name).is_file() for name in METADATA)


def test_the_wheel_holds_every_source_configuration_and_weight(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, base in ((ROOT / "dfengine", ROOT), (ROOT / "kernels/dfkernels", ROOT / "kernels")):
        sources = [path for path in folder.rglob("*.py") if "__pycache__" not in path.parts]
        assert {path.relative_to(base).as_posix() for path in sources} <= names
    for data in ("models/configs", "report/page", "shapes/weights"):
        files = [path for path in (ROOT / "dfengine" / data).rglob("*") if path.is_file()]
        assert files
        assert {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts} <= names
    assert {"dfengine/py.typed", "dfkernels/py.typed"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dfengine", "dfkernels"}


@pytest.mark.soak
def test_the_wheel_works_without_the_sources(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import dfengine, dfkernels, sys; "
        "assert dfengine.__file__.startswith(sys.argv[1]) and dfkernels.__file__.startswith(sys.argv[1]); "
        "result = dfengine.Engine.from_pretrained('shapes', device='cpu').explain("
        "'a red circle on a gray background', dfengine.Rise(2), num_steps=1); "
        "print(result.maps['rise'].shape)"
    )
    assert python(code, site, cwd=tmp_path, PYTHONPATH=str(site)) == ["(1, 16, 16)"]


def test_an_editable_install_is_imported_from_any_folder(clone: Path, tmp_path: Path) -> None:
    site, out = tmp_path / "site", tmp_path / "out"
    out.mkdir()
    built = build("editable", clone, out)
    zipfile.ZipFile(built).extractall(site)
    # Neither the environment's own install of dfengine nor the clone is on the path, only the new install. In the
    # clone, the folder kernels is at most a namespace package, which has no origin.
    code = (
        "import sys, site; from importlib.util import find_spec; "
        "sys.path.append(sys.argv[2]); site.addsitedir(sys.argv[1]); "
        "from dfengine import __version__; "
        "specs = [find_spec(name) for name in ('dfengine.engine', 'dfkernels', 'kernels')]; "
        "print(*(spec and spec.origin for spec in specs), sep='\\n')"
    )
    for cwd in (clone.parent, clone, tmp_path):
        *ours, kernels = python(code, site, Path(sysconfig.get_path("purelib")), cwd=cwd, flags=("-S",))
        expected = [clone / "dfengine/engine.py", clone / "kernels/dfkernels/__init__.py"]
        assert [Path(origin).resolve() for origin in ours] == expected
        assert kernels == "None"


def test_the_install_of_this_environment_takes_precedence_over_a_folder_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "dfengine/dfengine").mkdir(parents=True)
    (origin,) = python("import dfengine; print(dfengine.__file__)", cwd=tmp_path)
    assert Path(origin).name == "__init__.py"


def test_the_wheel_has_the_packages_version(wheel: Path) -> None:
    import dfengine

    assert wheel.name.startswith(f"dfengine-{dfengine.__version__}-")


def test_a_star_import_replaces_no_builtin() -> None:
    import dfengine

    assert not {name for name in dfengine.__all__ if hasattr(builtins, name)}
    assert callable(dfengine.open)
