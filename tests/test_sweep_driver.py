"""The driver with simulated workers: every unit is done exactly once, even if workers fail."""

import inspect
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfengine import store, sweep
from dfengine.sweep import driver as driver_module
from dfengine.sweep import running
from dfengine.sweep.driver import Driver
from dfengine.sweep.events import Closed, Failed, Note, Progress, Refused, UnitBusy, WorkerExited, WorkerReady
from dfengine.sweep.worker import ExplainRequest


def units(count):
    how = ({"sampling": "uniform", "num_steps": 1, "gamma": 0.0, "guidance": None},)
    return [store.Unit(f"u{number}", {}, how, ("a",), ((0, 0, number),)) for number in range(count)]


class FakePool:
    """Workers that answer requests with `responses`, in order, and afterwards by doing the units.

    A response that ends in neither WorkerReady nor WorkerExited comes from a worker that hangs.
    """

    workers = 9

    def __init__(self, responses=()):
        self.responses = deque(responses)
        self.waiting = {}
        self.requests, self.started, self.ended, self.closed = [], [], [], 0

    def start(self, worker):
        assert worker not in self.waiting
        self.started.append(worker)
        self.waiting[worker] = deque([WorkerReady()])

    def send(self, worker, request):
        assert isinstance(request, ExplainRequest)
        assert not self.waiting[worker], "only a ready worker is sent a request"
        self.requests.append((worker, request.unit.name, request.times))
        name = request.unit.name
        response = self.responses.popleft() if self.responses else "done"
        self.waiting[worker] = deque(
            {
                "done": [Progress(name, 1, ((0, 0.1),)), Closed(name), WorkerReady()],
                "exits": [WorkerExited()],
                "exits later": [Progress(name, 1), WorkerExited()],
                "restart": [Failed(name, (), needs_restart=True), WorkerReady()],
                "busy": [UnitBusy(name), WorkerReady()],
                "done, then exits": [Progress(name, 1), Closed(name), WorkerExited()],
                "slow": [*[Progress(name, 1)] * 20, Closed(name), WorkerReady()],
                "silent": [Progress(name, 1)],
                "refused": [Note("looking"), Refused("there is no such model"), WorkerReady()],
            }[response]
        )

    def receive(self, timeout):
        for worker in list(self.waiting):
            if self.waiting.get(worker):
                record = self.waiting[worker].popleft()
                if isinstance(record, WorkerExited):
                    del self.waiting[worker]
                yield worker, record

    def stop(self, worker):
        self.ended.append(worker)
        del self.waiting[worker]

    def close(self):
        self.closed += 1


def drive(pool, tmp_path, count, workers=2, stall=1e9):
    return list(Driver(pool, tmp_path, units(count), workers=workers, stall=stall).run())


def closed(records):
    return sorted(record.unit for _, record in records if isinstance(record, Closed))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_units_are_done_once(tmp_path, workers):
    pool = FakePool()
    records = drive(pool, tmp_path, 5, workers)
    assert closed(records) == ["u0", "u1", "u2", "u3", "u4"]
    assert sorted(name for _, name, _ in pool.requests) == ["u0", "u1", "u2", "u3", "u4"]
    assert pool.started == list(range(workers))
    assert sorted(pool.ended) == list(range(workers))
    assert pool.closed == 1
    assert not any(isinstance(record, WorkerReady) for _, record in records)


def test_there_are_no_more_workers_than_units(tmp_path):
    pool = FakePool()
    drive(pool, tmp_path, 2, workers=9)
    assert pool.started == [0, 1]
    assert drive(FakePool(), tmp_path, 0) == []


def test_a_request_contains_the_expected_number_of_units(tmp_path):
    pool = FakePool()
    drive(pool, tmp_path, 7, workers=2)
    # The unit itself and half of the remaining six, five, …, rounded up.
    assert [times for _, _, times in pool.requests] == [4, 4, 3, 3, 2, 2, 1]


@pytest.mark.parametrize("death", ["exits", "exits later"])
def test_the_unit_of_an_exited_worker_runs_again_first(tmp_path, death):
    pool = FakePool([death])
    records = drive(pool, tmp_path, 3, workers=1)
    assert closed(records) == ["u0", "u1", "u2"]
    assert [name for _, name, _ in pool.requests] == ["u0", "u0", "u1", "u2"]
    assert pool.started == [0, 0]
    assert sum(isinstance(record, WorkerExited) for _, record in records) == 1


def test_a_unit_that_needs_a_restart_gets_a_new_process_last(tmp_path):
    pool = FakePool(["restart"])
    assert closed(drive(pool, tmp_path, 3, workers=1)) == ["u0", "u1", "u2"]
    assert [name for _, name, _ in pool.requests] == ["u0", "u1", "u2", "u0"]
    assert pool.started == [0, 0]
    assert pool.ended == [0, 0]


def test_the_last_unit_gets_a_worker_after_the_others_exited(tmp_path):
    pool = FakePool(["done", "done", "exits", "exits"])
    assert closed(drive(pool, tmp_path, 3, workers=2)) == ["u0", "u1", "u2"]


