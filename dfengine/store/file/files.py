"""Names of a result and of its unfinished part, and file operations that survive a crash of the machine."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from dfengine.store.file.plan import StoreError
from dfengine.text import printable

_MOUNTS = Path("/proc/self/mounts")
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "drvfs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs", "orangefs"),
    *("panfs", "pvfs", "smb", "virtiofs", "wekafs"),
)


def check_name(path: Path) -> None:
    """Raises StoreError unless the name suits a result: run.h5 or run.hdf5."""
    if path.suffix not in (".h5", ".hdf5") or path.stem.endswith(".part") or not path.stem.strip("."):
        raise StoreError(f"{str(path)!r} cannot be the name of a result: expected a name that ends in .h5, as run.h5")


def check_folder(path: Path) -> None:
    """Raise OSError if the folder cannot take a result."""
    os.stat(os.path.join(path.parent, "."))  # not that of a file
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "")


def warn_of_network_storage(path: Path) -> None:
    """Warn if a result is written elsewhere first."""
    if working_path(path) != path:
        kind, part = network_storage(path.parent), part_path(path)
        note = f"{path} is on {kind} storage: it is written as {part} and copied on completion"
        warnings.warn(printable(note), stacklevel=3)


def check_regular(path: Path) -> None:
    """Raises OSError unless it is a file: reading a pipe or a device would wait for ever."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "")
    if not stat.S_ISREG(mode):
        raise OSError("it is a pipe, a socket or a device, not a file")


def read_text(path: Path) -> str:
    """The text of a small file of a run folder. Raises OSError, also for what is not a file."""
    check_regular(path)
    return path.read_text(encoding="utf-8", errors="replace")


def create(path: Path) -> BinaryIO:
    """A new file, in place of what was left there; a link is replaced, not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def network_storage(folder: Path) -> str:
    """The type of the network or user-space file system that holds a folder, such as "nfs4"; "" for a local one."""
    mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()] if _MOUNTS.exists() else []
    resolved, best = folder.resolve(), ("", "")
    for escaped, kind in mounts:
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), escaped)
        if resolved.is_relative_to(point) and len(point) >= len(best[0]):
            best = point, kind
    return best[1] if best[1].startswith(_NETWORK) else ""


def working_path(path: Path) -> Path:
    """Where a result is written: the path itself, or one in the temporary folder if it is on network storage.

    Reading a file during writing needs a file system that shows the same bytes to every reader, that is a local one.
    """
    if not network_storage(path.parent):
        return path
    local = Path(tempfile.gettempdir())
    digest = hashlib.sha256(bytes(path.resolve())).hexdigest()[:8]
    return local / f"{path.stem}.{digest}{path.suffix}"


def part_path(path: Path) -> Path:
    """The path of an unfinished result: run.part.h5 for run.h5."""
    working = working_path(path)
    return working.with_name(f"{working.stem}.part{working.suffix}")


def final_name(name: str) -> str:
    """The name that a part gets on completion: run.h5 for run.part.h5."""
    return name.replace(".part.", ".") if ".part." in name else name


def temporary_path(path: Path) -> Path:
    """The path under which a file or folder is created before it can be read: .run.h5.new for run.h5."""
    return path.with_name(f".{path.name}.new")


def publish_file(part: Path, path: Path) -> None:
    """Give a finished file its final name atomically: whatever happens to the machine, it is never incomplete there."""
    fsync(part)
    if part.parent == path.parent:
        part.replace(path)
    else:
        copy = temporary_path(path)
        try:
            with part.open("rb") as source, create(copy) as target:
                shutil.copyfileobj(source, target)
            fsync(copy)
            copy.replace(path)
        finally:
            copy.unlink(missing_ok=True)
        part.unlink()
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a small file atomically; it is on the disk when this returns. Its writer holds a lock."""
    temporary = temporary_path(path)
    with create(temporary) as file:
        file.write(text.encode(errors="surrogateescape"))
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file that several processes append to. They stay together, and are on the disk on return."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644), "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        is_torn = size > 0 and file.read(1) != b"\n"
        file.write(("\n" * is_torn + "".join(f"{line}\n" for line in lines)).encode())
        file.flush()
        os.fsync(file.fileno())
