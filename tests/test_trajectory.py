"""The sampling loop, against the diffusers pipeline and the formulas."""

import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import Analytic
from conftest import CAPTIONS
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.testing import assert_close

from dfengine import Engine
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.path import exponential_timesteps
from dfengine.diffusion.trajectory import Trajectory, check_image, start_noise, to_bytes, trajectories

# float32 through a small network with sums in another order, times 1/√ᾱ ≤ 15 at the first step.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LEADING = (751, 501, 251, 1)


def run_pipeline(folder: Path, prompt: str, *, seed: int, **options: Any) -> tuple[list[Tensor], Tensor]:
    """diffusers' latents after each of 4 steps, and its image [H, W, 3] in [0, 1]."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latents: list[Tensor] = []

    def keep(_: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"][0])
        return {}

    noise = start_noise(seed, (4, 8, 8))[None]
    image = pipeline(
        prompt, latents=noise, num_inference_steps=4, output_type="pt", callback_on_step_end=keep, **options
    ).images[0]
    return latents, image.permute(1, 2, 0)


def final_latent(denoiser: Denoiser, trajectory: Trajectory) -> Tensor:
    """The latent after the last step."""
    final = denoiser.schedule.final_alpha_bar
    return math.sqrt(final) * trajectory.x0[-1] + math.sqrt(1 - final) * trajectory.epsilon[-1]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"guidance": 3.0}, {"guidance_scale": 3.0}),
        (
            {"guidance": 3.0, "negative_prompt": CAPTIONS[1]},
            {"guidance_scale": 3.0, "negative_prompt": CAPTIONS[1]},
        ),
        # diffusers applies guidance only above 1; at 1 and below it runs the conditional forward only.
        ({"guidance": 1.0}, {"guidance_scale": 1.0}),
        ({"guidance": 0.0}, {"guidance_scale": 0.0}),
    ],
)
def test_a_generation_matches_the_diffusers_pipeline(
    tiny: Denoiser, tiny_folder: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    assert tiny.schedule.timesteps("uniform", 4) == list(LEADING)
    latents, image = run_pipeline(tiny_folder, CAPTIONS[0], seed=5, **theirs)
    (trajectory,) = trajectories(tiny, [Job(CAPTIONS[0], LEADING, seed=5, **ours)])
    assert_close(trajectory.latents[0], start_noise(5, (4, 8, 8)), rtol=0, atol=0)
    assert_close(torch.stack([*trajectory.latents[1:], final_latent(tiny, trajectory)]), torch.stack(latents), **CLOSE)
    # Half a level of rounding to bytes.
    assert_close(trajectory.image.float() / 255, image, rtol=0, atol=0.5 / 255 + 1e-4)


def jobs_of_every_kind() -> list[Job]:
    """Jobs with different prompts, seeds, guidance, negative prompts and time-steps, and one with a given image."""
    image = torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return [
        Job(CAPTIONS[0], LEADING, seed=1, guidance=3.0),
        Job(CAPTIONS[1], tuple(exponential_timesteps(4, 60.0, "latter")), seed=2, negative_prompt="a red circle"),
        Job("", (900, 600, 300, 7), seed=3, image=image),
    ]


@pytest.mark.slow
def test_a_batch_equals_its_jobs_run_separately(tiny: Denoiser) -> None:
    jobs = jobs_of_every_kind()
    for job, together in zip(jobs, trajectories(tiny, jobs), strict=True):
        (single,) = trajectories(tiny, [job])
        assert together.job is job
        assert_close(together.latents[0], single.latents[0], rtol=0, atol=0)
        for name in ("latents", "epsilon", "x0", "signal", "noise"):
            assert_close(getattr(together, name), getattr(single, name), **CLOSE)
        assert_close(together.image.int(), single.image.int(), rtol=0, atol=1)
        for name in ("prompt", "negative"):
            assert len(getattr(together, name)) == 1
            assert_close(getattr(together, name).tensors["text"], getattr(single, name).tensors["text"], **CLOSE)


def test_stored_latents_follow_the_ddim_recursion(tiny: Denoiser) -> None:
    """x_next = √ᾱ_next x0 + √(1 − ᾱ_next) ε and x = √ᾱ x0 + √(1 − ᾱ) ε, at the list's own entries."""
    for job, trajectory in zip(jobs_of_every_kind()[:2], trajectories(tiny, jobs_of_every_kind())[:2], strict=True):
        assert len(trajectory) == 4
        assert_close(trajectory.signal.double() ** 2, tiny.schedule.alpha_bar[list(job.timesteps)], rtol=1e-6, atol=0)
        table = trajectory.signal[:, None, None, None] ** 2
        latents, x0, epsilon = trajectory.latents, trajectory.x0, trajectory.epsilon
        assert_close(latents, table.sqrt() * x0 + (1 - table).sqrt() * epsilon, **CLOSE)
        for i, j in pairwise(range(4)):
            assert_close(latents[j], table[j].sqrt() * x0[i] + (1 - table[j]).sqrt() * epsilon[i], **CLOSE)
        image = to_bytes(tiny.decode(final_latent(tiny, trajectory)[None]))[0]
        assert_close(trajectory.image.int(), image.int(), rtol=0, atol=1)


