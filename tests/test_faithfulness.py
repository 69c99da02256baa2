"""Areas under curves by hand, their intervals over items, and the tables with the paper's values."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dfengine.evaluate import (
    DISTANCES,
    MIN_SET_SIZE,
    Faithfulness,
    GameCurves,
    GameResult,
    GamesRun,
    item_curves,
    min_max,
    summarise_games,
)

MAP = torch.arange(6.0).view(2, 3)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def from_errors(deletion: Sequence[float], insertion: Sequence[float]) -> GameResult:
    """A result with these errors and zero features."""
    mse = torch.tensor([deletion, insertion], dtype=torch.float32)
    return GameResult(MAP, GameCurves(torch.zeros(*mse.shape, 2), mse))


def from_features(features: torch.Tensor) -> GameResult:
    """A result with features [games, points, d]."""
    return GameResult(MAP, GameCurves(features, torch.zeros(features.shape[:2])))


def run(results: Mapping[str, Sequence[GameResult]], **changes: Any) -> GamesRun:
    games_run = GamesRun("a model", 1, (903, 411, 20), "three sums", "default", results)
    return dataclasses.replace(games_run, **changes)


UNRANKED = GameResult(MAP, None)


# Areas ---------------------------------------------------------------------------------------------------------------


def test_areas_by_hand() -> None:
    """Means 0 2 3 4 and 4 1 1 0 with spacing 1/3: areas (1 + 2.5 + 3.5)/3 = 7/3, of height 4, and (2.5 + 1 + 0.5)/3."""
    items = [from_errors([0, 4, 2, 7], [6, 0, 1.5, 0]), from_errors([0, 0, 4, 1], [2, 2, 0.5, 0])]
    summary = summarise_games(run({"rise": items}), "mse")
    deletion, insertion = (summary.methods["rise"][game] for game in ("deletion", "insertion"))
    assert deletion.raw.mean == pytest.approx(7 / 3)
    assert deletion.auc.mean == pytest.approx(7 / 12)
    assert insertion.raw.mean == pytest.approx(4 / 3)
    assert insertion.auc.mean == pytest.approx(1 / 3)
    # The mean curve is scaled, not each item's curve: item 0 alone would reach 4/7 immediately.
    np.testing.assert_allclose(deletion.curve[0], [0, 0.5, 0.75, 1])
    np.testing.assert_allclose(insertion.curve[0], [1, 0.25, 0.25, 0])
    assert (summary.num_items, summary.step, summary.timestep, summary.num_steps) == (2, 1, 411, 3)
    assert (summary.distance, summary.features, summary.model, summary.preset) == ("mse", "none", "a model", "default")
    json.dumps(dataclasses.asdict(summary))


def test_min_max_subtracts_the_least_value_wherever_it_is() -> None:
    """3 1 5: min–max is 0.5 0 1, (0.25 + 0.5)/2."""
    summary = summarise_games(run({"rise": [from_errors([3, 1, 5], [5, 3, 1])]}), "mse")
    assert summary.methods["rise"]["deletion"].auc.mean == pytest.approx(0.375)
    assert summary.methods["rise"]["deletion"].raw.mean == pytest.approx(2.5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-5, 5))
def test_min_max(values: list[float], scale: float, shift: float) -> None:
    curve = np.array(values)
    if np.ptp(curve) < 1e-3:
        return
    ours = min_max(np.stack([curve, scale * curve + shift]))
    assert (ours.min(), ours.max()) == (0, 1)
    np.testing.assert_allclose(ours[0], ours[1], atol=1e-6)
    assert ours[0, curve.argmin()] == 0
    assert ours[0, curve.argmax()] == 1


def test_min_max_of_a_constant_curve_is_nan() -> None:
    """A range within rounding counts as none."""
    ours = min_max(np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0 + 1e-15], [0, 0, 0], [-3, -3, -3], [0, 0, 1e-30]]))
    assert np.isnan(ours[:4]).all()
    assert ours[4].tolist() == [0, 0, 1]


# Distances -----------------------------------------------------------------------------------------------------------


def test_items_are_compared_with_their_own_unperturbed_image() -> None:
    """The first point of deletion is the unperturbed image: features (0, 3); (3, 7) is at distance 5, and so on."""
    curves = torch.tensor([[[0.0, 3], [3, 7], [6, 11]], [[0, 15], [0, 4], [0, 3]]])
    results = [from_features(curves), from_features(curves + 100)]
    for one in item_curves(results, "features"):
        np.testing.assert_allclose(one, [[0, 5, 10], [12, 1, 0]], rtol=1e-6)
    # The standard deviation of two numbers is their difference over √2: 3/√2, 4/√2, 5/√2; 15/√2, 4/√2, 3/√2.
    for one in item_curves(results, "frechet-single"):
        np.testing.assert_allclose(one, [[0, 25 + 0.5, 100 + 2], [144 + 72, 1 + 0.5, 0]], rtol=1e-5)
    errors = item_curves([from_errors([0, 1, 2], [3, 4, 0]), from_errors([0, 5, 6], [7, 8, 0])], "mse")
    np.testing.assert_allclose(errors, [[[0, 1, 2], [3, 4, 0]], [[0, 5, 6], [7, 8, 0]]])
    summary = summarise_games(run({"rise": results}), "features")
    assert summary.methods["rise"]["insertion"].raw.mean == pytest.approx(3.5)
    assert summary.features == "three sums"


def clouds(n: int, d: int, seed: int = 0, points: int = 4) -> list[GameResult]:
    """Features that move away in deletion and return in insertion, by a random distance per item."""
    start, other, speed = randn(n, d, seed=seed), randn(n, d, seed=seed + 1), randn(n, 1, seed=seed + 2).abs() + 0.5
    moved = [start + (k / (points - 1)) ** speed * (0.7 * other - 0.4 * start + 1) for k in range(points)]
    return [from_features(torch.stack([torch.stack(one), torch.stack(one[::-1])])) for one in zip(*moved, strict=True)]


def test_sets_are_compared_at_every_point() -> None:
    results = clouds(14, 3)
    summary = summarise_games(run({"rise": results}))
    assert summary.distance == "frechet-set"
    stacked = np.stack([one.curves.features.double().numpy() for one in results if one.curves])
    expected = np.empty((2, 4))
    for game, point in itertools.product(range(2), range(4)):
        ours, reference = stacked[:, game, point], stacked[:, 0, 0]
        a, b = np.cov(ours.T), np.cov(reference.T)
        moved = ((ours.mean(0) - reference.mean(0)) ** 2).sum()
        expected[game, point] = moved + np.trace(a + b) - 2 * np.trace(np.real(sqrtm(a @ b)))
    for game, curve in zip(("deletion", "insertion"), expected, strict=True):
        score = summary.methods["rise"][game]
        area = (curve[0] / 2 + curve[1] + curve[2] + curve[3] / 2) / 3
        assert score.raw.mean == pytest.approx(area, rel=1e-6)
        assert score.auc.mean == pytest.approx((area - curve.min()) / np.ptp(curve), rel=1e-6)
        np.testing.assert_allclose(score.curve[0], (curve - curve.min()) / np.ptp(curve), atol=1e-6)
    # The distance of sets differs from that of single items.
    single = summarise_games(run({"rise": results}), "frechet-single")
    assert single.methods["rise"]["deletion"].raw.mean > 1.2 * summary.methods["rise"]["deletion"].raw.mean


# Intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["frechet-set", "frechet-single", "features"])
@pytest.mark.parametrize(("n", "d"), [(12, 3), (12, 40), (60, 5)])
def test_intervals_contain_their_value(distance: str, n: int, d: int) -> None:
    """Also for sets smaller than their dimension, whose distance a plain bootstrap overestimates."""
    summary = summarise_games(run({"rise": clouds(n, d)}), distance)
    assert summary == summarise_games(run({"rise": clouds(n, d)}), distance)
    for score in summary.methods["rise"].values():
        for one in (score.auc, score.raw):
            assert one.low < one.mean < one.high
            assert one.count == n
        middle, low, high = (np.array(part) for part in score.curve)
        assert (low <= middle + 1e-9).all()
        assert (middle <= high + 1e-9).all()
        assert (high - low).max() > 0.01


@pytest.mark.parametrize("distance", ["frechet-set", "features"])
def test_intervals_are_half_as_wide_for_four_times_the_items(distance: str) -> None:
    """Each item four times: the same value up to n − 1, half the width."""
    few = clouds(40, 3)
    widths = []
    for results in (few, few * 4):
        score = summarise_games(run({"rise": results}), distance).methods["rise"]["deletion"]
        widths.append((score.auc.high - score.auc.low, score.raw.high - score.raw.low))
    np.testing.assert_allclose(np.divide(*widths), [2, 2], rtol=0.2)


def test_the_interval_of_a_raw_area_is_that_of_a_mean() -> None:
    """Raw areas are means over items: the interval of 100 items is ±1.96 standard errors."""
    heights = np.random.default_rng(3).random(100) + 0.5
    results = [from_errors([0, height, 2 * height], [height, 0, 0]) for height in heights.tolist()]
    raw = summarise_games(run({"rise": results}), "mse").methods["rise"]["deletion"].raw
    error = 1.96 * heights.std() / 10
    assert raw.mean == pytest.approx(heights.mean(), rel=1e-6)
    assert (raw.low, raw.high) == (
        pytest.approx(heights.mean() - error, abs=0.1 * error), pytest.approx(heights.mean() + error, abs=0.1 * error),
    )  # fmt: skip
    # The curves differ only by a factor, which min–max scaling removes.
    auc = summarise_games(run({"rise": results}), "mse").methods["rise"]["deletion"].auc
    assert auc.mean == pytest.approx(auc.low) == pytest.approx(auc.high) == pytest.approx(0.5)


def test_one_item_has_no_interval() -> None:
    summary = summarise_games(
        run({"rise": [from_errors([0, 2, 3], [3, 1, 0])], "random": [from_errors([0, 1, 3], [3, 2, 0])]}), "mse"
    )
    score = summary.methods["rise"]["deletion"]
    assert (score.auc.low, score.auc.mean, score.auc.high, score.auc.count) == (*[pytest.approx(7 / 12)] * 3, 1)
    assert score.curve[0] == score.curve[1] == score.curve[2]
    assert score.better_than_random is None
    assert "| rise | 0.5833 | 0.4167 | – |" in summary.table()


def spread(shift: float, count: int = 20) -> list[GameResult]:
    """Curves of very different items; `shift` moves the middle of each."""
    middles = np.random.default_rng(1).random(count)
    return [from_errors([0, middle + shift, 2], [2, middle + shift, 0]) for middle in middles.tolist()]


def test_better_is_high_in_deletion_and_low_in_insertion() -> None:
    """All methods share their resamples, so a small difference in every item appears in each resample."""
    summary = summarise_games(
        run({"random": spread(0), "above": spread(0.02), "below": spread(-0.02), "same": spread(0)}), "mse"
    )
    shares = {
        name: tuple(by[game].better_than_random for game in ("deletion", "insertion"))
        for name, by in summary.methods.items()
    }
    assert shares == {"random": (None, None), "above": (1, 0), "below": (0, 1), "same": (0, 0)}
    # This holds although their intervals overlap.
    random, above = (summary.methods[name]["deletion"].auc for name in ("random", "above"))
    assert above.low < random.mean < above.mean < random.high
    assert summary.methods["same"]["deletion"] == dataclasses.replace(
        summary.methods["random"]["deletion"], better_than_random=0
    )
    without = summarise_games(run({"above": spread(0.02)}), "mse")
    assert without.methods["above"]["deletion"].better_than_random is None


def test_equal_methods_are_better_in_some_resamples() -> None:
    results = spread(0, 40)
    shifted = [from_errors([0, float(e), 2], [2, float(e), 0]) for e in np.random.default_rng(2).random(40)]
    share = summarise_games(run({"random": results, "rise": shifted}), "mse").methods["rise"]["deletion"]
    assert 0.02 < (share.better_than_random or 0) < 0.98


# Excluded items -------------------------------------------------------------------------------------------------


def test_items_that_one_method_lacks_are_excluded_for_all() -> None:
    worse = from_errors([0, float("nan"), 1], [1, 1, 0])
    overflown = from_features(torch.full((2, 3, 2), torch.inf))
    good, other = from_errors([0, 1, 1], [1, 0, 0]), from_errors([0, 0, 1], [1, 1, 0])
    games_run = run({"rise": [good, UNRANKED, good, good, good], "cam": [other, other, worse, overflown, other]})
    assert games_run.excluded() == {"rise": 1, "cam": 2}
    assert games_run.valid_items() == [0, 4]
    summary = summarise_games(games_run, "mse")
    assert summary.num_items == 2
    assert [by["deletion"].auc.mean for by in summary.methods.values()] == [0.75, 0.25]
    last = summary.table().splitlines()[-1]
    assert last == (
        "Excluded for every method, because a map does not rank pixels or an image is not finite: 1 by rise, 2 by cam."
    )


def test_unknown_distances_and_too_few_items_are_refused() -> None:
    with pytest.raises(ValueError, match="distance 'fid' is not known: expected one of frechet-set, frechet-single, f"):
        summarise_games(run({"rise": clouds(10, 3)}), "fid")
    assert MIN_SET_SIZE == 10
    assert summarise_games(run({"rise": clouds(10, 3)})).num_items == 10
    few = {"rise": [*clouds(10, 3)[:9], UNRANKED], "cam": clouds(10, 3)}
    with pytest.raises(
        ValueError, match="9 images are too few for frechet-set: give at least 10, or take frechet-single"
    ):
        summarise_games(run(few))
    none = {"rise": [UNRANKED] * 10, "cam": clouds(10, 3)}
    for distance in DISTANCES:
        with pytest.raises(
            ValueError, match=r"no image has valid maps of all methods; invalid ones by method: {'rise': 10}"
        ):
            summarise_games(run(none), distance)


@pytest.mark.parametrize("distance", DISTANCES)
def test_constant_curves_are_refused(distance: str) -> None:
    """The images do not depend on the latent."""
    still = [from_features(randn(1, 1, 4, seed=seed).expand(2, 3, 4) + 1) for seed in range(12)]
    if distance == "mse":
        still = [from_errors([value, value, value], [1, 0, 0]) for value in randn(12).tolist()]
    with pytest.raises(
        ValueError, match="the deletion curve of still is constant, so that the area under it is undefined"
    ):
        summarise_games(run({"still": still}), distance)
    only = [from_errors([0, 1, 2], [1, 1, 1])] * 2
    with pytest.raises(ValueError, match="the insertion curve of it is constant"):
        summarise_games(run({"rise": [from_errors([0, 1, 2], [2, 1, 0])] * 2, "it": only}), "mse")


# Tables --------------------------------------------------------------------------------------------------------------

#: Tables 1 and 2 as printed: deletion, insertion.
PRINTED = {
    "random": "0.6553, 0.6411", "lime": "0.5947, 0.6925", "rise": "0.8042, 0.5933", "cam": "0.7012, 0.5532",
    "rise-frechet": "0.6247, 0.6250", "rise-cosine": "0.6166, 0.5850", "rise-contrast": "0.6051, 0.7563",
    "rise-grid": "0.6553, 0.6397", "attention": "–", "rise-global": "–",
}  # fmt: skip


def cells(summary: Faithfulness) -> dict[str, list[str]]:
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in summary.table().splitlines() if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows}


#: The settings of Tables 1 and 2, as far as a summary has them.
AS_PRINTED: dict[str, Any] = {
    "num_items": 1000, "step": 21, "num_steps": 30, "distance": "frechet-set", "features": "inception-v3 (FID) pt",
    "preset": "paper",
}  # fmt: skip


def test_a_table_lists_the_papers_values_next_to_ours_where_the_settings_are_the_papers() -> None:
    results = {name: [from_errors([0, 2, 3, 4], [2, 0.5, 0.5, 0])] * 2 for name in PRINTED}
    ours = summarise_games(run(results), "mse")
    rows = cells(dataclasses.replace(ours, **AS_PRINTED))
    assert rows.pop("") == [
        "deletion ↑", "insertion ↓", "better than random, in resamples of 1000 images", "unnormalised",
        "paper: deletion, insertion",
    ]  # fmt: skip
    assert rows.pop("---") == ["---"] * 5
    assert {name: row[-1] for name, row in rows.items()} == PRINTED
    assert list(rows) == list(PRINTED)
    assert rows["cam"][:-1] == ["0.5833 [0.5833, 0.5833]", "0.3333 [0.3333, 0.3333]", "0%, 0%", "2.333, 0.6667"]
    assert rows["random"][2] == "–"
    assert cells(ours)[""] == [
        "deletion ↑", "insertion ↓", "better than random, in resamples of 2 images", "unnormalised",
    ]  # fmt: skip
    assert cells(ours)["cam"] == rows["cam"][:-1]
    assert ours.table().splitlines()[-3:] == [
        "",
        "2 images, step 1 (t = 411) of 3 steps, distance mse. The distance increases: deletion is better high, "
        "insertion better low.",
        "The paper's figures are left out, since its tables have 1000 images, step 21 of 30, the distance frechet-set, "
        "features of Inception-v3, its own equations (preset paper).",
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_items": 999}, "1000 images"),
        ({"step": 20}, "step 21 of 30"),
        ({"num_steps": 29}, "step 21 of 30"),
        ({"distance": "frechet-single"}, "the distance frechet-set"),
        ({"features": "shapes's own"}, "features of Inception-v3"),
        ({"preset": "default"}, "its own equations (preset paper)"),
    ],
)
def test_one_other_setting_leaves_the_papers_values_out(change: dict[str, Any], reason: str) -> None:
    ours = summarise_games(run({"cam": [from_errors([0, 2, 3, 4], [2, 0.5, 0.5, 0])] * 2}), "mse")
    table = dataclasses.replace(ours, **AS_PRINTED | change).table()
    assert "0.7012" not in table
    assert table.splitlines()[-1] == f"The paper's figures are left out, since its tables have {reason}."
    assert "0.7012, 0.5532" in dataclasses.replace(ours, **AS_PRINTED).table()


def test_the_note_lists_the_settings() -> None:
    games_run = run({"rise": clouds(11, 3), "random": clouds(11, 3, seed=9)}, preset="xdiffusion")
    note, _ = [line for line in summarise_games(games_run).table().splitlines() if line[:1] not in ("|", "")]
    assert note.startswith(
        "11 images, step 1 (t = 411) of 3 steps, distance frechet-set on features of three sums; preset xdiffusion. The"
    )
    shares = cells(summarise_games(games_run))["rise"][2]
    deletion, insertion = (float(share.rstrip("%")) for share in shares.split(", "))
    assert 0 <= deletion <= 100
    assert 0 <= insertion <= 100
