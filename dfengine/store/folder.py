"""A run folder: results written by many, each a segment of its own, and listed in a manifest.

    run/  run.json  manifest.jsonl  segments/<unit>.<attempt>.h5        (.part.h5 while it is written)
          plan.jsonl  failures/<unit>.json                              (of a sweep)

A unit is some items of one model and one shape. Its segments are its attempts: each goes on from the one before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dfengine.store.files import Lock, append_lines, final_name, sync, working_path, writing
from dfengine.store.plan import Plan, StoreError
from dfengine.store.reader import open_file
from dfengine.store.schema import FORMAT_VERSION, MARKERS
from dfengine.store.writer import Writer

FOLDER_FORMAT = "dfengine run"
#: A listing is made again, at most so often, where files get other names meanwhile.
_LOOKS = 5
_UNIT = re.compile(r"\w[\w.-]*")
_SEGMENT = re.compile(r"(?P<unit>.+)\.(?P<attempt>\d+)(?P<part>\.part)?\.h5")

#: Of each item of a file: its key, whether it is finished, and how many things of it are marked.
OutputSpec = tuple[tuple[str, ...], tuple[bool, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Segment:
    """One file of a run folder, and what is done of its items: a line of the manifest."""

    file: str
    unit: str
    attempt: int
    keys: tuple[str, ...]
    finished: tuple[bool, ...]
    marks: tuple[int, ...]
    """how many things of each item are safely stored"""

    @classmethod
    def read(cls, path: Path) -> Segment:
        """What a segment's own file says of it."""
        named = _named(path.name)
        return cls(path.name, named["unit"], int(named["attempt"]), *cls.contents(path))

    @staticmethod
    def contents(path: Path) -> OutputSpec:
        """The keys of a file's items, which of them are finished, and how much of each is marked."""
        with open_file(path) as run:
            finished = np.isfinite(run.read("items/seconds", {}))
            marks = sum(run.marks(name).reshape(len(run), -1).sum(1) for name in MARKERS)
            return tuple(item.key for item in run.plan.items), tuple(finished.tolist()), tuple(marks.tolist())

    @classmethod
    def from_line(cls, line: str) -> Segment:
        values = json.loads(line)
        segment = cls(**values | {name: tuple(values[name]) for name in ("keys", "finished", "marks")})
        if not len(segment.keys) == len(segment.finished) == len(segment.marks):
            raise ValueError(f"{line!r} is damaged")
        return segment

    @property
    def is_part(self) -> bool:
        """Whether it is being written, or was cut off."""
        return _named(self.file)["part"] is not None


