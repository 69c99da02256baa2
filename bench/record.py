"""Rows of benchmarks: the commit they were measured at, where they are kept, and the tables generated from them.

    python bench/record.py        # stamp the sources, so that a copy without git (on a GPU machine) can record rows

Rows are recorded only for sources that are committed. Documents and recorded rows are not sources: recording a row
leaves the tree clean, so several benchmarks can run one after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

ROOT = Path(__file__).parent.parent
#: What a measurement depends on, as patterns of Path.glob and of git; documents (*.md) are left out.
SOURCES = (
    "dfengine/**/*",
    "kernels/**/*",
    "bench/*.py",
    "tests/tolerance.py",  # the tolerances of the checks
    "pyproject.toml",
    "constraints.txt",
)
#: Stands in for a table that has no rows.
NOT_MEASURED = "Not measured yet at a clean commit.\n"

Row = dict[str, Any]
#: (document, marker) → the function that renders all rows of a result as that table
Tables = Mapping[tuple[str, str], Callable[[list[Row]], str]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the first line of a script's docstring and the option that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument(
        "--no-record", action="store_true", help="print the table only; the tree may have uncommitted changes"
    )
    return made


class Recorder:
    """Records the rows of one result, bench/results/<result>.json, and regenerates its tables.

    Made before anything is measured: exits with status 2 if the sources are not those of a commit, unless nothing is to
    be recorded.
    """

    def __init__(self, result: str, tables: Tables, *, record: bool = True) -> None:
        self.result, self.tables, self.record = result, tables, record
        self.commit = committed_sources() if record else "uncommitted"

    def environment(self, device: torch.device) -> Row:
        """The commit, device and versions of a row."""
        return {
            "commit": self.commit,
            "device": device_name(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def replace(self, rows: Sequence[Row], key: tuple[str, ...] = ()) -> None:
        """Record rows in place of those that agree with one of them in all columns of `key`; by default of all rows.

        Exits with status 2 if the sources were changed since the measurement began.
        """
        if not self.record:
            return
        if committed_sources(self.commit) != self.commit:
            refuse("the sources were changed during the measurement")
        replaced = {tuple(row[name] for name in key) for row in rows}
        kept = [row for row in read(self.result) if tuple(row[name] for name in key) not in replaced]
        write(self.result, [*kept, *rows])
        regenerate(self.result, self.tables)


# Rows and tables -----------------------------------------------------------------------------------------------------


def read(result: str) -> list[Row]:
    """The recorded rows of a result; none if it was not measured."""
    path = ROOT / f"bench/results/{result}.json"
    return json.loads(path.read_text()) if path.exists() else []


def write(result: str, rows: Sequence[Row]) -> None:
    """Write the rows of a result, one on each line; without rows there is no file."""
    path = ROOT / f"bench/results/{result}.json"
    if not rows:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f"[\n{lines}\n]\n")


def regenerate(result: str, tables: Tables) -> None:
    """Put the tables of a result between their markers in the documents."""
    rows = read(result)
    for (document, marker), render in tables.items():
        path, begin, end = ROOT / document, f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->\n"
        before, found, rest = path.read_text().partition(begin)
        _, also_found, after = rest.partition(end)
        if not (found and also_found):
            raise ValueError(f"{document} has no lines '{begin.strip()}' and '{end.strip()}' to put a table between")
        path.write_text(f"{before}{begin}{render(rows) if rows else NOT_MEASURED}{end}{after}")


def provenance(rows: Sequence[Row], *names: str) -> str:
    """A line that says at which commits, on which devices and with which versions the rows were measured."""
    parts = []
    for row in rows:
        versions = [f"{name} {row[name]}" for name in ("torch", *names) if name in row]
        parts.append(", ".join([f"commit `{row['commit']}`", row["device"], *versions]))
    return f"Measured at {'; '.join(dict.fromkeys(parts))}.\n"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    from dfengine.profile.clock import cpu_description  # not at the top: the kernels are measured without dfengine

    return cpu_description()


# Checks --------------------------------------------------------------------------------------------------------------


def check(passed: bool, failure: str) -> None:
    """Exit with status 1 where a check of the benchmark fails: no number is reported then."""
    if not passed:
        sys.exit(f"check failed: {failure}; nothing is reported")


@contextmanager
def checked(what: str) -> Iterator[None]:
    """The same for the AssertionError of a comparison: its first line is reported."""
    try:
        yield
    except AssertionError as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "not equal")
        check(False, f"{what}: {reason.strip()}")


# Sources -------------------------------------------------------------------------------------------------------------


def committed_sources(commit: str | None = None) -> str:
    """The short hash of the commit (by default HEAD) that the sources are those of.

    Exits with status 2 if they differ from it. A copy without git has the commit of its stamp if its sources are the
    stamped ones.
    """
    if not is_checkout():
        return stamped_commit()
    commit = commit or git("rev-parse", "--short", "HEAD")
    patterns = [f":(glob){pattern}" for pattern in SOURCES] + [":(exclude,glob)**/*.md"]
    changed = git("diff", "--name-only", commit, "--", *patterns).splitlines()
    changed += git("ls-files", "--others", "--exclude-standard", "--", *patterns).splitlines()
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        refuse(f"uncommitted changes in {', '.join(changed[:3])}{more}")
    return commit


def is_checkout() -> bool:
    """Whether this folder is the top of a git working tree (a copy may lie inside another one)."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"]
    try:
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return run.returncode == 0 and Path(run.stdout.strip()).resolve() == ROOT.resolve()


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def stamped_commit() -> str:
    stamp = ROOT / "bench/stamp.json"
    if not stamp.exists():
        refuse("this folder is not a git checkout and has no stamp: run `python bench/record.py` in one, then copy it")
    stamped = json.loads(stamp.read_text())
    if stamped["digest"] != digest():
        refuse(f"the sources are not those of commit {stamped['commit']}, which bench/stamp.json names")
    return stamped["commit"]


def digest() -> str:
    """SHA-256 of the names and contents of all sources."""
    found = {path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".md"}
    total = hashlib.sha256()
    for path in sorted(path for path in found if "__pycache__" not in path.parts):
        total.update(f"{path.relative_to(ROOT).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def refuse(reason: str) -> NoReturn:
    print(
        f"error: no row can be recorded: {reason}. Commit first, or pass --no-record to print the table only.",
        file=sys.stderr,
    )
    raise SystemExit(2)


if __name__ == "__main__":
    if not is_checkout():
        refuse("this folder is not a git checkout")
    current = {"commit": committed_sources(), "digest": digest()}
    (ROOT / "bench/stamp.json").write_text(json.dumps(current) + "\n")
    print(f"bench/stamp.json: {current['commit']}")
