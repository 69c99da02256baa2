"""A plain implementation of DF-RISE, as in the authors' code: the baseline of the speed comparisons.

One mask in a forward with its guidance pair; masks drawn by NumPy and copied to the device; windowed SSIM in PyTorch;
the weighted mask copied back and summed in NumPy. It uses nothing from dfengine.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: C3 of the structure term for a range of 1, and the Gaussian window of SSIM.
C3, WINDOW, SIGMA = 0.03**2 / 2, 11, 1.5


class Plain:
    """Explains one step of a pipeline: with `guided` by the released code's pair of forwards, otherwise by one."""

    @torch.no_grad()
    def __init__(
        self, pipeline: Any, prompt: str, latent: Tensor, timestep: float, guidance: float, guided: bool
    ) -> None:
        self.unet, self.latent = pipeline.unet, latent.to(pipeline.unet.device)
        self.timestep, self.guidance, self.guided = timestep, guidance, guided
        conditional, unconditional, *pooled = pipeline.encode_prompt(
            prompt=prompt, device=pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        self.text = torch.cat([unconditional, conditional]) if guided else conditional
        self.added = None
        if pooled:  # SDXL
            size = self.unet.config.sample_size * pipeline.vae_scale_factor
            sizes = torch.tensor([[size, size, 0, 0, size, size]], device=pipeline.unet.device)
            self.added = {
                "text_embeds": torch.cat(pooled[::-1]) if guided else pooled[0],
                "time_ids": sizes.repeat(len(self.text), 1),
            }
        offsets = torch.arange(WINDOW) - WINDOW // 2
        taps = torch.exp(-(offsets**2) / (2 * SIGMA**2))
        self.window = (taps[:, None] * taps).expand(latent.shape[0], 1, WINDOW, WINDOW).to(self.latent)
        self.weight_inside = self._window_sum(torch.ones_like(self.latent[None]))
        self.reference = self.predict(self.latent[None])

    def predict(self, x: Tensor) -> Tensor:
        """f(x), float32."""
        x = x.to(self.unet.dtype)
        x = torch.cat([x, x]) if self.guided else x
        epsilon = self.unet(x, self.timestep, self.text, added_cond_kwargs=self.added).sample.float()
        if not self.guided:
            return epsilon
        unconditional, conditional = epsilon.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def structure(self, a: Tensor, b: Tensor) -> Tensor:
        """The structure term s(a, b) in a Gaussian window, mean over channels, [h, w]."""
        mean_a, mean_b = self._window_mean(a), self._window_mean(b)
        variance_a = (self._window_mean(a * a) - mean_a**2).clamp(min=0)
        variance_b = (self._window_mean(b * b) - mean_b**2).clamp(min=0)
        covariance = self._window_mean(a * b) - mean_a * mean_b
        return ((covariance + C3) / ((variance_a * variance_b).sqrt() + C3)).mean(1)[0]

    def _window_mean(self, x: Tensor) -> Tensor:
        return self._window_sum(x) / self.weight_inside

    def _window_sum(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.window, padding=WINDOW // 2, groups=len(self.window))

    @torch.no_grad()
    def maps(self, masks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Σ M s, as the paper prints it, and Σ M s / Σ M, [h, w], from masks bool [h, w]."""
        total, kept = np.zeros(self.latent.shape[1:]), np.zeros(self.latent.shape[1:])
        for mask in masks:
            masked = self.latent[None] * torch.from_numpy(mask).to(self.latent.device)
            score = self.structure(self.predict(masked), self.reference)
            total += mask * score.cpu().numpy()
            kept += mask
        return total, total / np.maximum(kept, 1)


def random_masks(shape: tuple[int, int], count: int, seed: int | None = None) -> Iterator[np.ndarray]:
    """Masks that keep a pixel where a normal random number of NumPy is above 0."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) > 0 for _ in range(count))
