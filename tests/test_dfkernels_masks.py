"""Philox, masks and masked latents against the published algorithm in scalar Python."""

import math

import dfkernels
import pytest
import torch
import torch.nn.functional as F
from dfkernels import MaskDistribution, designs
from distributions import NAMES, distribution
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard
from scipy.stats import kstest
from tolerance import tolerance
from torch.testing import assert_close

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
PARTS = ((0, 1), (1, 12), (13, 7))


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
    mask = dfkernels.masks(0, 0, 0, 1, (1, 1), distribution("gaussian", threshold / 2**32))
    assert mask.item() is kept


@given(U64, U32, st.integers(0, 2**32 - 3), st.sampled_from([(7, 13), (1, 1), (4, 4), (3, 1)]), st.floats(0.05, 0.95))
def test_gaussian_masks_equal_the_scalar_specification(
    seed: int, step: int, first: int, shape: tuple[int, int], p: float
) -> None:
    masks = dfkernels.masks(seed, step, first, 3, shape, distribution("gaussian", p))
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
    masks = dfkernels.masks(seed, step, 5, 2, shape, distribution("rise", p, grid))
    expected = torch.stack([rise_scalar(seed, step, n, shape, p, grid) for n in (5, 6)])
    assert masks.dtype == torch.float32
    assert_close(masks, expected, **tolerance("masks_rise"))


