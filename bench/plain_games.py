"""The deletion and insertion games, and LIME, written the obvious way: what an engine is compared with.

One latent a forward with its guidance pair, one image a decoding and a feature pass, NumPy for what is deleted.
Nothing of dfengine runs in it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from plain import Plain
from scipy.ndimage import convolve
from skimage.segmentation import quickshift
from sklearn.linear_model import Ridge
from torch import Tensor

#: C3 of the structure term for a range of 1.
C3 = 0.03**2 / 2


class Games:
    """One step of one generation, whose latent is perturbed."""

    def __init__(
        self, pipeline: Any, prompt: str, latent: Tensor, timestep: int, guidance: float, features: Callable[..., Any]
    ) -> None:
        self.pipeline, self.latent, self.timestep, self.features = pipeline, latent, timestep, features
        self.network = Plain(pipeline, prompt, latent, timestep, guidance, guided=True)

    @torch.no_grad()
    def look(self, x: np.ndarray) -> np.ndarray:
        """Features of the image that a latent's next step decodes to."""
        latent = torch.from_numpy(x)[None].to(self.latent)
        following = self.pipeline.scheduler.step(self.network.answer(latent), self.timestep, latent).prev_sample
        vae = self.pipeline.vae
        image = vae.decode(following / vae.config.scaling_factor).sample / 2 + 0.5
        return self.features(image.clamp(0, 1))[0].cpu().numpy()

    def curves(self, saliency: np.ndarray) -> np.ndarray:
        """Features of every point of both curves."""
        r = self.latent.cpu().numpy()
        away = np.arange(11) - 5
        taps = np.exp(-(away**2 + away[:, None] ** 2) / 50)
        blurred = np.stack([convolve(channel, taps / taps.sum(), mode="reflect") for channel in r])
        order = np.argsort(-saliency, axis=None, kind="stable")
        width = r.shape[2]
        found = []
        for start, end in ((r, np.zeros_like(r)), (blurred, r)):
            for k in range(r.shape[1] + 1):
                x = start.copy().reshape(len(r), -1)
                x[:, order[: k * width]] = end.reshape(len(r), -1)[:, order[: k * width]]
                found.append(self.look(x.reshape(r.shape).astype(np.float32)))
        return np.stack(found).reshape(2, r.shape[1] + 1, -1)


@torch.no_grad()
def lime(network: Plain, image: np.ndarray, samples: int) -> np.ndarray:
    """Coefficients of segments, one sample a forward."""
    generator, distance, segments = np.random.default_rng(0), 200.0, np.zeros(1)
    height, width = network.latent.shape[1:]
    while len(np.unique(segments)) < 4:
        segments = quickshift(image, kernel_size=4, max_dist=distance, ratio=0.2)
        step = segments.shape[0] // height
        segments, distance = segments[step // 2 :: step, step // 2 :: step], distance / 2
    names, segments = np.unique(segments, return_inverse=True)
    segments = segments.reshape(height, width)
    kept = generator.random((samples, len(names))) < 0.5
    kept[0] = True
    scores = []
    for one in kept:
        mask = torch.from_numpy(one[segments]).to(network.latent.device)
        a, b = network.answer(network.latent[None] * mask)[0], network.reference[0]
        a, b = (x - x.mean((1, 2), keepdim=True) for x in (a, b))
        root = (a.square().mean((1, 2)) * b.square().mean((1, 2))).sqrt()
        scores.append(float((((a * b).mean((1, 2)) + C3) / (root + C3)).mean()))
    distances = 1 - np.sqrt(kept.mean(1))
    weights = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    return Ridge(alpha=1).fit(kept.astype(float), scores, sample_weight=weights).coef_[segments]


def drawn(shape: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    """Masks of normal numbers above 0."""
    generator = np.random.default_rng(0)
    return (generator.standard_normal(shape) > 0 for _ in range(count))
