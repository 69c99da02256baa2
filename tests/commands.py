"""The command line and other functions for tests: in this process, in a fork, or in a new process.

A new process needs about ten seconds to import torch and diffusers; a fork has them already.
"""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout, suppress
from unittest.mock import patch

from dfengine.cli import main


def dfengine_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The exit status and output of `dfengine ARGUMENTS`, run in this process.

    An exception that main() does not handle, which would be a traceback, propagates.
    """
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["dfengine", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as raised:
            status = int(raised.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def dfengine_process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The same in a new process, for tests of the environment or of output at exit."""
    command = [sys.executable, "-m", "dfengine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


class Fork:
    """A fork of this process that runs a function: what the tests need of `subprocess.Popen`."""

    def __init__(self, function: Callable[[], object], *, keep: Iterable[int] = (), capture: bool = True) -> None:
        """File descriptors above 2 are closed, except those in `keep`; output is captured or goes to stderr."""
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)] if capture else []  # noqa: SIM115
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: other threads are not forked
            self.pid = os.fork()
        if not self.pid:
            _become(function, [file.fileno() for file in self._files] or [2, 2], {0, 1, 2, *keep})

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired."""
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.01)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """Wait for the process and return its standard output and standard error."""
        self.wait(timeout)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        return tuple(texts)

    def __del__(self) -> None:
        for file in self._files:
            file.close()


def _become(function: Callable[[], object], output: list[int], keep: set[int]) -> None:
    """Run the function as in a separate process and exit."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, file in enumerate(output, 1):
            os.dup2(file, number)
        # Replaced rather than closed: objects of the parent that are collected here close numbers of their own.
        null = os.open(os.devnull, os.O_RDWR)
        for file in {int(name) for name in os.listdir("/proc/self/fd")} - keep - {null}:
            with suppress(OSError):
                os.dup2(null, file)
        os.dup2(null, 0)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        function()
        status = 0
    except SystemExit as raised:
        status = int(raised.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def dfengine_fork(*arguments: str, before: Callable[[], object] = lambda: None) -> Fork:
    """`dfengine ARGUMENTS` in a fork, for signals and limits, which `before` may set."""

    def run() -> None:
        before()
        sys.argv = ["dfengine", *arguments]
        main()

    return Fork(run)
