"""DF-RISE, DF-CAM and LIME with the departures from the paper's equations that the authors' released code makes.

Each class is the explainer of the same method but for what its docstring says. Sampler, masks and layer names are the
engine's own, so that the maps of both can be compared one by one. docs/xdiffusion.md lists all differences.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser, Layer
from dfengine.diffusion.job import Job
from dfengine.diffusion.path import END
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.cam import Cam, by_layer, feature_gradients, weighted_map
from dfengine.explain.lime import Lime
from dfengine.explain.registry import register
from dfengine.explain.rise import Rise, check_num_masks
from dfengine.explain.rise_forwards import RiseForwards
from dfengine.explain.steps import Steps, check_loss_scale, with_loss_scaling

SIMILARITIES = ("structure", "contrast", "cosine")

WINDOW, SIGMA = 15, 1.5
#: LIME paints the segments of so many coefficients.
NUM_PAINTED = 5
#: C₃ = C₂ / 2, C₂ = (0.03 L)², L = 1.
C3 = 0.03**2 / 2

_MID_BLOCK_ATTENTION = "mid_block.attentions."


# DF-RISE -------------------------------------------------------------------------------------------------------------


@register(
    "xdiffusion-rise",
    label="DF-RISE (released code)",
    hot="summed over the masks that keep this pixel, the guided prediction resembles the next latent: "
    "a base rate, no attribution.",
)
@dataclass(frozen=True)
class XDiffusionRise(Explainer):
    """DF-RISE as released: S = Σ_n M_n ⊙ s(f(R⊙M_n), x_next).

    f is the guided prediction, x_next the latent that the unmasked step leads to (the paper: f(R) itself), s is
    `released_similarity`, and every mask keeps half of the pixels. The masks are those of `Rise`.
    """

    #: The prediction that is explained.
    target: ClassVar[str] = "guided"

    num_masks: int = option(500, "masks a step")
    similarity: str = option("structure", "structure; contrast, which is structure again; or cosine over channels")
    name: str = option("rise", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for a similarity that the released code does not have, or an impossible number of masks."""
        super().__post_init__()
        if self.similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity {self.similarity!r} is not among those of the released code: expected one of "
                f"{', '.join(SIMILARITIES)}, or Rise, which has others"
            )
        check_num_masks(self.num_masks)

    @property
    def settings(self) -> Rise:
        """The nearest settings of `Rise`: masks, target and sums are those."""
        return Rise(
            num_masks=self.num_masks,
            output="epsilon",
            similarity="structure",
            score="local",
            estimator="sum",
            cell=1,
            shifted=False,
            design="iid",
            keep_probability=0.5,
            window=WINDOW,
            sigma=SIGMA,
            target="guided",
            name=self.name,
        )

    def num_forwards(self, num_steps: int) -> int:
        return self.settings.num_forwards(num_steps)

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a mask, and errors."""
        return OutputSpec(num_masks=self.num_masks, has_error=True)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        yield from _XDiffusionForwards(self, denoiser, trajectories, done).run()


class _XDiffusionForwards(RiseForwards):
    """The hot loop of DF-RISE with another reference and another similarity."""

    def __init__(
        self,
        rise: XDiffusionRise,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        done: Collection[tuple[int, int]] = (),
    ) -> None:
        super().__init__(rise.settings, denoiser, trajectories, done)
        self.similarity = rise.similarity
        following = [(*trajectories[i].job.timesteps[1:], END)[k] for i, k in self.rows]
        self.next_timesteps = torch.tensor(following, device=denoiser.device)

    def compute_references(self, rows: Int[Tensor, " n"], _: range) -> None:
        """x_next of some rows: their guided deterministic step to the list's next entry, or to its end."""
        real = rows.clamp(min=0)
        prediction = self.explained(self.latents[real], self.timesteps[real], self.items[real])
        self.references[rows] = self.denoiser.schedule.step(prediction, self.next_timesteps[real])

    def accumulate(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        epsilon = self.read(outputs, masked, rows)
        return self.add(
            released_similarity(epsilon, self.references[rows.clamp(min=0)], self.similarity), rows, indices
        )


def released_similarity(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], kind: str = "structure"
) -> Float[Tensor, "n h w"]:
    """Local similarity of a = f(R⊙M) and b = x_next, the mean over channels.

        structure, contrast   (2σ_ab + C₃) / (σ_a σ_b + C₃)          the paper: (σ_ab + C₃) / …
        cosine                a·b / (‖a‖ ‖b‖), over channels

    σ² = E[x²] − E[x]² and σ_ab = E[ab] − E[a]E[b] under `zero_padded_mean`. NaN where rounding makes the variance of a
    constant neighbourhood negative.
    """
    if kind == "cosine":
        return F.cosine_similarity(a, b, dim=1, eps=1e-6)
    mean_a, mean_b, square_a, square_b, product = zero_padded_mean(torch.stack((a, b, a * a, b * b, a * b)))
    sigma_a, sigma_b = (square_a - mean_a**2).sqrt(), (square_b - mean_b**2).sqrt()
    return ((2 * (product - mean_a * mean_b) + C3) / (sigma_a * sigma_b + C3)).mean(1)


