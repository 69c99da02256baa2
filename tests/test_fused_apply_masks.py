"""Masks drawn inside kernels, and masked latents, against the reference."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from dfkernels import MaskDistribution, counters, designs
from dfkernels.fused import apply_masks as fused
from dfkernels.fused import mask
from distributions import MOST, NAMES, distribution
from fused import DEVICE, ODD_SHAPES, exact_in, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import tolerance
from torch.testing import assert_close

pytestmark = pytest.mark.grid

#: The interpreter is slow.
PROPERTY = settings(max_examples=max(1, settings.default.max_examples // 2))
U32 = st.integers(0, 2**32 - 1)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Rows of three, padding between and at the end, and the ends of every counter's range.
SEEDS, STEPS = torch.tensor([4, -9, 2**63 - 1], device=DEVICE), torch.tensor([0, 2**32 - 1, 6], device=DEVICE)
ROWS = torch.tensor([1, 0, -1, 2, 1, -1], device=DEVICE)
INDICES = torch.tensor([0, 2**32 - 1, 3, 2**31, 1, 2], device=DEVICE)


def latents(c: int, h: int, w: int, dtype: torch.dtype = torch.float32, r: int = 3) -> torch.Tensor:
    return torch.randn(r, c, h, w, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def masking_tolerance(kind: str, dtype: torch.dtype) -> dict[str, float]:
    return tolerance(f"apply_masks_rise_{str(dtype).removeprefix('torch.')}" if kind == "rise" else "apply_masks")


def assert_equals_reference(
    x: torch.Tensor, kind: str = "gaussian", p: float = 0.5, grid: int = 8, **settings: object
) -> None:
    arguments = (x, SEEDS, STEPS, ROWS, INDICES, distribution(kind, p, grid))
    with poisoned():
        ours = fused.apply_masks(*arguments, **settings)
    expected = designs.apply_masks(*arguments, **settings)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours, expected, **masking_tolerance(kind, ours.dtype))


# Philox --------------------------------------------------------------------------------------------------------------


@triton.jit
def _philox(numbers, out):
    lane = tl.arange(0, 4)
    c0, c1 = tl.load(numbers + 0).to(tl.uint32), tl.load(numbers + 1).to(tl.uint32)
    c2, c3 = tl.load(numbers + 2).to(tl.uint32), tl.load(numbers + 3).to(tl.uint32)
    k0, k1 = tl.load(numbers + 4).to(tl.uint32), tl.load(numbers + 5).to(tl.uint32)
    w0, w1, w2, w3 = mask.philox(c0, c1, c2, c3, k0, k1)
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(out + lane, word.to(tl.int64))


@triton.jit
def _random_uint32(entry, out, first, STREAM: tl.constexpr, COUNT: tl.constexpr, ANY: tl.constexpr):
    k0, k1 = tl.load(entry + 0).to(tl.uint32), tl.load(entry + 1).to(tl.uint32)
    step, index = tl.load(entry + 2).to(tl.uint32), tl.load(entry + 3).to(tl.uint32)
    position = tl.arange(0, COUNT)
    if ANY:
        word = mask.random_uint32_at(first + position, k0, k1, step, index, STREAM)
    else:
        word = mask.random_uint32(first, k0, k1, step, index, STREAM, COUNT)
    tl.store(out + position, word.to(tl.int64))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors: zeros, ones and the digits of pi.
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str) -> None:
    out = torch.full((4,), -1, device=DEVICE)
    _philox[(1,)](torch.tensor([*counter, *key], device=DEVICE), out)
    assert [f"{word:08x}" for word in out.tolist()] == expected.split()


@PROPERTY
@given(U32, U32, U32, U32, st.integers(0, 5000), st.integers(0, 2), st.booleans())
def test_random_numbers_equal_the_specification(
    low: int, high: int, step: int, index: int, block: int, stream: int, any_: bool
) -> None:
    out = torch.full((16,), -1, device=DEVICE)
    entry = torch.tensor([low, high, step, index], device=DEVICE)
    _random_uint32[(1,)](entry, out, 4 * block, STREAM=stream, COUNT=16, ANY=any_)
    seed = low + (high << 32) - 2**64 * (high >> 31)
    expected = counters.random_uint32(*(torch.tensor([x]) for x in (seed, step, index)), 4 * block + 16, stream)
    assert out.tolist() == expected[0, 4 * block :].tolist()


# Draw ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize(("kind", "grid"), [*((name, 8) for name in NAMES), ("rise", 1), ("rise", 3), ("rise", 32)])
def test_masks_equal_the_reference(shape: tuple[int, int], kind: str, grid: int) -> None:
    arguments = SEEDS, STEPS, INDICES[:3], shape, distribution(kind, 0.3, grid)
    with poisoned():
        ours = fused.draw_masks(*arguments)
    assert_close(ours, designs.draw_masks(*arguments), **tolerance("masks_rise" if kind == "rise" else "masks"))


# p·2³² rounds to 0, 1, 2³¹ − 1 and 2³¹ (the sign bit of 32), to a drawn number and one above, 2³² − 1 and 2³².
@pytest.mark.parametrize(
    "threshold", [0.25, 1, 2**31 - 1, 2**31, 0x6627E8D5, 0x6627E8D5 + 0.6, 2**32 - 1, 2**32 - 0.25]
)
@pytest.mark.parametrize("kind", ["gaussian", "rise", "cells"])
def test_thresholds_are_compared_unsigned(threshold: float, kind: str) -> None:
    arguments = 0, 0, 0, 2, (5, 7), distribution(kind, threshold / 2**32)
    ours = fused.masks(*arguments, device=DEVICE)
    assert_close(ours.cpu(), designs.masks(*arguments), **tolerance("masks_rise" if kind == "rise" else "masks"))


def test_only_the_highest_threshold_keeps_the_highest_number() -> None:
    # Found by search: word 2 of counter (0, 105672652, 0, 0), key 0, is ffffffff.
    for threshold, kept in ((2**32 - 1, False), (2**32 - 0.25, True)):
        for masks in (designs.masks, fused.masks):
            mask_ = masks(0, 0, 105672652, 1, (1, 4), MaskDistribution(threshold / 2**32), device=DEVICE)
            assert mask_.tolist() == [[[True, True, kept, True]]]


@triton.jit
def _weights_at(
    pixels, out, k0, k1, step, index, h, w, threshold, cells, bits,
    GRID: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :]
    zero = tl.load(pixels).to(tl.uint32) * 0
    pixel = tl.load(pixels + at)
    weight = mask.weights_at(
        pixel, zero + k0, zero + k1, zero + step, zero + index, h, w, threshold, cells, bits,
        GRID, KIND, LEVELS, SHIFTED,
    )  # fmt: skip
    tl.store(out + at, weight)


@pytest.mark.parametrize("kind", NAMES)
def test_weights_at_arbitrary_pixels(kind: str) -> None:
    pixels = torch.randperm(91, generator=torch.Generator().manual_seed(0))[:32].reshape(4, 8)
    out = torch.full((4, 8), torch.nan, device=DEVICE)
    at = pixels.to(DEVICE, torch.int32)
    law = distribution(kind, 0.3, 3)
    _weights_at[(1,)](at, out, 7, 5, 3, 11, 7, 13, **mask.runtime_arguments(law), **mask.constants(law))
    (mask_,) = designs.masks(7 + (5 << 32), 3, 11, 1, (7, 13), law)
    assert_close(out.cpu(), mask_.flatten()[pixels].float(), **tolerance("masks_rise"))


# Apply masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("kind", MOST)
def test_apply_masks_equals_the_reference(shape: tuple[int, int], kind: str) -> None:
    assert_equals_reference(latents(4, *shape), kind, 0.3, 3)


@pytest.mark.parametrize("c", [1, 3, 16, 17])
@pytest.mark.parametrize("kind", MOST)
def test_any_number_of_channels(c: int, kind: str) -> None:
    assert_equals_reference(latents(c, 7, 13), kind)


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize(("dtype", "out"), [*itertools.product(DTYPES, (None, *DTYPES)), (torch.float64, None)])
def test_any_dtype(kind: str, dtype: torch.dtype, out: torch.dtype | None) -> None:
    assert_equals_reference(exact_in(out or dtype, latents(4, 5, 3, dtype)), kind, dtype=out)


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("c", [1, 4, 17])
def test_a_fill_equals_the_reference(kind: str, c: int) -> None:
    fill = torch.randn(3, c + 1, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments = latents(c, 7, 5), SEEDS, STEPS, ROWS, INDICES, distribution(kind)
    with poisoned():
        ours = fused.apply_masks(*arguments, fill=fill)
    assert_close(ours, designs.apply_masks(*arguments, fill=fill), **tolerance("normal"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 128), (96, 64)])
def test_blocks_of_a_large_image_meet(shape: tuple[int, int]) -> None:
    one = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    x = latents(16, *shape, dtype=torch.float16, r=1)
    with poisoned():
        ours = fused.apply_masks(x, SEEDS[:1], STEPS[:1], one, one + 5)
    assert_close(ours, designs.apply_masks(x, SEEDS[:1], STEPS[:1], one, one + 5), **tolerance("apply_masks"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter
def test_the_product_is_rounded_once() -> None:
    x = latents(4, 7, 13).sign() * 1e5  # beyond float16, but not where RISE's mask is below 0.65
    assert_equals_reference(x, "rise", dtype=torch.float16)


def test_padding_yields_zeros_for_nan_latents() -> None:
    x = latents(3, 7, 13)
    x[0] = torch.nan
    with poisoned():
        masked = fused.apply_masks(x, SEEDS, STEPS, ROWS, INDICES)
    assert not masked[ROWS < 0].any()
    assert masked[1].isnan().all()  # an entry's own NaN is kept, masked or not: 0 · NaN is NaN


def test_strided_and_int32_vectors() -> None:
    x = latents(3, 7, 13).contiguous(memory_format=torch.channels_last)
    expected = designs.apply_masks(x, SEEDS, STEPS, ROWS, INDICES)
    apart = (torch.stack((vector, vector + 1), 1)[:, 0] for vector in (SEEDS, STEPS, ROWS, INDICES))
    assert_close(fused.apply_masks(x, *apart), expected, **tolerance("apply_masks"))
    one, small = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    expected = designs.apply_masks(x, SEEDS, one.new_full((3,), 2), one, small)
    narrow = (tensor.to(torch.int32) for tensor in (one.new_full((3,), 2), one, small))
    assert_close(fused.apply_masks(x, SEEDS, *narrow), expected, **tolerance("apply_masks"))


def test_no_entries() -> None:
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert fused.apply_masks(latents(3, 7, 13), SEEDS, STEPS, none, none).shape == (0, 3, 7, 13)
    assert fused.draw_masks(none, none, none, (7, 13)).shape == (0, 7, 13)


def test_errors_match_the_reference() -> None:
    with pytest.raises(ValueError, match="masks -1 to 0 are outside"):
        fused.masks(0, 0, -1, 2, (7, 13), device=DEVICE)


# Full size -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stable_diffusion_size(kind: str, dtype: torch.dtype) -> None:
    x = latents(4, 64, 64, dtype, r=8)
    row, index = torch.arange(8, device=DEVICE), torch.arange(1000, device=DEVICE)
    entries = (row - 4, row, index % 9 - 1, index)
    with poisoned():
        ours = fused.apply_masks(x, *entries, distribution(kind))
    assert_close(ours, designs.apply_masks(x, *entries, distribution(kind)), **masking_tolerance(kind, dtype))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    c, side = 4, 128
    n = 2**31 // (c * side * side) + 3
    x = latents(c, side, side, torch.float16)
    rows, indices = torch.arange(n, device=DEVICE) % 3, torch.arange(n, device=DEVICE)
    masked = fused.apply_masks(x, SEEDS, STEPS, rows, indices)
    drawn = fused.draw_masks(SEEDS[rows], STEPS[rows], indices, (side, side))
    assert masked.numel() > 2**31
    for part in (slice(0, 4), slice(n // 2 - 2, n // 2 + 2), slice(n - 4, n)):
        expected = designs.apply_masks(x, SEEDS, STEPS, rows[part], indices[part])
        assert_close(masked[part], expected, **tolerance("apply_masks"))
        masks = designs.draw_masks(SEEDS[rows[part]], STEPS[rows[part]], indices[part], (side, side))
        assert torch.equal(drawn[part], masks)
