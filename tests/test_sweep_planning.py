"""The plan of a sweep, which only grows, even under concurrency and kills, and the failure log."""

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
from hypothesis import given
from hypothesis import strategies as st

from dfengine import Random, store
from dfengine.store import (
    FailureLog,
    Folder,
    Unit,
    failures,
    plan_units,
    planned_specs,
    planned_units,
    release_units,
    units_left,
)
from dfengine.sweep.events import ItemCost, ModelProfile
from dfengine.sweep.planning import check_compatible, estimate, make_units, prepare
from dfengine.sweep.running import outcome
from dfengine.sweep.spec import ModelSpec, Schedule, Sweep

ROOT = Path(__file__).parent.parent

#: The axes along which a sweep grows and shrinks: it has at least one value of each.
AXES = {
    "prompts": ["a cat", "a dog\n“barks”", "a \x85 cow"],
    "seeds": [3, 0, 2**63 - 1],
    "schedules": [
        {"num_steps": 5},
        {"sampling": "early", "num_steps": 5, "guidance": 2},
        {"sampling": [9, 4]},
        {"num_steps": 2},
    ],
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
from test_sweep_planning import SOME, Profiler, make_sweep, quarantine

PATH, SWEEP = Path(sys.argv[1]), make_sweep(**SOME)


def slowly(*arguments, plan_units=store.plan_units, **options):
    time.sleep(0.1)
    plan_units(*arguments, **options)


def profile(model):
    together.wait(60)
    return Profiler(SWEEP)(model)


def plan():
    store.plan_units = slowly
    names = [unit.name for unit in prepare(SWEEP, PATH, profile)]
    together.wait(60)
    quarantine(PATH, next(store.planned_units(PATH)), 0)
    together.wait(60)
    names += [unit.name for unit in prepare(SWEEP, PATH, profile, retry_failed=True)]
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


def make_sweep(**keys):
    return Sweep(**{"prompts": "a cat", "explainers": Random()} | keys)


class Profiler:
    """Returns the same profile for every model, with `seconds` per forward, and records the models."""

    def __init__(self, sweep, seconds=1.0, forwards=60):
        self.profiled = []
        counts = forwards if isinstance(forwards, list) else [forwards] * len(sweep.schedules)
        costs = [ItemCost(how.num_steps, number, 1000) for how, number in zip(sweep.schedules, counts, strict=True)]
        self.profile = ModelProfile("cpu", seconds, tuple(costs))

    def __call__(self, model):
        self.profiled.append(model.model)
        return self.profile


def no_profile(model):
    raise AssertionError(f"{model} was profiled")


def plan_sweep(sweep, path, **options):
    return prepare(sweep, path, Profiler(sweep), **options)


def units_of(sweep, **costs):
    profiles = dict.fromkeys(sweep.models, Profiler(sweep, **costs).profile)
    return list(make_units(sweep, profiles)), profiles


def to_text(model, item):
    return json.dumps([dict(model), item], sort_keys=True)


def items_of(sweep):
    """Every item of a sweep, once."""
    product = itertools.product(sweep.models, sweep.prompts, sweep.seeds, sweep.schedules)
    return Counter(
        to_text(model.model_dump(), {"prompt": prompt, "seed": seed, "schedule": how.model_dump(mode="json")})
        for model, prompt, seed, how in product
    )


def items_in(units):
    """The items of units, with repetitions."""
    return Counter(to_text(unit.model, unit.describe(item)) for unit in units for item in range(len(unit)))


def snapshot(path):
    """Every file of a folder, with its bytes."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in Path(path).rglob("*")
    }


def quarantine(path, unit, *items):
    for item in items:
        with Folder(path).planning():  # writers of failures have a lock, a worker that of its unit
            FailureLog(path, unit).failed([item], f"item {item} is broken", for_good=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


# Units ----------------------------------------------------------------------------------------------------------------


def subsets(axis):
    return st.lists(st.sampled_from(AXES[axis]), min_size=1, max_size=3, unique_by=str)


#: Sweeps are built in the tests: beartype, which checks types there, draws random numbers.
axes = st.fixed_dictionaries(
    {axis: subsets(axis) for axis in AXES} | {"unit_minutes": st.sampled_from([0.001, 1, 2, 5, 1000])}
)


@given(axes=axes, seconds=st.sampled_from([0.0, 1e-6, 0.1, 1.0, 60.0, 1e6]))
def test_units_contain_every_item_once(axes, seconds):
    sweep = make_sweep(**axes)
    result, profiles = units_of(sweep, seconds=seconds)
    assert items_in(result) == items_of(sweep)
    assert len({unit.name for unit in result}) == len(result)
    for unit in result:
        assert 1 <= len(unit) <= 256
        assert len({how["num_steps"] for how in unit.schedules}) == 1, "one file has one number of steps"
        assert {prompt for prompt, _, _ in unit.items} == set(range(len(unit.prompts))), "what it needs, and no more"
        assert {how for _, how, _ in unit.items} == set(range(len(unit.schedules)))
        assert len(set(unit.prompts)) == len(unit.prompts)
        assert not unit.retry_of
    expected = estimate(sweep, profiles, 1)
    assert (expected.items, expected.units) == (sum(map(len, result)), len(result))


@given(axes=axes, data=st.data())
def test_plans_round_trip(axes, data):
    result, _ = units_of(make_sweep(**axes))
    with tempfile.TemporaryDirectory() as folder:
        count = data.draw(st.integers(0, len(result)))
        plan_units(Path(folder), result[:count])
        plan_units(Path(folder), result[count:], spec="all of it")
        assert list(planned_units(Path(folder))) == result
        assert planned_specs(Path(folder)) == {"all of it"}


@pytest.mark.slow
@given(first=axes, more=axes)
def test_a_plan_grows_by_new_items(first, more):
    """Along any axes, in any order."""
    small, large = make_sweep(**first), make_sweep(**{axis: more[axis] + first[axis] for axis in AXES})
    with tempfile.TemporaryDirectory() as folder:
        plan_sweep(small, Path(folder))
        before = list(planned_units(Path(folder)))
        plan_sweep(large, Path(folder))
        result = list(planned_units(Path(folder)))
    assert result[: len(before)] == before
    assert items_in(result) == items_of(large)
    assert len({unit.name for unit in result}) == len(result)


# Sizes: MAX_UNIT_ITEMS is 256, MIN_UNITS 32, MIN_UNIT_SECONDS 10 ------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "seconds", "minutes", "sizes"),
    [
        (640, 60, 5, [5] * 128),  # five minutes each
        (640, 60, 10, [10] * 64),
        (640, 60, 0.5, [1] * 640),
        (10, 60, 1.5, [1] * 10),  # a 32nd is less than an item
        (64, 60, 5, [2] * 32),  # a 32nd is less than five minutes
        (63, 60, 60, [1] * 63),  # two in each would give 32 units, but only 31 for 62 items
        (66, 60, 60, [2] * 33),
        (8, 1, 5, [8]),  # a 32nd is less than ten seconds
        (100, 1, 5, [10] * 10),
        (105, 1, 5, [10] * 10 + [5]),
        (640, 1, 5, [20] * 32),
        (100, 1, 0.05, [3] * 33 + [1]),  # three seconds are requested
        (3, 10_000, 5, [1] * 3),  # an item is longer than five minutes
        (1000, 0.001, 5, [256, 256, 256, 232]),
        (1000, 0, 5, [256, 256, 256, 232]),
        (25_600, 1, 60, [256] * 100),  # a 32nd is 800 items
    ],
)
def test_units_take_some_minutes(items, seconds, minutes, sizes):
    """Each item takes 20 forwards."""
    for axes in ({"seeds": items}, {"prompts": list(map(str, range(items)))}):
        result, profiles = units_of(
            sweep := make_sweep(**axes, unit_minutes=minutes), seconds=seconds / 20, forwards=20
        )
        assert [len(unit) for unit in result] == sizes
        assert estimate(sweep, profiles, 1).units == len(sizes)


def test_the_time_of_an_item_is_the_mean_over_schedules_of_its_length():
    """2 s and 4 s: 600 s in total, of which a 32nd is 18.75 s, or 6 items of 3 s; separately 20 items of 1 s."""
    schedules = [{"num_steps": 5}, {"num_steps": 9}, {"sampling": "early", "num_steps": 5}]
    result, _ = units_of(
        make_sweep(prompts=list(map(str, range(100))), schedules=schedules), seconds=0.5, forwards=[4, 2, 8]
    )
    of_five = [len(unit) for unit in result if unit.schedules[0]["num_steps"] == 5]
    assert of_five == [6] * 33 + [2]
    assert [len(unit) for unit in result[len(of_five) :]] == [10] * 10
    assert {how["sampling"] for how in result[0].schedules} == {"uniform", "early"}


def test_units_take_equally_long_on_every_model():
    sweep = make_sweep(seeds=6, models=["slow", "fast"])
    profiles = {
        model: Profiler(sweep, seconds=1, forwards=20 if model.model == "slow" else 5).profile for model in sweep.models
    }
    assert [(unit.model["model"], len(unit)) for unit in make_units(sweep, profiles)] == [("slow", 1)] * 6 + [
        ("fast", 2)
    ] * 3


def test_the_items_of_a_prompt_are_together():
    """They are ordered by model and shape, then by prompt, schedule and seed."""
    sweep = make_sweep(
        prompts=["a", "b"],
        seeds=[7, 8],
        models=["m", "n"],
        schedules=[{"num_steps": 4}, [3, 2], {"sampling": "early", "num_steps": 4}],
    )
    result, _ = units_of(sweep, seconds=1, forwards=2)
    assert [unit.name for unit in result] == ["m-00000", "m-00001", "m-00002", "n-00000", "n-00001", "n-00002"]
    assert result[0].items == ((0, 0, 7), (0, 0, 8), (0, 1, 7), (0, 1, 8), (1, 0, 7))
    assert result[0].prompts == ("a", "b")
    assert [how["sampling"] for how in result[0].schedules] == ["uniform", "early"]
    assert result[1].describe(0) == {
        "prompt": "b",
        "seed": 8,
        "schedule": {"sampling": "uniform", "num_steps": 4, "gamma": 0.0, "guidance": None},
    }
    assert [result[2].describe(item)["schedule"]["sampling"] for item in range(4)] == [[3, 2]] * 4
    assert dict(result[0].model) == ModelSpec(model="m").model_dump()


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
def test_units_are_named_after_their_models(path, models, names):
    result, _ = units_of(make_sweep(models=models))
    assert [unit.name for unit in result] == names
    for name in names:
        assert re.fullmatch(r"\w[\w.-]*", name), "which is a file's name"


# A plan ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_planned_once(path):
    """Planning again measures and writes nothing."""
    sweep, profiler = make_sweep(**SOME), Profiler(make_sweep(**SOME))
    first = prepare(sweep, path, profiler)
    assert profiler.profiled == ["one/x.y", "one/x.y"], "each model once"
    assert items_in(first) == items_of(sweep)
    assert first == list(planned_units(path))
    assert planned_specs(path) == {sweep.digest}
    before = snapshot(path)
    assert prepare(make_sweep(**SOME, unit_minutes=1), path, no_profile) == first
    assert prepare(sweep, path, no_profile, retry_failed=True) == first
    assert snapshot(path) == before


def test_another_order_adds_nothing(path):
    first = plan_sweep(make_sweep(**SOME), path)
    turned = make_sweep(**{axis: values[::-1] for axis, values in SOME.items()})
    assert plan_sweep(turned, path) == first
    assert prepare(turned, path, no_profile) == first
    assert planned_specs(path) == {make_sweep(**SOME).digest, turned.digest}


@pytest.mark.parametrize("axis", AXES)
def test_growing_an_axis_adds_exactly_its_items(path, axis):
    small, large = make_sweep(**SOME), make_sweep(**SOME | {axis: AXES[axis][:3]})
    before, profiler = plan_sweep(small, path), Profiler(large)
    plan = (path / "plan.jsonl").read_bytes()
    result = prepare(large, path, profiler)
    assert len(profiler.profiled) == len(large.models)
    assert (path / "plan.jsonl").read_bytes().startswith(plan), "lines are only added"
    assert result[: len(before)] == before
    assert items_in(result[len(before) :]) == items_of(large) - items_of(small)
    assert not {unit.name for unit in result[len(before) :]} & {unit.name for unit in before}
    assert prepare(small, path, no_profile) == before, "the smaller one leaves what it does not have to the larger"
    assert prepare(large, path, no_profile) == result


def test_new_items_get_new_units(path):
    """The numbering continues for each model."""
    sweep = make_sweep(seeds=3, models=["m", "n"])
    prepare(sweep, path, Profiler(sweep, seconds=10, forwards=1))
    assert [unit.name for unit in planned_units(path)] == [
        "m-00000",
        "m-00001",
        "m-00002",
        "n-00000",
        "n-00001",
        "n-00002",
    ]
    larger = make_sweep(seeds=5, models=["m", "n"])
    result = prepare(larger, path, Profiler(larger, seconds=5, forwards=1))
    assert [(unit.name, [seed for _, _, seed in unit.items]) for unit in result[6:]] == [
        ("m-00003", [3, 4]),
        ("n-00003", [3, 4]),
    ]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("prompts", 'has the prompt "a dog\\n“barks”", which the sweep no longer has'),
        ("seeds", "has the seed 0, which the sweep no longer has"),
        ("schedules", 'has the schedule {"sampling": "early", "num_steps": 5, "gamma": 60.0, "guidance": 2.0}, which'),
        (
            "models",
            'has the model {"model": "one/x.y", "dtype": "float16", "variant": null, "revision": null, "ra…, which',
        ),
    ],
)
def test_a_sweep_does_not_shrink(path, axis, message):
    """This holds even if the sweep grows along another axis."""
    plan_sweep(make_sweep(**SOME), path)
    before = snapshot(path)
    for smaller in (SOME | {axis: AXES[axis][:1]}, AXES | {axis: [AXES[axis][0], *AXES[axis][2:]]}):
        with pytest.raises(ValueError, match="a sweep can grow, but not shrink; use another folder") as refused:
            prepare(make_sweep(**smaller), path, no_profile)
        assert str(refused.value).startswith(f"{path} {message}")
        assert "\n" not in str(refused.value)
    assert snapshot(path) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"negative_prompt": "ugly"}, 'negative_prompt "", now "ugly"'),
        ({"explainers": "rise"}, 'explainers [{"explainer": "Random", "name": "random"}], now [{"explainer": "Rise", '),
        ({"previews": True}, "previews false, now true"),
        ({"compression": "none"}, 'compression "gzip", now "none"'),
        ({"mantissa_bits": 9}, "mantissa_bits 23, now 9"),
        ({"explainers": "cam"}, 'explainers [{"explainer": "Random", "name": "random"}], now [{"explainer": "Cam", '),
    ],
)
def test_other_settings_are_refused(path, changed, message):
    plan_sweep(make_sweep(**SOME), path)
    before = snapshot(path)
    for grown in ({}, {"seeds": AXES["seeds"]}):
        with pytest.raises(ValueError, match="was begun with other settings") as refused:
            prepare(make_sweep(**SOME | changed | grown), path, no_profile)
        assert str(refused.value).startswith(f"{path} was begun with other settings: {message}")
        assert str(refused.value).endswith("; restore them, or use another folder")
    assert snapshot(path) == before


def test_a_folder_of_something_else_is_refused(path, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("")
    for place, message in (
        (tmp_path / "other", "is not a run folder, and not empty"),
        (tmp_path / "other/file", "is a file"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(make_sweep(), place, no_profile)
    store.Folder(path)
    with pytest.raises(ValueError, match='was begun with other settings: negative_prompt null, now ""'):
        prepare(make_sweep(), path, no_profile)


def test_an_empty_folder_is_accepted(path):
    path.mkdir()
    assert len(plan_sweep(make_sweep(), path)) == 1


@pytest.mark.parametrize("bad", [0, 1])
def test_nothing_is_written_if_a_model_is_not_possible(path, bad):
    sweep = make_sweep(**SOME)

    def profile(model):
        if model == sweep.models[bad]:
            raise ValueError("no such model")
        return Profiler(sweep)(model)

    with pytest.raises(ValueError, match="no such model"):
        prepare(sweep, path, profile)
    assert not path.exists()
    plan_sweep(make_sweep(**SOME | {"models": [sweep.models[1 - bad]]}), path)
    before = snapshot(path)
    with pytest.raises(ValueError, match="no such model"):
        prepare(sweep, path, profile)
    assert snapshot(path) == before


def test_compatibility_is_checked_against_the_plan(path):
    plan_sweep(make_sweep(**SOME), path)
    folder = store.Folder(path)
    check_compatible(make_sweep(**SOME), folder)
    check_compatible(make_sweep(**AXES), folder)
    with pytest.raises(ValueError, match="has the prompt"):
        check_compatible(make_sweep(**SOME | {"prompts": "a cat"}), folder)
    plan_sweep(make_sweep(**AXES), path)
    check_compatible(make_sweep(**SOME), folder), "which is planned"


@pytest.mark.slow
def test_a_plan_truncated_anywhere_is_completed(path):
    """It may end within a line, within a character, or before the line that marks it as complete."""
    sweep = make_sweep(prompts=SOME["prompts"], schedules=["early", [9, 4]], models=["x", "y"])
    plan_sweep(sweep, path)
    plan = path / "plan.jsonl"
    complete = plan.read_bytes()
    lines = list(itertools.accumulate(map(len, complete.splitlines(keepends=True))))
    assert len(lines) > 3
    cuts = {end + near for end in lines for near in (-2, -1, 0, 1)} | {complete.index("“".encode()) + 1}
    for size in sorted(cut for cut in {*cuts, *range(0, len(complete), 29)} if cut < len(complete) - 1):
        plan.write_bytes(complete[:size])
        kept = sum(end - 1 <= size for end in lines)
        profiler = Profiler(sweep)
        result = prepare(sweep, path, profiler)
        assert profiler.profiled == ["x", "y"]
        assert items_in(result) == items_of(sweep), f"truncated after {size} bytes"
        assert len({unit.name for unit in result}) == len(result)
        assert plan.read_bytes().startswith(complete[:size])
        assert plan.read_bytes().splitlines()[:kept] == complete.splitlines()[:kept]
        assert prepare(sweep, path, no_profile) == result
    plan.write_bytes(complete[:-1])
    assert items_in(prepare(sweep, path, no_profile)) == items_of(sweep), "only the last line end is missing"


@pytest.mark.slow
def test_a_truncated_growth_of_a_plan_is_completed(path):
    small, large = make_sweep(**LEAST), make_sweep(**SOME)
    plan_sweep(small, path)
    size = (path / "plan.jsonl").stat().st_size
    plan_sweep(large, path)
    complete = (path / "plan.jsonl").read_bytes()
    for cut in range(size, len(complete) - 1, 50):
        (path / "plan.jsonl").write_bytes(complete[:cut])
        assert items_in(plan_sweep(large, path)) == items_of(large)
        (path / "plan.jsonl").write_bytes(complete[:cut])
        assert items_in(prepare(small, path, no_profile)) <= items_of(large)


@pytest.mark.soak
def test_several_processes_plan_once(path):
    """All measure the models before the first one plans; then all plan retries of a quarantined item."""
    run = subprocess.run([sys.executable, "-c", PLAN_AT_ONCE, path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *first, again = planned_units(path)
    assert (again.retry_of, len(again)) == (first[0].name, 1)
    assert items_in(first) == items_of(make_sweep(**SOME))
    names = [unit.name for unit in first]
    assert run.stdout.splitlines() == [" ".join([*names, *names[1:], again.name])] * 3
    assert prepare(make_sweep(**SOME), path, no_profile) == [*first[1:], again], (
        "the plan is the same for a process elsewhere"
    )


def test_planning_after_another_process(path):
    """Another process plans after this one has measured and before it plans."""
    small, large = make_sweep(**SOME), make_sweep(**SOME | {"seeds": AXES["seeds"]})

    def late(model):
        plan_sweep(small, path)
        return Profiler(large)(model)

    result = prepare(large, path, late)
    assert items_in(result) == items_of(large)
    assert len({unit.name for unit in result}) == len(result)


def test_another_sweep_that_was_planned_meanwhile_is_refused(path):
    """Another process created the folder for another sweep while this one measured."""

    def late(model):
        plan_sweep(make_sweep(**SOME), path)
        return Profiler(make_sweep())(model)

    for other, message in (
        (make_sweep(previews=True), "previews false, now true"),
        (make_sweep(seeds=3), "a sweep can grow"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(other, path, late)
        assert items_in(planned_units(path)) == items_of(make_sweep(**SOME))


# Costs ----------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_sweep(path):
    """Six items per model and schedule.

    Of 5 and 10 s on the first: two and one of them are 10 s, in 3 and 6 units. Of 20 and 40 s on the second: 6 and 6.
    Seconds: 6 (5 + 10 + 20 + 40) = 450, on two workers 225.
    """
    sweep = make_sweep(prompts=["a", "b"], seeds=3, models=["m", "n"], schedules=[{"num_steps": 5}, {"num_steps": 8}])
    profiles = {
        sweep.models[0]: ModelProfile("gpu", 0.5, (ItemCost(5, 10, 100), ItemCost(8, 20, 200))),
        sweep.models[1]: ModelProfile("cpu", 2.0, (ItemCost(5, 10, 100), ItemCost(8, 20, 300))),
    }
    result = estimate(sweep, profiles, 2)
    assert (result.items, result.units, result.forwards, result.nbytes) == (24, 21, 360, 4200)
    assert result.hours == pytest.approx(225 / 3600)
    assert (result.workers, result.devices) == (2, ("gpu", "cpu"))
    assert len(list(make_units(sweep, profiles))) == 21
    same = dict.fromkeys(sweep.models, profiles[sweep.models[0]])
    assert (estimate(sweep, same, 1).devices, estimate(sweep, same, 1).hours) == (("gpu",), pytest.approx(0.05))


# Retries --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def five(path):
    """A sweep with units of 5 and 1 items. In the first, two items are quarantined, one failed, two are suspects."""
    sweep = make_sweep(prompts=["a", "b", "c"], seeds=2, schedules=[{"num_steps": 4}])
    prepare(sweep, path, Profiler(sweep, seconds=2, forwards=1))
    first, _ = planned_units(path)
    assert [len(unit) for unit in planned_units(path)] == [5, 1]
    quarantine(path, first, 3, 1)
    FailureLog(path, first).failed([0], "perhaps")
    FailureLog(path, first).failed([2, 4], "who knows")
    return sweep


def states(path):
    return {(one.unit, one.item): one.state for one in failures(path)}


def test_quarantined_items_are_planned_again_on_request(path, five):
    first, second = before = prepare(five, path, no_profile)
    assert len(before) == 2
    result = prepare(five, path, no_profile, retry_failed=True)
    assert result[:2] == before
    (again,) = result[2:]
    assert (again.name, again.retry_of, again.model) == ("shapes-00000-retry1", "shapes-00000", first.model)
    assert [again.describe(item) for item in range(len(again))] == [first.describe(3), first.describe(1)]
    assert states(path) == {(first.name, 3): "retried", (first.name, 1): "retried"} | {
        (first.name, 0): "failed",
        (first.name, 2): "suspect",
        (first.name, 4): "suspect",
    }
    retried = next(one for one in failures(path) if one.item == 3)
    assert (retried.described, retried.errors) == (first.describe(3), ("item 3 is broken",))
    assert prepare(five, path, no_profile, retry_failed=True) == result, "nothing else to retry"
    assert list(planned_units(path)) == [first, second, again]


def test_retries_are_retried(path, five):
    *_, again = prepare(five, path, no_profile, retry_failed=True)
    quarantine(path, again, 1)
    assert len(prepare(five, path, no_profile)) == 3
    *_, third = prepare(five, path, no_profile, retry_failed=True)
    assert (third.name, third.retry_of, len(third)) == ("shapes-00000-retry2", "shapes-00000", 1)
    assert (
        third.describe(0)
        == again.describe(1)
        == {
            "prompt": "a",
            "seed": 1,
            "schedule": {"sampling": "uniform", "num_steps": 4, "gamma": 0.0, "guidance": None},
        }
    )
    assert states(path)[again.name, 1] == "retried"
    quarantine(path, third, 0)
    *_, left, fourth = prepare(five, path, no_profile, retry_failed=True)
    assert [fourth.name, left.name] == ["shapes-00000-retry3", "shapes-00000-retry1"], "nothing of the third is left"


def test_retries_add_no_items_to_the_sweep(path, five):
    *_, again = prepare(five, path, no_profile, retry_failed=True)
    larger = make_sweep(prompts=["a", "b", "c", "d"], seeds=2, schedules=[{"num_steps": 4}])
    result = plan_sweep(larger, path)
    assert items_in(unit for unit in result if not unit.retry_of) == items_of(larger)
    assert [unit.name for unit in result if unit.retry_of] == [again.name]
    with pytest.raises(ValueError, match="has the prompt"):
        plan_sweep(make_sweep(prompts=["a"], seeds=2, schedules=[{"num_steps": 4}]), path)


def test_several_units_are_retried(path, five):
    _, second = planned_units(path)
    quarantine(path, second, 0)
    result = prepare(five, path, no_profile, retry_failed=True)
    assert [(unit.name, len(unit)) for unit in result if unit.retry_of] == [
        ("shapes-00000-retry1", 2),
        ("shapes-00001-retry1", 1),
    ]
    assert second not in result, "all of it is quarantined"


def test_growing_and_retrying_together(path, five):
    larger = make_sweep(prompts=["a", "b", "c", "d"], seeds=2, schedules=[{"num_steps": 4}])
    result = plan_sweep(larger, path, retry_failed=True)
    assert items_in(unit for unit in result if not unit.retry_of) == items_of(larger)
    assert [len(unit) for unit in result if unit.retry_of] == [2]


def test_later_failures_get_their_own_retry(path, five):
    *_, again = prepare(five, path, no_profile, retry_failed=True)
    quarantine(path, again, 0)
    quarantine(path, next(planned_units(path)), 4)
    *_, third, fourth = prepare(five, path, no_profile, retry_failed=True)
    assert [third.name, fourth.name] == ["shapes-00000-retry2", "shapes-00000-retry3"]
    assert {third.describe(0)["prompt"], fourth.describe(0)["prompt"]} == {"b", "c"}


@pytest.mark.parametrize("step", ["plan_units", "mark_rescheduled"])
def test_a_kill_loses_no_retries(path, five, monkeypatch, step):
    """The kill happens before the new unit is planned, or before its items are marked, which are then planned twice."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if step == "mark_rescheduled":
            patched.setattr(store.FailureLog, "mark_rescheduled", killed)
        else:
            patched.setattr(store, "plan_units", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(five, path, no_profile, retry_failed=True)
    result = prepare(five, path, no_profile, retry_failed=True)
    assert Counter(states(path).values())["retried"] == 2
    assert {len(unit) for unit in result if unit.retry_of} == {2}
    assert len({unit.name for unit in result}) == len(result)


# Remaining ------------------------------------------------------------------------------------------------------------


def test_units_remain_until_they_are_closed(path):
    sweep = make_sweep(seeds=3, models=["m"])
    first, second, third = plan_sweep(sweep, path)
    (path / "segments" / f"{first.name}.1.part.h5").touch()
    (path / "segments" / f"{second.name}.4.h5").touch()
    assert prepare(sweep, path, no_profile) == [first, third]
    assert list(units_left(path, {first.name, third.name})) == [second]
    assert list(units_left(path, [])) == [first, second, third]


def test_a_fully_quarantined_unit_does_not_remain(path):
    sweep = make_sweep(seeds=2)
    prepare(sweep, path, Profiler(sweep, seconds=1, forwards=1))
    (unit,) = planned_units(path)
    FailureLog(path, unit).failed([0], "once")
    FailureLog(path, unit).failed([0, 1], "both")
    assert list(units_left(path, [])) == [unit], "they may yet succeed"
    quarantine(path, unit, 0)
    assert list(units_left(path, [])) == [unit], "the other one may yet succeed"
    quarantine(path, unit, 1)
    assert list(units_left(path, [])) == []
    (again,) = prepare(sweep, path, no_profile, retry_failed=True)
    assert (len(again), again.retry_of) == (2, unit.name)


def test_nothing_remains_without_a_plan(tmp_path):
    assert list(planned_units(tmp_path)) == list(units_left(tmp_path, [])) == list(failures(tmp_path)) == []
    assert planned_specs(tmp_path) == set()


# The plan's lines -----------------------------------------------------------------------------------------------------

HOW = Schedule(num_steps=4).model_dump(mode="json")
UNIT = Unit(
    "u", {"model": "m"}, (HOW, HOW | {"num_steps": 5}), ("a", "b"), ((1, 0, 9), (0, 1, 7), (1, 1, 2**63 - 1), (0, 0, 0))
)


def test_the_line_of_a_unit(tmp_path):
    plan_units(tmp_path, [UNIT])
    assert json.loads((tmp_path / "plan.jsonl").read_text()) == {
        "name": "u",
        "model": {"model": "m"},
        "schedules": [HOW, HOW | {"num_steps": 5}],
        "prompts": ["a", "b"],
        "items": [[1, 0, 9], [0, 1, 7], [1, 1, 2**63 - 1], [0, 0, 0]],
        "retry_of": "",
    }
    assert list(planned_units(tmp_path)) == [UNIT]
    assert UNIT.describe(1) == {"prompt": "a", "seed": 7, "schedule": HOW | {"num_steps": 5}}
    assert len(UNIT) == 4


def test_plans_are_appended_with_their_digests(tmp_path):
    again = dataclasses.replace(UNIT, name="u-retry1", retry_of="u")
    plan_units(tmp_path, [UNIT], spec="one")
    plan_units(tmp_path, [], spec="two")
    plan_units(tmp_path, [again])
    assert planned_specs(tmp_path) == {"one", "two"}
    assert list(planned_units(tmp_path)) == [UNIT, again]


@pytest.mark.parametrize("torn", [b'{"name": "v", "pro', b'{"planned": "on', b"\xe2\x80", b"\0\0\0", b"{", b""])
def test_a_truncated_line_is_skipped(tmp_path, torn):
    plan_units(tmp_path, [UNIT])
    with (tmp_path / "plan.jsonl").open("ab") as file:
        file.write(torn)
    assert (list(planned_units(tmp_path)), planned_specs(tmp_path)) == ([UNIT], set())
    plan_units(tmp_path, [dataclasses.replace(UNIT, name="v")], spec="one")
    assert [unit.name for unit in planned_units(tmp_path)] == ["u", "v"]
    assert planned_specs(tmp_path) == {"one"}


@pytest.mark.slow
@given(text=st.text())
def test_any_prompt_fits_in_one_line(text):
    unit = dataclasses.replace(UNIT, prompts=(text, "b"))
    with tempfile.TemporaryDirectory() as folder:
        plan_units(Path(folder), [unit, unit], spec="one")
        assert (Path(folder) / "plan.jsonl").read_bytes().count(b"\n") == 3
        assert list(planned_units(Path(folder))) == [unit, unit]


def test_a_folder_that_cannot_be_written_is_a_one_line_error(tmp_path):
    with pytest.raises(store.StoreError, match=r"cannot write .*plan.jsonl: the folder does not exist"):
        plan_units(tmp_path / "none", [UNIT])
    with pytest.raises(store.StoreError, match=r"cannot write .*failures: the folder does not exist"):
        FailureLog(tmp_path / "none", UNIT)
    (tmp_path / "failures").write_text("")
    with pytest.raises(store.StoreError, match=r"cannot write .*failures"):
        FailureLog(tmp_path, UNIT)
    release_units(tmp_path, ["u"])  # does not raise, which would hide the error that ends a run


# The failure log, read from disk by each process ----------------------------------------------------------------------


def read_states(folder):
    """The state and the errors of each item, as a new process reads them."""
    return {one.item: (one.state, *one.errors) for one in failures(folder)}


def test_an_item_that_fails_twice_is_quarantined(tmp_path):
    (result,) = FailureLog(tmp_path, UNIT).failed([2], "first")
    assert result == store.Failure("u", 2, UNIT.describe(2), "failed", ("first",))
    assert list(failures(tmp_path)) == [result]
    log = FailureLog(tmp_path, UNIT)
    assert (list(log.suspects), log.quarantined) == ([2], set())
    (result,) = log.failed([2], "second")
    assert result == store.Failure("u", 2, UNIT.describe(2), "quarantined", ("first", "second"))
    for known in (log, FailureLog(tmp_path, UNIT)):
        assert (list(known.suspects), known.quarantined) == ([], {2})
    assert list(failures(tmp_path)) == [result]


def test_a_permanent_failure_quarantines_at_once(tmp_path):
    FailureLog(tmp_path, UNIT).failed([1], "no such word", for_good=True)
    assert read_states(tmp_path) == {1: ("quarantined", "no such word")}


def test_items_that_fail_together_are_suspects_until_each_fails_alone(tmp_path):
    assert [one.state for one in FailureLog(tmp_path, UNIT).failed([0, 1, 3], "crash", for_good=True)] == [
        "suspect"
    ] * 3
    assert read_states(tmp_path) == {0: ("suspect",), 1: ("suspect",), 3: ("suspect",)}, "no item is blamed"
    FailureLog(tmp_path, UNIT).failed([3], "first")
    FailureLog(tmp_path, UNIT).failed([0, 3], "crash")
    assert read_states(tmp_path) == {0: ("suspect",), 1: ("suspect",), 3: ("failed", "first")}
    log = FailureLog(tmp_path, UNIT)
    assert (set(log.suspects), log.quarantined) == ({0, 1, 3}, set())
    log.failed([3], "second")
    log.failed([0], "no such word", for_good=True)
    assert read_states(tmp_path) == {
        0: ("quarantined", "no such word"),
        1: ("suspect",),
        3: ("quarantined", "first", "second"),
    }
    assert (list(log.suspects), log.quarantined) == ([1], {0, 3})


def test_suspects_that_have_failed_come_last(tmp_path):
    """So that the others are done before the process dies again."""
    FailureLog(tmp_path, UNIT).failed([0], "first")
    FailureLog(tmp_path, UNIT).failed([0, 3, 1], "crash")
    assert list(FailureLog(tmp_path, UNIT).suspects) == [3, 1, 0]


def test_a_crash_is_blamed_on_a_single_item_in_progress(tmp_path):
    FailureLog(tmp_path, UNIT).take([0, 1, 2])
    FailureLog(tmp_path, UNIT).take([3])
    (result,) = FailureLog(tmp_path, UNIT).recover([1, 2, 3])
    assert (result.item, result.state, result.errors) == (
        3,
        "failed",
        ("its process crashed, or was ended because it no longer responded",),
    )
    assert FailureLog(tmp_path, UNIT).recover([1, 2, 3]) == [], "once"
    FailureLog(tmp_path, UNIT).take([3])
    (result,) = FailureLog(tmp_path, UNIT).recover([1, 2, 3])
    assert (result.state, len(result.errors)) == ("quarantined", 2)


def test_a_crash_is_not_blamed_on_an_item_if_the_driver_is_gone_too(tmp_path):
    FailureLog(tmp_path, UNIT, driver="first").take([3])
    (result,) = FailureLog(tmp_path, UNIT, driver="second").recover([1, 2, 3])
    assert (result.item, result.state, result.errors) == (3, "suspect", ())


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
def test_unfinished_items_in_progress_are_suspects(tmp_path, left, blamed):
    FailureLog(tmp_path, UNIT).take([0, 1, 3])
    result = FailureLog(tmp_path, UNIT).recover(left)
    assert {one.item: one.state for one in result} == blamed
    assert {item: state for item, (state, *_) in read_states(tmp_path).items()} == blamed
    assert FailureLog(tmp_path, UNIT).recover([0, 1, 2, 3]) == []


def test_released_items_are_not_blamed(tmp_path):
    log, other = FailureLog(tmp_path, UNIT), FailureLog(tmp_path, dataclasses.replace(UNIT, name="v"))
    assert log.recover([0, 1]) == [], "nothing was in progress"
    other.take([1])
    for release in (log.release, log.settle, lambda: release_units(tmp_path, ["none", "u"])):
        log.take([0])
        release()
        assert FailureLog(tmp_path, UNIT).recover([0, 1]) == []
        release()
    assert [one.unit for one in other.recover([0, 1])] == ["v"]
    assert [one.unit for one in failures(tmp_path)] == ["v"]


def test_a_damaged_record_blames_no_item(tmp_path):
    log = FailureLog(tmp_path, UNIT)
    log.take([0])
    (in_progress,) = (tmp_path / "failures").iterdir()
    in_progress.write_text("[0, ")
    assert log.recover([0, 1]) == []


def test_items_in_progress_are_not_failures(tmp_path):
    FailureLog(tmp_path, UNIT).take([0])
    assert list(failures(tmp_path)) == []
    release_units(tmp_path / "none", ["u"])


def test_settling_keeps_only_quarantined_items(tmp_path):
    log = FailureLog(tmp_path, UNIT)
    log.failed([0], "for good", for_good=True)
    log.mark_rescheduled([0])
    log.failed([1], "once")
    log.failed([2, 3], "who knows")
    log.failed([3], "for good", for_good=True)
    log.settle()
    assert read_states(tmp_path) == {0: ("retried", "for good"), 3: ("quarantined", "for good")}
    assert (log.quarantined, list(log.suspects)) == ({0, 3}, [])


def test_no_failures_leave_no_files(tmp_path):
    log = FailureLog(tmp_path, UNIT)
    log.failed([0, 1], "who knows")
    log.take([0])
    log.settle()
    assert list((tmp_path / "failures").iterdir()) == []
    log.settle()
    log.mark_rescheduled([])
    assert list((tmp_path / "failures").iterdir()) == []


def test_rescheduled_items_are_not_tried_here(tmp_path):
    log = FailureLog(tmp_path, UNIT)
    log.failed([0], "for good", for_good=True)
    log.failed([1], "once")
    log.mark_rescheduled([0])
    assert read_states(tmp_path) == {0: ("retried", "for good"), 1: ("failed", "once")}
    for known in (log, FailureLog(tmp_path, UNIT)):
        assert (known.quarantined, list(known.suspects)) == ({0}, [1])


def test_failures_are_read_by_unit(tmp_path):
    for name in ("v", "u", "w-retry1"):
        FailureLog(tmp_path, dataclasses.replace(UNIT, name=name)).failed([3, 1], "who knows")
    FailureLog(tmp_path, dataclasses.replace(UNIT, name="x")).take([1])
    (tmp_path / "failures/u.json.1.new").write_text("[")
    assert [(one.unit, one.item) for one in failures(tmp_path)] == [
        (name, item) for name in ("u", "v", "w-retry1") for item in (3, 1)
    ]


def test_units_in_progress_are_retried_later(path, five):
    """Their worker may be about to record another failure."""
    first = next(planned_units(path))
    before = states(path)
    with store.Folder(path).hold(first.name):
        assert not any(unit.retry_of for unit in prepare(five, path, no_profile, retry_failed=True))
    assert states(path) == before
    assert any(unit.retry_of for unit in prepare(five, path, no_profile, retry_failed=True))


def test_the_plan_is_marked_complete_after_its_units_are_on_disk(path, monkeypatch):
    calls = []
    monkeypatch.setattr("dfengine.store.run.units.append_lines", lambda path, lines: calls.append(list(lines)))
    plan_sweep(make_sweep(seeds=3, models=["m"]), path)
    assert [len(lines) for lines in calls] == [3, 1]
    assert "planned" in calls[1][0]


def test_lines_that_are_not_units_are_skipped(path):
    sweep = make_sweep(seeds=3, models=["m"])
    units = plan_sweep(sweep, path)
    with (path / "plan.jsonl").open("a") as file:
        file.write('3\nnull\n{"name": "x"}\n[]\n{"name": "y", "items": 4, "schedules": [], "prompts": []}\n')
    assert prepare(sweep, path, no_profile) == units


def test_a_folder_that_another_process_is_creating_is_free(tmp_path):
    for name in ("plan.jsonl", "manifest.jsonl"):
        (tmp_path / name).touch()
    for name in ("segments", "failures"):
        (tmp_path / name).mkdir()
    store.check_free(tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(store.StoreError, match="is not a run folder, and not empty"):
        store.check_free(tmp_path)


# A smaller sweep in the folder of a larger one ------------------------------------------------------------------------


def test_the_outcome_of_a_sweep_is_that_of_its_own_items(path):
    small, large = make_sweep(**LEAST), make_sweep(**SOME)
    plan_sweep(small, path)
    plan_sweep(large, path)
    own, *others = planned_units(path)
    assert prepare(small, path, no_profile) == [own]
    assert (outcome(path, small).items, outcome(path, small).units_left) == (1, 1)
    assert (outcome(path, large).items, outcome(path, large).units_left) == (16, 16)
    quarantine(path, others[0], 0)
    quarantine(path, own, 0)
    assert [one.unit for one in outcome(path, small).quarantined] == [own.name]
    assert len(outcome(path, large).quarantined) == len(outcome(path).quarantined) == 2
    (again,) = prepare(small, path, no_profile, retry_failed=True)
    assert (again.retry_of, items_in([again])) == (own.name, items_in([own])), "only its own are retried"
    assert len(outcome(path, large).quarantined) == 1


def test_leftovers_are_removed_when_a_sweep_starts(path):
    plan_sweep(make_sweep(**LEAST), path)
    (path / "segments/.x.1.h5.lock").write_text("99")
    prepare(make_sweep(**LEAST), path, no_profile)
    assert sorted(file.name for file in path.rglob("*")) == ["plan.jsonl", "run.json", "segments"]


def test_a_sweep_is_not_written_to_an_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"s3:/bucket/run is an address, not a path"):
        prepare(make_sweep(), Path("s3://bucket/run"), no_profile)
    assert not list(tmp_path.iterdir())
