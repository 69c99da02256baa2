"""Similarity against scikit-image, scipy and plain loops in float64."""

import dfkernels
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from tolerance import tolerance
from torch.testing import assert_close

STATISTICS = [kind for kind in dfkernels.reference.SIMILARITIES if kind != "cosine"]
Array = NDArray[np.float64]


def images(n: int, c: int, h: int, w: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random b [c, h, w] and n noisy neighbours of it, of different means and scales, in float64."""
    g = torch.Generator().manual_seed(seed)
    b = 0.2 + torch.randn(c, h, w, generator=g, dtype=torch.float64)
    a = 0.7 * b + 0.6 * torch.randn(n, c, h, w, generator=g, dtype=torch.float64) - 0.1
    return a, b


def formula(kind: str, mu_a: Array, mu_b: Array, var_a: Array, var_b: Array, cov: Array, scale: float = 1.0) -> Array:
    """Eq. 5, Eq. 6 and Eq. 7 with their constants as numbers: (0.01 L)² = 1e-4 L², (0.03 L)² = 9e-4 L²."""
    c1, c2, c3 = 1e-4 * scale**2, 9e-4 * scale**2, 4.5e-4 * scale**2
    sd_a, sd_b = np.sqrt(var_a), np.sqrt(var_b)
    luminance = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1)
    contrast_structure = (2 * cov + c2) / (sd_a**2 + sd_b**2 + c2)
    return {
        "structure": (cov + c3) / (sd_a * sd_b + c3),
        "luminance": luminance,
        "contrast_structure": contrast_structure,
        "contrast": (2 * sd_a * sd_b + c2) / (sd_a**2 + sd_b**2 + c2),
        "ssim": luminance * contrast_structure,
        "mse": -(var_a + var_b - 2 * cov + (mu_a - mu_b) ** 2),
    }[kind]


def loop(kind: str, a: Array, b: Array, window: int, sigma: float) -> Array:
    """Local similarity of two images by a loop over pixels, with renormalised weights and two-pass variances."""
    h, w = a.shape
    result = np.empty((h, w))
    ys, xs = np.mgrid[:h, :w]
    for y in range(h):
        for x in range(w):
            near = (abs(ys - y) <= window // 2) & (abs(xs - x) <= window // 2)
            weight = near * np.exp(-((ys - y) ** 2 + (xs - x) ** 2) / (2 * sigma**2))
            weight /= weight.sum()
            mu_a, mu_b = (weight * a).sum(), (weight * b).sum()
            da, db = a - mu_a, b - mu_b
            var_a, var_b, cov = (weight * da**2).sum(), (weight * db**2).sum(), (weight * da * db).sum()
            result[y, x] = formula(kind, mu_a, mu_b, var_a, var_b, cov)
    return result


@pytest.mark.parametrize("kind", STATISTICS)
def test_local_interior_equals_scipy(kind: str) -> None:
    a, b = images(2, 3, 19, 23)
    ours = dfkernels.similarity(a, b, kind)[:, 5:-5, 5:-5].numpy()

    def blur(x: Array) -> Array:
        return gaussian_filter(x, (0, 0, 1.5, 1.5), truncate=3.5)  # a radius of 5

    x, y = a.numpy(), np.broadcast_to(b.numpy(), a.shape)
    mu_x, mu_y = blur(x), blur(y)
    expected = formula(kind, mu_x, mu_y, blur(x * x) - mu_x**2, blur(y * y) - mu_y**2, blur(x * y) - mu_x * mu_y)
    np.testing.assert_allclose(ours, expected.mean(1)[:, 5:-5, 5:-5], **tolerance("similarity_float64"))


def test_ssim_equals_scikit_image() -> None:
    a, b = images(1, 3, 21, 17)
    _, expected = structural_similarity(
        a[0].numpy(),
        b.numpy(),
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    ours = dfkernels.similarity(a, b, "ssim")[0, 5:-5, 5:-5].numpy()
    np.testing.assert_allclose(ours, expected.mean(0)[5:-5, 5:-5], **tolerance("similarity_float64"))


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize(
    ("h", "w", "window", "sigma"), [(4, 5, 11, 1.5), (7, 13, 3, 0.8), (1, 6, 5, 2.0), (9, 2, 1, 1.5)]
)
def test_borders_renormalise_the_window(kind: str, h: int, w: int, window: int, sigma: float) -> None:
    a, b = images(2, 1, h, w)
    ours = dfkernels.similarity(a, b, kind, window=window, sigma=sigma)
    expected = np.stack([loop(kind, image[0].numpy(), b[0].numpy(), window, sigma) for image in a])
    np.testing.assert_allclose(ours.numpy(), expected, **tolerance("similarity_float64"))


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("c", [1, 3])
def test_global_equals_numpy(kind: str, c: int) -> None:
    a, b = images(3, c, 7, 13)
    ours = dfkernels.similarity(a, b, kind, "global").numpy()
    for score, image in zip(ours, a.numpy(), strict=True):
        channels = [
            formula(kind, x.mean(), y.mean(), x.var(), y.var(), ((x - x.mean()) * (y - y.mean())).mean())
            for x, y in zip(image, b.numpy(), strict=True)
        ]
        np.testing.assert_allclose(score, np.mean(channels), **tolerance("similarity_float64"))


def test_cosine_equals_numpy() -> None:
    a, b = images(3, 4, 7, 13)
    x, y = a.numpy(), b.numpy()
    local = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=0)
    np.testing.assert_allclose(dfkernels.similarity(a, b, "cosine").numpy(), local, **tolerance("similarity_float64"))
    everything = [np.vdot(image, y) / np.linalg.norm(image) / np.linalg.norm(y) for image in x]
    ours = dfkernels.similarity(a, b, "cosine", "global").numpy()
    np.testing.assert_allclose(ours, everything, **tolerance("similarity_float64"))
    assert not dfkernels.similarity(torch.zeros_like(a), b, "cosine").any()


@pytest.mark.parametrize("kind", dfkernels.reference.SIMILARITIES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
@pytest.mark.parametrize(("n", "c"), [(1, 1), (4, 3)])
def test_shapes_shared_references_and_independence_of_the_batch(kind: str, score: str, n: int, c: int) -> None:
    a, b = (x.float() for x in images(n, c, 7, 13))
    together = dfkernels.similarity(a, b, kind, score)
    assert together.dtype == torch.float32
    assert together.shape == ((n, 7, 13) if score == "local" else (n,))
    assert_close(dfkernels.similarity(a, b.expand_as(a), kind, score), together, **tolerance("similarity"))
    alone = torch.cat([dfkernels.similarity(a[i : i + 1], b, kind, score) for i in range(n)])
    assert_close(alone, together, **tolerance("similarity"))
    b_of_each = torch.stack([b, *(b.flip(-1) for _ in range(n - 1))])
    last = dfkernels.similarity(a[-1:], b_of_each[-1], kind, score)
    assert_close(dfkernels.similarity(a, b_of_each, kind, score)[-1:], last, **tolerance("similarity"))


@pytest.mark.grid
@pytest.mark.parametrize("kind", dfkernels.reference.SIMILARITIES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
@pytest.mark.parametrize("entries", [1, 2, 3, 7])
def test_chunk_size_does_not_change_scores(
    monkeypatch: pytest.MonkeyPatch, kind: str, score: str, entries: int
) -> None:
    a, b = images(7, 3, 7, 13)
    each = torch.stack([b.roll(i, -1) for i in range(7)])
    expected = torch.cat([dfkernels.similarity(a[i : i + 1], each[i], kind, score) for i in range(7)])
    monkeypatch.setattr(dfkernels.reference, "CHUNK_ELEMENTS", entries * 3 * 7 * 13)
    assert_close(dfkernels.similarity(a, each, kind, score), expected, **tolerance("similarity_float64"))
    none = dfkernels.similarity(a[:0], b, kind, score)
    assert none.shape == ((0, 7, 13) if score == "local" else (0,))


@pytest.mark.parametrize("kind", dfkernels.reference.SIMILARITIES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_scored_in_float32(kind: str, score: str, dtype: torch.dtype) -> None:
    a, b = (x.to(dtype) for x in images(2, 3, 16, 11))
    ours = dfkernels.similarity(a.contiguous(memory_format=torch.channels_last), b, kind, score)
    assert ours.dtype == torch.float32
    exact = dfkernels.similarity(a.double(), b.double(), kind, score)
    assert exact.dtype == torch.float64
    assert_close(ours.double(), exact, **tolerance("similarity"))


@pytest.mark.parametrize("kind", dfkernels.reference.SIMILARITIES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_identical_inputs_score_one(kind: str, score: str) -> None:
    a = images(2, 3, 7, 13)[0].float()
    ours = dfkernels.similarity(a, a, kind, score)
    assert_close(ours, torch.full_like(ours, 0 if kind == "mse" else 1), **tolerance("similarity"))


def test_a_negated_input_scores_minus_one_up_to_the_constant() -> None:
    a = images(1, 1, 7, 13)[0]
    variance = a.var(correction=0)
    expected = (-variance + 4.5e-4) / (variance + 4.5e-4)
    ours = dfkernels.similarity(a, -a, score="global")[0]
    assert_close(ours, expected, **tolerance("similarity_float64"))
    assert -1 < ours < -0.998
    # A signal of variance C3 scores 0 against its negative.
    faint = a * (4.5e-4 / variance).sqrt()
    assert_close(
        dfkernels.similarity(faint, -faint, score="global")[0],
        torch.zeros_like(ours),
        **tolerance("similarity_float64"),
    )


@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_constant_inputs(score: str) -> None:
    a, b = torch.full((1, 2, 7, 13), 0.3), images(1, 2, 7, 13)[1].float()
    # With no variance on one side structure is C3 / C3 and contrast C2 / (σ_b² + C2), whatever b is.
    structure = dfkernels.similarity(a, b, "structure", score)
    assert_close(structure, torch.ones_like(structure), **tolerance("similarity"))
    assert dfkernels.similarity(a, b, "contrast", score).max() < 0.01
    luminance = dfkernels.similarity(a, torch.full((2, 7, 13), 0.5), "luminance", score)
    assert_close(luminance, torch.full_like(luminance, (0.3 + 1e-4) / (0.34 + 1e-4)), **tolerance("similarity"))


def test_structure_stays_in_its_range_where_a_variance_is_lost_to_rounding() -> None:
    b = 8 * images(1, 2, 8, 35)[1].float()
    a = torch.where(torch.arange(35) < 17, 100.0, 3e-4 * b)
    assert dfkernels.similarity(a[None], b, window=5).abs().max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", STATISTICS)
def test_flat_regions_have_no_negative_variance(kind: str) -> None:
    # Away from the channel's mean and flat, so that E[a²] − E[a]² rounds to either side of zero.
    a = torch.linspace(0.1, 0.9, 5).repeat_interleave(24)[None, None, None].repeat(1, 1, 24, 1)
    b = torch.randn(1, 24, 120, generator=torch.Generator().manual_seed(0))
    assert dfkernels.similarity(a, b, kind).isfinite().all()
    assert dfkernels.similarity(b[None], a[0], kind).isfinite().all()


@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_an_offset_costs_structure_no_precision(score: str) -> None:
    a, b = (0.02 * x for x in images(1, 2, 7, 13))
    # Offsets that are exact in float32 with these inputs: multiples of 2⁻¹⁵ below 2⁹.
    a, b = ((x * 2**15).round() / 2**15 for x in (a, b))
    exact = dfkernels.similarity(a, b, score=score)
    shifted = dfkernels.similarity((a + 100).float(), (b - 50).float(), score=score)
    assert_close(shifted.double(), exact, **tolerance("similarity_offset"))


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_data_range_scales_with_the_inputs(kind: str, score: str) -> None:
    a, b = (0.03 * x for x in images(2, 2, 7, 13))  # small, so that the constants matter
    scaled = dfkernels.similarity(8 * a, 8 * b, kind, score, data_range=8.0)
    expected = dfkernels.similarity(a, b, kind, score) * (64 if kind == "mse" else 1)
    assert_close(scaled, expected, **tolerance("similarity_float64"))


def test_channels_are_averaged() -> None:
    a, b = images(2, 3, 7, 13)
    each = [dfkernels.similarity(a[:, k : k + 1], b[k : k + 1]) for k in range(3)]
    assert_close(dfkernels.similarity(a, b), torch.stack(each).mean(0), **tolerance("similarity_float64"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 10}, "window 10 is not a positive odd number"),
        ({"window": -1}, "window -1 is not a positive odd number"),
        ({"kind": "frechet"}, "unknown similarity 'frechet': choose one of structure, luminance"),
        ({"score": "map"}, "unknown score 'map'"),
        ({"sigma": 0.0}, "sigma 0.0 is not positive"),
        ({"data_range": -1.0}, "data_range -1.0 is not positive"),
        ({"b": torch.zeros(2, 7, 13)}, r"a \(2, 3, 7, 13\), b \(2, 7, 13\)"),
    ],
)
def test_errors_name_the_remedy(change: dict, message: str) -> None:
    a, b = images(2, 3, 7, 13)
    with pytest.raises(ValueError, match=message):
        dfkernels.similarity(**({"a": a, "b": b} | change))
