"""Areas under curves by hand, their intervals over items, and the tables with the paper's figures."""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from dfengine.evaluate import (
    DISTANCES,
    FEWEST_IN_A_SET,
    Faithfulness,
    Games,
    faithfulness,
    faithfulness_table,
    item_curves,
    normalised,
)
from dfengine.evaluate.games import Played
from dfengine.evaluate.kept import Turn

PROPERTY = settings(max_examples=30, deadline=None, database=None, derandomize=True)
MAP = torch.arange(6.0).view(2, 3)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_error(deletion: Sequence[float], insertion: Sequence[float]) -> Turn:
    """Errors by hand, with features that are of no use."""
    mse = torch.tensor([deletion, insertion], dtype=torch.float32)
    return Turn(MAP, Played(torch.zeros(*mse.shape, 2), mse))


def by_features(features: torch.Tensor) -> Turn:
    """Features [games, points, d] by hand."""
    return Turn(MAP, Played(features, torch.zeros(features.shape[:2])))


def found(turns: Mapping[str, Sequence[Turn]], **changes: Any) -> Games:
    made = Games("a model", 1, (903, 411, 20), "three sums", "paper", turns)
    return dataclasses.replace(made, **changes)


NOTHING = Turn(MAP, None)


# Areas ---------------------------------------------------------------------------------------------------------------


def test_areas_by_hand() -> None:
    """Means 0 2 3 4 and 4 1 1 0, a third apart: (1 + 2.5 + 3.5)/3 = 7/3, of a height of 4, and (2.5 + 1 + 0.5)/3."""
    items = [by_error([0, 4, 2, 7], [6, 0, 1.5, 0]), by_error([0, 0, 4, 1], [2, 2, 0.5, 0])]
    told = faithfulness(found({"rise": items}), "mse")
    deletion, insertion = (told.methods["rise"][game] for game in ("deletion", "insertion"))
    assert deletion.raw.mean == pytest.approx(7 / 3)
    assert deletion.auc.mean == pytest.approx(7 / 12)
    assert insertion.raw.mean == pytest.approx(4 / 3)
    assert insertion.auc.mean == pytest.approx(1 / 3)
    # The mean curve's min–max, not the mean of each one's: item 0 alone would reach 4/7 at once.
    np.testing.assert_allclose(deletion.curve[0], [0, 0.5, 0.75, 1])
    np.testing.assert_allclose(insertion.curve[0], [1, 0.25, 0.25, 0])
    assert (told.num_items, told.step, told.timestep, told.num_steps) == (2, 1, 411, 3)
    assert (told.distance, told.features, told.model, told.behaviour) == ("mse", "none", "a model", "paper")
    json.dumps(dataclasses.asdict(told))


def test_a_curve_that_begins_above_the_least_is_normalised_by_its_least() -> None:
    """3 1 5: min–max is 0.5 0 1, (0.25 + 0.5)/2."""
    told = faithfulness(found({"rise": [by_error([3, 1, 5], [5, 3, 1])]}), "mse")
    assert told.methods["rise"]["deletion"].auc.mean == pytest.approx(0.375)
    assert told.methods["rise"]["deletion"].raw.mean == pytest.approx(2.5)


@PROPERTY
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-5, 5))
def test_min_max(values: list[float], scale: float, shift: float) -> None:
    curve = np.array(values)
    if np.ptp(curve) < 1e-3:
        return
    ours = normalised(np.stack([curve, scale * curve + shift]))
    assert (ours.min(), ours.max()) == (0, 1)
    np.testing.assert_allclose(ours[0], ours[1], atol=1e-6)
    assert ours[0, curve.argmin()] == 0
    assert ours[0, curve.argmax()] == 1


def test_a_curve_that_is_the_same_everywhere_has_no_min_max() -> None:
    """A rise of its last digits is none."""
    ours = normalised(np.array([[2.0, 2.0, 2.0], [1.0, 1.0, 1.0 + 1e-15], [0, 0, 0], [-3, -3, -3], [0, 0, 1e-30]]))
    assert np.isnan(ours[:4]).all()
    assert ours[4].tolist() == [0, 0, 1]


# Distances -----------------------------------------------------------------------------------------------------------


