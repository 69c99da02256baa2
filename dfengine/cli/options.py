"""Options that several verbs share, and what is made of their values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dfengine.engine import Engine


def path(text: str) -> Path:
    """A path, with ~ for the home folder, which a shell does not expand within --out=~/run.h5."""
    return Path(text).expanduser()


def path_argument(help: str) -> Any:
    """An argument that is a path."""
    return typer.Argument(help=help, parser=path, metavar="PATH")


def path_option(*flags: str, help: str, panel: str | None = None) -> Any:
    """An option that is a path."""
    return typer.Option(*flags, help=help, parser=path, metavar="PATH", rich_help_panel=panel)


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
    str | None,
    typer.Option(metavar="HxW", help="height x width in pixels; the model's own by default", rich_help_panel=_MODEL),
]
Variant = Annotated[str | None, typer.Option(help="variant of the weights, such as fp16", rich_help_panel=_MODEL)]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id", rich_help_panel=_MODEL)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 …; a GPU by default if there is one", rich_help_panel=_DEVICE),
]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32", rich_help_panel=_DEVICE)]
BatchSize = Annotated[
    str,
    typer.Option(
        metavar="N", help="masked latents in one forward; auto: what fits into memory", rich_help_panel=_DEVICE
    ),
]
AttentionBackend = Annotated[str, typer.Option(help="auto, sdpa, cudnn or xformers", rich_help_panel=_DEVICE)]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="use torch.compile; by default if the job is long enough",
        rich_help_panel=_DEVICE,
    ),
]
NumSteps = Annotated[int, typer.Option("--num-steps", "--steps", "--num-inference-steps", help="denoising steps")]
Seed = Annotated[int, typer.Option(help="seed of the start noise and the masks")]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", "--guidance-scale", help="guidance scale; 1 or less: the prompt alone; the model's own by default"
    ),
]
NegativePrompt = Annotated[str, typer.Option(help="what the image should not show")]
Preset = Annotated[
    str,
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
Run = Annotated[Path, path_argument("an HDF5 file that explain wrote or is writing, or a run folder")]


def engine(model: str, *, image_size: str | None = None, batch_size: str = "auto", **options: Any) -> Engine:
    """The engine that the options describe."""
    from dfengine import Engine

    return Engine.from_pretrained(
        model,
        image_size=None if image_size is None else _height_and_width(image_size),
        batch_size=count_or_auto(batch_size),
        **options,
    )


def sibling(run: Path, ending: str) -> Path:
    """The name of a file or run folder with another ending, next to it."""
    run = run if run.name and run.name != ".." else run.resolve()
    return run.with_name(run.name.removesuffix(".h5").removesuffix(".part") + ending)


def prompts_of(file: Path | None, limit: int) -> list[str]:
    """The prompts of a file, if one is given."""
    from dfengine import prompts

    return [] if file is None else [prompt.text for prompt in prompts.read(file, limit)]


def _height_and_width(size: str) -> tuple[int, int]:
    height, cross, width = size.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"image size {size!r} is not understood: expected height x width in pixels, as in 512x768")
    return int(height), int(width)


def count_or_auto(size: str) -> int | None:
    """A batch size, None for "auto"."""
    if size == "auto":
        return None
    if not size.isdecimal():
        raise ValueError(f"batch size {size!r} is not understood: expected a number or auto")
    return int(size)
