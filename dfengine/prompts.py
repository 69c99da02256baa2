"""Prompts from files: plain text, CSV, JSON lines, Karpathy's split of COCO captions, Visual Genome's relationships."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from dfengine.tokens import occurrences

#: The parts of a prompt "subject relation object", as Table 3 has them.
ROLES = ("subject", "relation", "object")
#: Characters of a long file that are read at a time.
_PIECE = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the word or phrase of it that has each role, where they are known.

    Raises ValueError for an empty prompt, or a concept that it does not have.
    """

    text: str
    concepts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("the prompt is empty: say what the image should show")
        for concept in self.concepts.values():
            occurrences(self.text, concept)


def read(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file, in its order.

    .txt has a prompt a line (empty lines and those that begin with # are left out); .csv a column "prompt", .jsonl an
    object a line with "prompt", each perhaps with "subject", "relation" and "object" (where they make up the prompt, it
    may be left out); .json is Karpathy's dataset_coco.json (the first sentence of every image of the test split) or
    Visual Genome's relationships.json ("subject predicate object" of every relationship, each once).

    Raises ValueError for a file that cannot be read, has no prompts, or is malformed, naming the place.
    """
    path = Path(path)
    readers = {".txt": _lines, ".csv": _table, ".jsonl": _objects, ".json": _dataset}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{str(path)!r} is no file of prompts: expected {', '.join(readers)}")
    if limit is not None and limit < 1:
        raise ValueError(f"{limit} prompts are not possible: expected at least 1")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            wanted = islice(readers[path.suffix.lower()](file), limit)
            found = [_prompt(f"{path}, {place}", values) for place, values in wanted]
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    if not found:
        raise ValueError(f"{str(path)!r} has no prompts")
    return found


def _prompt(place: str, values: Any) -> Prompt:
    """A prompt of named values. Raises ValueError, naming the place, for those that are none."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{place}: {_shown(values)} is no prompt: expected named values")
    concepts = {role: values[role] for role in ROLES if values.get(role)}
    text = values.get("prompt") or (" ".join(map(str, concepts.values())) if len(concepts) == len(ROLES) else None)
    if not isinstance(text, str) or not all(isinstance(concept, str) for concept in concepts.values()):
        raise ValueError(f'{place}: no prompt in {_shown(values)}: expected "prompt", or {", ".join(ROLES)}, as texts')
    try:
        return Prompt(text.strip(), {role: concept.strip() for role, concept in concepts.items()})
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _lines(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip() and not line.startswith("#"):
            yield f"line {number}", {"prompt": line}


def _table(file: TextIO) -> Iterator[tuple[str, Any]]:
    rows = csv.DictReader(file, strict=True)
    for row in rows:
        yield f"line {rows.line_num}", row


def _objects(file: TextIO) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file.name}, line {number} is not JSON: {error}") from error


def _dataset(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Captions of COCO where the file is an object, relationships of Visual Genome where it is a list."""
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    return _relationships(file) if start == "[" else _captions(file)


def _captions(file: TextIO) -> Iterator[tuple[str, Any]]:
    """The first sentence of each image of the test split of Karpathy's dataset_coco.json."""
    data = json.load(file)
    images = data.get("images") if isinstance(data, Mapping) else None
    if not isinstance(images, list):
        raise ValueError(f'{file.name}: expected {{"images": [...]}}, as dataset_coco.json has it, or a list')
    for number, image in enumerate(images):
        try:
            if image["split"] == "test":
                yield f"image {number}", {"prompt": image["sentences"][0]["raw"]}
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(
                f'{file.name}, image {number}: expected {{"split": ..., "sentences": [{{"raw": ...}}, ...]}}, '
                f"found {_shown(image)}"
            ) from error


def _relationships(file: TextIO) -> Iterator[tuple[str, Any]]:
    """Every relationship of Visual Genome's relationships.json, once, as subject, relation and object."""
    seen: set[tuple[str, ...]] = set()
    for number, image in enumerate(_members(file)):
        try:
            for one in image["relationships"]:
                parts = _name(one["subject"]), " ".join(one["predicate"].lower().split()), _name(one["object"])
                if all(parts) and parts not in seen:
                    seen.add(parts)
                    yield f"image {number}", dict(zip(ROLES, parts, strict=True))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f'{file.name}, image {number}: expected {{"relationships": [{{"subject": {{"name": ...}}, "predicate": '
                f'..., "object": {{"name": ...}}}}, ...]}}, found {_shown(image)}'
            ) from error


def _name(thing: Any) -> str:
    """What a thing is called; earlier releases have a list of names."""
    return str(thing["name"] if "name" in thing else thing["names"][0]).lower()


def _members(file: TextIO) -> Iterator[Any]:
    """The members of a JSON list, one after the other: the whole file of relationships does not fit into memory."""
    decoder, text, place, is_first = json.JSONDecoder(), file.read(_PIECE), 0, True
    while True:
        while place < len(text) and (text[place].isspace() or text[place] in ("[" if is_first else ",")):
            is_first = is_first and text[place] != "["
            place += 1
        if place < len(text) and text[place] == "]":
            return
        try:
            member, place = decoder.raw_decode(text, place)
            # A number may go on behind what has been read so far; whatever is a relationship may not.
            yield member
        except json.JSONDecodeError:
            more = file.read(_PIECE)
            if not more:
                raise
            text, place = text[place:] + more, 0
