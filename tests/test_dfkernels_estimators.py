"""Running sums and the maps computed from them, against values worked out by hand, loops and repeated experiments."""

from itertools import pairwise

import dfkernels
import numpy as np
import pytest
import torch
from dfkernels import MaskDistribution, estimators
from distributions import MOST, NAMES, distribution
from hypothesis import given
from hypothesis import strategies as st
from tolerance import tolerance
from torch.testing import assert_close

SHAPE = (7, 13)
SEEDS, STEPS = torch.tensor([4, -9, 0]), torch.tensor([0, 6, 6])
ROWS = torch.tensor([0, 1, 1, 2, 0, 1, -1, 2, 2, 0, 1, -1])
INDICES = torch.tensor([0, 0, 1, 0, 1, 2, 7, 1, 2, 2, 3, 0])


def random_scores(score: str, n: int = len(ROWS)) -> torch.Tensor:
    shape = (n, *SHAPE) if score == "local" else (n,)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def moments(masks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Σ_n Mⁱ sʲ [1, 3, 3, h, w], by loops."""
    m, s = masks.double(), scores.double().reshape(len(scores), *scores.shape[1:] or (1, 1)).expand(masks.shape)
    return torch.stack([torch.stack([sum(m**i * s**j) for j in range(3)]) for i in range(3)])[None]


# Sums ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_add_sums_each_rows_masks_and_scores(kind: str, score: str) -> None:
    scores = random_scores(score)
    sums = dfkernels.Sums.zeros(3, SHAPE)
    dfkernels.add(sums, scores, SEEDS, STEPS, ROWS, INDICES, distribution(kind, 0.3, 3))
    for row in range(3):
        in_row = row == ROWS
        masks = torch.cat(
            [
                dfkernels.masks(SEEDS[row].item(), STEPS[row].item(), index, 1, SHAPE, distribution(kind, 0.3, 3))
                for index in INDICES[in_row].tolist()
            ]
        )
        assert_close(sums.moments[row : row + 1], moments(masks, scores[in_row]), **tolerance("add"))
    assert sums.count.tolist() == [3, 4, 3]


@pytest.mark.slow
@given(
    st.permutations(range(len(ROWS))),
    st.sets(st.integers(1, len(ROWS) - 1)),
    st.sampled_from(NAMES),
    st.sampled_from(dfkernels.reference.SCORES),
)
def test_any_split_in_any_order_gives_the_same_sums(order: list[int], cuts: set[int], kind: str, score: str) -> None:
    scores = random_scores(score)
    complete, parts = dfkernels.Sums.zeros(3, SHAPE), dfkernels.Sums.zeros(3, SHAPE)
    dfkernels.add(complete, scores, SEEDS, STEPS, ROWS, INDICES, distribution(kind))
    bounds = [0, *sorted(cuts), len(ROWS)]
    for start, stop in pairwise(bounds):
        batch = torch.tensor(order[start:stop])
        dfkernels.add(parts, scores[batch], SEEDS, STEPS, ROWS[batch], INDICES[batch], distribution(kind))
    assert_close(parts.moments, complete.moments, **tolerance("add"))


@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
@pytest.mark.parametrize("entries", [1, 5, 12])
def test_chunk_size_does_not_change_sums(monkeypatch: pytest.MonkeyPatch, score: str, entries: int) -> None:
    complete, parts = dfkernels.Sums.zeros(3, SHAPE), dfkernels.Sums.zeros(3, SHAPE)
    dfkernels.add(complete, random_scores(score), SEEDS, STEPS, ROWS, INDICES)
    monkeypatch.setattr(estimators, "CHUNK_SUMS", entries * SHAPE[0] * SHAPE[1])
    dfkernels.add(parts, random_scores(score), SEEDS, STEPS, ROWS, INDICES)
    assert_close(parts.moments, complete.moments, **tolerance("add"))


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_poisoned_padding_changes_nothing(kind: str, score: str) -> None:
    scores, poisoned = random_scores(score), random_scores(score)
    poisoned[ROWS < 0] = torch.nan
    clean, padded = dfkernels.Sums.zeros(3, SHAPE), dfkernels.Sums.zeros(3, SHAPE)
    real = ROWS >= 0
    dfkernels.add(clean, scores[real], SEEDS, STEPS, ROWS[real], INDICES[real], distribution(kind))
    dfkernels.add(padded, poisoned, SEEDS, STEPS, ROWS, INDICES, distribution(kind))
    assert torch.equal(padded.moments, clean.moments)


def test_nan_scores_stay_in_their_row() -> None:
    scores = random_scores("local")
    scores[2] = torch.nan  # of row 1
    sums = dfkernels.Sums.zeros(3, SHAPE)
    dfkernels.add(sums, scores, SEEDS, STEPS, ROWS, INDICES)
    assert sums.moments[[0, 2]].isfinite().all()
    assert sums.moments[1, 0, 1].isnan().all()
    assert sums.count.tolist() == [3, 4, 3]


def test_running_sums_are_float64() -> None:
    sums = dfkernels.Sums.zeros(1, (1, 1))
    row, seed = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for score in (1.0, 2.0**-30):
        dfkernels.add(sums, torch.tensor([score]), seed, seed, row, row)
    assert sums.moments[0, 0, 1].item() == 1 + 2.0**-30


@pytest.mark.grid
@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("similarity", dfkernels.reference.SIMILARITIES)
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_accumulate_equals_similarity_then_add(kind: str, similarity: str, score: str) -> None:
    g = torch.Generator().manual_seed(0)
    references = torch.randn(3, 3, *SHAPE, generator=g)
    outputs = 0.5 * references[ROWS] + 0.5 * torch.randn(len(ROWS), 3, *SHAPE, generator=g)
    outputs[ROWS < 0] = torch.nan
    window = {"window": 5, "sigma": 1.1, "data_range": 2.0}
    masks = distribution(kind, 0.4, 3)

    fused, apart = dfkernels.Sums.zeros(3, SHAPE), dfkernels.Sums.zeros(3, SHAPE)
    means = dfkernels.accumulate(
        outputs,
        references,
        fused,
        SEEDS,
        STEPS,
        ROWS,
        INDICES,
        masks,
        similarity=similarity,
        score=score,
        **window,
    )
    for entry, (row, index) in enumerate(zip(ROWS.tolist(), INDICES.tolist(), strict=True)):
        if row < 0:
            assert means[entry].isnan()
            continue
        one = dfkernels.similarity(outputs[entry : entry + 1], references[row], similarity, score, **window)
        place = torch.tensor([row]), torch.tensor([index])
        dfkernels.add(apart, one, SEEDS, STEPS, *place, masks)
        assert_close(means[entry], one.mean(), **tolerance("similarity"))
    assert_close(fused.moments, apart.moments, **tolerance("similarity"))


# Estimators ----------------------------------------------------------------------------------------------------------

# Four masks of two pixels and their scores.
TOY_MASKS = torch.tensor([[[1, 0]], [[1, 1]], [[0, 1]], [[0, 0]]])
TOY_SCORES = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    ("estimator", "value", "error"),
    [
        # M s = 1 2 0 0 and 0 2 3 0: variances 2.75/3 and 6.75/3, times N = 4.
        ("sum", [3, 5], [(11 / 3) ** 0.5, 3]),
        # Kept: scores 1 2 and 2 3, variance 1/2 each, over 2.
        ("coverage", [1.5, 2.5], [0.5, 0.5]),
        # Dropped: 3 4 (variance 1/2) and 1 4 (9/2), over 2.
        ("contrast", [1.5 - 3.5, 2.5 - 2.5], [0.5**0.5, 2.5**0.5]),
    ],
)
def test_estimators_by_hand(estimator: str, value: list[float], error: list[float]) -> None:
    ours = dfkernels.estimate(dfkernels.Sums(moments(TOY_MASKS, TOY_SCORES)), estimator)
    assert [x.dtype for x in ours] == [torch.float32] * 2
    assert_close(ours[0], torch.tensor([[value]], dtype=torch.float32), **tolerance("estimate"))
    assert_close(ours[1], torch.tensor([[error]], dtype=torch.float32), **tolerance("estimate"))


def test_fractional_masks_are_weights() -> None:
    g = torch.Generator().manual_seed(0)
    masks, scores = torch.rand(9, *SHAPE, generator=g), torch.rand(9, *SHAPE, generator=g)
    m, s = masks.double().numpy(), scores.double().numpy()
    kept, dropped = np.average(s, 0, m), np.average(s, 0, 1 - m)
    on, off = m * (s - kept) / m.sum(0), (1 - m) * (s - dropped) / (1 - m).sum(0)
    k, j = m.sum(0) ** 2 / (m**2).sum(0), (1 - m).sum(0) ** 2 / ((1 - m) ** 2).sum(0)
    variance_on, variance_off = (on**2).sum(0) * k / (k - 1), (off**2).sum(0) * j / (j - 1)
    expected = {
        "sum": ((m * s).sum(0), np.sqrt(9 * (m * s).var(0, ddof=1))),
        "coverage": (kept, np.sqrt(variance_on)),
        "contrast": (kept - dropped, np.sqrt(variance_on + variance_off - 2 * (on * off).sum(0))),
    }
    sums = dfkernels.Sums(moments(masks, scores))
    for estimator, maps in expected.items():
        for ours, theirs in zip(dfkernels.estimate(sums, estimator), maps, strict=True):
            np.testing.assert_allclose(ours[0].numpy(), theirs, **tolerance("estimate"))


def test_pixels_without_masks_take_the_mean_and_an_infinite_error() -> None:
    # Pixel 0 is never kept, pixel 1 always, pixel 2 is kept once and pixel 3 dropped once.
    masks = torch.tensor([[[0, 1, 1, 0]], [[0, 1, 0, 1]], [[0, 1, 0, 1]]])
    sums = dfkernels.Sums(moments(masks, torch.tensor([1.0, 2.0, 6.0])))
    expected = {
        "sum": ([6, 9, 1, 8], [True, False, False, False]),
        "coverage": ([8 / 3, 3, 1, 4], [True, False, True, False]),
        "contrast": ([0, 0, -3, 3], [True, True, True, True]),
    }
    for estimator, (value, infinite) in expected.items():
        ours, error = dfkernels.estimate(sums, estimator)
        assert_close(ours.flatten(), torch.tensor(value, dtype=torch.float32), **tolerance("estimate"))
        assert error.isinf().flatten().tolist() == infinite, estimator


@pytest.mark.parametrize("estimator", estimators.ESTIMATORS)
def test_too_few_masks_give_no_error_bar(estimator: str) -> None:
    value, error = dfkernels.estimate(dfkernels.Sums.zeros(2, SHAPE), estimator)
    assert not value.any()
    assert error.isinf().all()
    one = dfkernels.Sums(moments(torch.ones(1, *SHAPE), torch.tensor([0.5])))
    assert dfkernels.estimate(one, estimator)[1].isinf().all()


@pytest.mark.parametrize("kind", ["gaussian", "rise", "cells"])
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_standard_errors_match_the_spread_over_seeds(kind: str, score: str) -> None:
    repeats, n, shape = 400, 60, (3, 4)
    seeds, steps = torch.arange(repeats), torch.zeros(repeats, dtype=torch.int64)
    rows, indices = seeds.repeat_interleave(n), torch.arange(n).repeat(repeats)
    masks = dfkernels.draw_masks(seeds[rows], steps[rows], indices, shape, distribution(kind, grid=2)).float()
    signal = 0.3 * masks + 0.3 * masks.roll(1, -1) if score == "local" else 0.5 * masks.mean((1, 2))
    scores = 0.2 + signal + 0.2 * torch.randn(signal.shape, generator=torch.Generator().manual_seed(1))

    sums = dfkernels.Sums.zeros(repeats, shape)
    dfkernels.add(sums, scores, seeds, steps, rows, indices, distribution(kind, grid=2))
    for estimator in estimators.ESTIMATORS:
        value, error = dfkernels.estimate(sums, estimator)
        # 400 repeats determine a standard deviation to 4 % per pixel, and to about 2 % over twelve dependent pixels.
        assert abs(error.mean() / value.std(0).mean() - 1) < 0.06, estimator


def test_unknown_estimators_are_refused() -> None:
    sums = dfkernels.Sums.zeros(1, SHAPE)
    with pytest.raises(ValueError, match=r"unknown estimator 'ridge': choose one of sum, .*, or call ridge"):
        dfkernels.estimate(sums, "ridge")


# Ridge ---------------------------------------------------------------------------------------------------------------


def numpy_ridge(x: np.ndarray, scores: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """β and its standard error, computed as the formulas are written."""
    y = scores - scores.mean()
    inverse = np.linalg.inv(x.T @ x + penalty * np.eye(x.shape[1]))
    beta = inverse @ x.T @ y
    residual_maker = np.eye(len(y)) - x @ inverse @ x.T
    degrees_of_freedom = np.trace(residual_maker @ residual_maker)
    variance = ((y - x @ beta) ** 2).sum() / degrees_of_freedom
    return beta, np.sqrt(variance * np.diag(inverse @ x.T @ x @ inverse))


@pytest.mark.parametrize("kind", ["gaussian", "rise", "cells"])
@pytest.mark.parametrize("n", [2, 30, 34, 35, 36, 90])
@pytest.mark.parametrize("penalty", [1.0, 7.0])
def test_ridge_equals_numpy(monkeypatch: pytest.MonkeyPatch, kind: str, n: int, penalty: float) -> None:
    monkeypatch.setattr(estimators, "CHUNK_PIXELS", 35 * 17)  # chunks of 17 masks, the last one shorter
    scores = random_scores("global", n)
    law = distribution(kind, 0.3, 3)
    ours = dfkernels.ridge(scores, 8, 2, (5, 7), law, penalty=penalty, first=40)
    x = dfkernels.masks(8, 2, 40, n, (5, 7), law).flatten(1).double().numpy() - 0.3
    for map_, theirs in zip(ours, numpy_ridge(x, scores.double().numpy(), penalty), strict=True):
        assert map_.dtype == torch.float32
        if map_ is ours[1] and n < 35:  # fewer masks than pixels
            assert map_.isinf().all()
        else:
            np.testing.assert_allclose(map_.flatten().numpy(), theirs, **tolerance("ridge"))


@pytest.mark.parametrize("n", [20, 35, 60])
def test_primal_and_dual_agree(n: int) -> None:
    x = dfkernels.masks(1, 1, 0, n, (5, 7)).flatten(1).double() - 0.5
    y = random_scores("global", n).double()
    chunks = [(slice(0, 13), x[:13]), (slice(13, n), x[13:])]
    primal, _ = estimators._primal(iter(chunks), y, 1.0)
    assert_close(primal, estimators._dual(iter(chunks), y, 1.0), **tolerance("add"))


@pytest.mark.parametrize("cell", [1, 2, 4])
@pytest.mark.parametrize("count", [40, 100])
def test_ridge_regresses_on_cells(cell: int, count: int) -> None:
    law, scores = MaskDistribution(0.4, cells=(cell,)), random_scores("global", count)
    rows, columns = -(-5 // cell), -(-7 // cell)
    x = dfkernels.masks(8, 2, 0, count, (rows, columns), MaskDistribution(0.4)).flatten(1).double().numpy() - 0.4
    for ours, theirs in zip(
        dfkernels.ridge(scores, 8, 2, (5, 7), law), numpy_ridge(x, scores.double().numpy(), 1.0), strict=True
    ):
        expected = np.kron(theirs.reshape(rows, columns), np.ones((cell, cell)))[:5, :7]
        np.testing.assert_allclose(ours.numpy(), expected, **tolerance("ridge"))


@pytest.mark.parametrize("kind", ["gaussian", "rise", "cells"])
def test_ridge_recovers_a_linear_score(kind: str) -> None:
    weights = torch.linspace(-1, 1, 12).reshape(3, 4)
    masks = dfkernels.masks(5, 0, 0, 4000, (3, 4), distribution(kind, grid=4)).float()
    beta, error = dfkernels.ridge(0.7 + (masks * weights).sum((1, 2)), 5, 0, (3, 4), distribution(kind, grid=4))
    # The penalty shrinks β by κ over the eigenvalues of XᵀX: 1000 for Gaussian masks, down to about 30 for smooth ones.
    assert (beta - weights).abs().max() < (0.05 if kind == "rise" else 0.003)
    assert (error < 0.01).all()


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 150])
def test_ridge_errors_match_the_spread_over_noise(n: int) -> None:
    weights = torch.linspace(-0.3, 0.3, 12).reshape(3, 4)
    signal = (dfkernels.masks(0, 0, 0, n, (3, 4)) * weights).sum((1, 2))
    noise = 0.5 * torch.randn(200, n, generator=torch.Generator().manual_seed(0))
    betas, errors = zip(*(dfkernels.ridge(signal + each, 0, 0, (3, 4)) for each in noise), strict=True)
    # 200 repeats determine a standard deviation to 5 % per pixel, and to about 1.5 % over twelve independent pixels.
    assert abs(torch.stack(errors).mean() / torch.stack(betas).std(0).mean() - 1) < 0.06


def test_ridge_with_one_score_has_an_infinite_error() -> None:
    for shape in (SHAPE, (1, 1)):
        beta, error = dfkernels.ridge(torch.tensor([0.4]), 0, 0, shape)
        assert not beta.any()
        assert error.isinf().all()


def test_ridge_refuses_invalid_arguments() -> None:
    with pytest.raises(ValueError, match=r"penalty 0\.0 is not positive"):
        dfkernels.ridge(torch.ones(3), 0, 0, SHAPE, penalty=0.0)
    with pytest.raises(ValueError, match="got no scores: ridge needs the score of at least one mask"):
        dfkernels.ridge(torch.ones(0), 0, 0, SHAPE)


# Orthogonal designs --------------------------------------------------------------------------------------------------


def local_scores(masks: torch.Tensor, seed: int, noise: float = 0.0) -> torch.Tensor:
    """A score at every pixel that depends on the pixel, its neighbour and a pair of others, plus noise."""
    m = masks.double()
    values = 0.5 * m + 0.3 * m.roll(1, 2) + 0.4 * m.roll(3, 2) * m.roll(2, 1)
    return (values + noise * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))).float()


def sums_of(law: MaskDistribution, count: int, seed: int, noise: float = 0.0) -> dfkernels.Sums:
    """Sums of masks 0 … count − 1 of one row and `local_scores`."""
    size = law.randomisation
    sums = dfkernels.Sums.zeros(1, (8, 8), randomisations=-(-count // size) if size else 0)
    masks = dfkernels.masks(seed, 0, 0, count, (8, 8), law)
    zero = torch.zeros(count, dtype=torch.int64)
    dfkernels.add(
        sums, local_scores(masks, seed, noise), torch.tensor([seed]), zero[:1], zero, torch.arange(count), law
    )
    return sums


@pytest.mark.parametrize("estimator", ["sum", "coverage", "contrast"])
def test_maps_of_a_design_are_those_of_all_its_masks(estimator: str) -> None:
    law = MaskDistribution(design="orthogonal", block=16)
    apart = sums_of(law, 72, 5)  # the last randomisation is half complete
    together = dfkernels.Sums(apart.moments.sum(0, keepdim=True))
    assert apart.count.tolist() == [72]
    saliency, error = dfkernels.estimate(apart, estimator)
    assert_close(saliency, dfkernels.estimate(together, estimator)[0], **tolerance("estimate"))
    # Its error is the spread of the four complete ones.
    each = torch.cat([dfkernels.estimate(dfkernels.Sums(one[None]), estimator)[0] for one in apart.moments[:4]])
    expected = each.std(0) / 2 if estimator != "sum" else each.std(0) * 2
    assert_close(error[0], expected, **tolerance("estimate"))


def test_fewer_than_four_randomisations_have_no_error() -> None:
    law = MaskDistribution(design="orthogonal", block=16)
    assert dfkernels.estimate(sums_of(law, 63, 5), "contrast")[1].isinf().all()
    assert dfkernels.estimate(sums_of(law, 64, 5), "contrast")[1].isfinite().all()


def test_a_design_has_less_error_than_independent_masks_and_says_how_much() -> None:
    designed, independent = MaskDistribution(design="orthogonal", block=32), MaskDistribution()
    maps, errors = {}, {}
    for law in (designed, independent):
        drawn = [dfkernels.estimate(sums_of(law, 128, seed, noise=0.05), "contrast") for seed in range(60)]
        maps[law], errors[law] = (torch.cat(one) for one in zip(*drawn, strict=True))
    spread = {law: of.std(0).square().mean().sqrt() for law, of in maps.items()}
    assert spread[designed] < 0.9 * spread[independent]
    assert_close(maps[designed].mean(), maps[independent].mean(), atol=0.01, rtol=0)
    for law in maps:  # √E[error²] is what repeats show: four randomisations, 60 repeats, 64 pixels
        assert abs(errors[law].square().mean().sqrt() / spread[law] - 1) < 0.1


def test_ridge_errors_of_a_design_are_the_spread_over_repeats() -> None:
    law = MaskDistribution(cells=(2,), design="orthogonal", block=32)
    weights = torch.linspace(-0.3, 0.3, 64).reshape(8, 8) + 0.1
    betas, errors = [], []
    for seed in range(60):
        masks = dfkernels.masks(seed, 0, 0, 256, (8, 8), law).float()
        noise = 0.5 * torch.randn(256, generator=torch.Generator().manual_seed(seed))
        interaction = (masks * masks.roll(3, 1) * masks.roll(5, 2)).sum((1, 2))
        beta, error = dfkernels.ridge((masks * weights).sum((1, 2)) + interaction + noise, seed, 0, (8, 8), law)
        betas.append(beta)
        errors.append(error)
    spread = torch.stack(betas).std(0)
    assert abs(torch.stack(errors).square().mean().sqrt() / spread.square().mean().sqrt() - 1) < 0.1
    # A block of fewer masks than cells, or fewer than four blocks, says nothing.
    for block, count in ((8, 256), (32, 96)):
        few = MaskDistribution(cells=(2,), design="orthogonal", block=block)
        assert dfkernels.ridge(torch.rand(count), 0, 0, (8, 8), few)[1].isinf().all()


# What is compared ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("similarity", ["structure", "mse", "cosine"])
@pytest.mark.parametrize("score", dfkernels.reference.SCORES)
def test_a_reading_compares_what_output_and_input_say_together(similarity: str, score: str) -> None:
    g = torch.Generator().manual_seed(0)
    outputs, inputs = (torch.randn(len(ROWS), 2, *SHAPE, generator=g) for _ in range(2))
    references, reading = torch.randn(3, 2, *SHAPE, generator=g), torch.tensor([[1.0, 0.0], [-0.3, 2.0], [0.0, 1.5]])
    read, apart = dfkernels.Sums.zeros(3, SHAPE), dfkernels.Sums.zeros(3, SHAPE)
    counters = (SEEDS, STEPS, ROWS, INDICES)
    compared = {"similarity": similarity, "score": score}
    means = dfkernels.accumulate(outputs, references, read, *counters, **compared, inputs=inputs, reading=reading)
    factors = reading[ROWS.clamp(min=0)][..., None, None, None]
    expected = dfkernels.accumulate(
        factors[:, 0] * outputs + factors[:, 1] * inputs, references, apart, *counters, **compared
    )
    assert_close(means, expected, **tolerance("similarity"), equal_nan=True)
    assert_close(read.moments, apart.moments, **tolerance("similarity"))


def test_a_reading_needs_inputs_of_the_outputs_shape() -> None:
    outputs, references = torch.zeros(len(ROWS), 2, *SHAPE), torch.zeros(3, 2, *SHAPE)
    arguments = (outputs, references, dfkernels.Sums.zeros(3, SHAPE), SEEDS, STEPS, ROWS, INDICES)
    with pytest.raises(ValueError, match="got a reading without inputs, or inputs without a reading"):
        dfkernels.accumulate(*arguments, reading=torch.ones(3, 2))
