"""Distances of perturbed results from unperturbed ones: between sets of images, or image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

#: `frechet-set` compares sets of images, the others one image with another.
DISTANCES = ("frechet-set", "frechet-single", "features", "mse")

#: With fewer images, the covariance of a set is meaningless.
MIN_SET_SIZE = 10


def frechet_set(a: Float[Tensor, "*points n d"], b: Float[Tensor, "m d"]) -> Float64[Tensor, "*points"]:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), for Gaussians fitted to two sets (Dowson & Landau 1982).

    With Σ = FᵀF, the trace of the root is the nuclear norm of F_a F_bᵀ. No matrix root is taken, so singular
    covariances (n ≤ d) are as exact as others. In float64, ≥ 0 up to rounding, and 0 for equal sets.
    Raises ValueError if a set has fewer than two vectors, or values that are not finite.
    """
    if min(a.shape[-2], len(b)) < 2:
        raise ValueError(f"{min(a.shape[-2], len(b))} images have no covariance: expected at least 2")
    mean_a, factor_a = _fit_gaussian(_as_finite_double(a))
    mean_b, factor_b = _fit_gaussian(_as_finite_double(b))
    trace_of_root = torch.linalg.svdvals(factor_a @ factor_b.mT).sum(-1)
    traces = factor_a.square().sum((-2, -1)) + factor_b.square().sum()
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * trace_of_root


def frechet_influence(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """The influence of each pair (a_i, b_i) on `frechet_set`: the derivative by its weight, less the mean of all.

    Under weights w the distance is F + Σ_i w_i influence_i to first order (the infinitesimal jackknife, Efron 1982), so
    that one decomposition serves every resample of a bootstrap. Resampled sets themselves would be biased: their
    repeated items lower the covariances' rank and raise the distance.
    """
    a, b, n = _as_finite_double(a), _as_finite_double(b), len(a)
    centred_a, centred_b = ((x - x.mean(0)) / (n - 1) ** 0.5 for x in (a, b))
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(centred_a), torch.linalg.qr(centred_b)
    left, singular, right = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    # The derivative of the nuclear norm of M = F_a F_bᵀ: half the diagonals of (M Mᵀ)^½ and (Mᵀ M)^½.
    roots = sum((q @ vectors).square() @ singular for q, vectors in ((q_a, left), (q_b, right.mT)))
    means = 2 * (a - b) @ (a - b).mean(0)
    influence = means + n * (centred_a.square().sum(1) + centred_b.square().sum(1) - roots)
    return influence - influence.mean()


def _fit_gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a factor F of the covariance FᵀF with at most d rows."""
    mean, (n, d) = x.mean(-2), x.shape[-2:]
    centred = (x - mean[..., None, :]) / (n - 1) ** 0.5
    return mean, centred if n <= d else torch.linalg.qr(centred, mode="r").R


def frechet_single(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float64[Tensor, "*n"]:
    """‖f_a − f_b‖² + (s_a − s_b)², s the standard deviation of a vector's entries (ddof 1)."""
    a, b = _as_finite_double(a), _as_finite_double(b)
    return (a - b).square().sum(-1) + (a.std(-1) - b.std(-1)).square()


def features(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float64[Tensor, "*n"]:
    """‖f_a − f_b‖."""
    return torch.linalg.vector_norm(_as_finite_double(a) - _as_finite_double(b), dim=-1)


#: Distances between feature vectors, by name.
FEATURE_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "frechet-single": frechet_single,
    "features": features,
}


def _as_finite_double(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("image features are not finite: the extractor overflows; try float32")
    return x.double()


class NoFeatures:
    """An extractor of no features, for the distance `mse`, which compares images."""

    name = "none"

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 0"]:
        """Empty feature vectors."""
        return images.new_zeros(len(images), 0)
