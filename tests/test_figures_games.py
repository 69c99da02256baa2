"""Figures of the games show the data that they are given. Their appearance is reviewed by eye."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from dfengine.figures.games import ablation, comparison, curves
from dfengine.figures.panels import COLOURS, overlay

#: Texts that matplotlib would take for invalid mathematics.
PROMPT, METHOD = "$\\mat$ under a red_circle_", "rise_0 $\\frac$"
LONG = "an astronaut in a shining silver suit riding a galloping brown horse on Mars under two bright moons at dawn"
NAMES = ["DF-RISE", "DF-CAM", "LIME", "random", "relevance", "attention", "gradients", METHOD, *"abcd"]
GAMES = ("deletion", "insertion")


def band(game: str, level: float, points: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A curve that is distinguished from others by its level, with a band that is wider above than below."""
    mean = np.linspace(0, 1, points) ** level
    mean = mean if game == "deletion" else 1 - mean
    return mean, mean - 0.1 * level, mean + 0.2 * level


def bands(count: int) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    return {name: {game: band(game, 0.2 + 0.1 * k) for game in GAMES} for k, name in enumerate(NAMES[:count])}


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def heat(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width))


def picture(axis: Axes) -> np.ndarray:
    (image,) = axis.images
    return np.asarray(image.get_array())


def texts_of(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def corners(axis: Axes, place: int = 0) -> set[tuple[float, float]]:
    """The vertices of a filled area."""
    (path,) = axis.collections[place].get_paths()
    return {(float(x), float(y)) for x, y in np.asarray(path.vertices)}


def points(x: Sequence[float], *curves: np.ndarray) -> set[tuple[float, float]]:
    return {(float(a), float(b)) for curve in curves for a, b in zip(x, curve, strict=True)}


def test_each_game_has_a_panel_and_each_method_a_line_and_a_band() -> None:
    data = bands(3)
    figure = curves(data, "on 9 images")
    assert figure.get_suptitle() == "on 9 images"
    assert [axis.get_title() for axis in figure.axes] == ["deletion: higher is better", "insertion: lower is better"]
    assert [axis.get_xlabel() for axis in figure.axes] == ["share of pixels deleted", "share of pixels inserted"]
    assert figure.axes[0].get_ylabel().split() == ["distance", "to", "the", "unperturbed", "result", "(min–max)"]
    for game, axis in zip(GAMES, figure.axes, strict=True):
        assert len(axis.lines) == len(axis.collections) == 3
        for place, (method, line) in enumerate(zip(data, axis.lines, strict=True)):
            mean, low, high = data[method][game]
            assert line.get_label() == method
            np.testing.assert_array_equal(line.get_xdata(), [0, 0.25, 0.5, 0.75, 1])
            np.testing.assert_array_equal(line.get_ydata(), mean)
            assert corners(axis, place) == points([0, 0.25, 0.5, 0.75, 1], low, high)
            band_colour = axis.collections[place].get_facecolor()
            assert to_hex(np.asarray(band_colour)[0]) == to_hex(line.get_color()) == COLOURS[place].lower()
        # The widest band extends from 0 − 0.04 to 1 + 0.08, and no line or band is cut off.
        np.testing.assert_allclose(axis.get_ylim(), [-0.04 - 0.03, 1.08 + 0.03])


def test_the_legend_distinguishes_all_methods() -> None:
    figure = curves(bands(12))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == NAMES
    styles = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert len(set(styles)) == 12
    for axis in figure.axes:
        assert [(line.get_color(), line.get_linestyle()) for line in axis.lines] == styles


def test_a_game_may_be_missing() -> None:
    data = bands(2)
    del data["DF-RISE"]["insertion"]
    figure = curves(data)
    assert [[line.get_label() for line in axis.lines] for axis in figure.axes] == [["DF-RISE", "DF-CAM"], ["DF-CAM"]]
    assert figure.axes[1].lines[0].get_color() == figure.axes[0].lines[1].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DF-RISE", "DF-CAM"]
    (panel,) = curves({"DF-CAM": {"insertion": data["DF-CAM"]["insertion"]}}).axes
    assert panel.get_title().startswith("insertion")
    assert panel.get_ylabel()


def test_curves_may_differ_in_length_and_contain_gaps() -> None:
    gaps = tuple(np.full(3, np.nan) for _ in range(3))
    figure = curves(
        {"rise": {"deletion": band("deletion", 1, 3)}, "cam": {"insertion": gaps}, "a": bands(1)["DF-RISE"]}
    )
    figure.draw_without_rendering()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3, 5]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0, 0.5, 1])


