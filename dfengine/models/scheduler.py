"""The noise schedule of a diffusers scheduler, and exponential time-step sampling as a scheduler for any pipeline."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dfengine.diffusion.path import END, NoiseSchedule

log = logging.getLogger(__name__)

#: Schedulers whose own step is the deterministic first-order one of `NoiseSchedule.step`.
_FIRST_ORDER = (
    "DDIMScheduler",
    "ExponentialDDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

# diffusers looks up SchedulerMixin in a component's module to decide how the component is loaded.
__all__ = ["ExponentialDDIMScheduler", "SchedulerMixin", "noise_schedule"]


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The path of a pipeline's scheduler, whose `uniform` list is the time-steps that the scheduler itself visits.

    Logs a message if the scheduler's sampler is replaced by the deterministic first-order step. Raises ValueError as
    `path_of` does.
    """
    config, name, schedule = scheduler.config, type(scheduler).__name__, path_of(scheduler)
    if name not in _FIRST_ORDER or config.get("stochastic_sampling"):
        log.info("the sampler %s is replaced by deterministic first-order steps on its own list of time-steps", name)
    return dataclasses.replace(schedule, uniform=lambda num_steps: _visited(scheduler, schedule, num_steps))


def path_of(scheduler: Any) -> NoiseSchedule:
    """The path alone, without the scheduler's list.

    Raises ValueError for a scheduler that is neither a discrete diffusion with betas nor flow matching: its process is
    a different one.
    """
    config, name = scheduler.config, type(scheduler).__name__
    is_flow = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
    if name.startswith("FlowMatch") or is_flow:
        return NoiseSchedule.flow(config.get("num_train_timesteps", 1000))
    # The class counts: `from_config` keeps entries of another class's configuration.
    constructors = [vars(base)["__init__"] for base in type(scheduler).__mro__ if "__init__" in vars(base)]
    has_betas = any("beta_schedule" in inspect.signature(one).parameters for one in constructors)
    if has_betas and config.get("timestep_type", "discrete") == "discrete":
        return _diffusion(scheduler)
    kind = f"{name} (continuous time)" if has_betas else name
    raise ValueError(
        f"the scheduler {kind} is not supported: it describes neither a discrete diffusion with betas nor flow "
        "matching; use a model with a DDIM, DPM-Solver, Euler or flow-matching scheduler"
    )


def _diffusion(scheduler: Any) -> NoiseSchedule:
    """The path that a diffusion scheduler's configuration describes.

    Raises ValueError if the scheduler itself computes other ᾱ from it, by rules of its own.
    """
    config = scheduler.config
    schedule = NoiseSchedule.from_config(config)
    assert schedule.alpha_bar is not None
    alpha_bar = getattr(scheduler, "alphas_cumprod", None)
    if alpha_bar is not None:
        expected = torch.as_tensor(alpha_bar).to(schedule.alpha_bar)
        if expected.shape != schedule.alpha_bar.shape or (expected - schedule.alpha_bar).abs().max() > 1e-4:
            raise ValueError(
                f"the scheduler {type(scheduler).__name__} is not supported: its noise levels are not those of its "
                "beta_schedule; use a model with a DDIM, DPM-Solver or Euler scheduler"
            )
    if config.get("final_sigmas_type") == "sigma_min":
        schedule = dataclasses.replace(schedule, final_alpha_bar=float(schedule.alpha_bar[0]))
    return schedule


