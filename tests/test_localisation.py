"""Localisation of maps: measures worked out by hand, and true areas against an independent computation."""

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


def step_events(maps: Mapping[str, Sequence[Sequence[Any]]], word_maps: Any = None) -> Iterator[Any]:
    """An engine's stream of maps, by method, item and step; "attention" has `word_maps`, by item and step."""
    count = len(next(iter(maps.values())))
    for item in range(count):
        yield SimpleNamespace(item=item, trajectory=SimpleNamespace(image=torch.full((2, 2, 3), item).byte()))
    for method, items in maps.items():
        for item, steps in enumerate(items):
            for step, values in reversed(list(enumerate(steps))):
                item_word_maps = (
                    torch.tensor(np.array(word_maps[item][step])).float() if method == "attention" else None
                )
                yield StepMap(item, step, method, torch.tensor(np.array(values)).float(), word_maps=item_word_maps)
    for item in range(count):
        yield SimpleNamespace(item=item)


def localise(
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
        step_events(maps, word_maps),
        areas_of,
        texts,
        range(900, 900 - steps, -1),
        lambda _, item: texts[item].split(),
        "made up",
    )


def single_area(mask: np.ndarray) -> dict[str, np.ndarray]:
    return {"subject": mask, "both": mask}


@pytest.mark.parametrize(
    ("saliency", "truth", "expected"),
    [
        # 1 > 0.6, 1 > 0, 0.4 < 0.6, 0.4 > 0; the highest two are the upper ones, with an IoU of 1/3.
        ([[1, 0.6], [0.4, 0]], LEFT, (0.75, 1, 1 / 3)),
        # The measures do not depend on the unit.
        ([[-3e30, -4.6e30], [-5.4e30, -7e30]], LEFT, (0.75, 1, 1 / 3)),
        # Three are equal and one is lower: ½ + 1 + ½ + 1 of four. Among equals the first counts as the highest.
        ([[0.5, 0.5], [0.5, 0]], ~np.eye(2, dtype=bool), (0.75, 0, 1 / 3)),
        # The first of the three equal lower pixels is the area: 0 + ½ + ½ of 1 × 3.
        ([[1, 0], [0, 0]], np.array([[False, True], [False, False]]), (1 / 3, 0, 0)),
        ([[0, 1], [0, 0]], LEFT, (0.25, 0, 1 / 3)),
        # Interpolated to the size of the image: 0, ¼, ¾, 1.
        ([[0, 1]], np.array([[False, False, True, True]]), (1, 1, 1)),
        ([[0, 1]], np.array([[True, False, True, True]]), (2 / 3, 1, 1 / 2)),
        ([[1, 1], [1, 1]], LEFT, (NAN, NAN, NAN)),
        ([[1, NAN], [0, 0]], LEFT, (NAN, NAN, NAN)),
        ([[1, float("inf")], [0, 0]], LEFT, (NAN, NAN, NAN)),
        ([[1, 0], [0, 0]], np.ones((2, 2), bool), (NAN, NAN, NAN)),
        ([[1, 0], [0, 0]], np.zeros((2, 2), bool), (NAN, NAN, NAN)),
    ],
)
def test_measures_by_hand(saliency: list, truth: np.ndarray, expected: tuple[float, float, float]) -> None:
    scores = localisation_scores(np.array(saliency, dtype=np.float64), truth)
    assert list(scores) == list(SCORES) == ["auroc", "pointing", "iou"]
    assert tuple(scores.values()) == pytest.approx(expected, nan_ok=True)


def test_ties_are_broken_by_pixel_order() -> None:
    saliency, truth = np.array([[0.0, 2.0, 2.0], [2.0, 1.0, 0.0]]), np.zeros((2, 3), dtype=bool)
    for place in range(6):
        truth[:] = False
        truth.flat[place] = True
        assert pointing_hit(saliency, truth) is (place == 1)
        assert top_k_iou(saliency, truth) == (place == 1)
    truth.flat[:] = [0, 1, 1, 0, 0, 0]
    assert top_k_iou(saliency, truth) == 1
    truth.flat[:] = [0, 1, 0, 1, 0, 0]
    assert top_k_iou(saliency, truth) == 1 / 3
    assert np.isnan(top_k_iou(saliency, np.zeros_like(truth)))
    assert np.isnan(auroc(saliency, np.ones_like(truth)))


def test_auroc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    saliency, truth = generator.integers(0, 5, (6, 7)) / 4, generator.random((6, 7)) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in saliency[truth] for b in saliency[~truth]]
    assert auroc(saliency, truth) == pytest.approx(np.mean(pairs))


