"""Loading, its errors, and the Stable Diffusion adapter, on a tiny random pipeline and without a network."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from conftest import CAPTIONS
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from torch.testing import assert_close

from dfengine.diffusion.denoiser import Denoiser
from dfengine.models import adapt, load
from dfengine.models.loading import pick_device, pick_dtype, quiet
from dfengine.models.unet.stable_diffusion import StableDiffusion
from dfengine.shapes.world import vocabulary

T = torch.tensor([700, 20])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Make every network request fail as if offline; returns the list of requests."""
    requests: list[Any] = []

    def refuse(*target: Any, **_: Any) -> None:
        requests.append(target)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the hub's attempts
    return requests


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline's folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def outputs(denoiser: Denoiser) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser.predict(x, T, denoiser.encode_prompts(CAPTIONS)).float()


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_is_read_without_network(tiny_folder: Path, offline: list[Any]) -> None:
    for name in (str(tiny_folder), tiny_folder, os.path.relpath(tiny_folder)):
        denoiser = load(name, device="cpu")
        assert isinstance(denoiser, StableDiffusion)
        assert denoiser.name == str(name)
    assert offline == []
    assert (denoiser.dtype, denoiser.device) == (torch.float32, torch.device("cpu"))
    assert (denoiser.latent_shape, denoiser.image_shape) == ((4, 8, 8), (16, 16))
    assert not any(weight.requires_grad for weight in denoiser.unet.parameters())
    assert not denoiser.unet.training


def test_a_pipeline_of_the_caller_is_the_same_model(tiny: Denoiser, tiny_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    denoiser = adapt(pipeline, batch_size=3)
    assert denoiser.batch_size == 3
    assert denoiser.name == str(tiny_folder)
    assert_close(outputs(denoiser), outputs(tiny), rtol=0, atol=0)
    assert adapt(StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)).name != ""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64", torch.float64])
def test_dtype_is_the_requested_one(tiny: Denoiser, tiny_folder: Path, dtype: Any) -> None:
    if dtype == "float64":
        with pytest.raises(ValueError, match="'float64' is not known: expected one of float32, float16, bfloat16"):
            load(tiny_folder, dtype=dtype)
        return
    denoiser = load(tiny_folder, device="cpu", dtype=dtype)
    assert isinstance(denoiser, StableDiffusion)
    want = torch.bfloat16 if dtype == "bfloat16" else dtype
    assert {denoiser.dtype, *(weight.dtype for weight in denoiser.unet.parameters())} == {want}
    # bfloat16 keeps 8 bits, through a dozen layers.
    assert_close(outputs(denoiser), outputs(tiny), rtol=0, atol=0.05)
    x = torch.zeros(1, 4, 8, 8)
    assert denoiser(x, T[:1], denoiser.encode_prompts(CAPTIONS[:1])).dtype == torch.float32
    assert denoiser.decode(x).dtype == denoiser.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


