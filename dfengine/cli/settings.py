"""Options of a verb that are the registered explainers' settings: names, defaults and help come from the registry."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options

if TYPE_CHECKING:
    from dfengine.explain import Explainer
    from dfengine.explain.registry import Entry, Option


def with_settings(verb: Callable[..., None], entries: Mapping[str, Entry]) -> Callable[..., None]:
    """The verb with an option for every setting of the explainers, passed on as `settings` where it is given."""
    declared: dict[str, Option] = {}
    for entry in sorted(entries.values(), key=_is_preset):
        for option in entry.options:
            declared.setdefault(option.name, option)
    parameters = [one for one in inspect.signature(verb, eval_str=True).parameters.values() if one.name != "settings"]
    parameters += [_parameter(option, entries) for option in declared.values()]

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        given = {name: values.pop(name) for name in declared}
        settings = {name: value for name, value in given.items() if value not in (None, [])}
        mappings = {name: _mapping(value) for name, value in settings.items() if declared[name].is_mapping}
        verb(**values, settings=settings | mappings)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def build_explainers(names: Sequence[str], preset: str, settings: Mapping[str, Any]) -> list[Explainer]:
    """The named explainers at a preset, each with those of the settings that it has.

    Raises ValueError for a name or preset that is not known, and for a setting that none of them has.
    """
    from dfengine.explain import registry

    entries = registry.entries()
    chosen = {name: entries.get(name) for name in dict.fromkeys(names)}
    available = {name: {one.name for one in entry.options} if entry else set() for name, entry in chosen.items()}
    for name in settings:
        if all(chosen.values()) and not any(name in known for known in available.values()):
            owners = [one.name for one in entries.values() if name in {option.name for option in one.options}]
            raise ValueError(f"{_flag(name)} is a setting of {' and '.join(owners)}: add -e {owners[0]}")
    return [
        registry.make(name, preset=preset, **{key: value for key, value in settings.items() if key in available[name]})
        for name in chosen
    ]


def _parameter(option: Option, entries: Mapping[str, Entry]) -> inspect.Parameter:
    """The option of a setting, which is None or empty unless given: defaults are the explainers' own."""
    owners = [entry for entry in entries.values() if option.name in {one.name for one in entry.options}]
    defaults = {next(one.default for one in entry.options if one.name == option.name) for entry in owners}
    plain = [entry for entry in owners if not _is_preset(entry)] or owners
    kind: Any = list[option.type] if option.is_repeated else option.type  # type: ignore[name-defined]
    kind = list[Any] if option.is_mapping else kind
    whole = functools.partial(options.integer, high=2**63 - 1)  # the explainers know their limits
    by_type: dict[type, Callable[..., Any]] = {int: whole, float: options.real}
    declare = _pairs if option.is_mapping else by_type.get(option.type, _plain)
    default = next(iter(defaults)) if len(defaults) == 1 else None
    default = " ".join(map(str, default)) if isinstance(default, tuple) else default
    help = option.help + ("; repeat for several" if option.is_repeated else "")
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            kind | None,
            declare(
                *_flags(option),
                help=help if default is None else f"{help} (default: {default})",
                panel=f"Settings of {', '.join(entry.label for entry in plain)}",
            ),
        ],
    )


def _plain(*flags: str, help: str, panel: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel)


def _pairs(*flags: str, help: str, panel: str) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, parser=_pair, metavar="WORD=WORD,…")


def _pair(text: str) -> tuple[str, list[str]]:
    """A text and others, from A=B,C."""
    word, _, rest = text.partition("=")
    others = [one.strip() for one in rest.split(",")]
    if not word.strip() or not all(others):
        raise typer.BadParameter(f"{text!r} is not understood: expected a word and others, as in circle=star,ring")
    return word.strip(), others


def _mapping(pairs: Sequence[tuple[str, list[str]]]) -> dict[str, list[str]]:
    """The others of each text; what is given again adds to them."""
    mapping: dict[str, list[str]] = {}
    for word, others in pairs:
        mapping.setdefault(word, []).extend(others)
    return mapping


def _is_preset(entry: Entry) -> bool:
    """Whether it is what the preset xdiffusion makes of another explainer."""
    return entry.name.startswith("xdiffusion-")


def _flag(name: str) -> str:
    return "--explained-output" if name == "output" else "--" + name.replace("_", "-")  # --output names the file


def _flags(option: Option) -> list[str]:
    """`num_masks` is --num-masks and --masks, `layers` is --layers and --layer; a switch has its --no- form."""
    flag = _flag(option.name)
    if option.type is bool:
        return [f"{flag}/--no{flag[1:]}"]
    if option.is_repeated:
        return list(dict.fromkeys([flag, flag.removesuffix("s")]))
    return [flag, "--" + flag.removeprefix("--num-")] if option.name.startswith("num_") else [flag]
