"""Plain implementations of the deletion and insertion tests and of LIME: the baseline of the speed comparisons.

One latent in a forward with its guidance pair, one image in a decoder and a feature pass, NumPy for what is deleted.
They use nothing from dfengine.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from plain import C3, Plain
from scipy.ndimage import convolve
from skimage.segmentation import quickshift
from sklearn.linear_model import Ridge


class Games:
    """Deletion and insertion curves of maps of one step of a generation."""

    def __init__(
        self,
        pipeline: Any,
        prompt: str,
        latent: torch.Tensor,
        timestep: float,
        guidance: float,
        features: Callable[..., Any],
    ) -> None:
        self.pipeline, self.latent, self.timestep, self.features = pipeline, latent, timestep, features
        self.network = Plain(pipeline, prompt, latent, timestep, guidance, guided=True)

    @torch.no_grad()
    def image_features(self, x: np.ndarray) -> np.ndarray:
        """Features of the image that the next step of a latent decodes to."""
        latent = torch.from_numpy(x)[None].to(self.latent)
        previous = self.pipeline.scheduler.step(self.network.predict(latent), self.timestep, latent).prev_sample
        vae = self.pipeline.vae
        image = vae.decode(previous / vae.config.scaling_factor).sample / 2 + 0.5
        return self.features(image.clamp(0, 1))[0].cpu().numpy()

    def curves(self, saliency: np.ndarray) -> np.ndarray:
        """Features at every point of the deletion and of the insertion curve, [2, h + 1, features]."""
        r = self.latent.cpu().numpy()
        offsets = np.arange(11) - 5
        taps = np.exp(-(offsets**2 + offsets[:, None] ** 2) / 50)
        blurred = np.stack([convolve(channel, taps / taps.sum(), mode="reflect") for channel in r])
        order = np.argsort(-saliency, axis=None, kind="stable")
        height, width = r.shape[1:]
        points = []
        for start, end in ((r, np.zeros_like(r)), (blurred, r)):
            for row in range(height + 1):
                x = start.copy().reshape(len(r), -1)
                x[:, order[: row * width]] = end.reshape(len(r), -1)[:, order[: row * width]]
                points.append(self.image_features(x.reshape(r.shape).astype(np.float32)))
        return np.stack(points).reshape(2, height + 1, -1)


@torch.no_grad()
def lime(network: Plain, image: np.ndarray, samples: int) -> np.ndarray:
    """The coefficient of each pixel's segment, [h, w]; one sample in a forward."""
    generator = np.random.default_rng(0)
    height, width = network.latent.shape[1:]
    segments, distance = np.zeros(1), 200.0
    while len(np.unique(segments)) < 4:
        segments = quickshift(image, kernel_size=4, max_dist=distance, ratio=0.2)
        stride = segments.shape[0] // height
        segments, distance = segments[stride // 2 :: stride, stride // 2 :: stride], distance / 2
    names, segments = np.unique(segments, return_inverse=True)
    segments = segments.reshape(height, width)
    kept = generator.random((samples, len(names))) < 0.5
    kept[0] = True
    scores = []
    for sample in kept:
        mask = torch.from_numpy(sample[segments]).to(network.latent.device)
        a, b = network.predict(network.latent[None] * mask)[0], network.reference[0]
        a, b = (x - x.mean((1, 2), keepdim=True) for x in (a, b))
        root = (a.square().mean((1, 2)) * b.square().mean((1, 2))).sqrt()
        scores.append(float((((a * b).mean((1, 2)) + C3) / (root + C3)).mean()))
    distances = 1 - np.sqrt(kept.mean(1))
    weights = np.sqrt(np.exp(-(distances**2) / 0.25**2))
    return Ridge(alpha=1).fit(kept.astype(float), scores, sample_weight=weights).coef_[segments]
