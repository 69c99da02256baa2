"""Whether maps lie on what they should: measures by hand, true areas by another way, all of it on the command line."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dfengine import StepMap
from dfengine.evaluate import ConceptJudge, Localisation, measure_localisation, scenes
from dfengine.evaluate.localisation import SCORES, TARGETS, localisation_scores
from dfengine.evaluate.truth import Areas, auroc, largest_region, pointing_hit, top_k_iou
from dfengine.shapes.world import BACKGROUNDS, COLOURS, Caption, render, sample_scenes

PAIR = "a red circle above a blue square on a gray background"
TWINS = "a red circle above a blue circle on a gray background"
SINGLE = "a red circle on a gray background"
LEFT = np.array([[True, False], [True, False]])
NAN = float("nan")


def events(maps: Mapping[str, Sequence[Sequence[Any]]], word_maps: Any = None) -> Iterator[Any]:
    """An engine's stream of given maps, by method, item and step; "attention" has `word_maps`, by item and step."""
    count = len(next(iter(maps.values())))
    for item in range(count):
        yield SimpleNamespace(item=item, trajectory=SimpleNamespace(image=torch.full((2, 2, 3), item).byte()))
    for method, items in maps.items():
        for item, steps in enumerate(items):
            for step, values in reversed(list(enumerate(steps))):
                given = torch.tensor(np.array(word_maps[item][step])).float() if method == "attention" else None
                yield StepMap(item, step, method, torch.tensor(np.array(values)).float(), word_maps=given)
    for item in range(count):
        yield SimpleNamespace(item=item)


def located(
    maps: Mapping[str, Sequence[Sequence[Any]]],
    areas: Sequence[Any],
    prompts: Sequence[str] | None = None,
    word_maps: Any = None,
) -> Localisation:
    def areas_of(item: int, image: np.ndarray) -> Any:
        assert (image == item).all()
        return areas[item]

    steps = len(next(iter(maps.values()))[0])
    texts = prompts or [SINGLE] * len(areas)
    return measure_localisation(
        events(maps, word_maps),
        areas_of,
        texts,
        range(900, 900 - steps, -1),
        lambda _, item: texts[item].split(),
        "made up",
    )


def alone(mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"subject": mask, "both": mask}


@pytest.mark.parametrize(
    ("heat", "true", "expected"),
    [
        # 1 > 0.6, 1 > 0, 0.4 < 0.6, 0.4 > 0; the hottest two are the upper ones, of which one of three is shared.
        ([[1, 0.6], [0.4, 0]], LEFT, (0.75, 1, 1 / 3)),
        # In any unit.
        ([[-3e30, -4.6e30], [-5.4e30, -7e30]], LEFT, (0.75, 1, 1 / 3)),
        # Three are equal and one is cold: ½ + 1 + ½ + 1 of four. Of equals the first is the hottest.
        ([[0.5, 0.5], [0.5, 0]], ~np.eye(2, dtype=bool), (0.75, 0, 1 / 3)),
        # Of the three equals that are not the hottest the first is on the area; 1 + ½ + ½ + 0 + ... of 1 × 3.
        ([[1, 0], [0, 0]], np.array([[False, True], [False, False]]), (1 / 3, 0, 0)),
        ([[0, 1], [0, 0]], LEFT, (0.25, 0, 1 / 3)),
        # At the image's size: 0, ¼, ¾, 1.
        ([[0, 1]], np.array([[False, False, True, True]]), (1, 1, 1)),
        ([[0, 1]], np.array([[True, False, True, True]]), (2 / 3, 1, 1 / 2)),
        ([[1, 1], [1, 1]], LEFT, (NAN, NAN, NAN)),
        ([[1, NAN], [0, 0]], LEFT, (NAN, NAN, NAN)),
        ([[1, float("inf")], [0, 0]], LEFT, (NAN, NAN, NAN)),
        ([[1, 0], [0, 0]], np.ones((2, 2), bool), (NAN, NAN, NAN)),
        ([[1, 0], [0, 0]], np.zeros((2, 2), bool), (NAN, NAN, NAN)),
    ],
)
def test_measures_by_hand(heat: list, true: np.ndarray, expected: tuple[float, float, float]) -> None:
    found = localisation_scores(np.array(heat, dtype=np.float64), true)
    assert list(found) == list(SCORES) == ["auroc", "pointing", "iou"]
    assert tuple(found.values()) == pytest.approx(expected, nan_ok=True)


