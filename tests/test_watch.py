"""`dfengine watch`: the progress of a run, at any moment of its writing, and how it is displayed."""

import importlib
import io
import threading

import numpy as np
import pytest
from rich.console import Console
from store_example import PLAN, fill, half, step, trajectory

from dfengine import store
from dfengine.cli.watch import Rate, view
from dfengine.result import heatmap

#: The module; the package exports a function by the same name.
watch = importlib.import_module("dfengine.cli.watch")
HALF = half(PLAN, 0)
MAPS = 2 * 3  # methods × steps of an item


def write_maps(writer, num_maps):
    """Write a trajectory and this many maps, those of the first method before those of the second."""
    writer.trajectory(0, **trajectory(writer.plan, 0))
    for place, method in enumerate(writer.plan.methods):
        for index in range(3):
            if place * 3 + index < num_maps:
                writer.step(0, method.name, index, **step(writer.plan, 0, place, index))


def write_unfinished(path, num_maps):
    writer = store.Writer.create(path, PLAN)
    write_maps(writer, num_maps)
    writer.close(publish=False)


def render(progress, rate=None, **options):
    rate = rate or Rate()
    rate.add(0.0, progress.done)
    console = Console(width=150, file=io.StringIO())
    console.print(view(progress, rate, **options))
    return console.file.getvalue()


def test_progress_of_an_unfinished_file(tmp_path):
    write_unfinished(tmp_path / "run.h5", num_maps=4)
    for name in ("run.h5", "run.part.h5"):
        progress = store.progress(tmp_path / name)
        assert (progress.items, progress.done, progress.quarantined, progress.finished) == (2, 4 / MAPS, 0, False)
        assert progress.parts == [store.Part("run.part.h5", 2, 0, 4, 2 * MAPS)]
    assert (progress.latest.method, progress.latest.step, progress.latest.timestep) == ("random", 0, 900)
    assert (progress.latest.prompt, progress.latest.seed) == ("a red circle", 1)
    np.testing.assert_array_equal(progress.latest.image, trajectory(PLAN, 0)["image"])
    np.testing.assert_array_equal(progress.latest.heatmap, heatmap(step(PLAN, 0, 1, 0)["saliency"], (10, 12)))


def test_progress_of_a_file_without_maps(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        progress = store.progress(tmp_path / "run.h5")
        assert (progress.done, progress.latest) == (0, None)
        assert "0 of 2 items" in render(progress)
        fill(writer)
    progress = store.progress(tmp_path / "run.h5")
    assert (progress.done, progress.finished) == (2, True)
    assert (progress.latest.method, progress.latest.step, progress.latest.prompt) == ("random", 2, "ein Würfel")
    assert "finished" in render(progress)


def test_a_missing_file_or_an_impossible_interval_is_rejected(tmp_path):
    with pytest.raises(store.StoreError, match="does not exist"):
        store.progress(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=r"0\.0 seconds are not possible"):
        watch.watch(tmp_path / "run.h5", every=0.0)
    for every in (float("inf"), float("nan"), 1e300, -1.0):
        with pytest.raises(ValueError, match="seconds are not possible: expected more than 0 and at most a day"):
            watch.watch(tmp_path / "run.h5", every=every)


@pytest.fixture
def folder(tmp_path):
    """A run with a finished unit, one that was started twice, one not started, and one with a quarantined item."""
    run_folder = store.Folder(tmp_path / "run")
    schedules = ({"sampling": "uniform", "num_steps": 3, "gamma": 0.0, "guidance": None},)
    units = [store.Unit(f"u{number}", {}, schedules, ("a",), ((0, 0, number),)) for number in range(4)]
    store.plan_units(run_folder.path, units)
    with run_folder.segment("u0", half(PLAN, 1)) as writer:
        fill(writer)
    for num_maps in (2, 5):
        writer = run_folder.segment("u1", HALF)
        write_maps(writer, num_maps)
        writer.close(publish=False)
    store.FailureLog(run_folder.path, units[3]).failed([0], "no", for_good=True)
    return run_folder.path


@pytest.mark.slow
def test_progress_of_a_run_folder(folder):
    progress = store.progress(folder)
    assert (progress.items, progress.done, progress.quarantined, progress.finished) == (4, 1 + 5 / MAPS, 1, False)
    assert progress.parts == [store.Part("u1.2.part.h5", 1, 0, 5, MAPS)]
    assert (progress.latest.method, progress.latest.step) == ("random", 1)
    rate = Rate()
    rate.add(-60.0, 1.0)
    text = render(progress, rate)
    # 5 of 6 maps in a minute; 2 1/6 items remain.
    assert "1 of 4 items, 0.8 a minute, 3 min left, 1 quarantined" in text
    assert "5 of 6 maps, 0 of 1 items" in text
    assert "'a red circle', seed 1: random, step 1, t = 600" in text
    assert "▀" not in render(progress, is_coloured=False)


def test_progress_of_an_empty_folder(tmp_path):
    store.Folder(tmp_path / "run")
    progress = store.progress(tmp_path / "run")
    assert (progress.items, progress.done, progress.parts, progress.latest) == (0, 0, [], None)
    assert "0 of 0 items" in render(progress)


def test_the_rate_covers_the_last_minutes():
    rate = Rate()
    rate.add(0.0, 5.0)
    assert rate.items_a_second is None
    for now in range(10, 310, 10):
        rate.add(float(now), 5.0 + (now / 10 if now <= 150 else 15 + (now - 150) / 5))
    assert rate.items_a_second == pytest.approx(1 / 5)
    for now in range(310, 500, 10):
        rate.add(float(now), 50.0)
    assert rate.items_a_second is None


def test_the_picture_shows_image_and_map_in_colour(tmp_path):
    """A red half above a blue half, next to the map."""
    image = np.zeros((24, 24, 3), np.uint8)
    image[:12, :, 0], image[12:, :, 2] = 255, 255
    latest = store.LatestMap("p", 0, "rise", 0, 1, image, np.zeros((24, 24), np.float32))
    lines = watch.picture(latest)
    colours = [(span.style.color.triplet, span.style.bgcolor.triplet) for span in lines.spans]
    assert len(colours) == 12 * 48
    assert colours[0] == ((255, 0, 0), (255, 0, 0))
    assert colours[11 * 48] == ((0, 0, 255), (0, 0, 255))
    assert colours[24] != colours[0], "the map's half is darker"


@pytest.mark.slow
def test_a_view_ends_when_the_run_is_finished(tmp_path, monkeypatch):
    writer = store.Writer.create(tmp_path / "run.h5", PLAN)
    write_maps(writer, 3)

    def finish():
        fill(writer)
        writer.close()

    timer = threading.Timer(0.5, finish)
    timer.start()
    screen = io.StringIO()
    monkeypatch.setattr(watch, "Console", lambda **_: Console(force_terminal=True, width=120, file=screen))
    watch.watch(tmp_path / "run.h5", every=0.05)
    timer.join()
    assert store.progress(tmp_path / "run.h5").finished
    assert "finished" in screen.getvalue()


def test_without_a_terminal_progress_is_printed_once(tmp_path, capsys):
    write_unfinished(tmp_path / "run.h5", num_maps=4)
    watch.watch(tmp_path / "run.h5")
    assert "4 of 12 maps, 0 of 2 items" in capsys.readouterr().out
