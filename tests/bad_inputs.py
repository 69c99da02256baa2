"""Bad values for everything that takes a value, made from the declarations, and what becomes of each.

`python tests/bad_inputs.py FOLDER N` prints a line of JSON for every N-th case. It is a process of its own because the
tests check annotations, which would refuse many values before the code does.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import typer.main
from analytic import Analytic

import dfengine
from dfengine import Engine, Random, cli, evaluate, studies
from dfengine.explain import registry
from dfengine.models import loading

HUGE = "9" * 30
#: Bad values of an option, by the kind of its value.
WORDS = {
    "INTEGER": ["x", "", "1.5", "nan", "1e3", "None", "-1", HUGE, "0"],
    "FLOAT": ["x", "", "nan", "inf", "-inf", "1e999", "None", "-1", "0"],
    "HxW": ["", "x", "64", "64x", "x64", "0x64", "-1x64", "64x64x64", "6.5x64"],
    "N": ["", "0", "-1", "x", "1.5", "nan", HUGE],
    "I/N": ["", "1", "0/3", "4/3", "a/b", "1/0", "-1/2", "1/2/3"],
    "WORD=WORD,…": ["", "x", "=x", "x=", "x=,", "x=y,,z"],
    "NAME=FILE.npy": ["", "x", "x=", "=a.npy", "x=a.txt", "x=missing.npy", "x={text}.npy", "x={words}.npy"],
    "choice": ["no-such", "", "None"],
}
#: Bad values of an option that is text; None if any text is possible, or only the model knows.
TEXTS: dict[str, list[str] | None] = {
    "prompt": ["", " ", "a\0b", "\ud800"],
    "negative_prompt": ["a\0b", "\ud800"],
    "device": ["gpu", "", "cuda:x", "cuda:-1"],
    "model": ["", "none", "/no/such", "a/b/c", "sd15", "{folder}"],
    "revision": ["", "main"],
    "variant": [""],
    "explainer": ["no-such", "", "grad-cam"],
    "method": ["no-such", ""],
    "target": ["no-such", ""],
    "mask_kind": ["no-such", ""],
    "similarity": ["no-such", ""],
    "score": ["no-such", ""],
    "estimator": ["no-such", ""],
    "design": ["no-such", ""],
    "fill": ["no-such", ""],
    "baseline": ["no-such", ""],
    "segmentation": ["no-such", ""],
    "edit": ["no-such", ""],
    "output": ["no-such", ""],
    "title": None,
    "words": None,
    "layers": None,
    "pattern": None,
    "ray_address": None,
}
#: Bad values of an option that is a path.
INPUTS = ["", "missing.h5", "{folder}", "{text}", "a\0b"]
FOLDERS = ["{text}", "{text}/sub", "a\0b"]
PATHS = {
    "run": INPUTS,
    "runs": INPUTS,
    "spec": ["", "missing.yaml", "{folder}", "{text}"],
    "prompts": ["", "missing.txt", "{folder}", "{text}"],
    "features": ["missing.pth", "a\0b"],
    "figure": ["", "x.jpg", "x", "{folder}/no/x.png"],
    "images": FOLDERS,
    "trace": ["", "{folder}", "{folder}/no/x.json"],
    "out": ["", "x.txt", "x", "{folder}", "{folder}/no/x.h5", "{text}/x.h5", "{run}", "a\0b", "x" * 300 + ".h5"],
    "folder": FOLDERS,
}
#: What a verb is given besides the bad value.
COMMANDS = {
    "explain": ["1", "-o", "{folder}/new.h5"],
    "sample": ["1", "-o", "{folder}/new.png"],
    "sweep": ["{spec}", "-o", "{folder}/sweep"],
    "worker": ["{spec}", "-o", "{folder}/sweep", "--shard", "1/2"],
    "merge": ["{run}", "-o", "{folder}/new.h5"],
    "export": ["{run}", "-o", "{folder}/new.zarr"],
    "figures": ["{run}"],
    "report": ["{run}"],
    "watch": ["{run}"],
    "info": ["{run}"],
    "evaluate concepts": [],
    "evaluate games": [],
    "evaluate recovery": [],
    "evaluate sanity": [],
    "evaluate truth": [],
    "evaluate words": [],
    "profile": [],
    "layers": [],
}
#: Values that are possible, whatever the kind of the option.
POSSIBLE = {("seed", "0"), ("step", "0"), ("item", "0"), ("gamma", "0"), ("guidance", "0"), ("guidance", "-1")}
#: Options whose bad values only the model knows.
KNOWN_BY_MODEL = {("num_steps", HUGE)}


#: Built once: building it takes longer than refusing a value.
PARSER = typer.main.get_command(cli.build_app(["explain", "profile"]))


class Loaded(BaseException):
    """A model would be read now."""


def commands() -> Iterator[tuple[str, Any]]:
    """Every verb with its command."""
    groups: list[tuple[str, Any]] = [("", PARSER)]
    while groups:
        name, command = groups.pop()
        if hasattr(command, "commands"):
            groups += [(f"{name} {verb}".strip(), one) for verb, one in command.commands.items()]
        else:
            yield name, command


def option_cases(verb: str, option: Any) -> list[str]:
    """Bad values of an option."""
    if option.param_type_name == "option" and option.is_flag:
        return []
    if option.type_descriptor.is_choice:
        return WORDS["choice"]
    if option.metavar == "PATH":
        is_folder = option.name == "out" and verb.startswith(("evaluate", "sweep", "worker"))
        values = PATHS["folder" if is_folder else option.name]
        if (verb, option.name) in {("figures", "out"), ("export", "out")}:  # names of folders
            values = ["{text}", "a\0b"] if verb == "figures" else ["{run}", "{folder}/no/x.zarr", "a\0b"]
        return [value for value in values if not (verb == "report" and value == "")]
    values = WORDS.get(option.metavar) or TEXTS[option.name] or []
    return [value for value in values if (option.name, value) not in POSSIBLE]


def cli_cases() -> Iterator[tuple[str, str, str, list[str], bool]]:
    """(verb, option, value, words, whether the model may be read)."""
    for verb, command in commands():
        base = COMMANDS[verb]
        for option in command.params:
            if option.name == "help":
                continue
            flag = option.opts[0]
            owners = [one.name for one in registry.entries().values() if option.name in {o.name for o in one.options}]
            added = ["-e", owners[0]] if verb == "explain" and owners else []
            if (verb, option.name) == ("explain", "gamma"):
                added = ["--sampling", "early"]
            for value in option_cases(verb, option):
                if option.param_type_name == "argument":
                    rest = base[1:] if base and not base[0].startswith("-") else base
                    words = [*verb.split(), *rest, *added, "--", value]
                else:
                    given = [f"{flag}={value}"] if flag.startswith("--") else [flag, value]
                    words = [*verb.split(), *base, *added, *given]
                yield verb, option.name, value, words, (option.name, value) in KNOWN_BY_MODEL
            if option.param_type_name == "option":
                if option.is_flag:
                    yield verb, option.name, flag, [*verb.split(), *base, f"{flag}=x"], False
                else:
                    yield verb, option.name, flag, [*verb.split(), *base, flag], False
        yield verb, "", "--no-such-option", [*verb.split(), *base, "--no-such-option"], False


def run_cli(words: list[str], value: str) -> tuple[str, str]:
    """The outcome of a command that must be refused in one line, and that line."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    try:
        with (
            patch.object(sys, "argv", ["dfengine", *words]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as raised:
        status = raised.code or 0
    except Loaded:
        return "reached the model", ""
    except BaseException as error:
        return f"traceback: {error!r}", ""
    message = err.getvalue()
    if status == 0:
        return "accepted", out.getvalue()
    is_line = message.startswith("dfengine: ") and message.count("\n") == 1 and out.getvalue() == ""
    if status != 2 or not is_line:
        return f"status {status}, not one line", message
    folder, file = str(Path(value).parent) if "/" in value else value, value.partition("=")[2] or value
    given = [value, repr(value)[1:-1], folder, file]
    return ("refused" if any(one in message for one in given) else "unnamed"), message.strip()


# Python --------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
#: Bad values by the kind of a parameter.
VALUES: dict[str, list[Any]] = {
    "int": ["x", "", "3", 1.5, NAN, INF, -1, 2**80, 2**80 + 1, [], [1], np.zeros(3), True, object(), b"1", 0],
    "float": ["x", "", "1", NAN, INF, -INF, [], [1.0], np.zeros(3), True, object(), 10**400, -1, 0],
    "bool": [2, "yes", "", NAN, [], object(), np.zeros(2, bool)],
    "str": [3, b"x", [], ["a"], NAN, True, object(), "no-such", "a\0b"],
    "texts": [3, [3], {}, b"x", object(), [], NAN, [None]],
    "mapping": [3, "x", ["x"], {"a": 3}, {"a": []}, {"a": [3]}, {"a": [""]}, {3: ["a"]}, {"": ["a"]}, NAN, object()],
    "function": [3, "x", [], True],
    "size": [3, "64x64", (1,), (0, 64), (-1, 5), (1.5, 2), (NAN, 1), (1, 2, 3), [], True, (True, 5)],
    "path": [3, [], NAN, True, object(), b"x"],
    "image": ["x", 3, NAN, [], np.zeros((2, 2)), np.zeros((6, 5, 3)), np.zeros((5, 6, 3), np.uint8), object()],
    "explainers": [3, "no-such", [], [3], [None], object(), {}, NAN, Random, [Random(), Random()]],
    "prompts": [3, [], [3], [None], [""], ["a\0b"], NAN, object(), [["a"]]],
    "sampling": [3, "no-such", "", [], [5, 5], [1, 2], [NAN], [INF], [-1], [2000], [None], ["x"], [True], object(), {}],
    "engine": [3, "shapes", [], object(), NAN],
    "maps": [3, "x", {"a": 3}, {"a": "x"}, {"a": np.zeros((3, 2, 2))}, {3: np.zeros((2, 6, 5))}, [1]],
    "steps": [["x"], [1.5], [-1], [99], [NAN], [True], "x", object(), 99],
    "table": [3, 0, -1, [3], "x", 1.5, NAN, ["x"], object(), True],
    "jobs": [3, "x", [3], [None], object()],
    "number list": [3, "x", [-1], [NAN]],
}
#: The kind of a parameter that its annotation does not tell.
KINDS = {
    "image": "image",
    "image_size": "size",
    "explainers": "explainers",
    "methods": "explainers",
    "prompts": "prompts",
    "schedules": "sampling names",
    "sampling": "sampling",
    "pipeline": "engine",
    "engine": "engine",
    "model": "path",
    "maps": "maps",
    "steps": "steps",
    "table": "table",
    "out": "path",
    "features": "path",
    "on_event": "function",
    "on_progress": "function",
    "jobs": "jobs",
    "device": "device",
    "dtype": "dtype",
    "cache": "cache",
    "denoiser": "engine",
}
VALUES |= {
    "sampling names": [3, [3], ["no-such"], "no-such", [], NAN, object()],
    "device": ["gpu", "", 3.5, [], NAN, object(), b"cpu"],
    "dtype": ["float8", "", 3, [], NAN, object(), int, True],
    "cache": [3, "x", [], object()],
}
#: What of the values above is possible after all.
FINE = {
    ("seed", "0"), ("gamma", "0"), ("guidance", "0"), ("guidance", "-1"), ("prompt", "'no-such'"),
    ("negative_prompt", "'no-such'"), ("name", "'no-such'"), ("step", "0"), ("revision", "'no-such'"),
    ("variant", "'no-such'"), ("methods", "[]"), ("steps", "[]"),
    ("maps", "{}"), ("num_images", repr(2**80)), ("num_images", repr(2**80 + 1)),
    ("methods", repr([Random(), Random()])), ("cell", "[1]"),
}  # fmt: skip


def kind_of(name: str, annotation: Any) -> str:
    """The kind of a parameter, from its name or its annotation."""
    if name in KINDS:
        return KINDS[name]
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if "Mapping[str, " in str(annotation):
        return "mapping"
    if "Sequence[str]" in str(annotation):
        return "texts"
    for kind in ("bool", "int", "float", "str"):
        if re.search(rf"\b{kind}\b", text) or re.search(rf"\b{kind}\b", str(annotation)):
            return kind
    raise AssertionError(f"{name}: {annotation} has no bad values")


def parameter_cases(name: str, annotation: Any, default: Any) -> list[Any]:
    """Bad values of a parameter; None too where it is no default."""
    values = VALUES[kind_of(name, annotation)]
    missing = [] if default is None or "None" in str(annotation) else [None]
    return [value for value in [*values, *missing] if (name, repr(value)) not in FINE]


def python_cases() -> Iterator[tuple[str, str, Any, Any]]:
    """(what is called, parameter, value, the call)."""
    for entry in registry.entries().values():
        hints = typing.get_type_hints(entry.explainer)
        for field in dataclasses.fields(entry.explainer):
            for value in parameter_cases(field.name, hints[field.name], field.default):
                call = partial(entry.explainer, **{field.name: value})
                yield entry.explainer.__name__, field.name, value, call
    engine = Engine(analytic())
    random = Random()
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("Engine", Engine, {"pipeline": analytic()}),
        ("Engine.from_pretrained", Engine.from_pretrained, {"device": "cpu"}),
        ("Engine.job", engine.job, {"prompt": "1"}),
        ("Engine.explain", engine.explain, {"prompt": "1", "explainers": random, "num_steps": 2}),
        ("Engine.plan", engine.plan, {"jobs": [engine.job("1", num_steps=2)], "explainers": random}),
        ("Engine.sample", lambda jobs: list(engine.sample(jobs)), {}),
        ("exponential_timesteps", dfengine.exponential_timesteps, {"num_steps": 3}),
        ("evaluate.captions", evaluate.captions, {"count": 2, "seed": 0}),
        ("evaluate.embedded_prompts", evaluate.embedded_prompts, {"count": 2, "seed": 0}),
        ("evaluate.scenes", evaluate.scenes, {"count": 2}),
        ("evaluate.make_methods", evaluate.make_methods, {"methods": ["rise", "lime"]}),
        ("evaluate.check_distance", evaluate.check_distance, {"distance": "mse", "num_images": 3}),
        ("evaluate.default_step", evaluate.default_step, {}),
        *(
            (f"studies.{name}", getattr(studies, name), {"engine": engine, "prompts": ["1", "2"], **more})
            for name, more in {
                "games": {"num_steps": 2, "methods": ["random"], "distance": "mse"},
                "truth": {"num_steps": 2, "methods": ["random"]},
                "words": {"num_steps": 2, "methods": ["random"]},
                "recovery": {"num_steps": 2, "methods": ["random"]},
                "sanity": {"num_steps": 2, "methods": ["random"], "num_masks": None},
                "concepts": {"num_steps": 2},
            }.items()
        ),
    ]
    for what, function, given in calls:
        for name, parameter in inspect.signature(function).parameters.items():
            annotation = parameter.annotation if parameter.annotation is not parameter.empty else "Any"
            for value in parameter_cases(name, annotation, parameter.default):
                yield what, name, value, partial(function, **given | {name: value})


def run_python(name: str, value: Any, call: Any) -> tuple[str, str]:
    """The outcome of a call that must be refused, and its message."""
    try:
        call()
    except Loaded:
        return "reached the model", ""
    except (ValueError, TypeError, FileNotFoundError) as error:
        message, member = str(error), value[0] if isinstance(value, list) and value else value
        names = {name, name.removesuffix("s"), name.removeprefix("num_")}
        given = names | {repr(value), repr(member), str(member) or name}
        is_named = any(one in message for one in given) and "\n" not in message
        return ("refused" if is_named else "unnamed"), f"{type(error).__name__}: {message}"
    except BaseException as error:
        return f"traceback: {error!r}", ""
    return "accepted", ""


# All -----------------------------------------------------------------------------------------------------------------


def analytic() -> Analytic:
    """A model that takes no time."""
    return Analytic(lambda x, number: x * number[:, None, None, None])


def example_files(folder: Path) -> dict[str, str]:
    """The files that commands name."""
    (folder / "text").write_text("no file of ours\n")
    np.save(folder / "words.npy", np.array(["a"]))
    (folder / "text.npy").write_text("no array")
    (folder / "spec.yaml").write_text("prompts: ['1']\nexplainers: [random]\n")
    Engine(analytic()).explain("1", Random(), num_steps=2, out=folder / "run.h5")
    return {
        "folder": str(folder), "text": str(folder / "text"), "words": str(folder / "words"),
        "spec": str(folder / "spec.yaml"), "run": str(folder / "run.h5"),
    }  # fmt: skip


@contextlib.contextmanager
def without_models() -> Iterator[None]:
    """Reading a model raises `Loaded`, and so does running a sweep."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise Loaded

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(cli, "build_app", lambda _: PARSER))
        stack.enter_context(patch.object(loading, "quiet", contextlib.nullcontext))
        for target in (
            (loading, "_from_pretrained"), (loading, "_build"), (dfengine.sweep, "run"), (dfengine.sweep, "dry_run")
        ):  # fmt: skip
            stack.enter_context(patch.object(*target, loaded))
        yield


@contextlib.contextmanager
def with_model() -> Iterator[None]:
    """Reading a model returns one that takes no time."""
    with (
        patch.object(cli, "build_app", lambda _: PARSER),
        patch.object(loading, "quiet", contextlib.nullcontext),
        patch.object(
            loading, "_from_pretrained", lambda *_, **__: types.SimpleNamespace(to=lambda device: None, components={})
        ),
        patch.object(loading, "adapt", lambda *_, **__: analytic()),
    ):
        yield


def main(folder: Path, stride: int) -> None:
    files = example_files(folder)

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: files[match[1]], text)

    def report(what: str, name: str, value: object, outcome: tuple[str, str]) -> None:
        print(json.dumps([what, name, repr(value)[:80], *outcome]), file=stdout, flush=True)

    stdout = sys.stdout
    before = {path.name for path in folder.iterdir()}
    for verb, name, value, words, may_load in itertools.islice(cli_cases(), 0, None, stride):
        with with_model() if may_load else without_models():
            outcome = run_cli(list(map(fill, words)), fill(value))
        report(f"dfengine {verb}", name, value, outcome)
    written = {path.name for path in folder.iterdir()} - before
    if written:
        report("dfengine", "", "", (f"written: {sorted(written)}", ""))
    with without_models(), contextlib.redirect_stdout(io.StringIO()):
        for what, name, value, call in itertools.islice(python_cases(), 0, None, stride):
            report(what, name, value, run_python(name, value, call))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