def test_a_closed_unit_is_not_done_again_when_its_worker_exits(tmp_path):
    pool = FakePool(["done, then exits"])
    assert closed(drive(pool, tmp_path, 2, workers=1)) == ["u0", "u1"]
    assert [name for _, name, _ in pool.requests] == ["u0", "u1"]


@pytest.fixture
def polls(monkeypatch):
    """Each poll of the workers advances the clock by ten seconds."""
    timeouts = []
    receive = FakePool.receive

    def poll(self, timeout):
        timeouts.append(timeout)
        yield from receive(self, timeout)

    monkeypatch.setattr(FakePool, "receive", poll)
    monkeypatch.setattr(driver_module.time, "monotonic", lambda: 10 * len(timeouts))
    return timeouts


def test_a_worker_that_reports_progress_does_not_stall(tmp_path, polls):
    pool = FakePool(["slow"])
    assert closed(drive(pool, tmp_path, 1, workers=1, stall=15)) == ["u0"]
    assert pool.started == [0]
    assert len(polls) > 20


def test_time_taken_by_the_consumer_is_not_a_stall(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(driver_module.time, "monotonic", lambda: clock[0])
    pool = FakePool(["slow", "slow"])
    for _ in Driver(pool, tmp_path, units(2), workers=2, stall=50).run():
        clock[0] += 1000
    assert pool.started == [0, 1]


def test_a_stalled_worker_is_replaced_and_its_unit_runs_again(tmp_path, polls):
    pool = FakePool(["silent"])
    records = drive(pool, tmp_path, 2, workers=1, stall=50)
    # WorkerReady and its last event, six polls until more than 50 s have passed, and then the replacement.
    assert len(polls) == 2 + 6 + 7
    assert closed(records) == ["u0", "u1"]
    assert pool.ended == [0, 0]
    assert [name for _, name, _ in pool.requests] == ["u0", "u0", "u1"]
    assert sum(isinstance(record, WorkerExited) for _, record in records) == 1


def test_a_busy_unit_is_left_to_its_run_after_some_offers(tmp_path):
    pool = FakePool(["busy"])
    assert closed(drive(pool, tmp_path, 3, workers=1)) == ["u0", "u1", "u2"], "the other run may have ended meanwhile"
    assert [name for _, name, _ in pool.requests] == ["u0", "u1", "u2", "u0"]
    pool = FakePool(["done", "done", *["busy"] * 100])
    assert closed(drive(pool, tmp_path, 3, workers=1)) == ["u0", "u1"]


def test_a_refusal_ends_the_sweep(tmp_path):
    pool = FakePool(["done", "refused"])
    with pytest.raises(ValueError, match="there is no such model"):
        drive(pool, tmp_path, 3, workers=1)
    assert pool.closed == 1


def test_workers_that_exit_before_doing_anything_end_the_sweep(tmp_path):
    pool = FakePool(["exits"] * 100)
    with pytest.raises(ValueError, match=r"workers exited 6 times before anything was done: is there enough memory"):
        drive(pool, tmp_path, 3, workers=2)
    assert pool.closed == 1
    # Exits with something done in between do not count.
    assert closed(drive(FakePool(["exits later"] * 100), tmp_path, 3)) == ["u0", "u1", "u2"]


def test_closing_releases_assigned_units(tmp_path):
    (tmp_path / "failures").mkdir()
    for unit in units(3):
        (tmp_path / f"failures/.{unit.name}.json").write_text('{"driver": "", "items": [0]}')
    pool = FakePool(["silent", "silent"])
    records = Driver(pool, tmp_path, units(3), workers=2, stall=1e9).run()
    assert [next(records)[0], next(records)[0]] == [0, 1]
    records.close()
    assert pool.closed == 1
    assert [path.name for path in (tmp_path / "failures").iterdir()] == [".u2.json"], "which was not assigned"


@pytest.mark.slow
@given(
    st.lists(st.sampled_from(["done", "exits later", "restart"]), max_size=30), st.integers(1, 4), st.integers(1, 12)
)
def test_every_unit_is_done_once_even_if_workers_fail(tmp_path_factory, responses, workers, count):
    pool = FakePool(responses)
    records = drive(pool, tmp_path_factory.getbasetemp(), count, workers)
    assert closed(records) == sorted(f"u{number}" for number in range(count))
    assert not pool.waiting


@pytest.mark.parametrize(
    ("gpus", "resources", "expected"),
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
def test_resources_determine_the_pool(monkeypatch, tmp_path, gpus, resources, expected):
    monkeypatch.setattr(running, "_visible_gpus", lambda: gpus)
    monkeypatch.setattr(running.os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(running.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(
        running, "ProcessPool", lambda setup, *, workers, gpus, threads: ("processes", workers, gpus, threads)
    )
    monkeypatch.setattr(running, "RayPool", lambda setup, *, address, workers, threads: ("ray", workers, address))
    open_pool = inspect.unwrap(running._open_pool)  # whose result here is no pool
    assert (
        open_pool(running.Resources(**resources), sweep.Sweep(prompts="a", explainers="random"), tmp_path) == expected
    )
