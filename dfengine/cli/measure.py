"""The verbs that look at a model: profile and layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from dfengine.cli import options, progress, screen


def profile(
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    images: Annotated[int, options.integer(help="images of the job whose duration is predicted", low=1)] = 1,
    num_steps: options.NumSteps = 30,
    seconds: Annotated[float, options.real(help="duration of each measurement, about", above=0, high=1e6)] = 3.0,
    trace: Annotated[Path | None, options.path_option(help="write a Chrome trace of a few batches as well")] = None,
    as_json: options.Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Measure how fast a model is explained here, where the time goes, and how long a job would take."""
    from dfengine import Rise
    from dfengine import profile as profiling

    rise = Rise(**settings)
    if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
        raise ValueError(f"{str(trace)!r} cannot be written: expected a file in a folder that exists")
    engine = options.engine(
        model,
        device=device,
        dtype=dtype,
        random_weights=random_weights,
        image_size=image_size,
        batch_size=batch_size,
        attention=attention,
        compile=compile,
    )
    job = engine.job("a blue square" if model == "shapes" else "a photo of a cat", num_steps=num_steps)
    with progress.bar("measuring") as bar:

        def on_progress(what: str) -> None:
            bar.update(0, f"measuring {what}")

        measured = profiling.profile(engine, rise, job, images=images, seconds=seconds, on_progress=on_progress)
        if trace is not None:
            profiling.write_trace(engine, rise, job, trace)
    if as_json:
        screen.say_json(dataclasses.asdict(measured), indent=2)
    else:
        screen.say(*profiling.format_profile(measured))


def layers(
    pattern: Annotated[list[str] | None, typer.Argument(help="names or patterns, such as 'up_blocks.*'")] = None,
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """List the layers that DF-CAM can explain, with the channels and resolution of their feature maps."""
    from dfengine import Cam

    engine = options.engine(
        model,
        device="cpu",
        image_size=image_size,
        variant=variant,
        revision=revision,
        random_weights=random_weights,
    )
    selected = Cam(layers=tuple(pattern or ["*"])).select_layers(engine.denoiser)
    if as_json:
        screen.say_json({name: list(layer.shape) for name, layer in selected.items()}, indent=2)
        return
    for name, layer in selected.items():
        channels, height, width = layer.shape
        screen.say(f"{name:<30} {type(layer.module).__name__:<20} {channels:>5} channels, {height} × {width}")
