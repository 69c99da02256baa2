"""Distances between sets and between images: by hand, against scipy's matrix root, and each pair's influence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dfengine.evaluate.distances import (
    DISTANCES,
    FEATURE_DISTANCES,
    features,
    frechet_influence,
    frechet_set,
    frechet_single,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """The printed formula, with the root of the product of covariances."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def test_frechet_set_equals_the_printed_formula() -> None:
    mix = randn(5, 5, seed=1)
    a, b = randn(3, 30, 5) @ mix + 0.3, randn(17, 5, seed=2) @ mix.T - randn(5, seed=3)
    distances = frechet_set(a, b)
    assert distances.dtype == torch.float64
    np.testing.assert_allclose(distances, [by_matrix_root(one.numpy(), b.numpy()) for one in a], rtol=1e-9)
    np.testing.assert_allclose(frechet_set(a[1], b), distances[1], rtol=1e-12)


def test_frechet_set_in_one_dimension() -> None:
    """1, 2, 6 have mean 3 and variance 7; 4, 8 have mean 6 and variance 8."""
    a, b = torch.tensor([[1.0], [2.0], [6.0]]), torch.tensor([[4.0], [8.0]])
    assert float(frechet_set(a, b)) == pytest.approx(9 + (7**0.5 - 8**0.5) ** 2)


def test_frechet_set_of_two_vectors_in_seven_dimensions() -> None:
    """Covariances u uᵀ and v vᵀ, u and v the differences over √2: the trace of the root is |u·v|."""
    a, b = randn(2, 7), randn(2, 7, seed=1)
    u, v = ((x[0] - x[1]) / 2**0.5 for x in (a, b))
    expected = (a.mean(0) - b.mean(0)).square().sum() + u @ u + v @ v - 2 * (u @ v).abs()
    assert float(frechet_set(a, b)) == pytest.approx(float(expected), rel=1e-12)


@given(
    n=st.integers(2, 9), m=st.integers(2, 9), d=st.integers(1, 6), seed=st.integers(0, 99), scale=st.floats(0.01, 100)
)
def test_frechet_set_of_equal_shifted_scaled_and_exchanged_sets(
    n: int, m: int, d: int, seed: int, scale: float
) -> None:
    """Whether or not covariances are singular."""
    a, b, shift = randn(n, d, seed=seed), randn(m, d, seed=seed + 100), randn(d, seed=seed + 200)
    assert float(frechet_set(a, a)) == pytest.approx(0, abs=1e-12)
    assert float(frechet_set(a, a.flip(0) + shift)) == pytest.approx(float(shift @ shift), rel=1e-9)
    trace = float(a.var(0).sum())
    expected = (1 - scale) ** 2 * (float(a.mean(0).square().sum()) + trace)
    assert float(frechet_set(a, scale * a)) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(frechet_set(a, b)) == pytest.approx(float(frechet_set(b, a)), rel=1e-9, abs=1e-12)
    # Neither the order of the entries nor zero columns matter.
    wide = [torch.cat([x.flip(1), torch.zeros(len(x), 2, dtype=x.dtype)], 1) for x in (a, b)]
    assert float(frechet_set(*wide)) == pytest.approx(float(frechet_set(a, b)), rel=1e-9, abs=1e-12)


def test_float32_vectors_are_compared_in_float64() -> None:
    """A small shift far from 0, which sums in float32 would lose."""
    a = (randn(40, 4) * 0.01 + 100).float()
    expected = by_matrix_root(a.double().numpy(), (a.double() * 1.0001).numpy())
    assert float(frechet_set(a, a.double() * 1.0001)) == pytest.approx(expected, rel=1e-6)
    assert frechet_single(a, a).dtype == features(a, a).dtype == torch.float64


