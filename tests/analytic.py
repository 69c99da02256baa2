"""Denoisers whose maps can be worked out by hand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.path import NoiseSchedule
from dfengine.diffusion.trajectory import Trajectory


class Analytic(Denoiser):
    """ε = answer(x_t, condition), on latents of any small shape; decoding repeats the first channel."""

    name = "analytic"
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(
        self, answer: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, int, int] = (2, 6, 5), batch_size: int = 16
    ) -> None:
        self.answer = answer
        self.latent_shape = shape
        self.image_shape = shape[1:]
        self.batch_size = batch_size
        self.batches: list[int] = []
        self.schedule = NoiseSchedule.from_config({"clip_sample": False})

    def predict(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x_t))
        return self.answer(x_t.contiguous(), condition.tensors["number"])

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The number in the prompt, 0 if there is none."""
        return Condition({"number": torch.tensor([float(prompt or 0) for prompt in prompts])})

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :1].expand(-1, 3, -1, -1).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :1].expand(-1, self.latent_shape[0], -1, -1)

    def trajectory(self, latents: Tensor, prompt: str = "1", seed: int = 0, guidance: float = 2.0) -> Trajectory:
        """A trajectory through the given R_t, which need not be one that sampling visits."""
        steps = tuple(range(len(latents)))[::-1]
        a, b = self.schedule.coefficients(torch.tensor(steps))
        return Trajectory(
            job=Job(prompt, steps, seed=seed, guidance=guidance),
            latents=latents,
            epsilon=torch.zeros_like(latents),
            x0=latents,
            signal=a.flatten(),
            noise=b.flatten(),
            image=torch.zeros(*self.image_shape, 3, dtype=torch.uint8),
            prompt=self.encode_prompts([prompt]),
            negative=self.encode_prompts([""]),
        )


def patch_mean(rows: slice, columns: slice) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that predicts the mean of one patch of its input at every pixel."""

    def answer(x_t: Tensor, number: Tensor) -> Tensor:
        return x_t[..., rows, columns].mean((-2, -1), keepdim=True).expand_as(x_t)

    return answer


def switch(pixel: tuple[int, int], pattern: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A denoiser that predicts a pattern if one pixel is visible, and the negative pattern otherwise."""

    def answer(x_t: Tensor, number: Tensor) -> Tensor:
        is_visible = x_t[:, :1, pixel[0], pixel[1], None, None] != 0
        return torch.where(is_visible, pattern, -pattern)

    return answer
