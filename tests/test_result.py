"""Heat maps from raw maps, against SciPy and by hand."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from dfengine.result import Result, heatmap


def result(maps: np.ndarray) -> Result:
    steps = len(maps)
    return Result(
        prompt="a red circle",
        seed=0,
        model="shapes",
        image=np.zeros((8, 12, 3), np.uint8),
        timesteps=np.arange(steps)[::-1].copy(),
        alpha_bar=np.linspace(0.1, 0.9, steps, dtype=np.float32),
        latents=np.zeros((steps, 1, 2, 3), np.float32),
        epsilon=np.zeros((steps, 1, 2, 3), np.float32),
        maps={"rise": maps},
    )


def test_min_max_then_bilinear_with_half_pixel_centres() -> None:
    saliency = np.array([[3.0, 5.0, 4.0], [7.0, 3.5, 6.0]], np.float32)
    rows = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1)
    columns = np.clip((np.arange(12) + 0.5) / 4 - 0.5, 0, 2)
    expected = map_coordinates((saliency - 3) / 4, np.meshgrid(rows, columns, indexing="ij"), order=1)
    np.testing.assert_allclose(heatmap(saliency, (8, 12)), expected, rtol=1e-5, atol=1e-6)


def test_a_constant_map_is_zeros() -> None:
    assert (heatmap(np.full((2, 3), 0.7, np.float32), (8, 12)) == 0).all()


def test_a_step_is_drawn_at_the_size_of_the_image() -> None:
    maps = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32)
    heat = result(maps).heatmap("rise", step=-1)
    np.testing.assert_array_equal(heat, heatmap(maps[2], (8, 12)))
    assert heat.dtype == np.float32


def test_what_is_not_there_is_named() -> None:
    maps = np.full((3, 2, 3), np.nan, np.float32)
    with pytest.raises(ValueError, match="no map 'cam': expected one of rise"):
        result(maps).heatmap("cam", 0)
    with pytest.raises(ValueError, match=r"step 3 is outside \[0, 2\]"):
        result(maps).heatmap("rise", 3)
    with pytest.raises(ValueError, match="step 1 of 'rise' is not computed yet"):
        result(maps).heatmap("rise", 1)
