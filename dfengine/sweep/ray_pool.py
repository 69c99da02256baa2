"""Workers as Ray actors, on one machine or many. Ray places and watches them; all results are in the run folder."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

from dfengine.sweep.events import Event, WorkerExited
from dfengine.sweep.worker import Worker, WorkerSetup

#: Shared memory of a Ray instance that we start: events are small.
_STORE_BYTES = 100 * 2**20


class RayPool:
    """One actor for each worker, with a GPU or some threads to itself. The driver, not Ray, replaces lost ones."""

    def __init__(
        self, setup: WorkerSetup, *, address: str | None = None, workers: int | None = None, threads: int | None = None
    ) -> None:
        """Connect to Ray at an address ("auto": on this machine), or start an instance that ends with the pool.

        Raises ValueError if Ray is not installed, does not answer, or has no room for the workers.
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
            signal.signal(signal.SIGTERM, on_terminate)  # which Ray replaces
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(sum(one.get("GPU", 0) for one in machines))
        self.workers = workers or gpus or len(machines)
        """by default one for each GPU, or for each machine without any"""
        cores = [int(one.get("CPU", 0)) for one in machines]
        share = None if gpus else max(1, min(cores) // math.ceil(self.workers / len(machines)))
        self._threads = threads or share
        needs = {"num_gpus": 1} if gpus else {"num_cpus": self._threads}
        room = gpus if gpus else sum(one // self._threads for one in cores) if self._threads else 0
        if self.workers > room:
            ray.shutdown()
            each = "a GPU" if gpus else f"{self._threads} threads"
            raise ValueError(f"Ray has room for {room} workers with {each} each: {self.workers} were requested")
        self._actor_class = ray.remote(max_restarts=0, max_task_retries=0, **needs)(Worker)
        self._actors: dict[int, Any] = {}
        self._streams: dict[Any, int] = {}

    def start(self, worker: int) -> None:
        """Start a worker, as soon as there is room, unless it runs; it reports when it is ready."""
        if worker not in self._actors:
            self._actors[worker] = self._actor_class.remote(self._setup, threads=self._threads)
        self.send(worker, None)

    def send(self, worker: int, request: Any) -> None:
        """Send a request to a worker that is ready."""
        stream = self._actors[worker].handle.options(num_returns="streaming").remote(request)
        self._streams[stream] = worker

    def receive(self, timeout: float) -> Iterator[tuple[int, Event]]:
        """Events since the last call, after waiting for the first for at most `timeout` seconds."""
        streams = list(self._streams)
        ready, _ = self._ray.wait(streams, num_returns=len(streams), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(streams, num_returns=1, timeout=timeout)
        for stream in ready:
            worker = self._streams[stream]
            try:
                yield worker, self._ray.get(next(stream))
            except StopIteration:
                del self._streams[stream]
            except self._ray.exceptions.RayError:
                self.stop(worker)
                yield worker, WorkerExited()

    def stop(self, worker: int) -> None:
        """End a worker at once."""
        self._streams = {stream: other for stream, other in self._streams.items() if other != worker}
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actors.pop(worker))

    def close(self) -> None:
        """End all workers; what they have done is on disk."""
        for worker in list(self._actors):
            self.stop(worker)
        self._ray.shutdown()
