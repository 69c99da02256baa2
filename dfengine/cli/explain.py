"""`dfengine explain`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options, screen
from dfengine.cli.settings import build_explainers

if TYPE_CHECKING:
    from dfengine.events import Event


def explain(
    prompt: Annotated[str, typer.Argument(help="what the image should show")],
    out: Annotated[Path, options.path_option("-o", "--out", "--output", help="HDF5 file to write")],
    explainer: Annotated[
        list[str] | None,
        typer.Option("-e", "--explainer", help="rise, cam, relevance, attention, lime, random …; repeat for several"),
    ] = None,
    preset: options.Preset = "default",
    num_steps: options.NumSteps = 30,
    seed: options.Seed = 0,
    sampling: Annotated[str, typer.Option(help="uniform, early or latter")] = "uniform",
    gamma: Annotated[float, typer.Option(help="shift of early and latter sampling")] = 60,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = "",
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    previews: Annotated[
        bool, typer.Option(help="keep the image predicted at each step", rich_help_panel="File")
    ] = True,
    compression: Annotated[
        str, typer.Option(help="gzip, or none for a larger file, faster", rich_help_panel="File")
    ] = "gzip",
    mantissa_bits: Annotated[
        int,
        typer.Option(
            help="1 to 23, of errors, layer maps and word maps; saliency is always exact", rich_help_panel="File"
        ),
    ] = 23,
    overwrite: options.Overwrite = False,
    as_json: options.JsonLines = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Generate an image and explain every step of it: by DF-RISE, or by what --explainer names."""
    explainers = build_explainers(explainer or ["rise"], preset, settings)
    started = time.monotonic()
    with screen.interruptible(out), screen.progress(num_steps * len(explainers)) as on_event:
        engine = options.engine(
            model,
            device=device,
            dtype=dtype,
            variant=variant,
            revision=revision,
            random_weights=random_weights,
            image_size=image_size,
            batch_size=batch_size,
            attention=attention,
            compile=compile,
        )
        engine.explain(
            prompt,
            explainers,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            sampling=sampling,
            gamma=gamma,
            guidance=guidance,
            previews=previews,
            out=out,
            overwrite=overwrite,
            compression=compression,
            mantissa_bits=mantissa_bits,
            on_event=_print_event if as_json else on_event,
        )
    seconds = time.monotonic() - started
    if as_json:
        print(json.dumps({"event": "Outcome", "file": str(out), "seconds": seconds}))
        return
    names = ", ".join(explainer.name for explainer in explainers)
    print(f"{out}: {num_steps} steps explained by {names}, in {seconds:.0f} s")


def _print_event(event: Event) -> None:
    """An event as a line of JSON, without its arrays, which are in the file."""
    from dfengine import StepMap

    values: dict[str, Any] = {"event": type(event).__name__}
    if isinstance(event, StepMap):
        values |= {"method": event.method, "step": event.step}
    print(json.dumps(values), flush=True)