@pytest.mark.slow
def test_variant_selects_the_files(tiny_folder: Path, tiny: Denoiser, tmp_path: Path) -> None:
    half = StableDiffusionPipeline.from_pretrained(tiny_folder, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    denoiser = load(tmp_path / "half", device="cpu", dtype="float32", variant="fp16")
    assert isinstance(denoiser, StableDiffusion)
    assert isinstance(tiny, StableDiffusion)
    assert denoiser.dtype == torch.float32
    for (name, ours), single in zip(denoiser.unet.named_parameters(), tiny.unet.parameters(), strict=True):
        assert torch.equal(ours, single.half().float()), name
    with pytest.raises(ValueError, match=r"half.*could not be loaded"):
        load(tmp_path / "half", device="cpu")
    with pytest.raises(ValueError, match=r"pipeline.*could not be loaded: .*bf16"):
        load(tiny_folder, device="cpu", variant="bf16")


@pytest.mark.soak
def test_loading_prints_nothing(tiny_folder: Path) -> None:
    """In a fresh process, where the libraries are imported too."""
    code = (
        f"from dfengine.models import load; load({str(tiny_folder)!r}, device='cpu').encode_prompts(['a red circle'])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_loading_again_prints_nothing(tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(tiny_folder, device="cpu")
    assert capfd.readouterr() == ("", "")


LIBRARIES = (diffusers.utils.logging, transformers.utils.logging)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize(("level", "bars"), [(logging.INFO, True), (logging.CRITICAL, False)])
def test_quiet_leaves_the_libraries_as_they_were(level: int, bars: bool, error: bool) -> None:
    def state() -> list[tuple[int, bool]]:
        return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in LIBRARIES]

    before = state()
    try:
        for library in LIBRARIES:
            library.set_verbosity(level)
            (library.enable_progress_bar if bars else library.disable_progress_bar)()
        with contextlib.suppress(KeyError), quiet():
            assert state() == [(logging.ERROR, False)] * 2
            if error:
                raise KeyError
        assert state() == [(level, bars)] * 2
    finally:
        for library, (verbosity, enabled) in zip(LIBRARIES, before, strict=True):
            library.set_verbosity(verbosity)
            (library.enable_progress_bar if enabled else library.disable_progress_bar)()


# --- what cannot be loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["shape", "stable-diffusion", "owner/", "/no/such/folder", "./none", "~/none", "a/b/c"]
)
def test_unknown_models_are_refused_without_the_network(name: str, offline: list[Any]) -> None:
    with pytest.raises(ValueError, match=f"{name}' is not known|no model at '{name}'") as caught:
        load(name, device="cpu")
    assert "diffusers" in str(caught.value)
    assert "a hub id such as 'owner/name'" in str(caught.value)
    assert offline == []


def test_a_file_or_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a folder without model_index\.json"):
        load(tmp_path, device="cpu")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"no model at .*model\.safetensors"):
        load(tmp_path / "model.safetensors", device="cpu")


@pytest.mark.slow
def test_a_hub_id_without_network_is_a_one_line_error(offline: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"could not be loaded: the hub cannot be reached: .*not known") as caught:
        load("nobody/nothing", device="cpu")
    assert "\n" not in str(caught.value)
    assert offline != []


def test_an_unresponsive_hub_is_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_: Any, **__: Any) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "getaddrinfo", time_out)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(ValueError, match=r"model 'nobody/nothing' could not be loaded: .*timed out"):
        load("nobody/nothing", device="cpu")