def test_ties_are_broken_by_the_pixels_order() -> None:
    heat, true = np.array([[0.0, 2.0, 2.0], [2.0, 1.0, 0.0]]), np.zeros((2, 3), dtype=bool)
    for place in range(6):
        true[:] = False
        true.flat[place] = True
        assert pointing_hit(heat, true) is (place == 1)
        assert top_k_iou(heat, true) == (place == 1)
    true.flat[:] = [0, 1, 1, 0, 0, 0]
    assert top_k_iou(heat, true) == 1
    true.flat[:] = [0, 1, 0, 1, 0, 0]
    assert top_k_iou(heat, true) == 1 / 3
    assert np.isnan(top_k_iou(heat, np.zeros_like(true)))
    assert np.isnan(auroc(heat, np.ones_like(true)))


def test_auroc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    heat, true = generator.integers(0, 5, (6, 7)) / 4, generator.random((6, 7)) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in heat[true] for b in heat[~true]]
    assert auroc(heat, true) == pytest.approx(np.mean(pairs))


def test_means_are_over_images_and_then_over_steps() -> None:
    right, wrong, half = [[1, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [1, 0]]
    found = located({"a": [[right, wrong], [right, half], [wrong, half]]}, [alone(LEFT)] * 3)
    # AUROC: right 1, wrong 0, half ½. The hottest pixel of half is the upper right one; it shares one of three pixels.
    steps, overall = found.steps["a"]["subject"], found.overall["a"]["subject"]
    assert [one.mean for one in steps["auroc"]] == pytest.approx([2 / 3, 1 / 3])
    assert [one.mean for one in steps["pointing"]] == pytest.approx([2 / 3, 0])
    assert [one.mean for one in steps["iou"]] == pytest.approx([2 / 3, 2 / 9])
    assert {one.count for by in steps.values() for one in by} == {3}
    # Each image's own mean: 0.5, 0.75, 0.25.
    assert overall["auroc"].mean == pytest.approx(0.5)
    assert 0.25 <= overall["auroc"].low < 0.5 < overall["auroc"].high <= 0.75
    assert overall["pointing"].mean == pytest.approx(1 / 3)
    # Wilson's interval of none of three reaches z² / (3 + z²); its middle is not the bootstrap's.
    assert steps["pointing"][1].low == 0
    assert steps["pointing"][1].high == pytest.approx(1.959964**2 / (3 + 1.959964**2))
    assert found.steps["a"]["both"] == steps
    assert (found.num_images, found.num_excluded, found.unranked, list(found.timesteps)) == (3, 0, {}, [900, 899])


def test_each_target_has_its_own_images() -> None:
    upper = LEFT.T
    pair = {"subject": upper, "object": ~upper, "both": np.array([[True, True], [True, False]])}
    hot = [[1, 0.9], [0.5, 0]]
    found = located({"a": [[hot], [hot], [hot]]}, [pair, alone(~upper), None], [PAIR, SINGLE, SINGLE])
    assert (found.num_images, found.num_excluded) == (2, 1)
    told = {target: found.steps["a"][target]["auroc"][0] for target in TARGETS}
    assert {target: (one.mean, one.count) for target, one in told.items()} == {
        "subject": (0.5, 2),
        "object": (0, 1),
        "both": (0.5, 2),
    }


def test_maps_that_rank_nothing_are_counted_and_not_measured() -> None:
    right, flat = [[1, 0], [1, 0]], [[2, 2], [2, 2]]
    broken, endless = [[1, NAN], [0, 0]], [[1, float("inf")], [0, 0]]
    maps = {"a": [[right, flat], [broken, endless], [flat, right]], "b": [[right, right]] * 3}
    found = located(maps, [alone(LEFT)] * 3)
    assert found.unranked == {"a": 4}
    for measure in SCORES:
        assert [one.count for one in found.steps["a"]["subject"][measure]] == [1, 1]
        assert found.overall["a"]["subject"][measure].count == 2
        assert found.overall["a"]["subject"][measure].mean == 1
    assert "Maps that are constant or not finite have no score: 4 of a." in found.table().splitlines()
    # An area without an outside is not the map's fault.
    covered = located({"a": [[right]]}, [alone(np.ones((2, 2), dtype=bool))])
    assert (covered.unranked, covered.steps["a"]["subject"]["auroc"][0].count) == ({}, 0)
    assert not any("not finite" in line or "located best" in line for line in covered.table().splitlines())
    assert json.dumps(dataclasses.asdict(covered))


@pytest.mark.parametrize("prompt", [PAIR, TWINS, "A Red Circle above A Blue Circle on a gray Background"])
def test_attention_is_measured_by_the_targets_own_noun(prompt: str) -> None:
    """Each word's map is hot at one pixel; "circle" is the third word, and of two the seventh."""
    subject, other = np.zeros((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)
    subject.flat[2] = other.flat[6] = True
    words = np.eye(12)[: len(prompt.split())].reshape(-1, 3, 4)
    nowhere = np.eye(12)[11].reshape(3, 4)
    maps = {"attention": [[nowhere]], "rise": [[nowhere]]}
    areas = {"subject": subject, "object": other, "both": subject | other}
    found = located(maps, [areas], [prompt], word_maps=[[words]])
    for target in TARGETS:
        told = {name: one[0].mean for name, one in found.steps["attention"][target].items()}
        assert told == {"auroc": 1, "pointing": 1, "iou": 1}
        assert found.steps["rise"][target]["pointing"][0].mean == 0
    turned = located(maps, [areas | {"subject": other, "object": subject}], [prompt], word_maps=[[words]])
    assert [turned.steps["attention"][target]["pointing"][0].mean for target in TARGETS] == [0, 0, 1]


def test_attention_to_a_single_shape_is_that_of_its_noun() -> None:
    words = np.eye(8)[: len(SINGLE.split())].reshape(-1, 2, 4)
    mask = words[2] > 0
    flat = words.copy()
    flat[2] = 1
    found = located({"attention": [[words[5]]] * 2}, [alone(mask)] * 2, word_maps=[[words], [flat]])
    assert [found.steps["attention"][target]["pointing"][0].count for target in TARGETS] == [1, 0, 1]
    assert found.steps["attention"]["both"]["pointing"][0].mean == 1
    assert found.unranked == {"attention": 1}


def test_attention_to_both_is_the_mean_of_their_maps() -> None:
    words = np.zeros((len(PAIR.split()), 1, 4))
    words[2], words[6] = [[1, 0, 0.6, 0]], [[0, 0, 0.6, 0.2]]
    areas = {target: np.array([[False, False, True, False]]) for target in TARGETS}
    found = located({"attention": [[words[0]]]}, [areas], [PAIR], word_maps=[[words]])
    assert [found.steps["attention"][target]["pointing"][0].mean for target in TARGETS] == [0, 1, 1]


def test_no_image_left_is_refused() -> None:
    with pytest.raises(ValueError, match="all 2 images are excluded"):
        located({"a": [[LEFT]] * 2}, [None, None])


def test_the_best_is_told_and_the_table_has_a_row_a_method() -> None:
    right, wrong, half = [[1, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [1, 0]]
    flat = [[1, 1], [1, 1]]
    found = located({"a": [[wrong, half, wrong, flat]], "b": [[half, wrong, right, flat]]}, [alone(LEFT)])
    assert found.best("subject") == found.best("both", "iou") == ("b", 2)
    lines = found.table().splitlines()
    heads = "auroc | pointing | iou | auroc, step 0, t = 900 | auroc, step 2, t = 898 | auroc, step 3, t = 897"
    assert lines[0] == f"| subject, made up | {heads} | best step |"
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[2] == "| a | 0.17 | 0.00 | 0.11 | 0.00 | 0.00 | – | 1: 0.50 |"
    assert lines[3] == "| b | 0.50 | 0.33 | 0.44 | 0.50 | 1.00 | – | 2: 1.00 |"
    assert "subject: located best by b at step 2 (t = 898), AUROC 1.00, pointing game 1.00." in lines
    # No caption has an object: dashes, and nothing is found best.
    assert "| a | – | – | – | – | – | – | – |" in lines
    assert not any(line.startswith("object: located best") for line in lines)
    assert any(line.startswith("1 images (0 excluded), 4 steps") for line in lines)


def areas_of(prompt: str, image: np.ndarray) -> Areas | None:
    return ConceptJudge().areas(image, Caption.parse(prompt))


# True areas --------------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_with_their_exact_areas() -> None:
    found = scenes(12, seed=5)
    drawn = sample_scenes(12, torch.Generator().manual_seed(5))
    images, coverage = render(drawn)
    for scene, caption, image, covered in zip(found, drawn.captions, images, coverage, strict=True):
        assert Caption.parse(scene.prompt) == caption
        assert (scene.image.shape, scene.image.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_allclose(scene.image / 255, image.permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
        shapes = {"subject": (0, caption.subject), "object": (1, caption.object)}
        assert set(scene.areas) == {"both", *(name for name, (_, shape) in shapes.items() if shape)}
        for name, (slot, shape) in shapes.items():
            if shape is not None:
                np.testing.assert_array_equal(scene.areas[name], covered[slot].numpy() > 0.5)
                # What is wholly covered has the shape's own colour; what nothing covers has the background's.
                pixels = scene.image[covered[slot].numpy() == 1] / 255
                np.testing.assert_allclose(pixels, np.broadcast_to(COLOURS[shape[0]], pixels.shape), atol=0.51 / 255)
        bare = scene.image[covered.amax(0).numpy() == 0] / 255
        np.testing.assert_allclose(bare, np.broadcast_to(BACKGROUNDS[caption.background], bare.shape), atol=0.51 / 255)
        parts = [scene.areas[name] for name in ("subject", "object") if name in scene.areas]
        np.testing.assert_array_equal(scene.areas["both"], np.sum(parts, axis=0) == 1)
    assert [scene.prompt for scene in scenes(3, seed=5)] != [scene.prompt for scene in scenes(3, seed=6)]


@pytest.mark.slow
def test_areas_by_colour_are_the_exact_ones() -> None:
    found = scenes(40, seed=2)
    told = [areas_of(scene.prompt, scene.image) for scene in found]
    compared = 0
    for scene, by_colour in zip(found, told, strict=True):
        caption = Caption.parse(scene.prompt)
        assert (by_colour is None) == (caption.object is not None and caption.object[0] == caption.subject[0])
        if by_colour is not None:
            assert set(by_colour) == set(scene.areas)
            for target, mask in by_colour.items():
                assert (mask & scene.areas[target]).sum() / (mask | scene.areas[target]).sum() > 0.85
                compared += 1
    assert compared > 60


def test_an_image_of_something_else_has_no_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(one for one in scenes(40, seed=2) if "object" not in one.areas)
    colour, kind = Caption.parse(scene.prompt).subject
    other = scene.prompt.replace(colour, "green" if colour != "green" else "red")
    assert areas_of(scene.prompt, scene.image) is not None
    assert areas_of(other, scene.image) is None
    assert areas_of(scene.prompt.replace(kind, "ring" if kind != "ring" else "star"), scene.image) is None
    # Where the network is wrong and nothing has the colour, there is no area to look for.
    monkeypatch.setattr(ConceptJudge, "agrees", lambda *_: True)
    assert areas_of(other, scene.image) is None


def test_the_area_is_the_largest_connected_region() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    image[0, :2] = image[2:, 3:] = image[1, 2] = [229, 30, 20]
    image[3, 0] = [20, 30, 229]
    expected = np.zeros((4, 5), dtype=bool)
    expected[2:, 3:] = True  # the pixel at (1, 2) touches it by a corner only
    np.testing.assert_array_equal(largest_region(image, "red"), expected)
    assert largest_region(image, "blue").sum() == 1
    assert not largest_region(image, "pink").any()


@pytest.mark.slow
def test_a_perfect_map_scores_one_its_negative_none_and_a_random_one_half() -> None:
    drawn = scenes(10, seed=4)
    generator = np.random.default_rng(0)
    masks = [scene.areas["both"].astype(float) for scene in drawn]
    maps = {
        "perfect": [[mask] for mask in masks],
        "negative": [[-mask] for mask in masks],
        "random": [[generator.random((64, 64))] for _ in masks],
    }

    def stream() -> Iterator[Any]:
        for event in events(maps):
            is_first = hasattr(event, "trajectory")
            image = SimpleNamespace(image=torch.from_numpy(drawn[event.item].image)) if is_first else None
            yield SimpleNamespace(item=event.item, trajectory=image) if is_first else event

    prompts = [scene.prompt for scene in drawn]
    found = measure_localisation(stream(), lambda item, _: drawn[item].areas, prompts, [7], lambda *_: [], "rendered")
    for name, score in (("perfect", 1), ("negative", 0)):
        for measure in SCORES:
            assert found.steps[name]["both"][measure][0].mean == score
    assert found.steps["random"]["both"]["auroc"][0].mean == pytest.approx(0.5, abs=0.02)
    assert found.best("both") == ("perfect", 0)
