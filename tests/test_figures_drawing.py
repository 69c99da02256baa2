"""Which figures results and files have the data for, their names, and which images they group."""

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
from test_figures import LONG, MAPS_BAR, colour_bars, explained, labels, lines, pictures, texts, titles

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
    """Maps of which only these steps are computed."""
    return np.where(np.isin(np.arange(len(maps)), finished)[:, None, None], maps, np.float32(np.nan))


def sweep(prompts: Sequence[str] = ("a red cat",), seeds: Sequence[int] = (0, 1), names: Sequence[str] = tuple(LISTS)):
    """A result for each, with relevance alone; no two images are the same."""
    made = []
    for number, (prompt, name, seed) in enumerate(itertools.product(prompts, names, seeds)):
        image = np.full((8, 12, 3), number, np.uint8)
        one = explained(prompt, seed=seed, image=image, timesteps=np.array(LISTS[name]))
        made.append(with_methods(one, "relevance"))
    return made


def draw_all(results: Any, **options: Any) -> dict[str, Figure]:
    return {one.name: one.figure for one in figures.draw_all(results, **options)}


def names(results: Sequence[Any], **options: Any) -> list[str]:
    return list(draw_all(results, **options))


def on_one_line(labels: Sequence[str]) -> list[str]:
    return [label.replace("\n", " ").replace("\u00a0", " ") for label in labels]


@pytest.mark.slow
def test_one_result_has_every_method_in_its_form_and_a_comparison() -> None:
    made = explained("a red cat")
    drawn = draw_all([made])
    assert list(drawn) == [*METHODS, "comparison"]
    for method in METHODS:
        alone = figures.draw(made, method)
        assert (titles(drawn[method]), labels(drawn[method])) == (titles(alone), labels(alone))
    assert list(lines(drawn["relevance"])) == ["red", "cat"]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("made", "drawn"),
    [
        (with_methods(explained("a red cat"), "rise"), ["rise"]),
        (with_methods(explained("a red cat")), []),
        (explained(""), ["rise", "cam", "comparison"]),
        (explained("a red cat", maps={"rise": unfinished(np.ones((5, 2, 3), np.float32))}), []),
        (with_methods(explained("a red cat", relevance=np.full((5, 5), np.nan, np.float32)), "relevance"), []),
        (with_methods(explained("a red cat"), "attention", word_maps=np.full((3, 5, 2, 3), np.nan, np.float32)), []),
    ],
)
def test_what_is_not_there_is_not_drawn(made: Result, drawn: list[str]) -> None:
    assert names([made]) == drawn


@pytest.mark.slow
def test_a_method_that_is_half_done_is_drawn_as_far_as_it_is() -> None:
    made = explained("a red cat")
    rise, cam = np.asarray(made.maps["rise"]), dict(made.maps["cam"])
    cam["mid_block.resnets.1"] = unfinished(cam["mid_block.resnets.1"], 0, 4)
    heat = np.stack([unfinished(word, 2) for word in np.asarray(made.word_maps)])
    made = dataclasses.replace(made, maps=made.maps | {"rise": unfinished(rise, 1, 3), "cam": cam}, word_maps=heat)
    drawn = draw_all([made])
    assert titles(drawn["rise"])[:3] == ["image", "step 1, t = 30", "step 3, t = 10"]
    assert titles(drawn["cam"]) == ["step 0\nt = 40", "step 4\nt = 0"]
    assert titles(drawn["attention"]) == ["step 2\nt = 20"]
    # Rows of the steps at which most maps are there: of rise and the three others' own.
    assert on_one_line(labels(drawn["comparison"])) == ["step 1, t = 30", "step 3, t = 10"]


