"""Workers as actors of Ray, on this machine or many. Ray only places and watches them: what is done is in the files."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dfengine.sweep.records import Gone, Record
from dfengine.sweep.worker import Setup, Worker

#: Bytes of shared memory that a Ray of our own has: what workers tell is small.
_STORE_BYTES = 100 * 2**20


class Cluster:
    """One actor a worker, each with a GPU or some threads to itself. Ray does not start one again that is lost."""

    def __init__(
        self, setup: Setup, *, address: str | None = None, workers: int | None = None, threads: int | None = None
    ) -> None:
        """Use the Ray at an address ("auto": the one that runs here), or begin one for as long as this lasts.

        Raises ValueError where Ray is not installed, or does not answer.
        """
        try:
            import ray
        except ImportError:
            raise ValueError("Ray is not installed: pip install 'dfengine[ray]'") from None
        self._ray, self._setup = ray, setup
        on_terminate = signal.getsignal(signal.SIGTERM)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address is None:
                ray.init(include_dashboard=False, object_store_memory=_STORE_BYTES, **quiet)
            else:
                ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"Ray at {address!r} cannot be used: {reason}") from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray sets its own
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(one.get("GPU", 0) for one in machines))
        self.workers = workers or gpus or len(machines)
        """how many there are room for: one a GPU, or a machine, unless so many were wanted"""
        cores = [int(one.get("CPU", 0)) for one in machines]
        share = None if gpus else max(1, min(cores) // math.ceil(self.workers / len(machines)))
        self._threads = threads or share
        needs = {"num_gpus": 1} if gpus else {"num_cpus": self._threads}
        room = gpus if gpus else sum(one // self._threads for one in cores) if self._threads else 0
        if self.workers > room:
            ray.shutdown()
            each = "a GPU" if gpus else f"{self._threads} threads"
            raise ValueError(f"Ray has no room for {self.workers} workers of {each}: it has room for {room}")
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **needs)(Worker)
        self._seats: dict[int, Any] = {}
        self._answers: dict[Any, int] = {}

    def start(self, worker: int) -> None:
        """Begin a worker, if it is not there, as soon as there is room for it; it tells when it is idle."""
        if worker not in self._seats:
            self._seats[worker] = self._actor.remote(self._setup, threads=self._threads)
        self.ask(worker, None)

    def ask(self, worker: int, request: Any) -> None:
        """Give an idle worker something to do."""
        answer = self._seats[worker].answer.options(num_returns="streaming").remote(request)
        self._answers[answer] = worker

    def receive(self, timeout: float) -> Iterator[tuple[int, Record]]:
        """What workers have told since, waiting for the first for so many seconds at most."""
        answers = list(self._answers)
        ready, _ = self._ray.wait(answers, num_returns=len(answers), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(answers, num_returns=1, timeout=timeout)
        for answer in ready:
            worker = self._answers[answer]
            try:
                yield worker, self._ray.get(next(answer))
            except StopIteration:
                del self._answers[answer]
            except self._ray.exceptions.RayError:
                self.end(worker)
                yield worker, Gone()

    def end(self, worker: int) -> None:
        """End a worker at once."""
        self._answers = {answer: other for answer, other in self._answers.items() if other != worker}
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._seats.pop(worker))

    def close(self) -> None:
        """End all workers: what they have done is on the disk."""
        for worker in list(self._seats):
            self.end(worker)
        self._ray.shutdown()
