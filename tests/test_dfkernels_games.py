"""Deletion and insertion latents against loops, and the blur against scipy."""

import dfkernels
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.ndimage import convolve
from tolerance import tolerance
from torch.testing import assert_close


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Ranks ---------------------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    # 9 first, then the two 5s in pixel order, then 2 and the three 0s in pixel order.
    saliency = torch.tensor([[[5.0, 0.0, 9.0, 0.0], [5.0, 2.0, -0.0, -3.0]]])
    assert dfkernels.ranks(saliency).tolist() == [[[1, 4, 0, 5], [2, 3, 6, 7]]]
    assert dfkernels.ranks(torch.zeros(2, 3, 4)).tolist() == [torch.arange(12).reshape(3, 4).tolist()] * 2


@given(arrays.arrays(np.float32, (2, 7, 13), elements=st.sampled_from([0.0, -1.0, 0.5, 2.0, -np.inf, np.inf])))
def test_ranks_equal_a_stable_sort(saliency: np.ndarray) -> None:
    for rank, values in zip(dfkernels.ranks(torch.tensor(saliency)), saliency, strict=True):
        order = sorted(range(91), key=lambda pixel: (-values.flat[pixel], pixel))
        assert rank.flatten()[order].tolist() == list(range(91))


# Blur ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (7, 13), (3, 20), (1, 1), (1, 4)])
@pytest.mark.parametrize(("window", "sigma"), [(11, 5.0), (3, 0.8), (1, 1.0)])
def test_blur_equals_scipy(shape: tuple[int, int], window: int, sigma: float) -> None:
    x = random(2, 3, *shape).double()
    k = np.arange(window) - window // 2
    weights = np.exp(-(k**2 + k[:, None] ** 2) / (2 * sigma**2))
    expected = convolve(x.numpy(), weights[None, None] / weights.sum(), mode="reflect")
    np.testing.assert_allclose(dfkernels.blur(x, window=window, sigma=sigma), expected, **tolerance("blur_float64"))
    ours = dfkernels.blur(x.float(), window=window, sigma=sigma)
    np.testing.assert_allclose(ours, expected, **tolerance("blur"))


def test_blur_defaults_to_11_pixels_and_sigma_5_and_preserves_the_mean() -> None:
    x = random(1, 2, 9, 14).double()
    assert_close(dfkernels.blur(x), dfkernels.blur(x, window=11, sigma=5.0), **tolerance("blur_float64"))
    assert_close(dfkernels.blur(x).mean((2, 3)), x.mean((2, 3)), **tolerance("blur_float64"))
    impulse = torch.zeros(1, 1, 31, 31, dtype=torch.float64)
    impulse[..., 15, 15] = 1
    response = dfkernels.blur(impulse)[0, 0]
    assert response.count_nonzero() == 121
    # Five pixels from the centre along one axis: exp(−25 / 50).
    assert_close(response[15, 20] / response[15, 15], torch.tensor(0.6065306597126334, dtype=torch.float64))


def test_blur_of_half_precision_is_computed_in_float32() -> None:
    x = random(1, 4, 16, 16).half()
    assert torch.equal(dfkernels.blur(x), dfkernels.blur(x.float()).half())


# Perturb -------------------------------------------------------------------------------------------------------------

ROWS, INDICES = torch.tensor([0, 1, -1, 1, 0, 1]), torch.tensor([2, 0, 3, 7, 5, 1])


def perturb_by_loop(x: torch.Tensor, saliency: torch.Tensor, k: int, fill: torch.Tensor) -> torch.Tensor:
    """Replace pixels one at a time, most salient first."""
    h, w = saliency.shape
    order = sorted(range(h * w), key=lambda pixel: (-saliency.flatten()[pixel].item(), pixel))
    x = x.clone()
    for pixel in order[: k * w]:
        x[:, pixel // w, pixel % w] = fill[:, pixel // w, pixel % w]
    return x


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("insertion", [False, True])
def test_each_point_of_the_curve(c: int, insertion: bool) -> None:
    latents, saliency = random(2, c, 7, 13), random(2, 7, 13, seed=1).round(decimals=1)
    start, fill = (dfkernels.blur(latents), latents) if insertion else (latents, None)
    perturbed = dfkernels.perturb(start, dfkernels.ranks(saliency), ROWS, INDICES, fill=fill)
    assert perturbed.is_contiguous(memory_format=torch.channels_last)
    assert not perturbed[2].any()
    end = torch.zeros_like(latents) if fill is None else fill
    for entry, row, k in zip(perturbed, ROWS.tolist(), INDICES.tolist(), strict=True):
        if row >= 0:
            assert torch.equal(entry, perturb_by_loop(start[row], saliency[row], k, end[row]))


def test_curves_end_at_zeros_or_the_latent() -> None:
    latents, ranks = random(1, 4, 5, 3), dfkernels.ranks(random(1, 5, 3, seed=1))
    points = torch.arange(6)
    deletion = dfkernels.perturb(latents, ranks, 0 * points, points)
    assert torch.equal(deletion[0], latents[0])
    assert not deletion[5].any()
    assert [int((entry == 0).sum()) for entry in deletion] == [4 * 3 * k for k in range(6)]
    insertion = dfkernels.perturb(dfkernels.blur(latents), ranks, 0 * points, points, fill=latents)
    assert torch.equal(insertion[0], dfkernels.blur(latents)[0])
    assert torch.equal(insertion[5], latents[0])


def test_perturb_in_parts_in_another_dtype_and_with_poisoned_padding() -> None:
    latents, ranks = random(2, 4, 7, 13), dfkernels.ranks(random(2, 7, 13, seed=1))
    complete = dfkernels.perturb(latents, ranks, ROWS, INDICES)
    parts = [dfkernels.perturb(latents, ranks, ROWS[part], INDICES[part]) for part in (slice(0, 1), slice(1, 6))]
    assert torch.equal(torch.cat(parts), complete)
    half = dfkernels.perturb(latents, ranks, ROWS, INDICES, dtype=torch.bfloat16)
    assert torch.equal(half, complete.bfloat16())
    latents[0] = torch.nan
    assert not dfkernels.perturb(latents, ranks, ROWS, INDICES)[2].any()


def test_perturb_never_waits_for_the_device() -> None:
    latents, saliency = torch.empty(2, 4, 7, 13, device="meta"), torch.empty(2, 7, 13, device="meta")
    rows, indices = ROWS.to("meta"), INDICES.to("meta")
    perturbed = dfkernels.perturb(dfkernels.blur(latents), dfkernels.ranks(saliency), rows, indices, fill=latents)
    assert perturbed.shape == (6, 4, 7, 13)


def test_errors_name_the_remedy() -> None:
    # Mismatched shapes are caught by the annotations here; test_fused_perturb tests their messages.
    with pytest.raises(ValueError, match="window 10 is not a positive odd number"):
        dfkernels.blur(random(2, 4, 7, 13), window=10)
    with pytest.raises(ValueError, match=r"sigma 0\.0 is not positive"):
        dfkernels.blur(random(2, 4, 7, 13), sigma=0.0)
