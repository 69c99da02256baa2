"""The command line: each verb reads its options and calls the engine."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dfengine.engine import Event

app = typer.Typer(
    help="Explain how diffusion models make images.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


@app.callback()
def _verbs() -> None:
    """Explain how diffusion models make images."""


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="what the image should show")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HDF5 file to write")],
    steps: Annotated[int, typer.Option(help="denoising steps")] = 30,
    masks: Annotated[int, typer.Option(help="masks a step")] = 500,
    seed: Annotated[int, typer.Option(help="of the start noise and the masks")] = 0,
    sampling: Annotated[str, typer.Option(help="uniform, early or latter")] = "uniform",
    gamma: Annotated[float, typer.Option(help="shift of early and latter sampling")] = 60,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; the model's own by default")] = None,
    negative_prompt: Annotated[str, typer.Option(help="what the image should not show")] = "",
    model: Annotated[
        str,
        typer.Option(help="'shapes' (embedded), a diffusers folder, a hub id, or sd15, sd21, sdxl (random weights)"),
    ] = "shapes",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="of a known architecture, to measure it without a download")
    ] = False,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="height x width in pixels; the model's own by default")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="weights variant, as in fp16")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU by default where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32")] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N", help="masked latents in one forward; auto: what fits and keeps the device busy")
    ] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa, cudnn or xformers")] = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile; by default where the job repays it")
    ] = None,
    keep_probability: Annotated[float, typer.Option(help="share of latent pixels a mask keeps, in (0, 1)")] = 0.5,
    mask_kind: Annotated[str, typer.Option(help="gaussian or rise")] = "gaussian",
    similarity: Annotated[
        str, typer.Option(help="structure, luminance, contrast_structure, contrast, ssim, cosine or frechet")
    ] = "structure",
    score: Annotated[str, typer.Option(help="local (a map a mask) or global (a number a mask)")] = "local",
    estimator: Annotated[str | None, typer.Option(help="sum, coverage, contrast or ridge")] = None,
    target: Annotated[str, typer.Option(help="conditional, guided or unconditional prediction")] = "conditional",
    stop_at_error: Annotated[
        float | None, typer.Option(help="stop a step at this mean standard error, as a share of its map's range")
    ] = None,
    previews: Annotated[bool, typer.Option(help="keep the image predicted at each step")] = True,
    compression: Annotated[str, typer.Option(help="gzip, or none for a larger file")] = "gzip",
    mantissa_bits: Annotated[int, typer.Option(help="of the stored errors, 1 to 23; maps are always exact")] = 23,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file if it exists")] = False,
) -> None:
    """Generate an image and explain every step of it with DF-RISE."""
    from dfengine import Engine, Rise

    rise = Rise(
        num_masks=masks,
        keep_probability=keep_probability,
        masks=mask_kind,
        similarity=similarity,
        score=score,
        estimator=estimator,
        target=target,
        stop_at_error=stop_at_error,
    )
    began = time.monotonic()
    with _interruptible(out), _progress(steps) as on_event:
        engine = Engine.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            variant=variant,
            revision=revision,
            random_weights=random_weights,
            image_size=None if image_size is None else _sides(image_size),
            batch_size=_count_or_auto(batch_size),
            attention=attention,
            compile=compile,
        )
        engine.explain(
            prompt,
            rise,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=steps,
            sampling=sampling,
            gamma=gamma,
            guidance=guidance,
            previews=previews,
            out=out,
            overwrite=overwrite,
            compression=compression,
            mantissa_bits=mantissa_bits,
            on_event=on_event,
        )
    print(f"{out}: {steps} steps of DF-RISE, {masks} masks each, in {time.monotonic() - began:.0f} s")


@app.command()
def profile(
    model: Annotated[
        str, typer.Option(help="'shapes', a diffusers folder, a hub id, or sd15, sd21, sdxl (random weights)")
    ] = "shapes",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="of sd15, sd21 or sdxl: no download")
    ] = False,
    image_size: Annotated[str | None, typer.Option(metavar="HxW", help="the model's own by default")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU by default where there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32")] = None,
    batch_size: Annotated[str, typer.Option(metavar="N", help="masked latents in one forward, or auto")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, sdpa, cudnn or xformers")] = "auto",
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="by default where the job repays it")
    ] = None,
    images: Annotated[int, typer.Option(help="of the job whose time is predicted")] = 1,
    steps: Annotated[int, typer.Option(help="of each image")] = 30,
    masks: Annotated[int, typer.Option(help="of each step")] = 500,
    score: Annotated[str, typer.Option(help="local or global")] = "local",
    target: Annotated[str, typer.Option(help="conditional, guided or unconditional prediction")] = "conditional",
    seconds: Annotated[float, typer.Option(help="for each measurement, about")] = 3.0,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace of a few batches, too")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for another program")] = False,
) -> None:
    """Measure how fast a model is explained here, where the time goes, and how long a job would take."""
    import json

    from dfengine import Engine, Rise
    from dfengine import profile as profiling

    if images < 1 or not 0 < seconds < 1e6:
        raise ValueError(f"{images} images and {seconds} seconds are not possible: expected at least 1 and more than 0")
    if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
        raise ValueError(f"{str(trace)!r} is no name for a trace: expected a file in a folder that exists")
    engine = Engine.from_pretrained(
        model,
        device=device,
        dtype=dtype,
        random_weights=random_weights,
        image_size=None if image_size is None else _sides(image_size),
        batch_size=_count_or_auto(batch_size),
        attention=attention,
        compile=compile,
    )
    rise = Rise(masks, score=score, target=target)
    job = engine.job("a blue square" if model == "shapes" else "a photo of a cat", num_steps=steps)
    with _err.status("measuring") as status:
        told = lambda what: status.update(f"measuring {what}")  # noqa: E731
        found = profiling.profile(engine, rise, job, images=images, seconds=seconds, tell=told)
        if trace is not None:
            profiling.trace(engine, rise, job, trace)
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else "\n".join(profiling.lines(found)))


@app.command()
def info(
    run: Annotated[Path, typer.Argument(help="an HDF5 file that explain wrote or is writing, or a run folder")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON, for another program")] = False,
) -> None:
    """Say what a file holds, what of it is done, and how it was made."""
    import json

    from dfengine import store

    with store.open(run) as opened:
        print(json.dumps(opened.summary(), indent=2) if as_json else "\n".join(store.lines(opened)))


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(help="files and run folders, made with the same settings")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HDF5 file to write")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file if it exists")] = False,
) -> None:
    """Make one file of several: every image once, whatever file it is in."""
    from dfengine import store

    with store.open(store.merge(runs, out, overwrite=overwrite)) as merged:
        print(f"{out}: {len(merged)} image{'s' * (len(merged) != 1)}")


@app.command()
def figures(
    run: Annotated[Path, typer.Argument(help="an HDF5 file that explain wrote")],
    out: Annotated[Path, typer.Option("-o", "--out", help="picture to write: .png, .pdf or .svg")],
    method: Annotated[str, typer.Option(help="which maps to draw")] = "rise",
    step: Annotated[list[int] | None, typer.Option(help="step to show, from 0; repeat for several")] = None,
    item: Annotated[int, typer.Option(help="which image of the file, from 0")] = 0,
) -> None:
    """Draw the image, the predicted x0 and the heat maps at a row of steps (the paper's Figure 7)."""
    from dfengine import figures, store

    with store.open(run) as opened:
        print(figures.save(figures.strip(opened[item], method, step), out))


def _sides(size: str) -> tuple[int, int]:
    """(height, width) from "HxW"."""
    height, cross, width = size.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"image size {size!r} is not understood: expected height x width in pixels, as in 512x768")
    return int(height), int(width)


