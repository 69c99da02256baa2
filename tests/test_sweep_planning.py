"""The plan of a sweep, which only grows, whoever plans at once or is killed meanwhile; and what items failed of."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfengine import Random, store
from dfengine.store import (
    FailureLog,
    Unit,
    failures,
    plan_units,
    planned_specs,
    planned_units,
    release_units,
    units_left,
)
from dfengine.sweep.planning import check_same, estimate, prepare, units
from dfengine.sweep.records import Kind, Probed
from dfengine.sweep.spec import Schedule, Source, Sweep

ROOT = Path(__file__).parent.parent

#: The axes that a sweep is grown and shrunk along: one of each at least.
AXES = {
    "prompts": ["a cat", "a dog\n“barks”", "a \x85 cow"],
    "seeds": [3, 0, 2**63 - 1],
    "schedules": [{"steps": 5}, {"sampling": "early", "steps": 5, "guidance": 2}, {"sampling": [9, 4]}, {"steps": 2}],
    "models": ["one/x.y", {"model": "one/x.y", "dtype": "float16"}, "two/x.y", "three"],
}
LEAST = {axis: values[:1] for axis, values in AXES.items()}
SOME = {axis: values[:2] for axis, values in AXES.items()}

PLAN_AT_ONCE = """
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, "tests")
from dfengine import store
from dfengine.sweep.planning import prepare
from test_sweep_planning import SOME, Probe, set_aside, swept

PATH, SWEEP = Path(sys.argv[1]), swept(**SOME)


def slowly(*arguments, plan_units=store.plan_units, **options):
    time.sleep(0.1)
    plan_units(*arguments, **options)


def probe(source):
    together.wait(60)
    return Probe(SWEEP)(source)


def plan():
    store.plan_units = slowly
    names = [unit.name for unit in prepare(SWEEP, PATH, probe)]
    together.wait(60)
    set_aside(PATH, next(store.planned_units(PATH)), 0)
    together.wait(60)
    names += [unit.name for unit in prepare(SWEEP, PATH, probe, retry_failed=True)]
    print(" ".join(names) + "\\n", end="", flush=True)


context = multiprocessing.get_context("fork")
together = context.Barrier(3)
processes = [context.Process(target=plan) for _ in range(3)]
for process in processes:
    process.start()
for process in processes:
    process.join()
    assert process.exitcode == 0
"""


def swept(**given):
    return Sweep(**{"prompts": "a cat", "explainers": Random()} | given)


class Probe:
    """Measures every model alike: `forwards` a schedule of so many seconds each. It notes whom it was asked about."""

    def __init__(self, sweep, seconds=1.0, forwards=60):
        self.asked = []
        given = forwards if isinstance(forwards, list) else [forwards] * len(sweep.schedules)
        kinds = [Kind(how.steps, number, 1000) for how, number in zip(sweep.schedules, given, strict=True)]
        self.probed = Probed("cpu", seconds, tuple(kinds))

    def __call__(self, source):
        self.asked.append(source.model)
        return self.probed


def unprobed(source):
    raise AssertionError(f"{source} was asked about")


def planned(sweep, path, **options):
    return prepare(sweep, path, Probe(sweep), **options)


def made(sweep, **costs):
    probed = dict.fromkeys(sweep.models, Probe(sweep, **costs).probed)
    return list(units(sweep, probed)), probed


def told(model, item):
    return json.dumps([dict(model), item], sort_keys=True)


def wanted(sweep):
    """Every item of a sweep, once."""
    product = itertools.product(sweep.models, sweep.prompts, sweep.seeds, sweep.schedules)
    return Counter(
        told(model.model_dump(), {"prompt": prompt, "seed": seed, "schedule": how.model_dump(mode="json")})
        for model, prompt, seed, how in product
    )


def there(found):
    """Every item of units, as often as they have it."""
    return Counter(told(unit.model, unit.describe(item)) for unit in found for item in range(len(unit)))


def written(path):
    """All that a folder has in it."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in Path(path).rglob("*")
    }


def set_aside(path, unit, *items):
    for item in items:
        FailureLog(path, unit).failed([item], f"item {item} is broken", for_good=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


# Units ----------------------------------------------------------------------------------------------------------------


def some(axis):
    return st.lists(st.sampled_from(AXES[axis]), min_size=1, max_size=3, unique_by=str)


#: What a sweep is made of, in the test: beartype, which is at work there, draws numbers of its own.
axes = st.fixed_dictionaries(
    {axis: some(axis) for axis in AXES} | {"unit_minutes": st.sampled_from([0.001, 1, 2, 5, 1000])}
)


@given(axes=axes, seconds=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 60.0, 1e6]))
@settings(max_examples=150, deadline=None)
def test_units_have_every_item_once(axes, seconds):
    sweep = swept(**axes)
    found, probed = made(sweep, seconds=seconds)
    assert there(found) == wanted(sweep)
    assert len({unit.name for unit in found}) == len(found)
    for unit in found:
        assert 1 <= len(unit) <= 256
        assert len({how["steps"] for how in unit.schedules}) == 1, "one file has one number of steps"
        assert {prompt for prompt, _, _ in unit.items} == set(range(len(unit.prompts))), "what it needs, and no more"
        assert {how for _, how, _ in unit.items} == set(range(len(unit.schedules)))
        assert len(set(unit.prompts)) == len(unit.prompts)
        assert not unit.retry_of
    expected = estimate(sweep, probed, 1)
    assert (expected.items, expected.units) == (sum(map(len, found)), len(found))


