"""Options that several verbs have, and what is made of their values."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dfengine.engine import Engine

Model = Annotated[
    str, typer.Option(help="'shapes' (embedded), a diffusers folder, a hub id, or sd15, sd21, sdxl (random weights)")
]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="of a known architecture, to measure it without a download")
]
ImageSize = Annotated[
    str | None, typer.Option(metavar="HxW", help="height x width in pixels; the model's own by default")
]
Variant = Annotated[str | None, typer.Option(help="weights variant, as in fp16")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; a GPU by default where there is one")]
Dtype = Annotated[str | None, typer.Option(help="float16, bfloat16 or float32")]
BatchSize = Annotated[
    str, typer.Option(metavar="N", help="masked latents in one forward; auto: what fits and keeps the device busy")
]
AttentionBackend = Annotated[str, typer.Option(help="auto, sdpa, cudnn or xformers")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile; by default where the job repays it")
]
Behaviour = Annotated[
    str, typer.Option(help="paper: its equations; xdiffusion: what its released code does (docs/xdiffusion.md)")
]
Seed = Annotated[int, typer.Option(help="of the start noise and the masks")]
Json = Annotated[bool, typer.Option("--json", help="as JSON, for another program")]
JsonLines = Annotated[bool, typer.Option("--json", help="a line of JSON for each event, for another program")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the file if it exists")]
Prompts = Annotated[
    Path | None,
    typer.Option(help="a file of prompts: .txt, .csv, .jsonl, dataset_coco.json or Visual Genome's relationships.json"),
]
Run = Annotated[Path, typer.Argument(help="an HDF5 file that explain wrote or is writing, or a run folder")]


def engine(model: str, *, image_size: str | None = None, batch_size: str = "auto", **options: Any) -> Engine:
    """The engine of a model, as the options name it."""
    from dfengine import Engine

    return Engine.from_pretrained(
        model,
        image_size=None if image_size is None else _sides(image_size),
        batch_size=count_or_auto(batch_size),
        **options,
    )


def beside(run: Path, ending: str) -> Path:
    """A name beside a file or run folder: its own, with another ending."""
    run = run if run.name and run.name != ".." else run.resolve()
    return run.with_name(run.name.removesuffix(".h5").removesuffix(".part") + ending)


def texts(path: Path | None, limit: int) -> list[str]:
    """The prompts of a file, if there is one."""
    from dfengine import prompts

    return [] if path is None else [prompt.text for prompt in prompts.read(path, limit)]


def _sides(size: str) -> tuple[int, int]:
    """(height, width) from "HxW"."""
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