@pytest.mark.slow
def test_relevance_stands_above_a_map_that_is_there() -> None:
    made = explained("a red cat", steps=6)
    cam = {name: unfinished(maps, 0, 3) for name, maps in made.maps["cam"].items()}
    drawn = draw_all([dataclasses.replace(made, maps=made.maps | {"cam": cam})], methods=["relevance"])["relevance"]
    assert labels(drawn)[1] == "DF-CAM,\ncombined"
    assert titles(drawn) == ["step 0\nt = 50", "step 3\nt = 20"]
    none = {name: unfinished(maps) for name, maps in made.maps["cam"].items()}
    drawn = draw_all([dataclasses.replace(made, maps=made.maps | {"cam": none})], methods=["relevance"])["relevance"]
    assert labels(drawn)[1] == "DF-RISE,\n7 masks"


@pytest.mark.slow
def test_methods_and_steps_restrict_what_is_drawn() -> None:
    made = explained("a red cat")
    rise = unfinished(np.asarray(made.maps["rise"]), 0, 4)
    made = dataclasses.replace(made, maps=made.maps | {"rise": rise})
    drawn = draw_all([made], methods=["rise", "cam"], steps=[-1, 1])
    assert list(drawn) == ["rise", "cam", "comparison"]
    assert titles(drawn["rise"])[:2] == ["image", "step 4, t = 0"]
    assert titles(drawn["cam"]) == ["step 4\nt = 0", "step 1\nt = 30"]
    assert names([made], steps=[2]) == [*METHODS[1:], "comparison"], "rise has not finished step 2"
    assert names([made], methods=["rise"], steps=[2]) == []


@pytest.mark.slow
def test_several_images_are_numbered_and_compared_in_rows() -> None:
    lists = {"a cat": [40, 30, 20, 10, 0], "a dog": [9, 7, 5, 3, 1]}
    made = [
        with_methods(explained(prompt, seed=seed, timesteps=np.array(lists[prompt])), "rise", "cam")
        for seed, prompt in enumerate(lists)
    ]
    drawn = draw_all(made)
    assert list(drawn) == ["item-000-rise", "item-000-cam", "item-001-rise", "item-001-cam", "comparison"]
    several = draw_all(made, methods=["rise", "cam"], steps=[0, 3])
    # Of five steps, the one at three quarters.
    assert list(several)[-2:] == ["comparison-step-000", "comparison-step-003"]
    compared = {2: drawn["comparison"], 0: several["comparison-step-000"], 3: several["comparison-step-003"]}
    for at, figure in compared.items():
        assert figure.get_suptitle() == f"shapes, step {at}: one row per image"
        assert titles(figure) == ["image", "DF-RISE", "DF-CAM"]
        assert colour_bars(figure) == [MAPS_BAR]
        assert on_one_line(labels(figure)) == [
            f"a cat, seed 0, t = {lists['a cat'][at]}",
            f"a dog, seed 1, t = {lists['a dog'][at]}",
        ]
        expected = [[one.image, *(overlay(one.image, one.heatmap(name, at)) for name in one.maps)] for one in made]
        for picture, wanted in zip(pictures(figure), itertools.chain(*expected), strict=True):
            np.testing.assert_array_equal(picture, wanted)


@pytest.mark.slow
def test_of_one_image_a_row_is_a_step_and_what_is_missing_is_said() -> None:
    made = with_methods(explained("a cat"), "rise", "cam")
    made = dataclasses.replace(made, maps=made.maps | {"rise": unfinished(np.asarray(made.maps["rise"]), 4)})
    compared = draw_all([made], steps=[0, 4])["comparison"]
    assert compared.get_suptitle().replace("\n", " ") == "“a cat”, shapes, seed 0: one row per step"
    assert on_one_line(labels(compared)) == ["step 0, t = 40", "step 4, t = 0"]
    previews = np.asarray(made.previews)
    expected = [previews[0], overlay(previews[0], made.heatmap("cam", 0)), previews[4]]
    expected += [overlay(previews[4], made.heatmap(method, 4)) for method in ("rise", "cam")]
    for drawn, picture in zip(pictures(compared), expected, strict=True):
        np.testing.assert_array_equal(drawn, picture)
    assert [text.get_text() for axis in compared.axes for text in axis.texts] == ["not\ncomputed"]


