"""The verbs that look at a model: profile, layers, evaluate."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dfengine.cli import options, screen


def profile(
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = "auto",
    attention: options.AttentionBackend = "auto",
    compile: options.Compile = None,
    images: Annotated[int, typer.Option(help="of the job whose time is predicted")] = 1,
    steps: Annotated[int, typer.Option(help="of each image")] = 30,
    masks: Annotated[int, typer.Option(help="of each step")] = 500,
    score: Annotated[str, typer.Option(help="local or global")] = "local",
    target: Annotated[str, typer.Option(help="conditional, guided or unconditional prediction")] = "conditional",
    seconds: Annotated[float, typer.Option(help="for each measurement, about")] = 3.0,
    trace: Annotated[Path | None, typer.Option(help="write a Chrome trace of a few batches, too")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure how fast a model is explained here, where the time goes, and how long a job would take."""
    import json

    from dfengine import Rise
    from dfengine import profile as profiling

    if images < 1 or not 0 < seconds < 1e6:
        raise ValueError(f"{images} images and {seconds} seconds are not possible: expected at least 1 and more than 0")
    if trace is not None and (trace.is_dir() or not trace.parent.is_dir()):
        raise ValueError(f"{str(trace)!r} is no name for a trace: expected a file in a folder that exists")
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
    rise = Rise(masks, score=score, target=target)
    job = engine.job("a blue square" if model == "shapes" else "a photo of a cat", num_steps=steps)
    with screen.err.status("measuring") as status:
        told = lambda what: status.update(f"measuring {what}")  # noqa: E731
        found = profiling.profile(engine, rise, job, images=images, seconds=seconds, tell=told)
        if trace is not None:
            profiling.trace(engine, rise, job, trace)
    print(json.dumps(dataclasses.asdict(found), indent=2) if as_json else "\n".join(profiling.lines(found)))


def layers(
    pattern: Annotated[list[str] | None, typer.Argument(help="only those named so, as in 'up_blocks.*'")] = None,
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """List the layers of a model that DF-CAM looks at, with the channels and resolution of their feature maps."""
    import json

    from dfengine import Cam

    engine = options.engine(
        model,
        device="cpu",
        image_size=image_size,
        variant=variant,
        revision=revision,
        random_weights=random_weights,
    )
    found = Cam(layers=tuple(pattern or ["*"])).select_layers(engine.denoiser)
    if as_json:
        print(json.dumps({name: list(layer.shape) for name, layer in found.items()}, indent=2))
        return
    for name, layer in found.items():
        channels, height, width = layer.shape
        print(f"{name:<30} {type(layer.module).__name__:<20} {channels:>5} channels, {height} × {width}")