@given(axes=axes, data=st.data())
@settings(max_examples=50, deadline=None)
def test_what_is_planned_comes_back(axes, data):
    found, _ = made(swept(**axes))
    with tempfile.TemporaryDirectory() as folder:
        whole = data.draw(st.integers(0, len(found)))
        plan_units(Path(folder), found[:whole])
        plan_units(Path(folder), found[whole:], spec="all of it")
        assert list(planned_units(Path(folder))) == found
        assert planned_specs(Path(folder)) == {"all of it"}


@given(first=axes, more=axes)
@settings(max_examples=50, deadline=None)
def test_a_plan_grows_by_what_is_new(first, more):
    """Along any axes, and whatever the order."""
    small, large = swept(**first), swept(**{axis: more[axis] + first[axis] for axis in AXES})
    with tempfile.TemporaryDirectory() as folder:
        planned(small, Path(folder))
        before = list(planned_units(Path(folder)))
        planned(large, Path(folder))
        found = list(planned_units(Path(folder)))
    assert found[: len(before)] == before
    assert there(found) == wanted(large)
    assert len({unit.name for unit in found}) == len(found)


# Sizes: MOST_ITEMS is 256, FEWEST_UNITS 32, SHORTEST_SECONDS 10 -------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "seconds", "minutes", "sizes"),
    [
        (640, 60, 5, [5] * 128),  # five minutes each
        (640, 60, 10, [10] * 64),
        (640, 60, 0.5, [1] * 640),
        (10, 60, 1.5, [1] * 10),  # a 32nd is less than an item
        (64, 60, 5, [2] * 32),  # a 32nd is less than five minutes
        (63, 60, 60, [1] * 63),  # with two in each there were 32, but of 62 no more than 31
        (66, 60, 60, [2] * 33),
        (8, 1, 5, [8]),  # a 32nd is less than ten seconds
        (100, 1, 5, [10] * 10),
        (105, 1, 5, [10] * 10 + [5]),
        (640, 1, 5, [20] * 32),
        (100, 1, 0.05, [3] * 33 + [1]),  # three seconds are asked for
        (3, 10_000, 5, [1] * 3),  # an item is longer than five minutes
        (1000, 0.001, 5, [256, 256, 256, 232]),
        (1000, 0, 5, [256, 256, 256, 232]),
        (25_600, 1, 60, [256] * 100),  # a 32nd are 800 items
    ],
)
def test_units_are_some_minutes_long(items, seconds, minutes, sizes):
    """An item of 20 forwards."""
    for axes in ({"seeds": items}, {"prompts": list(map(str, range(items)))}):
        found, probed = made(sweep := swept(**axes, unit_minutes=minutes), seconds=seconds / 20, forwards=20)
        assert [len(unit) for unit in found] == sizes
        assert estimate(sweep, probed, 1).units == len(sizes)


def test_an_item_is_as_long_as_schedules_of_one_shape_are_in_the_mean():
    """2 s and 4 s: 600 s in all, a 32nd are 18.75 s, 6 items of 3 s; and by themselves 20 items of 1 s."""
    schedules = [{"steps": 5}, {"steps": 9}, {"sampling": "early", "steps": 5}]
    found, _ = made(swept(prompts=list(map(str, range(100))), schedules=schedules), seconds=0.5, forwards=[4, 2, 8])
    of_five = [len(unit) for unit in found if unit.schedules[0]["steps"] == 5]
    assert of_five == [6] * 33 + [2]
    assert [len(unit) for unit in found[len(of_five) :]] == [10] * 10
    assert {how["sampling"] for how in found[0].schedules} == {"uniform", "early"}


def test_units_are_as_long_on_every_model():
    sweep = swept(seeds=6, models=["slow", "fast"])
    probed = {
        source: Probe(sweep, seconds=1, forwards=20 if source.model == "slow" else 5).probed for source in sweep.models
    }
    assert [(unit.model["model"], len(unit)) for unit in units(sweep, probed)] == [("slow", 1)] * 6 + [("fast", 2)] * 3