def test_items_are_compared_with_their_own_unperturbed_image() -> None:
    """Deletion's first point is it: features (0, 3), then (3, 7) is 5 away, and so on."""
    curves = torch.tensor([[[0.0, 3], [3, 7], [6, 11]], [[0, 15], [0, 4], [0, 3]]])
    turns = [by_features(curves), by_features(curves + 100)]
    for one in item_curves(turns, "features"):
        np.testing.assert_allclose(one, [[0, 5, 10], [12, 1, 0]], rtol=1e-6)
    # Standard deviations of two numbers are their difference over √2: 3/√2, 4/√2, 5/√2; 15/√2, 4/√2, 3/√2.
    for one in item_curves(turns, "frechet-single"):
        np.testing.assert_allclose(one, [[0, 25 + 0.5, 100 + 2], [144 + 72, 1 + 0.5, 0]], rtol=1e-5)
    errors = item_curves([by_error([0, 1, 2], [3, 4, 0]), by_error([0, 5, 6], [7, 8, 0])], "mse")
    np.testing.assert_allclose(errors, [[[0, 1, 2], [3, 4, 0]], [[0, 5, 6], [7, 8, 0]]])
    told = faithfulness(found({"rise": turns}), "features")
    assert told.methods["rise"]["insertion"].raw.mean == pytest.approx(3.5)
    assert told.features == "three sums"


def clouds(n: int, d: int, seed: int = 0, points: int = 4) -> list[Turn]:
    """Features that move off in deletion and come back in insertion, as far as each item pleases."""
    start, other, speed = drawn(n, d, seed=seed), drawn(n, d, seed=seed + 1), drawn(n, 1, seed=seed + 2).abs() + 0.5
    moved = [start + (k / (points - 1)) ** speed * (0.7 * other - 0.4 * start + 1) for k in range(points)]
    return [by_features(torch.stack([torch.stack(one), torch.stack(one[::-1])])) for one in zip(*moved, strict=True)]


def test_sets_are_compared_at_every_point() -> None:
    turns = clouds(14, 3)
    told = faithfulness(found({"rise": turns}))
    assert told.distance == "frechet-set"
    stacked = np.stack([turn.played.features.double().numpy() for turn in turns if turn.played])
    expected = np.empty((2, 4))
    for game, point in itertools.product(range(2), range(4)):
        ours, reference = stacked[:, game, point], stacked[:, 0, 0]
        a, b = np.cov(ours.T), np.cov(reference.T)
        moved = ((ours.mean(0) - reference.mean(0)) ** 2).sum()
        expected[game, point] = moved + np.trace(a + b) - 2 * np.trace(np.real(sqrtm(a @ b)))
    for game, curve in zip(("deletion", "insertion"), expected, strict=True):
        score = told.methods["rise"][game]
        area = (curve[0] / 2 + curve[1] + curve[2] + curve[3] / 2) / 3
        assert score.raw.mean == pytest.approx(area, rel=1e-6)
        assert score.auc.mean == pytest.approx((area - curve.min()) / np.ptp(curve), rel=1e-6)
        np.testing.assert_allclose(score.curve[0], (curve - curve.min()) / np.ptp(curve), atol=1e-6)
    # Sets are not what their items are one by one.
    single = faithfulness(found({"rise": turns}), "frechet-single")
    assert single.methods["rise"]["deletion"].raw.mean > 1.2 * told.methods["rise"]["deletion"].raw.mean


# Intervals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["frechet-set", "frechet-single", "features"])
@pytest.mark.parametrize(("n", "d"), [(12, 3), (12, 40), (60, 5)])
def test_intervals_hold_their_figure(distance: str, n: int, d: int) -> None:
    """Of sets that are smaller than their dimension, too, whose distance is greater when items are drawn twice."""
    told = faithfulness(found({"rise": clouds(n, d)}), distance)
    assert told == faithfulness(found({"rise": clouds(n, d)}), distance)
    for score in told.methods["rise"].values():
        for one in (score.auc, score.raw):
            assert one.low < one.mean < one.high
            assert one.count == n
        middle, low, high = (np.array(part) for part in score.curve)
        assert (low <= middle + 1e-9).all()
        assert (middle <= high + 1e-9).all()
        assert (high - low).max() > 0.01


@pytest.mark.parametrize("distance", ["frechet-set", "features"])
def test_intervals_are_half_as_wide_of_four_times_the_items(distance: str) -> None:
    """The same items four times over: the same figure but for n − 1, half the width."""
    few = clouds(40, 3)
    widths = []
    for turns in (few, few * 4):
        score = faithfulness(found({"rise": turns}), distance).methods["rise"]["deletion"]
        widths.append((score.auc.high - score.auc.low, score.raw.high - score.raw.low))
    np.testing.assert_allclose(np.divide(*widths), [2, 2], rtol=0.2)