def test_means_are_over_images_and_then_over_steps() -> None:
    right, wrong, half = [[1, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [1, 0]]
    localisation = localise({"a": [[right, wrong], [right, half], [wrong, half]]}, [single_area(LEFT)] * 3)
    # AUROC: right 1, wrong 0, half ½. The highest pixel of half is the upper right one; its IoU is 1/3.
    steps, overall = localisation.steps["a"]["subject"], localisation.overall["a"]["subject"]
    assert [summary.mean for summary in steps["auroc"]] == pytest.approx([2 / 3, 1 / 3])
    assert [summary.mean for summary in steps["pointing"]] == pytest.approx([2 / 3, 0])
    assert [summary.mean for summary in steps["iou"]] == pytest.approx([2 / 3, 2 / 9])
    assert {summary.count for summaries in steps.values() for summary in summaries} == {3}
    # Each image's own mean: 0.5, 0.75, 0.25.
    assert overall["auroc"].mean == pytest.approx(0.5)
    # Student's t of three values, 0.5 ± 0.62, within what an AUROC can be.
    assert (overall["auroc"].low, overall["auroc"].high) == (0, 1)
    assert overall["pointing"].mean == pytest.approx(1 / 3)
    # Wilson's interval of 0 out of 3 ends at z² / (3 + z²); it is not the bootstrap's.
    assert steps["pointing"][1].low == 0
    assert steps["pointing"][1].high == pytest.approx(1.959964**2 / (3 + 1.959964**2))
    assert localisation.steps["a"]["both"] == steps
    assert (
        localisation.num_images,
        localisation.num_excluded,
        localisation.unranked,
        list(localisation.timesteps),
    ) == (3, 0, {}, [900, 899])


def test_each_target_has_its_own_images() -> None:
    upper = LEFT.T
    pair = {"subject": upper, "object": ~upper, "both": np.array([[True, True], [True, False]])}
    hot = [[1, 0.9], [0.5, 0]]
    localisation = localise({"a": [[hot], [hot], [hot]]}, [pair, single_area(~upper), None], [PAIR, SINGLE, SINGLE])
    assert (localisation.num_images, localisation.num_excluded) == (2, 1)
    summaries = {target: localisation.steps["a"][target]["auroc"][0] for target in TARGETS}
    assert {target: (summary.mean, summary.count) for target, summary in summaries.items()} == {
        "subject": (0.5, 2),
        "object": (0, 1),
        "both": (0.5, 2),
    }


def test_maps_that_cannot_be_ranked_are_counted_and_excluded() -> None:
    right, flat = [[1, 0], [1, 0]], [[2, 2], [2, 2]]
    broken, infinite = [[1, NAN], [0, 0]], [[1, float("inf")], [0, 0]]
    maps = {"a": [[right, flat], [broken, infinite], [flat, right]], "b": [[right, right]] * 3}
    localisation = localise(maps, [single_area(LEFT)] * 3)
    assert localisation.unranked == {"a": 4}
    for measure in SCORES:
        assert [summary.count for summary in localisation.steps["a"]["subject"][measure]] == [1, 1]
        assert localisation.overall["a"]["subject"][measure].count == 2
        assert localisation.overall["a"]["subject"][measure].mean == 1
    assert "Maps that are constant or not finite have no score: 4 of a." in localisation.table().splitlines()
    # An area that covers the image does not count as an unranked map.
    covered = localise({"a": [[right]]}, [single_area(np.ones((2, 2), dtype=bool))])
    assert (covered.unranked, covered.steps["a"]["subject"]["auroc"][0].count) == ({}, 0)
    assert not any("not finite" in line or "located best" in line for line in covered.table().splitlines())
    assert json.dumps(dataclasses.asdict(covered))


@pytest.mark.parametrize("prompt", [PAIR, TWINS, "A Red Circle above A Blue Circle on a gray Background"])
def test_attention_is_measured_with_the_map_of_the_targets_noun(prompt: str) -> None:
    """Each word's map peaks at one pixel; "circle" is the third word, and the seventh if it is the object too."""
    subject, other = np.zeros((3, 4), dtype=bool), np.zeros((3, 4), dtype=bool)
    subject.flat[2] = other.flat[6] = True
    words = np.eye(12)[: len(prompt.split())].reshape(-1, 3, 4)
    nowhere = np.eye(12)[11].reshape(3, 4)
    maps = {"attention": [[nowhere]], "rise": [[nowhere]]}
    areas = {"subject": subject, "object": other, "both": subject | other}
    localisation = localise(maps, [areas], [prompt], word_maps=[[words]])
    for target in TARGETS:
        scores = {name: summaries[0].mean for name, summaries in localisation.steps["attention"][target].items()}
        assert scores == {"auroc": 1, "pointing": 1, "iou": 1}
        assert localisation.steps["rise"][target]["pointing"][0].mean == 0
    swapped = localise(maps, [areas | {"subject": other, "object": subject}], [prompt], word_maps=[[words]])
    assert [swapped.steps["attention"][target]["pointing"][0].mean for target in TARGETS] == [0, 0, 1]


def test_a_target_with_a_map_of_its_phrase_is_measured_with_that() -> None:
    """ "circle" and "square" are mapped too, and would be found elsewhere."""
    subject, other = np.zeros((2, 4), dtype=bool), np.zeros((2, 4), dtype=bool)
    subject.flat[1] = other.flat[5] = True
    names, peaks = ["circle", "Red Circle", "square", "blue square"], [0, 1, 2, 5]
    words = np.eye(8)[peaks].reshape(-1, 2, 4)
    areas = {"subject": subject, "object": other, "both": subject | other}
    events = step_events({"attention": [[words[0]]]}, [[words]])
    localisation = measure_localisation(events, lambda *_: areas, [PAIR], [7], lambda *_: names, "made up")
    for target in TARGETS:
        assert localisation.steps["attention"][target]["pointing"][0].mean == 1, target


def test_attention_to_a_single_shape_is_measured_with_its_noun() -> None:
    words = np.eye(8)[: len(SINGLE.split())].reshape(-1, 2, 4)
    mask = words[2] > 0
    flat = words.copy()
    flat[2] = 1
    localisation = localise({"attention": [[words[5]]] * 2}, [single_area(mask)] * 2, word_maps=[[words], [flat]])
    assert [localisation.steps["attention"][target]["pointing"][0].count for target in TARGETS] == [1, 0, 1]
    assert localisation.steps["attention"]["both"]["pointing"][0].mean == 1
    assert localisation.unranked == {"attention": 1}


def test_attention_to_both_is_the_mean_of_their_maps() -> None:
    words = np.zeros((len(PAIR.split()), 1, 4))
    words[2], words[6] = [[1, 0, 0.6, 0]], [[0, 0, 0.6, 0.2]]
    areas = {target: np.array([[False, False, True, False]]) for target in TARGETS}
    localisation = localise({"attention": [[words[0]]]}, [areas], [PAIR], word_maps=[[words]])
    assert [localisation.steps["attention"][target]["pointing"][0].mean for target in TARGETS] == [0, 1, 1]


def test_excluding_all_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="all 2 images are excluded"):
        localise({"a": [[LEFT]] * 2}, [None, None])