def test_a_prompts_items_are_together():
    """Model by model and shape by shape; the prompt's schedules, and of each the seeds."""
    sweep = swept(
        prompts=["a", "b"],
        seeds=[7, 8],
        models=["m", "n"],
        schedules=[{"steps": 4}, [3, 2], {"sampling": "early", "steps": 4}],
    )
    found, _ = made(sweep, seconds=1, forwards=2)
    assert [unit.name for unit in found] == ["m-00000", "m-00001", "m-00002", "n-00000", "n-00001", "n-00002"]
    assert found[0].items == ((0, 0, 7), (0, 0, 8), (0, 1, 7), (0, 1, 8), (1, 0, 7))
    assert found[0].prompts == ("a", "b")
    assert [how["sampling"] for how in found[0].schedules] == ["uniform", "early"]
    assert found[1].describe(0) == {
        "prompt": "b",
        "seed": 8,
        "schedule": {"sampling": "uniform", "steps": 4, "gamma": 0.0, "guidance": None},
    }
    assert [found[2].describe(item)["schedule"]["sampling"] for item in range(4)] == [[3, 2]] * 4
    assert dict(found[0].model) == Source(model="m").model_dump()


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/stable-diffusion-v1.5"], ["stable-diffusion-v1-5-00000"]),
        (["a/x", "b/x", "x"], ["x-00000", "x-00001", "x-00002"]),
        ([{"model": "x"}, {"model": "x", "dtype": "float16"}], ["x-00000", "x-00001"]),
        (["./my model (2)/"], ["my-model-2-00000"]),
        (["..", "/", "-"], ["model-00000", "model-00001", "model-00002"]),
        (["модель"], ["модель-00000"]),
    ],
)
def test_units_are_named_by_their_models(path, models, names):
    found, _ = made(swept(models=models))
    assert [unit.name for unit in found] == names
    for name in names:
        assert re.fullmatch(r"\w[\w.-]*", name), "which is a file's name"


# A plan ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_planned_once(path):
    """By the second time nothing is measured and nothing written."""
    sweep, probe = swept(**SOME), Probe(swept(**SOME))
    first = prepare(sweep, path, probe)
    assert probe.asked == ["one/x.y", "one/x.y"], "each model once"
    assert there(first) == wanted(sweep)
    assert first == list(planned_units(path))
    assert planned_specs(path) == {sweep.digest}
    before = written(path)
    assert prepare(swept(**SOME, unit_minutes=1), path, unprobed) == first
    assert prepare(sweep, path, unprobed, retry_failed=True) == first
    assert written(path) == before


def test_an_order_of_another_sweep_has_nothing_new(path):
    first = planned(swept(**SOME), path)
    turned = swept(**{axis: values[::-1] for axis, values in SOME.items()})
    assert planned(turned, path) == first
    assert prepare(turned, path, unprobed) == first
    assert planned_specs(path) == {swept(**SOME).digest, turned.digest}


@pytest.mark.parametrize("axis", AXES)
def test_growing_an_axis_adds_its_items_and_no_more(path, axis):
    small, large = swept(**SOME), swept(**SOME | {axis: AXES[axis][:3]})
    before, probe = planned(small, path), Probe(large)
    plan = (path / "plan.jsonl").read_bytes()
    found = prepare(large, path, probe)
    assert len(probe.asked) == len(large.models)
    assert (path / "plan.jsonl").read_bytes().startswith(plan), "lines are only added"
    assert found[: len(before)] == before
    assert there(found[len(before) :]) == wanted(large) - wanted(small)
    assert not {unit.name for unit in found[len(before) :]} & {unit.name for unit in before}
    assert prepare(small, path, unprobed) == found, "the smaller one is in the plan as well"
    assert prepare(large, path, unprobed) == found


def test_new_items_fill_units_of_their_own(path):
    """Names go on where they stopped, model by model."""
    sweep = swept(seeds=3, models=["m", "n"])
    prepare(sweep, path, Probe(sweep, seconds=10, forwards=1))
    assert [unit.name for unit in planned_units(path)] == [
        "m-00000",
        "m-00001",
        "m-00002",
        "n-00000",
        "n-00001",
        "n-00002",
    ]
    larger = swept(seeds=5, models=["m", "n"])
    found = prepare(larger, path, Probe(larger, seconds=5, forwards=1))
    assert [(unit.name, [seed for _, _, seed in unit.items]) for unit in found[6:]] == [
        ("m-00003", [3, 4]),
        ("n-00003", [3, 4]),
    ]


@pytest.mark.parametrize(
    ("axis", "said"),
    [
        ("prompts", 'has the prompt "a dog\\n“barks”", which the sweep has no more'),
        ("seeds", "has the seed 0, which the sweep has no more"),
        ("schedules", 'has the schedule {"sampling": "early", "steps": 5, "gamma": 60.0, "guidance": 2.0}, which'),
        (
            "models",
            'has the model {"model": "one/x.y", "dtype": "float16", "variant": null, "revision": null, "ra…, which',
        ),
    ],
)
def test_a_sweep_does_not_shrink(path, axis, said):
    """Even where it grows elsewhere."""
    planned(swept(**SOME), path)
    before = written(path)
    for smaller in (SOME | {axis: AXES[axis][:1]}, AXES | {axis: [AXES[axis][0], *AXES[axis][2:]]}):
        with pytest.raises(ValueError, match="a sweep may grow, not shrink; use another folder") as refused:
            prepare(swept(**smaller), path, unprobed)
        assert str(refused.value).startswith(f"{path} {said}")
        assert "\n" not in str(refused.value)
    assert written(path) == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"negative_prompt": "ugly"}, 'negative_prompt "", now "ugly"'),
        ({"behaviour": "xdiffusion"}, 'behaviour "paper", now "xdiffusion"'),
        ({"previews": True}, "previews false, now true"),
        ({"compression": "none"}, 'compression "gzip", now "none"'),
        ({"mantissa_bits": 9}, "mantissa_bits 23, now 9"),
        ({"explainers": "cam"}, 'explainers [{"explainer": "Random", "name": "random"}], now [{"explainer": "Cam", '),
    ],
)
def test_other_settings_are_refused(path, changed, said):
    planned(swept(**SOME), path)
    before = written(path)
    for grown in ({}, {"seeds": AXES["seeds"]}):
        with pytest.raises(ValueError, match="was begun with other settings") as refused:
            prepare(swept(**SOME | changed | grown), path, unprobed)
        assert str(refused.value).startswith(f"{path} was begun with other settings: {said}")
        assert str(refused.value).endswith("; use those, or another folder")
    assert written(path) == before


