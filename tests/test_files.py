"""Text that is safe to print, and results that appear under their names only when they are complete."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest

from dfengine.files import check_local, published, remove_stale
from dfengine.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle, 猫, café, 👩‍🎨", "a red circle, 猫, café, 👩‍🎨"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("\x9b31m", "\\u009b31m"),
        ("two\nlines\r\tand\u2028a third", "two\\nlines\\r\\tand\\u2028a third"),
        ("abc\u202ecba\u2066", "abc\\u202ecba\\u2066"),
        ("half \ud83d", "half \\ud83d"),
        (Path("a\x00b"), "a\\x00b"),
    ],
)
def test_what_a_terminal_acts_on_is_escaped(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(printable(text)) == shown
    shown.encode()


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_text("old")
    with published(out) as temporary:
        assert (temporary.parent, temporary.suffix) == (tmp_path, ".png")
        temporary.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    with suppress(KeyboardInterrupt), published(out) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert out.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with published(tmp_path / "out.png") as temporary:
        pass_through = temporary
        temporary.write_text("new")
    pass_through.symlink_to(tmp_path / "precious")
    with published(tmp_path / "out.png") as temporary:
        temporary.write_text("newer")
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "out.png").read_text() == "newer"


def test_what_a_killed_process_began_is_removed_later(tmp_path: Path) -> None:
    begun = [f".a.{number:016x}.new.png" for number in (1, 2)]
    stale, fresh, other = (tmp_path / name for name in (*begun, ".notes.2024.new.txt"))
    for path in (stale, fresh, other):
        path.write_text("")
    for path in (stale, other):
        os.utime(path, (0, time.time() - 3600))
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {begun[1], ".notes.2024.new.txt"}


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://b/x", "file:///tmp/x", "abfs://c@a/x"])
def test_an_address_is_no_path(address: str) -> None:
    for path in (Path(address), Path(f"{address}/more")):
        with pytest.raises(ValueError, match="is an address, not a path: write to a folder of this machine"):
            check_local(path)
    assert check_local(Path("runs/s3:x/y")) == Path("runs/s3:x/y")
