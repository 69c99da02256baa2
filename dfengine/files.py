"""Results appear under their names only when they are complete."""

import contextlib
import glob
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from dfengine.text import printable

#: Nobody writes to a file that has not changed for so long.
_STALE_SECONDS = 600


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A path beside the given one, with its suffix, for a file that replaces it when the block ends without an error.

    Processes and threads that write the same file at once do not disturb each other: the last one's file stays.
    """
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.new{path.suffix}")
    remove_stale(path.parent, path.stem)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path, stem: str | None = None) -> None:
    """Remove what `published` had begun, of one file or of any, where its process was killed some time ago."""
    for left in folder.glob(f".{'*' if stem is None else glob.escape(stem)}.*.new*"):
        if not re.fullmatch(r"\..+\.[0-9a-f]{16}\.new(\.[^.]+)?", left.name):
            continue
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def check_local(path: Path) -> Path:
    """The path. Raises ValueError for an address such as s3://bucket/run, of which a path keeps one slash."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ValueError(
            f"{printable(path)} is an address, not a path: write to a folder of this machine and copy it from there"
        )
    return path
