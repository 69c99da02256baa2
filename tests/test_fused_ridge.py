"""Fused ridge regression against `estimators.ridge` in float64."""

from unittest.mock import patch

import pytest
import torch
from dfkernels import designs, estimators
from dfkernels.fused import ridge as fused
from distributions import NAMES, distribution
from fused import DEVICE
from tolerance import tolerance
from torch.testing import assert_close

SHAPE = (3, 5)


def random_scores(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.grid
@pytest.mark.parametrize("count", [7, 15, 41])  # fewer masks than pixels, as many, more
@pytest.mark.parametrize("kind", NAMES)
def test_ridge_equals_the_estimators(count: int, kind: str) -> None:
    settings = {"distribution": distribution(kind, 0.3, 3), "penalty": 0.5, "first": 2**32 - 41}
    with patch.object(fused, "EXACT_COUNT", 16):
        ours = fused.ridge(random_scores(count), -7, 2, SHAPE, **settings)
    for mine, theirs in zip(ours, estimators.ridge(random_scores(count), -7, 2, SHAPE, **settings), strict=True):
        assert_close(mine, theirs, **tolerance("ridge"))


@pytest.mark.slow
def test_normal_equations_are_exact() -> None:
    y = random_scores(37).double()
    with patch.object(fused, "EXACT_COUNT", 16):
        gram, projected = fused.normal_equations(y, 5, 1, SHAPE, distribution("gaussian", 0.25), 3)
    x = designs.masks(5, 1, 3, 37, SHAPE, distribution("gaussian", 0.25), device=DEVICE).flatten(1).double() - 0.25
    assert torch.equal(gram, x.T @ x)  # multiples of 1/16
    assert_close(projected, x.T @ y, **tolerance("add"))


def test_half_precision_represents_every_count_of_a_product() -> None:
    counts = torch.arange(fused.EXACT_COUNT + 1)
    assert torch.equal(counts.half().long(), counts)


def test_errors_match_the_estimators() -> None:
    with pytest.raises(ValueError, match=r"penalty 0\.0 is not positive"):
        fused.ridge(random_scores(20), 0, 0, SHAPE, penalty=0.0)
    with pytest.raises(ValueError, match="got no scores: ridge needs"):
        fused.ridge(random_scores(0), 0, 0, SHAPE)


@pytest.mark.gpu
def test_stable_diffusion_size() -> None:
    scores = random_scores(8192)
    with torch.autocast("cuda", torch.bfloat16):
        ours = fused.ridge(scores, 3, 1, (64, 64))
    for mine, theirs in zip(ours, estimators.ridge(scores, 3, 1, (64, 64)), strict=True):
        assert_close(mine, theirs, **tolerance("ridge"))
