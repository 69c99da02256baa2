"""Who may import whom, read off the sources; and that kernels/ is never importable as `kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: For each place, the places of ours it may import; a place may always import itself.
MAY_IMPORT = {
    "dfkernels": set(),
    "dfkernels.fused": {"dfkernels"},
    "dfengine.runtime.batching": set(),
    "dfengine.diffusion.path": set(),
    "dfengine.tokens": set(),
    "dfengine.prompts": {"words"},
    "dfengine.result": {"words"},
    "dfengine.diffusion.denoiser": {"schedule", "words"},
    "dfengine.models": {"denoiser", "schedule", "words"},
    "dfengine.runtime.tuning": {"batching", "denoiser"},
    "dfengine.diffusion.trajectory": {"denoiser", "schedule"},
    "dfengine.explain": {"batching", "denoiser", "result", "schedule", "trajectory", "words", "dfkernels"},
    "dfengine.store": {"explain", "result", "trajectory", "words"},
    "dfengine.figures": {"result", "schedule", "words"},
    "dfengine.report": {"figures", "result", "schedule", "store", "words"},
    "dfengine.display.dataset": {"result", "store"},
    "dfengine.display.notebook": {"figures", "result"},
    "dfengine.display.mixin": {"dataset", "figures", "notebook", "result", "store"},
    "dfengine.display.progress": {"explain"},
    "dfengine.shapes": {"models"},
    "dfengine.recorder": {"denoiser", "explain", "result", "shown", "store", "trajectory", "words"},
    "dfengine.engine": {
        "record",
        "batching",
        "denoiser",
        "explain",
        "models",
        "progress",
        "result",
        "schedule",
        "shapes",
        "shown",
        "store",
        "trajectory",
        "tuning",
    },
    "dfengine.evaluate": {
        "batching",
        "denoiser",
        "explain",
        "prompts",
        "record",
        "result",
        "shapes",
        "trajectory",
        "words",
        "dfkernels",
    },
    "dfengine.studies": {
        "diffusion",
        "engine",
        "evaluate",
        "explain",
        "figures",
        "models",
        "prompts",
        "result",
        "shapes",
    },
    "dfengine.profile": {"denoiser", "engine", "explain", "record", "store", "trajectory", "tuning", "dfkernels"},
    "dfengine.sweep": {"engine", "explain", "prompts", "record", "store", "trajectory"},
    "dfengine.cli": {
        "batching",
        "engine",
        "evaluate",
        "explain",
        "figures",
        "models",
        "profile",
        "prompts",
        "report",
        "result",
        "store",
        "studies",
        "sweep",
        "tuning",
    },
}

#: The only places that may import each of these libraries.
ONLY = {
    "h5py": {"dfengine.store"},
    "matplotlib": {"dfengine.figures", "dfengine.report"},
    "diffusers": {"dfengine.models", "dfengine.shapes"},
    "transformers": {"dfengine.models", "dfengine.shapes"},
    "triton": {"dfkernels.fused"},
    "typer": {"dfengine.cli"},
    "rich": {"dfengine.cli"},
    "pydantic": {"dfengine.sweep"},
    "ray": {"dfengine.sweep"},
    "scipy": {"dfengine.evaluate"},
    "skimage": {"dfengine.explain"},
    "sklearn": {"dfengine.explain"},
    "yaml": {"dfengine.sweep"},
}

SOURCES = sorted([*(ROOT / "dfengine").rglob("*.py"), *(ROOT / "kernels/dfkernels").rglob("*.py")])


def place(module: str) -> str:
    """The room of a module: dfkernels, its fused, or dfengine and the name beneath it."""
    parts = module.split(".")
    return parts[0] if parts[0] == "dfkernels" and parts[1:2] != ["fused"] else ".".join(parts[:2])


def module_of(path: Path) -> str:
    base = ROOT / "kernels" if ROOT / "kernels" in path.parents else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside if node.module == "dfengine" else {node.module}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_every_import_is_allowed(path: Path) -> None:
    here = place(module_of(path))
    if here == "dfengine":  # the package itself offers what its parts make
        return
    assert here in MAY_IMPORT, f"{here} is a new room: say what it may import"
    for name in imported(path):
        there = place(name)
        if there.startswith(("dfengine.", "dfkernels")):
            allowed = {*MAY_IMPORT[here], here.removeprefix("dfengine.")}
            assert there.removeprefix("dfengine.") in allowed or name in PUBLIC, f"{here} may not import {name}"
        library = name.partition(".")[0]
        if library in ONLY:
            assert here in ONLY[library], f"only {ONLY[library]} may import {library}"
        if library in ("diffusers", "transformers") and here == "dfengine.shapes":
            assert module_of(path) == "dfengine.shapes.train"


#: What the package offers under its own name, which the command line takes from there.
EXPLAINERS = (
    "Attention",
    "Cam",
    "Lime",
    "Random",
    "XDiffusionCam",
    "XDiffusionLime",
    "XDiffusionRise",
    "Relevance",
    "Rise",
)
PUBLIC = {f"dfengine.{name}" for name in ("Engine", "StepMap", *EXPLAINERS)}


def test_the_rules_have_no_circle() -> None:
    done: set[str] = set()
    waiting = {room.removeprefix("dfengine."): needs for room, needs in MAY_IMPORT.items()}
    while waiting:
        free = {room for room, needs in waiting.items() if needs <= done}
        assert free, f"a circle among {sorted(waiting)}"
        done |= free
        for room in free:
            del waiting[room]


def test_kernels_is_not_a_package_to_hugging_face() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()
    script = "import transformers, diffusers; from diffusers import StableDiffusionPipeline; print('fine')"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr


def test_triton_is_imported_on_a_gpu_only() -> None:
    script = (
        "import sys, torch; before = 'triton' in sys.modules; import dfkernels; "
        "dfkernels.masks(0, 0, 0, 1, (2, 2)); print(before == ('triton' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "kernels", capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
