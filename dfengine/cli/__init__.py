"""The command line: each verb reads its options and calls the engine."""

from __future__ import annotations

import sys
import warnings

import typer

from dfengine.cli import files, measure, screen
from dfengine.cli.evaluate import evaluate
from dfengine.cli.explain import explain
from dfengine.cli.figures import figures
from dfengine.cli.report import report
from dfengine.cli.sample import sample
from dfengine.cli.sweep import sweep, worker
from dfengine.cli.watch import watch

app = typer.Typer(
    help="Explain how diffusion models make images.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for verb in (
    explain,
    sample,
    sweep,
    worker,
    measure.profile,
    measure.layers,
    evaluate,
    watch,
    files.info,
    files.merge,
    files.export,
    figures,
    report,
):
    app.command()(verb)


def main() -> None:
    """Run the command line: what a user can get wrong is one line on stderr and exit status 2."""

    def note(message: Warning | str, *_: object) -> None:
        screen.err.print(f"dfengine: note: {message}", markup=False)

    with warnings.catch_warnings(), screen.logged(note):
        warnings.showwarning = note  # type: ignore[assignment]  # restored on leaving the block
        try:
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
        except typer.TyperException as error:
            mistake = error.format_message()
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
            mistake = ""
    if not mistake:
        sys.exit(130)
    screen.err.print(f"dfengine: {' '.join(mistake.split())}", markup=False)
    sys.exit(2)