@pytest.mark.parametrize("kind", ["gaussian", "rise"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(kind: str, p: float) -> None:
    masks = dfkernels.masks(3, 2, 0, 2000, (16, 16), distribution(kind, p)).double()
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


@pytest.mark.parametrize("kind", NAMES)
def test_masks_do_not_depend_on_batch_or_order(kind: str) -> None:
    complete = dfkernels.masks(11, 4, 0, 20, (7, 13), distribution(kind))
    parts = [
        dfkernels.masks(11, 4, first, count, (7, 13), distribution(kind)) for first, count in ((0, 1), (1, 12), (13, 7))
    ]
    assert torch.equal(torch.cat(parts), complete)

    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    drawn = dfkernels.draw_masks(torch.full((20,), 11), torch.full((20,), 4), order, (7, 13), distribution(kind))
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
        ({"count": -1}, "count -1 is negative"),
        ({"first": -1}, r"masks -1 to 0 are outside \[0, 2\*\*32\)"),
        ({"first": 2**32 - 1}, "masks 4294967295 to 4294967296 are outside"),
        ({"step": -1}, "step -1 is outside"),
        ({"step": 2**32}, "step 4294967296 is outside"),
        ({"seed": 2**64}, "does not fit in 64 bits"),
        ({"shape": (0, 4)}, r"mask shape \(0, 4\)"),
    ],
)
def test_errors_name_the_remedy(change: dict, message: str) -> None:
    arguments = {"seed": 0, "step": 0, "first": 0, "count": 2, "shape": (4, 4)} | change
    with pytest.raises(ValueError, match=message):
        dfkernels.masks(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_probability": 0.0}, r"keep_probability 0\.0 is outside \(0, 1\)"),
        ({"keep_probability": 1.0}, r"keep_probability 1\.0 is outside \(0, 1\)"),
        ({"keep_probability": float("nan")}, "keep_probability nan"),
        ({"kind": "lime"}, "unknown mask kind 'lime': choose one of gaussian, rise"),
        ({"grid": 0}, "grid 0"),
        ({"cells": ()}, r"cells \(\) are not possible: give 1 to 4 sizes of 1 to 127 latent pixels"),
        ({"cells": (2, 0)}, r"cells \(2, 0\) are not possible"),
        ({"cells": (1, 2, 3, 4, 5)}, "are not possible"),
        ({"cells": (128,)}, "are not possible"),
        ({"design": "latin"}, "unknown design 'latin': choose one of iid, orthogonal"),
        ({"kind": "rise", "cells": (2,)}, "rise masks have a grid of their own"),
        ({"kind": "rise", "design": "orthogonal"}, "rise masks have a grid of their own"),
        ({"design": "orthogonal", "keep_probability": 0.3}, r"keeps half of the cells, not 0\.3: use iid"),
        ({"design": "orthogonal", "block": 24}, "block 24 is not a power of two from 2 to 2048"),
        ({"design": "orthogonal", "block": 1}, "block 1 is not"),
        ({"design": "orthogonal", "block": 4096}, "block 4096 is not"),
    ],
)
def test_errors_of_distributions_name_the_remedy(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskDistribution(**change)


# Cells and designs ---------------------------------------------------------------------------------------------------


def cells_scalar(mask: torch.Tensor, cell: int, shift: int = 0) -> dict[tuple[int, int], bool]:
    """The value of every cell of a mask, which must be the same at all of its pixels."""
    values: dict[tuple[int, int], bool] = {}
    count = [math.ceil(size / cell) for size in mask.shape]
    for y, row in enumerate(mask.tolist()):
        for x, value in enumerate(row):
            place = (y + shift) // cell % count[0], (x + shift) // cell % count[1]
            assert values.setdefault(place, value) == value
    return values


@pytest.mark.parametrize("seed", [3, 2**63 + 5])
def test_cells_equal_the_scalar_specification(seed: int) -> None:
    shape, law = (7, 13), MaskDistribution(0.3, cells=(3, 2), shifted=True)
    for n in (0, 1, 2, 12, 13, 101):
        cell, turn = (3, 2)[n % 2], n // 2
        (mask,) = dfkernels.masks(seed, 2, n, 1, shape, law)
        columns = -(-13 // cell)
        for (y, x), kept in cells_scalar(mask, cell, turn % 2 * (cell // 2)).items():
            assert kept == (random_uint32_scalar(seed, 2, n, y * columns + x, 0) < round(0.3 * 2**32))


def signs(law: MaskDistribution, shape: tuple[int, int], first: int = 0, count: int = 0) -> torch.Tensor:
    """±1 of every mask and pixel."""
    return 2 * dfkernels.masks(9, 4, first, count or law.randomisation, shape, law).double() - 1


@pytest.mark.parametrize(("cell", "block", "shifted"), [(4, 32, False), (4, 64, True), (8, 8, False), (2, 128, False)])
def test_an_orthogonal_design_balances_every_pair_of_cells(cell: int, block: int, shifted: bool) -> None:
    law = MaskDistribution(cells=(cell,), shifted=shifted, design="orthogonal", block=block)
    for first in (0, block, 7 * block):
        drawn = signs(law, (16, 16), first, block)
        gram = torch.einsum("nyx,nvu->yxvu", drawn, drawn).reshape(256, 256)
        # Pixels of one cell are the same in every mask, all others are uncorrelated.
        assert set(gram.unique().tolist()) == {0, block}
        area = (gram == block).sum(1)
        assert shifted or (area == cell * cell).all()


def test_every_tile_of_an_orthogonal_design_is_balanced() -> None:
    law = MaskDistribution(design="orthogonal", block=64)  # tiles of 8 × 4 pixels
    tiles = signs(law, (16, 16)).reshape(64, 2, 8, 4, 4).permute(1, 3, 0, 2, 4).reshape(8, 64, 32)
    assert torch.equal(tiles.transpose(1, 2) @ tiles, 64 * torch.eye(32, dtype=torch.float64).expand(8, -1, -1))
    # Tiles are permuted independently: no two hold the same columns.
    across = (tiles[0].T @ tiles[1]).abs()
    assert 0 < across.mean() < 32


def test_overlapping_cells_favour_no_side() -> None:
    """A score that is the same whichever pixels are kept has the same contrast everywhere."""
    law = MaskDistribution(cells=(4,), shifted=True, design="orthogonal", block=32)
    drawn = (signs(law, (16, 16), 0, 64 * 64) + 1) / 2
    share = drawn.mean((1, 2))
    contrast = 2 * ((2 * drawn - 1) * share[:, None, None]).mean(0)
    assert_close(contrast, torch.full_like(contrast, 1 / 16), rtol=0, atol=0.004)


@pytest.mark.parametrize("block", [2, 4, 16, 2048])
@pytest.mark.parametrize("cells", [(1,), (2, 4, 8), (5,)])
def test_masks_of_an_orthogonal_design_come_with_their_complements(block: int, cells: tuple[int, ...]) -> None:
    law = MaskDistribution(cells=cells, shifted=len(cells) > 1, design="orthogonal", block=block)
    drawn = signs(law, (9, 7))
    assert torch.equal(drawn[0::2], -drawn[1::2])
    assert not drawn.sum(0).any()


def test_an_orthogonal_design_equals_scipys_hadamard_array() -> None:
    law = MaskDistribution(cells=(2,), design="orthogonal", block=32)
    (first, second, third, fourth), array = philox_scalar([0, 3, 4, 5], [9, 0]), hadamard(16)
    drawn = dfkernels.masks(9, 4, 3 * 32, 32, (8, 8), law)

    def permute(x: int, one: int, two: int) -> int:
        for shift in (0, 10, 20):
            x = ((one >> shift) % 1024 // 2 * 2 + 1) * x + (two >> shift) % 1024
            x = x % 16 ^ x % 16 >> 2
        return x

    assert sorted(permute(j, first, second) for j in range(16)) == list(range(16))
    for n, mask in enumerate(drawn):
        for (y, x), kept in cells_scalar(mask, 2).items():
            j = 4 * y + x
            sign = 1 - 2 * (random_uint32_scalar(9, 4, 3, j, 6) >> 31)
            entry = array[permute(n // 2, third, fourth), permute(j, first, second)] * sign * (1 - 2 * (n % 2))
            assert kept == (entry < 0)


def test_permutations_mix() -> None:
    g = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (20_000, 2, 1), generator=g)
    for order in (2, 8, 32, 1024):
        x = designs.permuted(torch.arange(order).expand(len(words), -1), *words.expand(-1, -1, order).unbind(1), order)
        assert torch.equal(x.sort(1).values, torch.arange(order).expand_as(x))
        # Every number goes everywhere, and no difference of two is preferred.
        for one in (x[:, 0], x[:, -1], x[:, 0] ^ x[:, 1]):
            assert torch.bincount(one).max() < 2 * len(x) / order + 30 if order > 2 else True


@pytest.mark.parametrize(
    ("num_masks", "shape", "law", "block"),
    [
        (256, (16, 16), {"cells": (4,)}, 32),  # 16 cells need 32
        (256, (16, 16), {"cells": (1,)}, 64),  # four randomisations
        (256, (16, 16), {"cells": (2, 4)}, 32),  # of two sizes
        (300, (16, 16), {"cells": (1,)}, 64),
        (3, (16, 16), {"cells": (1,)}, 2),
        (10**6, (64, 64), {"cells": (1,)}, 2048),
        (10**6, (9, 9), {"cells": (4,), "shifted": True}, 32),  # 3 × 3 cells
        (256, (16, 16), {"cells": (4,), "shifted": True}, 32),
        (255, (16, 16), {"cells": (4,), "shifted": True}, 16),  # four randomisations of two shifts
    ],
)
def test_the_block_of_an_orthogonal_design(num_masks: int, shape: tuple[int, int], law: dict, block: int) -> None:
    assert dfkernels.orthogonal_block(num_masks, shape, MaskDistribution(**law)) == block


# Apply masks ---------------------------------------------------------------------------------------------------------

SEEDS, STEPS = torch.tensor([4, -9]), torch.tensor([0, 6])
ROWS, INDICES = torch.tensor([1, 0, -1, 1, 1]), torch.tensor([0, 0, 3, 1, 2])


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_apply_masks_multiplies_each_rows_latent(kind: str, channels: int) -> None:
    latents = torch.randn(2, channels, 7, 13, generator=torch.Generator().manual_seed(0))
    masked = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, distribution(kind, 0.3, 3))
    assert masked.is_contiguous(memory_format=torch.channels_last)
    for entry, row, index in zip(masked, ROWS.tolist(), INDICES.tolist(), strict=True):
        if row < 0:
            assert not entry.any()
            continue
        seed, step = SEEDS[row].item(), STEPS[row].item()
        mask = dfkernels.masks(seed, step, index, 1, (7, 13), distribution(kind, 0.3, 3))
        assert_close(entry, latents[row] * mask, **tolerance("apply_masks"))


@pytest.mark.parametrize("kind", NAMES)
def test_apply_masks_in_another_dtype_and_with_poisoned_padding(kind: str) -> None:
    latents = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    exact = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, distribution(kind))
    assert exact.dtype == torch.float32
    half = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, distribution(kind), dtype=torch.float16)
    assert half.dtype == torch.float16
    assert_close(half, exact.half(), **tolerance("apply_masks"))

    latents[0] = torch.nan
    poisoned = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, distribution(kind), dtype=torch.float16)
    assert not poisoned[2].any()
    assert_close(poisoned[3:], half[3:], **tolerance("apply_masks"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_the_hot_path_never_waits_for_the_device(kind: str) -> None:
    # Meta tensors hold no values, so reading one on the host (.item(), a boolean index) raises.
    seeds, steps, rows, indices = (tensor.to("meta") for tensor in (SEEDS, STEPS, ROWS, INDICES))
    latents = torch.empty(2, 3, 7, 13, device="meta")
    masked = dfkernels.apply_masks(latents, seeds, steps, rows, indices, distribution(kind))
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
                distribution(kind),
                similarity=similarity,
                score=score,
            )
            assert means.shape == (5,)


# Fill ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
def test_a_fill_takes_the_place_of_dropped_pixels(kind: str) -> None:
    latents = torch.randn(2, 5, 7, 13, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 0.5], [-1.0, 0.0, 0.0, 0.0, 7.0, 2.0]])
    masked = dfkernels.apply_masks(latents, SEEDS, STEPS, ROWS, INDICES, distribution(kind), fill=fill)
    for entry, row, index in zip(masked, ROWS.tolist(), INDICES.tolist(), strict=True):
        if row < 0:
            assert not entry.any()
            continue
        place = (SEEDS[row : row + 1], STEPS[row : row + 1], torch.tensor([index]))
        mask = dfkernels.draw_masks(*place, (7, 13), distribution(kind)).float()
        noise = designs.normal(*place, 5, 91)[0].unflatten(1, (7, 13))
        filled = fill[row, :5, None, None] + fill[row, 5] * noise
        assert_close(entry, mask * latents[row] + (1 - mask) * filled, **tolerance("normal"))


def test_normal_numbers_equal_the_scalar_specification() -> None:
    drawn = designs.normal(*(torch.tensor([x]) for x in (9, 4, 3)), 6, 5)[0]
    for channel, pixel in ((0, 0), (1, 0), (2, 3), (3, 4), (4, 1), (5, 4)):
        words = philox_scalar([pixel * 2 + channel // 4, 3, 4, 7], [9, 0])
        u, v = ((word // 2**9 + 0.5) / 2**23 for word in words[channel % 4 // 2 * 2 :][:2])
        angle = 2 * math.pi * v
        expected = math.sqrt(-2 * math.log(u)) * (math.sin(angle) if channel % 2 else math.cos(angle))
        assert drawn[channel, pixel].item() == pytest.approx(expected, abs=2e-5)


def test_normal_numbers_are_normal() -> None:
    drawn = designs.normal(torch.arange(200), torch.zeros(200, dtype=torch.int64), torch.arange(200), 4, 256)
    assert kstest(drawn.flatten().double().numpy(), "norm").pvalue > 1e-3
    channels = torch.corrcoef(drawn.transpose(0, 1).flatten(1))
    assert (channels - torch.eye(4)).abs().max() < 4.5 / (200 * 256) ** 0.5
