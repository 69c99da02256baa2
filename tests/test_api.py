"""The public API is what docs/api.md says it is, name by name and signature by signature.

Where this fails and the change is meant: `python tests/test_api.py` puts it into the document; raise the version, as it
says there.
"""

import dataclasses
import enum
import importlib
import inspect
import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs/api.md"
MODULES = (
    "dfengine",
    "dfengine.store",
    "dfengine.sweep",
    "dfengine.evaluate",
    "dfengine.studies",
    "dfengine.figures",
    "dfengine.report",
    "dfkernels",
)


def signature(function) -> str:
    """Names, kinds and defaults of the parameters; annotations are mypy's to keep."""
    parameters = [
        one.replace(annotation=one.empty, default=one.default if one.default is one.empty else Default(one.default))
        for one in inspect.signature(function).parameters.values()
        if one.name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


class Default:
    """Shown as a document would have it: settings by their class."""

    def __init__(self, value) -> None:
        self.value = value

    def __repr__(self) -> str:
        if inspect.isfunction(self.value):
            return "<function>"
        if inspect.isclass(self.value):
            return self.value.__name__
        if dataclasses.is_dataclass(self.value):
            return f"{type(self.value).__name__}()"
        return "{}" if type(self.value).__name__ == "mappingproxy" else repr(self.value)


def described(name: str, value: object) -> list[str]:
    """A line for a name, and one for each public method of a class."""
    if not inspect.isclass(value):
        return [f"{name}{signature(value)}" if callable(value) else name]
    members = {
        member: inspect.getattr_static(value, member)
        for parent in reversed([one for one in value.__mro__ if one.__module__.startswith(("dfengine", "dfkernels"))])
        for member in vars(parent)
        if not member.startswith("_")
    }
    lines = [name if issubclass(value, BaseException | enum.Enum) else f"{name}{signature(value)}"]
    for member, raw in members.items():
        if isinstance(raw, classmethod | staticmethod) or inspect.isfunction(raw):
            lines.append(f"    .{member}{signature(getattr(value, member))}")
        elif isinstance(raw, property) or type(raw).__name__ == "cached_property":
            lines.append(f"    .{member}")
    return lines


def of_module(name: str) -> str:
    module = importlib.import_module(name)
    # dfengine.open is public, but not for `from dfengine import *`.
    names = [*module.__all__, *(["open"] if name == "dfengine" else [])]
    lines = [line for one in names if one != "__version__" for line in described(one, getattr(module, one))]
    return "\n".join(lines)


def documented() -> dict[str, str]:
    return dict(re.findall(r"## `([\w.]+)`\n.*?```\n(.*?)\n```", DOCUMENT.read_text(), re.DOTALL))


@pytest.mark.parametrize("name", MODULES)
def test_names_and_signatures_are_as_documented(name):
    assert of_module(name).splitlines() == documented()[name].splitlines()


def test_nothing_else_is_documented():
    assert set(documented()) == set(MODULES)


def test_the_version_is_one_number_everywhere():
    from importlib.metadata import version

    import dfengine

    assert re.fullmatch(r"\d+\.\d+\.\d+", dfengine.__version__)
    assert version("dfengine") == dfengine.__version__


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    for module in MODULES:
        body = of_module(module)
        text = re.sub(
            rf"(## `{re.escape(module)}`\n.*?```\n).*?(```\n)",
            lambda match, body=body: f"{match[1]}{body}\n{match[2]}",
            text,
            count=1,
            flags=re.DOTALL,
        )
    DOCUMENT.write_text(text)
