"""The fused deletion and insertion latents against the reference."""

import itertools

import pytest
import torch
from dfkernels import games
from dfkernels.fused import perturb as fused
from fused import DEVICE, ODD_SHAPES, exact_in, poisoned
from tolerance import tolerance
from torch.testing import assert_close

pytestmark = pytest.mark.grid

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ROWS = torch.tensor([0, 1, -1, 1, 0, -1], device=DEVICE)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_equals_reference(
    c: int,
    shape: tuple[int, int],
    insertion: bool,
    *,
    dtype: torch.dtype = torch.float32,
    out: torch.dtype | None = None,
) -> None:
    """Compare curve points 0, 1, h // 2 + 1 and h, with many ties in the saliency."""
    h, _ = shape
    latents = exact_in(out or dtype, random(2, c, *shape).to(dtype))
    ranks = games.ranks(random(2, *shape, seed=1).round())
    indices = torch.tensor([h, 1, h, h // 2 + 1, 0, 0], device=DEVICE)
    start = exact_in(out or dtype, games.blur(latents)) if insertion else latents
    arguments = (start, ranks, ROWS, indices)
    fill = latents if insertion else None
    with poisoned():
        ours = fused.perturb(*arguments, fill=fill, dtype=out)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert not ours[ROWS < 0].any()
    assert_close(ours, games.perturb(*arguments, fill=fill, dtype=out), **tolerance("perturb"))


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("insertion", [False, True])
def test_any_shape(shape: tuple[int, int], insertion: bool) -> None:
    assert_equals_reference(4, shape, insertion)


@pytest.mark.parametrize("c", [1, 3, 16, 17])
@pytest.mark.parametrize("insertion", [False, True])
def test_any_number_of_channels(c: int, insertion: bool) -> None:
    assert_equals_reference(c, (7, 13), insertion)


@pytest.mark.parametrize(("dtype", "out"), [*itertools.product(DTYPES, (None, *DTYPES)), (torch.float64, None)])
def test_any_dtype(dtype: torch.dtype, out: torch.dtype | None) -> None:
    assert_equals_reference(4, (5, 3), True, dtype=dtype, out=out)


@pytest.mark.slow
def test_blocks_of_a_large_image_meet() -> None:
    latents, one = random(1, 4, 128, 128).half(), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ranks = games.ranks(random(1, 128, 128, seed=1))
    with poisoned():
        ours = fused.perturb(latents, ranks, one, one + 77)
    assert_close(ours, games.perturb(latents, ranks, one, one + 77), **tolerance("perturb"))


def test_whole_curves_in_parts() -> None:
    latents, ranks = random(3, 4, 7, 13), games.ranks(random(3, 7, 13, seed=1))
    rows, indices = torch.arange(3, device=DEVICE).repeat_interleave(8), torch.arange(8, device=DEVICE).repeat(3)
    complete = games.perturb(latents, ranks, rows, indices)
    for part in (slice(0, 5), slice(5, 24)):
        assert_close(fused.perturb(latents, ranks, rows[part], indices[part]), complete[part], **tolerance("perturb"))


def test_padding_and_replaced_pixels_ignore_nan_latents() -> None:
    latents, ranks = random(2, 4, 7, 13), games.ranks(random(2, 7, 13, seed=1))
    latents[0] = torch.nan
    indices = torch.tensor([7, 3, 2, 1, 7, 0], device=DEVICE)
    assert fused.perturb(latents, ranks, ROWS, indices).isfinite().all()  # row 0 is replaced completely
    assert fused.perturb(latents, ranks, ROWS, indices - (ROWS == 0) * 7)[0].isnan().all()


def test_strided_and_int32_vectors() -> None:
    latents, ranks = random(2, 3, 7, 13), games.ranks(random(2, 7, 13, seed=1))
    indices = torch.tensor([1, 2, 3, 4, 5, 6], device=DEVICE)
    expected = games.perturb(latents, ranks, ROWS, indices)
    apart = torch.stack((ROWS, indices), 1).unbind(1)
    channels_last = latents.contiguous(memory_format=torch.channels_last)
    assert_close(fused.perturb(channels_last, ranks, *apart), expected, **tolerance("perturb"))
    ours = fused.perturb(latents, ranks.long(), ROWS.int(), indices.int())
    assert_close(ours, expected, **tolerance("perturb"))


def test_no_entries() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert fused.perturb(random(2, 3, 7, 13), games.ranks(random(2, 7, 13)), none, none).shape == (0, 3, 7, 13)


def test_errors_name_the_remedy() -> None:
    latents, ranks = random(2, 3, 7, 13), games.ranks(random(2, 7, 13))
    with pytest.raises(ValueError, match=r"got ranks \(1, 7, 13\) for latents \(2, 3, 7, 13\), expected \(2, 7, 13\)"):
        fused.perturb(latents, ranks[:1], ROWS, ROWS)
    with pytest.raises(ValueError, match=r"got fill \(1, 3, 7, 13\), expected the latents' shape \(2, 3, 7, 13\)"):
        fused.perturb(latents, ranks, ROWS, ROWS, fill=latents[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("insertion", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_diffusion_size(insertion: bool, dtype: torch.dtype) -> None:
    assert_equals_reference(4, (64, 64), insertion, dtype=dtype)
    assert_equals_reference(16, (128, 128), insertion, dtype=torch.float32, out=dtype)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    c, side = 4, 128
    n = 2**31 // (c * side * side) + 3
    latents, ranks = random(3, c, side, side).half(), games.ranks(random(3, side, side, seed=1))
    rows, indices = torch.arange(n, device=DEVICE) % 3, torch.arange(n, device=DEVICE) % (side + 1)
    perturbed = fused.perturb(latents, ranks, rows, indices)
    assert perturbed.numel() > 2**31
    for part in (slice(0, 4), slice(n // 2 - 2, n // 2 + 2), slice(n - 4, n)):
        expected = games.perturb(latents, ranks, rows[part], indices[part])
        assert_close(perturbed[part], expected, **tolerance("perturb"))
