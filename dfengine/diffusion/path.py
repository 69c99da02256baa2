"""The path x_t = a(t)·x0 + b(t)·n of a model, the lists of time-steps on it, and the deterministic step along it.

Diffusion and flow matching differ in (a, b) alone, so nothing downstream asks which of them a model is:

    diffusion        a = √ᾱ_t, b = √(1 − ᾱ_t)
    flow matching    a = 1 − σ, b = σ, σ = t/T

Everything here is a pure function of a scheduler's configuration. There is no stepping state, so any list of time-steps
is as correct as the scheduler's own. (diffusers' `DDIMScheduler.step` assumes `prev = t − T // n`, which holds for one
list only.)
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import dfengine.checks as checks

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")

#: As a time-step: the end of every list, where the last step lands.
END = -1


class Prediction(NamedTuple):
    """The clean latent and the noise that one output of the network implies."""

    x0: Tensor
    epsilon: Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """A model's path x_t = a(t)·x0 + b(t)·n and how its sampler treats predictions."""

    alpha_bar: Float[Tensor, " T"] | None
    """ᾱ_t = ∏(1 − β), float64, decreasing, 0 at the last entry for a zero-terminal-SNR model; None for flow matching"""
    final_alpha_bar: float = 1.0
    """ᾱ after the last step"""
    prediction_type: str = "epsilon"
    """epsilon, v_prediction (a·n − b·x0), sample (x0) or flow_prediction (n − x0)"""
    clip_range: float | None = None
    """predicted x0 is clipped to ± this"""
    thresholding: tuple[float, float] | None = None
    """dynamic thresholding of predicted x0: (quantile, largest value)"""
    uniform: Callable[[int], Sequence[float]] | None = field(default=None, compare=False)
    """the list that the pipeline's own scheduler visits in so many steps; None is ⌊T/n⌋ apart, down to 0"""
    num_flow_timesteps: int = 1000
    """T of flow matching"""
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """a and b in float32, those of END last, on each device that asked"""

    @property
    def is_flow(self) -> bool:
        """Whether this is flow matching, whose times are real numbers in [0, T]."""
        return self.alpha_bar is None

    @property
    def num_train_timesteps(self) -> int:
        """T: diffusion has the time-steps 0 … T − 1, flow matching [0, T]."""
        return self.num_flow_timesteps if self.alpha_bar is None else len(self.alpha_bar)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the configuration of a diffusion scheduler; what it leaves out has DDIMScheduler's defaults.

        Except for `clip_sample`: only samplers that can clip have the entry, the others leave x0 as it is.

        Raises ValueError for an unknown schedule or prediction type.
        """
        betas = _betas(config)
        alpha_bar = (1 - betas).cumprod(0)
        if config.get("rescale_betas_zero_snr", False):
            alpha_bar = _rescale_zero_terminal_snr(alpha_bar)
        return cls(
            alpha_bar=alpha_bar,
            final_alpha_bar=1.0 if config.get("set_alpha_to_one", True) else float(alpha_bar[0]),
            prediction_type=_prediction_type(config.get("prediction_type", "epsilon")),
            clip_range=config.get("clip_sample_range", 1.0) if config.get("clip_sample", False) else None,
            thresholding=(config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
            if config.get("thresholding", False)
            else None,
        )

    @classmethod
    def flow(cls, num_train_timesteps: int = 1000, prediction_type: str = "flow_prediction") -> NoiseSchedule:
        """The straight path of flow matching, x_t = (1 − σ)·x0 + σ·n with σ = t/T, ending at σ = 0."""
        return cls(None, prediction_type=_prediction_type(prediction_type), num_flow_timesteps=num_train_timesteps)

    def fingerprint(self) -> str:
        """Identifies the path and how predictions on it are read."""
        table = b"" if self.alpha_bar is None else self.alpha_bar.float().cpu().numpy().tobytes()
        settings = (self.final_alpha_bar, self.prediction_type, self.clip_range, self.thresholding)
        return hashlib.sha256(table + f"{settings} {self.num_train_timesteps}".encode()).hexdigest()[:16]

    def coefficients(
        self, timesteps: Shaped[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 1 1 1"], Float[Tensor, "n 1 1 1"]]:
        """a and b at each time-step in float32, shaped to multiply latents; END has those after the last step.

        Between two time-steps of diffusion log(b/a) is linear, which is how diffusers' schedulers map σ to t.
        """
        if self.alpha_bar is None:
            sigma = (timesteps.float() / self.num_flow_timesteps).clamp(min=0)[:, None, None, None]
            return 1 - sigma, sigma
        signal, noise = self._on(timesteps.device)
        if not timesteps.is_floating_point():
            return signal[timesteps][:, None, None, None], noise[timesteps][:, None, None, None]
        # floor(−1) = −1 is END, the last entry of both tables.
        below = timesteps.floor().long()
        above, share = (below + 1).clamp(max=self.num_train_timesteps - 1), timesteps - below
        log_sigma = torch.lerp(
            noise[below].log() - signal[below].log(), noise[above].log() - signal[above].log(), share.float()
        )
        between, sigma = share > 0, log_sigma.exp()
        a = torch.where(between, (1 + sigma**2).rsqrt(), signal[below])
        b = torch.where(between, sigma * (1 + sigma**2).rsqrt(), noise[below])
        return a[:, None, None, None], b[:, None, None, None]

    def _on(self, device: torch.device) -> tuple[Float[Tensor, " ends"], Float[Tensor, " ends"]]:
        if device not in self._tables:  # copied once: each copy would wait for the device
            assert self.alpha_bar is not None
            table = torch.cat([self.alpha_bar, self.alpha_bar.new_tensor([self.final_alpha_bar])])
            table = table.float().to(device)
            self._tables[device] = table.sqrt(), (1 - table).sqrt()
        return self._tables[device]

    def timesteps(
        self,
        sampling: str | Iterable[float | SupportsIndex] = "uniform",
        num_steps: int = 30,
        gamma: float = 60,
    ) -> list[int] | list[float]:
        """The decreasing list of time-steps to visit.

        `sampling` is "uniform" (what the scheduler itself visits), "early" or "latter" (`exponential_timesteps`), or a
        list. Raises ValueError for a list that is not strictly decreasing or leaves [0, T − 1] (flow matching: (0, T]).
        """
        total, gamma = self.num_train_timesteps, _check_gamma(gamma)
        if isinstance(sampling, str):
            if sampling == "uniform":
                num_steps = _check_num_steps(num_steps, total)
                return self._checked(self.uniform(num_steps) if self.uniform else _evenly(num_steps, total))
            if sampling not in ("early", "latter"):
                raise ValueError(f"sampling {sampling!r} is not known: expected 'uniform', 'early', 'latter' or a list")
            return self._checked(exponential_timesteps(num_steps, gamma, sampling, total))
        return self._checked(sampling)

    def _checked(self, timesteps: Iterable[float | SupportsIndex]) -> list[int] | list[float]:
        """Whole numbers where all of them are; what leaves the path or does not fall is refused."""
        if not isinstance(timesteps, Iterable) or isinstance(timesteps, bytes | Mapping):
            raise checks.mistake("sampling", timesteps, "'uniform', 'early', 'latter' or a list of time-steps")
        steps = [_number(t) for t in timesteps]
        if not steps:
            raise ValueError("the list of time-steps (sampling) is empty: give at least one")
        last = self.num_train_timesteps - (0 if self.is_flow else 1)
        for t in steps:
            if not 0 <= t <= last:
                raise ValueError(f"time-step {t:g} is outside [0, {last}]: steps index the training schedule")
        is_blind = self.alpha_bar is not None and self.prediction_type == "epsilon" and self.alpha_bar[-1] <= 0
        if is_blind and steps[0] == last:
            raise ValueError(
                f"at time-step {last} nothing is left of the image (zero terminal SNR), so that a prediction of ε says "
                f"nothing about it: start below, or use a scheduler without rescale_betas_zero_snr"
            )
        for earlier, later in itertools.pairwise(steps):
            if later >= earlier:
                raise ValueError(f"time-steps must decrease strictly, but {later:g} follows {earlier:g}")
        is_whole = not self.is_flow and all(t == int(t) for t in steps)
        return [int(t) for t in steps] if is_whole else [float(t) for t in steps]

    def to_x0_and_eps(
        self, output: Float[Tensor, "n c h w"], x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"]
    ) -> Prediction:
        """x0 and ε from the network's output; `x_t` is the network's own input (masked, if it was masked).

        Both come straight from the output wherever it allows, never one through the other: at a = 0 (zero-terminal
        SNR) ε says nothing about x0.
        """
        return Prediction(self._read("x0", output, x_t, timesteps), self._read("epsilon", output, x_t, timesteps))

    def epsilon(
        self, output: Float[Tensor, "n c h w"], x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """ε alone, as `to_x0_and_eps` has it, float32."""
        return self._read("epsilon", output, x_t, timesteps)

    def _read(
        self,
        what: str,
        output: Float[Tensor, "n c h w"],
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
    ) -> Float[Tensor, "n c h w"]:
        if self.is_output(what):
            return output.float()
        of_output, of_input = self.reading(what, timesteps)
        return of_output * output.float() + of_input * x_t.float()

    def is_output(self, what: str) -> bool:
        """Whether the network's output itself is `what`, "x0" or "epsilon"."""
        return what == {"epsilon": "epsilon", "sample": "x0"}.get(self.prediction_type)

    def reading(
        self, what: str, timesteps: Shaped[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n 1 1 1"], Float[Tensor, "n 1 1 1"]]:
        """The factors of the network's output and of its input that add up to `what`, "x0" or "epsilon".

                           x0                    ε
        epsilon            (x_t − b ε) / a       ε
        v_prediction       a x_t − b v           b x_t + a v
        sample             x0                    (x_t − a x0) / b
        flow_prediction    (x_t − b u) / (a+b)   (x_t + a u) / (a+b)
        """
        a, b = self.coefficients(timesteps)
        is_x0 = what == "x0"
        match self.prediction_type:
            case "v_prediction":
                return (-b, a) if is_x0 else (a, b)
            case "flow_prediction":
                return (-b if is_x0 else a) / (a + b), 1 / (a + b)
            case "sample":
                return (torch.ones_like(a), torch.zeros_like(a)) if is_x0 else (-a / b, 1 / b)
        return (-b / a, 1 / a) if is_x0 else (torch.ones_like(a), torch.zeros_like(a))

    def step(self, prediction: Prediction, next_timesteps: Shaped[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """x_next = a_next·x0 + b_next·ε: DDIM without noise (Eq. 4, σ = 0), which for flow matching is Euler's step.

        A next time-step of END lands on the configuration's final value.
        """
        a, b = self.coefficients(next_timesteps)
        return a * self.threshold_x0(prediction.x0) + b * prediction.epsilon

    def threshold_x0(self, x0: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Predicted x0 under the configuration's dynamic thresholding or clipping."""
        if self.thresholding is not None:
            quantile, largest = self.thresholding
            bound = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(1.0, largest)[:, None, None, None]
            return torch.minimum(torch.maximum(x0, -bound), bound) / bound
        return x0 if self.clip_range is None else x0.clamp(-self.clip_range, self.clip_range)

    def add_noise(
        self, x0: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """x_t = a·x0 + b·n (Eq. 2)."""
        a, b = self.coefficients(timesteps)
        return a * x0 + b * noise


def _number(t: float | SupportsIndex) -> int | float:
    """A time-step as a plain number."""
    number = checks.finite_number("time-step", t)
    return index(t) if isinstance(t, SupportsIndex) else number


def _evenly(num_steps: int, total: int) -> list[int]:
    return [total // num_steps * i for i in reversed(range(num_steps))]


def _prediction_type(name: str) -> str:
    if name not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {name!r} is not known: expected one of {', '.join(PREDICTION_TYPES)}")
    return name


def exponential_timesteps(
    num_steps: int, gamma: float = 60, stage: str = "early", num_train_timesteps: int = 1000
) -> list[int]:
    """Time-steps concentrated in the early (noisy) or latter part of the process, Eqs. 12–14.

    With l steps of T and δ = T^(1/(l+γ)): early is T − 1, then T − ⌊δ^(i+γ)⌋ for i = 1 … l − 1; latter is ⌊δ^(i+γ)⌋
    for i = l … 1 with T replaced by T − 1. Repeats are spread, so that the list decreases strictly inside [0, T − 1].

    Raises ValueError for l outside [1, T], γ < 0 or an unknown stage.
    """
    total = checks.whole_number("num_train_timesteps", num_train_timesteps, 1, 2**31)
    num_steps, gamma = _check_num_steps(num_steps, total), _check_gamma(gamma)

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
        steps[i] = max(steps[i], below)
    return steps


def schedule_name(timesteps: Sequence[float], num_train_timesteps: int = 1000) -> str:
    """A name for a list of time-steps: "uniform", "early, γ = 60", or its two ends if it is neither or too short.

    A list is uniform if its gaps differ by at most one; γ is searched among the whole numbers up to 300, and omitted if
    several give the same list.
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


def _check_gamma(gamma: float) -> float:
    number = checks.finite_number("gamma", gamma)
    if number < 0:
        raise ValueError(f"gamma {gamma} is not possible: expected a finite number of at least 0")
    return number


def _check_num_steps(num_steps: int, total: int) -> int:
    num_steps = checks.whole_number("num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"{num_steps} steps are not possible: expected at least 1")
    if num_steps > total:
        raise ValueError(
            f"{num_steps} steps are more than the {total} of the training schedule: ask for at most {total}"
        )
    return num_steps


def _betas(config: Mapping[str, Any]) -> Float[Tensor, " T"]:
    """β_t in float64 from the configuration's `trained_betas` or `beta_schedule`."""
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
    """√(SNR/(1 + SNR)) at s = 0 … 1, SNR = (1 − |1 − 2s| + 1e-6)^(∓1/2), as in diffusers' DDPMScheduler."""
    from_middle = 1 - 2 * torch.arange(total + 1, dtype=torch.float64) / total
    log_snr = -0.5 * torch.where(from_middle < 0, -1.0, 1.0) * (1 - from_middle.abs() + 1e-6).log()
    return log_snr.sigmoid().sqrt()


def _rescale_zero_terminal_snr(alpha_bar: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Shift and scale √ᾱ so that it ends at 0 and begins where it began (Lin et al. 2024, Algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
