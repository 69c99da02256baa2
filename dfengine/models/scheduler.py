"""Exponential time-step sampling for any diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dfengine.schedule import NoiseSchedule

# By this name diffusers finds out, in the module of a pipeline's part, how the part is loaded.
__all__ = ["ExponentialDDIMScheduler", "SchedulerMixin"]


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
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the list: so many steps of the stage, or the given ones, which must fall strictly."""
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("the list of time-steps is ambiguous: give num_inference_steps or timesteps")
        chosen = (
            self._schedule.timesteps(timesteps)
            if timesteps is not None
            else self._schedule.timesteps(self.config.stage, num_inference_steps or 0, self.config.gamma)
        )
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
        x0, epsilon = self._schedule.read(model_output, sample, t)
        x0 = self._schedule.limit(x0)
        alpha_bar, next_alpha_bar = self._schedule.at(t), self._schedule.at(t_next)
        if use_clipped_model_output:
            epsilon = (sample.float() - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        sigma = eta * ((1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)).sqrt()
        following_sample = next_alpha_bar.sqrt() * x0 + (1 - next_alpha_bar - sigma**2).sqrt() * epsilon
        if eta > 0:
            if variance_noise is None:
                shape, device = model_output.shape, model_output.device
                variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
            following_sample = following_sample + sigma * variance_noise
        result = following_sample.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(*result) if return_dict else result
