"""DF-RISE written the obvious way, as the authors' code has it: what an engine is compared with.

One mask a forward with its guidance pair, masks drawn by NumPy and copied to the device, windowed SSIM in PyTorch, the
weighted mask copied back and summed in NumPy. Nothing of dfengine runs in it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: C3 of the structure term for a range of 1, and SSIM's Gaussian window.
C3, WINDOW, SIGMA = 0.03**2 / 2, 11, 1.5


class Plain:
    """A pipeline explained at one step; `guided` is the released code's pair of forwards, otherwise one."""

    @torch.no_grad()
    def __init__(
        self, pipeline: Any, prompt: str, latent: Tensor, timestep: int, guidance: float, guided: bool
    ) -> None:
        self.unet, self.latent = pipeline.unet, latent.to(pipeline.unet.device)
        self.timestep, self.guidance, self.guided = timestep, guidance, guided
        given, without, *pooled = pipeline.encode_prompt(
            prompt=prompt, device=pipeline.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        self.text, self.added = (torch.cat([without, given]) if guided else given), None
        if pooled:  # SDXL
            size = self.unet.config.sample_size * pipeline.vae_scale_factor
            sizes = torch.tensor([[size, size, 0, 0, size, size]], device=pipeline.unet.device)
            self.added = {
                "text_embeds": torch.cat(pooled[::-1]) if guided else pooled[0],
                "time_ids": sizes.repeat(len(self.text), 1),
            }
        away = torch.arange(WINDOW) - WINDOW // 2
        taps = torch.exp(-(away**2) / (2 * SIGMA**2))
        channels = latent.shape[0]
        self.window = (taps[:, None] * taps).expand(channels, 1, WINDOW, WINDOW).to(self.latent)
        self.inside = self._sum(torch.ones_like(self.latent[None]))
        self.reference = self.answer(self.latent[None])

    def answer(self, x: Tensor) -> Tensor:
        """f(x), float32."""
        x = x.to(self.unet.dtype)
        x = torch.cat([x, x]) if self.guided else x
        epsilon = self.unet(x, self.timestep, self.text, added_cond_kwargs=self.added).sample.float()
        if not self.guided:
            return epsilon
        without, given = epsilon.chunk(2)
        return without + self.guidance * (given - without)

    def structure(self, a: Tensor, b: Tensor) -> Tensor:
        """s(a, b) in a Gaussian window, mean over channels, [h, w]."""
        mean_a, mean_b = self._mean(a), self._mean(b)
        variance_a = (self._mean(a * a) - mean_a**2).clamp(min=0)
        variance_b = (self._mean(b * b) - mean_b**2).clamp(min=0)
        covariance = self._mean(a * b) - mean_a * mean_b
        return ((covariance + C3) / ((variance_a * variance_b).sqrt() + C3)).mean(1)[0]

    def _mean(self, x: Tensor) -> Tensor:
        return self._sum(x) / self.inside

    def _sum(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.window, padding=WINDOW // 2, groups=len(self.window))

    @torch.no_grad()
    def maps(self, masks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Σ M s as printed, and Σ M s / Σ M, of masks bool [h, w]."""
        total, kept = np.zeros(self.latent.shape[1:]), np.zeros(self.latent.shape[1:])
        for mask in masks:
            masked = self.latent[None] * torch.from_numpy(mask).to(self.latent.device)
            score = self.structure(self.answer(masked), self.reference)
            total += mask * score.cpu().numpy()
            kept += mask
        return total, total / np.maximum(kept, 1)


def drawn(shape: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """Masks of normal numbers above 0, by NumPy."""
    generator = np.random.default_rng()
    return (generator.standard_normal(shape) > 0 for _ in range(count))