def test_a_cached_hub_model_needs_no_network(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The layout of the hub's cache: separate blobs, a snapshot per commit, and the commit of each branch."""
    repository = tmp_path / "models--somebody--something"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(diffusers.pipelines.pipeline_utils, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with caplog.at_level(logging.DEBUG, "dfengine"):
        assert load("somebody/something", device="cpu").name == "somebody/something"
    assert [message for message in caplog.messages if "from the hub" in message] == []
    assert offline == []


def remove_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def remove_part(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def garble_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries before their errors
@pytest.mark.parametrize("damage", [remove_weights, cut_weights, remove_part, garble_index])
def test_a_damaged_folder_is_a_one_line_error(copy: Path, damage: Callable[[Path], None], offline: list[Any]) -> None:
    damage(copy)
    with pytest.raises(ValueError, match=r"copy' could not be loaded: .") as caught:
        load(copy, device="cpu")
    assert "\n" not in str(caught.value)
    assert offline == []


def test_a_pipeline_of_another_kind_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"DDPMPipeline is not supported: expected one of .*StableDiffusionPipeline"):
        load(tmp_path, device="cpu")


@pytest.mark.parametrize("device", ["cuda:97", "tpu", "xpu", "mps", "cuda:x", ""])
def test_unavailable_devices_are_refused(device: str, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: .") as caught:
        load(tiny_folder, device=device)
    assert "\n" not in str(caught.value)


def test_default_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    for there, device, dtype in ((True, "cuda", torch.float16), (False, "cpu", torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device(None) == torch.device(device)
        assert pick_dtype(None, torch.device(device)) == dtype
    assert pick_dtype("float32", torch.device("cuda")) == torch.float32
    with pytest.raises(ValueError, match="'half' is not known: expected one of float32, float16, bfloat16"):
        pick_dtype("half", torch.device("cpu"))


# --- the adapter -----------------------------------------------------------------------------------------------------


def test_networks_are_called_as_diffusers_calls_them(tiny: Denoiser, tiny_folder: Path) -> None:
    """The text as the encoder's last hidden state, images scaled to [−1, 1], latents by the scaling factor."""
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    generator = torch.Generator().manual_seed(3)
    x, images = torch.randn(9, 4, 8, 8, generator=generator), torch.rand(9, 3, 16, 16, generator=generator)
    with torch.no_grad():
        tokens = pipeline.tokenizer(list(CAPTIONS), padding="max_length", return_tensors="pt").input_ids
        text = pipeline.text_encoder(tokens).last_hidden_state
        condition = tiny.encode_prompts(CAPTIONS)
        assert_close(condition.tensors["text"], text, rtol=0, atol=1e-6)
        assert len(condition) == 2
        want = torch.cat([pipeline.unet(x[i : i + 1], T[i], text[i : i + 1]).sample for i in range(2)])
        assert_close(tiny.predict(x[:2], T, condition), want, rtol=1e-5, atol=1e-5)
        decoded = pipeline.image_processor.postprocess(pipeline.vae.decode(x / 0.5).sample, output_type="pt")
        assert_close(tiny.decode(x), decoded, rtol=1e-5, atol=1e-5)
        encoded = pipeline.vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.mean * 0.5
        assert_close(tiny.encode(images), encoded, rtol=1e-5, atol=1e-5)


def test_the_configuration_of_another_sampler_is_read(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A configuration without clipping, which diffusers corrects (to steps_offset = 1) with a warning."""
    DPMSolverMultistepScheduler(timestep_spacing="leading").save_pretrained(copy / "scheduler")
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    schedule = load(copy, device="cpu").schedule
    assert schedule.clip_range is None
    assert schedule.timesteps("uniform", 4) == [801, 601, 401, 201]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("word", ["teapot", "circle,", "circles", "红"])
def test_an_unknown_word_lists_the_vocabulary(tiny: Denoiser, word: str) -> None:
    with pytest.raises(ValueError, match="does not know") as caught:
        tiny.encode_prompts(["a red circle", f"a red {word} on a gray background"])
    assert repr(word) in str(caught.value)
    assert all(known in str(caught.value) for known in vocabulary())
    assert "gray'" not in str(caught.value)


def test_prompts_of_known_words_are_accepted(tiny: Denoiser) -> None:
    plain, shouted, spaced, empty = (
        tiny.encode_prompts([prompt]).tensors["text"]
        for prompt in ("a red circle", "A Red CIRCLE", "  a  red\ncircle ", "")
    )
    assert torch.equal(plain, shouted)
    assert torch.equal(plain, spaced)
    assert not torch.equal(plain, empty)


@pytest.mark.parametrize("extra", [["star"], ["star", "on", "a", "pink", "ring"]])
def test_a_prompt_too_long_names_the_words_beyond_the_limit(tiny: Denoiser, extra: list[str]) -> None:
    # 16 tokens, two of which begin and end the text.
    fits = "a red circle above a blue square on a gray background a red circle"
    assert len(fits.split()) == 14
    tiny.encode_prompts([fits])
    with pytest.raises(ValueError, match="would be cut") as caught:
        tiny.encode_prompts([" ".join([fits, *extra])])
    message = str(caught.value)
    assert f"the prompt has {14 + len(extra)} tokens and the model takes 14" in message
    assert f"{' '.join(extra)!r} would be cut" in message
