"""Reading a YAML file of settings, in which a mistake is reported and not guessed away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dfengine.text import printable

#: The most values that a file may stand for, with each alias counted as what it repeats.
_MAX_VALUES = 10_000_000


class _Loader(yaml.SafeLoader):
    """YAML in which each key is given once: of two, safe_load takes the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def load(path: Path) -> Any:
    """The value of a YAML file. Raises ValueError if it cannot be read, is not YAML, or gives a key twice."""
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        _count(value, {})
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise ValueError(f"{str(path)!r} is nested too deeply: expected prompts, explainers and other keys") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(printable(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}")) from error
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values it stands for. Raises ValueError if there are too many: ten lines of aliases can be 10^9."""
    if not isinstance(value, list | Mapping):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES  # of a list that contains itself
        members = value if isinstance(value, list) else value.values()
        known[id(value)] = 1 + sum(_count(member, known) for member in members)
    if known[id(value)] > _MAX_VALUES:
        raise ValueError(f"its aliases stand for more than {_MAX_VALUES} values")
    return known[id(value)]
