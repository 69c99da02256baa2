"""The lock that keeps two writers of one file apart.

Not `filelock`: its error does not name the owner, it leaves a lock file beside every result, and where the file system
has no locks it falls back to a lock that outlives a killed process.
"""

import fcntl
import os
import stat
from pathlib import Path

from dfengine.store.file.plan import Busy, StoreError


class Lock:
    """An exclusive lock of the writer of `path`, which the system releases when the process ends in any way.

    Raises Busy, naming the process, if another writer holds it, unless it is to `wait` for that writer; StoreError if
    something else is in the place of the lock file.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        self._path = path.with_name(f".{path.name}.lock")
        while True:
            self._handle = self._open()
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                owner = os.read(self._handle, 20).decode(errors="replace") or "unknown"
                os.close(self._handle)
                raise Busy(f"{path} is being written by another run (process {owner})") from None
            except BaseException:
                os.close(self._handle)
                raise
            if self._is_current():
                break
            os.close(self._handle)
        os.truncate(self._handle, 0)
        os.write(self._handle, str(os.getpid()).encode())

    def _open(self) -> int:
        """The lock file, open. Its folder may be one that others write to: only a file of its own is emptied."""
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError:
            if self._path.is_symlink() or self._path.is_dir():
                raise StoreError(f"{self._path} is in the place of a lock file: remove it") from None
            raise
        status = os.fstat(handle)
        if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
            return handle
        os.close(handle)
        raise StoreError(f"{self._path} is in the place of a lock file: remove it")

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
