"""The plan of a file: items, methods and sizes, fixed before anything is written, as plain values that survive JSON."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dfengine.store.file.plain import load_json, typed
from dfengine.text import printable

#: Settings that follow from others: two plans are compared by them only if nothing else differs.
_DERIVED = re.compile(r"items\..*\.(key|tokens|spans|words)|layers\..*|layers")
#: The options that determine a list of time-steps.
_TIMESTEPS = "sampling or gamma"
#: How a method is presented; it does not affect any value.
_PRESENTATION = re.compile(r"methods\..*\.(label|form|hot)")


class StoreError(ValueError):
    """A file cannot be written or read as requested. The message is one line: the cause, and what to do about it.

    It may quote a file that somebody else wrote: what a terminal would act on is escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Busy(StoreError):
    """The file is being written by another process."""


class NoSuchItem(StoreError, IndexError):
    """The file has no item with this index."""


@dataclass(frozen=True)
class Item:
    """One image to explain: a prompt and a seed, with a key that is unique within the run.

    `tokens` and `words` name the rows of the item's relevance curves and word maps; items may differ in their number.
    `spans` holds each token's characters [start, stop) of the prompt, (0, 0) for special tokens. `settings` are all
    other inputs (time-steps, guidance, …) as JSON values.
    """

    key: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    tokens: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    words: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Key, prompts, seed and settings as one flat dictionary of JSON values."""
        named = {"key": self.key, "prompt": self.prompt, "negative_prompt": self.negative_prompt, "seed": self.seed}
        return named | dict(self.settings)


@dataclass(frozen=True)
class Method:
    """One explainer, with a map on the latent grid. `num_masks` scores are stored for each map, 0 for none.

    `has_error` and `has_word_error` say whether its maps and those of its words have errors. `has_layers` marks the
    method whose map combines those of the plan's layers. `label` is its name in figures, `form`
    says which figure suits its maps ("saliency", "layers", "tokens" or "words"), and `hot` what high values of a map
    mean. All three are empty if unknown.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_masks: int = 0
    has_error: bool = False
    has_layers: bool = False
    label: str = ""
    form: str = ""
    hot: str = ""
    has_word_error: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything a file will contain, so that all of its objects can be created before the first value is written.

    Sizes: `latent` is (channels, h, w), `image` (H, W); each of DF-CAM's `layers` has its own resolution (u, v).
    With `previews`, the image predicted at each step is stored. Errors, layer maps and word maps are rounded to
    `mantissa_bits` (10 halve their size on disk, 23 are exact); saliency is always exact. `settings` apply to the whole
    file. All settings must be JSON values, and are read back as JSON returns them (tuples become lists).

    Raises StoreError for duplicate or empty names, empty sizes, a seed outside [0, 2^64), spans that do not match the
    tokens, or a NUL character in a text.
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
                raise StoreError(f"duplicate {what}: {', '.join(repeated)}; each must be unique")
        sizes = {"items": len(self.items), "num_steps": self.num_steps, "latent": min(self.latent)}
        sizes |= {f"layer {name}": min(size) for name, size in self.layers}
        for what, size in (sizes | {"image": min(self.image)}).items():
            if size < 1:
                raise StoreError(f"{what} has size {size}: expected at least 1")
        for item in self.items:
            if not 0 <= item.seed < 2**64:
                raise StoreError(f"seed {item.seed} is outside [0, 2^64)")
            if "\0" in item.prompt + item.negative_prompt:
                raise StoreError(f"prompt {item.prompt!r} contains a NUL character: remove it")
            if "\0" in "".join((item.key, *item.tokens, *item.words)):
                raise StoreError(f"a token or word of {item.prompt!r} contains a NUL character: remove it")
            if len(item.spans) not in (0, len(item.tokens)):
                raise StoreError(f"{item.prompt!r} has {len(item.tokens)} tokens and {len(item.spans)} spans")
        for method in self.methods:
            if not method.name.strip() or "\0" in method.name:
                raise StoreError(f"{method.name!r} cannot be the name of a method: give it a name in plain text")
            if method.num_masks < 0:
                raise StoreError(f"method {method.name!r} has {method.num_masks} masks: expected 0 or more")
        if named := [name for name, _ in self.layers if not name or "\0" in name]:
            raise StoreError(f"{named[0]!r} cannot be the name of a layer: give it a name in plain text")
        if not 1 <= self.mantissa_bits <= 23:
            raise StoreError(f"mantissa_bits is {self.mantissa_bits}: expected 1 to 23 (23 is exact)")

    def to_json(self) -> str:
        """The plan as JSON. Raises StoreError if a setting is not a JSON value."""
        try:
            return json.dumps(self, default=_to_plain, ensure_ascii=False)
        except TypeError as error:
            raise StoreError(f"settings must be JSON values (numbers, strings, lists, mappings): {error}") from None

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan that `to_json` wrote. Raises ValueError for anything else."""
        plan: Plan = typed(load_json(text), cls, "plan")
        for item in plan.items:
            _check_inputs(item.settings)
        return plan

    def differences(self, other: "Plan") -> list[str]:
        """Each setting that differs, as "name (this plan's value, now the other's)"; empty if the plans are equal.

        Settings have the names of the options that they are given by, such as "num_masks of rise".
        Derived settings (keys, tokens, layers) are listed only if nothing else differs. A method that only one plan has
        is listed by name alone. Labels, forms and what is hot are not compared.
        """
        mine, theirs = ({method.name for method in plan.methods} for plan in (self, other))
        unshared = [f"{name} (removed)" for name in mine - theirs] + [f"{name} (added)" for name in theirs - mine]
        before, after = (dict(_leaves(json.loads(plan.to_json()))) for plan in (self, other))
        ignored = tuple(f"methods.{name}." for name in mine ^ theirs)
        names = [
            name
            for name in dict.fromkeys((*before, *after))
            if before.get(name) != after.get(name)
            and not name.startswith(ignored)
            and not _PRESENTATION.fullmatch(name)
        ]
        primary = [name for name in names if not _DERIVED.fullmatch(name)]
        changed = {
            _option_name(name, len(self.items)): (
                f"({_shorten(before.get(name, 'unset'))}, now {_shorten(after.get(name, 'unset'))})"
            )
            for name in primary or ([] if unshared else names)
        }
        if "num_steps" in changed:  # the lists then differ too
            changed = {name: values for name, values in changed.items() if not name.startswith(_TIMESTEPS)}
        return sorted(unshared) + [f"{name} {values}" for name, values in changed.items()]


def _check_inputs(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if an input that is drawn or printed is not of its type."""
    guidance, timesteps = settings.get("guidance", 1.0), settings.get("timesteps", [0])
    if type(guidance) not in (int, float) or not isinstance(settings.get("image"), str | None):
        raise ValueError(f"guidance is {guidance!r:.60}: expected a number, and an image's hash or null")
    if type(timesteps) is not list or not timesteps or not set(map(type, timesteps)) <= {int, float}:
        raise ValueError(f"timesteps is {timesteps!r:.60}: expected numbers")


def _to_plain(value: Any) -> dict[str, Any]:
    if isinstance(value, Item | Method | Plan):
        return dict(vars(value))
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested JSON under dotted names; list members are identified by their "name" if they have one."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {member.get("name", str(place)): member for place, member in enumerate(value)}
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _leaves(member, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def _option_name(name: str, num_items: int) -> str:
    """The name of an option from that of a leaf: "kind of rise" for "methods.rise.settings.kind"."""
    owner, _, option = name.replace(".settings.", ".").rpartition(".")
    kind, _, which = owner.partition(".")
    option = _TIMESTEPS if option == "timesteps" else option
    if kind == "methods":
        return f"{option} of {which}"
    return f"{option} of image {which}" if kind == "items" and num_items > 1 else option


def _shorten(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}… of {len(text)} characters"
