"""The driver against workers that are only played: whatever becomes of them, every unit is done, and once."""

import inspect
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfengine import store, sweep
from dfengine.sweep import driver as driving
from dfengine.sweep import running
from dfengine.sweep.driver import Driver
from dfengine.sweep.records import Closed, Failed, Gone, Idle, Note, Progress, Refused, Taken
from dfengine.sweep.worker import Explain


def units(count):
    how = ({"sampling": "uniform", "steps": 1, "gamma": 0.0, "guidance": None},)
    return [store.Unit(f"u{number}", {}, how, ("a",), ((0, 0, number),)) for number in range(count)]


class Played:
    """Workers that answer each unit as `answers` says, in the order in which units are asked for; at first, and by
    default, they do it. A list that does not end in Idle or Gone is one of a worker that says nothing more.
    """

    def __init__(self, answers=()):
        self.answers = deque(answers)
        self.waiting = {}
        self.asked, self.started, self.ended, self.closed = [], [], [], 0

    def start(self, worker):
        assert worker not in self.waiting
        self.started.append(worker)
        self.waiting[worker] = deque([Idle()])

    def ask(self, worker, request):
        assert isinstance(request, Explain)
        assert not self.waiting[worker], "only an idle worker is asked"
        self.asked.append((worker, request.unit.name, request.times))
        name = request.unit.name
        answer = self.answers.popleft() if self.answers else "done"
        self.waiting[worker] = deque(
            {
                "done": [Progress(name, 1, ((0, 0.1),)), Closed(name), Idle()],
                "gone": [Gone()],
                "gone later": [Progress(name, 1), Gone()],
                "fresh": [Failed(name, (), fresh=True), Idle()],
                "taken": [Taken(name), Idle()],
                "done and gone": [Progress(name, 1), Closed(name), Gone()],
                "slow": [*[Progress(name, 1)] * 20, Closed(name), Idle()],
                "silent": [Progress(name, 1)],
                "refused": [Note("looking"), Refused("there is no such model"), Idle()],
            }[answer]
        )

    def receive(self, timeout):
        for worker in list(self.waiting):
            if self.waiting.get(worker):
                record = self.waiting[worker].popleft()
                if isinstance(record, Gone):
                    del self.waiting[worker]
                yield worker, record

    def end(self, worker):
        self.ended.append(worker)
        del self.waiting[worker]

    def close(self):
        self.closed += 1


def drive(crew, tmp_path, count, workers=2, stall=1e9):
    return list(Driver(crew, tmp_path, units(count), workers=workers, stall=stall).run())


def closed(records):
    return sorted(record.unit for _, record in records if isinstance(record, Closed))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_units_are_done_once(tmp_path, workers):
    crew = Played()
    records = drive(crew, tmp_path, 5, workers)
    assert closed(records) == ["u0", "u1", "u2", "u3", "u4"]
    assert sorted(name for _, name, _ in crew.asked) == ["u0", "u1", "u2", "u3", "u4"]
    assert crew.started == list(range(workers))
    assert sorted(crew.ended) == list(range(workers))
    assert crew.closed == 1
    assert not any(isinstance(record, Idle) for _, record in records)


def test_there_are_no_more_workers_than_units(tmp_path):
    crew = Played()
    drive(crew, tmp_path, 2, workers=9)
    assert crew.started == [0, 1]
    assert drive(Played(), tmp_path, 0) == []


