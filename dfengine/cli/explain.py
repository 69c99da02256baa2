"""`dfengine explain`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfengine.cli import options, progress, screen
from dfengine.cli.settings import build_explainers

if TYPE_CHECKING:
    from dfengine.events import Event


def explain(
    prompt: Annotated[str, typer.Argument(help="what the image should show")],
    out: Annotated[Path, options.path_option("-o", "--out", "--output", help="HDF5 file to write")],
    explainer: Annotated[
        list[str] | None,
        typer.Option(
            "-e",
            "--explainer",
            help="rise, cam, relevance, attention, counterfactual, lime, random …; repeat for several",
        ),
    ] = None,
    preset: options.Preset = "default",
    num_steps: options.NumSteps = 30,
    seed: options.Seed = 0,
    sampling: Annotated[
        Literal["uniform", "early", "latter"], typer.Option(help="where the time-steps are close together")
    ] = "uniform",
    gamma: Annotated[
        float | None, options.real(help="shift of early and latter sampling, 60 by default", low=0)
    ] = None,
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
        Literal["gzip", "none"], typer.Option(help="none makes a larger file, faster", rich_help_panel="File")
    ] = "gzip",
    mantissa_bits: Annotated[
        int,
        options.integer(
            help="1 to 23, of errors, layer maps and word maps; saliency is always exact",
            low=1,
            high=23,
            panel="File",
        ),
    ] = 23,
    overwrite: options.Overwrite = False,
    as_json: options.JsonLines = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Generate an image and explain every step of it: by DF-RISE, or by what --explainer names."""
    _check(prompt, out, overwrite, negative_prompt)
    options.refuse(gamma is not None and sampling == "uniform", "--gamma", "of --sampling early and latter")
    explainers = build_explainers(explainer or ["rise"], preset, settings)
    started = time.monotonic()
    total = num_steps * len(explainers)
    with screen.interruptible(lambda: _kept(out)), progress.bar("loading the model") as bar:
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
        bar.begin("generating", total)
        engine.explain(
            prompt,
            explainers,
            negative_prompt=negative_prompt,
            seed=seed,
            num_steps=num_steps,
            sampling=sampling,
            gamma=60 if gamma is None else gamma,
            guidance=guidance,
            previews=previews,
            out=out,
            overwrite=overwrite,
            compression=compression,
            mantissa_bits=mantissa_bits,
            on_event=_follower(total, 0 if overwrite else _maps_done(out), bar, as_json=as_json),
        )
    seconds = time.monotonic() - started
    if as_json:
        screen.say_json({"event": "Outcome", "file": str(out), "seconds": seconds})
        return
    from dfengine.runtime.tuning import format_duration

    names = ", ".join(explainer.name for explainer in explainers)
    screen.say(f"{out}: {num_steps} steps explained by {names}, in {format_duration(seconds)}")


def _check(prompt: str, out: Path, overwrite: bool, negative_prompt: str) -> None:
    """Raise ValueError for what is not possible whatever the model is."""
    from dfengine.diffusion.job import Job
    from dfengine.store.file.resume import check_target

    Job(prompt, timesteps=(0,), negative_prompt=negative_prompt)
    check_target(out, overwrite)


def _kept(out: Path) -> str:
    """What an interrupted run has left."""
    from dfengine.store import part_path

    part = part_path(out)
    return f"completed work is in {part}; {screen.RESUME}" if part.exists() else ""


def _maps_done(out: Path) -> int:
    """How many maps an interrupted run has, which is going to be continued."""
    from dfengine import store

    part = store.part_path(out)
    if part.exists():
        with suppress(store.StoreError), store.open(part) as run:
            return sum(run.summary()["maps_done"].values())
    return 0


def _follower(total: int, done: int, bar: progress.Bar, *, as_json: bool) -> Callable[[Event], None]:
    """The function to call with each event: it moves the bar, and prints the totals and then each event as JSON."""
    from dfengine import StepMap

    has_begun = False

    def follow(event: Event) -> None:
        nonlocal has_begun
        if not has_begun:
            has_begun = True
            bar.begin("explaining, maps", total, done)
            if as_json:
                screen.say_json({"event": "Started", "items": 1, "maps": total, "maps_done": done})
        values: dict[str, Any] = {"event": type(event).__name__}
        if isinstance(event, StepMap):
            bar.advance()
            values |= {"method": event.method, "step": event.step}
        if as_json:  # without its arrays, which are in the file
            screen.say_json(values)

    return follow
