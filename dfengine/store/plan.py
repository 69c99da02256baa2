"""What a file will hold, said before it is written: items, methods and sizes, as plain values that survive JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Names of what follows from an item's other settings, or from a method's.
_FOLLOWS = re.compile(r"items\..*\.(key|tokens|spans|words)|layers\..*|layers")


class StoreError(ValueError):
    """A file that cannot be written or read as asked: one line with what was found, and the remedy."""


class Busy(StoreError):
    """A file that another process is writing."""


class NoSuchItem(StoreError, IndexError):
    """An item that a file does not have."""


@dataclass(frozen=True)
class Item:
    """One generation to explain: a prompt and a seed under a key that no other item of the run has.

    `tokens` and `words` name the rows of the item's relevance curves and heat maps; items may differ in their number.
    `spans` has the characters of the prompt [from, to) that each token was made of, nothing for special ones.
    `settings` are what else makes it (time-steps, guidance, …), as JSON values.
    """

    key: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    tokens: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    words: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One explainer with a map on the latent grid; `num_masks` is the length of the scores it stores, 0 for none.

    `has_layers` is for the one whose map sums up those of the plan's layers.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_masks: int = 0
    has_error: bool = False
    has_layers: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything a file will hold, so that every object in it can be created before the first value is written.

    Sizes: `latent` is (channels, h, w), `image` (H, W); `layers` are DF-CAM's, each with its own resolution (u, v).
    With `previews` the image predicted at each step is kept. Errors, DF-CAM and heat maps are rounded to
    `mantissa_bits` (10 halve their size in a file; 23 are all that a float32 has); saliency is always exact.
    `settings` are the run's own. All settings must be JSON values; they come back from a file as JSON has them (tuples
    as lists).
    """

    items: tuple[Item, ...]
    methods: tuple[Method, ...]
    num_steps: int
    latent: tuple[int, int, int]
    image: tuple[int, int]
    layers: tuple[tuple[str, tuple[int, int]], ...] = ()
    previews: bool = False
    mantissa_bits: int = 23
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (
            ("item keys", [item.key for item in self.items]),
            ("method names", [method.name for method in self.methods]),
            ("layer names", [name for name, _ in self.layers]),
        ):
            if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
                raise StoreError(f"{what} repeat: {', '.join(repeated)}; each must be there once")
        sizes = {"items": len(self.items), "num_steps": self.num_steps, "latent": min(self.latent)}
        for what, size in (sizes | {"image": min(self.image)}).items():
            if size < 1:
                raise StoreError(f"{what} of size {size}: expected at least 1")
        for item in self.items:
            if not 0 <= item.seed < 2**64:
                raise StoreError(f"seed {item.seed} is outside [0, 2^64): choose one inside")
            if "\0" in item.prompt + item.negative_prompt:
                raise StoreError(f"prompt {item.prompt!r} has a NUL character: leave it out")
        if not 1 <= self.mantissa_bits <= 23:
            raise StoreError(f"{self.mantissa_bits} mantissa bits are not possible: expected 1 to 23 (23 is exact)")

    def to_json(self) -> str:
        """The plan as JSON; StoreError where a setting is not a JSON value."""
        try:
            return json.dumps(self, default=_plain, ensure_ascii=False)
        except TypeError as error:
            raise StoreError(f"settings must be JSON values (numbers, strings, lists, mappings): {error}") from None

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote."""
        values = json.loads(text)
        values["items"] = tuple(
            Item(
                **item
                | {"tokens": tuple(item["tokens"]), "words": tuple(item["words"])}
                | {"spans": tuple(tuple(span) for span in item.get("spans", ()))}
            )
            for item in values["items"]
        )
        values["methods"] = tuple(Method(**method) for method in values["methods"])
        values["layers"] = tuple((name, tuple(size)) for name, size in values["layers"])
        return cls(**values | {"latent": tuple(values["latent"]), "image": tuple(values["image"])})

    def differences(self, other: "Plan") -> list[str]:
        """Each setting in which the two plans differ, as "name (mine, now theirs)"; empty when they are the same.

        What follows from other settings (keys, tokens, layers) is named only where nothing else tells two plans apart,
        and a method that only one of them has by its name alone.
        """
        apart = {method.name for method in self.methods} ^ {method.name for method in other.methods}
        told = [f"{name} ({'now not' if any(name == m.name for m in self.methods) else 'only now'})" for name in apart]
        mine, theirs = dict(_leaves(json.loads(self.to_json()))), dict(_leaves(json.loads(other.to_json())))
        names = [
            name
            for name in (*mine, *theirs)
            if mine.get(name) != theirs.get(name) and not name.startswith(tuple(f"methods.{one}." for one in apart))
        ]
        named = [name for name in names if not _FOLLOWS.fullmatch(name)] or ([] if told else names)
        return [
            *sorted(told),
            *(
                f"{name} ({_shown(mine.get(name, 'unset'))}, now {_shown(theirs.get(name, 'unset'))})"
                for name in dict.fromkeys(named)
            ),
        ]


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, Item | Method | Plan):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested JSON under dotted names; members of a list go by their name where they have one."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {member.get("name", str(place)): member for place, member in enumerate(value)}
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _leaves(member, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _shown(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}… of {len(text)} characters"
