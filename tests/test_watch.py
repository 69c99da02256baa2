"""`dfengine watch`: what a look at a run sees, at any moment of its writing, and how that is shown."""

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

#: The module, which the package names its function by.
watch = importlib.import_module("dfengine.cli.watch")
HALF = half(PLAN, 0)
MAPS = 2 * 3  # methods × steps of an item


def some(writer, maps):
    """A trajectory, and so many maps of the first method and then the second."""
    writer.trajectory(0, **trajectory(writer.plan, 0))
    for place, method in enumerate(writer.plan.methods):
        for at in range(3):
            if place * 3 + at < maps:
                writer.step(0, method.name, at, **step(writer.plan, 0, place, at))


def cut_off(path, maps):
    writer = store.Writer.create(path, PLAN)
    some(writer, maps)
    writer.close(publish=False)


def shown(seen, rate=None, **options):
    rate = rate or Rate()
    rate.add(0.0, seen.done)
    console = Console(width=150, file=io.StringIO())
    console.print(view(seen, rate, **options))
    return console.file.getvalue()


def test_a_file_that_is_being_written(tmp_path):
    cut_off(tmp_path / "run.h5", maps=4)
    for name in ("run.h5", "run.part.h5"):
        seen = store.progress(tmp_path / name)
        assert (seen.items, seen.done, seen.quarantined, seen.finished) == (2, 4 / MAPS, 0, False)
        assert seen.parts == [store.Part("run.part.h5", 2, 0, 4, 2 * MAPS)]
    assert (seen.latest.method, seen.latest.step, seen.latest.timestep) == ("random", 0, 900)
    assert (seen.latest.prompt, seen.latest.seed) == ("a red circle", 1)
    np.testing.assert_array_equal(seen.latest.image, trajectory(PLAN, 0)["image"])
    np.testing.assert_array_equal(seen.latest.heatmap, heatmap(step(PLAN, 0, 1, 0)["saliency"], (10, 12)))


def test_a_file_of_which_nothing_is_there_yet(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        seen = store.progress(tmp_path / "run.h5")
        assert (seen.done, seen.latest) == (0, None)
        assert "0 of 2 items" in shown(seen)
        fill(writer)
    seen = store.progress(tmp_path / "run.h5")
    assert (seen.done, seen.finished) == (2, True)
    assert (seen.latest.method, seen.latest.step, seen.latest.prompt) == ("random", 2, "ein Würfel")
    assert "finished" in shown(seen)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(store.StoreError, match="does not exist"):
        store.progress(tmp_path / "run.h5")
    with pytest.raises(ValueError, match=r"0\.0 seconds are not possible"):
        watch.watch(tmp_path / "run.h5", every=0.0)


@pytest.fixture
def folder(tmp_path):
    """A unit that is done, one that was begun twice, one that is not begun, and an item that was set aside."""
    made = store.Folder(tmp_path / "run")
    how = ({"sampling": "uniform", "steps": 3, "gamma": 0.0, "guidance": None},)
    units = [store.Unit(f"u{number}", {}, how, ("a",), ((0, 0, number),)) for number in range(4)]
    store.plan_units(made.path, units)
    with made.segment("u0", half(PLAN, 1)) as writer:
        fill(writer)
    for maps in (2, 5):
        writer = made.segment("u1", HALF)
        some(writer, maps)
        writer.close(publish=False)
    store.FailureLog(made.path, units[3]).failed([0], "no", for_good=True)
    return made.path


@pytest.mark.slow
def test_a_run_folder(folder):
    seen = store.progress(folder)
    assert (seen.items, seen.done, seen.quarantined, seen.finished) == (4, 1 + 5 / MAPS, 1, False)
    assert seen.parts == [store.Part("u1.2.part.h5", 1, 0, 5, MAPS)]
    assert (seen.latest.method, seen.latest.step) == ("random", 1)
    rate = Rate()
    rate.add(-60.0, 1.0)
    text = shown(seen, rate)
    # 5 of 6 maps in a minute, and 2 1/6 items left.
    assert "1 of 4 items, 0.8 a minute, 3 min left, 1 quarantined" in text
    assert "5 of 6 maps, 0 of 1 items" in text
    assert "'a red circle', seed 1: random, step 1, t = 600" in text
    assert "▀" not in shown(seen, is_coloured=False)


def test_an_empty_folder(tmp_path):
    store.Folder(tmp_path / "run")
    seen = store.progress(tmp_path / "run")
    assert (seen.items, seen.done, seen.parts, seen.latest) == (0, 0, [], None)
    assert "0 of 0 items" in shown(seen)


def test_the_rate_is_that_of_the_last_minutes():
    rate = Rate()
    rate.add(0.0, 5.0)
    assert rate.items_a_second is None
    for now in range(10, 310, 10):
        rate.add(float(now), 5.0 + (now / 10 if now <= 150 else 15 + (now - 150) / 5))
    assert rate.items_a_second == pytest.approx(1 / 5)
    for now in range(310, 500, 10):
        rate.add(float(now), 50.0)
    assert rate.items_a_second is None


def test_the_picture_has_the_images_colours(tmp_path):
    """A red upper half over a blue lower one, beside its map."""
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
    some(writer, 3)

    def finish():
        fill(writer)
        writer.close()

    later = threading.Timer(0.5, finish)
    later.start()
    screen = io.StringIO()
    monkeypatch.setattr(watch, "Console", lambda **_: Console(force_terminal=True, width=120, file=screen))
    watch.watch(tmp_path / "run.h5", every=0.05)
    later.join()
    assert store.progress(tmp_path / "run.h5").finished
    assert "finished" in screen.getvalue()


def test_without_a_terminal_it_looks_once(tmp_path, capsys):
    cut_off(tmp_path / "run.h5", maps=4)
    watch.watch(tmp_path / "run.h5")
    assert "4 of 12 maps, 0 of 2 items" in capsys.readouterr().out
