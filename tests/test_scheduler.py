"""The noise schedules read from diffusers' schedulers, and the exponential scheduler that a plain pipeline takes."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.configuration_utils import FrozenDict
from marks import soak
from reduced import engine_and_pipeline_latents
from torch import Tensor
from torch.testing import assert_close

from dfengine import Engine, ExponentialDDIMScheduler, exponential_timesteps
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import start_noise, trajectories
from dfengine.models import load
from dfengine.models.scheduler import noise_schedule
from dfengine.shapes import FOLDER

CAPTION = "a red circle above a blue square on a gray background"
#: float32 through a few forwards in batches of another size.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline: Any, **options: Any) -> tuple[list[Tensor], list[int]]:
    """The latents after every step of a pipeline's call, and its time-steps."""
    latents_after: list[Tensor] = []

    def keep(_: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents_after.append(values["latents"][0].clone())
        return {}

    pipeline(CAPTION, guidance_scale=3.0, output_type="latent", callback_on_step_end=keep, **options)
    return latents_after, pipeline.scheduler.timesteps.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "gamma"), [("early", 60), ("latter", 60), ("latter", 0), ("uniform", 60)])
def test_a_plain_pipeline_follows_the_engines_trajectory(pipeline: Any, stage: str, gamma: float) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job(CAPTION, seed=3, num_steps=6, sampling=stage, gamma=gamma, guidance=3.0)
    (path,) = trajectories(engine.denoiser, [job])
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage=stage, gamma=gamma)
    latents = start_noise(3, engine.denoiser.latent_shape)[None]
    latents_after, timesteps = run_pipeline(pipeline, latents=latents, num_inference_steps=6)
    assert tuple(timesteps) == job.timesteps
    assert_close(torch.stack(latents_after[:-1]), path.latents[1:], **CLOSE)
    image = engine.denoiser.decode(latents_after[-1][None])[0].permute(1, 2, 0)
    assert (image - path.image / 255).abs().max() < 0.01


@pytest.mark.slow
def test_the_call_accepts_a_custom_list(pipeline: Any) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    requested = [990, 700, 650, 30, 3]
    (path,) = trajectories(engine.denoiser, [engine.job(CAPTION, seed=3, sampling=requested, guidance=3.0)])
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config)
    latents_after, timesteps = run_pipeline(pipeline, latents=path.latents[:1], timesteps=requested)
    assert timesteps == requested
    assert_close(torch.stack(latents_after[:-1]), path.latents[1:], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["early", "latter"])