def _count_or_auto(size: str) -> int | None:
    """A batch size, None for "auto"."""
    if size == "auto":
        return None
    if not size.isdecimal():
        raise ValueError(f"batch size {size!r} is not understood: expected a number or auto")
    return int(size)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[Event], None]]:
    """A bar on the terminal that follows the engine's events."""
    from dfengine import StepMap

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task("generating", total=steps)

        def on_event(event: Event) -> None:
            if isinstance(event, StepMap):
                bar.advance(task)
            else:
                bar.update(task, description="explaining steps")

        yield on_event


@contextmanager
def _interruptible(out: Path) -> Iterator[None]:
    """On Ctrl-C say where what was done is, and leave with status 130."""
    from dfengine.store.files import part_path

    try:
        yield
    except KeyboardInterrupt:
        part = part_path(out)
        done = f"what was done is in {part}" if part.exists() else "nothing was written"
        _err.print(f"dfengine: interrupted; {done}", markup=False)
        raise typer.Exit(130) from None


@contextmanager
def _logged(note: Callable[[str], None]) -> Iterator[None]:
    """Tell the notes of the package's log."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log, notes = logging.getLogger("dfengine"), Notes(logging.INFO)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


def main() -> None:
    """Run the command line: what a user can get wrong is one line on stderr and exit status 2."""

    def note(message: Warning | str, *_: object) -> None:
        _err.print(f"dfengine: note: {message}", markup=False)

    with warnings.catch_warnings(), _logged(note):
        warnings.showwarning = note  # type: ignore[assignment]  # restored on leaving the block
        try:
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
        except typer.TyperException as error:
            mistake = error.format_message()
        except MemoryError as error:
            mistake = f"not enough memory: {error}"
        except RuntimeError as error:
            from dfengine.batching import is_out_of_memory

            if not is_out_of_memory(error):
                raise
            mistake = f"not enough memory, even for one latent at a time: {str(error).splitlines()[0]}"
        except (ValueError, OSError) as error:
            mistake = str(error)
        except (KeyboardInterrupt, typer.Abort):
            mistake = ""
    if not mistake:
        sys.exit(130)
    _err.print(f"dfengine: {' '.join(mistake.split())}", markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
