"""The scheduler that a plain pipeline takes: the engine's own trajectories, saved, loaded, refused."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from reduced import both_ways
from torch import Tensor
from torch.testing import assert_close

from dfengine import Engine, ExponentialDDIMScheduler, exponential_timesteps
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import start_noise, trajectories
from dfengine.models import load
from dfengine.shapes import FOLDER

CAPTION = "a red circle above a blue square on a gray background"
#: float32 through a few forwards in batches of another size.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = StableDiffusionPipeline.from_pretrained(FOLDER)
    made.set_progress_bar_config(disable=True)
    return made


def called(pipeline: Any, **options: Any) -> tuple[list[Tensor], list[int]]:
    """The latents after every step of a pipeline's call, and its time-steps."""
    seen: list[Tensor] = []

    def keep(_: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"][0].clone())
        return {}

    pipeline(CAPTION, guidance_scale=3.0, output_type="latent", callback_on_step_end=keep, **options)
    return seen, pipeline.scheduler.timesteps.tolist()


@pytest.mark.parametrize(("stage", "gamma"), [("early", 60), ("latter", 60), ("latter", 0), ("uniform", 60)])
def test_a_plain_pipeline_walks_the_engines_trajectory(pipeline: Any, stage: str, gamma: float) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job(CAPTION, seed=3, num_steps=6, sampling=stage, gamma=gamma, guidance=3.0)
    (path,) = trajectories(engine.denoiser, [job])
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage=stage, gamma=gamma)
    latents = start_noise(3, engine.denoiser.latent_shape)[None]
    seen, timesteps = called(pipeline, latents=latents, num_inference_steps=6)
    assert tuple(timesteps) == job.timesteps
    assert_close(torch.stack(seen[:-1]), path.latents[1:], **CLOSE)
    image = engine.denoiser.decode(seen[-1][None])[0].permute(1, 2, 0)
    assert (image - path.image / 255).abs().max() < 0.01


def test_a_list_of_ones_own_is_taken_by_the_call(pipeline: Any) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    wanted = [990, 700, 650, 30, 3]
    (path,) = trajectories(engine.denoiser, [engine.job(CAPTION, seed=3, sampling=wanted, guidance=3.0)])
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config)
    seen, timesteps = called(pipeline, latents=path.latents[:1], timesteps=wanted)
    assert timesteps == wanted
    assert_close(torch.stack(seen[:-1]), path.latents[1:], **CLOSE)


