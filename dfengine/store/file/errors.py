"""Errors of the operating system and of HDF5, as one line that says what to do."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dfengine.store.file.plan import StoreError

_EXPLANATIONS = {
    errno.ENOSPC: "the disk is full: free some space and run the command again to resume",
    errno.EDQUOT: "the disk quota is exceeded: free some space and run the command again to resume",
    errno.EFBIG: "the file-size limit is reached (ulimit -f): raise it and run the command again to resume",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOENT: "the folder does not exist: create it first",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder: name a file in it",
    errno.ELOOP: "it is a symbolic link, which is not followed: remove it",
    errno.EACCES: "permission denied: its folder must be writable",
    errno.EPERM: "permission denied: its folder must be writable",
    errno.ENAMETOOLONG: "its name is too long for the file system: choose a shorter one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOLCK: "the file system does not support locks: write to a local disk and copy the finished file",
}


def explain_error(error: Exception) -> str:
    """The cause and remedy of an error on one line. HDF5 reports the system's error number only in its text."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"errno = (\d+)", str(error))):
        number = int(match[1])
    return _EXPLANATIONS.get(number or 0, " ".join(str(error).split()))


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Raise OSError, and RuntimeError as HDF5 raises it, as a StoreError that names the file being written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot write {path}: {explain_error(error)}") from error


def detach_to_devnull(handle: int, stat: os.stat_result) -> None:
    """Redirect an open file descriptor of HDF5's to /dev/null, which leaves the file on disk as it is.

    HDF5 cannot drop a file that it fails to write: it retries when the file is closed and at exit, and may then mark an
    incomplete file as complete, or crash. Detached from the file, it cleans up without error, and the disk holds what a
    kill would have left. `stat` identifies the file; a descriptor that is another file's by now is left alone.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), stat):
            devnull = os.open(os.devnull, os.O_RDWR)
            os.dup2(devnull, handle)
            os.close(devnull)
