"""LIME (Ribeiro, Singh & Guestrin 2016) for a denoiser: the segments of the image that its prediction relies on."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dfkernels
import numpy as np
import torch
from dfkernels.counters import LIME_STREAM, random_uint32
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from torch import Tensor

from dfengine import checks
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.guidance import TARGETS
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.masking import MaskedForwards
from dfengine.explain.registry import checked, register
from dfengine.explain.rise import check_num_masks, num_forwards

SEGMENTATIONS = ("slic", "quickshift")
#: Quickshift's segments of an image, at least.
MIN_SEGMENTS = 4
#: Slic's, at most: more than any latent has pixels.
_MAX_SEGMENTS = 2**20


@register(
    "lime",
    label="LIME",
    hot="the whole prediction keeps more of its structure with this segment kept than with it hidden.",
)
@dataclass(frozen=True)
class Lime(Explainer):
    """Which segments of the image the prediction relies on: ridge regression of the structure score on kept segments.

    Segments of the image are carried over to the latent; hidden ones are zero. The score is structure
    (Eq. 7) over all pixels. Samples are drawn by counter, and the first keeps everything; each has the weight
    √exp(−d²/width²), d its cosine distance from the first.
    """

    num_samples: int = option(1000, "samples a step")
    segmentation: str = option("slic", "slic (about num_segments of like size) or quickshift (as few as 4)")
    num_segments: int = option(32, "slic: segments of the image, about")
    kernel_size: float = option(4.0, "quickshift: kernel size in pixels")
    max_distance: float = option(200.0, "quickshift: distance of separate segments, halved until there are at least 4")
    ratio: float = option(0.2, "quickshift: weight of colour against distance")
    width: float = option(0.25, "width of the samples' weights")
    alpha: float = option(1.0, "strength of the ridge regression")
    target: str = option("conditional", "prediction to explain: conditional, guided or unconditional")
    name: str = option("lime", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for settings that are out of range."""
        super().__post_init__()
        for setting in ("kernel_size", "max_distance", "ratio", "width", "alpha"):
            if getattr(self, setting) <= 0:
                raise ValueError(f"{setting} {getattr(self, setting)} is not possible: expected a number above 0")
        if self.kernel_size < 1:
            raise ValueError(f"kernel_size {self.kernel_size} is not possible: quickshift needs at least 1 pixel")
        checks.one_of("segmentation", self.segmentation, SEGMENTATIONS)
        if not 2 <= self.num_segments <= _MAX_SEGMENTS:
            raise ValueError(f"{self.num_segments} segments are not possible: expected 2 to {_MAX_SEGMENTS}")
        check_num_masks(self.num_samples, "samples")
        if self.num_samples < 2:
            raise ValueError(f"{self.num_samples} samples are not possible: expected at least 2")
        if self.target not in TARGETS:
            raise ValueError(f"target {self.target!r} is not known: expected one of {', '.join(TARGETS)}")

    @classmethod
    def paper(cls, **settings: Any) -> Lime:
        """With quickshift's segments, the paper's "LIME implementation"."""
        return cls(**{"segmentation": "quickshift"} | checked(cls, settings))

    @classmethod
    def completed(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Before there was a choice, segments were quickshift's."""
        return {"segmentation": "quickshift"} | dict(settings)

    @classmethod
    def xdiffusion(cls, **settings: Any) -> Explainer:
        """What the authors' released code computes. Raises ValueError for a setting that it does not have."""
        from dfengine.explain.xdiffusion import XDiffusionLime

        return XDiffusionLime(**checked(XDiffusionLime, settings))

    def num_forwards(self, num_steps: int) -> int:
        return num_forwards(num_steps, self.num_samples, self.target)

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """A score a sample."""
        return OutputSpec(num_masks=self.num_samples)

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Batches fill across samples, steps and items."""
        if any((i, k) not in done for i, path in enumerate(trajectories) for k in path.steps):
            yield from _LimeForwards(self, denoiser, trajectories, done).run()

    def segment(self, image: UInt8[ndarray, "H W 3"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
        """The segments of an image at the latent's size, numbered from 0."""
        from skimage.segmentation import quickshift, slic

        if self.segmentation == "slic":
            return downsample_labels(slic(image, n_segments=self.num_segments, start_label=0), shape)
        distance = float(self.max_distance)
        while True:
            fine = quickshift(image, kernel_size=self.kernel_size, max_dist=distance, ratio=self.ratio)
            labels = downsample_labels(fine, shape)
            # Below a distance of 1 every pixel is a segment by itself.
            if labels.max() + 1 >= MIN_SEGMENTS or distance < 1:
                return labels
            distance /= 2

    def regress(
        self, kept: Bool[ndarray, "samples segments"], scores: Float[ndarray, " samples"]
    ) -> Float[ndarray, " segments"]:
        """Each segment's coefficient, NaN if a score is not finite. A sample that keeps nothing has distance 1."""
        from sklearn.linear_model import Ridge

        if not np.isfinite(scores).all():
            warnings.warn("a map is not finite: the samples' scores are not", stacklevel=2)
            return np.full(kept.shape[1], np.nan)
        distance = 1 - np.sqrt(kept.mean(1))
        weight = np.sqrt(np.exp(-(distance**2) / self.width**2))
        return Ridge(alpha=self.alpha).fit(kept.astype(np.float64), scores, sample_weight=weight).coef_

    def to_map(
        self, coefficients: Float[ndarray, " segments"], segments: Int[ndarray, "h w"], image: UInt8[ndarray, "H W 3"]
    ) -> Float[ndarray, "h w"]:
        """Each pixel's value is its segment's coefficient."""
        return coefficients[segments]


class _LimeForwards(MaskedForwards):
    """The hot loop with segments in place of pixels, and a regression of each row's scores on the host."""

    def __init__(
        self,
        lime: Lime,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        done: Collection[tuple[int, int]],
    ) -> None:
        super().__init__(denoiser, trajectories, done, name=lime.name, num_masks=lime.num_samples, target=lime.target)
        self.lime = lime
        self.images = [path.image.numpy() for path in trajectories]
        self.segments = torch.stack([torch.from_numpy(lime.segment(image, self.shape)) for image in self.images])
        self._segments = self.segments.to(denoiser.device)
        self._max_segments = int(self.segments.max()) + 1

    def mask(self, rows: Int[Tensor, " n"], indices: Int[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        real = rows.clamp(min=0)
        kept = sample_segments(self.seeds[real], self.steps[real], indices, self._max_segments)
        mask = kept.gather(1, self._segments[self.items[real]].flatten(1)).unflatten(1, self.shape)
        masked = self.latents[real] * (mask & (rows >= 0)[:, None, None])[:, None]
        return masked.contiguous(memory_format=torch.channels_last)

    def accumulate(
        self,
        outputs: Float[Tensor, "n c h w"],
        masked: Float[Tensor, "n c h w"],
        rows: Int[Tensor, " n"],
        indices: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        compared = self.read(outputs, masked, rows)
        return dfkernels.similarity(compared, self.references[rows], "structure", "global")

    def estimate(self, row: int, num_masks: int) -> tuple[Tensor, ...]:
        """Nothing: the regression needs only the scores, on the host."""
        return ()

    def to_step_map(self, row: int, tensors: Sequence[Tensor], scores: Float[Tensor, " masks"]) -> StepMap:
        item, step = self.rows[row]
        segments, indices = self.segments[item], torch.arange(self.num_masks)
        seeds, steps = torch.full_like(indices, self.mask_seeds[row]), torch.full_like(indices, step)
        kept = sample_segments(seeds, steps, indices, int(segments.max()) + 1)
        coefficients = self.lime.regress(kept.numpy(), scores.double().numpy())
        saliency = self.lime.to_map(coefficients, segments.numpy(), self.images[item])
        return StepMap(item, step, self.name, torch.from_numpy(saliency).float(), scores=scores)


def sample_segments(
    seeds: Int[Tensor, " n"], steps: Int[Tensor, " n"], indices: Int[Tensor, " n"], count: int
) -> Bool[Tensor, "n count"]:
    """Which of the segments each sample keeps: each with probability ½, by counter; sample 0 keeps all."""
    return (random_uint32(seeds, steps, indices, count, LIME_STREAM) < 2**31) | (indices == 0)[:, None]


def downsample_labels(segments: Int[ndarray, "H W"], shape: tuple[int, int]) -> Int[ndarray, "h w"]:
    """Segments on a coarser grid, numbered anew from 0: each cell belongs to the segment with most pixels in it.

    A pixel belongs to the cell that contains its centre; of equally large segments the first wins.
    """
    count = int(segments.max()) + 1
    rows, columns = (
        (2 * np.arange(size) + 1) * cells // (2 * size) for size, cells in zip(segments.shape, shape, strict=True)
    )
    # Only the pairs that occur: a table of every cell and segment would not fit into memory for large images.
    pairs, sizes = np.unique((rows[:, None] * shape[1] + columns) * count + segments, return_counts=True)
    pairs = pairs[np.lexsort((-sizes, pairs // count))]
    largest = pairs[np.unique(pairs // count, return_index=True)[1]] % count
    return np.unique(largest, return_inverse=True)[1].reshape(shape)
