"""What a diffusers scheduler says about its process, and exponential time-step sampling for any diffusers pipeline."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dfengine.diffusion.path import NoiseSchedule

log = logging.getLogger(__name__)

#: Schedulers whose own step is the deterministic first-order one of `NoiseSchedule.step`.
_FIRST_ORDER = (
    "DDIMScheduler",
    "ExponentialDDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

# By this name diffusers finds out, in the module of a pipeline's part, how the part is loaded.
__all__ = ["ExponentialDDIMScheduler", "SchedulerMixin", "noise_schedule"]


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The path of a pipeline's scheduler, and as "uniform" the time-steps that the scheduler itself visits.

    A log entry says where its sampler is replaced by the deterministic first-order step. Raises ValueError for a
    scheduler that is neither a discrete diffusion (with betas) nor flow matching, since its process is another one.
    """
    config, name = scheduler.config, type(scheduler).__name__
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if name.startswith("FlowMatch") or flows:
        schedule = NoiseSchedule.flow(config.get("num_train_timesteps", 1000))
    elif "beta_schedule" in config and config.get("timestep_type", "discrete") == "discrete":
        schedule = NoiseSchedule.from_config(config)
    else:
        kind = f"{name} (continuous time)" if "beta_schedule" in config else name
        raise ValueError(
            f"the scheduler {kind} describes neither a discrete diffusion with betas nor flow matching: "
            "its process is not supported; use a model with a DDIM, DPM-Solver, Euler or flow-matching scheduler"
        )
    if name not in _FIRST_ORDER:
        log.info("the sampler %s is replaced by deterministic DDIM steps on its own list of time-steps", name)
    if isinstance(scheduler, ExponentialDDIMScheduler):
        # Its own spacing is what "uniform" means; its stage is a choice of the trajectory here.
        scheduler = DDIMScheduler.from_config({k: v for k, v in config.items() if k not in ("stage", "gamma")})

    def uniform(num_steps: int) -> list[float]:
        own = copy.deepcopy(scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own conversions under NumPy 2
            own.set_timesteps(num_steps)
        # Once each (second-order samplers visit a time-step twice), as many as were asked for, from T − 1 at most.
        steps = list(dict.fromkeys(own.timesteps.tolist()))[:num_steps]
        beyond = 0 if schedule.is_flow else max(0, steps[0] - (schedule.num_train_timesteps - 1))
        return [t - beyond for t in steps]

    return dataclasses.replace(schedule, uniform=uniform)


class ExponentialDDIMScheduler(DDIMScheduler):
    """DDIM on time-steps concentrated in the early or latter stage of the process (Eqs. 12–14).

    pipe.scheduler = ExponentialDDIMScheduler.from_config(pipe.scheduler.config, stage="early", gamma=60)

    `stage` is "early", "latter" or "uniform" (the configuration's own spacing). Every step goes to the list's next
    entry, whatever its distance; diffusers' own goes T // n back, which is right for one list only. A list of one's own
    is taken as `timesteps`, by a pipeline's call, too. x0 is clipped only where a configuration says so (of latents it
    must not be). Raises ValueError for a stage, gamma or list that is not possible.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Any = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Any = "leading",
        rescale_betas_zero_snr: bool = False,
        stage: str = "early",
        gamma: float = 60.0,
    ) -> None:
        super().__init__(
            # By name: diffusers takes what is given by place for a default, which another scheduler may change.
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        self._schedule = NoiseSchedule.from_config(self.config)
        self._schedule.timesteps(stage, 1, gamma)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose the list: so many steps of the stage, or the given ones, which must fall strictly."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("the list of time-steps is ambiguous: give num_inference_steps or timesteps")
        if timesteps is not None:
            chosen = self._schedule.timesteps(timesteps)
        else:
            schedule = noise_schedule(self) if self.config.stage == "uniform" else self._schedule
            chosen = schedule.timesteps(self.config.stage, num_inference_steps or 0, self.config.gamma)
        self.num_inference_steps = len(chosen)
        self.timesteps = torch.tensor(chosen, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One DDIM update (Eq. 4) to the list's next entry; the last lands on the configuration's final ᾱ.

        As in diffusers, `eta` > 0 adds noise. Raises ValueError for a time-step that is not in the list.
        """
        place = (self.timesteps == int(timestep)).nonzero().flatten().tolist()
        if self.num_inference_steps is None or not place:
            raise ValueError(
                f"time-step {int(timestep)} is not in the list: call set_timesteps before, and visit its own"
            )
        following = self.timesteps[place[0] + 1] if place[0] + 1 < len(self.timesteps) else -1
        t, t_next = (torch.full((len(sample),), int(one), device=sample.device) for one in (timestep, following))
        x0, epsilon = self._schedule.to_x0_and_eps(model_output, sample, t)
        x0 = self._schedule.threshold_x0(x0)
        (a, b), (a_next, b_next) = self._schedule.coefficients(t), self._schedule.coefficients(t_next)
        if use_clipped_model_output:
            epsilon = (sample.float() - a * x0) / b
        sigma = eta * (b_next / b * (1 - (a / a_next) ** 2).sqrt())
        following_sample = a_next * x0 + (b_next**2 - sigma**2).sqrt() * epsilon
        if eta > 0:
            if variance_noise is None:
                shape, device = model_output.shape, model_output.device
                variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
            following_sample = following_sample + sigma * variance_noise
        result = following_sample.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(*result) if return_dict else result