def test_image_to_image_continues_from_the_middle_of_the_list(pipeline: Any, stage: str) -> None:
    """A given image is noised to the third entry of the list and denoised from there, like the engine's updates."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser
    changer = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    changer.set_progress_bar_config(disable=True)
    changer.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage=stage, gamma=10)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    latents_after, _ = run_pipeline(changer, image=image, num_inference_steps=8, strength=0.75, generator=generator)

    steps = exponential_timesteps(8, 10, stage)[2:]
    assert len(latents_after) == len(steps)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        posterior = denoiser.vae.encode(2 * image - 1).latent_dist  # type: ignore[attr-defined]
        clean = posterior.sample(generator) * denoiser.vae.config.scaling_factor  # type: ignore[attr-defined]
        noise = torch.randn(clean.shape, generator=generator)
        schedule, prompts = denoiser.schedule, denoiser.encode_prompts([CAPTION])
        guided = GuidedDenoiser(denoiser, prompts, denoiser.encode_prompts([""]), "guided", [3.0])
        x = schedule.add_noise(clean, noise, torch.tensor(steps[:1]))
        for ours, (t, following) in zip(latents_after, itertools.pairwise([*steps, -1]), strict=True):
            x = schedule.step(guided(x, torch.tensor([t]), torch.tensor([0])), torch.tensor([following]))
            assert_close(ours[None], x, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21", soak("sdxl")])
def test_other_parametrisations(saved: Callable[[str], Path], name: str) -> None:
    """v-prediction and two text encoders: the trajectory of plain uniform DDIM, then that of an early schedule."""
    from diffusers import DiffusionPipeline

    denoiser = load(saved(name), device="cpu")
    plain = DiffusionPipeline.from_pretrained(saved(name))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = ExponentialDDIMScheduler.from_config(plain.scheduler.config, stage="uniform")
    ours, theirs = engine_and_pipeline_latents(denoiser, plain, "a horse", {}, {})
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.slow
def test_the_scheduler_is_saved_and_loaded_with_its_pipeline(pipeline: Any, tmp_path: Path) -> None:
    pipeline.scheduler = ExponentialDDIMScheduler.from_config(pipeline.scheduler.config, stage="latter", gamma=10)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ExponentialDDIMScheduler
    assert (loaded.scheduler.config.stage, loaded.scheduler.config.gamma) == ("latter", 10)
    latents = start_noise(0, (4, 16, 16))[None]
    a, b = (run_pipeline(one, latents=latents, num_inference_steps=4) for one in (pipeline, loaded))
    assert a[1] == b[1] == exponential_timesteps(4, 10, "latter")
    assert_close(a[0], b[0])
    changer = AutoPipelineForImage2Image.from_pipe(loaded)
    assert type(changer.scheduler) is ExponentialDDIMScheduler
    # The engine reads such a folder, too.
    assert load(tmp_path / "pipeline", device="cpu").schedule.num_train_timesteps == 1000


def test_the_scheduler_converts_from_and_to_other_schedulers(pipeline: Any) -> None:
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    for other in (DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler):
        scheduler = ExponentialDDIMScheduler.from_config(other(**config).config, stage="latter", gamma=3)
        assert_close(scheduler.alphas_cumprod, other(**config).alphas_cumprod)
        assert other.from_config(scheduler.config).config.beta_end == 0.012
    assert ExponentialDDIMScheduler.from_config(PNDMScheduler(**config).config).config.clip_sample is False
    assert ExponentialDDIMScheduler.from_config(DDIMScheduler(**config).config).config.clip_sample is True  # by default
    clipping = DDIMScheduler(clip_sample=True, **config).config
    assert ExponentialDDIMScheduler.from_config(clipping).config.clip_sample is True


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
def test_steps_match_diffusers_where_its_stride_is_right(eta: float, clipped: bool) -> None:
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
    ("act", "message"),
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
def test_invalid_settings_are_refused(act: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        act()


def test_a_step_outside_the_list_is_refused() -> None:
    scheduler = ExponentialDDIMScheduler()
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="time-step 999 is not in the list"):
        scheduler.step(sample, 999, sample)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="time-step 3 is not in the list"):
        scheduler.step(sample, 3, sample)


def test_fractional_time_steps_are_stepped_like_any_others() -> None:
    scheduler = ExponentialDDIMScheduler()
    scheduler.set_timesteps(timesteps=[900.5, 100.25])
    sample, output = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    schedule = noise_schedule(scheduler)
    for t, t_next in ((900.5, 100.25), (100.25, -1.0)):
        prediction = schedule.to_x0_and_eps(output, sample, torch.full((2,), t))
        expected = schedule.step(prediction, torch.full((2,), t_next))
        assert_close(scheduler.step(output, torch.tensor(t), sample).prev_sample, expected)


def test_a_configuration_replaced_after_construction_applies() -> None:
    """Pipelines do this for the configuration of outdated models."""
    scheduler = ExponentialDDIMScheduler(clip_sample=True, stage="uniform")
    scheduler._internal_dict = FrozenDict({**scheduler.config, "clip_sample": False, "steps_offset": 1})
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]
    sample = torch.full((1, 1, 2, 2), 100.0)
    assert scheduler.step(torch.zeros_like(sample), 751, sample).pred_original_sample.min() > 100


# --- the schedules read from diffusers' schedulers -------------------------------------------------------------------

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
#: Warnings of diffusers under NumPy 2, in constructors and set_timesteps.
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")


def scheduler_of(name: str, **config: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler")(**config)


@NUMPY_2
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIM", SD | {"steps_offset": 1}),
        ("PNDM", SD | {"steps_offset": 1, "skip_prk_steps": True}),
        ("EulerDiscrete", SD | {"timestep_spacing": "leading", "steps_offset": 1}),
        ("EulerDiscrete", SD | {"timestep_spacing": "linspace"}),
        ("EulerDiscrete", SD | {"timestep_spacing": "trailing"}),
        ("EulerDiscrete", SD | {"use_karras_sigmas": True}),
        ("EulerAncestralDiscrete", SD),
        ("DPMSolverMultistep", SD),
        ("DPMSolverMultistep", SD | {"use_karras_sigmas": True}),
        ("DPMSolverMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
        ("UniPCMultistep", SD),
        ("UniPCMultistep", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}),
        ("DEISMultistep", SD),
        ("LCM", SD),
        ("HeunDiscrete", SD | {"use_karras_sigmas": True}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
        ("FlowMatchEulerDiscrete", {"shift": 1.0, "use_karras_sigmas": True}),
        ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 12])
def test_uniform_lists_match_those_of_the_scheduler(name: str, config: dict[str, Any], num_steps: int) -> None:
    scheduler = scheduler_of(name, **config)
    schedule = noise_schedule(scheduler)
    scheduler.set_timesteps(num_steps)
    visited = scheduler.timesteps.tolist()
    distinct = [t for i, t in enumerate(visited) if t not in visited[:i]]
    assert schedule.timesteps("uniform", num_steps) == distinct
    assert len(distinct) == num_steps
    assert schedule.is_flow == ("Flow" in name or "use_flow_sigmas" in config)


@pytest.mark.slow
@NUMPY_2
def test_evaluations_between_two_steps_are_not_steps() -> None:
    """The midpoints of a second-order sampler, and PNDM's Runge-Kutta warm-up."""
    schedule = noise_schedule(scheduler_of("KDPM2Discrete", **SD))
    assert schedule.timesteps("uniform", 5) == [999, 749.25, 499.5, 249.75, 0]
    schedule = noise_schedule(scheduler_of("PNDM", **SD, skip_prk_steps=False))
    assert schedule.timesteps("uniform", 5) == [800, 600, 400, 200, 0]


