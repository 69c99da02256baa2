"""Prompts from files of every supported format, and the errors for malformed files."""

import json
from pathlib import Path
from typing import Any

import pytest

from dfengine import prompts
from dfengine.prompts import Prompt, read

COCO = {
    "dataset": "coco",
    "images": [
        {"split": "train", "cocoid": 1, "sentences": [{"raw": "A train.", "tokens": ["a", "train"]}]},
        {"split": "test", "cocoid": 2, "sentences": [{"raw": "A man on a horse."}, {"raw": "A rider."}]},
        {"split": "val", "cocoid": 3, "sentences": [{"raw": "A dog."}]},
        {"split": "test", "cocoid": 4, "sentences": [{"raw": " A cat on a mat "}]},
        {"split": "test", "cocoid": 5, "sentences": [{"raw": "A man on a horse."}]},
    ],
}
GENOME = [
    {
        "image_id": 1,
        "relationships": [
            {"predicate": "ON", "subject": {"name": "shade"}, "object": {"name": "street"}, "relationship_id": 7},
            {"predicate": "Moving  down", "subject": {"names": ["Car"]}, "object": {"names": ["the street", "road"]}},
        ],
    },
    {"image_id": 2, "relationships": []},
    {
        "image_id": 3,
        "relationships": [
            {"predicate": "on", "subject": {"name": "shade"}, "object": {"name": "street"}},
            {"predicate": "", "subject": {"name": "sign"}, "object": {"name": "pole"}},
            {"predicate": "holds", "subject": {"name": "man"}, "object": {"name": 'a "sign", [red]'}},
        ],
    },
]


def write_file(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_lines_of_text(tmp_path: Path) -> None:
    file = write_file(tmp_path / "a.TXT", "# comment\r\na cat\r\n\r\n  a dog  \r\na cat\r\n")
    assert [prompt.text for prompt in read(file)] == ["a cat", "a dog", "a cat"]
    assert [prompt.text for prompt in read(file, 2)] == ["a cat", "a dog"]


def test_a_byte_order_mark_is_not_part_of_a_prompt(tmp_path: Path) -> None:
    assert read(write_file(tmp_path / "a.txt", b"\xef\xbb\xbfein W\xc3\xbcrfel"))[0].text == "ein Würfel"


def test_a_table_has_prompts_and_perhaps_their_concepts(tmp_path: Path) -> None:
    text = 'id,prompt,subject,relation,object\n1,"a cat, sitting on a mat",cat,sitting on,mat\n'
    text += "2,a dog,dog,,\n3,,a man,riding,a horse\n"
    assert read(write_file(tmp_path / "a.csv", text)) == [
        Prompt("a cat, sitting on a mat", {"subject": "cat", "relation": "sitting on", "object": "mat"}),
        Prompt("a dog", {"subject": "dog"}),
        Prompt("a man riding a horse", {"subject": "a man", "relation": "riding", "object": "a horse"}),
    ]


def test_json_lines(tmp_path: Path) -> None:
    text = '{"prompt": "a cat on a mat", "subject": "cat", "seed": 3}\n\n{"prompt": "a dog"}\n'
    assert read(write_file(tmp_path / "a.jsonl", text)) == [
        Prompt("a cat on a mat", {"subject": "cat"}),
        Prompt("a dog"),
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_karpathys_split_gives_the_first_sentence_of_the_test_images(tmp_path: Path, indent: int | None) -> None:
    file = write_file(tmp_path / "dataset_coco.json", json.dumps(COCO, indent=indent))
    assert [prompt.text for prompt in read(file)] == ["A man on a horse.", "A cat on a mat", "A man on a horse."]
    assert len(read(file, 1)) == 1


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_visual_genome_gives_each_relationship_once(
    tmp_path: Path, indent: int | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result does not depend on the chunks in which the file is read."""
    monkeypatch.setattr(prompts, "_CHUNK", piece)
    file = write_file(tmp_path / "relationships.json", json.dumps(GENOME, indent=indent))
    assert read(file) == [
        Prompt("shade on street", {"subject": "shade", "relation": "on", "object": "street"}),
        Prompt("car moving down the street", {"subject": "car", "relation": "moving down", "object": "the street"}),
        Prompt('man holds a "sign", [red]', {"subject": "man", "relation": "holds", "object": 'a "sign", [red]'}),
    ]


def test_a_large_file_is_read_as_far_as_needed(tmp_path: Path) -> None:
    """Anything may follow the last requested prompt."""
    file = write_file(tmp_path / "relationships.json", json.dumps(GENOME[:1])[:-1] + ", broken")
    assert len(read(file, 2)) == 2
    with pytest.raises(ValueError, match="cannot be read"):
        read(file, 3)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.xml", "<a/>", "is not a file of prompts: expected .txt, .csv, .jsonl, .json"),
        ("a.txt", "\n# nothing\n", "has no prompts"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read"),
        (
            "a.csv",
            "text\na cat\n",
            r"a\.csv, line 2: no prompt in {\"text\": \"a cat\"}: expected .prompt., or subject",
        ),
        ("a.csv", 'prompt\n"a cat\n', "cannot be read"),
        ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl, line 1: \[1\] is not a prompt"),
        ("a.jsonl", '{"prompt": 3}', r"line 1: no prompt in {\"prompt\": 3}"),
        ("a.jsonl", '{"prompt": "a cat", "subject": "dog"}', r"line 1: 'dog' is not in the prompt 'a cat'"),
        ("a.json", "{}", r'expected {"images": \[\.\.\.\]}'),
        ("a.json", "nonsense", "cannot be read"),
        ("a.json", "", "cannot be read"),
        (
            "a.json",
            '{"images": [{"split": "test", "sentences": []}]}',
            r"image 0: expected .*got {\"split\": \"test\"",
        ),
        ("a.json", '{"images": [{"sentences": []}]}', "image 0: expected"),
        ("a.json", '[{"relationships": [{"predicate": "on"}]}]', r"image 0: expected .*got {\"relationships\""),
        (
            "a.json",
            '[{"relationships": [{"predicate": 1, "subject": {"name": "a"}, "object": {"name": "b"}}]}]',
            "image 0",
        ),
        ("a.json", "[3]", "image 0: expected"),
        ("a.json", '[{"relationships": []}', "cannot be read"),
        ("a.json", "[]", "has no prompts"),
    ],
)
def test_errors_for_malformed_files_are_one_line_with_the_position(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(write_file(tmp_path / name, text))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("path", "limit"), [("none.txt", None), (".", None)])
def test_missing_files_and_folders_are_refused(tmp_path: Path, path: str, limit: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot be read: No such file|is not a file of prompts"):
        read(tmp_path / path, limit)


def test_a_limit_beyond_all_numbers_of_the_machine_is_none(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    assert len(read(tmp_path / "prompts.txt", 10**20)) == 2


@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl"])
@pytest.mark.parametrize("start", ["[", '{"a":'])
def test_json_that_is_nested_too_deeply_is_one_line(tmp_path: Path, name: str, start: str) -> None:
    (tmp_path / name).write_text(start * 50_000)
    with pytest.raises(ValueError, match=r"prompts\.jsonl?. cannot be read: it is nested too deeply"):
        read(tmp_path / name)


def test_a_limit_of_zero_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="limit is 0: expected at least 1 prompt"):
        read(write_file(tmp_path / "a.txt", "a cat"), 0)