def test_the_interval_of_means_is_that_of_the_items() -> None:
    """Raw areas are means over items: 1.96 standard errors either side, of 100 items."""
    heights = np.random.default_rng(3).random(100) + 0.5
    turns = [by_error([0, height, 2 * height], [height, 0, 0]) for height in heights.tolist()]
    raw = faithfulness(found({"rise": turns}), "mse").methods["rise"]["deletion"].raw
    error = 1.96 * heights.std() / 10
    assert raw.mean == pytest.approx(heights.mean(), rel=1e-6)
    assert (raw.low, raw.high) == (
        pytest.approx(heights.mean() - error, abs=0.1 * error), pytest.approx(heights.mean() + error, abs=0.1 * error),
    )  # fmt: skip
    # All curves have one form, which min–max leaves nothing else of.
    auc = faithfulness(found({"rise": turns}), "mse").methods["rise"]["deletion"].auc
    assert auc.mean == pytest.approx(auc.low) == pytest.approx(auc.high) == pytest.approx(0.5)


def test_one_item_has_no_interval() -> None:
    told = faithfulness(
        found({"rise": [by_error([0, 2, 3], [3, 1, 0])], "random": [by_error([0, 1, 3], [3, 2, 0])]}), "mse"
    )
    score = told.methods["rise"]["deletion"]
    assert (score.auc.low, score.auc.mean, score.auc.high, score.auc.count) == (*[pytest.approx(7 / 12)] * 3, 1)
    assert score.curve[0] == score.curve[1] == score.curve[2]
    assert score.better_than_random is None
    assert "| rise | 0.5833 | 0.4167 | – |" in "\n".join(faithfulness_table(told))


def spread(shift: float, count: int = 20) -> list[Turn]:
    """Curves of very different items, of which `shift` moves the middle of every one."""
    middles = np.random.default_rng(1).random(count)
    return [by_error([0, middle + shift, 2], [2, middle + shift, 0]) for middle in middles.tolist()]


def test_better_is_high_in_deletion_and_low_in_insertion() -> None:
    """Every method has the same resamples: a small difference in every item is one in each of them."""
    told = faithfulness(
        found({"random": spread(0), "above": spread(0.02), "below": spread(-0.02), "same": spread(0)}), "mse"
    )
    shares = {
        name: tuple(by[game].better_than_random for game in ("deletion", "insertion"))
        for name, by in told.methods.items()
    }
    assert shares == {"random": (None, None), "above": (1, 0), "below": (0, 1), "same": (0, 0)}
    # Although their intervals lie over each other.
    random, above = (told.methods[name]["deletion"].auc for name in ("random", "above"))
    assert above.low < random.mean < above.mean < random.high
    assert told.methods["same"]["deletion"] == dataclasses.replace(
        told.methods["random"]["deletion"], better_than_random=0
    )
    without = faithfulness(found({"above": spread(0.02)}), "mse")
    assert without.methods["above"]["deletion"].better_than_random is None


def test_a_tie_by_chance_is_better_in_about_half_of_the_resamples() -> None:
    turns = spread(0, 40)
    shifted = [by_error([0, float(e), 2], [2, float(e), 0]) for e in np.random.default_rng(2).random(40)]
    share = faithfulness(found({"random": turns, "rise": shifted}), "mse").methods["rise"]["deletion"]
    assert 0.02 < (share.better_than_random or 0) < 0.98


# Items that are left -------------------------------------------------------------------------------------------------


def test_items_that_one_method_lacks_are_left_out_of_all() -> None:
    worse = by_error([0, float("nan"), 1], [1, 1, 0])
    overflown = by_features(torch.full((2, 3, 2), torch.inf))
    good, other = by_error([0, 1, 1], [1, 0, 0]), by_error([0, 0, 1], [1, 1, 0])
    made = found({"rise": [good, NOTHING, good, good, good], "cam": [other, other, worse, overflown, other]})
    assert made.left_out() == {"rise": 1, "cam": 2}
    assert made.shared() == [0, 4]
    told = faithfulness(made, "mse")
    assert told.num_items == 2
    assert [by["deletion"].auc.mean for by in told.methods.values()] == [0.75, 0.25]
    last = list(faithfulness_table(told))[-1]
    assert last == (
        "Left out of every method, for maps that rank no pixels or images that are not finite: 1 by rise, 2 by cam."
    )


