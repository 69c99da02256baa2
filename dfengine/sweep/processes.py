"""Workers as processes of this machine, each behind a pipe."""

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
from dfengine.sweep.records import Gone, Idle, Record
from dfengine.sweep.worker import Explain, Setup, Worker

#: Seconds that workers have to put down what they are at, before they are ended.
GRACE = 15.0


class Processes:
    """One process a worker; the place of a worker decides which GPU it sees."""

    def __init__(self, setup: Setup, *, workers: int = 1, gpus: Sequence[str] = (), threads: int | None = None) -> None:
        """`gpus` are named as in CUDA_VISIBLE_DEVICES; without any, workers see what this process sees."""
        self.workers = workers
        self._setup, self._gpus, self._threads = setup, gpus, threads
        self._seats: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}

    def start(self, worker: int) -> None:
        """Begin a worker, if it is not there; it tells when it is idle."""
        if worker in self._seats:
            self.ask(worker, None)
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
            stdout=2,  # standard output is this process's own
            process_group=0,  # Ctrl-C is for this process, which tells the others
        )
        theirs.close()
        ours.send((self._setup, self._threads))
        self._seats[worker] = process, ours

    def ask(self, worker: int, request: Any) -> None:
        """Give an idle worker something to do."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `receive` will tell that it is gone
            self._seats[worker][1].send(request)

    def receive(self, timeout: float) -> Iterator[tuple[int, Record]]:
        """What workers have told since, waiting for the first for so many seconds at most."""
        by_pipe = {pipe: worker for worker, (_, pipe) in self._seats.items()}
        for pipe in wait(list(by_pipe), timeout):
            worker = by_pipe[pipe]  # type: ignore[index]  # `wait` returns what it was given
            try:
                yield worker, self._seats[worker][1].recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                self.end(worker)
                yield worker, Gone()

    def end(self, worker: int) -> None:
        """End a worker at once."""
        process, pipe = self._seats.pop(worker)
        process.kill()
        process.wait()
        pipe.close()

    def close(self) -> None:
        """Let workers put down what they are at; end those that take too long."""
        for _, pipe in self._seats.values():
            pipe.close()
        deadline = time.monotonic() + GRACE
        for process, _ in self._seats.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._seats.clear()


def serve(pipe: Connection) -> None:
    """Be a worker, until the other end of the pipe is closed."""
    for stop in (signal.SIGINT, signal.SIGTERM):  # which may be sent to all processes: the driver stops its workers
        signal.signal(stop, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        setup, threads = pipe.recv()
        worker, request = Worker(setup, threads=threads), None
        in_hand: list[str] = []
        threading.Thread(target=_end_with, args=(os.getppid(), setup, in_hand), daemon=True).start()
        while True:
            in_hand[:] = [request.unit.name] if isinstance(request, Explain) else []
            with contextlib.closing(worker.answer(request)) as records:
                for record in records:
                    pipe.send(record)
                    # Nothing is asked of a worker that is not idle: then the pipe is closed.
                    if not isinstance(record, Idle) and pipe.poll():
                        return
            request = pipe.recv()


def _end_with(parent: int, setup: Setup, in_hand: list[str]) -> None:
    """End this process some time after its parent has ended, if it does not see to that itself: it may hang."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(GRACE)
    release_units(setup.folder, in_hand, driver=setup.driver)
    os._exit(1)
