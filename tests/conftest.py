"""Test setup: annotations are checked at every call, and Triton is interpreted if there is no GPU.

Shared fixtures import their own dependencies, so that the kernels' tests run without diffusers.
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from dfengine.diffusion.denoiser import Denoiser

DFKERNELS = Path(__file__).parent.parent / "kernels/dfkernels"

# One thread per process: with more, a fork of this process would wait for them forever.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():
    torch.set_num_threads(1)

# This precedes all imports of our code. dfkernels.fused is left out: the hook decorates below @triton.jit, which would
# compile the wrapper instead of the kernel. beartype may be missing if only the kernels' tests are run.
if importlib.util.find_spec("beartype") and not os.environ.get("JAXTYPING_DISABLE"):
    import typechecker  # noqa: F401  (replaces what the hook looks up)

    checked = (f"dfkernels.{path.stem}" for path in DFKERNELS.glob("*.py") if path.stem != "__init__")
    install_import_hook(("dfengine", *checked), "typechecker.typecheck")

# This precedes the import of triton, which decorates its functions at import.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The number of examples per property in `make quick`, `make test` and `make soak`.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "test",
        max_examples=25,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine is not an error
    )
    for name, examples in (("quick", 5), ("soak", 250)):
        settings.register_profile(name, settings.get_profile("test"), max_examples=examples)
    settings.load_profile("test")

#: Two captions of the embedded world, whose words are the tiny model's vocabulary.
CAPTIONS = ("a red circle above a blue square on a gray background", "a pink star on a black background")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Select the cases of tests marked `grid`; skip those marked `gpu` if there is no GPU.

    `make quick` runs the first case of a grid, `make test` a small set that covers every value of every parameter.
    """
    grids = defaultdict(list)
    for item in items:
        if item.get_closest_marker("grid"):
            grids[item.nodeid.partition("[")[0]].append(item)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for first, *others in grids.values():
        covered = _values(first)
        others = [case for case in others if not case.get_closest_marker("soak")]
        while others:
            case = max(others, key=lambda other: len(_values(other) - covered))
            case.add_marker("slow" if _values(case) - covered else "soak")
            covered |= _values(case)
            others.remove(case)


def _values(case: pytest.Item) -> set[tuple[str, str]]:
    """The parameters of a case with their values."""
    return {(name, repr(value)) for name, value in case.callspec.params.items()} if hasattr(case, "callspec") else set()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as the training script exports it: random weights, 4×8×8 latents, 16×16 images."""
    from tiny import export

    return export(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> "Denoiser":
    """The tiny model, loaded on the CPU in float32."""
    from dfengine.models import load

    return load(tiny_folder, device="cpu")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of an architecture by name, saved by diffusers at an eighth of its width."""
    from reduced import random_pipeline, reduced

    from dfengine.models.loading import quiet

    @cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        with quiet():
            random_pipeline(reduced(name, folder / "configs")).save_pretrained(folder / "pipeline")
        return folder / "pipeline"

    return save
