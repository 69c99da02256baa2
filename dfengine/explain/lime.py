"""LIME (Ribeiro, Singh & Guestrin 2016) for a denoiser: which segments of the image its noise prediction rests on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import dfkernels
import numpy as np
import torch
from dfkernels.counters import LIME_STREAM, words
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap
from dfengine.explain.masking import Masking
from dfengine.explain.rise_settings import RiseSettings
from dfengine.runtime.batching import AsyncHostCopy

#: The fewest segments that an image is divided into.
FEWEST = 4


@dataclass(frozen=True)
class Lime:
    """The coefficients of a ridge regression of the structure score, over all pixels, on which segments are kept.

    Segments are quickshift's of the image, carried to the latent; what is not kept is zero. Samples are drawn by
    counter, the first keeps everything; each has the weight √exp(−d²/width²), d the cosine distance from that one.
    """

    num_samples: int = 1000
    kernel_size: float = 4
    """of quickshift, in pixels"""
    max_distance: float = 200
    """of quickshift: what is farther apart is another segment; halved until there are at least 4"""
    ratio: float = 0.2
    """of quickshift: how much colour counts beside nearness"""
    width: float = 0.25
    """of the samples' weights"""
    alpha: float = 1.0
    """of the ridge regression"""
    target: str = "conditional"
    """which prediction is explained"""
    name: str = "lime"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        for field in ("kernel_size", "max_distance", "ratio", "width", "alpha"):
            object.__setattr__(self, field, float(getattr(self, field)))
            if not 0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} {getattr(self, field)} is not possible: expected a number above 0")
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size {self.kernel_size} is not possible: quickshift's is at least 1 pixel")
        if self.num_samples < 2:
            raise ValueError(f"{self.num_samples} samples are not possible: expected at least 2")
        object.__setattr__(self, "num_samples", self.masking.num_masks)

    @property
    def masking(self) -> RiseSettings:
        """The samples, as masks."""
        return RiseSettings(self.num_samples, score="global", target=self.target, name=self.name)

    def num_forwards(self, num_steps: int) -> int:
        """Forwards of one latent that so many steps cost."""
        return num_steps * (self.num_samples + 1) * (2 if self.target == "guided" else 1)

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a sample."""
        return OutputSpec(num_masks=self.num_samples)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream a map for every step of every trajectory; batches fill across samples, steps and items."""
        rows = [(i, k) for i, path in enumerate(trajectories) for k in path.steps]
        if set(rows) - set(done):
            yield from _Samples(self, denoiser, trajectories, rows, done).run()

    def segments(self, image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
        """Quickshift's segments of an image, numbered from 0, each latent pixel in the one that it shows most of."""
        from skimage.segmentation import quickshift

        distance = float(self.max_distance)
        while True:
            found = quickshift(image, kernel_size=self.kernel_size, max_dist=distance, ratio=self.ratio)
            carried = carry(found, shape)
            # Below a distance of 1 every pixel is a segment by itself.
            if carried.max() + 1 >= FEWEST or distance < 1:
                return carried
            distance /= 2

    def regress(
        self, kept: Bool[ndarray, "samples segments"], scores: Float[ndarray, " samples"]
    ) -> Float[ndarray, " segments"]:
        """Each segment's coefficient, NaN of scores that are not finite.

        The cosine distance of a sample that keeps nothing is 1.
        """
        from sklearn.linear_model import Ridge

        if not np.isfinite(scores).all():
            warnings.warn("a map is not finite: the samples' scores are not", stacklevel=2)
            return np.full(kept.shape[1], np.nan)
        distance = 1 - np.sqrt(kept.mean(1))
        weight = np.sqrt(np.exp(-(distance**2) / self.width**2))
        return Ridge(alpha=self.alpha).fit(kept.astype(np.float64), scores, sample_weight=weight).coef_

    def paint(
        self, coefficients: Float[ndarray, " segments"], segments: Int[ndarray, "h w"], image: UInt8[ndarray, "H W 3"]
    ) -> Float[ndarray, "h w"]:
        """The map: each pixel has its segment's coefficient."""
        return coefficients[segments]


class _Samples(Masking):
    """The hot loop of DF-RISE with segments in place of pixels, and a regression at a row's end in place of sums."""

    def __init__(
        self,
        lime: Lime,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        rows: Sequence[tuple[int, int]],
        done: Collection[tuple[int, int]],
    ) -> None:
        super().__init__(lime.masking, denoiser, trajectories, rows, done)
        self.lime = lime
        self.images = [path.image.numpy() for path in trajectories]
        self.segments = torch.stack([torch.from_numpy(lime.segments(image, self.shape)) for image in self.images])
        self._segments = self.segments.to(denoiser.device)
        self._most = int(self.segments.max()) + 1

    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        """R ⊙ M, channels-last; zeros for padding."""
        real = rows.clamp(min=0)
        kept = drawn(self.seeds[real], self.steps[real], indices, self._most)
        mask = kept.gather(1, self._segments[self.items[real]].flatten(1)).unflatten(1, self.shape)
        masked = self.latents[real] * (mask & (rows >= 0)[:, None, None])[:, None]
        return masked.contiguous(memory_format=torch.channels_last)

    def _accumulate(
        self, answers: Float[Tensor, "n c h w"], rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        return dfkernels.similarity(answers, self.references[rows], "structure", "global")

    def _estimate(self, row: int, num_masks: int) -> tuple[()]:
        """Nothing on the device: the regression is made of the scores when they are here."""
        return ()

    def _step_map(self, row: int, download: AsyncHostCopy) -> StepMap:
        (item, step), (scores,) = self.rows[row], download.wait()
        segments = self.segments[item]
        seed, at = torch.tensor([self.mask_seeds[row]]), torch.tensor([step])
        indices = torch.arange(self.lime.num_samples)
        kept = drawn(seed.expand_as(indices), at.expand_as(indices), indices, int(segments.max()) + 1)
        coefficients = self.lime.regress(kept.numpy(), scores.double().numpy())
        painted = self.lime.paint(coefficients, segments.numpy(), self.images[item])
        return StepMap(item, step, self.rise.name, torch.from_numpy(painted).float(), scores=scores)


def drawn(
    seeds: Int[Tensor, " n"], steps: Int[Tensor, " n"], indices: Int[Tensor, " n"], count: int
) -> Bool[Tensor, "n count"]:
    """Which of so many segments each sample keeps: each with probability ½, by counter; of sample 0, all."""
    return (words(seeds, steps, indices, count, LIME_STREAM) < 2**31) | (indices == 0)[:, None]


def carry(segments: Int[ndarray, "H W"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
    """Segments on a coarser grid, each cell in the one that has most pixels there, numbered anew from 0.

    A pixel is of the cell that its centre is in; of equal segments the first is taken.
    """
    count = int(segments.max()) + 1
    rows, columns = (
        (2 * np.arange(size) + 1) * cells // (2 * size) for size, cells in zip(segments.shape, shape, strict=True)
    )
    # By pairs that there are: a table of every cell and segment would not fit into memory for large images.
    pairs, sizes = np.unique((rows[:, None] * shape[1] + columns) * count + segments, return_counts=True)
    pairs = pairs[np.lexsort((-sizes, pairs // count))]
    most = pairs[np.unique(pairs // count, return_index=True)[1]] % count
    return np.unique(most, return_inverse=True)[1].reshape(shape)
