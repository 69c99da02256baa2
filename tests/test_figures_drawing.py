"""Which figures can be drawn from the data of results and files, their names, and how images are grouped."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from PIL import Image, ImageSequence
from store_example import PLAN, half, step, trajectory
from test_figures import LONG, MAPS_BAR, colour_bars, labels, lines, pictures, random_result, texts, titles

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, exponential_timesteps, figures, store
from dfengine.cli import main
from dfengine.figures import animation, overlay, schedules
from dfengine.result import Result
from dfengine.tokens import Tokens

METHODS = ["rise", "relevance", "cam", "attention"]
LISTS = {
    "uniform": [40, 30, 20, 10, 0],
    "early, γ = 60": exponential_timesteps(5, 60, "early"),
    "latter, γ = 0": exponential_timesteps(5, 0, "latter"),
}


def with_methods(result: Result, *methods: str, **changes: Any) -> Result:
    return dataclasses.replace(result, maps={name: result.maps[name] for name in methods}, **changes)


def unfinished(maps: np.ndarray, *finished: int) -> np.ndarray:
    """The maps with only these steps computed; the others are NaN."""
    return np.where(np.isin(np.arange(len(maps)), finished)[:, None, None], maps, np.float32(np.nan))


def sweep(prompts: Sequence[str] = ("a red cat",), seeds: Sequence[int] = (0, 1), names: Sequence[str] = tuple(LISTS)):
    """One result per prompt, schedule and seed, with relevance only. All images differ."""
    results = []
    for number, (prompt, name, seed) in enumerate(itertools.product(prompts, names, seeds)):
        image = np.full((8, 12, 3), number, np.uint8)
        one = random_result(prompt, seed=seed, image=image, timesteps=np.array(LISTS[name]))
        results.append(with_methods(one, "relevance"))
    return results


def draw_all(results: Any, **options: Any) -> dict[str, Figure]:
    return {one.name: one.figure for one in figures.draw_all(results, **options)}


def names(results: Sequence[Any], **options: Any) -> list[str]:
    return list(draw_all(results, **options))


def on_one_line(labels: Sequence[str]) -> list[str]:
    return [label.replace("\n", " ").replace("\u00a0", " ") for label in labels]


@pytest.mark.slow
def test_one_result_has_every_method_in_its_form_and_a_comparison() -> None:
    result = random_result("a red cat")
    plots = draw_all([result])
    assert list(plots) == [*METHODS, "comparison"]
    for method in METHODS:
        alone = figures.draw(result, method)
        assert (titles(plots[method]), labels(plots[method])) == (titles(alone), labels(alone))
    assert list(lines(plots["relevance"])) == ["red", "cat"]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (with_methods(random_result("a red cat"), "rise"), ["rise"]),
        (with_methods(random_result("a red cat")), []),
        (random_result(""), ["rise", "cam", "comparison"]),
        (random_result("a red cat", maps={"rise": unfinished(np.ones((5, 2, 3), np.float32))}), []),
        (with_methods(random_result("a red cat", relevance=np.full((5, 5), np.nan, np.float32)), "relevance"), []),
        (
            with_methods(random_result("a red cat"), "attention", word_maps=np.full((3, 5, 2, 3), np.nan, np.float32)),
            [],
        ),
    ],
)
def test_missing_data_is_not_drawn(result: Result, expected: list[str]) -> None:
    assert names([result]) == expected


@pytest.mark.slow
def test_only_the_finished_steps_of_a_method_are_drawn() -> None:
    result = random_result("a red cat")
    rise, cam = np.asarray(result.maps["rise"]), dict(result.maps["cam"])
    cam["mid_block.resnets.1"] = unfinished(cam["mid_block.resnets.1"], 0, 4)
    word_maps = np.stack([unfinished(word, 2) for word in np.asarray(result.word_maps)])
    result = dataclasses.replace(
        result, maps=result.maps | {"rise": unfinished(rise, 1, 3), "cam": cam}, word_maps=word_maps
    )
    plots = draw_all([result])
    assert titles(plots["rise"])[:3] == ["image", "step 1, t = 30", "step 3, t = 10"]
    assert titles(plots["cam"]) == ["step 0\nt = 40", "step 4\nt = 0"]
    assert titles(plots["attention"]) == ["step 2\nt = 20"]
    # The comparison has the steps at which most maps are finished.
    assert on_one_line(labels(plots["comparison"])) == ["step 1, t = 30", "step 3, t = 10"]


@pytest.mark.slow
def test_relevance_is_drawn_above_its_own_maps_of_finished_steps() -> None:
    result = random_result("a red cat", steps=6)
    maps = result.maps | {"relevance": unfinished(np.asarray(result.maps["relevance"]), 0, 3)}
    figure = draw_all([dataclasses.replace(result, maps=maps)], methods=["relevance"])["relevance"]
    assert labels(figure)[1] == "relevance"
    assert titles(figure) == ["step 0\nt = 50", "step 3\nt = 20"]
    maps = result.maps | {"relevance": unfinished(np.asarray(result.maps["relevance"]))}
    assert not draw_all([dataclasses.replace(result, maps=maps)], methods=["relevance"])


@pytest.mark.slow
def test_methods_and_steps_restrict_what_is_drawn() -> None:
    result = random_result("a red cat")
    rise = unfinished(np.asarray(result.maps["rise"]), 0, 4)
    result = dataclasses.replace(result, maps=result.maps | {"rise": rise})
    plots = draw_all([result], methods=["rise", "cam"], steps=[-1, 1])
    assert list(plots) == ["rise", "cam", "comparison"]
    assert titles(plots["rise"])[:2] == ["image", "step 4, t = 0"]
    assert titles(plots["cam"]) == ["step 4\nt = 0", "step 1\nt = 30"]
    assert names([result], steps=[2]) == [*METHODS[1:], "comparison"], "rise has not finished step 2"
    assert names([result], methods=["rise"], steps=[2]) == []


@pytest.mark.slow
def test_several_images_are_numbered_and_compared_in_rows() -> None:
    lists = {"a cat": [40, 30, 20, 10, 0], "a dog": [9, 7, 5, 3, 1]}
    results = [
        with_methods(random_result(prompt, seed=seed, timesteps=np.array(lists[prompt])), "rise", "cam")
        for seed, prompt in enumerate(lists)
    ]
    plots = draw_all(results)
    assert list(plots) == ["item-000-rise", "item-000-cam", "item-001-rise", "item-001-cam", "comparison"]
    selected = draw_all(results, methods=["rise", "cam"], steps=[0, 3])
    # The default step is the one at three quarters of the five.
    assert list(selected)[-2:] == ["comparison-step-000", "comparison-step-003"]
    compared = {2: plots["comparison"], 0: selected["comparison-step-000"], 3: selected["comparison-step-003"]}
    for index, figure in compared.items():
        assert figure.get_suptitle() == f"shapes, step {index}: one row per image"
        assert titles(figure) == ["image", "DF-RISE", "DF-CAM"]
        assert colour_bars(figure) == [MAPS_BAR]
        assert on_one_line(labels(figure)) == [
            f"a cat, seed 0, t = {lists['a cat'][index]}",
            f"a dog, seed 1, t = {lists['a dog'][index]}",
        ]
        expected = [
            [one.image, *(overlay(one.image, one.heatmap(name, index)) for name in one.maps)] for one in results
        ]
        for picture, expected_picture in zip(pictures(figure), itertools.chain(*expected), strict=True):
            np.testing.assert_array_equal(picture, expected_picture)


@pytest.mark.slow
def test_one_image_is_compared_by_step_and_missing_maps_are_marked() -> None:
    result = with_methods(random_result("a cat"), "rise", "cam")
    result = dataclasses.replace(result, maps=result.maps | {"rise": unfinished(np.asarray(result.maps["rise"]), 4)})
    figure = draw_all([result], steps=[0, 4])["comparison"]
    assert figure.get_suptitle().replace("\n", " ") == "“a cat”, shapes, seed 0: one row per step"
    assert on_one_line(labels(figure)) == ["step 0, t = 40", "step 4, t = 0"]
    previews = np.asarray(result.previews)
    expected = [previews[0], overlay(previews[0], result.heatmap("cam", 0)), previews[4]]
    expected += [overlay(previews[4], result.heatmap(method, 4)) for method in ("rise", "cam")]
    for actual, picture in zip(pictures(figure), expected, strict=True):
        np.testing.assert_array_equal(actual, picture)
    assert [text.get_text() for axis in figure.axes for text in axis.texts] == ["not\ncomputed"]


@pytest.mark.slow
def test_images_of_different_sizes_are_not_in_one_comparison() -> None:
    sizes = [(8, 12), (8, 12), (12, 8), (12, 8), (4, 4)]
    results = [with_methods(random_result("a cat", size=size), "rise", "attention") for size in sizes]
    assert [name for name in names(results) if "comparison" in name] == [
        "item-004-comparison",
        "comparison-0",
        "comparison-1",
    ]


@pytest.mark.slow
def test_only_the_first_or_the_selected_images_are_drawn() -> None:
    results = [with_methods(random_result("a cat", seed=seed), "rise") for seed in range(5)]
    with pytest.warns(UserWarning, match="drawing the first 2 of 5 images, leaving out 3"):
        assert names(results, limit=2) == ["item-000-rise", "item-001-rise"]
    assert names(results, limit=5) == [f"item-00{place}-rise" for place in range(5)]
    assert names(results, items=[3, -1, 3], limit=1) == ["item-003-rise", "item-004-rise"]
    with pytest.warns(UserWarning, match="leaving out 3"):
        plots = list(figures.draw_all(results, limit=2, steps=[1]))
    assert [(one.name, one.result, one.method, one.steps) for one in plots] == [
        ("item-000-rise", results[0], "rise", [1]),
        ("item-001-rise", results[1], "rise", [1]),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": [2]}, "there is no item 2: expected one of 0 to 1"),
        ({"items": [-3]}, "there is no item -3"),
        ({"methods": ["rise", "lime"]}, "no map 'lime': expected one of rise, relevance, cam, attention"),
        ({"steps": [0, 7]}, r"step 7 is outside \[0, 6\]"),
        ({"steps": [-8]}, r"step -8 is outside \[0, 6\]"),
    ],
)
def test_selecting_what_no_image_has_is_rejected_immediately(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.draw_all([random_result("a cat"), random_result("a cat", steps=7)], **options)


def line_extents(schedule: Axes) -> list[list[float]]:
    """The extent of the line under the time-steps of each schedule."""
    return [line.get_xdata().tolist() for line in schedule.lines if line.get_marker() != "|"]


@pytest.mark.soak
def test_images_of_one_prompt_under_several_schedules_are_side_by_side() -> None:
    results = sweep()
    plots = draw_all(results)
    assert list(plots)[-2:] == ["samples", "concepts"]
    samples = plots["samples"]
    *axes, schedule = samples.axes
    assert [axis.get_title() for axis in axes[:3]] == [*LISTS]
    assert [axis.get_ylabel() for axis in axes[::3]] == ["seed 0", "seed 1"]
    # Images are numbered by schedule, then by seed.
    assert [int(picture[0, 0, 0]) for picture in pictures(samples)] == [0, 2, 4, 1, 3, 5]
    marks = [line for line in schedule.lines if line.get_marker() == "|"]
    assert [line.get_xdata().tolist() for line in marks] == [*LISTS.values()]
    # The first schedule is at the top, and each has its name as tick label.
    assert [set(line.get_ydata()) for line in marks] == [{3}, {2}, {1}]
    heights = dict(zip((text.get_text() for text in schedule.get_yticklabels()), schedule.get_yticks(), strict=True))
    assert heights == dict(zip(LISTS, (3, 2, 1), strict=True))
    # The axis runs from noise to image, with a margin at both ends.
    assert schedule.get_xlim() == pytest.approx((1008.99, -9.99))
    assert line_extents(schedule) == [[0, 999]] * 3
    assert samples.get_suptitle() == "“a red cat”  ·  shapes"


def test_the_time_step_axis_extends_beyond_999() -> None:
    longer, *others = sweep(seeds=(0,))
    longer = dataclasses.replace(longer, timesteps=np.array([1200, 900, 600, 300, 0]))
    (group,) = schedules.groups([longer, *others])
    *_, schedule = group.samples().axes
    assert schedule.get_xlim() == pytest.approx((1212, -12))
    assert line_extents(schedule) == [[0, 1200]] * 3


@pytest.mark.slow
def test_groups_share_prompt_model_and_schedules() -> None:
    def grouped(results: Sequence[Any]) -> list[tuple[str, str, list[int], list[str]]]:
        return [(one.prompt, one.details, list(one.rows), list(one.timesteps)) for one in schedules.groups(results)]

    results = sweep(("a red cat", "a dog"), (0, 1, 2))
    all_schedules = [*LISTS]
    assert grouped(results) == [(prompt, "shapes", [0, 1, 2], all_schedules) for prompt in ("a red cat", "a dog")]
    # Seed 1 of the cat has no "latter" yet; seed 2 has one schedule only.
    partial = [one for number, one in enumerate(results[:9]) if number not in (5, 7, 8)]
    assert grouped(partial) == [
        ("a red cat", "shapes", [0], all_schedules),
        ("a red cat", "shapes", [1], all_schedules[:2]),
    ]
    other = [dataclasses.replace(one, model="sd15") for one in results[:3]]
    assert grouped(results[:3] + other) == []
    assert grouped(results[:4] + results[:4]) == [("a red cat", "shapes", [0], all_schedules[:2])]
    assert [name for name in names(results[:6], items=[0, 1]) if "item" not in name] == []
    both = sweep(("a red cat", "a dog"), (0,), all_schedules[:2])
    assert [name for name in names(both, methods=["relevance"]) if "item" not in name] == [
        "prompt-000-concepts",
        "prompt-001-concepts",
    ]


def test_schedules_with_the_same_name_are_distinguished() -> None:
    lists = [(40, 30, 20), (9, 6, 3, 0), tuple(exponential_timesteps(5, 7, "early")), (50, 40, 30), (900, 20, 1)]
    assert schedules.schedule_names(lists) == [
        "uniform, 3 steps (1)",
        "uniform, 4 steps",
        "early, γ = 7",
        "uniform, 3 steps (2)",
        "t = 900 … 1",
    ]


def test_guidance_and_negative_prompt_separate_groups_of_stored_images(tmp_path: Path) -> None:
    conditions = [("", 2.0), ("blurry", 2.0), ("", 7.5)]
    items = tuple(
        store.Item(f"k{number}", "a cat", negative, settings={"guidance": guidance, "timesteps": timesteps})
        for number, ((negative, guidance), timesteps) in enumerate(
            itertools.product(conditions, ([900, 500, 100], [3, 2, 1]))
        )
    )
    plan = dataclasses.replace(PLAN, items=items, layers=())
    with store.Writer.create(tmp_path / "run.h5", plan) as writer:
        for number, item in enumerate(items):
            writer.trajectory(number, **trajectory(plan, number) | {"timesteps": np.array(item.settings["timesteps"])})
        writer.close(publish=False)
    with store.open(tmp_path / "run.part.h5") as run:
        assert [one.details for one in schedules.groups(run)] == [
            "shapes, guidance 2",
            "shapes, guidance 2, negative prompt “blurry”",
            "shapes, guidance 7.5",
        ]


@pytest.mark.slow
def test_concepts_are_means_over_seeds_with_their_standard_error() -> None:
    """The relevance of "a" is 0 and that of "cat" is 4, so the min–max scaled value of "red" is its own over 4."""
    tokens = Tokens("a red cat", ("<s>", "a", "red", "cat", "</s>"), ((0, 0), (0, 1), (2, 5), (6, 9), (0, 0)))

    def relevance(*red: float) -> np.ndarray:
        return np.array([[9] * 3, [0] * 3, red, [4] * 3, [9] * 3], np.float32)

    red = {("uniform", 0): (1, 2, 3), ("uniform", 1): (3, 2, 1), ("early", 0): (4, 4, 0), ("early", 1): (0, 0, 0)}
    lists = {"uniform": [20, 10, 0], "early": exponential_timesteps(3, 60, "early")}
    results = [
        with_methods(
            random_result(
                "a red cat",
                steps=3,
                seed=seed,
                tokens=tokens,
                relevance=relevance(*values),
                timesteps=np.array(lists[name]),
            ),
            "relevance",
        )
        for (name, seed), values in red.items()
    ]
    figure = draw_all(results)["concepts"]
    uniform, early, bars = figure.axes
    assert [uniform.get_title(), early.get_title()] == ["uniform", "early, γ = 60"]
    np.testing.assert_allclose([line.get_ydata() for line in uniform.lines], [[0.5] * 3, [1] * 3])
    np.testing.assert_allclose([line.get_ydata() for line in early.lines], [[0.5, 0.5, 0], [1] * 3])
    assert [line.get_xdata().tolist() for line in uniform.lines] == [[0, 1, 2]] * 2
    for axis, (first, _, last) in ((uniform, lists["uniform"]), (early, lists["early"])):
        assert axis.get_xticks().tolist() == [0, 1, 2]
        assert [tick.get_text() for tick in axis.get_xticklabels()] == [
            f"step 0\nt = {first}",
            "1",
            f"step 2\nt = {last}",
        ]
    # The standard error s/√2 of 1/4 and 3/4 is 1/4; that of 0 and 1 is 1/2.
    ends = np.asarray(uniform.collections[0].get_paths()[0].vertices)
    assert {(float(x), round(float(y), 6)) for x, y in ends} == {(0, 0.25), (0, 0.75), (1, 0.5), (2, 0.25), (2, 0.75)}
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, [1.5, 3, 1, 3])
    # The sums are 1.5 and 1.5 for uniform, 2 and 0 for early: errors of 0 and 1.
    error_bars = [np.asarray(lines.get_segments())[:, :, 1] for lines in bars.collections]
    np.testing.assert_allclose(error_bars, [[[1.5, 1.5], [3, 3]], [[0, 2], [3, 3]]], atol=1e-6)
    (title,) = {part.get_suptitle() for part in figure.subfigs}
    assert title.replace("\n", "  ·  ") == "“a red cat”  ·  shapes, mean of 2 seeds (0, 1) ± standard error"
    single = draw_all([one for one in results if one.seed == 0])["concepts"]
    assert single.subfigs[0].get_suptitle() == "“a red cat”  ·  shapes, seed 0"
    assert [len(axis.collections) for axis in single.axes[:2]] == [0, 0]


def test_seeds_with_gaps_in_relevance_are_excluded_from_the_means() -> None:
    results = sweep()
    gap = np.asarray(results[3].relevance).copy()
    gap[:, 2] = np.nan
    results[3] = dataclasses.replace(results[3], relevance=gap)
    (group,) = schedules.groups(results)
    figure = group.concepts()
    assert figure is not None
    assert figure.subfigs[0].get_suptitle().endswith("seed 0")
    (rest,) = schedules.groups([one for one in results if one.seed == 1])
    assert rest.concepts() is None
    (group_without_tokens,) = schedules.groups([dataclasses.replace(one, tokens=None) for one in results])
    assert group_without_tokens.concepts() is None


@pytest.mark.slow
def test_figures_of_schedules_are_readable_across_a_page() -> None:
    (group,) = schedules.groups(sweep((LONG,)))
    for figure in (group.samples(), group.concepts()):
        assert figure is not None
        assert min(text.get_fontsize() for text in texts(figure)) * 7.2 / max(figure.get_figwidth(), 7.2) >= 5.5


def frames(path: Path) -> tuple[list[np.ndarray], list[int], int]:
    """The frames of a GIF, their durations in milliseconds, and the number of repetitions (0 for an endless loop)."""
    with Image.open(path) as image:
        pictures_of_frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]
        durations = []
        for number in range(len(pictures_of_frames)):
            image.seek(number)
            durations.append(image.info["duration"])
        return pictures_of_frames, durations, image.info["loop"]


def pixel_box(axis: Any, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The pixels of an axis in a picture of this shape, counted from the top."""
    x0, y0, x1, y1 = axis.get_window_extent().extents
    return slice(round(shape[0] - y1) - 1, round(shape[0] - y0) + 2), slice(round(x0) - 1, round(x1) + 2)


