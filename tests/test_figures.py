"""Figures say what they show; the pictures themselves are looked at by people."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from test_result import result

from dfengine.figures import COLOUR_MAP, chosen_steps, overlay, save, strip

MAPS = np.random.default_rng(0).normal(size=(30, 2, 3)).astype(np.float32)


def test_steps_are_spread_from_first_to_last() -> None:
    assert chosen_steps(30) == [0, 6, 12, 17, 23, 29]
    assert chosen_steps(3) == [0, 1, 2]
    assert chosen_steps(1) == [0]


def test_a_strip_says_prompt_model_seed_step_and_t() -> None:
    figure = strip(result(MAPS), steps=[0, 29])
    assert figure.get_suptitle() == "“a red circle”  ·  shapes, seed 0"
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["image", "step 1, t = 29", "step 30, t = 0"]


def test_the_heat_map_lies_over_a_grey_picture() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 255
    heat = np.array([[0.0, 1.0], [0.5, 0.0]])
    drawn = overlay(image, heat)
    colour = colormaps[COLOUR_MAP]
    np.testing.assert_allclose(drawn[0, 0], 0.4 + 0.6 * np.array(colour(0.0)[:3]), atol=1e-6)
    np.testing.assert_allclose(drawn[0, 1], 0.6 * np.array(colour(1.0)[:3]), atol=1e-6)


@pytest.mark.parametrize("name", ["strip.png", "strip.pdf", "strip.svg"])
def test_a_figure_is_saved_by_its_ending(tmp_path: Path, name: str) -> None:
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    path = save(strip(result(MAPS), steps=[0]), tmp_path / name)
    assert path.read_bytes().startswith(heads[path.suffix])


def test_a_step_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="step 30 is outside"):
        strip(result(MAPS), steps=[30])
