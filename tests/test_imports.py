"""Imports between components, read from the sources; and `kernels/` is never importable as `kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dfengine

ROOT = Path(__file__).parent.parent

#: The components that each component of dfengine may import, from the bottom up. Each may always import itself.
MAY_IMPORT = {
    component: set(components.split())
    for component, components in {
        "checks": "",
        "tokens": "checks",
        "text": "",
        "files": "text",
        "dfkernels": "",
        "dfkernels.fused": "dfkernels",
        "diffusion": "checks tokens",
        "prompts": "checks tokens",
        "result": "tokens",
        "models": "checks diffusion tokens",
        "runtime": "diffusion",
        "explain": "checks dfkernels diffusion result runtime tokens",
        "store": "files result text tokens",
        "arguments": "checks diffusion explain models store",
        "figures": "diffusion explain files result store tokens",
        "report": "diffusion explain figures files result store tokens",
        "display": "diffusion explain figures result store",
        "shapes": "diffusion models tokens",
        "events": "diffusion explain",
        "plan": "diffusion explain store tokens",
        "recorder": "diffusion display events explain plan result store",
        "engine": "arguments checks diffusion display events explain models plan recorder runtime shapes store",
        "tracing": "checks diffusion display engine events explain files models",
        "evaluate": "checks dfkernels diffusion explain files plan prompts result runtime shapes tokens",
        "studies": "arguments checks diffusion engine evaluate explain figures files models prompts result shapes",
        "profile": "dfkernels diffusion engine events explain runtime store",
        "sweep": "checks diffusion engine events explain plan prompts recorder runtime store text",
        "cli": "checks diffusion engine evaluate events explain figures files models profile prompts report result "
        "runtime store studies sweep text",
    }.items()
}

#: The only components that may import each of these libraries.
ONLY = {
    "h5py": {"store"},
    "matplotlib": {"figures", "report"},
    "diffusers": {"models", "shapes"},
    "transformers": {"models", "shapes"},
    "triton": {"dfkernels.fused"},
    "typer": {"cli"},
    "rich": {"cli"},
    "pydantic": {"sweep"},
    "ray": {"sweep"},
    "scipy": {"evaluate"},
    "skimage": {"explain"},
    "sklearn": {"explain"},
    "yaml": {"sweep"},
}

SOURCES = sorted([*(ROOT / "dfengine").rglob("*.py"), *(ROOT / "kernels/dfkernels").rglob("*.py")])


def component_of(module: str) -> str:
    """The component a module belongs to: `dfkernels`, `dfkernels.fused`, or the first name below `dfengine`."""
    package, _, rest = module.partition(".")
    inner = rest.partition(".")[0]
    if package == "dfkernels":
        return "dfkernels.fused" if inner == "fused" else "dfkernels"
    return "cli" if inner == "__main__" else inner


def module_of(path: Path) -> str:
    base = ROOT / "kernels" if ROOT / "kernels" in path.parents else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= names if node.module == "dfengine" else {node.module}
    return modules


#: (module, the module it imports) over all sources. The package itself re-exports what its components offer.
IMPORTS = [
    (module_of(path), name) for path in SOURCES for name in sorted(imports_of(path)) if module_of(path) != "dfengine"
]


def test_every_component_is_in_the_table() -> None:
    components = {component_of(module_of(path)) for path in SOURCES} - {""}
    assert components <= set(MAY_IMPORT), "a new component: add what it may import"


def test_components_import_only_what_the_table_allows() -> None:
    assert [
        f"{module} imports {name}"
        for module, name in IMPORTS
        if name.partition(".")[0] in ("dfengine", "dfkernels")
        and component_of(name) not in {component_of(module), *MAY_IMPORT[component_of(module)]}
        and name.removeprefix("dfengine.") not in dfengine.__all__
    ] == []


def test_each_library_has_its_importers() -> None:
    assert [
        f"{module} imports {name}"
        for module, name in IMPORTS
        if (library := name.partition(".")[0]) in ONLY and component_of(module) not in ONLY[library]
    ] == []


def test_only_the_training_script_of_the_shapes_imports_diffusers() -> None:
    libraries = ("diffusers", "transformers")
    importers = {
        module for module, name in IMPORTS if name.partition(".")[0] in libraries and component_of(module) == "shapes"
    }
    assert importers == {"dfengine.shapes.train"}


def test_the_table_has_no_cycle() -> None:
    """Each component may import only components listed before it."""
    components = list(MAY_IMPORT)
    for i, component in enumerate(components):
        assert MAY_IMPORT[component] <= set(components[:i]), f"{component} would import a component listed after it"


def test_kernels_is_not_a_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.soak
def test_kernels_is_not_a_package_to_hugging_face() -> None:
    script = "import transformers, diffusers; from diffusers import StableDiffusionPipeline; print('fine')"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "fine", run.stderr


@pytest.mark.slow
def test_triton_is_imported_on_a_gpu_only() -> None:
    script = (
        "import sys, torch; before = 'triton' in sys.modules; import dfkernels; "
        "dfkernels.masks(0, 0, 0, 1, (2, 2)); print(before == ('triton' in sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "kernels", capture_output=True, text=True)
    assert run.stdout.strip() == "True", run.stderr
