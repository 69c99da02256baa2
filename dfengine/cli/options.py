"""Options that several verbs share, and the checks of their values that need no model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfengine.checks import whole_number_in_words

if TYPE_CHECKING:
    from dfengine.engine import Engine


def path(text: str) -> Path:
    """A path, with ~ for the home folder, which a shell does not expand within --out=~/run.h5."""
    if "\0" in text:
        raise typer.BadParameter(f"{text!r} is no path: it has a NUL character")
    return Path(text).expanduser()


def path_argument(help: str) -> Any:
    """An argument that is a path."""
    return typer.Argument(help=help, parser=path, metavar="PATH")


def path_option(*flags: str, help: str, panel: str | None = None) -> Any:
    """An option that is a path."""
    return typer.Option(*flags, help=help, parser=path, metavar="PATH", rich_help_panel=panel)


def integer(*flags: str, help: str, low: int | None = None, high: int = 2**31 - 1, panel: str | None = None) -> Any:
    """An option that is a whole number, from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            number: int | None = int(text)
        except ValueError:
            number = None
        if number is None or (low is not None and number < low) or number > high:
            raise typer.BadParameter(f"{text!r} is not possible: expected {whole_number_in_words(number, low, high)}")
        return number

    return typer.Option(*flags, help=help, parser=parse, metavar="INTEGER", rich_help_panel=panel)


def real(
    *flags: str,
    help: str,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    panel: str | None = None,
) -> Any:
    """An option that is a finite number, from `low`, or more than `above`, to `high`."""
    bounds = [f"of at least {low:g}"] * (low > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    bounds += [f"of at most {high:g}"] * (high < math.inf)

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and low <= number <= high and number > above):
            raise typer.BadParameter(
                f"{text!r} is not possible: expected {' '.join(['a finite number', ' and '.join(bounds)]).strip()}"
            )
        return number

    return typer.Option(*flags, help=help, parser=parse, metavar="FLOAT", rich_help_panel=panel)


def _height_and_width(size: str) -> tuple[int, int]:
    height, cross, width = size.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise typer.BadParameter(f"{size!r} is not understood: expected height x width in pixels, as in 512x768")
    return int(height), int(width)


def _count_or_auto(size: str) -> int | None:
    """A batch size, None for "auto"."""
    if size != "auto" and not (size.isdecimal() and 0 < int(size) < 2**31):
        raise typer.BadParameter(f"{size!r} is not understood: expected a number of at least 1, or auto")
    return None if size == "auto" else int(size)


_MODEL, _DEVICE = "Model", "Device and speed"

Model = Annotated[
    str,
    typer.Option(
        help="shapes (embedded), a diffusers folder, a hub id, or sd15, sd21, sdxl (with --random-weights)",
        rich_help_panel=_MODEL,
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="build the architecture without a download, to measure it", rich_help_panel=_MODEL
    ),
]
ImageSize = Annotated[
    Any,
    typer.Option(
        parser=_height_and_width,
        metavar="HxW",
        help="height x width in pixels; the model's own by default",
        rich_help_panel=_MODEL,
    ),
]
Variant = Annotated[str | None, typer.Option(help="variant of the weights, such as fp16", rich_help_panel=_MODEL)]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id", rich_help_panel=_MODEL)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 …; a GPU by default if there is one", rich_help_panel=_DEVICE),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="of the weights; float16 on a GPU by default", rich_help_panel=_DEVICE),
]
BatchSize = Annotated[
    Any,
    typer.Option(
        parser=_count_or_auto,
        metavar="N",
        help="masked latents in one forward; auto: what fits into memory",
        rich_help_panel=_DEVICE,
    ),
]
AttentionBackend = Annotated[
    Literal["auto", "sdpa", "cudnn", "xformers"], typer.Option(help="attention of torch", rich_help_panel=_DEVICE)
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="use torch.compile; by default if the job is long enough",
        rich_help_panel=_DEVICE,
    ),
]
STEPS = ("--num-steps", "--steps", "--num-inference-steps")
NumSteps = Annotated[int, integer(*STEPS, help="denoising steps", low=1)]
Seed = Annotated[int, integer(help="seed of the start noise and the masks", low=0, high=2**63 - 1)]
Guidance = Annotated[
    float | None,
    real(
        "--guidance", "--guidance-scale", help="guidance scale; 1 or less: the prompt alone; the model's own by default"
    ),
]
NegativePrompt = Annotated[str, typer.Option(help="what the image should not show")]
Preset = Annotated[
    Literal["default", "paper", "xdiffusion"],
    typer.Option(
        help="default: what explains best; paper: the equations as printed; xdiffusion: the authors' released code"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
JsonLines = Annotated[bool, typer.Option("--json", help="print a line of JSON for each event")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the output if it exists")]
Prompts = Annotated[
    Path | None,
    path_option(help="a file of prompts: .txt, .csv, .jsonl, dataset_coco.json or Visual Genome's relationships.json"),
]
#: Images that are shown if nothing says how many.
MOST_IMAGES = 8
Limit = Annotated[int | None, integer(help=f"images at most, if no --item is named; {MOST_IMAGES} by default", low=1)]
Items = Annotated[list[int] | None, integer("--item", help="image of the file, from 0; repeat for several", low=0)]
Run = Annotated[Path, path_argument("an HDF5 file that explain wrote or is writing, or a run folder")]


def engine(model: str, *, device: str | None = None, **options: Any) -> Engine:
    """The engine that the options describe."""
    from dfengine import Engine
    from dfengine.models.loading import pick_device

    if device is not None:
        pick_device(device)
    return Engine.from_pretrained(model, device=device, **options)


def refuse(is_given: bool, flag: str, what: str) -> None:
    """Raise ValueError if an option is given that has no effect, saying what it belongs to."""
    if is_given:
        raise ValueError(f"{flag} has no effect here: it is {what}")


def check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be written into a folder, which may not exist yet."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: name a folder instead of {str(folder)!r}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{nearest} is not writable: name another folder than {str(folder)!r}")


def sibling(run: Path, ending: str) -> Path:
    """The name of a file or run folder with another ending, next to it."""
    run = run if run.name and run.name != ".." else run.resolve()
    return run.with_name(run.name.removesuffix(".h5").removesuffix(".part") + ending)


def prompts_of(file: Path | None, limit: int) -> list[str]:
    """The prompts of a file, if one is given."""
    from dfengine import prompts

    return [] if file is None else [prompt.text for prompt in prompts.read(file, limit)]
