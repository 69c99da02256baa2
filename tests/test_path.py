"""Noise schedules, lists of time-steps and the DDIM update, against diffusers' schedulers and exact arithmetic."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from dfengine.diffusion.path import NoiseSchedule, exponential_timesteps, schedule_name
from dfengine.models.scheduler import noise_schedule

STAGES = st.sampled_from(["early", "latter"])

# diffusers multiplies up to 1000 factors in float32, each with an error of 6e-8.
TABLE = {"rtol": 2e-5, "atol": 1e-8}
# float32 ᾱ against float64 ᾱ, over a dozen steps: measured 2e-5 at most.
STEPS = {"rtol": 1e-4, "atol": 1e-4}

#: T = 1000, l = 30, γ = 60, as SPEC §4 prints them.
EARLY = (
    "999 893 884 875 865 854 842 829 816 801 785 768 749 729 708 684 659 632 602 571 "
    "536 499 459 416 370 319 265 206 143 74"
)
LATTER = (
    "999 926 857 794 735 681 630 584 541 501 464 429 398 368 341 316 292 271 251 232 "
    "215 199 184 171 158 146 135 125 116 107"
)

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def outputs(x: Tensor, t: int) -> Tensor:
    """A stand-in for a network's output: any smooth function of the latent and the time-step."""
    return torch.sin(3 * x.flip(-1) + t / 100) + 0.3 * x.roll(1, 1)


def follow(schedule: NoiseSchedule, x: Tensor, steps: list[int]) -> list[Tensor]:
    """The latents after each step of our own update."""
    latents = []
    for t, following in pairwise([*steps, -1]):
        here = torch.full((len(x),), t)
        x = schedule.step(schedule.to_x0_and_eps(outputs(x, t), x, here), torch.full((len(x),), following))
        latents.append(x)
    return latents


def follow_peer(scheduler: Any, x: Tensor, steps: list[int]) -> list[Tensor]:
    """The latents after each step of a diffusers scheduler whose time-steps are already set."""
    latents = []
    for t in steps:
        x = scheduler.step(outputs(x, t), t, x).prev_sample
        latents.append(x)
    return latents


def start() -> Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))


# --- exponential lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "printed"), [("early", EARLY), ("latter", LATTER)])
def test_exponential_lists_match_the_printed_ones(stage: str, printed: str) -> None:
    assert exponential_timesteps(30, 60.0, stage) == [int(t) for t in printed.split()]


def test_exact_powers_are_not_rounded_down() -> None:
    assert exponential_timesteps(3, 0.0, "latter") == [999, 100, 10]
    assert exponential_timesteps(3, 0.0, "early") == [999, 990, 900]
    assert exponential_timesteps(10, 0.0, "latter", 1024) == [1023, 512, 256, 128, 64, 32, 16, 8, 4, 2]
    assert exponential_timesteps(30, 10.0, "latter")[-1] == 6


@pytest.mark.parametrize("stage", ["early", "latter"])
def test_repeats_are_spread(stage: str) -> None:
    assert exponential_timesteps(7, 3.0, stage, 7) == [6, 5, 4, 3, 2, 1, 0]
    # δ = 2^(1/2): powers 1 2 2 4 4 5 8 of T = 8 at γ = 0, l = 6.
    assert exponential_timesteps(1, 0.0, stage, 8) == [7]
    assert exponential_timesteps(6, 0.0, "latter", 8) == [7, 5, 4, 2, 1, 0]
    assert exponential_timesteps(6, 0.0, "early", 8) == [7, 6, 5, 4, 3, 2]


@pytest.mark.slow
@given(total=st.integers(1, 600), gamma=st.floats(0, 1e6), stage=STAGES, data=st.data())
def test_exponential_lists_fall_strictly_inside(total: int, gamma: float, stage: str, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, total))
    steps = exponential_timesteps(num_steps, gamma, stage, total)
    assert len(steps) == num_steps
    assert steps[0] == total - 1
    assert steps[-1] >= 0
    assert all(later < earlier for earlier, later in pairwise(steps))


@given(num_steps=st.integers(1, 40), gamma=st.integers(0, 60), stage=STAGES, total=st.integers(40, 1200))
def test_exponential_lists_are_the_floors_of_exact_powers(num_steps: int, gamma: int, stage: str, total: int) -> None:
    """Where no floor repeats, in integers: k = ⌊T^(p/q)⌋ iff k^q ≤ T^p < (k + 1)^q."""
    q = num_steps + gamma
    powers = [_floor_root(total ** (i + gamma), q) for i in range(1, num_steps)]
    steps = [total - 1] + ([total - k for k in powers] if stage == "early" else powers[::-1])
    assume(all(later < earlier for earlier, later in pairwise(steps)))
    assert exponential_timesteps(num_steps, float(gamma), stage, total) == steps


