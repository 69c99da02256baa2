"""The weights shipped with the package: plain diffusers loads them, and their images match the prompts."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dfengine import Engine
from dfengine.diffusion.trajectory import trajectories
from dfengine.shapes import FOLDER, GUIDANCE
from dfengine.shapes.judge import Judge
from dfengine.shapes.world import render, sample_scenes

CAPTION = "a red circle above a blue square on a gray background"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu", batch_size=24)


def test_the_folder_is_small_and_readable() -> None:
    files = [path for path in Path(FOLDER).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert all(path.stat().st_mode & 0o004 for path in files)


@pytest.mark.slow
def test_plain_diffusers_generates_the_same_image(engine: Engine) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    (ours,) = trajectories(engine.denoiser, [engine.job(CAPTION, seed=5, num_steps=10)])
    theirs = pipeline(
        CAPTION,
        num_inference_steps=10,
        guidance_scale=GUIDANCE,
        latents=ours.latents[:1],
        output_type="np",
    ).images[0]
    assert (ours.image.float() / 255 - torch.from_numpy(theirs)).abs().max() < 0.01


@pytest.mark.soak
def test_images_match_captions_held_out_of_training(engine: Engine) -> None:
    captions = sample_scenes(24, torch.Generator().manual_seed(99), held_out=True).captions
    jobs = [engine.job(str(caption), seed=seed, num_steps=20) for seed, caption in enumerate(captions)]
    images = torch.cat([torch.stack([path.image for path in trajectories(engine.denoiser, jobs)])])
    right = Judge.load().agrees(images.permute(0, 3, 1, 2) / 255, captions).all(1)
    # bench/shapes_model.py measures the rate; this is a lower bound with a margin for chance.
    assert right.float().mean() >= 0.6


@pytest.mark.slow
def test_the_judge_recognises_rendered_scenes() -> None:
    scenes = sample_scenes(300, torch.Generator().manual_seed(98), held_out=True)
    agrees = Judge.load().agrees(render(scenes)[0], scenes.captions)
    assert agrees.all(1).float().mean() > 0.97
    # The judge also disagrees: captions of other scenes are mostly wrong for an image.
    assert Judge.load().agrees(render(scenes)[0].roll(1, 0), scenes.captions).all(1).float().mean() < 0.05


@pytest.mark.slow
def test_the_autoencoder_preserves_a_scene(engine: Engine) -> None:
    images = render(sample_scenes(32, torch.Generator().manual_seed(97)))[0]
    with torch.no_grad():
        latents = engine.denoiser.encode(images)
        decoded = engine.denoiser.decode(latents)
    assert (decoded - images).square().mean() < 1e-3
    assert latents.mean().abs() < 0.1
    assert latents.std() == pytest.approx(1, abs=0.1)
