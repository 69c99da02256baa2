"""Rows are recorded from committed sources only, and all tables in the documents are generated from them."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import record
import tables
import torch

ROOT = Path(__file__).parent.parent


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed tree with one file of every kind of source, a document and a recorded row."""
    folder = tmp_path / "checkout"
    files = {
        "dfengine/engine.py": "1",
        "dfengine/report/page/page.html": "1",
        "kernels/dfkernels/games.py": "1",
        "kernels/README.md": "<!-- rates: begin -->\n<!-- rates: end -->\n",
        "bench/rates.py": "1",
        "bench/results/rates.json": '[\n{"device": "a card", "rate": 1}\n]\n',
        "tests/tolerance.py": "1",
        "tests/test_engine.py": "1",
        "pyproject.toml": "1",
        "constraints.txt": "1",
        ".gitignore": "__pycache__/\n/bench/stamp.json\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "--quiet")
    commit(folder)
    monkeypatch.setattr(record, "ROOT", folder)
    return folder


def commit(folder: Path) -> str:
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "All of it")
    return git(folder, "rev-parse", "--short", "HEAD")


def rates(rows: list[record.Row]) -> str:
    return "".join(f"{row['device']}: {row['rate']}\n" for row in rows)


TABLES = {("kernels/README.md", "rates"): rates}


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The line that is printed if recording is refused."""
    with pytest.raises(SystemExit) as error:
        record.Recorder("rates", TABLES)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Sources -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "dfengine/engine.py",
        "dfengine/report/page/page.html",
        "dfengine/explain/new.py",
        "kernels/dfkernels/games.py",
        "bench/rates.py",
        "bench/new.py",
        "tests/tolerance.py",
        "pyproject.toml",
        "constraints.txt",
    ],
)
def test_nothing_is_recorded_if_a_source_is_changed_or_new(
    checkout: Path, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / source).parent.mkdir(exist_ok=True)
    (checkout / source).write_text("2")
    line = refusal(capsys)
    assert line == (
        f"error: no row can be recorded: uncommitted changes in {source}. "
        "Commit first, or pass --no-record to print the table only."
    )
    git(checkout, "add", ".")
    assert source in refusal(capsys)
    assert record.Recorder("rates", TABLES, record=False).commit == "uncommitted"
    assert commit(checkout) == record.Recorder("rates", TABLES).commit


def test_a_deleted_source_is_a_change(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "dfengine/engine.py").unlink()
    assert "uncommitted changes in dfengine/engine.py" in refusal(capsys)


def test_many_changes_are_counted(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(5):
        (checkout / f"bench/new_{number}.py").write_text("")
    assert "bench/new_0.py, bench/new_1.py, bench/new_2.py and 2 more" in refusal(capsys)


def test_rows_documents_tests_and_caches_are_not_sources(checkout: Path) -> None:
    for name in ("bench/results/rates.json", "kernels/README.md", "tests/test_engine.py", "bench/LOG.md"):
        (checkout / name).write_text("2")
    (checkout / "dfengine/__pycache__").mkdir()
    (checkout / "dfengine/__pycache__/engine.pyc").write_text("2")
    assert record.Recorder("rates", TABLES).commit == git(checkout, "rev-parse", "--short", "HEAD")


def test_sources_must_not_change_during_a_measurement(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = record.Recorder("rates", TABLES)
    (checkout / "bench/rates.py").write_text("2")
    before = record.read("rates")
    for is_committed in (False, True):  # a commit of the change does not help: other sources were measured
        if is_committed:
            commit(checkout)
        with pytest.raises(SystemExit) as error:
            recorder.replace([{"device": "a card", "rate": 2}])
        assert error.value.code == 2
        assert "bench/rates.py" in capsys.readouterr().err
    assert record.read("rates") == before


def test_documents_may_be_committed_during_a_measurement(checkout: Path) -> None:
    recorder = record.Recorder("rates", TABLES)
    (checkout / "bench/LOG.md").write_text("2")
    commit(checkout)
    recorder.replace([{"device": "a card", "rate": 2}])
    assert record.read("rates") == [{"device": "a card", "rate": 2}]


def test_a_copy_without_git_needs_the_stamp_of_its_sources(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def copy(name: str) -> Path:
        folder = shutil.copytree(checkout, tmp_path / name, ignore=shutil.ignore_patterns(".git"))
        monkeypatch.setattr(record, "ROOT", folder)
        return folder

    copy("unstamped")
    assert "is not a git checkout and has no stamp" in refusal(capsys)
    monkeypatch.setattr(record, "ROOT", checkout)
    (checkout / "bench/stamp.json").write_text(
        json.dumps({"commit": record.committed_sources(), "digest": record.digest()})
    )
    folder = copy("stamped")
    (folder / "bench/LOG.md").write_text("not a source")
    assert record.Recorder("rates", TABLES).commit == git(checkout, "rev-parse", "--short", "HEAD")
    (folder / "dfengine/new.py").write_text("")
    assert "the sources are not those of commit" in refusal(capsys)


# Rows and tables -----------------------------------------------------------------------------------------------------


def test_rows_with_the_same_key_are_replaced_and_tables_regenerated(checkout: Path) -> None:
    recorder = record.Recorder("rates", TABLES)
    recorder.replace([{"device": "another", "rate": 3}], ("device",))
    recorder.replace([{"device": "a card", "rate": 2}], ("device",))
    assert record.read("rates") == [{"device": "another", "rate": 3}, {"device": "a card", "rate": 2}]
    document = (checkout / "kernels/README.md").read_text()
    assert document == "<!-- rates: begin -->\nanother: 3\na card: 2\n<!-- rates: end -->\n"
    recorder.replace([{"device": "a third", "rate": 4}])
    assert record.read("rates") == [{"device": "a third", "rate": 4}]


def test_without_recording_nothing_is_written(checkout: Path) -> None:
    (checkout / "bench/rates.py").write_text("2")
    before = git(checkout, "status", "--porcelain")
    record.Recorder("rates", TABLES, record=False).replace([{"device": "a card", "rate": 2}])
    assert git(checkout, "status", "--porcelain") == before


def test_a_table_without_rows_is_marked(checkout: Path) -> None:
    record.write("rates", [])
    record.regenerate("rates", TABLES)
    assert record.NOT_MEASURED in (checkout / "kernels/README.md").read_text()
    with pytest.raises(ValueError, match=r"kernels/README.md has no lines '<!-- speed: begin -->'"):
        record.regenerate("rates", {("kernels/README.md", "speed"): rates})


def test_a_row_names_its_commit_device_and_versions(checkout: Path) -> None:
    row = record.Recorder("rates", TABLES).environment(torch.device("cpu"))
    assert list(row) == ["commit", "device", "torch", "python"]
    assert record.provenance([row, row]) == (
        f"Measured at commit `{row['commit']}`, {row['device']}, torch {torch.__version__}.\n"
    )


# Checks --------------------------------------------------------------------------------------------------------------


def test_a_failing_check_ends_the_script() -> None:
    record.check(True, "nothing")
    with pytest.raises(SystemExit, match="check failed: maps differ; nothing is reported"):
        record.check(False, "maps differ")
    with (
        pytest.raises(SystemExit, match="check failed: the sums: Tensor-likes are not close!; nothing is reported"),
        record.checked("the sums"),
    ):
        torch.testing.assert_close(torch.zeros(2), torch.ones(2))


def test_no_benchmark_has_a_bare_assert() -> None:
    """`python -O` would leave them out, and a number would be reported on a failing check."""
    for path in (ROOT / "bench").glob("*.py"):
        assert not [line for line in path.read_text().splitlines() if line.lstrip().startswith("assert ")], path


# What is recorded now ------------------------------------------------------------------------------------------------


def declared() -> list[tuple[str, str, str]]:
    """(benchmark, document, marker) of every table."""
    return [(name, *place) for name in tables.BENCHMARKS for place in tables.tables(name)]


@pytest.mark.parametrize(("name", "document", "marker"), declared())
def test_tables_are_generated_from_recorded_rows(name: str, document: str, marker: str) -> None:
    text = (ROOT / document).read_text()
    begin, end = f"<!-- {marker}: begin -->\n", f"<!-- {marker}: end -->\n"
    assert text.count(begin) == text.count(end) == 1
    rows = record.read(name)
    expected = importlib.import_module(name).TABLES[document, marker](rows) if rows else record.NOT_MEASURED
    assert text.partition(begin)[2].partition(end)[0] == expected


def test_every_result_has_a_benchmark() -> None:
    results = {path.stem for path in (ROOT / "bench/results").glob("*.json")}
    assert results <= set(tables.BENCHMARKS)
    scripts = {path.stem for path in (ROOT / "bench").glob("*.py")}
    assert scripts - set(tables.BENCHMARKS) == {"plain", "plain_games", "plain_gradients", "record", "tables"}


def test_every_row_is_of_a_commit_in_the_history_and_its_tables_show_it() -> None:
    commits = set()
    for name in tables.BENCHMARKS:
        rows = record.read(name)
        of_rows = {row["commit"] for row in rows}
        for render in tables.tables(name).values() if rows else ():
            assert any(f"`{commit}`" in render(rows) for commit in of_rows), name
        commits |= of_rows
    if not record.is_checkout() or record.git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("no complete history here")
    for commit in commits:
        ancestor = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commit, "HEAD"]
        assert subprocess.run(ancestor, capture_output=True).returncode == 0, f"{commit} is not in the history"