@NUMPY_2
def test_time_steps_that_a_scheduler_rounds_together_are_visited_once() -> None:
    scheduler = scheduler_of("DPMSolverMultistep", **SD, use_karras_sigmas=True)
    steps = noise_schedule(scheduler).timesteps("uniform", 50)
    scheduler.set_timesteps(50)
    assert len(steps) < 50
    assert steps == sorted(set(scheduler.timesteps.tolist()), reverse=True)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "FlowMatchLCM"])
def test_dynamic_shifting_is_refused_only_for_the_uniform_list(name: str) -> None:
    schedule = noise_schedule(scheduler_of(name, use_dynamic_shifting=True))
    with pytest.raises(ValueError, match=f"{name}Scheduler depend on the image size .use_dynamic_shifting needs mu"):
        schedule.timesteps("uniform", 4)
    assert schedule.timesteps("early", 4, 0) == [999.0, 995.0, 969.0, 823.0]


@NUMPY_2
@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("EDMEuler", {}, "EDMEulerScheduler is not supported"),
        ("EDMDPMSolverMultistep", {}, "EDMDPMSolverMultistepScheduler is not supported"),
        ("CMStochasticIterative", {}, "CMStochasticIterativeScheduler is not supported"),
        ("ScoreSdeVe", {}, "ScoreSdeVeScheduler is not supported"),
        ("EulerDiscrete", {"timestep_type": "continuous"}, r"EulerDiscreteScheduler \(continuous time\) is not supp"),
        ("CogVideoXDDIM", {}, "CogVideoXDDIMScheduler is not supported: its noise levels are not those of its beta_s"),
    ],
)
def test_other_processes_are_refused_by_name(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_schedule(scheduler_of(name, **config))


@NUMPY_2
@pytest.mark.parametrize(("config", "final"), [({}, 1.0), ({"final_sigmas_type": "sigma_min"}, 1 - 0.00085)])
def test_the_last_step_ends_at_the_configured_final_value(config: dict[str, Any], final: float) -> None:
    schedule = noise_schedule(DPMSolverMultistepScheduler(**SD, **config))
    a, b = schedule.coefficients(torch.tensor([-1]))
    assert (a.item(), b.item()) == pytest.approx((final**0.5, (1 - final) ** 0.5), abs=1e-6)


@NUMPY_2
@pytest.mark.parametrize("num_steps", [5, 20])
def test_noise_over_signal_equals_the_schedulers_sigma_at_fractional_time_steps(num_steps: int) -> None:
    scheduler = EulerDiscreteScheduler(**SD, use_karras_sigmas=True)
    schedule = noise_schedule(scheduler)
    scheduler.set_timesteps(num_steps)
    steps = torch.tensor(schedule.timesteps("uniform", num_steps))
    assert (steps != steps.round()).sum() > num_steps / 2
    a, b = schedule.coefficients(steps)
    # float32 ᾱ in diffusers: 2e-5 relative.
    assert_close((b / a).flatten(), scheduler.sigmas[:-1], rtol=1e-4, atol=1e-4)
    assert_close(a**2 + b**2, torch.ones_like(a))


# --- flow matching ---------------------------------------------------------------------------------------------------


def test_the_path_of_flow_matching_is_straight() -> None:
    schedule = noise_schedule(FlowMatchEulerDiscreteScheduler())
    a, b = schedule.coefficients(torch.tensor([1000.0, 750.0, 1.0, 0.0, -1.0]))
    assert_close(a.flatten(), torch.tensor([0.0, 0.25, 0.999, 1.0, 1.0]))
    assert_close(b.flatten(), torch.tensor([1.0, 0.75, 0.001, 0.0, 0.0]))
    assert schedule.prediction_type == "flow_prediction"
    assert schedule.num_train_timesteps == 1000


def test_a_flow_prediction_is_converted_exactly() -> None:
    """n − x0 at (1 − σ)·x0 + σ·n, from pure noise to almost none, in numbers that float32 holds exactly."""
    schedule = noise_schedule(FlowMatchEulerDiscreteScheduler())
    clean, noise = torch.randint(-64, 64, (2, 4, 3, 2, 2), generator=torch.Generator().manual_seed(0)) / 16
    steps = torch.tensor([1000.0, 750.0, 500.0, 125.0])
    x0, epsilon = schedule.to_x0_and_eps(noise - clean, schedule.add_noise(clean, noise, steps), steps)
    assert_close((x0, epsilon), (clean, noise), rtol=0, atol=0)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"shift": 1.0}, {"shift": 1.5, "use_beta_sigmas": True}])
