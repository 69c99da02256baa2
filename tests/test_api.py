"""The public API matches docs/api.md, name by name and signature by signature.

If the API changed on purpose, `python tests/test_api.py` updates the document; raise the version as the document says.
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
    """Names, kinds and defaults of the parameters, without annotations, which mypy checks."""
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else Default(parameter.default),
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


class Default:
    """A default whose repr suits a document: a dataclass is shown by its class, a function as <function>."""

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


def describe(name: str, value: object) -> list[str]:
    """One line for a name, and for a class one more for each public method and property, inherited ones included."""
    if not inspect.isclass(value):
        return [f"{name}{signature(value)}" if callable(value) else name]
    members = {
        member: inspect.getattr_static(value, member)
        for parent in reversed(value.__mro__)
        if parent.__module__.startswith(("dfengine", "dfkernels"))
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


def describe_module(name: str) -> str:
    """The lines of all public names of a module."""
    module = importlib.import_module(name)
    # dfengine.open is public, but not in __all__: a star import must not replace the builtin.
    names = [*module.__all__, *(["open"] if name == "dfengine" else [])]
    lines = [line for name in names if name != "__version__" for line in describe(name, getattr(module, name))]
    return "\n".join(lines)


def documented() -> dict[str, str]:
    """The block of each module in the document."""
    return dict(re.findall(r"## `([\w.]+)`\n.*?```\n(.*?)\n```", DOCUMENT.read_text(), re.DOTALL))


@pytest.mark.parametrize("name", MODULES)
def test_names_and_signatures_match_document(name):
    assert describe_module(name).splitlines() == documented()[name].splitlines()


def test_document_has_exactly_these_modules():
    assert set(documented()) == set(MODULES)


def test_version_matches_package_metadata():
    from importlib.metadata import version

    import dfengine

    assert re.fullmatch(r"\d+\.\d+\.\d+", dfengine.__version__)
    assert version("dfengine") == dfengine.__version__


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    for module in MODULES:
        body = describe_module(module)
        text = re.sub(
            rf"(## `{re.escape(module)}`\n.*?```\n).*?(```\n)",
            lambda match, body=body: f"{match[1]}{body}\n{match[2]}",
            text,
            count=1,
            flags=re.DOTALL,
        )
    DOCUMENT.write_text(text)