class Folder:
    """The writing side of a run folder; any number of processes may have one. `dfengine.open` reads it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        run_id: str = "",
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Use the folder, or make it with what all its units share. StoreError where something else is there."""
        self.path = Path(path)
        described = self.path / "run.json"
        with writing(self.path):
            if not described.exists():
                check_free(self.path)
                (self.path / "segments").mkdir(parents=True, exist_ok=True)
                fresh = self.path / f".run.json.{os.getpid()}"
                described_as = {"format": FOLDER_FORMAT, "format_version": FORMAT_VERSION}
                named = {"run_id": run_id or self.path.resolve().name, "settings": dict(settings)}
                fresh.write_text(json.dumps(described_as | named))
                sync(fresh)
                with contextlib.suppress(FileExistsError):  # of several processes the first makes it
                    os.link(fresh, described)
                fresh.unlink()
                sync(self.path)
        told = read_description(self.path)
        self.run_id: str = told["run_id"]
        self.settings: dict[str, Any] = told.get("settings", {})
        """what all its units share, as JSON values"""

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """Held by the one process that plans; others wait for it."""
        with writing(self.path):
            lock = (self.path / ".plan.lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def closed(self) -> set[str]:
        """The units that are done: those with a segment that is closed. What of them failed is in `failures`."""
        named = [_named(file.name) for file in _files(self.path)]
        return {one["unit"] for one in named if one["part"] is None}

    @contextlib.contextmanager
    def hold(self, unit: str) -> Iterator[None]:
        """Has a unit to itself, among the processes of this machine. Raises Busy where another has it."""
        with writing(self.path):
            lock = Lock(working_path(self.path / "segments" / f"{unit}.unit"))
        try:
            yield
        finally:
            lock.release()

    def segment(self, unit: str, plan: Plan, *, overwrite: bool = False, **options: Any) -> Writer:
        """A writer of the unit's next attempt, which goes on from what all earlier ones have; listed when it closes.

        `options` are `Writer.create`'s. StoreError where the unit is finished, or was begun with another plan, unless
        with `overwrite`: what was done is then left aside.
        """
        if not _UNIT.fullmatch(unit):
            raise StoreError(
                f"{unit!r} is no name for a unit: expected letters, digits, '_', '-' and '.', as in a file's"
            )
        named = [path for path in _files(self.path) if _named(path.name)["unit"] == unit]
        number = 1 + max((int(_named(path.name)["attempt"]) for path in named), default=0)
        earlier = list(_readable(named))
        for segment in earlier:
            if all(segment.finished) and not segment.is_part and not overwrite:
                raise StoreError(f"unit {unit!r} of {self.path} is finished: it is {segment.file}")
        path = self.path / "segments" / f"{unit}.{number}.h5"
        writer = Writer.create(
            path,
            plan,
            sources=[] if overwrite else [path.with_name(segment.file) for segment in reversed(earlier)],
            resume=not overwrite,
            overwrite=overwrite,
            run_id=self.run_id,
            on_publish=lambda: self._list(path),
            **options,
        )
        for segment in earlier:
            self._remove(path.with_name(segment.file))
        return writer

    def finished(self) -> set[str]:
        """The keys of all items that are finished: what need not be done again."""
        return {
            key
            for segment in segments(self.path)[0]
            for key, done in zip(segment.keys, segment.finished, strict=True)
            if done
        }

    def _list(self, path: Path) -> None:
        """Adds a finished segment to the manifest: one write of one line, whoever else is adding one."""
        manifest = self.path / "manifest.jsonl"
        with writing(manifest):
            append_lines(manifest, [json.dumps(asdict(Segment.read(path)))])

    def _remove(self, old: Path) -> None:
        """Removes a part that has been gone on from, unless its writer is still at it."""
        if _named(old.name)["part"] is None:
            return
        # Held by another, or not to be removed: the next reader takes each item once all the same.
        with contextlib.suppress(StoreError, OSError):
            lock = Lock(old.with_name(final_name(old.name)))
            try:
                old.unlink(missing_ok=True)
            finally:
                lock.release()


def check_free(path: Path) -> None:
    """StoreError where a run folder cannot be made, as something else is there."""
    if path.is_dir() and not is_folder(path) and any(not _is_ours(entry.name) for entry in path.iterdir()):
        raise StoreError(f"{path} is a folder of something else: name a new or an empty one")
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: name a folder")


def _is_ours(name: str) -> bool:
    """Whether an entry of a folder that had no run.json may be of another process, which is just making it."""
    return name in ("run.json", "manifest.jsonl", "segments", "plan.jsonl", "failures") or name.startswith(
        (".run.json", ".plan.lock")
    )


def is_folder(path: Path) -> bool:
    """Whether there is a run folder at the path."""
    return (path / "run.json").is_file()


def read_description(path: Path) -> dict[str, Any]:
    """run.json; StoreError where it is not ours, or newer."""
    try:
        described = json.loads((path / "run.json").read_text())
        ours, version = described["format"] == FOLDER_FORMAT, int(described["format_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a run folder: its run.json cannot be read ({error})") from None
    if not ours:
        raise StoreError(f"{path} is not a run folder: dfengine did not write its run.json")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this dfengine reads up to {FORMAT_VERSION}: upgrade dfengine"
        )
    return described


def segments(path: Path) -> tuple[list[Segment], list[str]]:
    """Every segment there is, by unit and attempt, and the names of those that the manifest has and that are gone.

    Finished ones are told by the manifest, others by their files; one that cannot be read is left out, with a warning.
    """
    for _ in range(_LOOKS):
        files = _files(path)
        found = list(_readable(files, {segment.file: segment for segment in _manifest(path)}))
        # A part becomes a finished segment, or is gone on from, while this is looking: look again.
        if all(file.exists() for file in files):
            break
    return found, sorted({segment.file for segment in _manifest(path)} - {file.name for file in files})


def _readable(files: Sequence[Path], listed: Mapping[str, Segment] = MappingProxyType({})) -> Iterator[Segment]:
    for file in files:
        try:
            yield listed.get(file.name) or Segment.read(file)
        except StoreError as error:
            if file.exists():
                warnings.warn(f"{error}: it is left out", stacklevel=3)


def take_best(contents: Iterable[OutputSpec]) -> list[tuple[int, int]]:
    """Where to take each item from, once, as (segment, place in it): the first finished one, or the one with most done.

    Of several with as much the latest.
    """
    best: dict[str, tuple[tuple[bool, int], int, int]] = {}
    for number, items in enumerate(contents):
        for place, (key, finished, marks) in enumerate(zip(*items, strict=True)):
            worth = (finished, 0 if finished else marks)
            if key not in best or worth > best[key][0] or (worth == best[key][0] and not finished):
                best[key] = worth, number, place
    return [(number, place) for _, number, place in best.values()]


def _manifest(path: Path) -> Iterator[Segment]:
    try:
        lines = (path / "manifest.jsonl").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            yield Segment.from_line(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill; the segment is there all the same


def _files(path: Path) -> list[Path]:
    """The segments' files, by unit and attempt."""
    try:
        entries = list((path / "segments").iterdir())
    except FileNotFoundError:
        entries = []
    named = [(file, match) for file in entries if (match := _SEGMENT.fullmatch(file.name))]
    return [file for file, match in sorted(named, key=lambda pair: (pair[1]["unit"], int(pair[1]["attempt"])))]


def _named(name: str) -> dict[str, Any]:
    match = _SEGMENT.fullmatch(name)
    if match is None:
        raise StoreError(f"{name} is no name of a segment: expected <unit>.<attempt>.h5")
    return match.groupdict()
