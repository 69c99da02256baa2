"""DF-RISE, DF-CAM and LIME with the departures from the paper's equations that the authors' released code makes.

Each explainer here is the one of the same method elsewhere but for what its docstring says. The sampler, the masks and
the names of layers are the engine's own, so that the maps of the two can be compared one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import dfkernels
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser, Layer
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap
from dfengine.explain.cam import Cam, by_layer, tapped
from dfengine.explain.lime import Lime
from dfengine.explain.masking import Masking
from dfengine.explain.rise import Rise
from dfengine.explain.rise_settings import RiseSettings
from dfengine.explain.steps import Steps, check_scale, in_range

SIMILARITIES = ("structure", "contrast", "cosine")

WINDOW, SIGMA = 15, 1.5
#: Segments of LIME that are painted.
PAINTED = 5
#: C₃ = C₂ / 2, C₂ = (0.03 L)², L = 1.
C3 = 0.03**2 / 2

_ATTENTION_OF_MID_BLOCK = "mid_block.attentions."


# DF-RISE -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class XDiffusionRise:
    """DF-RISE as released: S = Σ_n M_n ⊙ s(f(R⊙M_n), x_next).

    f is the guided prediction, x_next the latent that the unmasked step leads to (the paper: f(R) itself), s the
    similarity of `released_similarity`, and every mask keeps half of the pixels. The masks are those of `Rise`.
    """

    num_masks: int = 500
    """N a step"""
    similarity: str = "structure"
    """"structure"; "contrast", which is structure again; or "cosine", over the channels of a pixel"""
    name: str = "rise"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        if self.similarity not in SIMILARITIES:
            raise ValueError(
                f"similarity {self.similarity!r} is not among those of the released code: expected one of "
                f"{', '.join(SIMILARITIES)}, or Rise, which has others"
            )
        object.__setattr__(self, "num_masks", self.settings.num_masks)

    @property
    def settings(self) -> Rise:
        """The same in the terms of DF-RISE, as far as it has them."""
        return Rise(
            self.num_masks,
            keep_probability=0.5,
            similarity=self.similarity,
            score="local",
            estimator="sum",
            window=WINDOW,
            sigma=SIGMA,
            target="guided",
            name=self.name,
        )

    def num_forwards(self, num_steps: int) -> int:
        """Both halves of the guidance for every mask, and once for x_next."""
        return self.settings.num_forwards(num_steps)

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a mask, and errors."""
        return self.settings.contents(denoiser, job)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream a map for every step of every trajectory that is to be explained."""
        rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
        if set(rows) - set(done):
            yield from _ReleasedMasking(self.settings, denoiser, trajectories, rows, done).run()


class _ReleasedMasking(Masking):
    """The hot loop of DF-RISE with another reference and another similarity."""

    def __init__(
        self,
        rise: RiseSettings,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        rows: Sequence[tuple[int, int]],
        done: Collection[tuple[int, int]],
    ) -> None:
        # −1 is the end of the list, as NoiseSchedule.step has it. First, since the references are made at once.
        following = [(*trajectories[i].job.timesteps[1:], -1)[k] for i, k in rows]
        self.following = torch.tensor(following, device=denoiser.device)
        super().__init__(rise, denoiser, trajectories, rows, done)

    def _refer(self, rows: Int[Tensor, " n"], _: range) -> None:
        """x_next of some rows: their guided DDIM step to the list's next entry, or to its end."""
        real = rows.clamp(min=0)
        prediction = self.explained(self.latents[real], self.timesteps[real], self.items[real])
        self.references[rows] = self.denoiser.schedule.step(prediction, self.following[real])

    def _accumulate(
        self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        assert isinstance(self.rise.similarity, str)
        scores = released_similarity(answers, self.references[rows.clamp(min=0)], self.rise.similarity)
        dfkernels.add(self.sums, scores, self.seeds, self.steps, rows, indices, **self.masks)
        return scores.mean((1, 2))


def released_similarity(
    a: Float[Tensor, "n c h w"], b: Float[Tensor, "n c h w"], kind: str = "structure"
) -> Float[Tensor, "n h w"]:
    """Similarity of a = f(R⊙M) and b = x_next around each pixel, the mean over channels.

        structure, contrast   (2σ_ab + C₃) / (σ_a σ_b + C₃)          the paper: (σ_ab + C₃) / …
        cosine                a·b / (‖a‖ ‖b‖), over channels

    σ² = E[x²] − E[x]² and σ_ab = E[ab] − E[a]E[b] under `zero_padded_mean`. NaN where a variance is below 0, which
    rounding makes of a constant neighbourhood.
    """
    if kind == "cosine":
        return F.cosine_similarity(a, b, dim=1, eps=1e-6)
    mean_a, mean_b, square_a, square_b, product = zero_padded_mean(torch.stack((a, b, a * a, b * b, a * b)))
    sigma_a, sigma_b = (square_a - mean_a**2).sqrt(), (square_b - mean_b**2).sqrt()
    return ((2 * (product - mean_a * mean_b) + C3) / (sigma_a * sigma_b + C3)).mean(1)


def zero_padded_mean(x: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Σ_k g_k x_{λ+k}, Σ g = 1 over the whole window, x = 0 outside the image: towards the border it falls.

    Shifted sums: a convolution may be rounded to TF32, which would make negative variances of its own.
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


@dataclass(frozen=True)
class XDiffusionCam:
    """DF-CAM as released, of every layer but the mid block's attention.

    y = Σ f(R_t | prompt) + Σ f(R_t | negative); of a feature map A with ∂y/∂A = G in either half of the guidance w,
    A = A_n + w (A_p − A_n), G = G_n + w (G_p − G_n), α_k = mean_ij G^k_ij, L = ReLU(Σ_k α_k A^k).
    """

    scale: float = 256.0
    """what y is multiplied by while gradients are taken in float16, which loses small ones; divided out again"""
    name: str = "cam"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        check_scale(self.scale)

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward of both halves a step."""
        return 4 * num_steps

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The layers that are looked at. Raises ValueError where there are none."""
        return OutputSpec(layers={name: layer.shape[1:] for name, layer in self.chosen(denoiser).items()})

    def chosen(self, denoiser: Denoiser) -> dict[str, Layer]:
        """43 of the 44 layers of Stable Diffusion 1 and 2. Raises ValueError where there are none."""
        layers = Cam().chosen(denoiser)
        return {name: layer for name, layer in layers.items() if not name.startswith(_ATTENTION_OF_MID_BLOCK)}

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of every step of every trajectory that is to be explained.

        Raises ValueError where the network has no layers to look at.
        """
        layers = self.chosen(denoiser)
        prompts = Condition.cat([path.prompt for path in trajectories])
        negatives = Condition.cat([path.negative for path in trajectories])
        guidance = torch.tensor([path.job.guidance for path in trajectories], device=denoiser.device)

        def work(steps: Steps) -> dict[str, Tensor]:
            both = Condition.cat([negatives[steps.items], prompts[steps.items]])
            return _halves(denoiser, layers, steps, both, guidance[steps.items], self.scale)

        yield from by_layer(self.name, denoiser, trajectories, done, work)


def _halves(
    denoiser: Denoiser,
    layers: Mapping[str, Layer],
    steps: Steps,
    both: Condition,
    guidance: Float[Tensor, " n"],
    scale: float,
) -> dict[str, Float[Tensor, "n _ _"]]:
    """L of every layer, at its own resolution; `both` is the negative prompts, then the prompts."""
    latents, timesteps = torch.cat([steps.latents] * 2), torch.cat([steps.timesteps] * 2)

    def target(deltas: dict[str, Tensor], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
        with tapped(layers, deltas) as features:
            output = denoiser.predict(latents, timesteps, both)
        return scale * denoiser.schedule.epsilon(output, latents, timesteps).sum(), features

    def guided(of_both: Tensor) -> Tensor:
        without, given = of_both.float().chunk(2)
        return without + guidance.reshape(-1, *[1] * (given.ndim - 1)) * (given - without)

    def maps(scale: float) -> dict[str, Tensor]:
        gradients, features = torch.func.grad(target, has_aux=True)(zeros, scale)
        alphas = {name: guided(gradients.pop(name).float().mean((2, 3))) / scale for name in layers}
        return {name: F.relu(torch.einsum("nk,nkuv->nuv", alphas[name], guided(features[name]))) for name in layers}

    zeros = {
        name: torch.zeros(len(latents), *layer.shape, dtype=denoiser.dtype, device=denoiser.device)
        for name, layer in layers.items()
    }
    with denoiser.differentiable():
        return in_range(denoiser.dtype, scale, maps, lambda found: found.values())


# LIME ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class XDiffusionLime(Lime):
    """LIME as released: segments of the image made as small as the latent, which is painted, and its brightness ranked.

    The segments of the five largest coefficients are painted: their green is the image's brightest value.
    """

    def segments(self, image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
        """Quickshift's segments of the small image, numbered from 0."""
        return super().segments((small(image, shape) * 255).round().astype(np.uint8), shape)

    def paint(
        self, coefficients: Float[ndarray, " segments"], segments: Int[ndarray, "h w"], image: UInt8[ndarray, "H W 3"]
    ) -> Float[ndarray, "h w"]:
        """The mean of the painted image's red, green and blue, each in [0, 1]; NaN without coefficients."""
        if not np.isfinite(coefficients).all():
            return np.full(segments.shape, np.nan)
        painted = small(image, segments.shape)
        first = np.argsort(-np.abs(coefficients), kind="stable")[:PAINTED]
        painted[np.isin(segments, first), 1] = painted.max()
        return painted.mean(-1)


def small(image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Float[ndarray, "h w 3"]:
    """An image in [0, 1] at the latent's size: bilinear, antialiased."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255
    return F.interpolate(pixels, shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


# Any -----------------------------------------------------------------------------------------------------------------


def to_xdiffusion(explainer: Explainer) -> Explainer:
    """The explainer of the same method as the released code has it; of another method, the same.

    Raises ValueError for settings that the released code does not have.
    """
    if isinstance(explainer, Rise):
        released = XDiffusionRise(explainer.num_masks, explainer.similarity, explainer.name)  # type: ignore[arg-type]
        _refuse(explainer, Rise(explainer.num_masks, similarity=explainer.similarity, name=explainer.name))
        return released
    if isinstance(explainer, Cam):
        _refuse(explainer, Cam(scale=explainer.scale, name=explainer.name))
        return XDiffusionCam(scale=explainer.scale, name=explainer.name)
    if isinstance(explainer, Lime):
        return XDiffusionLime(**asdict(explainer))
    return explainer


def _refuse(given: Rise | Cam, possible: Rise | Cam) -> None:
    """Raise ValueError where settings are not those that can be had."""
    for name, value in asdict(given).items():
        if value != asdict(possible)[name]:
            raise ValueError(
                f"{name}={value!r} is not what the released code does: leave it out, or take the paper's behaviour"
            )
