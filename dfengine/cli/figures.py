"""`dfengine figures`: pictures of what a file or run folder has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dfengine.cli import options

if TYPE_CHECKING:
    from dfengine.store import Run, RunFolder

#: Endings of single pictures, including formats that are refused; any other name is a folder.
_PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".webp", ".eps", ".ps")


def figures(
    run: options.Run,
    out: Annotated[
        Path | None,
        options.path_option(
            "-o", "--out", "--output", help="a folder, by default next to the run; or one picture: .png, .pdf or .svg"
        ),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="method to draw, all by default; repeat for several")] = None,
    step: Annotated[
        list[int] | None, typer.Option(min=0, help="step to show, counted from 0; repeat for several")
    ] = None,
    item: Annotated[
        list[int] | None, typer.Option(min=0, help="image of the file, counted from 0; repeat for several")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="images to draw if no --item is named")] = 8,
    gif: Annotated[bool, typer.Option("--gif", help="animate each method's maps over all steps as well")] = False,
) -> None:
    """Draw every figure that the run has data for, as PNG and PDF in a folder, or one picture of an image's maps."""
    from dfengine import store

    with store.open(run) as opened:
        if out is not None and out.suffix.lower() in _PICTURES and not out.is_dir():
            _draw_one(opened, out, method or [], step, item or [0], gif)
        else:
            _draw_all(opened, _folder(run, out), method, step, item, limit, gif)


def _draw_one(
    opened: Run | RunFolder, out: Path, methods: list[str], steps: list[int] | None, items: list[int], gif: bool
) -> None:
    from dfengine import figures

    if len(methods) > 1 or len(items) > 1 or gif:
        raise ValueError(f"{out} is one picture: name one --method and one --item, or a folder for several")
    shown = opened[items[0]]
    method = methods[0] if methods else next(iter(shown.maps), "rise")
    print(figures.save(figures.draw(shown, method, steps), out))


def _draw_all(
    opened: Run | RunFolder,
    folder: Path,
    methods: list[str] | None,
    steps: list[int] | None,
    items: list[int] | None,
    limit: int,
    gif: bool,
) -> None:
    from dfengine import figures

    drawings = []
    for one in figures.draw_all(opened, items=items, methods=methods, steps=steps, limit=limit):
        folder.mkdir(exist_ok=True)
        print(*figures.save_both(one.figure, folder / one.name), sep="\n", flush=True)
        drawings.append((one.name, one.result, one.method, one.steps))
    if not drawings:
        raise ValueError(f"there is nothing to draw in {opened.path} yet: no image has a finished step")
    for name, result, method, chosen in drawings if gif else ():
        if result is not None:
            print(figures.animate(result, method, folder / f"{name}.gif", steps=chosen), flush=True)


def _folder(run: Path, out: Path | None) -> Path:
    """The folder for the figures. Raises ValueError if it is a file or has no parent."""
    if out is None:
        out = options.sibling(run, ".figures")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder for the figures (-o)")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {str(out.parent)!r} does not exist: create it first")
    return out