@pytest.mark.slow
def test_images_of_different_sizes_are_not_in_one_comparison() -> None:
    sizes = [(8, 12), (8, 12), (12, 8), (12, 8), (4, 4)]
    made = [with_methods(explained("a cat", size=size), "rise", "attention") for size in sizes]
    assert [name for name in names(made) if "comparison" in name] == [
        "item-004-comparison",
        "comparison-0",
        "comparison-1",
    ]


@pytest.mark.slow
def test_of_many_images_the_first_are_drawn_or_those_that_are_named() -> None:
    made = [with_methods(explained("a cat", seed=seed), "rise") for seed in range(5)]
    with pytest.warns(UserWarning, match="drawing the first 2 of 5 images, leaving out 3"):
        assert names(made, limit=2) == ["item-000-rise", "item-001-rise"]
    assert names(made, limit=5) == [f"item-00{place}-rise" for place in range(5)]
    assert names(made, items=[3, -1, 3], limit=1) == ["item-003-rise", "item-004-rise"]
    with pytest.warns(UserWarning, match="leaving out 3"):
        drawn = list(figures.draw_all(made, limit=2, steps=[1]))
    assert [(one.name, one.result, one.method, one.steps) for one in drawn] == [
        ("item-000-rise", made[0], "rise", [1]),
        ("item-001-rise", made[1], "rise", [1]),
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
def test_what_none_of_the_images_has_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        figures.draw_all([explained("a cat"), explained("a cat", steps=7)], **options)


def reach(schedule: Axes) -> list[list[float]]:
    """From where to where the lines beneath the time-steps go."""
    return [line.get_xdata().tolist() for line in schedule.lines if line.get_marker() != "|"]


@pytest.mark.slow
def test_images_of_one_prompt_under_several_schedules_are_side_by_side() -> None:
    made = sweep()
    drawn = draw_all(made)
    assert list(drawn)[-2:] == ["samples", "concepts"]
    samples = drawn["samples"]
    *axes, schedule = samples.axes
    assert [axis.get_title() for axis in axes[:3]] == [*LISTS]
    assert [axis.get_ylabel() for axis in axes[::3]] == ["seed 0", "seed 1"]
    # Images are numbered by schedule, then by seed.
    assert [int(picture[0, 0, 0]) for picture in pictures(samples)] == [0, 2, 4, 1, 3, 5]
    marks = [line for line in schedule.lines if line.get_marker() == "|"]
    assert [line.get_xdata().tolist() for line in marks] == [*LISTS.values()]
    # The first is the uppermost, and each has its name beside it.
    assert [set(line.get_ydata()) for line in marks] == [{3}, {2}, {1}]
    heights = dict(zip((text.get_text() for text in schedule.get_yticklabels()), schedule.get_yticks(), strict=True))
    assert heights == dict(zip(LISTS, (3, 2, 1), strict=True))
    # From noise to image, with room at both ends.
    assert schedule.get_xlim() == pytest.approx((1008.99, -9.99))
    assert reach(schedule) == [[0, 999]] * 3
    assert samples.get_suptitle() == "“a red cat”  ·  shapes"


def test_the_axis_of_time_steps_reaches_a_later_one_than_999() -> None:
    longer, *others = sweep(seeds=(0,))
    longer = dataclasses.replace(longer, timesteps=np.array([1200, 900, 600, 300, 0]))
    (group,) = schedules.groups([longer, *others])
    *_, schedule = group.samples().axes
    assert schedule.get_xlim() == pytest.approx((1212, -12))
    assert reach(schedule) == [[0, 1200]] * 3


@pytest.mark.slow
def test_only_what_belongs_together_is_in_one_group() -> None:
    def grouped(results: Sequence[Any]) -> list[tuple[str, str, list[int], list[str]]]:
        return [(one.prompt, one.details, list(one.rows), list(one.timesteps)) for one in schedules.groups(results)]

    made = sweep(("a red cat", "a dog"), (0, 1, 2))
    every = [*LISTS]
    assert grouped(made) == [(prompt, "shapes", [0, 1, 2], every) for prompt in ("a red cat", "a dog")]
    # Seed 1 of the cat has no latter yet; of seed 2 there is one schedule only.
    some = [one for number, one in enumerate(made[:9]) if number not in (5, 7, 8)]
    assert grouped(some) == [("a red cat", "shapes", [0], every), ("a red cat", "shapes", [1], every[:2])]
    other = [dataclasses.replace(one, model="sd15") for one in made[:3]]
    assert grouped(made[:3] + other) == []
    assert grouped(made[:4] + made[:4]) == [("a red cat", "shapes", [0], every[:2])]
    assert [name for name in names(made[:6], items=[0, 1]) if "item" not in name] == []
    both = sweep(("a red cat", "a dog"), (0,), every[:2])
    assert [name for name in names(both, methods=["relevance"]) if "item" not in name] == [
        "prompt-000-concepts",
        "prompt-001-concepts",
    ]


def test_schedules_of_one_name_are_told_apart() -> None:
    lists = [(40, 30, 20), (9, 6, 3, 0), tuple(exponential_timesteps(5, 7, "early")), (50, 40, 30), (900, 20, 1)]
    assert schedules.schedule_names(lists) == [
        "uniform, 3 steps (1)",
        "uniform, 4 steps",
        "early, γ = 7",
        "uniform, 3 steps (2)",
        "t = 900 … 1",
    ]


def test_stored_images_of_other_guidance_or_negative_prompt_are_apart(tmp_path: Path) -> None:
    asked = [("", 2.0), ("blurry", 2.0), ("", 7.5)]
    items = tuple(
        store.Item(f"k{number}", "a cat", negative, settings={"guidance": guidance, "timesteps": timesteps})
        for number, ((negative, guidance), timesteps) in enumerate(
            itertools.product(asked, ([900, 500, 100], [3, 2, 1]))
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
    """Of the tokens a, red and cat the first is 0 and the last 4, so red is its own relevance over 4."""
    tokens = Tokens("a red cat", ("<s>", "a", "red", "cat", "</s>"), ((0, 0), (0, 1), (2, 5), (6, 9), (0, 0)))

    def relevance(*red: float) -> np.ndarray:
        return np.array([[9] * 3, [0] * 3, red, [4] * 3, [9] * 3], np.float32)

    red = {("uniform", 0): (1, 2, 3), ("uniform", 1): (3, 2, 1), ("early", 0): (4, 4, 0), ("early", 1): (0, 0, 0)}
    lists = {"uniform": [20, 10, 0], "early": exponential_timesteps(3, 60, "early")}
    made = [
        with_methods(
            explained(
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
    drawn = draw_all(made)["concepts"]
    uniform, early, bars = drawn.axes
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
    # s/√2 of 1/4 and 3/4 is 1/4, of 0 and 1 it is 1/2.
    ends = np.asarray(uniform.collections[0].get_paths()[0].vertices)
    assert {(float(x), round(float(y), 6)) for x, y in ends} == {(0, 0.25), (0, 0.75), (1, 0.5), (2, 0.25), (2, 0.75)}
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, [1.5, 3, 1, 3])
    # Sums of uniform are 1.5 and 1.5, of early 2 and 0: an error of 0 and of 1.
    reaches = [np.asarray(lines.get_segments())[:, :, 1] for lines in bars.collections]
    np.testing.assert_allclose(reaches, [[[1.5, 1.5], [3, 3]], [[0, 2], [3, 3]]], atol=1e-6)
    (title,) = {part.get_suptitle() for part in drawn.subfigs}
    assert title.replace("\n", "  ·  ") == "“a red cat”  ·  shapes, mean of 2 seeds (0, 1) ± standard error"
    single = draw_all([one for one in made if one.seed == 0])["concepts"]
    assert single.subfigs[0].get_suptitle() == "“a red cat”  ·  shapes, seed 0"
    assert [len(axis.collections) for axis in single.axes[:2]] == [0, 0]


def test_a_seed_whose_relevance_has_a_gap_is_not_in_the_means() -> None:
    made = sweep()
    gap = np.asarray(made[3].relevance).copy()
    gap[:, 2] = np.nan
    made[3] = dataclasses.replace(made[3], relevance=gap)
    (group,) = schedules.groups(made)
    drawn = group.concepts()
    assert drawn is not None
    assert drawn.subfigs[0].get_suptitle().endswith("seed 0")
    (rest,) = schedules.groups([one for one in made if one.seed == 1])
    assert rest.concepts() is None
    (without,) = schedules.groups([dataclasses.replace(one, tokens=None) for one in made])
    assert without.concepts() is None


@pytest.mark.slow
def test_figures_of_schedules_are_readable_across_a_page() -> None:
    (group,) = schedules.groups(sweep((LONG,)))
    for drawn in (group.samples(), group.concepts()):
        assert drawn is not None
        assert min(text.get_fontsize() for text in texts(drawn)) * 7.2 / max(drawn.get_figwidth(), 7.2) >= 5.5


def frames(path: Path) -> tuple[list[np.ndarray], list[int], int]:
    """The frames of a GIF, how long each stays in milliseconds, and how often it is shown (0 for ever)."""
    with Image.open(path) as image:
        shown = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(image)]
        durations = []
        for number in range(len(shown)):
            image.seek(number)
            durations.append(image.info["duration"])
        return shown, durations, image.info["loop"]


def box(axis: Any, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The pixels of an axis in a picture of this shape, from the top."""
    x0, y0, x1, y1 = axis.get_window_extent().extents
    return slice(round(shape[0] - y1) - 1, round(shape[0] - y0) + 2), slice(round(x0) - 1, round(x1) + 2)


def away_from(drawn: np.ndarray, picture: np.ndarray) -> float:
    """How far a picture in [0, 1] is from what is drawn of it, [0, 255]: the mean over the middles of its pixels."""
    rows, columns = (
        (np.arange(count) + 0.5) * side / count for count, side in zip(picture.shape, drawn.shape[:2], strict=False)
    )
    return float(np.abs(drawn[np.ix_(rows.astype(int), columns.astype(int))] - 255 * picture).mean())


def test_a_frame_tells_its_step_and_its_t(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its figure, whose texts and pictures are those of the frame that was drawn last."""
    made = explained("a red cat", steps=12)
    figure, line, axes = laid_out = animation._layout(made)
    monkeypatch.setattr(animation, "_layout", lambda _: laid_out)
    told = []
    for at, _ in zip((0, 8, 11), animation._frames(made, "cam", [0, 8, 11]), strict=True):
        told.append(line.get_text().replace("\u2007", "_"))
        beneath = np.asarray(made.previews)[at]
        np.testing.assert_array_equal(axes[0].images[0].get_array(), beneath)
        np.testing.assert_array_equal(axes[1].images[0].get_array(), overlay(beneath, made.heatmap("cam", at)))
    assert told == ["step _0, t = 110", "step _8, t = _30", "step 11, t = __0"]
    assert titles(figure) == ["predicted $x_0$", "DF-CAM, combined"]
    assert colour_bars(figure) == [MAPS_BAR]


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_an_animation_goes_through_the_finished_steps(tmp_path: Path, method: str) -> None:
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30], [0, 0, 0]], np.uint8)
    made = explained("a red cat", previews=np.broadcast_to(colours[:, None, None], (5, 8, 12, 3)).copy())
    maps = made.maps[method]
    kept = (
        {name: unfinished(one, 0, 1, 3) for name, one in maps.items()} if method == "cam" else unfinished(maps, 0, 1, 3)
    )
    made = dataclasses.replace(made, maps=made.maps | {method: kept})
    path = figures.animate(made, method, tmp_path / "moving.gif", seconds_per_step=0.2)
    shown, durations, loop = frames(path)
    assert (durations, loop) == ([200, 200, 2000], 0)
    figure, line, axes = animation._layout(made)
    assert figure.get_figwidth() * figure.dpi == pytest.approx(shown[0].shape[1], abs=1)
    line.set_text("step 4, t = 40")
    figure.canvas.draw()
    left, right, told = (box(artist, shown[0].shape) for artist in (*axes, line))
    for frame, at in zip(shown, (0, 1, 3), strict=True):
        assert np.abs(frame[left][10:-10, 10:-10] - colours[at].astype(int)).max() <= 12
        overlaid = {other: overlay(made.previews[at], made.heatmap(method, other)) for other in (0, 1, 3)}
        away = {other: away_from(frame[right], overlaid[other]) for other in overlaid}
        assert away.pop(at) < 3 < 20 < min(away.values())
    for before, after in itertools.pairwise(shown):
        changed = (before != after).any(-1)
        assert all(changed[place].any() for place in (left, right, told))
        for place in (left, right, told):
            changed[place] = False
        assert not changed.any()


@pytest.mark.slow
def test_an_animation_may_show_some_steps_or_one(tmp_path: Path) -> None:
    made = explained("a red cat", previews=None)
    assert len(frames(figures.animate(made, "rise", tmp_path / "some.gif", steps=[0, 2, -1]))[0]) == 3
    shown, _, _ = frames(figures.animate(made, "rise", tmp_path / "one.gif", steps=[1]))
    assert len(shown) == 1


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
def test_what_cannot_be_animated_is_named(tmp_path: Path, message: str, name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        figures.animate(explained("a cat"), **{"method": "rise", "path": tmp_path / name} | options)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`dfengine figures` in this process: exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfengine", "figures", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capfd.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.mark.soak
@pytest.mark.filterwarnings("default:drawing the first 1 of 2:UserWarning")
def test_a_real_run_is_drawn_into_a_folder(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu")
    explainers = [Rise(8), Cam(), Relevance(), Attention()]
    for name in ("uniform", "early"):
        engine.explain("a red star", explainers, num_steps=2, sampling=name, out=tmp_path / f"{name}.h5")
    store.merge([tmp_path / "uniform.h5", tmp_path / "early.h5"], tmp_path / "run.h5")
    status, said, noted = command(tmp_path / "run.h5", "--gif", "--limit", 1)
    assert (status, noted) == (
        0,
        "dfengine: note: drawing the first 1 of 2 images, leaving out 1: raise the limit to draw more\n",
    )
    stems = [f"item-000-{name}" for name in ("rise", "cam", "relevance", "attention", "comparison")]
    written = [f"{stem}.{ending}" for stem in (*stems, "samples", "concepts") for ending in ("png", "pdf")]
    written += [f"{stem}.gif" for stem in stems[:-1]]
    assert said.splitlines() == [str(tmp_path / "run.figures" / name) for name in written]
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
def begun(tmp_path: Path) -> Path:
    """A part of two items: of the first two maps of random and one of rise, of the second nothing."""
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        writer.trajectory(0, **trajectory(PLAN, 0))
        for place, at in ((0, 1), (1, 1), (1, 2)):
            writer.step(0, PLAN.methods[place].name, at, **step(PLAN, 0, place, at))
        writer.close(publish=False)
    return tmp_path / "run.part.h5"


@pytest.mark.slow
def test_a_part_is_drawn_as_far_as_it_is(begun: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    status, said, noted = command(begun, "--gif")
    assert (status, noted) == (0, "")
    folder = begun.parent / "run.figures"
    stems = [folder / f"item-000-{name}" for name in ("rise", "random", "comparison")]
    assert said.splitlines() == [
        *(f"{stem}.{ending}" for stem in stems for ending in ("png", "pdf")),
        *(f"{stem}.gif" for stem in stems[:2]),
    ]
    assert len(frames(folder / "item-000-random.gif")[0]) == 2
    with store.open(begun) as run:
        drawn = draw_all(run)
    assert titles(drawn["item-000-random"])[:3] == ["image", "step 1, t = 600", "step 2, t = 300"]
    assert titles(drawn["item-000-rise"])[:2] == ["image", "step 1, t = 600"]


@pytest.mark.slow
def test_a_folder_that_is_being_written_is_drawn_as_far_as_it_is(
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
    ("arguments", "said"),
    [
        (["--item", "2"], "there is no item 2: expected one of 0 to 1"),
        (["--item", "1"], "nothing to draw in "),
        (["--method", "cat"], "there is no map 'cat': expected one of rise, random"),
        (["--step", "3"], "step 3 is outside [0, 2]"),
        (["--step", "0"], "nothing to draw in "),
        (["--limit", "0"], "'--limit'"),
        (["-o", "{}/run.part.h5"], "is a file: name a folder"),
        (["-o", "{}/no/folder"], "does not exist: create it first"),
        (["-o", "{}/x.png", "--gif"], "is one picture: name one --method and one --item"),
        (["-o", "{}/x.png", "--item", "0", "--item", "1"], "is one picture"),
        (["-o", "{}/x.png", "--method", "rise", "--method", "random"], "is one picture"),
        (["-o", "{}/x.gif"], "expected .png, .pdf or .svg"),
        (["-o", "{}/x.png", "--item", "1"], "no trajectory yet"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    begun: Path, command: Callable[..., tuple[int, str, str]], arguments: list[str], said: str
) -> None:
    status, out, noted = command(begun, *(part.format(begun.parent) for part in arguments))
    assert (status, out) == (2, "")
    (line,) = noted.splitlines()
    assert line.startswith("dfengine: ")
    assert said in line
    assert [path.name for path in begun.parent.iterdir()] == [begun.name]


@pytest.mark.parametrize("forbidden", [(Path, "mkdir"), (Figure, "savefig")])
def test_a_folder_that_may_not_be_written_is_one_line(
    begun: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    forbidden: tuple[type, str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "run.figures")

    monkeypatch.setattr(*forbidden, refuse)
    status, out, noted = command(begun)
    assert (status, out) == (2, "")
    assert noted == "dfengine: [Errno 13] Permission denied: 'run.figures'\n"


@pytest.mark.slow
def test_names_of_files_are_unlike_on_any_disk() -> None:
    maps = {name: np.zeros((1, 2, 2), np.float32) for name in ("a/b", "a-b", "comparison", "..", "Rise", "rise", "")}
    named = names([explained("a cat", 1, maps=maps)])
    assert named[:-1] == ["a-b", "a-b-2", "comparison-2", "--", "Rise", "rise-2", "-"]


def test_relevance_of_any_image_is_looked_for() -> None:
    plain = explained("a cat", 3)
    lists = [np.array([9, 5, 0]), np.array([9, 8, 0])]
    without = dataclasses.replace(plain, maps={"rise": plain.maps["rise"]}, prompt="a dog")
    results = [without, *(dataclasses.replace(plain, timesteps=steps) for steps in lists)]
    assert "concepts" in draw_all(results, methods=["relevance"])


@pytest.mark.slow
def test_a_word_that_begins_with_an_underscore_is_in_the_legend() -> None:
    lines = {"_hidden": [0.0, 1.0], "cat": [1.0, 0.0]}
    sums = dict.fromkeys(lines, (1.0, 1.0, 1.0))
    figure = figures.concepts([("", {"one": lines}, {"one": sums})], {"one": [9, 0]})
    (legend,) = figure.findobj(lambda artist: isinstance(artist, Legend) and len(artist.get_texts()) == 2)
    assert [text.get_text() for text in legend.get_texts()] == ["_hidden", "cat"]
