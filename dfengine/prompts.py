"""Prompts from files: plain text, CSV, JSON lines, Karpathy's split of COCO captions, Visual Genome's relationships."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from dfengine.checks import text
from dfengine.tokens import find_occurrences

#: The roles in a prompt "subject relation object", as in Table 3.
ROLES = ("subject", "relation", "object")
#: The number of characters of a long file that are read at a time.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the word or phrase that has each role, if they are known.

    Raises ValueError for an empty prompt, one with a lone surrogate, or a concept that is not in it.
    """

    text: str
    concepts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not text("prompt", self.text).strip():
            raise ValueError("the prompt is empty: say what the image should show")
        for concept in self.concepts.values():
            find_occurrences(self.text, concept)


def read(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a file in order, at most `limit`.

    .txt has one prompt a line, without empty lines and those that begin with #; .csv has a column "prompt", and .jsonl
    an object with "prompt" on each line, both optionally with "subject", "relation" and "object" ("prompt" may be
    omitted if the three make it up); .json is Karpathy's dataset_coco.json (the first sentence of each image of the
    test split) or Visual Genome's relationships.json (each distinct "subject predicate object").

    Raises ValueError if the file cannot be read, has no prompts, or is malformed, with the line or image at fault.
    """
    path = Path(path)
    readers = {".txt": _read_lines, ".csv": _read_csv, ".jsonl": _read_json_lines, ".json": _read_dataset}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{str(path)!r} is not a file of prompts: expected {', '.join(readers)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: expected at least 1 prompt")
    most = None if limit is None else min(limit, sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            prompts = [_to_prompt(f"{path}, {place}", values) for place, values in islice(reader(file), most)]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    except RecursionError:
        raise ValueError(f"{str(path)!r} cannot be read: it is nested too deeply") from None
    if not prompts:
        raise ValueError(f"{str(path)!r} has no prompts")
    return prompts


def _to_prompt(place: str, values: Any) -> Prompt:
    """The prompt of a row or object. Raises ValueError, naming the place, if it has none."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}: {_shorten(values)} is not a prompt: expected an object with named values")
    concepts = {role: values[role] for role in ROLES if values.get(role)}
    text = values.get("prompt") or (" ".join(map(str, concepts.values())) if len(concepts) == len(ROLES) else None)
    if not isinstance(text, str) or not all(isinstance(concept, str) for concept in concepts.values()):
        raise ValueError(
            f'{place}: no prompt in {_shorten(values)}: expected "prompt", or {", ".join(ROLES)}, as texts'
        )
    try:
        return Prompt(text.strip(), {role: concept.strip() for role, concept in concepts.items()})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", {"prompt": line}


def _read_csv(file: TextIO) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(file, strict=True)
    for row in rows:
        yield f"line {rows.line_num}", row


def _read_json_lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file.name}, line {number} is not JSON: {error}") from error


def _read_dataset(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Captions of COCO if the file holds an object, relationships of Visual Genome if it holds a list."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    return _read_relationships(file) if start == "[" else _read_captions(file)


def _read_captions(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The first sentence of each image of the test split of Karpathy's dataset_coco.json."""
    data = json.load(file)
    images = data.get("images") if isinstance(data, Mapping) else None
    if not isinstance(images, list):
        raise ValueError(f'{file.name}: expected {{"images": [...]}}, as in dataset_coco.json, or a list')
    for number, image in enumerate(images):
        try:
            if image["split"] == "test":
                yield f"image {number}", {"prompt": image["sentences"][0]["raw"]}
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f'{file.name}, image {number}: expected {{"split": ..., "sentences": [{{"raw": ...}}, ...]}}, '
                f"got {_shorten(image)}"
            ) from error


def _read_relationships(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Each distinct relationship of Visual Genome's relationships.json, as subject, relation and object."""
    seen: set[tuple[str, ...]] = set()
    for number, image in enumerate(_read_members(file)):
        try:
            for relationship in image["relationships"]:
                parts = (
                    _name(relationship["subject"]),
                    " ".join(relationship["predicate"].lower().split()),
                    _name(relationship["object"]),
                )
                if all(parts) and parts not in seen:
                    seen.add(parts)
                    yield f"image {number}", dict(zip(ROLES, parts, strict=True))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f'{file.name}, image {number}: expected {{"relationships": [{{"subject": {{"name": ...}}, "predicate": '
                f'..., "object": {{"name": ...}}}}, ...]}}, got {_shorten(image)}'
            ) from error


def _name(entity: Any) -> str:
    """The name of an object in an image; earlier releases have a list of names."""
    return str(entity["name"] if "name" in entity else entity["names"][0]).lower()


def _read_members(file: TextIO) -> Iterator[Any]:
    """The members of a JSON list one by one: the file of relationships as a whole does not fit into memory."""
    decoder, text, place, is_first = json.JSONDecoder(), file.read(_CHUNK), 0, True
    while True:
        while place < len(text) and (text[place].isspace() or text[place] in ("[" if is_first else ",")):
            is_first = is_first and text[place] != "["
            place += 1
        if place < len(text) and text[place] == "]":
            return
        try:
            # A number at the end of the text may be incomplete; the objects of a valid file may not.
            member, place = decoder.raw_decode(text, place)
            yield member
        except json.JSONDecodeError:
            more = file.read(_CHUNK)
            if not more:
                raise
            text, place = text[place:] + more, 0