def test_the_table_has_a_row_per_method_and_names_the_best() -> None:
    right, wrong, half = [[1, 0], [1, 0]], [[0, 1], [0, 1]], [[0, 1], [1, 0]]
    flat = [[1, 1], [1, 1]]
    localisation = localise({"a": [[wrong, half, wrong, flat]], "b": [[half, wrong, right, flat]]}, [single_area(LEFT)])
    assert localisation.best("subject") == localisation.best("both", "iou") == ("b", 2)
    lines = localisation.table().splitlines()
    columns = "auroc | pointing | iou | auroc, step 0, t = 900 | auroc, step 2, t = 898 | auroc, step 3, t = 897"
    assert lines[0] == f"| subject, made up | {columns} | best step |"
    assert lines[1].count("---") == lines[0].count("|") - 1
    assert lines[2] == "| a | 0.17 | 0.00 | 0.11 | 0.00 | 0.00 | – | 1: 0.50 |"
    assert lines[3] == "| b | 0.50 | 0.33 | 0.44 | 0.50 | 1.00 | – | 2: 1.00 |"
    assert "subject: located best by b at step 2 (t = 898), AUROC 1.00, pointing game 1.00." in lines
    # No caption has an object: the table has dashes and names no best method.
    assert "| a | – | – | – | – | – | – | – |" in lines
    assert not any(line.startswith("object: located best") for line in lines)
    assert any(line.startswith("1 images (0 excluded), 4 steps") for line in lines)


def areas_of(prompt: str, image: np.ndarray) -> Areas | None:
    return ConceptJudge().areas(image, Caption.parse(prompt))


# True areas --------------------------------------------------------------------------------------------------------


