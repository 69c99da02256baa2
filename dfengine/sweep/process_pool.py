"""Workers as processes of this machine, each connected by a pipe."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from dfengine.store import release_units
from dfengine.sweep.events import Event, WorkerExited, WorkerReady
from dfengine.sweep.worker import ExplainRequest, Worker, WorkerSetup

#: Seconds that workers have to stop by themselves before they are killed.
GRACE_SECONDS = 15.0


class ProcessPool:
    """One process for each worker; the worker's number determines its GPU."""

    def __init__(
        self, setup: WorkerSetup, *, workers: int = 1, gpus: Sequence[str] = (), threads: int | None = None
    ) -> None:
        """`gpus` are named as in CUDA_VISIBLE_DEVICES; without any, workers see the devices of this process."""
        self.workers = workers
        self._setup, self._gpus, self._threads = setup, gpus, threads
        self._running: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}

    def start(self, worker: int) -> None:
        """Start a worker unless it runs; it reports when it is ready."""
        if worker in self._running:
            self.send(worker, None)
            return
        ours, theirs = Pipe()
        environment = dict(os.environ)
        if self._threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[worker % len(self._gpus)]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dfengine.sweep", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output belongs to this process
            process_group=0,  # Ctrl-C reaches only this process, which stops the workers
        )
        theirs.close()
        ours.send((self._setup, self._threads))
        self._running[worker] = process, ours

    def send(self, worker: int, request: Any) -> None:
        """Send a request to a worker that is ready."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` will report the exit
            self._running[worker][1].send(request)

    def receive(self, timeout: float) -> Iterator[tuple[int, Event]]:
        """Events since the last call, after waiting for the first for at most `timeout` seconds."""
        by_pipe = {pipe: worker for worker, (_, pipe) in self._running.items()}
        for pipe in wait(list(by_pipe), timeout):
            worker = by_pipe[pipe]  # type: ignore[index]  # `wait` returns what it was given
            try:
                yield worker, self._running[worker][1].recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                self.stop(worker)
                yield worker, WorkerExited()

    def stop(self, worker: int) -> None:
        """End a worker at once."""
        process, pipe = self._running.pop(worker)
        process.kill()
        process.wait()
        pipe.close()

    def close(self) -> None:
        """Have all workers stop cleanly; kill those that take too long."""
        for _, pipe in self._running.values():
            pipe.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process, _ in self._running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()


def serve(pipe: Connection) -> None:
    """Run a worker until the other end of the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # may be sent to all processes: the driver stops its workers
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        setup, threads = pipe.recv()
        worker, request = Worker(setup, threads=threads), None
        current: list[str] = []
        threading.Thread(target=_exit_after_parent, args=(os.getppid(), setup, current), daemon=True).start()
        while True:
            current[:] = [request.unit.name] if isinstance(request, ExplainRequest) else []
            with contextlib.closing(worker.handle(request)) as events:
                for event in events:
                    pipe.send(event)
                    # A busy worker is sent nothing: data on the pipe means that it was closed.
                    if not isinstance(event, WorkerReady) and pipe.poll():
                        return
            request = pipe.recv()


def _exit_after_parent(parent: int, setup: WorkerSetup, current: list[str]) -> None:
    """End this process, which may hang, some time after its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE_SECONDS)
    release_units(setup.folder, current, driver=setup.driver)
    os._exit(1)
