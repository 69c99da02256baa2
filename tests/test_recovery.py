"""How maps change over the steps: every measure worked out by hand, the verdict, and the figure."""

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dfengine import StepMap, figures
from dfengine.evaluate import check_has_truth, measure_recovery
from dfengine.evaluate.recovery import centre_of_mass, recovery_measures
from dfengine.shapes.world import render, sample_scenes


def test_measures_by_hand() -> None:
    """Four pixels in a row: the map is (1, 0.6, 0.4, 0), and the shapes cover the first and the third."""
    saliency, truth = np.array([[1.0, 0.6, 0.4, 0.0]]), np.array([[True, False, True, False]])
    previous = np.array([[0.0, 0.0, 0.0, 1.0]])
    measures = recovery_measures(saliency, previous, truth)
    shares = np.array([0.5, 0.3, 0.2])
    assert measures["area"] == 0.5
    assert measures["entropy"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(4))
    # Centres of mass: 0.5·1/8 + 0.3·3/8 + 0.2·5/8 = 0.3, and 7/8 at the previous step.
    assert centre_of_mass(saliency) == pytest.approx((0.5, 0.3))
    assert measures["shift"] == pytest.approx(7 / 8 - 0.3)
    # The two highest pixels are the first and the second; the intersection over union with the shapes is 1/3.
    assert measures["overlap"] == pytest.approx(1 / 3)
    # 1 > 0.6, 1 > 0, 0.4 < 0.6, 0.4 > 0
    assert measures["auroc"] == 0.75
    assert np.isnan(recovery_measures(saliency, None, truth)["shift"])
    assert all(np.isnan(value) for value in recovery_measures(np.ones((1, 4)), previous, truth).values())


def scenes(count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Captions, pictures and shape masks of scenes whose shapes differ in colour."""
    sampled = sample_scenes(4 * count, torch.Generator().manual_seed(1))
    images, coverage = render(sampled)
    indices = [i for i, c in enumerate(sampled.captions) if c.object is None or c.object[0] != c.subject[0]][:count]
    pictures = (images[indices].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    return [str(sampled.captions[i]) for i in indices], pictures, (coverage[indices].amax(1) > 0.5).numpy()


def step_events(maps: dict[str, np.ndarray], pictures: np.ndarray) -> Iterator[Any]:
    """An engine's event stream for synthetic maps [items, steps, h, w]."""
    for item, picture in enumerate(pictures):
        yield SimpleNamespace(item=item, trajectory=SimpleNamespace(image=torch.from_numpy(picture)))
    for method, values in maps.items():
        for step in range(values.shape[1]):
            for item in range(len(values)):
                yield StepMap(item, step, method, torch.from_numpy(values[item, step].astype(np.float32)))
    for item in range(len(pictures)):
        yield SimpleNamespace(item=item)


@pytest.mark.slow
def test_the_verdict_distinguishes_maps_that_spread_from_the_shapes() -> None:
    prompts, pictures, shapes = scenes(12)
    rows = np.arange(64)[:, None] / 64
    spreading = np.stack([np.maximum(shapes, 0.9 * (rows < share)) for share in (0, 0.3, 0.6, 0.95)], axis=1)
    recovery = measure_recovery(
        step_events({"spreads": spreading, "shrinks": spreading[:, ::-1], "beside": 1 - spreading}, pictures),
        prompts,
        (900, 600, 300, 0),
    )
    assert (recovery.num_images, recovery.num_excluded) == (12, 0)
    assert list(recovery.steps) == ["spreads", "shrinks", "beside"]
    assert recovery.steps["spreads"]["overlap"][0].mean > 0.8
    assert recovery.trend["spreads"]["area"].mean == 1
    assert recovery.trend["shrinks"]["area"].mean == -1
    assert recovery.verdict("spreads") == "spreads: the map begins on the shapes and grows; the claim holds"
    assert recovery.verdict("shrinks").endswith("shrinks; the claim does not hold")
    assert recovery.verdict("beside").startswith("beside: the map begins beside them and shrinks")
    table = recovery.table()
    assert "| spreads | step 0, t = 900 | step 2, t = 300 | step 3, t = 0 | trend |" in table
    assert recovery.verdict("beside") in table


def test_images_that_do_not_match_their_prompt_are_excluded() -> None:
    prompts, pictures, _ = scenes(6)
    maps = np.random.default_rng(0).random((6, 3, 8, 8))
    mismatched = measure_recovery(step_events({"any": maps}, pictures), [prompts[1], "a cat", *prompts[2:]], (9, 5, 1))
    assert mismatched.num_excluded >= 2
    assert mismatched.num_images >= 3
    subjects = [re.sub(r" (above|below|left of|right of) an? \w+ \w+", "", prompt) for prompt in prompts]
    single = measure_recovery(step_events({"any": maps}, pictures), subjects, (9, 5, 1))
    assert single.num_images == sum(prompt == one for prompt, one in zip(prompts, subjects, strict=True))
    for image_shape, texts in (((64, 64), ["a cat"]), ((128, 128), prompts)):
        with pytest.raises(ValueError, match="in the embedded world alone, for 64×64 pixels"):
            check_has_truth(image_shape, texts)
    check_has_truth((64, 64), ["a cat", *prompts])
    with pytest.raises(ValueError, match="no image has shapes whose areas are known"):
        measure_recovery(step_events({"any": maps}, pictures), ["a cat"] * 6, (9, 5, 1))


def test_the_figure_has_a_line_per_method() -> None:
    bands = {"rise": {"area": [(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)]}, "cam": {"area": [(0.1, 0.0, 0.2), (0.2, 0.1, 0.3)]}}
    figure = figures.recovery(bands, (900, 1))
    (axis,) = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[0.5, 0.7], [0.1, 0.2]]
    assert axis.get_title() == "area"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["step 0\nt = 900", "step 1\nt = 1"]


def test_panels_can_be_laid_out_in_rows_with_common_limits() -> None:
    data = {name: [(0.5, 0.4, 0.6), (0.7, 0.6, 0.8)] for name in "abcde"}
    figure = figures.recovery({"cam": data}, (900, 1), columns=3, limits=(0, 1))
    assert [axis.get_title() for axis in figure.axes] == list("abcde")
    assert {axis.get_ylim() for axis in figure.axes} == {(0, 1)}
    assert len({round(axis.get_subplotspec().rowspan.start) for axis in figure.axes}) == 2
