"""Where a result is while it is written, the lock that keeps two writers apart, and the system's errors in words."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from dfengine.store.plan import Busy, StoreError

_CAUSES = {
    errno.ENOSPC: "the disk is full: free some space and run again to go on",
    errno.EDQUOT: "the disk quota is used up: free some space and run again to go on",
    errno.EFBIG: "the file-size limit is reached (ulimit -f): raise it and run again to go on",
    errno.EIO: "the disk reports an input/output error",
    errno.ENOENT: "the folder does not exist: create it first",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder: name a file in it",
    errno.EACCES: "permission denied: its folder must be writable",
    errno.EPERM: "permission denied: its folder must be writable",
    errno.ENAMETOOLONG: "its name is too long for the file system: choose a shorter one",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.ENOLCK: "the file system has no locks: write on a local disk and copy the finished file",
}


_MOUNTS = Path("/proc/self/mounts")
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs", "orangefs"),
    *("panfs", "pvfs", "smb", "virtiofs", "wekafs"),
)


def check_name(path: Path) -> None:
    """StoreError for a name that a result cannot have."""
    if path.suffix not in (".h5", ".hdf5") or path.stem.endswith(".part") or not path.stem.strip("."):
        raise StoreError(f"{str(path)!r} is no name for a result: expected one that ends in .h5, as run.h5 does")


def network_storage(folder: Path) -> str:
    """The kind of network or user-space file system a folder is on, as in "nfs4"; empty where it is local."""
    mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()] if _MOUNTS.exists() else []
    here, best = folder.resolve(), ("", "")
    for escaped, kind in mounts:
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), escaped)
        if here.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, kind
    return best[1] if best[1].startswith(_NETWORK) else ""


def working_path(path: Path) -> Path:
    """What a result is called while it is written: its own name, and on network storage one in the temporary folder.

    A file that is read while it is written needs a file system that shows every reader the same bytes: a local one.
    """
    if not network_storage(path.parent):
        return path
    local = Path(tempfile.gettempdir())
    digest = hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]
    return local / f"{path.stem}.{digest}{path.suffix}"


def part_path(path: Path) -> Path:
    """Where a result is while it is being written: run.h5 is run.part.h5."""
    working = working_path(path)
    return working.with_name(f"{working.stem}.part{working.suffix}")


def final_name(name: str) -> str:
    """What a part is called once it is whole: run.part.h5 becomes run.h5."""
    return name.replace(".part.", ".") if ".part." in name else name


def fresh_path(path: Path) -> Path:
    """Where a file is being created, until it can be read: run.h5 is .run.h5.new."""
    return path.with_name(f".{path.name}.new")


def publish_file(part: Path, path: Path) -> None:
    """Gives a finished file its final name at once: it is never there by half, whatever happens to the machine."""
    sync(part)
    if part.parent == path.parent:
        part.replace(path)
    else:
        fresh = fresh_path(path)
        try:
            shutil.copyfile(part, fresh)
            sync(fresh)
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        part.unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str) -> None:
    """Writes a small file that is never there by half, and is on the disk when this returns."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text(text)
    sync(fresh)
    fresh.replace(path)
    sync(path.parent)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Adds lines to a file that many processes add to, each call's together; they are on the disk when this returns."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = size > 0 and file.read(1) != b"\n"
        file.write(("\n" * torn + "".join(f"{line}\n" for line in lines)).encode())
        file.flush()
        os.fsync(file.fileno())


def cause(error: Exception) -> str:
    """The error in words; HDF5 gives the system's number in its text only."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"errno = (\d+)", str(error))):
        number = int(match[1])
    return _CAUSES.get(number or 0, " ".join(str(error).split()))


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's errors into a line that names the file; HDF5 raises some of them as RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StoreError(f"cannot write {path}: {cause(error)}") from error


def cut_off(handle: int, about: os.stat_result) -> None:
    """Leaves the file as it is on the disk, and HDF5, which has it open as `handle`, writing to nowhere.

    HDF5 cannot let go of a file that it fails to write: it tries again on closing and at exit, may then mark a file as
    complete that is not, and crash. Without its file, it clears up in peace, and the file is what a kill would leave.
    """
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(handle), about):
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, handle)
            os.close(nowhere)


class Lock:
    """Held by the one writer of `path`; the system lets go of it when the process ends, however it ends."""

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
        """Whether the name still leads to what was locked: its last owner removes the file on letting go."""
        try:
            return os.stat(self._path).st_ino == os.fstat(self._handle).st_ino
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Lets go, and removes the lock's file."""
        self._path.unlink(missing_ok=True)
        os.close(self._handle)