def test_a_worker_knows_how_many_units_are_its_share(tmp_path):
    crew = Played()
    drive(crew, tmp_path, 7, workers=2)
    # With six, five, … others left, which two share: its own unit and half of them, rounded up.
    assert [times for _, _, times in crew.asked] == [4, 4, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("death", ["gone", "gone later"])
def test_the_unit_of_a_dead_worker_runs_again_before_all_others(tmp_path, death):
    crew = Played([death])
    records = drive(crew, tmp_path, 3, workers=1)
    assert closed(records) == ["u0", "u1", "u2"]
    assert [name for _, name, _ in crew.asked] == ["u0", "u0", "u1", "u2"]
    assert crew.started == [0, 0]
    assert sum(isinstance(record, Gone) for _, record in records) == 1


def test_a_unit_that_wants_a_fresh_process_gets_one_after_the_others(tmp_path):
    crew = Played(["fresh"])
    assert closed(drive(crew, tmp_path, 3, workers=1)) == ["u0", "u1", "u2"]
    assert [name for _, name, _ in crew.asked] == ["u0", "u1", "u2", "u0"]
    assert crew.started == [0, 0]
    assert crew.ended == [0, 0]


def test_the_last_unit_gets_a_worker_even_where_the_others_are_gone(tmp_path):
    crew = Played(["done", "done", "gone", "gone"])
    assert closed(drive(crew, tmp_path, 3, workers=2)) == ["u0", "u1", "u2"]


def test_what_a_worker_has_closed_is_not_done_again_when_it_dies(tmp_path):
    crew = Played(["done and gone"])
    assert closed(drive(crew, tmp_path, 2, workers=1)) == ["u0", "u1"]
    assert [name for _, name, _ in crew.asked] == ["u0", "u1"]


@pytest.fixture
def looks(monkeypatch):
    """Ten seconds pass with each look at the workers."""
    seen = []
    receive = Played.receive

    def look(self, timeout):
        seen.append(timeout)
        yield from receive(self, timeout)

    monkeypatch.setattr(Played, "receive", look)
    monkeypatch.setattr(driving.time, "monotonic", lambda: 10 * len(seen))
    return seen


def test_a_worker_that_tells_something_now_and_then_does_not_stall(tmp_path, looks):
    crew = Played(["slow"])
    assert closed(drive(crew, tmp_path, 1, workers=1, stall=15)) == ["u0"]
    assert crew.started == [0]
    assert len(looks) > 20


def test_what_the_consumer_takes_its_time_for_is_no_stalling(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(driving.time, "monotonic", lambda: clock[0])
    crew = Played(["slow", "slow"])
    for _ in Driver(crew, tmp_path, units(2), workers=2, stall=50).run():
        clock[0] += 1000
    assert crew.started == [0, 1]


def test_a_worker_that_stalls_is_ended_and_its_unit_runs_again(tmp_path, looks):
    crew = Played(["silent"])
    records = drive(crew, tmp_path, 2, workers=1, stall=50)
    # Idle and its last word, six looks until more than 50 s have passed, and then what another does.
    assert len(looks) == 2 + 6 + 7
    assert closed(records) == ["u0", "u1"]
    assert crew.ended == [0, 0]
    assert [name for _, name, _ in crew.asked] == ["u0", "u0", "u1"]
    assert sum(isinstance(record, Gone) for _, record in records) == 1


def test_what_another_run_is_at_is_left_to_it(tmp_path):
    crew = Played(["taken"])
    assert closed(drive(crew, tmp_path, 3, workers=1)) == ["u0", "u1", "u2"], "which may have died meanwhile"
    assert [name for _, name, _ in crew.asked] == ["u0", "u1", "u2", "u0"]
    crew = Played(["done", "done", *["taken"] * 100])
    assert closed(drive(crew, tmp_path, 3, workers=1)) == ["u0", "u1"]


def test_what_is_refused_ends_the_sweep(tmp_path):
    crew = Played(["done", "refused"])
    with pytest.raises(ValueError, match="there is no such model"):
        drive(crew, tmp_path, 3, workers=1)
    assert crew.closed == 1


def test_workers_that_never_do_anything_end_the_sweep(tmp_path):
    crew = Played(["gone"] * 100)
    with pytest.raises(ValueError, match=r"workers ended 6 times before anything was done: is there enough memory"):
        drive(crew, tmp_path, 3, workers=2)
    assert crew.closed == 1
    # Deaths with something done in between are none of that kind.
    assert closed(drive(Played(["gone later"] * 100), tmp_path, 3)) == ["u0", "u1", "u2"]


def test_closing_lets_go_of_what_was_in_hand(tmp_path):
    (tmp_path / "failures").mkdir()
    for unit in units(3):
        (tmp_path / f"failures/.{unit.name}.json").write_text('{"driver": "", "items": [0]}')
    crew = Played(["silent", "silent"])
    records = Driver(crew, tmp_path, units(3), workers=2, stall=1e9).run()
    assert [next(records)[0], next(records)[0]] == [0, 1]
    records.close()
    assert crew.closed == 1
    assert [path.name for path in (tmp_path / "failures").iterdir()] == [".u2.json"], "which nobody had"


@given(st.lists(st.sampled_from(["done", "gone later", "fresh"]), max_size=30), st.integers(1, 4), st.integers(1, 12))
def test_whatever_becomes_of_workers_every_unit_is_done_once(tmp_path_factory, answers, workers, count):
    crew = Played(answers)
    records = drive(crew, tmp_path_factory.getbasetemp(), count, workers)
    assert closed(records) == sorted(f"u{number}" for number in range(count))
    assert not crew.waiting


@pytest.mark.parametrize(
    ("gpus", "where", "expected"),
    [
        ([], {}, ("processes", 1, [], 6)),
        ([], {"workers": 4}, ("processes", 4, [], 1)),
        ([], {"workers": 4, "threads": 2}, ("processes", 4, [], 2)),
        (["0"], {}, ("processes", 1, ["0"], None)),
        (["0", "5"], {}, ("ray", None, None)),
        (["0", "5"], {"workers": 2}, ("ray", 2, None)),
        (["0", "5"], {"workers": 1}, ("processes", 1, ["0", "5"], None)),
        (["0", "5"], {"device": "cpu"}, ("processes", 1, [], 6)),
        ([], {"ray_address": "auto", "workers": 1}, ("ray", 1, "auto")),
    ],
)
def test_where_workers_run(monkeypatch, tmp_path, gpus, where, expected):
    monkeypatch.setattr(running, "_gpus", lambda: gpus)
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(
        running, "Processes", lambda setup, *, workers, gpus, threads: ("processes", workers, gpus, threads)
    )
    monkeypatch.setattr(running, "Cluster", lambda setup, *, address, workers, threads: ("ray", workers, address))
    crew = inspect.unwrap(running.Where.crew)  # what it returns here is no crew
    assert crew(running.Where(**where), sweep.Sweep(prompts="a", explainers="random"), tmp_path) == expected
