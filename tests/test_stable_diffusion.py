"""The adapter against diffusers' own pipelines, on the published topologies at an eighth of their width."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from marks import soak
from reduced import CLOSE, PROMPT, engine_and_pipeline_latents, pipeline_of, random_pipeline, reduced
from torch.testing import assert_close

from dfengine import Engine, Rise
from dfengine.models import adapt, load
from dfengine.models.loading import quiet


@pytest.mark.slow
@pytest.mark.parametrize(("name", "negative"), [("sd15", ""), ("sd21", "blurry"), soak("sdxl", "")])
def test_a_generation_matches_the_diffusers_pipeline(saved: Callable[[str], Path], name: str, negative: str) -> None:
    """A call of the pipeline with DDIM from the same noise; sd21 predicts v."""
    denoiser = load(saved(name), device="cpu")
    job, call = {"negative_prompt": negative}, {"negative_prompt": negative or None}
    ours, theirs = engine_and_pipeline_latents(denoiser, pipeline_of(saved(name)), PROMPT, job, call)
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.soak
def test_zero_terminal_snr_matches_the_diffusers_pipeline(tmp_path: Path) -> None:
    """From pure noise at ᾱ = 0, where x0 = −v."""
    changes = {"scheduler": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}}
    with quiet():
        random_pipeline(reduced("sd21", tmp_path / "configs", changes)).save_pretrained(tmp_path / "pipeline")
    denoiser = load(tmp_path / "pipeline", device="cpu")
    assert denoiser.schedule.timesteps("uniform", 4) == [999, 749, 499, 249]
    assert float(denoiser.schedule.alpha_bar[999]) == 0
    ours, theirs = engine_and_pipeline_latents(denoiser, pipeline_of(tmp_path / "pipeline"), PROMPT, {}, {})
    assert_close(ours, theirs, **CLOSE)
    maps = Engine(denoiser).explain(PROMPT, Rise(num_masks=4), num_steps=2).maps["rise"]
    assert torch.from_numpy(maps).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_img2img_and_inpaint_pipelines_are_the_same_model(saved: Callable[[str], Path], kind: Any) -> None:
    pipeline = pipeline_of(saved("sd15"))
    with quiet():
        other = kind(**pipeline.components, requires_safety_checker=False)
    denoiser, same = adapt(pipeline), adapt(other)
    x = torch.randn(1, *denoiser.latent_shape)
    with torch.no_grad():
        want, got = (each(x, torch.tensor([500]), each.encode_prompts([PROMPT])) for each in (denoiser, same))
    assert torch.equal(got, want)


# --- image sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", soak("sdxl")])
def test_images_of_another_shape_match_the_diffusers_pipeline(saved: Callable[[str], Path], name: str) -> None:
    denoiser = load(saved(name), device="cpu", image_size=(96, 64))
    assert (denoiser.latent_shape, denoiser.image_shape) == ((4, 12, 8), (96, 64))
    assert denoiser.name == f"{saved(name)} (96×64 pixels)"
    ours, theirs = engine_and_pipeline_latents(
        denoiser, pipeline_of(saved(name)), PROMPT, {}, {"height": 96, "width": 64}
    )
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.soak
def test_a_model_that_is_not_square_needs_no_size(tmp_path: Path) -> None:
    folder = reduced("sd15", tmp_path, {"unet": {"sample_size": [8, 12]}})
    denoiser = load(folder, device="cpu", random_weights=True)
    assert (denoiser.latent_shape, denoiser.image_shape) == ((4, 8, 12), (64, 96))
    pipeline = random_pipeline(folder)
    result = Engine(pipeline).explain(PROMPT, Rise(num_masks=4), num_steps=1)
    assert (result.maps["rise"].shape, result.image.shape) == ((1, 8, 12), (64, 96, 3))
    assert Engine(pipeline, image_size=(64, 96)).denoiser.name == Engine(pipeline).denoiser.name
    assert Engine(pipeline, image_size=(64, 64)).denoiser.latent_shape == (4, 8, 8)
    assert Engine(denoiser, image_size=(64, 96)).denoiser is denoiser
    with pytest.raises(ValueError, match=r"image size \(64, 64\) is not possible: the denoiser generates \(64, 96\)"):
        Engine(denoiser, image_size=(64, 64))


@pytest.mark.slow
def test_the_size_is_part_of_the_name_of_the_model() -> None:
    """It distinguishes files and items."""
    denoiser = Engine.from_pretrained("shapes", device="cpu", image_size=(64, 96)).denoiser
    assert (denoiser.name, denoiser.latent_shape[1:]) == ("shapes (64×96 pixels)", (16, 24))
    assert Engine.from_pretrained("shapes", device="cpu", image_size=(64, 64)).denoiser.name == "shapes"


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("size", [(100, 64), (0, 64), (64, -64)])
def test_impossible_sizes_are_refused(saved: Callable[[str], Path], size: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError,
        match=r"pixels are not possible: expected .* multiples of 8|expected a whole number",
    ):
        Engine(pipeline_of(saved("sd15")), image_size=size)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_networks_with_other_inputs_are_refused(tmp_path: Path) -> None:
    for entry, value, message in (
        ("in_channels", 9, "the UNet takes 9 channels but latents have 4: UNets for inpainting"),
        ("time_cond_proj_dim", 32, "conditioned on the guidance scale"),
    ):
        pipeline = random_pipeline(reduced("sd15", tmp_path / entry, {"unet": {entry: value}}))
        with pytest.raises(ValueError, match=message) as caught:
            adapt(pipeline)
        assert "\n" not in str(caught.value)
