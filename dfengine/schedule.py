"""Noise schedules, the DDIM update for any list of time-steps, and exponential time-step sampling.

Everything here is a pure function of a scheduler's configuration: there is no stepping state, so a list of one's own
is as right as the scheduler's. (diffusers' `DDIMScheduler.step` takes `prev = t − T // n`, right for one list only.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Prediction(NamedTuple):
    """What one prediction of the network says about a latent, both read straight from it."""

    x0: Tensor
    epsilon: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """The cumulative signal share ᾱ of a model's training schedule and how its sampler treats predictions."""

    alpha_bar: Float[Tensor, " T"]
    """ᾱ_t = ∏(1 − β), float64, decreasing; 0 at the last entry for a zero-terminal-SNR model"""
    final_alpha_bar: float = 1.0
    """ᾱ after the last step"""
    prediction_type: str = "epsilon"
    """epsilon, v_prediction or sample (x0)"""
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    clip_range: float | None = None
    """clip predicted x0 to ± this"""
    thresholding: tuple[float, float] | None = None
    """dynamic thresholding of predicted x0: (quantile, largest value)"""
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    """ᾱ in float32, the final one behind the others, on each device that asked"""

    @property
    def num_train_timesteps(self) -> int:
        """T: time-steps are 0 … T − 1."""
        return len(self.alpha_bar)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers scheduler's configuration; what it leaves out has DDIMScheduler's defaults.

        Except for `clip_sample`: only samplers that can clip have the entry, the others leave x0 as it is.

        Raises ValueError for a schedule or prediction type that is not known.
        """
        betas = _betas(config)
        alpha_bar = (1 - betas).cumprod(0)
        if config.get("rescale_betas_zero_snr", False):
            alpha_bar = _rescale_zero_terminal_snr(alpha_bar)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in _PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is not known: expected one of {_PREDICTION_TYPES}")
        return cls(
            alpha_bar=alpha_bar,
            final_alpha_bar=1.0 if config.get("set_alpha_to_one", True) else float(alpha_bar[0]),
            prediction_type=prediction_type,
            timestep_spacing=config.get("timestep_spacing", "leading"),
            steps_offset=config.get("steps_offset", 0),
            clip_range=config.get("clip_sample_range", 1.0) if config.get("clip_sample", False) else None,
            thresholding=(config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
            if config.get("thresholding", False)
            else None,
        )

    def at(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
        """ᾱ of each time-step in float32, shaped to multiply latents; −1 is the end of the list, `final_alpha_bar`."""
        device = timesteps.device
        if device not in self._tables:  # copied once: each copy would wait for the device
            table = torch.cat([self.alpha_bar, self.alpha_bar.new_tensor([self.final_alpha_bar])])
            self._tables[device] = table.float().to(device)
        return self._tables[device][timesteps][:, None, None, None]

    def timesteps(
        self, sampling: str | Iterable[SupportsIndex] = "uniform", num_steps: int = 30, gamma: float = 60
    ) -> list[int]:
        """The decreasing list of time-steps to visit.

        `sampling` is "uniform" (the scheduler's own spacing), "early" or "latter" (`exponential_timesteps`), or a list.
        Raises ValueError where the list is not strictly decreasing or leaves [0, T − 1].
        """
        total = self.num_train_timesteps
        if isinstance(sampling, str):
            if sampling == "uniform":
                _check_num_steps(num_steps, total)
                return self._uniform(num_steps)
            if sampling not in ("early", "latter"):
                raise ValueError(f"sampling {sampling!r} is not known: expected 'uniform', 'early', 'latter' or a list")
            return exponential_timesteps(num_steps, gamma, sampling, total)
        steps = [index(t) for t in sampling]
        if not steps:
            raise ValueError("the list of time-steps is empty: give at least one")
        for t in steps:
            if not 0 <= t < total:
                raise ValueError(f"time-step {t} is outside [0, {total - 1}]: steps index the training schedule")
        for earlier, later in itertools.pairwise(steps):
            if later >= earlier:
                raise ValueError(f"time-steps must fall strictly, but {later} follows {earlier}")
        return steps

    def _uniform(self, num_steps: int) -> list[int]:
        total = self.num_train_timesteps
        # Halves are rounded as diffusers rounds them, which numpy's linspace and arange decide by their own arithmetic.
        if self.timestep_spacing == "linspace":
            gap = (total - 1) / max(num_steps - 1, 1)
            return [round(i * gap) for i in reversed(range(num_steps))]
        if self.timestep_spacing == "trailing":
            gap = total - (total - total / num_steps)
            return [round(total - i * gap) - 1 for i in range(num_steps)]
        if self.timestep_spacing == "leading":
            stride = total // num_steps
            offset = min(self.steps_offset, total - 1 - stride * (num_steps - 1))
            return [stride * i + offset for i in reversed(range(num_steps))]
        raise ValueError(
            f"timestep_spacing {self.timestep_spacing!r} is not known: expected 'leading', 'linspace' or 'trailing'"
        )

    def read(
        self, prediction: Float[Tensor, "n c h w"], x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> Prediction:
        """x0 and ε from the network's own output; `x_t` is the network's own input (masked, if it was masked).

        Both come straight from the prediction wherever it allows, never one through the other: at ᾱ = 0 (zero-terminal
        SNR) ε says nothing about x0.
        """
        alpha_bar = self.at(timesteps)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        epsilon, prediction = self.epsilon(prediction, x_t, timesteps), prediction.float()
        if self.prediction_type == "v_prediction":
            return Prediction(signal * x_t.float() - noise * prediction, epsilon)
        if self.prediction_type == "sample":
            return Prediction(prediction, epsilon)
        return Prediction((x_t.float() - noise * prediction) / signal, epsilon)

    def epsilon(
        self, prediction: Float[Tensor, "n c h w"], x_t: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """ε alone, as `read` reads it, float32."""
        prediction = prediction.float()
        if self.prediction_type == "epsilon":
            return prediction
        alpha_bar = self.at(timesteps)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if self.prediction_type == "v_prediction":
            return signal * prediction + noise * x_t.float()
        return (x_t.float() - signal * prediction) / noise

    def step(self, prediction: Prediction, next_timesteps: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """x_next = √ᾱ_next x0 + √(1 − ᾱ_next) ε, deterministic DDIM (Eq. 4, σ = 0).

        A next time-step of −1 is the end of the list: it lands on `final_alpha_bar`.
        """
        alpha_bar = self.at(next_timesteps)
        return alpha_bar.sqrt() * self.limit(prediction.x0) + (1 - alpha_bar).sqrt() * prediction.epsilon

    def limit(self, x0: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Predicted x0 under the configuration's thresholding or clipping."""
        if self.thresholding is not None:
            quantile, largest = self.thresholding
            bound = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(1.0, largest)[:, None, None, None]
            return torch.minimum(torch.maximum(x0, -bound), bound) / bound
        return x0 if self.clip_range is None else x0.clamp(-self.clip_range, self.clip_range)

    def add_noise(
        self, x0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """x_t = √ᾱ_t x0 + √(1 − ᾱ_t) ε [2]."""
        alpha_bar = self.at(timesteps)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def exponential_timesteps(
    num_steps: int, gamma: float = 60, stage: str = "early", num_train_timesteps: int = 1000
) -> list[int]:
    """Time-steps concentrated in the early (noisy) or latter part of the process, Eqs. 12–14.

    With l steps of T and δ = T^(1/(l+γ)): early is T − 1, then T − ⌊δ^(i+γ)⌋ for i = 1 … l − 1; latter is ⌊δ^(i+γ)⌋
    for i = l … 1 with T replaced by T − 1. Repeats are spread, so the list falls strictly inside [0, T − 1].

    Raises ValueError for l outside [1, T], γ < 0 or an unknown stage.
    """
    total = num_train_timesteps
    _check_num_steps(num_steps, total)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma {gamma} is not possible: expected a finite number of at least 0")

    def power(i: int) -> int:
        # The small term keeps exact powers from falling one short in floating point.
        return math.floor(total ** ((i + gamma) / (num_steps + gamma)) + 1e-9)

    if stage == "early":
        steps = [total - 1] + [total - power(i) for i in range(1, num_steps)]
    elif stage == "latter":
        steps = [min(power(i), total - 1) for i in range(num_steps, 0, -1)]
    else:
        raise ValueError(f"stage {stage!r} is not known: expected 'early' or 'latter'")
    for i in range(1, num_steps):
        steps[i] = min(steps[i], steps[i - 1] - 1)
    for i in reversed(range(num_steps)):
        below = steps[i + 1] + 1 if i + 1 < num_steps else 0
        steps[i] = max(steps[i], below, num_steps - 1 - i)
    return steps


def schedule_name(timesteps: Sequence[int], num_train_timesteps: int = 1000) -> str:
    """What a list of time-steps is called: "uniform", "early, γ = 60", or its ends where it is neither or too short.

    Uniform is what falls by the same number, give or take one; γ is looked for among the whole numbers to 300, and left
    out where several make the same list.
    """
    steps = [int(t) for t in timesteps]
    if len(steps) > 2:
        gaps = {before - after for before, after in itertools.pairwise(steps)}
        if max(gaps) - min(gaps) <= 1:
            return "uniform"
        for stage in ("early", "latter") if len(steps) <= num_train_timesteps else ():
            fitting = [
                g for g in range(301) if exponential_timesteps(len(steps), g, stage, num_train_timesteps) == steps
            ]
            if fitting:
                return f"{stage}, γ = {fitting[0]}" if len(fitting) == 1 else stage
    return " … ".join(["t = {}", "{}"][: len(steps)]).format(steps[0], steps[-1])


def _check_num_steps(num_steps: int, total: int) -> None:
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps are not possible: expected at least 1")
    if num_steps > total:
        raise ValueError(
            f"{num_steps} steps are more than the {total} of the training schedule: ask for at most {total}"
        )


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """β_t in float64, by the configuration's `trained_betas` or `beta_schedule`."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    total, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if kind == "linear":
        return torch.linspace(start, end, total, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float64) ** 2
    if kind in ("squaredcos_cap_v2", "laplace"):
        level = _cosine_level(total) if kind == "squaredcos_cap_v2" else _laplace_level(total)
        return (1 - level[1:] / level[:-1]).clamp(max=0.999)
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, total, dtype=torch.float64)) * (end - start) + start
    raise ValueError(
        f"beta_schedule {kind!r} is not known: expected 'linear', 'scaled_linear', 'squaredcos_cap_v2', 'sigmoid', "
        "'laplace' or trained_betas"
    )


def _cosine_level(total: int) -> Float[Tensor, " edges"]:
    """cos²((s + 0.008)/1.008 · π/2) at s = 0 … 1 (Nichol & Dhariwal 2021)."""
    return torch.cos((torch.arange(total + 1, dtype=torch.float64) / total + 0.008) / 1.008 * torch.pi / 2) ** 2


def _laplace_level(total: int) -> Float[Tensor, " edges"]:
    """√(SNR/(1 + SNR)) at s = 0 … 1, SNR = (1 − |1 − 2s| + 1e-6)^(∓1/2), as diffusers' DDPMScheduler has it."""
    from_middle = 1 - 2 * torch.arange(total + 1, dtype=torch.float64) / total
    log_snr = -0.5 * torch.where(from_middle < 0, -1.0, 1.0) * (1 - from_middle.abs() + 1e-6).log()
    return log_snr.sigmoid().sqrt()


def _rescale_zero_terminal_snr(alpha_bar: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Shift and scale √ᾱ so that it ends at 0 and begins where it began (Lin et al. 2024, Algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