def test_the_last_step_leads_to_the_final_noise_level_and_not_to_time_step_0(tiny_folder: Path) -> None:
    """The noise of time-step 0 is large here, and that after the last step is zero."""
    scheduler = DDIMScheduler(beta_start=0.3, beta_end=0.4, clip_sample=False, steps_offset=1)
    engine = Engine(StableDiffusionPipeline.from_pretrained(tiny_folder, scheduler=scheduler))
    (trajectory,) = trajectories(engine.denoiser, [engine.job(CAPTIONS[0], sampling=[4, 2, 0])])
    assert engine.denoiser.schedule.final_alpha_bar == 1
    image = to_bytes(engine.denoiser.decode(final_latent(engine.denoiser, trajectory)[None]))[0]
    assert_close(trajectory.image.int(), image.int(), rtol=0, atol=1)


def test_a_given_image_is_noised_to_each_step_with_the_same_noise(tiny: Denoiser) -> None:
    jobs = jobs_of_every_kind()
    trajectory = trajectories(tiny, jobs)[2]
    image = jobs[2].image
    assert image is not None
    assert trajectory.image is image
    with torch.no_grad():
        clean = tiny.encode(image.permute(2, 0, 1)[None] / 255)[0]
    noise = start_noise(3, (4, 8, 8))
    for x, t in zip(trajectory.latents, jobs[2].timesteps, strict=True):
        level = tiny.schedule.alpha_bar[t].item()
        assert_close(x, math.sqrt(level) * clean + math.sqrt(1 - level) * noise, **CLOSE)


def test_start_noise_is_determined_by_the_seed() -> None:
    assert_close(start_noise(7, (2, 3, 4)), start_noise(7, (2, 3, 4)), rtol=0, atol=0)
    assert not torch.equal(start_noise(7, (2, 3, 4)), start_noise(8, (2, 3, 4)))
    # torch's CPU generator: if it ever changed, stored seeds would give other images.
    assert_close(start_noise(0, (1, 1, 3)), torch.tensor([[[1.5410, -0.2934, -2.1788]]]), rtol=0, atol=1e-4)


def test_clipped_predictions_are_stored() -> None:
    denoiser = Analytic(lambda x, number: torch.zeros_like(x))
    denoiser.schedule = replace(denoiser.schedule, clip_range=0.5)
    (trajectory,) = trajectories(denoiser, [Job("1", (500, 20))])
    assert trajectory.x0.abs().max() == 0.5
    signal = trajectory.signal[1]
    assert_close(trajectory.latents[1], signal * trajectory.x0[0], rtol=1e-6, atol=1e-6)


def test_jobs_of_different_lengths_do_not_share_a_batch() -> None:
    denoiser = Analytic(lambda x, number: x)
    with pytest.raises(ValueError, match="equally many steps"):
        trajectories(denoiser, [Job("1", (9, 5)), Job("1", (9,))])


def test_an_image_of_another_size_is_refused(tiny: Denoiser) -> None:
    image = torch.zeros(16, 20, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape("(16, 20, 3)") + ".*" + re.escape("(16, 16, 3): resize it")):
        trajectories(tiny, [Job("", LEADING, image=image)])
    with pytest.raises(ValueError, match=re.escape("torch.float32 (16, 16, 3)")):
        check_image(tiny, torch.zeros(16, 16, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"guidance": math.inf}, "guidance inf"),
    ],
)
def test_impossible_jobs_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Job(**({"prompt": "a red circle", "timesteps": (1,)} | options))


def test_items_do_not_share_masks() -> None:
    jobs = [Job(prompt, (1,), seed=seed) for prompt in ("1", "2", "11") for seed in (0, 1, 11)]
    seeds = {job.mask_seed for job in jobs}
    assert len(seeds) == len(jobs)
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


def test_bytes_are_rounded_and_clamped() -> None:
    image = torch.tensor([-0.2, 0.0, 0.5, 1.0, 1.3, 100.4 / 255]).expand(1, 3, 1, 6)
    assert to_bytes(image)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 100]


def test_steps_to_explain_must_be_in_the_list() -> None:
    denoiser = Analytic(lambda x, number: x, shape=(1, 2, 2))
    path = denoiser.trajectory(torch.zeros(3, 1, 2, 2))
    assert list(path.steps) == [0, 1, 2]
    assert list(replace(path, explain_steps=[2, 0]).steps) == [2, 0]
    for outside in (-1, 3):
        with pytest.raises(ValueError, match=rf"step {outside} is outside \[0, 2\]"):
            replace(path, explain_steps=(outside,))
