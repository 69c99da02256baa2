"""The writing side of a run folder, which holds the results of many processes.

    run/  run.json  manifest.jsonl  segments/<unit>.<attempt>.h5        (.part.h5 while it is written)
          plan.jsonl  weights.jsonl  failures/<unit>.json               (of a sweep)

A unit is a group of items of one model and one shape. Its segments are its attempts, each of which continues the one
before. The manifest is only an index of the closed segments.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dfengine.files import check_local
from dfengine.store.file.errors import translate_os_errors
from dfengine.store.file.files import append_lines, atomic_write_text, final_name, read_text, working_path
from dfengine.store.file.locks import Lock
from dfengine.store.file.plain import load_json, typed
from dfengine.store.file.plan import Plan, StoreError
from dfengine.store.file.schema import FORMAT_VERSION
from dfengine.store.file.writer import Writer
from dfengine.store.run.segments import Segment, list_segments, parse_name, readable_segments, segment_files
from dfengine.store.run.units import UNIT_NAME

FOLDER_FORMAT = "dfengine run"


class Folder:
    """A run folder to write to, from any number of processes. `dfengine.open` reads it."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        run_id: str = "",
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Use the folder, or create it with the settings that all units share.

        Raises StoreError if something else is there.
        """
        self.path = Path(path)
        with translate_os_errors(self.path):
            if not (self.path / "run.json").exists():
                check_free(self.path)
                self._create(run_id or self.path.resolve().name, settings)
        description = read_description(self.path)
        self.run_id: str = description["run_id"]
        self.settings: dict[str, Any] = description["settings"]
        """the settings that all units share, as JSON values"""

    def _create(self, run_id: str, settings: Mapping[str, Any]) -> None:
        (self.path / "segments").mkdir(parents=True, exist_ok=True)
        description = {"format": FOLDER_FORMAT, "format_version": FORMAT_VERSION, "run_id": run_id}
        with self.planning():
            if not (self.path / "run.json").exists():  # of several processes the first creates it
                atomic_write_text(self.path / "run.json", json.dumps(description | {"settings": dict(settings)}))

    @contextlib.contextmanager
    def planning(self) -> Iterator[None]:
        """A lock for the one process that plans units; others wait for it."""
        with translate_os_errors(self.path):
            lock = Lock(self.path / "plan", wait=True)
        with lock:
            yield

    def remove_leftovers(self) -> None:
        """Remove what killed processes left behind: locks that nobody holds, unfinished copies, and parts of units
        that are closed. What a process is using stays.
        """
        closed = self.closed()
        for path in segment_files(self.path):
            if parse_name(path.name)["unit"] in closed:
                self._remove_part(path)
        segments = self.path / "segments"
        if working_path(segments / "u.1.h5").parent != segments:  # network storage: the locks are elsewhere
            return
        for left in [*segments.glob(".*.new"), *segments.glob(".*.lock")]:
            with contextlib.suppress(StoreError, OSError), Lock(left.with_name(left.name[1 : -len(left.suffix)])):
                if left.suffix == ".new":
                    left.unlink(missing_ok=True)

    def closed(self) -> set[str]:
        """The units that have a closed segment. Items of theirs that failed are in `failures`."""
        names = [parse_name(file.name) for file in segment_files(self.path)]
        return {name["unit"] for name in names if name["part"] is None}

    @contextlib.contextmanager
    def hold(self, unit: str) -> Iterator[None]:
        """A lock on a unit, among the processes of this machine. Raises Busy if another process holds it."""
        with translate_os_errors(self.path):
            lock = Lock(working_path(self.path / "segments" / f"{unit}.unit"))
        with lock:
            yield

    def first_weights(self, model: Mapping[str, Any], weights: str) -> str:
        """The fingerprint of a model's weights that the run began with: the given one, if this is its first process."""
        path, described = self.path / "weights.jsonl", dict(model)
        with self.planning(), translate_os_errors(path):
            if path.exists():
                for line in read_text(path).splitlines():
                    with contextlib.suppress(ValueError):  # cut off by a kill
                        values = typed(load_json(line), Mapping[str, Any], "weights.jsonl")
                        if values.get("model") == described:
                            return str(values.get("weights"))
            append_lines(path, [json.dumps({"model": described, "weights": weights})])
        return weights

    def segment(self, unit: str, plan: Plan, *, overwrite: bool = False, **options: Any) -> Writer:
        """A writer for the unit's next attempt, which continues all earlier ones and is listed when it closes.

        `options` are those of `Writer.create`. Raises StoreError if the unit is finished or was begun with another
        plan; with `overwrite`, earlier attempts are ignored.
        """
        if not UNIT_NAME.fullmatch(unit):
            raise StoreError(f"{unit!r} cannot be the name of a unit: use letters, digits, '_', '-' and '.'")
        files = [path for path in segment_files(self.path) if parse_name(path.name)["unit"] == unit]
        attempt = 1 + max((int(parse_name(path.name)["attempt"]) for path in files), default=0)
        earlier = list(readable_segments(files))
        for segment in earlier:
            if all(segment.progress.finished) and not segment.is_part and not overwrite:
                raise StoreError(f"unit {unit!r} of {self.path} is finished: it is {segment.file}")
        path = self.path / "segments" / f"{unit}.{attempt}.h5"
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
            self._remove_part(path.with_name(segment.file))
        return writer

    def finished(self) -> set[str]:
        """The keys of all finished items."""
        return {
            key
            for segment in list_segments(self.path)[0]
            for key, finished in zip(segment.progress.keys, segment.progress.finished, strict=True)
            if finished
        }

    def _list(self, path: Path) -> None:
        """Add a closed segment to the manifest, as one line in one write: other processes may add theirs meanwhile."""
        manifest = self.path / "manifest.jsonl"
        with translate_os_errors(manifest):
            append_lines(manifest, [Segment.read(path).to_json()])

    def _remove_part(self, path: Path) -> None:
        """Remove a part that another attempt continues, unless it is still being written."""
        if parse_name(path.name)["part"] is None:
            return
        # If it is locked or cannot be removed, readers take each item once all the same.
        with contextlib.suppress(StoreError, OSError), Lock(path.with_name(final_name(path.name))):
            path.unlink(missing_ok=True)


