"""Folders that are incomplete, damaged or of another model are refused in one line, before any weights are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dfengine import Engine
from dfengine.models import architectures


def configured(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without_a_weight(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"], weights["conv_in.bias"]
    save_file(weights, path)


def truncated(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "without a weight": (without_a_weight, r"its unet lacks the weights conv_in\.\w+ and 1 more"),
    "truncated": (truncated, "could not be loaded"),
    "without a tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "the tokenizer does not tell how many tokens"),
    "without a unet": (lambda f: shutil.rmtree(f / "unet"), "could not be loaded"),
    "without a class": (lambda f: configured(f, "model_index.json", _class_name=[]), "names no pipeline class"),
    "an empty part": (lambda f: configured(f, "model_index.json", unet=[]), "could not be loaded"),
    "a list as configuration": (lambda f: f.joinpath("unet/config.json").write_text("[1]") and None, "could not be"),
    "no mapping": (lambda f: f.joinpath("model_index.json").write_text("[1]") and None, "names no pipeline class"),
    "huge": (lambda f: configured(f, "unet/config.json", sample_size=10**9), "sample_size is 1000000000"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(tiny_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Engine.from_pretrained(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline is not supported"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDMEulerScheduler is not supported"),
        ("unet/config.json", {"in_channels": 9}, "the UNet takes 9 channels but latents have 4"),
        ("unet/config.json", {"time_cond_proj_dim": 32}, "conditioned on the guidance scale"),
    ],
)
def test_another_model_is_refused_before_its_weights_are_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, values: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    configured(folder, file, **values)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(folder, device="cpu")


@pytest.mark.slow
def test_random_weights_of_a_custom_pipeline(tmp_path: Path) -> None:
    """Whose class is [module, class]."""
    folder = tmp_path / "model"
    shutil.copytree(architectures.configuration("sd15"), folder)
    configured(folder, "model_index.json", _class_name=["pipeline", "StableDiffusionPipeline"])
    configured(folder, "unet/config.json", block_out_channels=[32] * 4)
    configured(folder, "vae/config.json", block_out_channels=[32] * 4)
    configured(folder, "text_encoder/config.json", num_hidden_layers=1)
    engine = Engine.from_pretrained(folder, device="cpu", random_weights=True)
    assert engine.denoiser.latent_shape == (4, 64, 64)


@pytest.mark.parametrize("size", [(10**9, 16), (16,), (16, 16, 16), (0, 16)])
def test_an_impossible_image_size_is_refused(tiny_folder: Path, size: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"pixels are not possible|image_size"):
        Engine.from_pretrained(tiny_folder, device="cpu", image_size=size)
