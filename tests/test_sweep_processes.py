"""Sweeps in real processes: equal results for any number of workers, even if they fail."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from commands import Fork, dfengine_fork
from marks import soak
from poison import sitecustomize

from dfengine import Random, Rise, store, sweep
from dfengine.explain import random
from dfengine.sweep import process_pool

PROMPTS = ("a red circle above a blue square", "a pink star on a black background", "a green ring")
POISONED = PROMPTS[1]
ITEMS = len(PROMPTS) * 2

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes")]


@pytest.fixture(params=["forked", soak("new")])
def processes(request, monkeypatch):
    """Workers and command lines are forks of this process, which has imported torch, or new processes in soak."""
    if request.param == "forked":
        forking = SimpleNamespace(
            Popen=ForkedWorker, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )
        monkeypatch.setattr(process_pool, "subprocess", forking)
        monkeypatch.setattr(process_pool, "GRACE_SECONDS", 3.0)
    return request.param


class ForkedWorker(Fork):
    """Replaces the `Popen` that starts a worker."""

    def __init__(self, command, *, env, pass_fds, process_group, **_):
        def work():
            os.setpgid(0, process_group)
            os.environ.update(env)
            if env.get("POISON"):
                sitecustomize.poison(random)
            process_pool.serve(Connection(int(command[-1])))

        super().__init__(work, keep=pass_fds, capture=False)


@pytest.fixture(scope="session")
def described(tiny_folder):
    """Units of one item each, since `unit_minutes` allows no more."""
    return sweep.Sweep(
        prompts=PROMPTS,
        seeds=(0, 1),
        schedules=[{"sampling": "latter", "num_steps": 2}],
        models=str(tiny_folder),
        explainers=[Rise(6), Random()],
        unit_minutes=1e-9,
    )


def run_sweep(described, out, workers, **resources):
    return list(sweep.run(described, out, sweep.Resources(workers=workers, device="cpu", threads=1, **resources)))


def read_arrays(out):
    """Every array of every item, by key."""
    with store.open(out) as run:
        return {
            item.key: {
                "image": item.image,
                "latents": np.asarray(item.latents),
                "scores": np.asarray(item.scores["rise"]),
                **{name: np.asarray(maps) for name, maps in item.maps.items()},
            }
            for item in run
        }


def assert_same(arrays_by_key, expected):
    assert arrays_by_key.keys() == expected.keys()
    for key, arrays in expected.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(arrays_by_key[key][name], array, err_msg=name)


ALONE = {}


@pytest.fixture
def expected(described, tmp_path_factory, processes):
    """The arrays computed by one undisturbed worker, once per module."""
    if processes not in ALONE:
        out = tmp_path_factory.mktemp("alone") / "run"
        events = run_sweep(described, out, 1)
        started = events[0][1]
        assert (started.items, started.maps, started.units, started.workers) == (ITEMS, ITEMS * 2 * 2, ITEMS, 1)
        assert sum(event.maps for _, event in events if isinstance(event, sweep.Progress)) == started.maps
        assert sweep.outcome(out).finished
        with store.open(out) as run:
            assert run.finished
            assert (len(run), run.planned) == (ITEMS, ITEMS)
        ALONE[processes] = read_arrays(out)
    return ALONE[processes]


def test_a_finished_sweep_is_not_run_again(described, expected, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run_sweep(described, out, 2)
    monkeypatch.setattr(process_pool.ProcessPool, "start", lambda *_: pytest.fail("no worker is needed"))
    ((_, started),) = run_sweep(described, out, 2)
    assert (started.items, started.units, started.workers) == (0, 0, 0)
    assert_same(read_arrays(out), expected)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [2, *(soak(n) for n in (1, 3))])
def test_a_killed_worker_changes_nothing(described, expected, tmp_path, monkeypatch, workers):
    poison(monkeypatch, {POISONED: f"once:kill:{tmp_path / 'killed'}"})
    out = tmp_path / "run"
    events = run_sweep(described, out, workers)
    assert (tmp_path / "killed").exists()
    assert sum(isinstance(event, sweep.WorkerExited) for _, event in events) == 1
    (failed,) = [one for _, event in events if isinstance(event, sweep.Failed) for one in event.failures]
    assert (failed.described["prompt"], failed.state) == (POISONED, "failed")
    assert sweep.outcome(out).finished
    assert not list(store.failures(out)), "it succeeded the second time"
    assert_same(read_arrays(out), expected)


@pytest.mark.soak
def test_a_poisoned_item_is_quarantined_and_retried_on_request(described, expected, tmp_path, monkeypatch):
    poison(monkeypatch, {POISONED: "kill"})
    out = tmp_path / "run"
    events = run_sweep(described, out, 2)
    assert sum(isinstance(event, sweep.WorkerExited) for _, event in events) == 4, "two items, each twice"
    outcome = sweep.outcome(out)
    assert not outcome.finished
    assert outcome.units_left == 0
    assert [one.described["prompt"] for one in outcome.quarantined] == [POISONED] * 2
    assert all(len(one.errors) == 2 for one in outcome.quarantined)
    with store.open(out) as run:
        assert not run.finished
    # It is not tried again unless that is requested.
    assert run_sweep(described, out, 2)[0][1].units == 0
    monkeypatch.delenv("POISON")
    events = list(sweep.run(described, out, sweep.Resources(workers=1, device="cpu", threads=1), retry_failed=True))
    assert events[0][1].items == 2
    assert sweep.outcome(out).finished
    with store.open(out) as run:
        assert run.finished
    assert_same(read_arrays(out), expected)


@pytest.mark.soak
def test_a_hanging_worker_is_replaced(described, expected, tmp_path, monkeypatch, processes):
    poison(monkeypatch, {POISONED: f"once:hang:{tmp_path / 'hung'}"})
    out = tmp_path / "run"
    events = run_sweep(described, out, 2, stall=25 if processes == "new" else 10)
    assert (tmp_path / "hung").exists()
    assert sum(isinstance(event, sweep.WorkerExited) for _, event in events) == 1
    assert sweep.outcome(out).finished
    assert_same(read_arrays(out), expected)


@pytest.mark.soak
def test_an_error_gets_a_new_process_and_an_invalid_item_does_not(described, tmp_path, monkeypatch):
    poison(monkeypatch, {PROMPTS[0]: "raise", POISONED: "value"})
    out = tmp_path / "run"
    events = run_sweep(described, out, 1)
    failed = [
        (event.needs_restart, one) for _, event in events if isinstance(event, sweep.Failed) for one in event.failures
    ]
    by_prompt = {
        prompt: [(fresh, one.state) for fresh, one in failed if one.described["prompt"] == prompt]
        for prompt in (PROMPTS[0], POISONED)
    }
    # An item alone in its unit is known to be the cause.
    assert sorted(by_prompt[PROMPTS[0]]) == [(True, "failed")] * 2 + [(True, "quarantined")] * 2
    assert by_prompt[POISONED] == [(False, "quarantined")] * 2
    assert {one.errors[-1] for one in sweep.outcome(out).quarantined} == {
        "RuntimeError: poisoned on purpose",
        "poisoned on purpose",
    }


@pytest.mark.soak
@pytest.mark.parametrize("processes", ["new"], indirect=True)
@pytest.mark.parametrize("failure", ["kill", "model"])
def test_ray_computes_the_same(described, expected, tmp_path, monkeypatch, failure):
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    if failure == "model":
        missing = described.model_copy(update={"models": (sweep.ModelSpec(model=str(tmp_path / "nothing")),)})
        with pytest.raises(ValueError, match=r"there is no model at .*nothing"):
            run_sweep(missing, tmp_path / "run", 1, ray_address="local")
        assert not (tmp_path / "run").exists()
        return
    poison(monkeypatch, {POISONED: f"once:kill:{tmp_path / 'killed'}"})
    events = run_sweep(described, tmp_path / "run", 2, ray_address="local")
    assert sum(isinstance(event, sweep.WorkerExited) for _, event in events) == 1
    assert {worker for worker, event in events if isinstance(event, sweep.Closed)} == {0, 1}
    assert sweep.outcome(tmp_path / "run").finished
    assert_same(read_arrays(tmp_path / "run"), expected)


@pytest.mark.soak
def test_shards_complete_the_sweep_together(described, expected, tmp_path):
    spec, out = spec_file(described, tmp_path), tmp_path / "run"
    both = [start(["worker", spec, "-o", str(out), "--shard", f"{part}/2", "--threads", "1"]) for part in (1, 2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert sweep.outcome(out).finished
    assert_same(read_arrays(out), expected)
    with store.open(out) as run:
        assert all(segment.attempt == 1 for segment in run.segments), "no unit was done by both"


def test_json_lines_and_the_exit_status(described, tmp_path, monkeypatch):
    poison(monkeypatch, {POISONED: "value"})
    spec, out = spec_file(described, tmp_path), tmp_path / "run"
    process = start(["sweep", spec, "-o", str(out), "--json", "--threads", "1", "--device", "cpu"])
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    lines = [json.loads(line) for line in output.splitlines()]
    assert lines[0] == {"event": "SweepStarted", "worker": 0, "items": ITEMS, "maps": 24, "units": ITEMS, "workers": 1}
    assert {line["event"] for line in lines} == {"SweepStarted", "Progress", "Failed", "Closed", "Outcome"}
    assert sum(line["maps"] for line in lines if line["event"] == "Progress") > 0
    assert (lines[-1]["finished"], lines[-1]["units_left"], len(lines[-1]["quarantined"])) == (False, 0, 2)
    assert "poisoned on purpose" in errors


@pytest.mark.parametrize("end", [signal.SIGINT, *(soak(end) for end in (signal.SIGTERM, signal.SIGKILL))])
def test_the_same_command_resumes_after_any_interruption(described, expected, tmp_path, monkeypatch, end):
    hung = tmp_path / "hung"
    poison(monkeypatch, {POISONED: f"once:hang:{hung}"})
    spec, out = spec_file(described, tmp_path), tmp_path / "run"
    command = ["sweep", spec, "-o", str(out), "--json", "--workers", "2", "--threads", "1", "--device", "cpu"]
    process = start(command)
    wait_for(hung.exists)  # one worker hangs, the other continues for a while
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, end)
    _, errors = process.communicate(timeout=60)  # the workers share standard error: this waits for them, too
    wait_for(lambda: not any(map(is_alive, workers)))  # a moment after their files are closed
    assert not list((out / "failures").glob(".*")), "no item is blamed"
    if end == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, errors
        assert f"interrupted; completed work is in {out}; rerun the same command to resume" in errors
    assert not sweep.outcome(out).finished
    process = start(command)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(read_arrays(out), expected)


def test_errors_are_one_line_before_anything_starts(described, tmp_path):
    spec = spec_file(described, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    run = str(tmp_path / "run")
    mistakes = {
        ("sweep", str(tmp_path / "no.yaml"), "-o", run): "cannot be read: No such file or directory",
        ("sweep", spec, "-o", str(tmp_path / "other")): "is not a run folder, and not empty",
        ("sweep", spec, "-o", spec): "is a file: name a folder",
        ("sweep", spec, "-o", run, "--workers", "0"): "'0' is not possible: expected a whole number from 1",
        (
            "sweep",
            spec,
            "-o",
            run,
            "--device",
            "cuda:1",
        ): "'--device': 'cuda:1' is not one of 'cpu', 'cuda'",
        ("worker", spec, "-o", run, "--shard", "3/2"): "shard '3/2' is not understood: expected I/N with I from 1 to N",
        ("worker", spec, "-o", run, "--shard", "two"): "shard 'two' is not understood: expected I/N with",
    }
    for command, message in mistakes.items():
        process = start(command)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, command
        assert message in errors
        assert len(errors.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_measures_and_writes_nothing(described, tmp_path):
    spec, out = spec_file(described, tmp_path), tmp_path / "run"
    process = start(["sweep", spec, "-o", str(out), "--dry-run", "--json", "--device", "cpu", "--workers", "2"])
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    result = json.loads(output)
    # Two steps, each with 6 masks, the unmasked latent and both halves of the guidance.
    assert (result["items"], result["units"], result["forwards"]) == (ITEMS, ITEMS, ITEMS * 2 * (7 + 2))
    assert result["hours"] > 0
    assert (result["workers"], result["devices"]) == (2, ["cpu"])
    assert not out.exists()


def poison(monkeypatch, actions):
    monkeypatch.setenv("POISON", json.dumps(actions))
    others = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent / "poison"), *others]))


def spec_file(described, folder):
    source = {"prompts": list(PROMPTS), "seeds": 2, "num_steps": 2, "schedules": "latter", "unit_minutes": 1e-9}
    explainers = [{"rise": {"num_masks": 6}}, "random"]
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(source | {"models": described.models[0].model, "explainers": explainers}))
    assert sweep.read(path) == described
    return str(path)


def start(arguments):
    """A command line that, like its workers, runs in a process of the fixture."""
    if process_pool.subprocess is not subprocess:
        return dfengine_fork(*arguments)
    command = [sys.executable, "-m", "dfengine", *arguments]
    # A shell's background job ignores SIGINT, and would hand that down.
    restore = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore)


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