def _floor_root(value: int, q: int) -> int:
    low, high = 0, 2000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**q <= value else (low, middle)
    return low


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "0 steps"),
        ({"num_steps": -3}, "-3 steps"),
        ({"num_steps": 1001}, "at most 1000"),
        ({"num_steps": 9, "num_train_timesteps": 8}, "at most 8"),
        ({"num_steps": 30, "gamma": -1.0}, "gamma -1.0"),
        ({"num_steps": 30, "gamma": float("nan")}, "gamma nan"),
        ({"num_steps": 30, "gamma": float("inf")}, "gamma inf"),
        ({"num_steps": 30, "stage": "middle"}, "'early' or 'latter'"),
    ],
)
def test_impossible_exponential_lists_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exponential_timesteps(**arguments)


# --- lists of a schedule ---------------------------------------------------------------------------------------------


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("total", [1000, 97])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("linspace", 0), ("trailing", 0)])
def test_uniform_lists_match_diffusers(spacing: str, offset: int, total: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset)
    schedule = noise_schedule(scheduler)
    for num_steps in range(1, total + 1, 7):
        scheduler.set_timesteps(num_steps)
        # numpy's arange sometimes gives one more than requested.
        theirs = scheduler.timesteps.tolist()[:num_steps]
        if theirs[0] < total:
            assert schedule.timesteps("uniform", num_steps) == theirs


def test_uniform_lists_stay_in_range_where_diffusers_does_not() -> None:
    schedule = noise_schedule(DDIMScheduler(steps_offset=1))
    assert schedule.timesteps("uniform", 1000) == list(range(999, -1, -1))


def test_sampling_chooses_the_list() -> None:
    schedule = NoiseSchedule.from_config(SD)
    assert schedule.timesteps("early", 30, 60.0) == exponential_timesteps(30, 60.0, "early")
    assert schedule.timesteps("latter", 12, 0.5) == exponential_timesteps(12, 0.5, "latter")
    for given_list in ([900, 20, 0], (900, 20, 0), np.array([900, 20, 0]), torch.tensor([900, 20, 0])):
        steps = schedule.timesteps(given_list)
        assert steps == [900, 20, 0]
        assert all(type(t) is int for t in steps)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([], "empty"),
        ([1000, 3], "time-step 1000"),
        ([3, -1], "time-step -1"),
        ([3, 3], "3 follows 3"),
        ([3, 7], "7 follows 3"),
        ("late", "'late' is not known"),
    ],
)
def test_impossible_lists_are_refused(sampling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(SD).timesteps(sampling)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"{num_steps} steps"):
        NoiseSchedule.from_config(SD).timesteps("uniform", num_steps)


# --- ᾱ ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("total", [1000, 333])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "trained"])
def test_alpha_bar_matches_diffusers(kind: str, total: int, zero_snr: bool) -> None:
    options: dict[str, Any] = {"num_train_timesteps": total, "rescale_betas_zero_snr": zero_snr, "beta_end": 0.013}
    if kind == "trained":
        options["trained_betas"] = np.geomspace(1e-4, 0.03, total).tolist()
    else:
        options["beta_schedule"] = kind
    # DDIMScheduler knows neither sigmoid nor laplace.
    scheduler = (DDPMScheduler if kind in ("sigmoid", "laplace") else DDIMScheduler)(**options)
    schedule = NoiseSchedule.from_config(scheduler.config)
    assert schedule.num_train_timesteps == total
    assert_close(schedule.alpha_bar.float(), scheduler.alphas_cumprod, **TABLE)
    if zero_snr:
        assert schedule.alpha_bar[-1] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "exp"}, "'exp' is not known"),
        ({"prediction_type": "score"}, "'score' is not known"),
    ],
)
def test_unknown_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(config)