def test_single_images_by_hand() -> None:
    """(1, 2, 3) has standard deviation 1, (2, 2, 8) has √12, of squares over 2; their difference is (1, 0, 5)."""
    a, b = torch.tensor([[1.0, 2.0, 3.0], [0.0, 3.0, 0.0]]), torch.tensor([[2.0, 2.0, 8.0], [4.0, 0.0, 0.0]])
    # The second pair: ‖(4, −3, 0)‖² = 25, and variances of 3 and 16/3.
    expected = [26 + (1 - 12**0.5) ** 2, 25 + (3**0.5 - (16 / 3) ** 0.5) ** 2]
    np.testing.assert_allclose(frechet_single(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(features(a, b), [26**0.5, 5], rtol=1e-12)
    assert set(DISTANCES) == {"frechet-set", "mse", *FEATURE_DISTANCES}
    assert {name: of(a, b)[1].item() for name, of in FEATURE_DISTANCES.items()} == {
        "frechet-single": pytest.approx(expected[1]), "features": pytest.approx(5),
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_and_sets_of_one_are_refused(value: float) -> None:
    a, b = randn(4, 3), randn(4, 3, seed=1)
    a[2, 1] = value
    for distance in (frechet_set, frechet_single, features, frechet_influence):
        for pair in ((a, b), (b, a)):
            with pytest.raises(ValueError, match="not finite: the extractor overflows; try float32"):
                distance(*pair)
    for few in ((b[:1], b), (b, b[:1])):
        with pytest.raises(ValueError, match="1 images have no covariance: expected at least 2"):
            frechet_set(*few)


# Influence of one pair -----------------------------------------------------------------------------------------------


def weighted(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """The distance of weighted sets, by the eigenvalues of Σ_a Σ_b."""
    n = len(a)
    means = [weights @ x for x in (a, b)]
    covs = [(x - mean).T @ np.diag(weights * n / (n - 1)) @ (x - mean) for x, mean in zip((a, b), means, strict=True)]
    values = np.linalg.eigvals(covs[0] @ covs[1]).real
    # Eigenvalues that are 0 up to rounding would have large roots.
    root = np.sqrt(values[values > 1e-10 * values.max()]).sum()
    return float(((means[0] - means[1]) ** 2).sum() + np.trace(covs[0]) + np.trace(covs[1]) - 2 * root)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (6, 6), (5, 9), (9, 1)])
def test_influence_is_the_derivative_with_respect_to_a_weight(n: int, d: int) -> None:
    a = randn(n, d)
    b = 0.5 * a + randn(n, d, seed=1) + 1
    distances = frechet_influence(a, b)
    assert float(distances.sum()) == pytest.approx(0, abs=1e-9)
    even, by = np.full(n, 1 / n), 1e-5
    np.testing.assert_allclose(weighted(a.numpy(), b.numpy(), even), frechet_set(a, b), rtol=1e-9)
    expected = []
    for pair in range(n):
        # The weight that this pair gains, all lose together.
        toward = (np.arange(n) == pair) - even
        more, less = (weighted(a.numpy(), b.numpy(), even + sign * by * toward) for sign in (1, -1))
        expected.append((more - less) / (2 * by))
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)


def test_influence_predicts_the_spread_of_new_sets() -> None:
    """The spread of 300 sets of 40 new pairs each, against the estimate from single ones."""
    shift = torch.linspace(0, 1, 12, dtype=torch.float64)
    sets = [
        (x := randn(40, 12, seed=seed), 0.6 * x + 0.5 * randn(40, 12, seed=seed + 1000) + shift) for seed in range(300)
    ]
    spread = float(torch.stack([frechet_set(*pair) for pair in sets]).std())
    own = [float(frechet_influence(*pair).square().sum().sqrt()) / 40 for pair in sets[:50]]
    assert np.mean(own) == pytest.approx(spread, rel=0.15)


def test_equal_sets_have_no_influence() -> None:
    a = randn(5, 8)
    np.testing.assert_allclose(frechet_influence(a, a), np.zeros(5), atol=1e-12)