def mean_difference(rendered: np.ndarray, picture: np.ndarray) -> float:
    """The mean absolute difference between a picture in [0, 1] and its rendering in [0, 255], at its pixel centres."""
    rows, columns = (
        (np.arange(count) + 0.5) * side / count for count, side in zip(picture.shape, rendered.shape[:2], strict=False)
    )
    return float(np.abs(rendered[np.ix_(rows.astype(int), columns.astype(int))] - 255 * picture).mean())


def test_a_frame_shows_its_step_and_t(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read from the figure, which holds the texts and pictures of the last frame drawn."""
    result = random_result("a red cat", steps=12)
    figure, line, axes = layout = animation._layout(result, "cam")
    monkeypatch.setattr(animation, "_layout", lambda *_: layout)
    captions = []
    for index, _ in zip((0, 8, 11), animation._frames(result, "cam", [0, 8, 11]), strict=True):
        captions.append(line.get_text().replace("\u2007", "_"))
        background = np.asarray(result.previews)[index]
        np.testing.assert_array_equal(axes[0].images[0].get_array(), background)
        np.testing.assert_array_equal(axes[1].images[0].get_array(), overlay(background, result.heatmap("cam", index)))
    assert captions == ["step _0, t = 110", "step _8, t = _30", "step 11, t = __0"]
    assert titles(figure) == ["predicted $x_0$", "DF-CAM, combined"]
    assert colour_bars(figure) == [MAPS_BAR]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_animation_has_a_frame_per_finished_step(tmp_path: Path, method: str) -> None:
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [0, 0, 0]], np.uint8)
    result = random_result("a red cat", previews=np.broadcast_to(colours[:, None, None], (5, 8, 12, 3)).copy())
    maps = result.maps[method]
    finished = (
        {name: unfinished(one, 0, 1, 3) for name, one in maps.items()} if method == "cam" else unfinished(maps, 0, 1, 3)
    )
    result = dataclasses.replace(result, maps=result.maps | {method: finished})
    path = figures.animate(result, method, tmp_path / "moving.gif", seconds_per_step=0.2)
    animated, durations, loop = frames(path)
    assert (durations, loop) == ([200, 200, 2000], 0)
    figure, line, axes = animation._layout(result, method)
    assert figure.get_figwidth() * figure.dpi == pytest.approx(animated[0].shape[1], abs=1)
    line.set_text("step 4, t = 40")
    figure.canvas.draw()
    left, right, caption = (pixel_box(artist, animated[0].shape) for artist in (*axes, line))
    for frame, index in zip(animated, (0, 1, 3), strict=True):
        assert np.abs(frame[left][10:-10, 10:-10] - colours[index].astype(int)).max() <= 12
        overlaid = {other: overlay(result.previews[index], result.heatmap(method, other)) for other in (0, 1, 3)}
        differences = {other: mean_difference(frame[right], overlaid[other]) for other in overlaid}
        assert differences.pop(index) < 3 < 20 < min(differences.values())
    for before, after in itertools.pairwise(animated):
        changed = (before != after).any(-1)
        assert all(changed[place].any() for place in (left, right, caption))
        for place in (left, right, caption):
            changed[place] = False
        assert not changed.any()


@pytest.mark.slow
def test_an_animation_can_be_limited_to_some_steps(tmp_path: Path) -> None:
    result = random_result("a red cat", previews=None)
    assert len(frames(figures.animate(result, "rise", tmp_path / "some.gif", steps=[0, 2, -1]))[0]) == 3
    animated, _, _ = frames(figures.animate(result, "rise", tmp_path / "one.gif", steps=[1]))
    assert len(animated) == 1


@pytest.mark.parametrize(
    ("message", "name", "options"),
    [
        ("ends in '.png': expected .gif", "a.png", {}),
        ("does not exist: create it first", "no/a.gif", {}),
        ("no map 'lime': expected one of rise", "a.gif", {"method": "lime"}),
        ("no step of 'rise' is computed yet", "a.gif", {"steps": [9]}),
        ("got -1 seconds per step: expected at least 0.01", "a.gif", {"seconds_per_step": -1}),
    ],
)
def test_animation_errors_name_the_cause(tmp_path: Path, message: str, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        figures.animate(random_result("a cat"), **{"method": "rise", "path": tmp_path / name} | options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`dfengine figures` in this process: exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfengine", "figures", *map(str, arguments)])
        with pytest.raises(SystemExit) as raised:
            main()
        captured = capfd.readouterr()
        return int(raised.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.soak
@pytest.mark.filterwarnings("default:drawing the first 1 of 2:UserWarning")
def test_a_real_run_is_drawn_into_a_folder(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    explainers = [Rise(16), Cam(), Relevance(), Attention()]
    for name in ("uniform", "early"):
        engine.explain("a red star", explainers, num_steps=2, sampling=name, out=tmp_path / f"{name}.h5")
    store.merge([tmp_path / "uniform.h5", tmp_path / "early.h5"], tmp_path / "run.h5")
    status, output, errors = command(tmp_path / "run.h5", "--gif", "--limit", 1)
    assert (status, errors) == (
        0,
        "dfengine: note: drawing the first 1 of 2 images, leaving out 1: raise the limit to draw more\n",
    )
    stems = [f"item-000-{name}" for name in ("rise", "cam", "relevance", "attention", "comparison")]
    written = [f"{stem}.{ending}" for stem in (*stems, "samples", "concepts") for ending in ("png", "pdf")]
    written += [f"{stem}.gif" for stem in stems[:-1]]
    assert output.splitlines() == [str(tmp_path / "run.figures" / name) for name in written]
    assert sorted(path.name for path in (tmp_path / "run.figures").iterdir()) == sorted(written)
    heads = {".png": b"\x89PNG", ".pdf": b"%PDF", ".gif": b"GIF89a"}
    for path in (tmp_path / "run.figures").iterdir():
        assert path.read_bytes().startswith(heads[path.suffix])
    with dfengine.open(tmp_path / "run.h5") as opened:
        stored = draw_all(opened, items=[0])
        assert titles(stored["item-000-rise"])[:2] == ["image", "step 0, t = 501"]
        assert "standard error,\nshare of range" in labels(stored["item-000-rise"])
        (group,) = schedules.groups(opened)
        assert group.details == "shapes, guidance 2"


@pytest.fixture
def partial_run(tmp_path: Path) -> Path:
    """An unfinished file of two items: the first has two maps of random and one of rise, the second none."""
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        writer.trajectory(0, **trajectory(PLAN, 0))
        for place, at in ((0, 1), (1, 1), (1, 2)):
            writer.step(0, PLAN.methods[place].name, at, **step(PLAN, 0, place, at))
        writer.close(publish=False)
    return tmp_path / "run.part.h5"


@pytest.mark.slow
def test_finished_maps_of_an_unfinished_file_are_drawn(
    partial_run: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    status, output, errors = command(partial_run, "--gif")
    assert (status, errors) == (0, "")
    folder = partial_run.parent / "run.figures"
    stems = [folder / f"item-000-{name}" for name in ("rise", "random", "comparison")]
    assert output.splitlines() == [
        *(f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf")),
        *(f"{stem}.gif" for stem in stems[:2]),
    ]
    assert len(frames(folder / "item-000-random.gif")[0]) == 2
    with store.open(partial_run) as run:
        plots = draw_all(run)
    assert titles(plots["item-000-random"])[:3] == ["image", "step 1, t = 600", "step 2, t = 300"]
    assert titles(plots["item-000-rise"])[:2] == ["image", "step 1, t = 600"]


@pytest.mark.slow
def test_finished_maps_of_an_unfinished_folder_are_drawn(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    folder, plan = store.Folder(tmp_path / "run"), half(PLAN, 0)
    (tmp_path / "out").mkdir()
    assert command(tmp_path / "run", "-o", tmp_path / "out")[0] == 2
    with folder.segment("u1", plan) as writer:
        writer.trajectory(0, **trajectory(plan, 0))
        writer.step(0, "rise", 1, **step(plan, 0, 0, 1))
        writer.close(publish=False)
    assert command(tmp_path / "run", "-o", tmp_path / "out")[0] == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rise.pdf", "rise.png"]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--item", "2"], "there is no item 2: expected one of 0 to 1"),
        (["--item", "1"], "nothing to draw in "),
        (["--method", "cat"], "there is no map 'cat': expected one of rise, random"),
        (["--step", "3"], "step 3 is outside [0, 2]"),
        (["--step", "0"], "nothing to draw in "),
        (["--limit", "0"], "'--limit'"),
        (["-o", "{}/run.part.h5"], "is a file: name a folder"),
        (["-o", "{}/no/folder"], "does not exist: create it first"),
        (["-o", "{}/x.png", "--gif"], "--gif has no effect here: it is for a folder of figures"),
        (["-o", "{}/x.png", "--item", "0", "--item", "1"], "is one picture"),
        (["-o", "{}/x.png", "--method", "rise", "--method", "random"], "is one picture"),
        (["-o", "{}/x.gif"], "expected .png, .pdf or .svg"),
        (["-o", "{}/x.png", "--item", "1"], "no trajectory yet"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_folder(
    partial_run: Path, command: Callable[..., tuple[int, str, str]], arguments: list[str], message: str
) -> None:
    status, output, errors = command(partial_run, *(part.format(partial_run.parent) for part in arguments))
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("dfengine: ")
    assert message in line
    assert [path.name for path in partial_run.parent.iterdir()] == [partial_run.name]


@pytest.mark.parametrize("forbidden", [(Path, "mkdir"), (Figure, "savefig")])
def test_a_folder_without_write_permission_is_a_one_line_error(
    partial_run: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    forbidden: tuple[type, str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "run.figures")

    monkeypatch.setattr(*forbidden, refuse)
    status, output, errors = command(partial_run)
    assert (status, output) == (2, "")
    assert errors == "dfengine: [Errno 13] Permission denied: 'run.figures'\n"


@pytest.mark.slow
def test_file_names_are_distinct_on_every_file_system() -> None:
    maps = {name: np.zeros((1, 2, 2), np.float32) for name in ("a/b", "a-b", "comparison", "..", "Rise", "rise", "")}
    filenames = names([random_result("a cat", 1, maps=maps)])
    assert filenames[:-1] == ["a-b", "a-b-2", "comparison-2", "--", "Rise", "rise-2", "-"]


def test_concepts_are_drawn_if_any_image_has_relevance() -> None:
    plain = random_result("a cat", 3)
    lists = [np.array([9, 5, 0]), np.array([9, 8, 0])]
    without_relevance = dataclasses.replace(plain, maps={"rise": plain.maps["rise"]}, prompt="a dog")
    results = [without_relevance, *(dataclasses.replace(plain, timesteps=steps) for steps in lists)]
    assert "concepts" in draw_all(results, methods=["relevance"])


@pytest.mark.slow
def test_words_with_a_leading_underscore_appear_in_the_legend() -> None:
    lines = {"_hidden": [0.0, 1.0], "cat": [1.0, 0.0]}
    sums = dict.fromkeys(lines, (1.0, 1.0, 1.0))
    figure = figures.concepts([("", {"one": lines}, {"one": sums})], {"one": [9, 0]})
    (legend,) = figure.findobj(lambda artist: isinstance(artist, Legend) and len(artist.get_texts()) == 2)
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", "cat"]


def test_a_figure_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Figure, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("the disk is full")

    (tmp_path / "figure.png").write_bytes(b"earlier")
    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="the disk is full"):
        figures.save(figures.Figure(), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]
