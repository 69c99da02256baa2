"""The command line: each verb parses its options, calls the engine and prints."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dfengine.cli import files, measure, screen
from dfengine.cli.evaluate import build_evaluate
from dfengine.cli.explain import explain
from dfengine.cli.figures import figures
from dfengine.cli.report import report
from dfengine.cli.sample import sample
from dfengine.cli.settings import with_settings
from dfengine.cli.sweep import sweep, worker
from dfengine.cli.watch import watch

if TYPE_CHECKING:
    from dfengine.explain.registry import Entry


def build_app(words: Sequence[str]) -> typer.Typer:
    """The command line's parser. Settings of explainers are imported only if the words ask for a verb that has them."""
    app = typer.Typer(
        help="Explain how diffusion models make images.",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    entries: Mapping[str, Entry] = {}
    if {"explain", "profile"} & set(words):
        from dfengine.explain.registry import entries as registered

        entries = registered()
    app.command("explain")(with_settings(explain, entries))
    for verb in (sample, sweep, worker, figures, report, watch):
        app.command()(verb)
    app.add_typer(build_evaluate(), name="evaluate")
    app.command("profile")(with_settings(measure.profile, {k: v for k, v in entries.items() if k == "rise"}))
    for other in (measure.layers, files.info, files.merge, files.export):
        app.command()(other)
    return app


def _print_version(value: bool) -> bool:
    if value:
        from dfengine import __version__

        screen.say(f"dfengine {__version__}")
        raise typer.Exit
    return value


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Explain how diffusion models make images."""


def main() -> None:
    """Run the command line: a user's error is one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # what the terminal's encoding lacks is escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings(), screen.logged(), screen.terminated_as_interrupted():
        warnings.showwarning = lambda message, *_: screen.note(message)
        try:
            app = build_app([*sys.argv[1:], *os.environ.get("COMP_WORDS", "").split()])
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False, prog_name="dfengine"))
        except typer.TyperException as error:
            mistake = error.format_message().replace(": Value error, ", ": ")
        except MemoryError as error:
            mistake = f"not enough memory: {error}"
        except RuntimeError as error:
            from dfengine.runtime.batching import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            mistake = f"not enough memory, even for one latent at a time: {str(error).splitlines()[0]}"
        except (ValueError, OSError) as error:
            mistake = str(error)
        except (KeyboardInterrupt, typer.Abort):
            screen.complain("interrupted")
            sys.exit(130)
    screen.complain(mistake)
    sys.exit(2)
