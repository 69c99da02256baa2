"""What figures show: pictures, maps, lines, labels, and the layout of their texts."""

import dataclasses
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.ndimage import map_coordinates
from test_result import make_result

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, figures
from dfengine.explain import hot
from dfengine.figures import overlay, save, selection, strip
from dfengine.figures.panels import COLOUR_MAP, ERROR_MAP
from dfengine.result import COMBINED, Result, heatmap
from dfengine.tokens import Tokens, content_words, word_spans

MAPS = np.random.default_rng(0).normal(size=(30, 2, 3)).astype(np.float32)
#: Twenty words.
LONG = "an astronaut in a shining silver suit riding a galloping brown horse on Mars under two bright moons at dawn"
#: Stable Diffusion 1.5's layers, with the side of each one's map.
LAYERS: dict[str, int] = {
    **{f"down_blocks.{n}.{part}": 64 >> n for n in range(4) for part in ("resnets.0", "attentions.0")},
    **dict.fromkeys(("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"), 8),
    **{f"up_blocks.{n}.{part}": 8 << n for n in range(4) for part in ("resnets.2", "attentions.2")},
}


def random_result(prompt: str, steps: int = 5, size: tuple[int, int] = (8, 12), **changes: Any) -> Result:
    """A result with random values for everything that can be drawn. Each word of the prompt is one token."""
    random = np.random.default_rng(1)
    spans = tuple(word_spans(prompt))
    tokens = tuple(prompt[first:last] for first, last in spans)

    def maps(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    layers = {name: maps(steps, side, side) for name, side in LAYERS.items()}
    make_result = Result(
        prompt=prompt,
        seed=0,
        model="shapes",
        image=random.integers(256, size=(*size, 3), dtype=np.uint8),
        timesteps=np.arange(steps)[::-1] * 10,
        signal=np.linspace(0.1, 0.9, steps, dtype=np.float32),
        noise=np.linspace(0.9, 0.1, steps, dtype=np.float32),
        latents=maps(steps, 1, 2, 3),
        epsilon=maps(steps, 1, 2, 3),
        previews=random.integers(256, size=(steps, *size, 3), dtype=np.uint8),
        maps={
            "rise": maps(steps, 2, 3),
            "relevance": maps(steps, 2, 3),
            "cam": {COMBINED: maps(steps, 2, 3), **layers},
            "attention": maps(steps, 2, 3),
        },
        scores={"rise": maps(steps, 7)},
        tokens=Tokens(prompt, ("<s>", *tokens, "</s>"), ((0, 0), *spans, (0, 0))),
        relevance=random.random(size=(len(tokens) + 2, steps)).astype(np.float32),
        words=tokens,
        word_maps=maps(len(tokens), steps, 2, 3),
        settings={"rise": Rise(), "relevance": Relevance(), "cam": Cam(), "attention": Attention()},
        labels={"rise": "DF-RISE", "cam": "DF-CAM"},
        forms={"rise": "saliency", "relevance": "tokens", "cam": "layers", "attention": "words"},
        hots={one.name: hot(one) for one in (Rise(), Relevance(), Cam(), Attention())},
    )
    return dataclasses.replace(make_result, **changes)


def labels(figure: Figure) -> list[str]:
    """The labels of the rows."""
    return [axis.get_ylabel() for axis in figure.axes if axis.images and axis.get_ylabel()]


def titles(figure: Figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def pictures(figure: Figure) -> list[np.ndarray]:
    """All pictures, row by row, without the colour bar."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def colour_bars(figure: Figure) -> list[tuple[str, tuple[float, float], dict[str, float]]]:
    """The colour map, the limits and the ticks (label to value) of each colour bar."""
    bars = []
    for axis in figure.axes:
        for colours in (mesh for mesh in axis.collections if isinstance(mesh, QuadMesh)):
            ticks = {
                text.get_text(): float(place)
                for side, texts in (
                    (axis.get_xticks(), axis.get_xticklabels()),
                    (axis.get_yticks(), axis.get_yticklabels()),
                )
                for place, text in zip(side, texts, strict=True)
            }
            bars.append((colours.get_cmap().name, colours.get_clim(), ticks))
    return bars


#: The colour bar of heat maps.
MAPS_BAR = (COLOUR_MAP, (0, 1), {"least": 0, "most": 1})


def curves(figure: Figure) -> Axes:
    return next(axis for axis in figure.axes if axis.get_xlabel() == "step")


def lines(figure: Figure) -> dict[str, np.ndarray]:
    named = [line for line in curves(figure).lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): np.asarray(line.get_ydata()) for line in named}


def texts(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def check_texts(figure: Figure) -> None:
    """Assert that all texts are inside the figure and that none overlap."""
    figure.draw_without_rendering()
    boxes = {text: text.get_window_extent() for text in texts(figure)}
    width, height = figure.bbox.size
    for text, box in boxes.items():
        assert min(box.x0, box.y0) > -1, text
        assert (box.x1, box.y1) < (width + 1, height + 1), text
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(across, down) < 1, (one, other)


def test_steps_are_spread_from_first_to_last() -> None:
    assert selection.evenly_spaced(30) == [0, 6, 12, 17, 23, 29]
    assert selection.evenly_spaced(3) == [0, 1, 2]
    assert selection.evenly_spaced(1) == [0]


def test_a_strip_shows_prompt_model_seed_step_and_t() -> None:
    figure = strip(make_result(MAPS), steps=[0, 29])
    assert figure.get_suptitle() == "“a red circle”  ·  shapes, seed 0"
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["image", "step 0, t = 29", "step 29, t = 0"]


def test_a_strip_shows_the_image_and_mean_map_before_each_step() -> None:
    result = random_result("a cat")
    previews, heatmaps = np.asarray(result.previews), {step: result.heatmap("rise", step) for step in (3, 1)}
    expected = [result.image, previews[3], previews[1], overlay(result.image, (heatmaps[3] + heatmaps[1]) / 2)]
    expected += [overlay(previews[step], heatmaps[step]) for step in heatmaps]
    for actual, picture in zip(pictures(strip(result, steps=[3, 1])), expected, strict=True):
        np.testing.assert_allclose(actual, picture, atol=1e-6)


def test_heat_maps_are_overlaid_on_a_grey_picture() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 255
    heat = np.array([[0.0, 1.0], [0.5, 0.0]])
    actual = overlay(image, heat)
    colour = colormaps[COLOUR_MAP]
    np.testing.assert_allclose(actual[0, 0], 0.4 + 0.6 * np.array(colour(0.0)[:3]), atol=1e-6)
    np.testing.assert_allclose(actual[0, 1], 0.6 * np.array(colour(1.0)[:3]), atol=1e-6)


@pytest.mark.parametrize("name", ["strip.png", "strip.pdf", "strip.svg"])
def test_the_suffix_selects_the_file_format(tmp_path: Path, name: str) -> None:
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    path = save(strip(make_result(MAPS), steps=[0]), tmp_path / name)
    assert path.read_bytes().startswith(heads[path.suffix])


def test_an_unknown_step_is_named() -> None:
    with pytest.raises(ValueError, match="step 30 is outside"):
        strip(make_result(MAPS), steps=[30])


def test_a_negative_step_is_labelled_by_its_index() -> None:
    assert titles(strip(make_result(MAPS), steps=[-1]))[1] == "step 29, t = 0"


def test_a_long_prompt_is_wrapped() -> None:
    figure = strip(random_result(LONG), steps=[0, 1, 2])
    *prompt, details = figure.get_suptitle().splitlines()
    assert " ".join(prompt) == f"“{LONG}”"
    assert len(prompt) == 2
    assert details == "shapes, seed 0"


@pytest.mark.slow
def test_standard_errors_are_drawn_relative_to_the_range_of_the_map() -> None:
    maps, errors = np.zeros((2, 2, 2, 3), np.float32)
    maps[0, 0, 0], maps[0, 1, 1] = 2, -2  # the range is 4 at the first step; the second map is constant
    errors[0] = [[1, 0.4, 0], [0.2, np.inf, 2]]
    result = dataclasses.replace(
        random_result("a cat", steps=2, size=(2, 3)), maps={"rise": maps}, errors={"rise": errors}
    )
    figure = strip(result, steps=[0, 1])
    assert labels(figure) == ["predicted $x_0$", "DF-RISE,\n7 masks", "standard error,\nshare of range"]
    share, undefined = (np.ma.filled(axis.images[0].get_array(), np.nan) for axis in error_axes(figure))
    np.testing.assert_allclose(share, [[0.25, 0.1, 0], [0.05, np.nan, 0.5]], rtol=1e-6)
    assert np.isnan(undefined).all()
    images = [axis.images[0] for axis in error_axes(figure)]
    assert [(row.get_cmap().name, row.get_clim()) for row in images] == [(ERROR_MAP, (0, 0.5))] * 2
    assert colour_bars(figure) == [MAPS_BAR, (ERROR_MAP, (0, 0.5), {"0": 0, "0.5": 0.5})]
    assert ERROR_MAP != COLOUR_MAP


@pytest.mark.parametrize("method", ["rise", "cam", "relevance", "attention"])
def test_the_colour_bar_matches_the_colours_of_the_maps(method: str) -> None:
    assert colour_bars(figures.draw(random_result("a red cat"), method, [0])) == [MAPS_BAR]


def test_methods_without_errors_have_no_error_row() -> None:
    result = random_result("a cat", errors={"lime": MAPS[:5]})
    assert labels(strip(result, steps=[0])) == ["predicted $x_0$", "DF-RISE,\n7 masks"]
    constant = dataclasses.replace(result, maps={"rise": np.ones((5, 2, 3), np.float32)}, errors={"rise": MAPS[:5]})
    assert labels(strip(constant, steps=[0])) == ["predicted $x_0$", "DF-RISE,\n7 masks"]


def test_errors_are_drawn_at_the_size_of_the_image() -> None:
    """Errors are interpolated bilinearly, like heat maps."""
    result = random_result("a cat", errors={"rise": np.abs(MAPS[:5])})
    (share,) = (np.asarray(axis.images[0].get_array()) for axis in error_axes(strip(result, steps=[3])))
    error, spread = np.abs(MAPS[3]), np.ptp(result.maps["rise"][3])
    rows, columns = np.clip((np.arange(8) + 0.5) / 4 - 0.5, 0, 1), np.clip((np.arange(12) + 0.5) / 4 - 0.5, 0, 2)
    expected = map_coordinates(error / spread, np.meshgrid(rows, columns, indexing="ij"), order=1)
    np.testing.assert_allclose(share, expected, rtol=1e-4, atol=1e-6)


def error_axes(figure: Figure) -> list[Axes]:
    """The axes that show numbers instead of RGB pictures."""
    return [axis for axis in figure.axes if axis.images and np.ndim(axis.images[0].get_array()) == 2]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 6, 12])
@pytest.mark.parametrize("size", [(64, 64), (48, 84), (96, 64)])
def test_a_strip_is_readable_across_a_page(steps: int, size: tuple[int, int]) -> None:
    result = random_result(LONG, steps=12, size=size, errors={"rise": np.ones((12, 2, 3), np.float32)})
    result = dataclasses.replace(result, timesteps=np.arange(12)[::-1] * 90)
    figure = strip(result, steps=range(steps))
    check_texts(figure)
    assert min(text.get_fontsize() for text in texts(figure)) * 7.2 / max(figure.get_figwidth(), 7.2) >= 5.5


def test_layers_are_rows_and_steps_columns() -> None:
    result = random_result("a cat", size=(12, 8))
    figure = figures.layers(result, steps=[3, 0], names=["mid_block.resnets.1", "down_blocks.3.resnets.0"])
    assert titles(figure) == ["step 3\nt = 10", "step 0\nt = 40"]
    assert figure.get_suptitle() == "“a cat”  ·  DF-CAM, shapes, seed 0"
    assert labels(figure) == [
        "predicted $x_0$",
        "combined,\n2×3",
        "mid_block.\nresnets.1,\n8×8",
        "down_blocks.3.\nresnets.0,\n8×8",
    ]
    previews = np.asarray(result.previews)
    expected = [previews[3], previews[0]]
    for name in (COMBINED, "mid_block.resnets.1", "down_blocks.3.resnets.0"):
        expected += [overlay(previews[step], result.heatmap("cam", step, name)) for step in (3, 0)]
    for actual, picture in zip(pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(actual, picture)


def test_without_previews_maps_are_overlaid_on_the_image() -> None:
    result = random_result("a cat", previews=None)
    figure = figures.layers(result, steps=[2], names=[])
    assert labels(figure) == ["image", "combined,\n2×3"]
    image, actual = pictures(figure)
    np.testing.assert_array_equal(image, result.image)
    np.testing.assert_array_equal(actual, overlay(result.image, result.heatmap("cam", 2)))


@pytest.mark.slow
def test_five_of_many_layers_are_selected_from_first_to_last_stage() -> None:
    maps = {name: np.empty((1, side, side)) for name, side in LAYERS.items()}
    assert selection.main_layers({COMBINED: np.empty((1, 64, 64)), **maps}) == [
        "down_blocks.0.attentions.0",
        "down_blocks.2.attentions.0",
        "mid_block.resnets.1",
        "up_blocks.1.attentions.2",
        "up_blocks.3.attentions.2",
    ]
    # Consecutive layers of one resolution are one stage, which leaves five: 16, 8, 4, 8, 16.
    sides = (
        {f"down_blocks.{n}": 16 >> n for n in range(3)}
        | {"mid_block": 4}
        | {f"up_blocks.{n}": 4 << n for n in (0, 1, 2)}
    )
    maps = {f"{block}.{part}.0": np.empty((1, n, n)) for block, n in sides.items() for part in ("resnets", "samplers")}
    blocks = ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2")
    assert selection.main_layers(maps) == [f"{block}.resnets.0" for block in blocks]
    samplers = {name: values for name, values in maps.items() if "samplers" in name}
    assert selection.main_layers(samplers) == [f"{block}.samplers.0" for block in blocks]
    assert selection.main_layers({COMBINED: maps["mid_block.resnets.0"], "a": maps["mid_block.resnets.0"]}) == ["a"]
    assert len(labels(figures.layers(random_result("a cat")))) == 7


#: "cat" has two tokens; the start and end tokens do not count. Step 1 is constant and step 2 is not finished.
CAT = Tokens("a red cat", ("<s>", "a", "red", "c", "at", "</s>"), ((0, 0), (0, 1), (2, 5), (6, 7), (7, 9), (0, 0)))
RELEVANCE = np.array(
    [
        [99, 9, np.nan, 99],
        [0, 5, np.nan, 1],
        [1, 5, np.nan, 9],
        [2, 5, np.nan, 1],
        [4, 5, np.nan, 5],
        [50, 0, np.nan, 0],
    ],
    np.float32,
)


def test_lines_of_concepts_are_min_max_scaled_over_all_tokens_and_averaged() -> None:
    result = random_result("a red cat", steps=4, tokens=CAT, relevance=RELEVANCE)
    scaled = figures.concept_lines(result)
    assert list(scaled) == ["red", "cat"]
    np.testing.assert_array_equal(scaled["red"], [0.25, 0, np.nan, 1])
    np.testing.assert_array_equal(scaled["cat"], [0.75, 0, np.nan, 0.25])
    phrase = figures.concept_lines(result, ["red cat", "a"])
    np.testing.assert_allclose(phrase["red cat"], [1.75 / 3, 0, np.nan, 1.5 / 3])
    np.testing.assert_array_equal(phrase["a"], [0, 0, np.nan, 0])


def test_drawn_lines_are_shares_of_the_highest_word_that_is_no_stop_word() -> None:
    """Each word's mean over its tokens, without "a": red 1, 5, 9 and cat 3, 5, 3."""
    result = random_result("a red cat", steps=4, tokens=CAT, relevance=RELEVANCE)
    figure = figures.relevance(result, steps=[0])
    assert list(lines(figure)) == ["red", "cat"]
    np.testing.assert_allclose(lines(figure)["red"], [1 / 3, 1, np.nan, 1])
    np.testing.assert_allclose(lines(figure)["cat"], [1, 1, np.nan, 1 / 3])
    np.testing.assert_array_equal(curves(figure).lines[0].get_xdata(), [0, 1, 2, 3])
    assert curves(figure).get_ylabel() == "relevance, share of\nthe highest word"
    phrase = figures.relevance(result, ["red cat", "a"], steps=[0])
    np.testing.assert_allclose(lines(phrase)["red cat"], [7 / 9, 1, np.nan, 5 / 9])
    np.testing.assert_allclose(lines(phrase)["a"], [0, 1, np.nan, 1 / 9])


CAPTIONS = {
    "rise": "the predicted clean latent here keeps more of its structure with this place kept than with it hidden.",
    "relevance": "here the prompt's words bear on the prediction, by attention times its gradient.",
    "cam": "the layers' features here raise the sum of the predicted noise.",
    "attention": "the network looks the prompt's words up here, which alone does not show that they change anything.",
}


def caption(figure: Figure) -> str:
    """The text below the maps, in one line."""
    (text,) = [text.get_text() for text in texts(figure) if text.get_text().startswith("Each map")]
    return " ".join(text.split())


@pytest.mark.parametrize("method", CAPTIONS)
def test_a_caption_says_how_maps_are_scaled_and_what_is_hot(method: str) -> None:
    result = random_result("a red cat")
    assert caption(figures.draw(result, method, [0])) == f"Each map has its own range. Hot: {CAPTIONS[method]}"
    unknown = dataclasses.replace(result, hots={})
    assert caption(figures.draw(unknown, method, [0])) == "Each map has its own range."


@pytest.mark.parametrize("method", ["rise", "cam"])
def test_a_map_that_is_the_same_everywhere_is_grey_and_says_so(method: str) -> None:
    result = random_result("a red cat")
    maps = np.asarray(result.saliency(method)).copy()
    maps[3] = 0
    blank = {"rise": maps} if method == "rise" else {"cam": result.maps["cam"] | {COMBINED: maps}}
    result = dataclasses.replace(result, maps=result.maps | blank)
    figure = figures.draw(result, method, [3, 1], **({} if method == "rise" else {"rows": []}))
    assert [text.get_text() for text in texts(figure)].count("nothing\nhere") == 1
    (axis,) = [axis for axis in figure.axes if any(text.get_text() == "nothing\nhere" for text in axis.texts)]
    grey = np.asarray(result.previews)[3] / 255 @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(axis.images[0].get_array(), np.repeat(grey[..., None], 3, axis=2))
    check_texts(figure)


def test_a_line_reaches_1_where_a_stop_word_has_the_most_relevance() -> None:
    level = np.array([[9, 8, 2, 1, 9]], np.float32).T.repeat(5, axis=1)  # <s>, a, red, cat, </s>
    drawn = lines(figures.relevance(random_result("a red cat", relevance=level), steps=[0]))
    np.testing.assert_array_equal(drawn["red"], np.ones(5))
    np.testing.assert_array_equal(drawn["cat"], np.full(5, 0.5))
    nothing = figures.relevance(random_result("a red cat", relevance=0 * level), steps=[0])
    np.testing.assert_array_equal(lines(nothing)["red"], np.zeros(5))


def test_a_step_that_overflowed_is_a_gap() -> None:
    overflowed = RELEVANCE.copy()
    overflowed[2, 3] = np.inf
    result = random_result("a red cat", steps=4, tokens=CAT, relevance=overflowed)
    np.testing.assert_array_equal(figures.concept_lines(result)["cat"], [0.75, 0, np.nan, np.nan])


def test_selected_steps_are_marked_above_their_maps() -> None:
    result = random_result("a red cat")
    figure = figures.relevance(result, steps=[1, -1])
    assert titles(figure) == ["step 1\nt = 30", "step 4\nt = 0"]
    marks = [line.get_xdata()[0] for line in curves(figure).lines if line.get_color() == "0.5"]
    assert marks == [1, 4]
    assert [text.get_text() for text in curves(figure).texts] == [" red", " cat", "1", "4"]
    assert curves(figure).get_xticks().tolist() == [0, 1, 2, 3, 4]
    assert [tick.get_text().strip() for tick in curves(figure).get_xticklabels()] == [
        "0\nt = 40",
        "1",
        "2",
        "3",
        "4\nt = 0",
    ]
    for actual, step in zip(pictures(figure)[2:], (1, 4), strict=True):
        np.testing.assert_array_equal(
            actual, overlay(np.asarray(result.previews)[step], result.heatmap("relevance", step))
        )


@pytest.mark.parametrize("methods", [["rise", "relevance", "cam"], ["attention", "relevance"], ["relevance"]])
def test_the_maps_below_the_lines_are_those_of_relevance(methods: list[str]) -> None:
    result = random_result("a red cat")
    result = dataclasses.replace(result, maps={name: result.maps[name] for name in methods})
    figure = figures.relevance(result, steps=[0])
    assert labels(figure) == ["predicted $x_0$", "relevance"]
    expected = overlay(np.asarray(result.previews)[0], result.heatmap("relevance", 0))
    np.testing.assert_array_equal(pictures(figure)[1], expected)
    with pytest.raises(ValueError, match="no maps of relevance"):
        figures.relevance(dataclasses.replace(result, maps={"rise": MAPS[:5]}))


def test_the_eight_most_relevant_concepts_are_drawn_in_prompt_order() -> None:
    prompt = "one two three four five six seven eight nine ten of the one"
    relevance = np.repeat(np.array([[0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 10, 0, 0, 9, 0]], np.float32).T, 5, axis=1)
    curves_by_word = lines(figures.relevance(random_result(prompt, relevance=relevance), steps=[0]))
    assert list(curves_by_word) == ["one", "three", "five", "six", "seven", "eight", "nine", "ten"]


def test_informative_steps_are_peaks_and_crossings() -> None:
    a = np.array([0.2, 0.9, 0.4, 0.3, 0.5, 0.6, 0.1, 0.1])
    b = np.array([0.1, 0.3, 0.6, 0.8, 0.4, 0.2, 0.2, 0.3])
    # They cross at 2, 4 and 6; the line with the lower mean does not count.
    assert selection.informative_steps({"low": np.full(8, 0.05), "a": a, "b": b}) == [1, 2, 3, 6]
    # The remaining places go to the step farthest from those selected: from 2 that is 8, then 5, then 0.
    assert selection.informative_steps({"a": np.eye(9)[2]}) == [0, 2, 5, 8]
    unfinished = np.array([0.1, 0.2, 0.1, np.nan, np.nan])
    assert selection.informative_steps({"a": unfinished, "b": unfinished / 2}) == [0, 1, 2]
    # The peaks are 0 and 5. A gap hides the crossing, which counts at the step after it.
    a, b = np.array([9, 8, 7, np.nan, 1, 1, 1.0]), np.array([0, 1, 2, np.nan, 4, 5, 4.0])
    assert selection.informative_steps({"a": a, "b": b}) == [0, 2, 4, 5]
    result = random_result("a red cat", steps=4, tokens=CAT, relevance=RELEVANCE)
    assert titles(figures.relevance(result)) == ["step 0\nt = 30", "step 1\nt = 20", "step 3\nt = 0"]


def test_words_are_concepts_once_and_without_stop_words() -> None:
    assert content_words(["A", "red", "Red", "cat", "on", "the", "cat"]) == ["red", "cat"]
    assert content_words(["the", "of", "The"]) == ["the", "of"]
    assert content_words(["café", "Cafe\u0301"]) == ["café"]


def test_attention_has_one_row_per_word() -> None:
    result = random_result("a cat and a dog on a cat")
    figure = figures.attention(result, steps=[4, 1])
    assert labels(figure) == ["predicted $x_0$", "cat", "dog"]
    assert titles(figure) == ["step 4\nt = 0", "step 1\nt = 30"]
    previews = np.asarray(result.previews)
    expected = [previews[4], previews[1]]
    for word in ("cat", "dog"):
        expected += [overlay(previews[step], result.heatmap(word, step)) for step in (4, 1)]
    for actual, picture in zip(pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(actual, picture)
    assert labels(figures.attention(result, ["dog", "a", "dog"]))[1:] == ["dog", "a"]


@pytest.mark.slow
def test_the_words_with_the_most_attention_at_the_selected_steps_are_drawn() -> None:
    word_maps = np.zeros((8, 5, 2, 3), np.float32)
    word_maps[:, 2] = np.array([3, 9, 2, 8, 4, 7, 5, 6], np.float32)[:, None, None]
    result = random_result("one two three four five six seven eight", word_maps=word_maps)
    assert labels(figures.attention(result, steps=[2]))[1:] == ["two", "four", "five", "six", "seven", "eight"]


def test_a_word_is_named_in_any_normal_form() -> None:
    result = random_result("a cafe\u0301")
    figure = figures.attention(result, ["CAFÉ"], steps=[1])
    expected = overlay(np.asarray(result.previews)[1], heatmap(np.asarray(result.word_maps)[1, 1], (8, 12)))
    np.testing.assert_array_equal(pictures(figure)[1], expected)
    np.testing.assert_array_equal(result.heatmap("café", 1), result.heatmap("cafe\u0301", 1))


def test_a_word_with_the_name_of_a_method_has_its_own_map() -> None:
    result = random_result("the sun and its rise")
    actual = pictures(figures.attention(result, ["rise"], steps=[1]))[1]
    expected = heatmap(np.asarray(result.word_maps)[4, 1], (8, 12))
    np.testing.assert_array_equal(actual, overlay(np.asarray(result.previews)[1], expected))


@pytest.mark.slow
def test_a_method_is_drawn_in_its_own_form() -> None:
    result = random_result("a red cat")
    assert titles(figures.draw(result, "rise", [0]))[0] == "image"
    assert labels(figures.draw(result, "cam", [0]))[1] == "combined,\n2×3"
    assert list(lines(figures.draw(result, "relevance", [0]))) == ["red", "cat"]
    assert labels(figures.draw(result, "attention", [0]))[1:] == ["red", "cat"]
    assert [titles(figures.draw(result, method, [3]))[-1][:6] for method in ("cam", "relevance", "attention")] == [
        "step 3"
    ] * 3
    renamed = dataclasses.replace(result, maps={"mine": result.maps["rise"]}, forms={"mine": "words"})
    assert labels(figures.draw(renamed, "mine", [0]))[1:] == ["red", "cat"]


UNFINISHED = np.full((5, 2, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    ("message", "draw"),
    [
        ("no map 'cat': expected one of rise, relevance, cam, attention", lambda result: figures.draw(result, "cat")),
        ("no map 'lime'", lambda result: figures.layers(result, "lime")),
        ("'rise' have no layers", lambda result: figures.layers(result, "rise")),
        ("no layer 'mid'", lambda result: figures.layers(result, names=["mid"])),
        (r"step 5 is outside \[0, 4\]", lambda result: figures.layers(result, steps=[5])),
        (r"step -6 is outside \[0, 4\]", lambda result: figures.attention(result, steps=[-6])),
        (r"step 5 is outside \[0, 4\]", lambda result: figures.relevance(result, steps=[5])),
        ("'dog' is not in the prompt", lambda result: figures.relevance(result, ["dog"])),
        ("no map of the word 'dog': expected one of a, red, cat", lambda result: figures.attention(result, ["dog"])),
        ("no map of the word 'rise'", lambda result: figures.attention(result, ["rise"])),
        (
            "the result has no relevance: explain with",
            lambda result: figures.relevance(dataclasses.replace(result, tokens=None)),
        ),
        (
            "no maps of words: the prompt 'a red cat' has no words",
            lambda result: figures.attention(dataclasses.replace(result, words=())),
        ),
        (
            "no step's relevance is computed yet",
            lambda result: figures.relevance(
                dataclasses.replace(result, relevance=np.full((5, 5), np.nan, np.float32))
            ),
        ),
        (
            "step 0 of 'cam' is not computed yet",
            lambda result: figures.layers(dataclasses.replace(result, maps={"cam": {COMBINED: UNFINISHED}})),
        ),
        (
            "step 0 of 'red' is not computed yet",
            lambda result: figures.attention(dataclasses.replace(result, word_maps=np.stack([UNFINISHED] * 3))),
        ),
    ],
)
def test_drawing_errors_name_the_cause(message: str, draw: Callable[[Result], Figure]) -> None:
    with pytest.raises(ValueError, match=message):
        draw(random_result("a red cat"))


def test_words_beyond_the_token_limit_have_no_line() -> None:
    tokens = Tokens("a red cat", ("<s>", "a", "red", "</s>"), ((0, 0), (0, 1), (2, 5), (0, 0)))
    result = random_result("a red cat", tokens=tokens, relevance=np.ones((4, 5), np.float32))
    assert list(figures.concept_lines(result)) == ["red"]
    with pytest.raises(ValueError, match="'cat' is beyond the tokens"):
        figures.relevance(result, ["cat"])
    with pytest.raises(ValueError, match="the prompt '' has no words"):
        figures.relevance(random_result(""))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (48, 84), (96, 64)])
@pytest.mark.parametrize("form", [figures.layers, figures.relevance, figures.attention])
def test_texts_fit_do_not_overlap_and_are_readable_in_a_column(
    form: Callable[..., Figure], size: tuple[int, int]
) -> None:
    level = np.random.default_rng(2).random((22, 30)).astype(np.float32) / 20
    level[10, 3:] = 1  # the labels of all the other words would coincide
    figure = form(random_result(LONG, steps=30, size=size, relevance=level))
    check_texts(figure)
    assert min(text.get_fontsize() for text in texts(figure)) * 3.25 / figure.get_figwidth() >= 6


@pytest.mark.soak
def test_results_in_memory_and_from_a_file_are_drawn_identically(tiny_folder: Path, tmp_path: Path) -> None:
    explainers = [Rise(4), Cam(), Relevance(), Attention()]
    engine = Engine.from_pretrained(tiny_folder, device="cpu")
    result = engine.explain("a red circle on a gray background", explainers, num_steps=3, out=tmp_path / "run.h5")
    with dfengine.open(tmp_path / "run.h5") as run:
        for method in ("rise", "cam", "relevance", "attention"):
            memory, file = figures.draw(result, method), figures.draw(run[0], method)
            assert run[0].hot(method) == result.hot(method) == hot(result.settings[method])
            assert [text.get_text() for text in texts(file)] == [text.get_text() for text in texts(memory)]
            for one, other in zip(pictures(file), pictures(memory), strict=True):
                np.testing.assert_array_equal(one, other)
            if method == "relevance":
                assert lines(file).keys() == {"red", "circle", "gray", "background"}
                np.testing.assert_equal(lines(file), lines(memory))


@pytest.mark.grid
@pytest.mark.parametrize("form", ["saliency", "layers", "tokens", "words", "a form of the future"])
def test_the_declared_form_alone_selects_the_figure(form: str) -> None:
    """The method may have any name. An unknown form is drawn like saliency."""
    result = random_result("a red cat")
    maps = result.maps["cam" if form == "layers" else "rise"]
    renamed = dataclasses.replace(result, maps={"mine": maps}, labels={"mine": "Mine"}, forms={"mine": form}, scores={})
    expected = {
        "layers": lambda: figures.layers(renamed, "mine", [1]),
        "tokens": lambda: figures.relevance(renamed, steps=[1]),
        "words": lambda: figures.attention(renamed, steps=[1]),
    }.get(form, lambda: strip(renamed, "mine", [1]))()
    figure = figures.draw(renamed, "mine", [1])
    assert [text.get_text() for text in texts(figure)] == [text.get_text() for text in texts(expected)]
    assert any("Mine" in text.get_text() for text in texts(figure))


@pytest.mark.slow
def test_rows_are_selected_by_name() -> None:
    result = random_result("a red cat")
    assert labels(figures.draw(result, "cam", [0], ["mid_block.resnets.1"]))[2:] == ["mid_block.\nresnets.1,\n8×8"]
    assert list(lines(figures.draw(result, "relevance", [0], ["cat"]))) == ["cat"]
    assert labels(figures.draw(result, "attention", [0], ["a"]))[1:] == ["a"]
    with pytest.raises(ValueError, match="the figure of 'rise' has no rows to choose: leave out cat"):
        figures.draw(result, "rise", [0], ["cat"])
