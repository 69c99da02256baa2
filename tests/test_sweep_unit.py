"""One unit of a sweep, run in this process: the files it writes and the handling of items that fail."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from analytic import Analytic

from dfengine import Engine, Random, Rise, store
from dfengine.sweep.events import Closed, Failed, Progress
from dfengine.sweep.spec import Schedule, SharedSettings
from dfengine.sweep.unit import explain_unit

STEPS = 3


def explainer_with_errors(**errors):
    """Random maps, with errors for some prompts. Records which prompts are explained together."""

    class Harmful(Random):
        explained = []  # noqa: RUF012  # not a dataclass field, and therefore not a setting stored in a file

        def explain(self, denoiser, trajectories, done=()):
            prompts = [one.job.prompt for one in trajectories]
            self.explained.append(prompts)
            for name, error in errors.items():
                if name.removeprefix("of_") in prompts:
                    raise error
            yield from Random().explain(denoiser, trajectories, done)

    return Harmful()


def shared(*explainers, **changed):
    settings = {"negative_prompt": "", "previews": False, "compression": "none"}
    return SharedSettings(explainers, **settings | {"mantissa_bits": 23} | changed)


def unit_of(*prompts, seeds=(0,), schedules=("uniform",), **settings):
    how = tuple(Schedule(sampling=one, num_steps=STEPS, **settings).model_dump(mode="json") for one in schedules)
    items = [(p, h, s) for p in range(len(prompts)) for h in range(len(how)) for s in seeds]
    return store.Unit("u-00000", {"model": "analytic"}, how, prompts, tuple(items))


@pytest.fixture
def engine():
    """An engine with groups of two. Prompts are numbers; others raise ValueError."""
    return Engine(Analytic(lambda x, number: 0.1 * x * number[:, None, None, None], batch_size=4), batch_size=4)


@pytest.fixture
def folder(tmp_path):
    return store.Folder(tmp_path / "run")


def run_unit(engine, common, folder, unit):
    return list(explain_unit(engine, common, folder, unit))


def maps_by_item(folder):
    with store.open(folder.path) as run:
        return {
            (item.prompt, item.seed, tuple(item.timesteps.tolist())): np.asarray(item.maps["rise"])
            for item in run
            if item.has_trajectory
        }


def test_a_run_is_not_continued_with_other_weights(engine, folder):
    """Neither in a unit that was begun, nor in another of the same model; another model has its own."""
    first, second = unit_of("1"), dataclasses.replace(unit_of("2"), name="u-00001")
    assert run_unit(engine, shared(Random()), folder, first)[-1] == Closed("u-00000")
    changed = Engine(Analytic(lambda x, number: 0.1 * x), batch_size=4)
    changed.denoiser.schedule = dataclasses.replace(changed.denoiser.schedule, prediction_type="v_prediction")
    with pytest.raises(
        store.StoreError, match=r"begun with other weights of analytic in float32 \(\w{16}, now \w{16}\)"
    ):
        run_unit(changed, shared(Random()), folder, second)
    other_model = dataclasses.replace(second, model={"model": "other"})
    assert run_unit(changed, shared(Random()), folder, other_model)[-1] == Closed("u-00001")


@pytest.mark.slow
def test_maps_equal_those_of_explain(engine, folder):
    rise = Rise(7)
    unit = unit_of("1", "2", "3", seeds=(0, 5), schedules=("uniform", "early"), guidance=3.5)
    records = run_unit(engine, shared(rise, Random(), negative_prompt="4"), folder, unit)
    assert records[-1] == Closed("u-00000")
    progress = [record for record in records if isinstance(record, Progress)]
    assert sum(record.maps for record in progress) == 12 * 2 * STEPS
    assert sorted(item for record in progress for item, _ in record.items) == list(range(12))
    stored = maps_by_item(folder)
    assert len(stored) == 12
    for prompt, how, seed in unit.items:
        sampling = ("uniform", "early")[how]
        alone = engine.explain(
            unit.prompts[prompt],
            rise,
            seed=seed,
            num_steps=STEPS,
            sampling=sampling,
            guidance=3.5,
            negative_prompt="4",
        )
        key = unit.prompts[prompt], seed, tuple(alone.timesteps.tolist())
        np.testing.assert_array_equal(stored[key], alone.maps["rise"])
    with store.open(folder.path) as run:
        assert run.finished
        assert run[0].previews is None
        assert not list(store.failures(folder.path))


def test_settings_reach_the_file(engine, folder):
    run_unit(engine, shared(Random(), previews=True, compression="gzip", mantissa_bits=9), folder, unit_of("1"))
    with store.open(folder.path) as run:
        part = run.opened("u-00000.1.h5")
        assert part.plan.previews
        assert part.plan.mantissa_bits == 9
        assert part.dataset("maps/saliency").compression == "gzip"
        assert run[0].previews.shape == (STEPS, *engine.denoiser.image_shape, 3)


def test_an_invalid_item_is_quarantined_and_the_others_are_done(engine, folder):
    explainer = explainer_with_errors()
    records = run_unit(engine, shared(explainer, Rise(4)), folder, unit_of("1", "x", "2", "3"))
    failed = [one for record in records if isinstance(record, Failed) for one in record.failures]
    # First the group of two, then each alone.
    assert [(one.item, one.state) for one in failed] == [(0, "suspect"), (1, "suspect"), (1, "quarantined")]
    assert not any(record.needs_restart for record in records if isinstance(record, Failed))
    assert records[-1] == Closed("u-00000")
    assert len(maps_by_item(folder)) == 3
    (aside,) = store.failures(folder.path)
    assert (aside.item, aside.state, aside.described["prompt"]) == (1, "quarantined", "x")
    assert "could not convert string to float: 'x'" in aside.errors[0]
    # The second group ran before the suspects, which ran alone.
    assert explainer.explained == [["2", "3"], ["1"]]
    with store.open(folder.path) as run:
        assert not run.finished


def test_an_item_that_is_refused_beforehand_is_not_in_the_file(engine, folder):
    class Choosy(Random):
        def output_spec(self, denoiser, job):
            if job.prompt == "2":
                raise ValueError("not this one")
            return Random().output_spec(denoiser, job)

    records = run_unit(engine, shared(Choosy()), folder, unit_of("1", "2", "3"))
    assert [one.errors for record in records if isinstance(record, Failed) for one in record.failures] == [
        ("not this one",)
    ]
    with store.open(folder.path) as run:
        assert [item.prompt for item in run] == ["1", "3"]
        assert not run.finished
    # A second run records nothing twice.
    again = store.Folder(folder.path.with_name("again"))
    assert [type(record) for record in run_unit(engine, shared(Choosy()), again, unit_of("2"))] == [Failed, Closed]
    assert [type(record) for record in run_unit(engine, shared(Choosy()), again, unit_of("2"))] == [Closed]
    assert not list((again.path / "segments").iterdir())


@pytest.mark.slow
def test_another_error_asks_for_a_new_process_and_quarantines_the_second_time(engine, folder):
    explainer = explainer_with_errors(of_3=RuntimeError("no such kernel"))
    common, unit = shared(explainer), unit_of("1", "2", "3", "4", "5")
    first = run_unit(engine, common, folder, unit)
    assert isinstance(first[-1], Failed)
    assert first[-1].needs_restart
    assert [(one.item, one.state, one.errors) for one in first[-1].failures] == [(2, "suspect", ()), (3, "suspect", ())]
    second = run_unit(engine, common, folder, unit)
    message = "RuntimeError: no such kernel"
    assert second[-1].needs_restart
    assert [(one.item, one.state, one.errors) for one in second[-1].failures] == [(2, "failed", (message,))]
    third = run_unit(engine, common, folder, unit)
    assert third[-1].needs_restart
    assert [(one.item, one.state, one.errors) for one in third[-1].failures] == [(2, "quarantined", (message, message))]
    assert run_unit(engine, common, folder, unit)[-1] == Closed("u-00000")
    # Finished items are not explained again, and suspects run alone, after the others.
    assert explainer.explained == [["1", "2"], ["3", "4"], ["5"], ["3"], ["4"], ["3"]]
    with store.open(folder.path) as run:
        done = {item.prompt: bool(item.done["random"].all()) for item in run}
    assert done == {"1": True, "2": True, "3": False, "4": True, "5": True}
    assert [one.state for one in store.failures(folder.path)] == ["quarantined"]


def test_success_at_the_second_attempt_clears_the_failure(engine, folder):
    unit = unit_of("1", "2")
    assert run_unit(engine, shared(explainer_with_errors(of_2=RuntimeError("once"))), folder, unit)[-1].needs_restart
    assert (folder.path / "failures/u-00000.json").exists()
    assert run_unit(engine, shared(explainer_with_errors()), folder, unit)[-1] == Closed("u-00000")
    assert not list((folder.path / "failures").iterdir())
    with store.open(folder.path) as run:
        assert run.finished


@pytest.mark.parametrize("error", [store.StoreError("the disk is full"), OSError(28, "No space left on device")])
def test_a_full_disk_is_not_a_failure_of_an_item(engine, folder, error):
    with pytest.raises(type(error)):
        run_unit(engine, shared(explainer_with_errors(of_2=error)), folder, unit_of("1", "2"))
    assert not list((folder.path / "failures").iterdir())


def test_items_in_progress_are_recorded_until_they_are_released(engine, folder, monkeypatch):
    monkeypatch.setattr("dfengine.sweep.unit.PROGRESS_SECONDS", 0)
    in_hand = folder.path / "failures/.u-00000.json"
    records = explain_unit(engine, shared(Rise(4)), folder, unit_of("1", "2", "3"))
    hands = []
    for record in records:
        assert isinstance(record, Progress)
        hands.append(json.loads(in_hand.read_text())["items"])
        if hands[-1] == [2]:
            break
    records.close()
    assert hands[0] == [0, 1]
    assert not in_hand.exists()
    with store.open(folder.path) as run:
        assert [item.seconds > 0 for item in run] == [True, True, False]
        assert run.segments[0].is_part


@pytest.mark.slow
def test_interrupted_work_resumes(engine, folder, monkeypatch):
    monkeypatch.setattr("dfengine.sweep.unit.PROGRESS_SECONDS", 0)
    common, unit = shared(Rise(6)), unit_of("1", "2", "3", "4", "5")
    records = explain_unit(engine, common, folder, unit)
    num_maps = 0
    while num_maps < 2 * STEPS + 1:  # one group, and a step of the second
        num_maps += next(records).maps
    records.close()
    remaining = run_unit(engine, common, folder, unit)
    assert sum(record.maps for record in remaining if isinstance(record, Progress)) == 5 * STEPS - num_maps
    uninterrupted = store.Folder(folder.path.with_name("whole"))
    run_unit(engine, common, uninterrupted, unit)
    expected, resumed = maps_by_item(uninterrupted), maps_by_item(folder)
    assert expected.keys() == resumed.keys()
    for key, saliency in expected.items():
        np.testing.assert_array_equal(resumed[key], saliency)


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(("hand", "states"), [([1], {1: "failed"}), ([1, 2], {1: "suspect", 2: "suspect"}), ([0], {})])
def test_a_crash_is_attributed_to_the_items_in_progress(engine, folder, monkeypatch, hand, states):
    monkeypatch.setattr("dfengine.sweep.unit.PROGRESS_SECONDS", 0)
    unit = unit_of("1", "2", "3")
    records = explain_unit(engine, shared(Rise(4), Random()), folder, unit)
    for record in records:  # until the first is done, when the process dies
        if any(item == 0 for item, _ in record.items):
            break
    records.close()
    (folder.path / "failures/.u-00000.json").write_text(json.dumps({"driver": "", "items": hand}))
    remaining = run_unit(engine, shared(Rise(4), Random()), folder, unit)
    crashed = [one for record in remaining if isinstance(record, Failed) for one in record.failures]
    assert {one.item: one.state for one in crashed} == states
    assert all("its process crashed" in error for one in crashed for error in one.errors)
    assert remaining[-1] == Closed("u-00000")
    with store.open(folder.path) as run:
        assert run.finished


def test_a_quarantined_item_is_skipped(engine, folder):
    unit = unit_of("1", "2", "3")
    store.FailureLog(folder.path, unit).failed([1], "no", for_good=True)
    explainer = explainer_with_errors()
    assert run_unit(engine, shared(explainer), folder, unit)[-1] == Closed("u-00000")
    assert Counter(prompt for group in explainer.explained for prompt in group) == {"1": 1, "3": 1}


def test_a_unit_held_by_another_writer_is_busy(engine, folder, monkeypatch):
    monkeypatch.setattr("dfengine.sweep.unit.PROGRESS_SECONDS", 0)
    unit = unit_of("1", "2")
    records = explain_unit(engine, shared(Rise(4)), folder, unit)
    next(records)
    with pytest.raises(store.Busy, match="is being written by another run"):
        run_unit(engine, shared(Rise(4)), folder, unit)
    records.close()
    assert run_unit(engine, shared(Rise(4)), folder, unit)[-1] == Closed("u-00000")


def test_a_folder_is_finished_when_its_plan_is(engine, folder):
    first, second = unit_of("1"), dataclasses.replace(unit_of("2"), name="u-00001")
    store.plan_units(folder.path, [first, second])
    for unit, finished in ((first, False), (second, True)):
        run_unit(engine, shared(Random()), folder, unit)
        with store.open(folder.path) as run:
            assert (run.finished, run.planned) == (finished, 2)
            assert run.units_left == ([] if finished else ["u-00001"])


def test_the_expected_work_decides_whether_to_compile(engine, folder, monkeypatch):
    prepared = []
    monkeypatch.setattr(engine, "prepare", lambda plan, done=(), times=1: prepared.append((len(plan), times)))
    list(explain_unit(engine, shared(Random()), folder, unit_of("1", "2", "3"), times=40))
    assert prepared[0] == (3, 40)


def test_a_closed_unit_is_not_run_again(engine, folder):
    """Another driver closed it, or a worker that died before reporting it."""
    explainer, unit = explainer_with_errors(), unit_of("1")
    assert run_unit(engine, shared(explainer), folder, unit)[-1] == Closed("u-00000")
    assert run_unit(engine, shared(explainer), folder, unit) == [Closed("u-00000")]
    assert explainer.explained == [["1"]]
    assert len(list((folder.path / "segments").iterdir())) == 1


def test_the_end_of_a_driver_is_not_a_failure_of_an_item(engine, folder):
    """Such as a power cut, even a repeated one."""
    unit = unit_of("1", "2")
    for driver in "abc":
        store.FailureLog(folder.path, unit, driver=driver).take([1])
        log = store.FailureLog(folder.path, unit, driver="now")
        assert [(one.item, one.state, one.errors) for one in log.recover([0, 1])] == [(1, "suspect", ())]
    store.FailureLog(folder.path, unit, driver="now").take([1])
    (blamed,) = store.FailureLog(folder.path, unit, driver="now").recover([0, 1])
    assert (blamed.state, len(blamed.errors)) == ("failed", 1)


def test_a_driver_releases_only_its_own_units(folder):
    unit = unit_of("1", "2")
    store.FailureLog(folder.path, unit, driver="a").take([1])
    marker = folder.path / "failures/.u-00000.json"
    store.release_units(folder.path, [unit.name], driver="b")
    assert marker.exists()
    store.release_units(folder.path, [unit.name], driver="a")
    assert not marker.exists()


def test_schedules_of_the_same_time_steps_are_computed_once(engine, folder, caplog):
    """Uniform is the same as a list of its time-steps, and with the guidance that the model has by itself."""
    explainer, own = explainer_with_errors(), engine.job("1", num_steps=STEPS)
    how = (
        Schedule(sampling="uniform", num_steps=STEPS),
        Schedule(sampling=own.timesteps, guidance=own.guidance),
        Schedule(sampling="uniform", num_steps=STEPS, guidance=2.5),
    )
    schedules = tuple(one.model_dump(mode="json") for one in how)
    items = tuple((prompt, schedule, 0) for prompt in (0, 1) for schedule in range(3))
    unit = store.Unit("u-00000", {"model": "analytic"}, schedules, ("1", "2"), items)
    store.plan_units(folder.path, [unit])
    caplog.set_level("INFO", logger="dfengine")
    assert run_unit(engine, shared(explainer), folder, unit)[-1] == Closed("u-00000")
    with store.open(folder.path) as run:
        assert (len(run), run.finished, run.units_left) == (4, True, [])
        assert {(item.prompt, item.item.settings["guidance"]) for item in run} == {
            (prompt, guidance) for prompt in ("1", "2") for guidance in (own.guidance, 2.5)
        }
        assert any("images     4 of 4" in line for line in store.summary_lines(run))
    assert (store.progress(folder.path).items, store.progress(folder.path).done) == (4, 4)
    assert {record.getMessage() for record in caplog.records if "the same" in record.getMessage()} == {
        f"schedules uniform and {list(own.timesteps)} are the same on this model: their images are made once"
    }
    assert run_unit(engine, shared(explainer), folder, unit) == [Closed("u-00000")]


def test_what_no_file_can_hold_is_quarantined_and_the_others_are_done(engine, folder, monkeypatch):
    """A plan that an earlier version wrote may have it."""
    encode = engine.denoiser.encode_prompts
    monkeypatch.setattr(engine.denoiser, "encode_prompts", lambda texts: encode([one.strip("\0") for one in texts]))
    unit = unit_of("1", "2\0", "3")
    records = run_unit(engine, shared(Rise(4)), folder, unit)
    failed = [one for record in records if isinstance(record, Failed) for one in record.failures]
    assert [(one.item, one.state) for one in failed] == [(1, "quarantined")]
    assert "NUL character" in failed[0].errors[-1]
    assert records[-1] == Closed("u-00000")
    assert len(maps_by_item(folder)) == 2