def test_what_is_not_possible() -> None:
    with pytest.raises(ValueError, match="distance 'fid' is not known: expected one of frechet-set, frechet-single, f"):
        faithfulness(found({"rise": clouds(10, 3)}), "fid")
    assert FEWEST_IN_A_SET == 10
    assert faithfulness(found({"rise": clouds(10, 3)})).num_items == 10
    few = {"rise": [*clouds(10, 3)[:9], NOTHING], "cam": clouds(10, 3)}
    with pytest.raises(ValueError, match=r"9 images .* too few for frechet-set: .* 10, or take frechet-single"):
        faithfulness(found(few))
    none = {"rise": [NOTHING] * 10, "cam": clouds(10, 3)}
    for distance in DISTANCES:
        with pytest.raises(ValueError, match=rf"0 images .* too few for {distance}: .*; of no use: {{'rise': 10}}"):
            faithfulness(found(none), distance)


@pytest.mark.parametrize("distance", DISTANCES)
def test_curves_that_are_the_same_everywhere(distance: str) -> None:
    """Images that do not depend on the latent, each of its own kind."""
    still = [by_features(drawn(1, 1, 4, seed=seed).expand(2, 3, 4) + 1) for seed in range(12)]
    if distance == "mse":
        still = [by_error([value, value, value], [1, 0, 0]) for value in drawn(12).tolist()]
    with pytest.raises(
        ValueError, match=r"the deletion curve of still is the same everywhere, so that there is no are"
    ):
        faithfulness(found({"still": still}), distance)
    only = [by_error([0, 1, 2], [1, 1, 1])] * 2
    with pytest.raises(ValueError, match="the insertion curve of it is the same everywhere"):
        faithfulness(found({"rise": [by_error([0, 1, 2], [2, 1, 0])] * 2, "it": only}), "mse")


# Tables --------------------------------------------------------------------------------------------------------------

#: Tables 1 and 2 as they are printed: deletion, insertion.
PRINTED = {
    "random": "0.6553, 0.6411", "lime": "0.5947, 0.6925", "rise": "0.8042, 0.5933", "cam": "0.7012, 0.5532",
    "rise-frechet": "0.6247, 0.6250", "rise-cosine": "0.6166, 0.5850", "rise-contrast": "0.6051, 0.7563",
    "rise-grid": "0.6553, 0.6397", "attention": "–", "rise-global": "–",
}  # fmt: skip


def cells(told: Faithfulness) -> dict[str, list[str]]:
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in faithfulness_table(told) if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows}


def test_a_table_has_the_papers_figures_beside_ours() -> None:
    turns = {name: [by_error([0, 2, 3, 4], [2, 0.5, 0.5, 0])] * 2 for name in PRINTED}
    told = faithfulness(found(turns), "mse")
    rows = cells(told)
    assert rows.pop("") == [
        "deletion ↑", "insertion ↓", "better than random", "unnormalised", "the paper's deletion, insertion",
    ]  # fmt: skip
    assert rows.pop("---") == ["---"] * 5
    assert {name: row[-1] for name, row in rows.items()} == PRINTED
    assert list(rows) == list(PRINTED)
    assert rows["cam"][:-1] == ["0.5833 [0.5833, 0.5833]", "0.3333 [0.3333, 0.3333]", "0%, 0%", "2.333, 0.6667"]
    assert rows["random"][2] == "–"
    lines = list(faithfulness_table(told))
    assert lines[-2:] == [
        "",
        "2 images, step 2 of 3 (t = 411), distance mse. The distance rises: deletion is better high, insertion better "
        "low.",
    ]


def test_the_note_tells_what_was_used() -> None:
    made = found({"rise": clouds(11, 3), "random": clouds(11, 3, seed=9)}, behaviour="xdiffusion")
    (note,) = [line for line in faithfulness_table(faithfulness(made)) if line[:1] not in ("|", "")]
    assert note.startswith(
        "11 images, step 2 of 3 (t = 411), distance frechet-set on features of three sums; xdiffusion behaviour. The "
    )
    shares = cells(faithfulness(made))["rise"][2]
    deletion, insertion = (float(share.rstrip("%")) for share in shares.split(", "))
    assert 0 <= deletion <= 100
    assert 0 <= insertion <= 100
