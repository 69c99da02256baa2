"""The lock that keeps two writers of one file apart.

Not `filelock`: its error does not name the owner, it leaves a lock file beside every result, and where the file system
has no locks it falls back to a lock that outlives a killed process.
"""

import fcntl
import os
from pathlib import Path

from dfengine.store.file.plan import Busy


class Lock:
    """An exclusive lock of the writer of `path`, which the system releases when the process ends in any way.

    Raises Busy, naming the process, if another writer holds it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f".{path.name}.lock")
        while True:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._handle, 20).decode() or "unknown"
                os.close(self._handle)
                raise Busy(f"{path} is being written by another run (process {owner})") from None
            except OSError:
                os.close(self._handle)
                raise
            if self._is_current():
                break
            os.close(self._handle)
        os.truncate(self._handle, 0)
        os.write(self._handle, str(os.getpid()).encode())

    def _is_current(self) -> bool:
        """Whether the path still leads to the locked file, which its previous owner may just have removed."""
        try:
            return os.stat(self._path).st_ino == os.fstat(self._handle).st_ino
        except FileNotFoundError:
            return False

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock and remove its file."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)