def test_comparisons_have_one_row_per_image_and_one_column_per_method() -> None:
    images = [photo(4, 6, seed) for seed in (0, 1)]
    maps = {name: [heat(4, 6, 10 * k + seed) for seed in (0, 1)] for k, name in enumerate(("cam", METHOD))}
    titled = comparison(images, maps, ["a cat", PROMPT], column="predicted x0")
    assert titled.axes[0].get_title() == "predicted\nx0"
    figure = comparison(images, maps, ["a cat", PROMPT], "step 3")
    assert figure.get_suptitle() == "step 3"
    *cells, bar = figure.axes
    assert [axis.get_title() for axis in cells] == ["image", "cam", METHOD.replace(" ", "\n"), "", "", ""]
    assert [" ".join(axis.get_ylabel().split()) for axis in cells] == ["a cat", "", "", PROMPT, "", ""]
    assert [label.get_text() for label in bar.get_xticklabels()] == ["least", "most"]
    for row, image in enumerate(images):
        np.testing.assert_array_equal(picture(cells[3 * row]), image)
        for column, maps_of in enumerate(maps.values(), start=1):
            np.testing.assert_array_equal(picture(cells[3 * row + column]), overlay(image, maps_of[row]))


def test_ablations_have_one_row_per_label_with_map_and_curves() -> None:
    image, data = photo(8, 8), {
        "cosine": (heat(8, 8), np.array([0, 1, 1.0]), np.array([1, 0.5, 0.0])),
        METHOD: (heat(8, 8, 1), np.array([0, 0.1, 0.2, 0.3, 1]), np.array([1, 0.8, 0.8, 0.8, 0])),
    }  # fmt: skip
    figure = ablation(image, data, PROMPT)
    assert figure.get_suptitle() == PROMPT
    rows = np.array(figure.axes).reshape(2, 3)
    assert [" ".join(axis.get_ylabel().split()) for axis in rows[:, 0]] == ["cosine", METHOD]
    assert [axis.get_title().split(":")[0] for axis in rows[0]] == ["heat map", "deletion", "insertion"]
    assert [axis.get_title().split("\n")[-1] for axis in rows[0, 1:]] == ["higher is better", "lower is better"]
    assert [axis.get_xlabel().split()[-1] for axis in rows[1, 1:]] == ["deleted", "inserted"]
    # By the trapezoid rule: (0/2 + 1 + 1/2)/2, (1/2 + 0.5 + 0/2)/2, (0.6 + 1/2)/4 and (1/2 + 2.4)/4.
    assert [texts_of(axis) for axis in rows[:, 1:].flat] == [["AUC 0.75"], ["AUC 0.50"], ["AUC 0.28"], ["AUC 0.72"]]
    for row, (saliency, *games) in zip(rows, data.values(), strict=True):
        np.testing.assert_array_equal(picture(row[0]), overlay(image, saliency))
        for axis, curve in zip(row[1:], games, strict=True):
            x = [0, 0.5, 1] if len(curve) == 3 else [0, 0.25, 0.5, 0.75, 1]
            (line,) = axis.lines
            np.testing.assert_array_equal(line.get_xdata(), x)
            np.testing.assert_array_equal(line.get_ydata(), curve)
            assert corners(axis) == points(x, curve, 0 * curve)
            assert (axis.get_xlim(), axis.get_ylim()) == ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("curve", "corner"),
    [
        ([0, 0.7, 0.8, 0.9, 1], ("right", "bottom")),
        ([1, 0.3, 0.2, 0.1, 0], ("right", "top")),
        ([0, 0.1, 0.2, 0.3, 1], ("left", "top")),
        ([1, 0.9, 0.8, 0.7, 0], ("left", "bottom")),
    ],
)
def test_the_area_is_written_away_from_the_curve(curve: list[float], corner: tuple[str, str]) -> None:
    _, panel, _ = ablation(photo(4, 4), {"a": (heat(4, 4), np.array(curve), np.array(curve))}).axes
    (text,) = panel.texts
    assert (text.get_ha(), text.get_va()) == corner
    box = panel.transData.inverted().transform_bbox(text.get_window_extent())
    text_span = np.linspace(box.x0, box.x1)
    curve_under_text = np.interp(text_span, np.linspace(0, 1, 5), curve)
    assert (curve_under_text > box.y1).all() or (curve_under_text < box.y0).all()


@pytest.mark.slow
def test_missing_maps_and_curves_are_marked_as_not_computed() -> None:
    image, undefined = photo(6, 9), np.full(4, np.nan)
    falling, overflowed = np.linspace(1, 0, 4), np.array([0, np.inf, 1, 1])
    partial, unfinished = heat(6, 9), np.full((6, 9), np.nan, np.float32)
    partial[0, 0] = np.nan
    figure = ablation(image, {"FID": (partial, undefined, falling), "cos": (unfinished, overflowed, undefined)})
    rows = np.array(figure.axes).reshape(2, 3)
    placeholder = [["not\ncomputed"]]
    assert [texts_of(axis) for axis in rows[0]] == [[], *placeholder, ["AUC 0.50"]]
    assert [texts_of(axis) for axis in rows[1]] == placeholder * 3
    assert [len(axis.images) + len(axis.lines) + len(axis.collections) for axis in rows[1]] == [0, 0, 0]
    # The layout is kept: a missing map has the size of a picture, and missing curves have their axes.
    assert rows[1, 0].get_ylabel() == "cos"
    figure.draw_without_rendering()
    np.testing.assert_allclose(rows[1, 0].get_window_extent().size, rows[0, 0].get_window_extent().size)
    assert rows[1, 1].get_ylim() == (0, 1)
    cells = comparison([image], {"rise": [partial], "lime": [unfinished]}, ["a cat"]).axes
    assert [texts_of(axis) for axis in cells[:3]] == [[], [], *placeholder]
    assert not cells[2].images