def _visited(scheduler: Any, schedule: NoiseSchedule, num_steps: int) -> list[float]:
    """The time-steps that a scheduler visits in `num_steps` steps, each once.

    Fewer than `num_steps` if the scheduler rounds several to the same. Raises ValueError if the list depends on the
    image size.
    """
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"the time-steps of {type(scheduler).__name__} depend on the image size (use_dynamic_shifting needs mu), "
            "which is not supported: choose sampling 'early' or 'latter', or give a list"
        )
    if isinstance(scheduler, ExponentialDDIMScheduler):  # here "uniform" is the configuration's own spacing
        # `_use_default_values` would reset entries that were defaults when the scheduler was constructed.
        other = ("stage", "gamma", "_use_default_values")
        own = DDIMScheduler.from_config({key: value for key, value in config.items() if key not in other})
    else:
        own = copy.deepcopy(scheduler)
        if "skip_prk_steps" in config:  # PNDM's Runge-Kutta warm-up evaluates between its steps
            own.register_to_config(skip_prk_steps=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # raised by diffusers' conversions under NumPy 2
        own.set_timesteps(num_steps)
    # Second-order samplers list two evaluations a step after the first; the second is the step's end.
    visited = own.timesteps[:: own.order].tolist()
    # PNDM lists its second time-step twice, and leading spacing may yield an extra one.
    steps = list(dict.fromkeys(visited))[:num_steps]
    # steps_offset may shift the first beyond T − 1.
    excess = 0 if schedule.is_flow else max(0, steps[0] - (schedule.num_train_timesteps - 1))
    return [t - excess for t in steps]


class ExponentialDDIMScheduler(DDIMScheduler):
    """DDIM on time-steps concentrated in the early or latter stage of the process (Eqs. 12–14).

    pipe.scheduler = ExponentialDDIMScheduler.from_config(pipe.scheduler.config, stage="early", gamma=60)

    `stage` is "early", "latter" or "uniform" (the configuration's own spacing). Every step goes to the next entry of
    the list, whatever its distance, whereas diffusers' DDIMScheduler always goes back by T // n. Pipelines accept a
    custom list as `timesteps`. x0 is clipped only if the configuration says so, as it must not be for latents.

    Raises ValueError for an invalid stage, gamma or list.
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
            # By name: diffusers records positional arguments as defaults, which from_config of another class replaces.
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
        self._schedule.timesteps(stage, 1, gamma)  # raises ValueError for an invalid stage or gamma

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As diffusers' own, but all values of another scheduler count, also those that it had by default.

        diffusers would replace its defaults, such as DDIM's `clip_sample=True`, by those of this class.
        """
        if isinstance(config, Mapping):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def _schedule(self) -> NoiseSchedule:
        """The path of the current configuration, which pipelines replace after construction."""
        if getattr(self, "_schedule_config", None) is not self.config:
            self._cached_schedule, self._schedule_config = NoiseSchedule.from_config(self.config), self.config
        return self._cached_schedule

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the list: that many steps of the stage, or the given ones.

        Raises ValueError if both or neither are given, or the list is not strictly decreasing.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("the list of time-steps is ambiguous: give either num_inference_steps or timesteps")
        if timesteps is not None:
            steps = self._schedule.timesteps(timesteps)
        else:
            schedule = noise_schedule(self) if self.config.stage == "uniform" else self._schedule
            steps = schedule.timesteps(self.config.stage, num_inference_steps or 0, self.config.gamma)
        self.num_inference_steps = len(steps)
        self.timesteps = torch.tensor(steps, device=device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One DDIM update (Eq. 4) to the next entry of the list; the last step lands on the configuration's final ᾱ.

        `eta` > 0 adds noise, as in diffusers. Raises ValueError for a time-step that is not in the list.
        """
        index = (self.timesteps == timestep).nonzero().flatten().tolist()
        if self.num_inference_steps is None or not index:
            raise ValueError(
                f"time-step {float(timestep):g} is not in the list: call set_timesteps first and pass its entries"
            )
        t = self.timesteps[index[0]].expand(len(sample)).to(sample.device)
        is_last = index[0] + 1 == len(self.timesteps)
        t_next = torch.full_like(t, END) if is_last else self.timesteps[index[0] + 1].expand_as(t).to(sample.device)
        x0, epsilon = self._schedule.to_x0_and_eps(model_output, sample, t)
        x0 = self._schedule.threshold_x0(x0)
        (a, b), (a_next, b_next) = self._schedule.coefficients(t), self._schedule.coefficients(t_next)
        if use_clipped_model_output:
            epsilon = (sample.float() - a * x0) / b
        sigma = eta * (b_next / b * (1 - (a / a_next) ** 2).sqrt())
        prev_sample = a_next * x0 + (b_next**2 - sigma**2).sqrt() * epsilon
        if eta > 0:
            if variance_noise is None:
                shape, device = model_output.shape, model_output.device
                variance_noise = randn_tensor(shape, generator=generator, device=device, dtype=model_output.dtype)
            prev_sample = prev_sample + sigma * variance_noise
        result = prev_sample.to(sample.dtype), x0.to(sample.dtype)
        return DDIMSchedulerOutput(*result) if return_dict else result
