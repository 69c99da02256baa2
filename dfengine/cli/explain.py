"""`dfengine explain`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    from dfengine.engine import Event
    from dfengine.explain import Explainer


def explain(
    prompt: Annotated[str, typer.Argument(help="what the image should show")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HDF5 file to write")],
    explainer: Annotated[
        list[str] | None,
        typer.Option("-e", "--explainer", help="rise, cam, relevance, attention, lime, random; repeat for several"),
    ] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 30,
    seed: options.Seed = 0,
    sampling: Annotated[str, typer.Option(help="uniform, early or latter")] = "uniform",
    gamma: Annotated[float, typer.Option(help="shift of early and latter sampling")] = 60,
    guidance: Annotated[float | None, typer.Option(help="guidance scale; the model's own by default")] = None,
    negative_prompt: Annotated[str, typer.Option(help="what the image should not show")] = "",
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
    target: Annotated[
        str, typer.Option(help="conditional, guided (DF-RISE and LIME) or unconditional prediction")
    ] = "conditional",
    masks: Annotated[int, typer.Option(help="DF-RISE: masks a step")] = 500,
    keep_probability: Annotated[
        float, typer.Option(help="DF-RISE: share of latent pixels a mask keeps, in (0, 1)")
    ] = 0.5,
    mask_kind: Annotated[str, typer.Option(help="DF-RISE: gaussian or rise")] = "gaussian",
    similarity: Annotated[
        str,
        typer.Option(
            help="DF-RISE: structure, luminance, contrast_structure, contrast, ssim, cosine or frechet",
        ),
    ] = "structure",
    score: Annotated[str, typer.Option(help="DF-RISE: local (a map a mask) or global (a number a mask)")] = "local",
    estimator: Annotated[str | None, typer.Option(help="DF-RISE: sum, coverage, contrast or ridge")] = None,
    stop_at_error: Annotated[
        float | None,
        typer.Option(help="DF-RISE: stop a step at this mean standard error, as a share of its map's range"),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="DF-CAM: a layer, or a pattern as in 'up_blocks.*'; repeat for several"),
    ] = None,
    self_attention: Annotated[
        bool, typer.Option(help="relevance: let relevance pass between positions of the image")
    ] = True,
    text_attention: Annotated[
        bool, typer.Option(help="relevance: let it pass between tokens in the text encoder, too")
    ] = False,
    word: Annotated[
        list[str] | None,
        typer.Option(help="attention: a word or phrase to map; repeat for several; every word by default"),
    ] = None,
    behaviour: options.Behaviour = "paper",
    previews: Annotated[bool, typer.Option(help="keep the image predicted at each step")] = True,
    compression: Annotated[str, typer.Option(help="gzip, or none for a larger file")] = "gzip",
    mantissa_bits: Annotated[
        int, typer.Option(help="of errors, layers' and words' maps, 1 to 23; saliency is always exact")
    ] = 23,
    overwrite: options.Overwrite = False,
    as_json: options.JsonLines = False,
) -> None:
    """Generate an image and explain every step of it: by DF-RISE, or by what --explainer names."""
    names = explainer or ["rise"]
    for option, value, needs in (
        ("--layer", layer, ("cam",)),
        ("--word", word, ("attention",)),
        ("--target", None if target == "conditional" else target, ("rise", "cam", "lime")),
    ):
        if value and not set(needs) & set(names):
            raise ValueError(f"{option} is for {' or '.join(needs)}, which --explainer does not name")
    explainers = _explainers(
        names,
        rise={
            "num_masks": masks,
            "keep_probability": keep_probability,
            "mask_kind": mask_kind,
            "similarity": similarity,
            "score": score,
            "estimator": estimator,
            "target": target,
            "stop_at_error": stop_at_error,
        },
        cam={"layers": tuple(layer or ["*"]), "target": target},
        relevance={"self_attention": self_attention, "text_attention": text_attention},
        attention={"words": word},
        lime={"target": target},
        random={},
    )
    from dfengine.explain import to_xdiffusion

    began = time.monotonic()
    with screen.interruptible(out), screen.progress(steps * len(explainers)) as on_event:
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
            [to_xdiffusion(one) for one in explainers] if behaviour == "xdiffusion" else explainers,
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
            on_event=_told_as_lines if as_json else on_event,
        )
    if as_json:
        print(json.dumps({"event": "Outcome", "file": str(out), "seconds": time.monotonic() - began}))
        return
    told = ", ".join(
        f"{name} ({masks} masks)" if name == "rise" else name for name in dict.fromkeys(explainer or ["rise"])
    )
    print(f"{out}: {steps} steps explained by {told}, in {time.monotonic() - began:.0f} s")


def _told_as_lines(event: Event) -> None:
    """An event as a line of JSON, without its arrays: those are in the file."""
    from dfengine import StepMap

    told: dict[str, Any] = {"event": type(event).__name__}
    if isinstance(event, StepMap):
        told |= {"method": event.method, "step": event.step}
    print(json.dumps(told), flush=True)


def _explainers(names: list[str], **settings: dict[str, Any]) -> list[Explainer]:
    """The explainers that were named, each with its own settings. Raises ValueError for one that is not known."""
    from dfengine import Attention, Cam, Lime, Random, Relevance, Rise

    known: dict[str, Any] = {
        "rise": Rise,
        "cam": Cam,
        "relevance": Relevance,
        "attention": Attention,
        "lime": Lime,
        "random": Random,
    }
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"explainer {unknown[0]!r} is not known: expected {', '.join(known)}")
    return [known[name](**settings[name]) for name in dict.fromkeys(names)]
