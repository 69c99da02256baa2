"""The segments of a run folder: each a file of one unit, listed in the manifest once it is closed."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dfengine.store.file.files import read_text
from dfengine.store.file.plain import load_json, typed
from dfengine.store.file.plan import StoreError
from dfengine.store.file.reader import open_file
from dfengine.store.file.schema import MARKERS

#: How often the folder is listed again if files are renamed meanwhile.
_MAX_LISTINGS = 5
_FILE_NAME = re.compile(r"(?P<unit>.+)\.(?P<attempt>\d+)(?P<part>\.part)?\.h5")


@dataclass(frozen=True)
class ItemProgress:
    """What is done of each item of a file."""

    keys: tuple[str, ...]
    finished: tuple[bool, ...]
    marks: tuple[int, ...]
    """the number of results of each item that are safely stored"""

    @classmethod
    def read(cls, path: Path) -> ItemProgress:
        with open_file(path) as run:
            finished = np.isfinite(run.read("items/seconds", {}))
            marks = sum(run.marks(name).reshape(len(run), -1).sum(1) for name in MARKERS)
            return cls(tuple(item.key for item in run.plan.items), tuple(finished.tolist()), tuple(marks.tolist()))


@dataclass(frozen=True)
class Segment:
    """One file of a run folder, and what is done of its items: a line of the manifest."""

    file: str
    unit: str
    attempt: int
    progress: ItemProgress

    @classmethod
    def read(cls, path: Path) -> Segment:
        """The segment as its own file describes it."""
        name = parse_name(path.name)
        return cls(path.name, name["unit"], int(name["attempt"]), ItemProgress.read(path))

    @classmethod
    def from_json(cls, line: str) -> Segment:
        """The segment of a manifest line. Raises ValueError if the line is damaged."""
        values = typed(load_json(line), Mapping[str, Any], "segment")
        lists = {name: values.pop(name, None) for name in ("keys", "finished", "marks")}
        segment: Segment = typed(values | {"progress": lists}, cls, "segment")
        if len({len(values) for values in vars(segment.progress).values()}) > 1:
            raise ValueError(f"{line!r} is damaged")
        return segment

    def to_json(self) -> str:
        named = {"file": self.file, "unit": self.unit, "attempt": self.attempt}
        return json.dumps(named | vars(self.progress))

    @property
    def is_part(self) -> bool:
        """Whether the file is being written, or was interrupted."""
        return parse_name(self.file)["part"] is not None


def list_segments(path: Path) -> tuple[list[Segment], list[str]]:
    """Every segment of a folder by unit and attempt, and the files that the manifest lists but that are gone.

    Closed segments are taken from the manifest, others from their files. An unreadable file is skipped with a warning.
    """
    for _ in range(_MAX_LISTINGS):
        files = segment_files(path)
        segments = list(readable_segments(files, {segment.file: segment for segment in _read_manifest(path)}))
        # A part may be renamed, or resumed and removed, while this reads it: then list again.
        if all(file.exists() for file in files):
            break
    return segments, sorted({segment.file for segment in _read_manifest(path)} - {file.name for file in files})


def readable_segments(files: Sequence[Path], listed: Mapping[str, Segment] = MappingProxyType({})) -> Iterator[Segment]:
    """The segment of each file, from `listed` if it is there. An unreadable file is skipped with a warning."""
    for file in files:
        try:
            yield listed.get(file.name) or Segment.read(file)
        except StoreError as error:
            if file.exists():
                warnings.warn(f"{error}; the segment is skipped", stacklevel=3)


def select_items(files: Iterable[ItemProgress]) -> list[tuple[int, int]]:
    """Which copy of each item to read, as (file, index in it): the first finished one, else the one with most results.

    Of several copies with equally many results the latest is taken.
    """
    best: dict[str, tuple[tuple[bool, int], int, int]] = {}
    for number, progress in enumerate(files):
        items = zip(progress.keys, progress.finished, progress.marks, strict=True)
        for index, (key, finished, marks) in enumerate(items):
            rank = (finished, 0 if finished else marks)
            if key not in best or rank > best[key][0] or (rank == best[key][0] and not finished):
                best[key] = rank, number, index
    return [(number, index) for _, number, index in best.values()]


def segment_files(path: Path) -> list[Path]:
    """The files of all segments, by unit and attempt."""
    try:
        entries = list((path / "segments").iterdir())
    except FileNotFoundError:
        entries = []
    matches = [(file, match) for file in entries if (match := _FILE_NAME.fullmatch(file.name))]
    return [file for file, match in sorted(matches, key=lambda pair: (pair[1]["unit"], int(pair[1]["attempt"])))]


def parse_name(name: str) -> dict[str, Any]:
    """Unit, attempt and part (None for a closed file) of a segment's file name."""
    match = _FILE_NAME.fullmatch(name)
    if match is None:
        raise StoreError(f"{name} is not the name of a segment: expected <unit>.<attempt>.h5")
    return match.groupdict()


def _read_manifest(path: Path) -> Iterator[Segment]:
    try:
        lines = read_text(path / "manifest.jsonl").splitlines()
    except OSError:  # the segments themselves are still there
        return
    for line in lines:
        try:
            yield Segment.from_json(line)
        except ValueError:
            continue  # cut off by a kill; the segment itself is still there