def test_flow_steps_match_diffusers_euler(config: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    schedule = noise_schedule(scheduler)
    steps = schedule.timesteps("uniform", 9)
    scheduler.set_timesteps(9)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, t_next in itertools.pairwise([*steps, -1.0]):
        output = torch.sin(3 * ours.flip(-1) + t / 100)
        prediction = schedule.to_x0_and_eps(output, ours, torch.full((2,), t))
        ours = schedule.step(prediction, torch.full((2,), t_next))
        theirs = scheduler.step(output, torch.tensor(t), theirs).prev_sample
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# --- complete trajectories -------------------------------------------------------------------------------------------


def unet_times(pipeline: Any) -> list[float]:
    """A list to which every forward of the pipeline's UNet appends the time-step of its first latent."""
    times: list[float] = []

    def record(_: Any, args: tuple[Any, ...]) -> None:
        times.append(args[1].flatten()[0].item())

    pipeline.unet.register_forward_pre_hook(record)
    return times


@pytest.mark.slow
@NUMPY_2
def test_a_karras_trajectory_matches_the_pipeline(tiny_folder: Path) -> None:
    """Euler's x at σ is ours divided by a; "leading" starts it from √(σ² + 1) times the same noise."""
    config = SD | {"use_karras_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, scheduler=EulerDiscreteScheduler(**config))
    pipeline.set_progress_bar_config(disable=True)
    engine = Engine(pipeline)
    job = engine.job(CAPTION, seed=3, num_steps=6, guidance=3.0)
    (cached,) = trajectories(engine.denoiser, [job])
    times = unet_times(pipeline)  # the hook forces the forward of diffusers
    (trajectory,) = trajectories(engine.denoiser, [job])
    assert_close(trajectory.latents, cached.latents, **CLOSE)
    ours = sorted(set(times), reverse=True)
    latents, timesteps = run_pipeline(pipeline, latents=trajectory.latents[:1].clone(), num_inference_steps=6)
    assert ours == list(job.timesteps) == timesteps
    assert sum(t != round(t) for t in ours) >= 4
    assert_close(trajectory.latents[1:], torch.stack(latents[:-1]) * trajectory.signal[1:, None, None, None], **CLOSE)
    image = engine.denoiser.decode(latents[-1][None])[0].permute(1, 2, 0) * 255
    assert (image - trajectory.image).abs().max() <= 1


@pytest.mark.slow
@NUMPY_2
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("HeunDiscrete", SD | {"steps_offset": 1}),
        ("DPMSolverMultistep", SD | {"use_karras_sigmas": True, "steps_offset": 1}),
        ("LCM", SD | {"steps_offset": 1}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ],
)
def test_trajectories_reach_the_end_of_any_schedulers_list(
    tiny_folder: Path, name: str, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = scheduler_of(name, **config)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, scheduler=scheduler)
    with caplog.at_level(logging.INFO, "dfengine"):
        engine = Engine(pipeline)
        jobs = [engine.job(CAPTION, seed=seed, num_steps=30) for seed in (0, 1)]
        both = trajectories(engine.denoiser, jobs)
    assert all(len(trajectory) == len(jobs[0].timesteps) > 15 for trajectory in both)
    assert all(trajectory.latents.isfinite().all() for trajectory in both)
    replaced = [message for message in caplog.messages if "is replaced by" in message]
    expected = f"the sampler {name}Scheduler is replaced by deterministic first-order steps on its own list"
    assert [message.startswith(expected) for message in replaced] == [True] * (name != "FlowMatchEulerDiscrete")


def test_a_subclass_of_a_scheduler_is_what_its_base_is() -> None:
    class Mine(DDIMScheduler):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)

    assert noise_schedule(Mine(**SD)).fingerprint() == noise_schedule(DDIMScheduler(**SD)).fingerprint()
