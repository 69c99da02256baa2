"""The registry of adapters: built-in families are discovered, others are registered by a decorator."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import Analytic
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline

from dfengine import Engine, Rise
from dfengine.models import load, registry
from dfengine.models.registry import adapter, adapter_of
from dfengine.models.unet.stable_diffusion import StableDiffusion
from dfengine.models.unet.stable_diffusion_xl import StableDiffusionXL


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the registry after each test."""
    adapter_of("StableDiffusionPipeline")  # imports the built-in adapters
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))


@pytest.mark.parametrize("kind", ["", "Img2Img", "Inpaint"])
def test_pipelines_are_found_by_class_name(kind: str) -> None:
    assert adapter_of(f"StableDiffusion{kind}Pipeline") is StableDiffusion
    assert adapter_of(f"StableDiffusionXL{kind}Pipeline") is StableDiffusionXL


def test_an_unknown_class_lists_what_is_supported() -> None:
    with pytest.raises(ValueError, match="WonderPipeline is not supported: expected one of") as caught:
        adapter_of("WonderPipeline")
    assert all(name in str(caught.value) for name in registry._adapters)
    assert "registered with dfengine.models.registry.adapter" in str(caught.value)


@pytest.mark.slow
def test_a_subclass_has_the_adapter_of_its_nearest_base(tiny_folder: Path) -> None:
    class OwnPipeline(StableDiffusionPipeline):
        pass

    class OwnestPipeline(OwnPipeline):
        pass

    pipeline = OwnestPipeline(**StableDiffusionPipeline.from_pretrained(tiny_folder).components)
    assert adapter_of(pipeline) is StableDiffusion
    adapter("OwnPipeline")(Analytic)
    assert adapter_of(pipeline) is Analytic


def test_a_registered_adapter_replaces_the_built_in_one_in_any_order() -> None:
    adapter("StableDiffusionPipeline")(Analytic)
    assert adapter_of("StableDiffusionPipeline") is Analytic
    adapter("StableDiffusionPipeline")(StableDiffusion)  # as its module does when it is discovered
    assert adapter_of("StableDiffusionPipeline") is Analytic
    assert adapter_of("StableDiffusionImg2ImgPipeline") is StableDiffusion


def test_a_new_module_in_the_models_package_is_discovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module stands for `dfengine/models/wonder/family.py`."""
    (tmp_path / "wonder").mkdir()
    (tmp_path / "wonder/__init__.py").touch()
    (tmp_path / "wonder/family.py").write_text(
        "from analytic import Analytic\nfrom dfengine.models.registry import adapter\n\n\n"
        '@adapter("WonderPipeline")\nclass Wonder(Analytic):\n    pass\n'
    )
    import dfengine.models

    monkeypatch.setattr(dfengine.models, "__path__", [*dfengine.models.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_ROOT", tmp_path)
    registry._import_adapters.cache_clear()
    assert adapter_of("WonderPipeline").__name__ == "Wonder"
    for name in ("dfengine.models.wonder", "dfengine.models.wonder.family"):
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.soak
def test_adapters_are_imported_lazily() -> None:
    folder = Path(registry.__file__).parent / "unet"
    modules = [f"dfengine.models.unet.{module.name}" for module in pkgutil.iter_modules([str(folder)])]
    assert "dfengine.models.unet.stable_diffusion" in modules
    script = (
        "import sys, dfengine.models as models; from dfengine.models.registry import adapter_of; "
        f"before = [name in sys.modules for name in {modules}]; adapter_of('StableDiffusionPipeline'); "
        f"print(any(before), all(name in sys.modules for name in {modules}))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "False True", run.stderr


@pytest.mark.parametrize("name", ["WonderPipeline", ["pipeline", "WonderPipeline"]])
def test_the_class_of_a_folder_is_checked_before_its_weights_are_read(
    tiny_folder: Path, tmp_path: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.loads((tiny_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    read: list[str] = []
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", read.append)
    with pytest.raises(ValueError, match=r"^WonderPipeline is not supported: expected one of"):
        load(tmp_path, device="cpu")
    assert read == []


class WonderPipeline(DiffusionPipeline):
    """A pipeline that diffusers does not have."""

    def __init__(self, vae: AutoencoderKL, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


@pytest.mark.slow
def test_an_engine_explains_a_pipeline_of_a_registered_class(tiny_folder: Path) -> None:
    parts = StableDiffusionPipeline.from_pretrained(tiny_folder).components
    pipeline = WonderPipeline(parts["vae"], parts["scheduler"])
    with pytest.raises(ValueError, match="WonderPipeline is not supported"):
        Engine(pipeline)
    options: dict[str, Any] = {}

    @adapter("WonderPipeline")
    class Wonder(Analytic):
        def __init__(self, pipeline: Any, **arguments: Any) -> None:
            super().__init__(lambda x, number: x * number[:, None, None, None])
            self.pipeline, self.name = pipeline, arguments["name"]
            options.update(arguments)

    engine = Engine(pipeline, batch_size=4)
    assert isinstance(engine.denoiser, Wonder)
    assert engine.denoiser.pipeline is pipeline
    assert options == {"name": "WonderPipeline", "batch_size": 4, "image_size": None, "attention_backend": "auto"}
    result = engine.explain("1", Rise(num_masks=8), num_steps=2)
    assert (result.model, result.maps["rise"].shape) == ("WonderPipeline", (2, 6, 5))
    assert torch.from_numpy(result.maps["rise"]).isfinite().all()