def test_values_outside_0_to_1_are_not_clipped() -> None:
    rows = {"a": (heat(4, 4), np.array([0, 1.5]), np.array([1, 0.0])), "b": (heat(4, 4), *2 * [np.array([-0.5, 1])])}
    panels = [axis for axis in ablation(photo(4, 4), rows).axes if axis.lines]
    assert [axis.get_ylim() for axis in panels] == [(-0.5, 1.5)] * 4


@pytest.mark.parametrize(
    ("message", "draw"),
    [
        ("got no method: pass", lambda: curves({})),
        ("got no game for 'cam', expected deletion or insertion: leave", lambda: curves({**bands(1), "cam": {}})),
        (
            "got the game 'erase' for 'cam', expected deletion or insertion",
            lambda: curves({**bands(1), "cam": {"erase": band("deletion", 1)}}),
        ),
        (
            "the insertion curve of 'cam' has 1 points, expected two or more",
            lambda: curves({**bands(1), "cam": {"insertion": band("insertion", 1, 1)}}),
        ),
        ("got 0 images and 1 methods: pass at least one", lambda: comparison([], {"cam": []}, [])),
        ("got 1 images and 0 methods: pass at least one", lambda: comparison([photo(4, 4)], {}, ["a cat"])),
        (
            "got 1 maps of 'cam', expected 2: pass one for each image",
            lambda: comparison([photo(4, 4)] * 2, {"a": [heat(4, 4)] * 2, "cam": [heat(4, 4)]}, ["a cat", "a dog"]),
        ),
        (
            "got 2 prompts, expected 1: pass one for each image",
            lambda: comparison([photo(4, 4)], {"cam": [heat(4, 4)]}, ["a cat", "a dog"]),
        ),
        ("got no row: pass at least one label", lambda: ablation(photo(4, 4), {})),
        (
            "the deletion curve of 'FID' has 0 points, expected two or more",
            lambda: ablation(photo(4, 4), {"FID": (heat(4, 4), np.zeros(0), np.zeros(0))}),
        ),
    ],
)
def test_drawing_errors_name_the_cause(message: str, draw: Callable[[], Figure]) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def comparison_of(
    methods: int, images: int, size: tuple[int, int], prompts: Sequence[str] = ("a red circle", "a cat")
) -> Any:
    maps = {name: [heat(*size)] * images for name in NAMES[:methods]}
    return comparison([photo(*size)] * images, maps, [prompts[k % len(prompts)] for k in range(images)])


def ablation_of(labels: Sequence[str], size: tuple[int, int], title: str = "") -> Figure:
    return ablation(photo(*size), {name: (heat(*size), *(band(g, 0.5)[0] for g in GAMES)) for name in labels}, title)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("width", "draw"),
    [
        (3.25, lambda: curves(bands(1))),
        (3.25, lambda: curves(bands(12), LONG)),
        (3.25, lambda: curves({name: {"deletion": band("deletion", 1)} for name in ("_a", METHOD, LONG[:50])}, PROMPT)),
        (3.25, lambda: comparison_of(1, 1, (64, 64))),
        (3.25, lambda: comparison_of(4, 3, (64, 64), [LONG, PROMPT])),
        (6.9, lambda: comparison_of(12, 8, (64, 64))),
        (6.9, lambda: comparison_of(4, 2, (64, 128), [LONG])),
        (3.25, lambda: comparison_of(3, 2, (96, 64), ["", "unbreakable" * 5])),
        (3.25, lambda: ablation_of(["DF-RISE"], (64, 64))),
        (3.25, lambda: ablation_of(NAMES[:8], (64, 64), LONG)),
        (3.25, lambda: ablation_of(["cosine", "structure times luminance times contrast"], (64, 128))),
        (3.25, lambda: ablation_of(["unbreakable" * 5, "FID"], (96, 64), PROMPT)),
    ],
)
def test_texts_fit_do_not_overlap_and_are_readable(width: float, draw: Callable[[], Figure]) -> None:
    figure = draw()
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = {text: text.get_window_extent() for text in texts}
    for text, box in boxes.items():
        assert min(box.x0, box.y0) > -1, text
        assert (np.array(box.max) < np.array(figure.bbox.size) + 1).all(), text
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, down) < 1, (one, other)
    assert min(text.get_fontsize() for text in boxes) * width / figure.get_figwidth() >= 6
    for axis in figure.axes:
        if axis.images:
            box, shape = axis.get_window_extent(), picture(axis).shape
            assert box.height / box.width == pytest.approx(shape[0] / shape[1])
