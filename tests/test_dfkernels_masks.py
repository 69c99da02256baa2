"""Philox, masks and masked latents against the published algorithm in scalar Python."""

import dfkernels
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerance import tolerance
from torch.testing import assert_close

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as printed by Salmon et al. 2011, in Python integers, for one block."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * c0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def random_uint32_scalar(seed: int, step: int, index: int, position: int, stream: int) -> int:
    return philox_scalar([position // 4, index, step, stream], [seed % 2**32, seed // 2**32])[position % 4]


def rise_scalar(seed: int, step: int, index: int, shape: tuple[int, int], p: float, s: int) -> torch.Tensor:
    """The complete field upsampled by torch's own interpolation, then cropped."""
    cells = [float(random_uint32_scalar(seed, step, index, j, 1) < round(p * 2**32)) for j in range(s * s)]
    field = torch.tensor(cells, dtype=torch.float64).reshape(1, 1, s, s)
    cell = [-(-size // s) for size in shape]
    large = F.interpolate(field, [(s + 1) * side for side in cell], mode="bilinear", align_corners=False)[0, 0]
    y, x = (random_uint32_scalar(seed, step, index, j, 2) % cell[j] for j in range(2))
    return large[y : y + shape[0], x : x + shape[1]].float()


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
    assert [f"{word:08x}" for word in dfkernels.philox(torch.tensor(counter), torch.tensor(key))] == expected.split()
    assert [f"{word:08x}" for word in philox_scalar(counter, key)] == expected.split()


@given(st.lists(st.lists(U32, min_size=4, max_size=4), min_size=1, max_size=5), st.tuples(U32, U32))
def test_philox_is_the_published_algorithm(counters: list[list[int]], key: tuple[int, int]) -> None:
    ours = dfkernels.philox(torch.tensor(counters), torch.tensor(key))
    assert ours.tolist() == [philox_scalar(counter, list(key)) for counter in counters]


def test_first_mask_by_hand() -> None:
    # Counter 0, key 0 gives 6627e8d5 e169c58d bc57ac4c 9b00dbd8; half of 2³² is 80000000.
    assert dfkernels.masks(0, 0, 0, 1, (1, 4)).tolist() == [[[True, False, False, False]]]
    assert dfkernels.masks(0, 0, 0, 1, (2, 2)).tolist() == [[[True, False], [False, False]]]


@pytest.mark.parametrize(("threshold", "kept"), [(0x6627E8D5, False), (0x6627E8D5 + 1, True), (0x6627E8D5 + 0.6, True)])
def test_a_pixel_is_kept_below_the_rounded_threshold(threshold: float, kept: bool) -> None:
    mask = dfkernels.masks(0, 0, 0, 1, (1, 1), keep_probability=threshold / 2**32)
    assert mask.item() is kept


@given(U64, U32, st.integers(0, 2**32 - 3), st.sampled_from([(7, 13), (1, 1), (4, 4), (3, 1)]), st.floats(0.05, 0.95))
def test_gaussian_masks_equal_the_scalar_specification(
    seed: int, step: int, first: int, shape: tuple[int, int], p: float
) -> None:
    masks = dfkernels.masks(seed, step, first, 3, shape, keep_probability=p)
    threshold = round(p * 2**32)
    for n, mask in enumerate(masks.flatten(1).tolist()):
        assert mask == [random_uint32_scalar(seed, step, first + n, j, 0) < threshold for j in range(len(mask))]


@given(
    U64,
    U32,
    st.sampled_from([(16, 16), (7, 13), (5, 40), (1, 9), (33, 8)]),
    st.floats(0.1, 0.9),
    st.sampled_from([1, 3, 8]),
)
def test_rise_masks_equal_torch_interpolation(
    seed: int, step: int, shape: tuple[int, int], p: float, grid: int
) -> None:
    masks = dfkernels.masks(seed, step, 5, 2, shape, keep_probability=p, kind="rise", grid=grid)
    expected = torch.stack([rise_scalar(seed, step, n, shape, p, grid) for n in (5, 6)])
    assert masks.dtype == torch.float32
    assert_close(masks, expected, **tolerance("masks_rise"))


@pytest.mark.parametrize("kind", dfkernels.reference.MASK_KINDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(kind: str, p: float) -> None:
    masks = dfkernels.masks(3, 2, 0, 2000, (16, 16), keep_probability=p, kind=kind).double()
    # 2000 masks of 256 independent pixels, or of 64 independent cells (weighted unevenly by the crop: at least 40).
    independent = 2000 * (256 if kind == "gaussian" else 40)
    assert abs(masks.mean().item() - p) < 4 * (p * (1 - p) / independent) ** 0.5
    # At each pixel too: RISE's mask is a mean of Bernoulli(p) whose weights add up to 1.
    assert (masks.mean(0) - p).abs().max().item() < 4.5 * (p * (1 - p) / 2000) ** 0.5


def test_masks_pixels_steps_and_seeds_are_uncorrelated() -> None:
    def sample(seed: int, step: int, first: int) -> torch.Tensor:
        return dfkernels.masks(seed, step, first, 500, (16, 16)).double() - 0.5

    base = sample(1, 2, 0)
    others = {
        "mask": sample(1, 2, 1),
        "step": sample(1, 3, 0),
        "seed": sample(2, 2, 0),
        "high seed": sample(1 + 2**32, 2, 0),
        "pixel": base.roll(1, -1),
    }
    for name, other in others.items():
        assert abs(4 * (base * other).mean().item()) < 4 / (500 * 256) ** 0.5, name


@pytest.mark.parametrize("kind", dfkernels.reference.MASK_KINDS)
def test_masks_do_not_depend_on_batch_or_order(kind: str) -> None:
    complete = dfkernels.masks(11, 4, 0, 20, (7, 13), kind=kind)
    parts = [dfkernels.masks(11, 4, first, count, (7, 13), kind=kind) for first, count in ((0, 1), (1, 12), (13, 7))]
    assert torch.equal(torch.cat(parts), complete)

    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    drawn = dfkernels.draw_masks(torch.full((20,), 11), torch.full((20,), 4), order, (7, 13), kind=kind)
    assert torch.equal(drawn, complete[order])


def test_draw_masks_accepts_mixed_seeds_and_steps() -> None:
    entries = [(5, 0, 9), (-1, 7, 0), (2**40, 1, 3)]
    drawn = dfkernels.draw_masks(*(torch.tensor(column) for column in zip(*entries, strict=True)), (7, 13))
    assert torch.equal(drawn, torch.cat([dfkernels.masks(s, t, i, 1, (7, 13)) for s, t, i in entries]))


def test_a_negative_seed_is_its_64_bit_pattern() -> None:
    assert torch.equal(dfkernels.masks(-3, 0, 0, 2, (9, 9)), dfkernels.masks(2**64 - 3, 0, 0, 2, (9, 9)))
    assert dfkernels.masks(0, 0, 0, 0, (7, 13)).shape == (0, 7, 13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_probability": 0.0}, r"keep_probability 0\.0 is outside \(0, 1\)"),
        ({"keep_probability": 1.0}, r"keep_probability 1\.0 is outside \(0, 1\)"),
        ({"keep_probability": float("nan")}, "keep_probability nan"),
        ({"kind": "lime"}, "unknown mask kind 'lime': choose one of gaussian, rise"),
        ({"count": -1}, "count -1 is negative"),
        ({"first": -1}, r"masks -1 to 0 are outside \[0, 2\*\*32\)"),
        ({"first": 2**32 - 1}, "masks 4294967295 to 4294967296 are outside"),
        ({"step": -1}, "step -1 is outside"),
        ({"step": 2**32}, "step 4294967296 is outside"),
        ({"seed": 2**64}, "does not fit in 64 bits"),
        ({"shape": (0, 4)}, r"mask shape \(0, 4\)"),
        ({"grid": 0}, "grid 0"),
    ],
)
def test_errors_name_the_remedy(change: dict, message: str) -> None:
    arguments = {"seed": 0, "step": 0, "first": 0, "count": 2, "shape": (4, 4)} | change
    with pytest.raises(ValueError, match=message):
        dfkernels.masks(**arguments)


# Apply masks ---------------------------------------------------------------------------------------------------------

SEEDS, STEPS = torch.tensor([4, -9]), torch.tensor([0, 6])
ROWS, INDICES = torch.tensor([1, 0, -1, 1, 1]), torch.tensor([0, 0, 3, 1, 2])


@pytest.mark.parametrize("kind", dfkernels.reference.MASK_KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_apply_masks_multiplies_each_rows_latent(kind: str, channels: int) -> None:
    latents = torch.randn(2, channels, 7, 13, generator=torch.Generator().manual_seed(0))
    masked = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, keep_probability=0.3, kind=kind, grid=3)
    assert masked.is_contiguous(memory_format=torch.channels_last)
    for entry, row, index in zip(masked, ROWS.tolist(), INDICES.tolist(), strict=True):
        if row < 0:
            assert not entry.any()
            continue
        seed, step = SEEDS[row].item(), STEPS[row].item()
        mask = dfkernels.masks(seed, step, index, 1, (7, 13), keep_probability=0.3, kind=kind, grid=3)
        assert_close(entry, latents[row] * mask, **tolerance("apply_masks"))


@pytest.mark.parametrize("kind", dfkernels.reference.MASK_KINDS)
def test_apply_masks_in_another_dtype_and_with_poisoned_padding(kind: str) -> None:
    latents = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    exact = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, kind=kind)
    assert exact.dtype == torch.float32
    half = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, kind=kind, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert_close(half, exact.half(), **tolerance("apply_masks"))

    latents[0] = torch.nan
    poisoned = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, kind=kind, dtype=torch.float16)
    assert not poisoned[2].any()
    assert_close(poisoned[3:], half[3:], **tolerance("apply_masks"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", dfkernels.reference.MASK_KINDS)
def test_the_hot_path_never_waits_for_the_device(kind: str) -> None:
    # Meta tensors hold no values, so reading one on the host (.item(), a boolean index) raises.
    seeds, steps, rows, indices = (tensor.to("meta") for tensor in (SEEDS, STEPS, ROWS, INDICES))
    latents = torch.empty(2, 3, 7, 13, device="meta")
    masked = dfkernels.apply_masks(latents, seeds, steps, rows, indices, kind=kind)
    sums = dfkernels.Sums.zeros(2, (7, 13), "meta")
    for similarity in dfkernels.reference.SIMILARITIES:
        for score in dfkernels.reference.SCORES:
            means = dfkernels.accumulate(
                masked,
                latents,
                sums,
                seeds,
                steps,
                rows,
                indices,
                similarity=similarity,
                score=score,
                mask_kind=kind,
            )
            assert means.shape == (5,)