def test_a_folder_that_is_of_no_sweep_is_refused(path, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    for place, said in (
        (tmp_path / "other", "is not a run folder, and not empty"),
        (tmp_path / "other/file", "is a file"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(swept(), place, unprobed)
    store.Folder(path)
    with pytest.raises(ValueError, match='was begun with other settings: negative_prompt null, now ""'):
        prepare(swept(), path, unprobed)


def test_an_empty_folder_will_do(path):
    path.mkdir()
    assert len(planned(swept(), path)) == 1


@pytest.mark.parametrize("bad", [0, 1])
def test_nothing_is_written_where_a_model_is_not_possible(path, bad):
    sweep = swept(**SOME)

    def ask(source):
        if source == sweep.models[bad]:
            raise ValueError("no such model")
        return Probe(sweep)(source)

    with pytest.raises(ValueError, match="no such model"):
        prepare(sweep, path, ask)
    assert not path.exists()
    planned(swept(**SOME | {"models": [sweep.models[1 - bad]]}), path)
    before = written(path)
    with pytest.raises(ValueError, match="no such model"):
        prepare(sweep, path, ask)
    assert written(path) == before


def test_what_a_folder_has_is_checked_by_itself(path):
    planned(swept(**SOME), path)
    folder = store.Folder(path)
    check_same(swept(**SOME), folder)
    check_same(swept(**AXES), folder)
    with pytest.raises(ValueError, match="has the prompt"):
        check_same(swept(**SOME | {"prompts": "a cat"}), folder)
    planned(swept(**AXES), path)
    check_same(swept(**SOME), folder), "which is planned"


def test_a_plan_that_was_cut_off_anywhere_is_completed(path):
    """In the middle of a line or of a letter, or before it says that it is whole."""
    sweep = swept(prompts=SOME["prompts"], schedules=["early", [9, 4]], models=["x", "y"])
    planned(sweep, path)
    plan = path / "plan.jsonl"
    whole = plan.read_bytes()
    lines = list(itertools.accumulate(map(len, whole.splitlines(keepends=True))))
    assert len(lines) > 3
    cuts = {end + near for end in lines for near in (-2, -1, 0, 1)} | {whole.index("“".encode()) + 1}
    for size in sorted(cut for cut in {*cuts, *range(0, len(whole), 29)} if cut < len(whole) - 1):
        plan.write_bytes(whole[:size])
        kept = sum(end - 1 <= size for end in lines)
        probe = Probe(sweep)
        found = prepare(sweep, path, probe)
        assert probe.asked == ["x", "y"]
        assert there(found) == wanted(sweep), f"cut off after {size} bytes"
        assert len({unit.name for unit in found}) == len(found)
        assert plan.read_bytes().startswith(whole[:size])
        assert plan.read_bytes().splitlines()[:kept] == whole.splitlines()[:kept]
        assert prepare(sweep, path, unprobed) == found
    plan.write_bytes(whole[:-1])
    assert there(prepare(sweep, path, unprobed)) == wanted(sweep), "of the last line its end only"


def test_a_grown_plan_that_was_cut_off_is_completed(path):
    small, large = swept(**LEAST), swept(**SOME)
    planned(small, path)
    size = (path / "plan.jsonl").stat().st_size
    planned(large, path)
    whole = (path / "plan.jsonl").read_bytes()
    for cut in range(size, len(whole) - 1, 50):
        (path / "plan.jsonl").write_bytes(whole[:cut])
        assert there(planned(large, path)) == wanted(large)
        (path / "plan.jsonl").write_bytes(whole[:cut])
        assert there(prepare(small, path, unprobed)) <= wanted(large)


def test_several_processes_plan_once(path):
    """All of them have measured the models before the first of them plans; all then try again what was set aside."""
    run = subprocess.run([sys.executable, "-c", PLAN_AT_ONCE, path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *first, again = planned_units(path)
    assert (again.retry_of, len(again)) == (first[0].name, 1)
    assert there(first) == wanted(swept(**SOME))
    names = [unit.name for unit in first]
    assert run.stdout.splitlines() == [" ".join([*names, *names[1:], again.name])] * 3
    assert prepare(swept(**SOME), path, unprobed) == [*first[1:], again], "whoever plans elsewhere means the same"


def test_who_plans_is_alone(path):
    """Another process plans between the measuring and the planning of this one."""
    small, large = swept(**SOME), swept(**SOME | {"seeds": AXES["seeds"]})

    def late(source):
        planned(small, path)
        return Probe(large)(source)

    found = prepare(large, path, late)
    assert there(found) == wanted(large)
    assert len({unit.name for unit in found}) == len(found)


def test_who_plans_late_is_refused_all_the_same(path):
    """Another process has made the folder, of another sweep, while this one measured."""

    def late(source):
        planned(swept(**SOME), path)
        return Probe(swept())(source)

    for other, said in ((swept(previews=True), "previews false, now true"), (swept(seeds=3), "a sweep may grow")):
        with pytest.raises(ValueError, match=said):
            prepare(other, path, late)
        assert there(planned_units(path)) == wanted(swept(**SOME))


# What it costs --------------------------------------------------------------------------------------------------------


def test_what_a_sweep_costs(path):
    """Six items a model and schedule.

    Of 5 and 10 s on the first: two and one of them are 10 s, in 3 and 6 units. Of 20 and 40 s on the second: 6 and 6.
    Seconds: 6 (5 + 10 + 20 + 40) = 450, on two workers 225.
    """
    sweep = swept(prompts=["a", "b"], seeds=3, models=["m", "n"], schedules=[{"steps": 5}, {"steps": 8}])
    probed = {
        sweep.models[0]: Probed("gpu", 0.5, (Kind(5, 10, 100), Kind(8, 20, 200))),
        sweep.models[1]: Probed("cpu", 2.0, (Kind(5, 10, 100), Kind(8, 20, 300))),
    }
    found = estimate(sweep, probed, 2)
    assert (found.items, found.units, found.forwards, found.nbytes) == (24, 21, 360, 4200)
    assert found.hours == pytest.approx(225 / 3600)
    assert (found.workers, found.devices) == (2, ("gpu", "cpu"))
    assert len(list(units(sweep, probed))) == 21
    same = dict.fromkeys(sweep.models, probed[sweep.models[0]])
    assert (estimate(sweep, same, 1).devices, estimate(sweep, same, 1).hours) == (("gpu",), pytest.approx(0.05))


# Trying again ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def five(path):
    """A sweep of units of 5 items and 1; of the first two items have been set aside, and others are in trouble."""
    sweep = swept(prompts=["a", "b", "c"], seeds=2, schedules=[{"steps": 4}])
    prepare(sweep, path, Probe(sweep, seconds=2, forwards=1))
    first, _ = planned_units(path)
    assert [len(unit) for unit in planned_units(path)] == [5, 1]
    set_aside(path, first, 3, 1)
    FailureLog(path, first).failed([0], "perhaps")
    FailureLog(path, first).failed([2, 4], "who knows")
    return sweep


def states(path):
    return {(one.unit, one.item): one.state for one in failures(path)}


def test_what_was_set_aside_is_planned_again_where_it_is_asked_for(path, five):
    first, second = before = prepare(five, path, unprobed)
    assert len(before) == 2
    found = prepare(five, path, unprobed, retry_failed=True)
    assert found[:2] == before
    (again,) = found[2:]
    assert (again.name, again.retry_of, again.model) == ("shapes-00000-again1", "shapes-00000", first.model)
    assert [again.describe(item) for item in range(len(again))] == [first.describe(3), first.describe(1)]
    assert states(path) == {(first.name, 3): "retried", (first.name, 1): "retried"} | {
        (first.name, 0): "failed",
        (first.name, 2): "suspect",
        (first.name, 4): "suspect",
    }
    retried = next(one for one in failures(path) if one.item == 3)
    assert (retried.described, retried.errors) == (first.describe(3), ("item 3 is broken",))
    assert prepare(five, path, unprobed, retry_failed=True) == found, "there is nothing more to try"
    assert list(planned_units(path)) == [first, second, again]


def test_what_was_set_aside_again_is_tried_again(path, five):
    *_, again = prepare(five, path, unprobed, retry_failed=True)
    set_aside(path, again, 1)
    assert len(prepare(five, path, unprobed)) == 3
    *_, third = prepare(five, path, unprobed, retry_failed=True)
    assert (third.name, third.retry_of, len(third)) == ("shapes-00000-again2", "shapes-00000", 1)
    assert (
        third.describe(0)
        == again.describe(1)
        == {
            "prompt": "a",
            "seed": 1,
            "schedule": {"sampling": "uniform", "steps": 4, "gamma": 0.0, "guidance": None},
        }
    )
    assert states(path)[again.name, 1] == "retried"
    set_aside(path, third, 0)
    *_, left, fourth = prepare(five, path, unprobed, retry_failed=True)
    assert [fourth.name, left.name] == ["shapes-00000-again3", "shapes-00000-again1"], "of the third nothing is left"


def test_items_that_are_tried_again_are_no_more_of_the_sweep(path, five):
    *_, again = prepare(five, path, unprobed, retry_failed=True)
    larger = swept(prompts=["a", "b", "c", "d"], seeds=2, schedules=[{"steps": 4}])
    found = planned(larger, path)
    assert there(unit for unit in found if not unit.retry_of) == wanted(larger)
    assert [unit.name for unit in found if unit.retry_of] == [again.name]
    with pytest.raises(ValueError, match="has the prompt"):
        planned(swept(prompts=["a"], seeds=2, schedules=[{"steps": 4}]), path)


def test_several_units_are_tried_again(path, five):
    _, second = planned_units(path)
    set_aside(path, second, 0)
    found = prepare(five, path, unprobed, retry_failed=True)
    assert [(unit.name, len(unit)) for unit in found if unit.retry_of] == [
        ("shapes-00000-again1", 2),
        ("shapes-00001-again1", 1),
    ]
    assert second not in found, "all of it was set aside"


def test_growing_and_trying_again_go_together(path, five):
    larger = swept(prompts=["a", "b", "c", "d"], seeds=2, schedules=[{"steps": 4}])
    found = planned(larger, path, retry_failed=True)
    assert there(unit for unit in found if not unit.retry_of) == wanted(larger)
    assert [len(unit) for unit in found if unit.retry_of] == [2]


def test_what_was_set_aside_later_is_tried_again_apart(path, five):
    *_, again = prepare(five, path, unprobed, retry_failed=True)
    set_aside(path, again, 0)
    set_aside(path, next(planned_units(path)), 4)
    *_, third, fourth = prepare(five, path, unprobed, retry_failed=True)
    assert [third.name, fourth.name] == ["shapes-00000-again2", "shapes-00000-again3"]
    assert {third.describe(0)["prompt"], fourth.describe(0)["prompt"]} == {"b", "c"}


@pytest.mark.parametrize("step", ["plan_units", "mark_rescheduled"])
def test_what_was_set_aside_is_not_lost_to_a_kill(path, five, monkeypatch, step):
    """Before the new unit is planned, or before its items are marked: they are then planned twice."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if step == "mark_rescheduled":
            patched.setattr(store.FailureLog, "mark_rescheduled", killed)
        else:
            patched.setattr(store, "plan_units", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(five, path, unprobed, retry_failed=True)
    found = prepare(five, path, unprobed, retry_failed=True)
    assert Counter(states(path).values())["retried"] == 2
    assert {len(unit) for unit in found if unit.retry_of} == {2}
    assert len({unit.name for unit in found}) == len(found)


# What is left ---------------------------------------------------------------------------------------------------------


def test_units_are_left_until_they_are_closed(path):
    sweep = swept(seeds=3, models=["m"])
    first, second, third = planned(sweep, path)
    (path / "segments" / f"{first.name}.1.part.h5").touch()
    (path / "segments" / f"{second.name}.4.h5").touch()
    assert prepare(sweep, path, unprobed) == [first, third]
    assert list(units_left(path, {first.name, third.name})) == [second]
    assert list(units_left(path, [])) == [first, second, third]


def test_a_unit_of_which_all_was_set_aside_is_not_left(path):
    sweep = swept(seeds=2)
    prepare(sweep, path, Probe(sweep, seconds=1, forwards=1))
    (unit,) = planned_units(path)
    FailureLog(path, unit).failed([0], "once")
    FailureLog(path, unit).failed([0, 1], "both")
    assert list(units_left(path, [])) == [unit], "they may yet do"
    set_aside(path, unit, 0)
    assert list(units_left(path, [])) == [unit], "the other one may yet do"
    set_aside(path, unit, 1)
    assert list(units_left(path, [])) == []
    (again,) = prepare(sweep, path, unprobed, retry_failed=True)
    assert (len(again), again.retry_of) == (2, unit.name)


def test_nothing_is_left_of_no_plan(tmp_path):
    assert list(planned_units(tmp_path)) == list(units_left(tmp_path, [])) == list(failures(tmp_path)) == []
    assert planned_specs(tmp_path) == set()


# The plan's lines -----------------------------------------------------------------------------------------------------

HOW = Schedule(steps=4).model_dump(mode="json")
UNIT = Unit(
    "u", {"model": "m"}, (HOW, HOW | {"steps": 5}), ("a", "b"), ((1, 0, 9), (0, 1, 7), (1, 1, 2**63 - 1), (0, 0, 0))
)


def test_a_units_line_says_all_of_it(tmp_path):
    plan_units(tmp_path, [UNIT])
    assert json.loads((tmp_path / "plan.jsonl").read_text()) == {
        "name": "u",
        "model": {"model": "m"},
        "schedules": [HOW, HOW | {"steps": 5}],
        "prompts": ["a", "b"],
        "items": [[1, 0, 9], [0, 1, 7], [1, 1, 2**63 - 1], [0, 0, 0]],
        "retry_of": "",
    }
    assert list(planned_units(tmp_path)) == [UNIT]
    assert UNIT.describe(1) == {"prompt": "a", "seed": 7, "schedule": HOW | {"steps": 5}}
    assert len(UNIT) == 4


def test_plans_are_added_each_with_its_digest(tmp_path):
    again = dataclasses.replace(UNIT, name="u-again1", retry_of="u")
    plan_units(tmp_path, [UNIT], spec="one")
    plan_units(tmp_path, [], spec="two")
    plan_units(tmp_path, [again])
    assert planned_specs(tmp_path) == {"one", "two"}
    assert list(planned_units(tmp_path)) == [UNIT, again]


@pytest.mark.parametrize("torn", [b'{"name": "v", "pro', b'{"planned": "on', b"\xe2\x80", b"\0\0\0", b"{", b""])
def test_a_line_that_was_cut_off_is_passed_over(tmp_path, torn):
    plan_units(tmp_path, [UNIT])
    with (tmp_path / "plan.jsonl").open("ab") as file:
        file.write(torn)
    assert (list(planned_units(tmp_path)), planned_specs(tmp_path)) == ([UNIT], set())
    plan_units(tmp_path, [dataclasses.replace(UNIT, name="v")], spec="one")
    assert [unit.name for unit in planned_units(tmp_path)] == ["u", "v"]
    assert planned_specs(tmp_path) == {"one"}


@given(text=st.text())
@settings(max_examples=50, deadline=None)
def test_a_line_is_one_line_whatever_the_prompt(text):
    unit = dataclasses.replace(UNIT, prompts=(text, "b"))
    with tempfile.TemporaryDirectory() as folder:
        plan_units(Path(folder), [unit, unit], spec="one")
        assert (Path(folder) / "plan.jsonl").read_bytes().count(b"\n") == 3
        assert list(planned_units(Path(folder))) == [unit, unit]


def test_where_nothing_can_be_written_a_line_says_so(tmp_path):
    with pytest.raises(store.StoreError, match=r"cannot write .*plan.jsonl: the folder does not exist"):
        plan_units(tmp_path / "none", [UNIT])
    with pytest.raises(store.StoreError, match=r"cannot write .*failures: the folder does not exist"):
        FailureLog(tmp_path / "none", UNIT)
    (tmp_path / "failures").write_text("")
    with pytest.raises(store.StoreError, match=r"cannot write .*failures"):
        FailureLog(tmp_path, UNIT)
    release_units(tmp_path, ["u"])  # whatever ends a run is not hidden by this


# FailureLog: of each process its own, from the disk -------------------------------------------------------------------


def seen(folder):
    """What a fresh process knows."""
    return {one.item: (one.state, *one.errors) for one in failures(folder)}


def test_one_alone_is_set_aside_at_its_second_time(tmp_path):
    (found,) = FailureLog(tmp_path, UNIT).failed([2], "first")
    assert found == store.Failure("u", 2, UNIT.describe(2), "failed", ("first",))
    assert list(failures(tmp_path)) == [found]
    troubles = FailureLog(tmp_path, UNIT)
    assert (list(troubles.suspects), troubles.quarantined) == ([2], set())
    (found,) = troubles.failed([2], "second")
    assert found == store.Failure("u", 2, UNIT.describe(2), "quarantined", ("first", "second"))
    for known in (troubles, FailureLog(tmp_path, UNIT)):
        assert (list(known.suspects), known.quarantined) == ([], {2})
    assert list(failures(tmp_path)) == [found]


def test_one_alone_is_set_aside_at_once_where_it_is_for_good(tmp_path):
    FailureLog(tmp_path, UNIT).failed([1], "no such word", for_good=True)
    assert seen(tmp_path) == {1: ("quarantined", "no such word")}


def test_several_are_suspects_until_each_has_failed_alone(tmp_path):
    assert [one.state for one in FailureLog(tmp_path, UNIT).failed([0, 1, 3], "crash", for_good=True)] == [
        "suspect"
    ] * 3
    assert seen(tmp_path) == {0: ("suspect",), 1: ("suspect",), 3: ("suspect",)}, "nobody's error"
    FailureLog(tmp_path, UNIT).failed([3], "first")
    FailureLog(tmp_path, UNIT).failed([0, 3], "crash")
    assert seen(tmp_path) == {0: ("suspect",), 1: ("suspect",), 3: ("failed", "first")}
    troubles = FailureLog(tmp_path, UNIT)
    assert (set(troubles.suspects), troubles.quarantined) == ({0, 1, 3}, set())
    troubles.failed([3], "second")
    troubles.failed([0], "no such word", for_good=True)
    assert seen(tmp_path) == {
        0: ("quarantined", "no such word"),
        1: ("suspect",),
        3: ("quarantined", "first", "second"),
    }
    assert (list(troubles.suspects), troubles.quarantined) == ([1], {0, 3})


def test_suspects_that_have_failed_come_last(tmp_path):
    """So that others are done before they end the process once more."""
    FailureLog(tmp_path, UNIT).failed([0], "first")
    FailureLog(tmp_path, UNIT).failed([0, 3, 1], "crash")
    assert list(FailureLog(tmp_path, UNIT).suspects) == [3, 1, 0]


def test_one_that_was_in_hand_alone_is_to_blame_for_a_crash(tmp_path):
    FailureLog(tmp_path, UNIT).take([0, 1, 2])
    FailureLog(tmp_path, UNIT).take([3])
    (found,) = FailureLog(tmp_path, UNIT).recover([1, 2, 3])
    assert (found.item, found.state, found.errors) == (
        3,
        "failed",
        ("its process crashed, or was ended because it no longer responded",),
    )
    assert FailureLog(tmp_path, UNIT).recover([1, 2, 3]) == [], "once"
    FailureLog(tmp_path, UNIT).take([3])
    (found,) = FailureLog(tmp_path, UNIT).recover([1, 2, 3])
    assert (found.state, len(found.errors)) == ("quarantined", 2)


@pytest.mark.parametrize(
    ("left", "blamed"),
    [
        ([0, 1, 2, 3], {0: "suspect", 1: "suspect", 3: "suspect"}),
        ([1, 2, 3], {1: "suspect", 3: "suspect"}),
        ([2, 3], {3: "failed"}),
        ([2], {}),
        ([], {}),
    ],
)
def test_of_several_those_that_are_left_are_suspects(tmp_path, left, blamed):
    FailureLog(tmp_path, UNIT).take([0, 1, 3])
    found = FailureLog(tmp_path, UNIT).recover(left)
    assert {one.item: one.state for one in found} == blamed
    assert {item: state for item, (state, *_) in seen(tmp_path).items()} == blamed
    assert FailureLog(tmp_path, UNIT).recover([0, 1, 2, 3]) == []


def test_nobody_is_to_blame_for_what_was_put_down(tmp_path):
    troubles, other = FailureLog(tmp_path, UNIT), FailureLog(tmp_path, dataclasses.replace(UNIT, name="v"))
    assert troubles.recover([0, 1]) == [], "nothing was ever in hand"
    other.take([1])
    for put_down in (troubles.release, troubles.settle, lambda: release_units(tmp_path, ["none", "u"])):
        troubles.take([0])
        put_down()
        assert FailureLog(tmp_path, UNIT).recover([0, 1]) == []
        put_down()
    assert [one.unit for one in other.recover([0, 1])] == ["v"]
    assert [one.unit for one in failures(tmp_path)] == ["v"]


def test_nobody_is_to_blame_where_it_is_not_known(tmp_path):
    troubles = FailureLog(tmp_path, UNIT)
    troubles.take([0])
    (in_hand,) = (tmp_path / "failures").iterdir()
    in_hand.write_text("[0, ")
    assert troubles.recover([0, 1]) == []


def test_what_is_in_hand_is_no_failure(tmp_path):
    FailureLog(tmp_path, UNIT).take([0])
    assert list(failures(tmp_path)) == []
    release_units(tmp_path / "none", ["u"])


def test_what_is_not_set_aside_has_worked_after_all(tmp_path):
    troubles = FailureLog(tmp_path, UNIT)
    troubles.failed([0], "for good", for_good=True)
    troubles.mark_rescheduled([0])
    troubles.failed([1], "once")
    troubles.failed([2, 3], "who knows")
    troubles.failed([3], "for good", for_good=True)
    troubles.settle()
    assert seen(tmp_path) == {0: ("retried", "for good"), 3: ("quarantined", "for good")}
    assert (troubles.quarantined, list(troubles.suspects)) == ({0, 3}, [])


def test_no_failures_leave_nothing_behind(tmp_path):
    troubles = FailureLog(tmp_path, UNIT)
    troubles.failed([0, 1], "who knows")
    troubles.take([0])
    troubles.settle()
    assert list((tmp_path / "failures").iterdir()) == []
    troubles.settle()
    troubles.mark_rescheduled([])
    assert list((tmp_path / "failures").iterdir()) == []


def test_what_is_tried_again_elsewhere_is_not_tried_here(tmp_path):
    troubles = FailureLog(tmp_path, UNIT)
    troubles.failed([0], "for good", for_good=True)
    troubles.failed([1], "once")
    troubles.mark_rescheduled([0])
    assert seen(tmp_path) == {0: ("retried", "for good"), 1: ("failed", "once")}
    for known in (troubles, FailureLog(tmp_path, UNIT)):
        assert (known.quarantined, list(known.suspects)) == ({0}, [1])


def test_failures_are_told_by_unit(tmp_path):
    for name in ("v", "u", "w-again1"):
        FailureLog(tmp_path, dataclasses.replace(UNIT, name=name)).failed([3, 1], "who knows")
    FailureLog(tmp_path, dataclasses.replace(UNIT, name="x")).take([1])
    (tmp_path / "failures/u.json.1.new").write_text("[")
    assert [(one.unit, one.item) for one in failures(tmp_path)] == [
        (name, item) for name in ("u", "v", "w-again1") for item in (3, 1)
    ]


def test_what_a_worker_is_at_is_tried_again_another_time(path, five):
    """It may be just about to record another failure."""
    first = next(planned_units(path))
    before = states(path)
    with store.Folder(path).hold(first.name):
        assert not any(unit.retry_of for unit in prepare(five, path, unprobed, retry_failed=True))
    assert states(path) == before
    assert any(unit.retry_of for unit in prepare(five, path, unprobed, retry_failed=True))


def test_that_all_is_planned_is_written_when_all_is_on_the_disk(path, monkeypatch):
    calls = []
    monkeypatch.setattr("dfengine.store.run.units.append_lines", lambda path, lines: calls.append(list(lines)))
    planned(swept(seeds=3, models=["m"]), path)
    assert [len(lines) for lines in calls] == [3, 1]
    assert "planned" in calls[1][0]


def test_lines_that_are_no_units_are_passed_over(path):
    sweep = swept(seeds=3, models=["m"])
    units = planned(sweep, path)
    with (path / "plan.jsonl").open("a") as file:
        file.write('3\nnull\n{"name": "x"}\n[]\n{"name": "y", "items": 4, "schedules": [], "prompts": []}\n')
    assert prepare(sweep, path, unprobed) == units


def test_a_folder_that_another_process_just_makes_is_free(tmp_path):
    for name in ("plan.jsonl", "manifest.jsonl"):
        (tmp_path / name).touch()
    for name in ("segments", "failures"):
        (tmp_path / name).mkdir()
    store.check_free(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(store.StoreError, match="is not a run folder, and not empty"):
        store.check_free(tmp_path)