def test_samplers_without_clipping_do_not_clip() -> None:
    """PNDM, Euler and DPM-Solver have no clip_sample, and their latents exceed ±1."""
    assert NoiseSchedule.from_config(PNDMScheduler().config).clip_range is None
    assert NoiseSchedule.from_config(DDIMScheduler().config).clip_range == 1
    assert NoiseSchedule.from_config(DDIMScheduler(clip_sample_range=2.5).config).clip_range == 2.5


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
        {"thresholding": True, "sample_max_value": 100.0, "clip_sample": True},
    ],
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_steps_match_diffusers_ddim(prediction_type: str, limits: dict[str, Any], set_alpha_to_one: bool) -> None:
    scheduler = DDIMScheduler(
        **(SD | limits), prediction_type=prediction_type, set_alpha_to_one=set_alpha_to_one, steps_offset=1
    )
    scheduler.set_timesteps(11)
    schedule = noise_schedule(scheduler)
    steps = schedule.timesteps("uniform", 11)
    assert_close(follow(schedule, start(), steps), follow_peer(scheduler, start(), steps), **STEPS)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_steps_from_zero_signal_match_diffusers_ddim(prediction_type: str) -> None:
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**SD, **options)
    scheduler.set_timesteps(10)
    schedule = noise_schedule(scheduler)
    steps = schedule.timesteps("uniform", 10)
    assert schedule.alpha_bar[steps[0]] == 0
    ours = follow(schedule, start(), steps)
    assert all(latent.isfinite().all() for latent in ours)
    assert_close(ours, follow_peer(scheduler, start(), steps), **STEPS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "steps", [exponential_timesteps(12, 20.0, "early"), exponential_timesteps(12, 20.0, "latter"), [321, 5]]
)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_any_list_matches_first_order_dpm_solver(
    steps: list[int], prediction_type: str, set_alpha_to_one: bool
) -> None:
    peer = DPMSolverMultistepScheduler(
        **{k: v for k, v in SD.items() if k != "clip_sample"},
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=1,
        final_sigmas_type="zero" if set_alpha_to_one else "sigma_min",
    )
    peer.alphas_cumprod = peer.alphas_cumprod.numpy()  # its own conversion warns under numpy 2
    peer.set_timesteps(timesteps=steps)
    config = SD | {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
    assert_close(follow(NoiseSchedule.from_config(config), start(), steps), follow_peer(peer, start(), steps), **STEPS)


def test_diffusers_ddim_is_wrong_for_a_custom_list() -> None:
    """diffusers steps to t − T // n regardless of the next entry in the list, which our update avoids."""
    steps = exponential_timesteps(12, 20.0, "early")
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(len(steps))
    theirs = follow_peer(scheduler, start(), steps)
    assert (follow(NoiseSchedule.from_config(SD), start(), steps)[-1] - theirs[-1]).abs().max() > 0.1


def test_rows_of_a_batch_may_be_at_different_steps() -> None:
    schedule = NoiseSchedule.from_config(SD)
    x, here, following = start(), torch.tensor([900, 40]), torch.tensor([500, -1])
    prediction = schedule.to_x0_and_eps(outputs(x, 0), x, here)
    together = schedule.step(prediction, following)
    for i in range(2):
        row = slice(i, i + 1)
        alone = schedule.step(schedule.to_x0_and_eps(outputs(x, 0)[row], x[row], here[row]), following[row])
        assert_close(together[row], alone, rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_and_epsilon_compose_to_the_latent(prediction_type: str) -> None:
    schedule = NoiseSchedule.from_config(SD | {"prediction_type": prediction_type})
    x, t = start(), torch.tensor([980, 3])
    x0, epsilon = schedule.to_x0_and_eps(outputs(x, 0), x, t)
    assert_close(schedule.add_noise(x0, epsilon, t), x, rtol=1e-5, atol=1e-5)


def test_add_noise_matches_diffusers() -> None:
    x0, noise, t = start(), start().flip(0), torch.tensor([999, 17])
    ours = NoiseSchedule.from_config(SD).add_noise(x0, noise, t)
    assert_close(ours, DDIMScheduler(**SD).add_noise(x0, noise, t), **TABLE | {"atol": 1e-5})


@pytest.mark.parametrize("stage", ["early", "latter"])
@pytest.mark.parametrize("num_steps", [10, 30, 50])
def test_exponential_schedules_are_named(stage: str, num_steps: int) -> None:
    for gamma in (0, 30, 60, 300):
        assert schedule_name(exponential_timesteps(num_steps, gamma, stage)) == f"{stage}, γ = {gamma}"
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler(**SD | {"timestep_spacing": spacing})
        scheduler.set_timesteps(num_steps)
        assert schedule_name(scheduler.timesteps.tolist()) == "uniform"


def test_an_ambiguous_gamma_is_not_named() -> None:
    """With few steps, several values of γ give the same list."""
    steps = exponential_timesteps(5, 181, "early")
    assert exponential_timesteps(5, 180, "early") == steps
    assert schedule_name(steps) == "early"
    assert schedule_name(sorted([*range(1200), 3999], reverse=True)) == "t = 3999 … 0"


def test_other_lists_are_named_by_their_ends() -> None:
    assert schedule_name([900, 500, 7]) == "t = 900 … 7"
    assert schedule_name(exponential_timesteps(30, 60.5)) == "t = 999 … 74"
    assert schedule_name([900, 500]) == "t = 900 … 500"
    assert schedule_name([12]) == "t = 12"


@pytest.mark.parametrize("sampling", ["early", "latter", [999, 500]])
def test_a_prediction_of_noise_says_nothing_where_nothing_is_left_of_the_image(sampling: Any) -> None:
    """Zero terminal SNR; v tells the image there, ε does not."""
    config = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match="at time-step 999 nothing is left of the image"):
        NoiseSchedule.from_config(config).timesteps(sampling, 4)
    NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"}).timesteps(sampling, 4)
    NoiseSchedule.from_config(config).timesteps([998, 3])