def test_scenes_are_drawn_with_their_exact_areas() -> None:
    sampled = scenes(12, seed=5)
    expected = sample_scenes(12, torch.Generator().manual_seed(5))
    images, coverage = render(expected)
    for scene, caption, image, covered in zip(sampled, expected.captions, images, coverage, strict=True):
        assert Caption.parse(scene.prompt) == caption
        assert (scene.image.shape, scene.image.dtype) == ((64, 64, 3), np.uint8)
        np.testing.assert_allclose(scene.image / 255, image.permute(1, 2, 0).numpy(), atol=0.5 / 255 + 1e-6)
        shapes = {"subject": (0, caption.subject), "object": (1, caption.object)}
        assert set(scene.areas) == {"both", *(name for name, (_, shape) in shapes.items() if shape)}
        for name, (slot, shape) in shapes.items():
            if shape is not None:
                np.testing.assert_array_equal(scene.areas[name], covered[slot].numpy() > 0.5)
                # Fully covered pixels have the shape's colour, uncovered ones that of the background.
                pixels = scene.image[covered[slot].numpy() == 1] / 255
                np.testing.assert_allclose(pixels, np.broadcast_to(COLOURS[shape[0]], pixels.shape), atol=0.51 / 255)
        background = scene.image[covered.amax(0).numpy() == 0] / 255
        np.testing.assert_allclose(
            background, np.broadcast_to(BACKGROUNDS[caption.background], background.shape), atol=0.51 / 255
        )
        shape_areas = [scene.areas[name] for name in ("subject", "object") if name in scene.areas]
        np.testing.assert_array_equal(scene.areas["both"], np.sum(shape_areas, axis=0) == 1)
    assert [scene.prompt for scene in scenes(3, seed=5)] != [scene.prompt for scene in scenes(3, seed=6)]


@pytest.mark.slow
def test_areas_by_colour_approximate_the_exact_ones() -> None:
    sampled = scenes(40, seed=2)
    estimates = [areas_of(scene.prompt, scene.image) for scene in sampled]
    num_compared = 0
    for scene, by_colour in zip(sampled, estimates, strict=True):
        caption = Caption.parse(scene.prompt)
        assert (by_colour is None) == (caption.object is not None and caption.object[0] == caption.subject[0])
        if by_colour is not None:
            assert set(by_colour) == set(scene.areas)
            for target, mask in by_colour.items():
                assert (mask & scene.areas[target]).sum() / (mask | scene.areas[target]).sum() > 0.85
                num_compared += 1
    assert num_compared > 60


def test_an_image_that_does_not_match_its_prompt_has_no_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(one for one in scenes(40, seed=2) if "object" not in one.areas)
    colour, kind = Caption.parse(scene.prompt).subject
    other = scene.prompt.replace(colour, "green" if colour != "green" else "red")
    assert areas_of(scene.prompt, scene.image) is not None
    assert areas_of(other, scene.image) is None
    assert areas_of(scene.prompt.replace(kind, "ring" if kind != "ring" else "star"), scene.image) is None
    # If the network is wrong and no pixel has the colour, there is no area.
    monkeypatch.setattr(ConceptJudge, "agrees", lambda *_: True)
    assert areas_of(other, scene.image) is None


def test_the_area_is_the_largest_connected_region() -> None:
    image = np.zeros((4, 5, 3), np.uint8)
    image[0, :2] = image[2:, 3:] = image[1, 2] = [229, 30, 20]
    image[3, 0] = [20, 30, 229]
    expected = np.zeros((4, 5), dtype=bool)
    expected[2:, 3:] = True  # the pixel at (1, 2) touches it at a corner only
    np.testing.assert_array_equal(largest_region(image, "red"), expected)
    assert largest_region(image, "blue").sum() == 1
    assert not largest_region(image, "pink").any()


@pytest.mark.slow
def test_perfect_negative_and_random_maps_score_one_zero_and_one_half() -> None:
    sampled = scenes(10, seed=4)
    generator = np.random.default_rng(0)
    masks = [scene.areas["both"].astype(float) for scene in sampled]
    maps = {
        "perfect": [[mask] for mask in masks],
        "negative": [[-mask] for mask in masks],
        "random": [[generator.random((64, 64))] for _ in masks],
    }

    def stream() -> Iterator[Any]:
        for event in step_events(maps):
            is_first = hasattr(event, "trajectory")
            image = SimpleNamespace(image=torch.from_numpy(sampled[event.item].image)) if is_first else None
            yield SimpleNamespace(item=event.item, trajectory=image) if is_first else event

    prompts = [scene.prompt for scene in sampled]
    localisation = measure_localisation(
        stream(), lambda item, _: sampled[item].areas, prompts, [7], lambda *_: [], "rendered"
    )
    for name, score in (("perfect", 1), ("negative", 0)):
        for measure in SCORES:
            assert localisation.steps[name]["both"][measure][0].mean == score
    assert localisation.steps["random"]["both"]["auroc"][0].mean == pytest.approx(0.5, abs=0.02)
    assert localisation.best("both") == ("perfect", 0)