def check_free(path: Path) -> None:
    """Raises ValueError if a run folder cannot be created at the path: something else is there, or it is an address."""
    check_local(path)
    if path.is_dir() and not is_folder(path) and any(not _is_of_a_run(entry.name) for entry in path.iterdir()):
        raise StoreError(f"{path} is not a run folder, and not empty: name a new or an empty folder")
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: name a folder")


def _is_of_a_run(name: str) -> bool:
    """Whether an entry of a folder without run.json may belong to another process that is just creating the run."""
    names = ("run.json", "manifest.jsonl", "segments", "plan.jsonl", "weights.jsonl", "failures")
    return name in names or name.startswith((".run.json", ".plan.lock"))


def is_folder(path: Path) -> bool:
    """Whether the path is a run folder."""
    return (path / "run.json").is_file()


def read_description(path: Path) -> dict[str, Any]:
    """The contents of run.json. Raises StoreError if it is unreadable, another program's, or of a newer version."""
    try:
        description: dict[str, Any] = typed(load_json(read_text(path / "run.json")), Mapping[str, Any], "run.json")
        version = typed(description.get("format_version"), int, "format_version")
        is_ours = description.get("format") == FOLDER_FORMAT
        if is_ours and version <= FORMAT_VERSION:
            typed(description.get("run_id"), str, "run_id")
            typed(description.setdefault("settings", {}), Mapping[str, Any], "settings")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not a run folder: its run.json cannot be read ({error})") from None
    if not is_ours:
        raise StoreError(f"{path} is not a run folder: dfengine did not write its run.json")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version}, this dfengine reads up to {FORMAT_VERSION}: upgrade dfengine"
        )
    return description
