"""The sampling loop, batched over jobs: R_t and ε(R_t) of every step, and the image they end in."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.path import END


@dataclass(frozen=True)
class Trajectory:
    """One finished generation, from which everything that is explained is computed.

    Tensors are float32 on the denoiser's device.
    """

    job: Job
    latents: Float[Tensor, "steps c h w"]
    """R_t at each step"""
    epsilon: Float[Tensor, "steps c h w"]
    """ε(R_t), with guidance"""
    x0: Float[Tensor, "steps c h w"] | None
    """the clean latent predicted at each step, with guidance; None in a trajectory restored from a file"""
    signal: Float[Tensor, " steps"]
    """a of each step: R_t = a·x0 + b·n"""
    noise: Float[Tensor, " steps"]
    """b of each step"""
    image: UInt8[Tensor, "H W 3"]
    """on the CPU"""
    prompt: Condition
    negative: Condition
    explain_steps: Sequence[int] = ()
    """indices of the steps to explain; empty means all"""

    def __post_init__(self) -> None:
        """Raises ValueError for a step outside the trajectory."""
        object.__setattr__(self, "explain_steps", tuple(map(operator.index, self.explain_steps)))
        if outside := [step for step in self.explain_steps if not 0 <= step < len(self.latents)]:
            raise ValueError(f"step {outside[0]} is outside [0, {len(self.latents) - 1}]: steps index the time-steps")

    @property
    def steps(self) -> Sequence[int]:
        """Indices of the steps to explain."""
        return self.explain_steps or range(len(self.latents))

    @property
    def mean_colour(self) -> Float[Tensor, " c"]:
        """Each channel's mean over pixels of the clean latent that the last step predicts.

        Raises ValueError if nothing is left of the image there (a = 0).
        """
        if not self.signal[-1] > 0:
            raise ValueError(
                "the trajectory ends where nothing is left of the image (a = 0), so that noise cannot take hidden "
                "places: fill them with zero, or sample on to the image"
            )
        return ((self.latents[-1] - self.noise[-1] * self.epsilon[-1]) / self.signal[-1]).mean((1, 2))

    def __len__(self) -> int:
        return len(self.latents)


def start_noise(seed: int, shape: tuple[int, int, int]) -> Float[Tensor, "c h w"]:
    """N(0, 1) drawn on the CPU in float32, so that a seed is the same noise on every device and in every batch."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def trajectories(denoiser: Denoiser, jobs: Sequence[Job]) -> list[Trajectory]:
    """Sample all jobs together by the deterministic step; they must have equally many steps.

    Raises ValueError for a job that the model cannot be told about, or an image of another size than it generates.
    """
    if len({len(job.timesteps) for job in jobs}) > 1:
        raise ValueError("jobs sampled together must have equally many steps")
    schedule, device = denoiser.schedule, denoiser.device
    prompts, negatives = denoiser.condition(jobs), denoiser.condition(jobs, negative=True)
    guided = GuidedDenoiser(denoiser, prompts, negatives, "guided", [job.guidance for job in jobs])
    rows = torch.arange(len(jobs), device=device)
    timesteps = torch.tensor([job.timesteps for job in jobs], device=device)
    following = torch.cat([timesteps[:, 1:], torch.full_like(timesteps[:, :1], END)], dim=1)
    noise = torch.stack([start_noise(job.seed, denoiser.latent_shape) for job in jobs]).to(device)
    given = {i: _encode(denoiser, job.image) for i, job in enumerate(jobs) if job.image is not None}

    latents, predictions = [], []
    x = noise.clone()
    for t, t_next in zip(timesteps.T, following.T, strict=True):
        for i, clean in given.items():
            x[i] = schedule.add_noise(clean, noise[i : i + 1], t[i : i + 1])[0]
        latents.append(x)
        predictions.append(guided(x, t, rows))
        x = schedule.step(predictions[-1], t_next)
    for i, (job, final) in enumerate(zip(jobs, x, strict=True)):
        if not final.isfinite().all():
            raise ValueError(_out_of_range(denoiser, job, latents[0][i : i + 1], prompts[i : i + 1]))
    images = to_bytes(denoiser.decode(x))

    return [
        Trajectory(
            job=job,
            latents=torch.stack([step[i] for step in latents]),
            epsilon=torch.stack([step.epsilon[i] for step in predictions]),
            x0=torch.stack([schedule.threshold_x0(step.x0[i : i + 1])[0] for step in predictions]),
            signal=a.flatten(),
            noise=b.flatten(),
            image=images[i] if job.image is None else job.image,
            prompt=prompts[i : i + 1],
            negative=negatives[i : i + 1],
        )
        for i, (job, (a, b)) in enumerate(zip(jobs, map(schedule.coefficients, timesteps), strict=True))
    ]


@torch.no_grad()
def restore(
    denoiser: Denoiser,
    job: Job,
    latents: Float[Tensor, "steps c h w"],
    epsilon: Float[Tensor, "steps c h w"],
    image: UInt8[Tensor, "H W 3"],
) -> Trajectory:
    """A trajectory from its stored parts."""
    device = denoiser.device
    a, b = denoiser.schedule.coefficients(torch.tensor(job.timesteps, device=device))
    with denoiser.exclusive():
        prompt, negative = denoiser.condition([job]), denoiser.condition([job], negative=True)
    return Trajectory(
        job=job,
        latents=latents.to(device),
        epsilon=epsilon.to(device),
        x0=None,
        signal=a.flatten(),
        noise=b.flatten(),
        image=image,
        prompt=prompt,
        negative=negative,
    )


def _out_of_range(denoiser: Denoiser, job: Job, start: Float[Tensor, "1 c h w"], prompt: Condition) -> str:
    """Why a generation is not finite: the network's own first prediction is not, or guidance multiplied it too far."""
    first = torch.tensor(job.timesteps[:1], device=start.device)
    if not denoiser(start, first, prompt).isfinite().all():
        return (
            f"the network's prediction for {job.prompt!r} is not finite at its first step, t = {job.timesteps[0]:g}: "
            "its weights are damaged, or overflow in this dtype; try float32"
        )
    return (
        f"the generation of {job.prompt!r} runs out of range with guidance {job.guidance}: choose a smaller one, or "
        "float32"
    )


def to_bytes(images: Float[Tensor, "n 3 H W"]) -> UInt8[Tensor, "n H W 3"]:
    """Images in [0, 1] as uint8 on the CPU."""
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def check_image(denoiser: Denoiser, image: Tensor) -> None:
    """Raises ValueError for an image that is not uint8 of the model's image size."""
    height, width = denoiser.image_shape
    if tuple(image.shape) != (height, width, 3) or image.dtype != torch.uint8:
        raise ValueError(
            f"the image is {image.dtype} {tuple(image.shape)}, but the model generates torch.uint8 "
            f"({height}, {width}, 3): resize it"
        )


def _encode(denoiser: Denoiser, image: UInt8[Tensor, "H W 3"]) -> Float[Tensor, "1 c h w"]:
    check_image(denoiser, image)
    return denoiser.encode(image.permute(2, 0, 1)[None].to(denoiser.device).float() / 255)
