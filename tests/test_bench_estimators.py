"""The study of the estimators counts and sums masks correctly, and reports nothing if a check fails."""

import dfkernels
import estimators
import pytest
import torch
import torch.nn.functional as F
from analytic import Analytic
from torch.testing import assert_close

from dfengine import Engine
from dfengine.diffusion.trajectory import Trajectory

SHAPE = (6, 5)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ((0.2, 0.6, 0.95, 0.97), 30),
        ((0.96, 0.97, 0.98, 0.99), 10),
        ((0.2, 0.96, 0.94, 0.97), 100),  # it falls below the threshold again
        ((0.2, 0.96, 0.97, 0.94), None),
        ((0.1, 0.2, 0.3, 0.4), None),
        ((0.96, float("nan"), 0.96, 0.96), 30),  # a constant map has no agreement
    ],
)
def test_needed_is_where_the_curve_stays_above(curve: tuple[float, ...], expected: int | None) -> None:
    assert estimators.needed((10, 20, 30, 100), curve, 0.95) == expected


def test_counts_end_at_half_of_the_masks() -> None:
    assert estimators.counts(3000)[:7] == (10, 15, 20, 30, 45, 70, 100)
    assert estimators.counts(3000)[-3:] == (1500, 2000, 3000)
    assert estimators.counts(3100)[-2:] == (3000, 3100)
    assert estimators.counts(4) == (4,)


def test_a_case_that_is_never_reached_counts_as_infinitely_many() -> None:
    assert estimators.spread([100, 30, 300]) == "**100** [30–300], 3 of 3"
    assert estimators.spread([100, None, 300]) == "**300** [100–never], 2 of 3"
    assert estimators.spread([100, None, None]) == "**never** [100–never], 1 of 3"
    assert estimators.spread([None, None]) == "**never**, 0 of 2"


def test_ridge_estimates_what_each_pixel_adds_from_either_half() -> None:
    weights = torch.arange(30.0).reshape(SHAPE)
    for first in (0, 200):
        masks = dfkernels.masks(7, 3, first, 200, SHAPE)
        scores = (masks * weights).sum((1, 2))
        maps = estimators.maps_of(scores, 7, 3, SHAPE, (50, 200), first=first)
        assert [len(of_estimator) for of_estimator in maps.values()] == [2, 2, 2, 2]
        assert estimators.agreement(maps["ridge"][1], weights) > 0.99
        assert_close(maps["coverage"][0], (masks * scores[:, None, None])[:50].sum(0) / masks[:50].sum(0))


@pytest.fixture
def engine() -> Engine:
    return Engine(Analytic(lambda x_t, number: F.avg_pool2d(x_t, 3, 1, 1), shape=(2, *SHAPE)))


@pytest.fixture
def trajectory(engine: Engine) -> Trajectory:
    latents = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    return engine.denoiser.trajectory(latents)


@pytest.mark.slow
def test_maps_of_the_engine_pass_the_check(engine: Engine, trajectory: Trajectory) -> None:
    estimators.check(engine, trajectory, 1)


def test_maps_from_other_masks_fail_the_check(
    engine: Engine, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = estimators.scores_of
    monkeypatch.setattr(estimators, "scores_of", lambda *args: original(*args[:3], 64, args[4]))
    with pytest.raises(SystemExit, match=r"check failed: .* standard errors from the engine's"):
        estimators.check(engine, trajectory, 1)


def test_rows_and_table(engine: Engine, trajectory: Trajectory) -> None:
    measured = list(estimators.rows_of(engine, trajectory, 1, 45))
    assert [(row["score"], row["estimator"]) for row in measured] == [
        (score, estimator) for score, names in estimators.ESTIMATORS.items() for estimator in names
    ]
    for row in measured:
        assert row["agreement"]["counts"] == (10, 15, 20, 30, 45)
        is_default = estimators.REFERENCE[row["score"]] == row["estimator"]
        assert not is_default or row["agreement"]["own"] == row["agreement"]["reference"]
        assert not is_default or row["agreement"]["own"][-1] == row["reliability"]

    rows = [
        {"model": model, "device_type": "cpu", "commit": "abc"} | row for model in ("one", "other") for row in measured
    ]
    lines = estimators.table(rows).splitlines()
    assert lines[0] == "one (cpu, commit `abc`): 1 prompts × 1 steps, halves of 45 masks."
    assert len(lines) == 2 * (2 + 2 + 7 + 2) + 1
    assert all(line.count(" of 1 |") == 4 for line in lines if "`" in line and line.startswith("|"))
    assert lines[12].startswith("Split-half reliability of the references: local `coverage` ")