@pytest.mark.parametrize("stage", ["early", "latter"])
def test_image_to_image_goes_on_from_the_middle_of_the_list(pipeline: Any, stage: str) -> None:
    """A given image is noised to the list's third entry and goes on from there, as the engine's own updates do."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser
    changer = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    changer.set_progress_bar_config(disable=True)
    changer.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage=stage, gamma=10)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    noise = torch.Generator().manual_seed(2)
    seen, _ = called(changer, image=image, num_inference_steps=8, strength=0.75, generator=noise)

    steps = exponential_timesteps(8, 10, stage)[2:]
    assert len(seen) == len(steps)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        posterior = denoiser.vae.encode(2 * image - 1).latent_dist  # type: ignore[attr-defined]
        clean = posterior.sample(generator) * denoiser.vae.config.scaling_factor  # type: ignore[attr-defined]
        drawn = torch.randn(clean.shape, generator=generator)
        schedule, prompts = denoiser.schedule, denoiser.encode_prompts([CAPTION])
        guided = GuidedDenoiser(denoiser, prompts, denoiser.encode_prompts([""]), "guided", torch.tensor([3.0]))
        x = schedule.add_noise(clean, drawn, torch.tensor(steps[:1]))
        for ours, (t, following) in zip(seen, itertools.pairwise([*steps, -1]), strict=True):
            x = schedule.step(guided(x, torch.tensor([t]), torch.tensor([0])), torch.tensor([following]))
            assert_close(ours[None], x, **CLOSE)


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_with_other_parametrisations(saved: Callable[[str], Path], name: str) -> None:
    """v-prediction, and two text encoders: the trajectory of plain uniform DDIM, and then of an early one."""
    from diffusers import DiffusionPipeline

    denoiser = load(saved(name), device="cpu")
    plain = DiffusionPipeline.from_pretrained(saved(name))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = ExponentialDDIMScheduler.from_config(plain.scheduler.config, stage="uniform")
    ours, theirs = both_ways(denoiser, plain, "a horse", {}, {})
    assert_close(ours, theirs, **CLOSE)


def test_it_is_saved_and_loaded_with_its_pipeline(pipeline: Any, tmp_path: Path) -> None:
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage="latter", gamma=10)
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is ExponentialDDIMScheduler
    assert (again.scheduler.config.stage, again.scheduler.config.gamma) == ("latter", 10)
    latents = start_noise(0, (4, 16, 16))[None]
    a, b = (called(one, latents=latents, num_inference_steps=4) for one in (pipeline, again))
    assert a[1] == b[1] == exponential_timesteps(4, 10, "latter")
    assert_close(a[0], b[0])
    changer = AutoPipelineForImage2Image.from_pipe(again)
    assert type(changer.scheduler) is ExponentialDDIMScheduler
    # The engine reads such a folder, too.
    assert load(tmp_path / "pipeline", device="cpu").schedule.num_train_timesteps == 1000


def test_it_comes_from_and_goes_back_to_other_schedulers(pipeline: Any) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    for other in (DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler):
        made = ExponentialDDIMScheduler.from_config(other(**config).config, stage="latter", gamma=3)
        assert_close(made.alphas_cumprod, other(**config).alphas_cumprod)
        assert other.from_config(made.config).config.beta_end == 0.012
    assert ExponentialDDIMScheduler.from_config(PNDMScheduler(**config).config).config.clip_sample is False
    clipping = DDIMScheduler(clip_sample=True, **config).config
    assert ExponentialDDIMScheduler.from_config(clipping).config.clip_sample is True


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_steps_are_diffusers_where_its_stride_is_right(eta: float, clipped: bool) -> None:
    config = {"clip_sample": True, "clip_sample_range": 0.7, "timestep_spacing": "leading", "num_train_timesteps": 100}
    ours, theirs = ExponentialDDIMScheduler(stage="uniform", **config), DDIMScheduler(**config)
    for one in (ours, theirs):
        one.set_timesteps(10)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    for t in ours.timesteps:
        sample, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(int(t)))
        a, b = (
            one.step(output, t, sample, eta, clipped, generator=torch.Generator().manual_seed(5))
            for one in (ours, theirs)
        )
        assert_close(a.prev_sample, b.prev_sample, rtol=1e-4, atol=1e-5)
        assert_close(a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-5)


def test_half_precision_stays_half_precision() -> None:
    scheduler = ExponentialDDIMScheduler()
    scheduler.set_timesteps(4)
    sample = torch.randn(1, 4, 8, 8, dtype=torch.float16)
    stepped, x0 = scheduler.step(sample, scheduler.timesteps[0], sample, return_dict=False)
    assert stepped.dtype == x0.dtype == torch.float16


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: ExponentialDDIMScheduler(stage="middle"), "'middle' is not known"),
        (lambda: ExponentialDDIMScheduler(gamma=-1), "gamma -1 is not possible"),
        (lambda: ExponentialDDIMScheduler().set_timesteps(1001), "1001 steps are more than the 1000"),
        (lambda: ExponentialDDIMScheduler().set_timesteps(timesteps=[3, 5]), "must decrease strictly"),
        (lambda: ExponentialDDIMScheduler().set_timesteps(0), "0 steps are not possible"),
        (lambda: ExponentialDDIMScheduler().set_timesteps(), "ambiguous: give either num_inference_steps or timesteps"),
        (lambda: ExponentialDDIMScheduler().set_timesteps(5, timesteps=[9, 3]), "ambiguous"),
    ],
)
def test_what_is_not_possible(act: Callable[[], Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        act()


def test_a_step_beside_the_list_is_refused() -> None:
    scheduler = ExponentialDDIMScheduler()
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="time-step 999 is not in the list"):
        scheduler.step(sample, 999, sample)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="time-step 3 is not in the list"):
        scheduler.step(sample, 3, sample)
