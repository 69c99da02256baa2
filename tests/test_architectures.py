"""The published architectures without their weights: their structure, and dfengine end to end on them."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import soak
from reduced import CLOSE, PROMPT, random_pipeline, reduced
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import dfengine
from dfengine import Engine, Rise
from dfengine.cli import main
from dfengine.models import adapt, architectures, load
from dfengine.models.architectures import ARCHITECTURES, build, configuration
from dfengine.models.loading import quiet
from dfengine.models.unet.stable_diffusion import StableDiffusion


@cache
def on_meta(name: str) -> Any:
    """An architecture at full size on the meta device, which allocates and computes nothing."""
    with quiet():
        return build(configuration(name), device=torch.device("meta"), dtype=torch.float16)


# --- the architectures ------------------------------------------------------------------------------------------------

#: Published parameter counts in millions, and GFLOP per forward.
PUBLISHED: dict[str, tuple[dict[str, float], float, int]] = {
    "sd15": ({"unet": 859.52, "vae": 83.65, "text_encoder": 123.06}, 803, 64),
    "sd21": ({"unet": 865.91, "vae": 83.65, "text_encoder": 340.39}, 2149, 96),
    "sdxl": ({"unet": 2567.46, "vae": 83.65, "text_encoder": 123.06, "text_encoder_2": 694.66}, 6761, 128),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", soak("sdxl")])
def test_architectures_match_the_published_ones(name: str) -> None:
    parameters, gigaflop, side = PUBLISHED[name]
    meta = torch.device("meta")
    denoiser = adapt(on_meta(name))
    assert isinstance(denoiser, StableDiffusion)
    for part, millions in parameters.items():
        weights = list(getattr(denoiser.pipeline, part).parameters())
        assert sum(weight.numel() for weight in weights) / 1e6 == pytest.approx(millions, abs=0.006), part
        assert {(weight.device, weight.dtype) for weight in weights} == {(meta, torch.float16)}
    assert (denoiser.latent_shape, denoiser.image_shape) == ((4, side, side), (8 * side, 8 * side))
    assert denoiser.schedule.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    assert denoiser.schedule.alpha_bar[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046601], rel=1e-4)
    condition = denoiser.encode_prompts([PROMPT])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, *denoiser.latent_shape, device=meta)
        assert denoiser.predict(x, torch.zeros(1, dtype=torch.int64, device=meta), condition).shape == x.shape
    assert counter.get_total_flops() / 1e9 == pytest.approx(gigaflop, abs=0.5)


@pytest.mark.slow
def test_weights_are_the_same_in_every_dtype_and_scaled_by_their_inputs(tmp_path: Path) -> None:
    folder = reduced("sd15", tmp_path)
    single, half, other = (
        random_pipeline(folder),
        random_pipeline(folder, torch.float16),
        random_pipeline(folder, seed=1),
    )
    for part in ("unet", "vae", "text_encoder"):
        others = getattr(other, part).state_dict()
        halves = getattr(half, part).state_dict()
        for name, weight in getattr(single, part).state_dict().items():
            assert torch.equal(halves[name], weight.half()), name
            if weight.ndim == 1:
                assert weight.unique().tolist() == [float(name.endswith("weight"))], name
                continue
            assert not torch.equal(others[name], weight), name
            # The mean square of n normal numbers lies within five standard deviations √(2/n) of 1.
            n = weight.numel()
            assert float(weight.square().sum()) / len(weight) == pytest.approx(1, abs=5 * (2 / n) ** 0.5), name
    first, second = (single.text_encoder.get_submodule(f"encoder.layers.{i}.mlp.fc1").weight for i in range(2))
    assert not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", soak("sd21"), soak("sdxl")])
def test_activations_stay_well_within_float16(saved: Callable[[str], Path], name: str) -> None:
    """Outputs of all layers, for noise and for latents ten times as large, compared to the maximum of 65504."""
    denoiser = load(saved(name), device="cpu")
    assert isinstance(denoiser, StableDiffusion)
    outputs: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            outputs.append(output)

    for network in (denoiser.unet, denoiser.vae):
        for module in network.modules():
            module.register_forward_hook(keep)
    x = torch.randn(2, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 10.0])[:, None, None, None]
    with torch.no_grad():
        epsilon = denoiser.predict(x, torch.tensor([999, 1]), denoiser.encode_prompts([PROMPT, ""]))
        denoiser.decode(x)
    assert 0.1 < float(epsilon.std()) < 10
    assert len(outputs) > 200
    assert max(float(output.abs().max()) for output in outputs) < 65504 / 32


@pytest.mark.slow
def test_half_and_single_precision_forwards_agree(tmp_path: Path) -> None:
    folder = reduced("sd15", tmp_path)
    epsilons = []
    for dtype in (torch.float32, torch.float16):
        denoiser = adapt(random_pipeline(folder, dtype))
        x = torch.randn(1, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            epsilons.append(denoiser(x, torch.tensor([500]), denoiser.encode_prompts([PROMPT])))
    # float16 keeps 11 bits, through some hundred layers.
    assert_close(epsilons[1], epsilons[0], rtol=0, atol=0.05)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tokenizer_has_the_token_ids_of_clip() -> None:
    pipeline = on_meta("sdxl")
    for tokenizer, pad in ((pipeline.tokenizer, 49407), (pipeline.tokenizer_2, 0)):
        assert len(tokenizer) == pipeline.text_encoder.config.vocab_size == 49408
        assert (tokenizer.model_max_length, tokenizer.pad_token_id) == (77, pad)
        tokens = tokenizer("A cat, \n红", padding="max_length").input_ids
        # "a" and "t" at the end of a word, "c" and "a" within one: CLIP numbers the bytes starting at "!".
        first, c_and_a, last = tokens[0], tokens[2:4], tokens[8:]
        assert (first, tokens[1]) == (49406, 256 + ord("a") - ord("!"))
        assert tokenizer.convert_ids_to_tokens(c_and_a) == ["ca", "t</w>"]
        assert tokenizer.convert_tokens_to_ids("!") == 0
        assert last == [49407] + [pad] * 68
        assert tokenizer.unk_token_id not in tokens[1:8]


@pytest.mark.slow
def test_a_prompt_too_long_and_a_vocabulary_too_small_are_refused(tmp_path: Path) -> None:
    denoiser = adapt(random_pipeline(reduced("sd21", tmp_path / "sd21")))
    denoiser.encode_prompts(["of " * 75])
    with pytest.raises(ValueError, match=r"the prompt has 76 tokens and the model takes 75: 'of ' would be cut"):
        denoiser.encode_prompts(["of " * 76])
    folder = reduced("sd15", tmp_path / "few", {"text_encoder": {"vocab_size": 513}})
    with pytest.raises(ValueError, match=r"could not be built: a vocabulary of 513 .* at least 514"):
        load(folder, device="cpu", random_weights=True)
    assert (
        len(random_pipeline(reduced("sd15", tmp_path / "least", {"text_encoder": {"vocab_size": 514}})).tokenizer)
        == 514
    )


# --- from end to end --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", soak("sd21"), soak("sdxl")])
def test_saved_and_built_pipelines_give_the_same_maps(saved: Callable[[str], Path], name: str) -> None:
    results = []
    for folder, random_weights in ((saved(name), False), (saved(name).parent / "configs", True)):
        engine = Engine.from_pretrained(folder, device="cpu", random_weights=random_weights, batch_size=4)
        # Of ε: where a mask hides the latent, the last step's x0 is flat, and its structure mostly rounding.
        results.append(engine.explain(PROMPT, Rise(num_masks=4, output="epsilon"), num_steps=2))
        assert results[-1].model == f"{folder}{' (random weights)' if random_weights else ''}"
    loaded, built = results
    side = loaded.latents.shape[-1]
    assert loaded.maps["rise"].shape == (2, side, side)
    assert loaded.image.shape == (8 * side, 8 * side, 3)
    assert loaded.image.std() > 5
    assert loaded.maps["rise"].std() > 0.01
    # The order of sums depends on the memory layout of the weights.
    for part in ("latents", "epsilon"):
        assert_close(getattr(loaded, part), getattr(built, part), **CLOSE)
    assert_close(loaded.maps["rise"], built.maps["rise"], rtol=0, atol=1e-3)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_without_weights_names_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is an architecture .* a hub id, or add --random-weights"):
        load(name, device="cpu")


@pytest.mark.parametrize("name", ["sd3", "shapes", "owner/name", "/no/such/folder"])
def test_random_weights_of_anything_else_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot have random weights: expected sd15, sd21, sdxl or a diff"):
        Engine.from_pretrained(name, device="cpu", random_weights=True)


@pytest.mark.parametrize("option", ["variant", "revision"])
def test_random_weights_have_no_variant(option: str) -> None:
    with pytest.raises(ValueError, match="no variant or revision: leave 'fp16' out"):
        load("sd15", device="cpu", random_weights=True, **{option: "fp16"})


def test_files_of_another_pipeline_are_a_one_line_error(tmp_path: Path) -> None:
    folder = reduced("sd15", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    for written, message in (
        (
            json.dumps(index | {"_class_name": "FluxPipeline"}),
            "FluxPipeline is not supported: expected one of .*StableDiffusionXLPipeline",
        ),
        (json.dumps(index | {"unet": ["diffusers", "Nothing"]}), r"could not be built: .*Nothing"),
        ("{", "could not be built: Expecting property name"),
        ("{}", r"could not be built: its model_index\.json names no pipeline class"),
    ):
        (folder / "model_index.json").write_text(written)
        with pytest.raises(ValueError, match=message) as caught:
            load(folder, device="cpu", random_weights=True)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_random_weights_and_image_size_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(architectures, "_CONFIGS", reduced("sd15", tmp_path / "sd15").parent)

    def run(*arguments: str) -> tuple[Any, str]:
        command = ["dfengine", "explain", PROMPT, "-o", str(tmp_path / "run.h5"), "--model", "sd15", *arguments]
        monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu", "--steps", "1", "--masks", "2"])
        with pytest.raises(SystemExit) as raised:
            main()
        return raised.value.code, capfd.readouterr().err

    code, errors = run("--random-weights", "--image-size", "64x96")
    assert code is None
    assert errors.startswith("dfengine: note: the sampler PNDMScheduler is replaced by deterministic")
    assert errors.count("\n") == 1
    with dfengine.open(tmp_path / "run.h5") as file:
        assert file.summary()["model"] == "sd15 (random weights) (64×96 pixels)"
        assert file[0].latents.shape == (1, 4, 8, 12)
    for size in ("64", "64x", "axb", "64x96x3", "-64x64", ""):
        code, errors = run("--random-weights", "--image-size", size)
        assert code == 2
        assert f"Invalid value for '--image-size': {size!r} is not understood" in errors
    (tmp_path / "run.h5").unlink()  # what is there is said first
    code, errors = run()
    assert code == 2
    assert errors.count("\n") == 1
    assert "add --random-weights" in errors