def zero_padded_mean(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Σ_k g_k x_{λ+k}, with Σ g = 1 over the whole window and x = 0 outside the image, so that it falls at the border.

    Computed as shifted sums: a convolution may round to TF32, which would add negative variances of its own.
    """
    radius = WINDOW // 2
    weights = [math.exp(-0.5 * (k / SIGMA) ** 2) for k in range(-radius, radius + 1)]
    for dim, padding in ((-1, (radius, radius)), (-2, (0, 0, radius, radius))):
        size, padded = x.shape[dim], F.pad(x, padding)
        x = torch.zeros_like(x)
        for k, weight in enumerate(weights):
            x.add_(padded.narrow(dim, k, size), alpha=weight / sum(weights))
    return x


# DF-CAM --------------------------------------------------------------------------------------------------------------


@register(
    "xdiffusion-cam",
    label="DF-CAM (released code)",
    form="layers",
    hot="the layers' guided features here raise the sum of the predicted noise.",
)
@dataclass(frozen=True)
class XDiffusionCam(Explainer):
    """DF-CAM as released, of every layer except the mid block's attention.

    y = Σ f(R_t | prompt) + Σ f(R_t | negative). A feature map A and its gradient G = ∂y/∂A have a conditional (c) and
    an unconditional (u) half; with the guidance scale w, A = A_u + w (A_c − A_u) and G = G_u + w (G_c − G_u), then
    α_k = mean_ij G^k_ij and L = ReLU(Σ_k α_k A^k).
    """

    loss_scale: float = option(256.0, "factor on y while float16 gradients are taken, divided out again")
    name: str = option("cam", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError if the loss scale is not positive."""
        super().__post_init__()
        check_loss_scale(self.loss_scale)

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward of both halves a step."""
        return 4 * num_steps

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The layers. Raises ValueError if the model has none, or no gradients."""
        denoiser.require_gradients("DF-CAM")
        return OutputSpec(layers={name: layer.shape[1:] for name, layer in self.select_layers(denoiser).items()})

    def select_layers(self, denoiser: Denoiser) -> dict[str, Layer]:
        """43 of the 44 layers of Stable Diffusion 1 and 2. Raises ValueError if the model has none."""
        layers = Cam().select_layers(denoiser)
        return {name: layer for name, layer in layers.items() if not name.startswith(_MID_BLOCK_ATTENTION)}

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        layers = self.select_layers(denoiser)
        negatives = Condition.cat([path.negative for path in trajectories])
        guidance = torch.tensor([max(path.job.guidance, 1.0) for path in trajectories], device=denoiser.device)

        def maps(steps: Steps) -> dict[str, Tensor]:
            halves = Condition.cat([negatives[steps.items], steps.condition])
            return _guided_maps(denoiser, layers, steps, halves, guidance[steps.items], self.loss_scale)

        yield from by_layer(self.name, denoiser, trajectories, done, maps)


def _guided_maps(
    denoiser: Denoiser,
    layers: Mapping[str, Layer],
    steps: Steps,
    halves: Condition,
    guidance: Float[Tensor, " n"],
    loss_scale: float,
) -> dict[str, Float[Tensor, "n _ _"]]:
    """L of every layer, at its own resolution; `halves` has the negative prompts, then the prompts."""
    latents, timesteps = torch.cat([steps.latents] * 2), torch.cat([steps.timesteps] * 2)

    def guide(values: Tensor) -> Tensor:
        unconditional, conditional = values.float().chunk(2)
        weight = guidance.reshape(-1, *[1] * (conditional.ndim - 1))
        return unconditional + weight * (conditional - unconditional)

    def maps(scale: float) -> dict[str, Tensor]:
        gradients, features = feature_gradients(denoiser, layers, latents, timesteps, halves, loss_scale=scale)
        alphas = {name: guide(gradients.pop(name).float().mean((2, 3))) / scale for name in layers}
        return {name: weighted_map(alphas[name], guide(features[name])) for name in layers}

    return with_loss_scaling(denoiser.dtype, loss_scale, maps, lambda result: result.values())


# LIME ----------------------------------------------------------------------------------------------------------------


@register(
    "xdiffusion-lime",
    label="LIME (released code)",
    hot="bright in the image in which the five strongest segments are painted green.",
)
@dataclass(frozen=True)
class XDiffusionLime(Lime):
    """LIME as released: segments of the image resized to the latent, painted, and ranked by brightness.

    The segments of the five largest coefficients are painted: their green is the image's brightest value.
    """

    segmentation: str = option("quickshift", "quickshift, as released, or slic")

    def segment(self, image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
        """Quickshift's segments of the resized image, numbered from 0."""
        return super().segment((resize(image, shape) * 255).round().astype(np.uint8), shape)

    def to_map(
        self, coefficients: Float[ndarray, " segments"], segments: Int[ndarray, "h w"], image: UInt8[ndarray, "H W 3"]
    ) -> Float[ndarray, "h w"]:
        """The mean of the painted image's red, green and blue, each in [0, 1]; NaN without coefficients."""
        if not np.isfinite(coefficients).all():
            return np.full(segments.shape, np.nan)
        painted = resize(image, segments.shape)
        largest = np.argsort(-np.abs(coefficients), kind="stable")[:NUM_PAINTED]
        painted[np.isin(segments, largest), 1] = painted.max()
        return painted.mean(-1)


def resize(image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Float[ndarray, "h w 3"]:
    """An image in [0, 1] at the latent's size: bilinear, antialiased."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    return F.interpolate(pixels, shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
