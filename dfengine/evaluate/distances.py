"""Distances between perturbed results and unperturbed ones: between sets of images, or image by image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

#: Distances of one image from another, by name; `frechet-set` is of sets.
EACH = ("frechet-single", "features", "mse")
DISTANCES = ("frechet-set", *EACH)

#: Images below which a covariance says nothing.
FEWEST_IN_A_SET = 10


def frechet_set(a: Float[Tensor, "*points n d"], b: Float[Tensor, "m d"]) -> Float64[Tensor, "*points"]:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), of Gaussians fitted to two sets (Dowson & Landau 1982).

    With Σ = FᵀF the trace of the root is the nuclear norm of F_a F_bᵀ: no root of a matrix is taken, so that singular
    covariances (n ≤ d) are as exact as others. In float64, ≥ 0 but for rounding, and 0 for equal sets.
    Raises ValueError for sets of fewer than two vectors, or of values that are not finite.
    """
    if min(a.shape[-2], len(b)) < 2:
        raise ValueError(f"a covariance of {min(a.shape[-2], len(b))} images is not defined: expected at least 2")
    mean_a, factor_a = _gaussian(_finite(a))
    mean_b, factor_b = _gaussian(_finite(b))
    root = torch.linalg.svdvals(factor_a @ factor_b.mT).sum(-1)
    traces = factor_a.square().sum((-2, -1)) + factor_b.square().sum()
    return (mean_a - mean_b).square().sum(-1) + traces - 2 * root


def frechet_influence(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
    """What each pair of two sets adds to their `frechet_set`: the derivative by its weight, less the mean of all.

    Under weights w the distance is F + Σ_i w_i influence_i to first order (the infinitesimal jackknife, Efron 1982),
    which is what a bootstrap needs. Sets drawn again with their repeats have covariances of a lower rank, and distances
    above the one that they are drawn from; that bias is not in here, and one decomposition stands for all resamples.
    """
    a, b, n = _finite(a), _finite(b), len(a)
    away_a, away_b = ((x - x.mean(0)) / (n - 1) ** 0.5 for x in (a, b))
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(away_a), torch.linalg.qr(away_b)
    left, root, right = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    # The derivative of the nuclear norm of M = F_a F_bᵀ: half the diagonals of (M Mᵀ)^½ and (Mᵀ M)^½.
    roots = sum((q @ vectors).square() @ root for q, vectors in ((q_a, left), (q_b, right.mT)))
    moved = 2 * (a - b) @ (a - b).mean(0)
    influence = moved + n * (away_a.square().sum(1) + away_b.square().sum(1) - roots)
    return influence - influence.mean()


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a factor F of the covariance FᵀF with no more rows than it needs."""
    mean, (n, d) = x.mean(-2), x.shape[-2:]
    centred = (x - mean[..., None, :]) / (n - 1) ** 0.5
    return mean, centred if n <= d else torch.linalg.qr(centred, mode="r").R


def frechet_single(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float64[Tensor, "*n"]:
    """‖f_a − f_b‖² + (s_a − s_b)², s the standard deviation (ddof 1) of a vector's entries."""
    a, b = _finite(a), _finite(b)
    return (a - b).square().sum(-1) + (a.std(-1) - b.std(-1)).square()


def features(a: Float[Tensor, "*n d"], b: Float[Tensor, "*n d"]) -> Float64[Tensor, "*n"]:
    """‖f_a − f_b‖."""
    return torch.linalg.vector_norm(_finite(a) - _finite(b), dim=-1)


#: Distances of feature vectors, by name.
OF_FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"frechet-single": frechet_single, "features": features}


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("image features are not finite: the extractor overflows; try float32")
    return x.double()


class NoFeatures:
    """Stands in for an extractor where images alone are compared (mse)."""

    name = "none"

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 0"]:
        """Nothing of each image."""
        return images.new_zeros(len(images), 0)
