"""`dfengine sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dfengine.cli import options, progress, screen

#: Prompts of a file that are shown if nothing says how many.
_MOST_PROMPTS = 8


def sample(
    out: Annotated[Path, options.path_option("-o", "--out", "--output", help="picture to write: .png, .pdf or .svg")],
    prompt: Annotated[list[str] | None, typer.Argument(help="what the images should show; a row each")] = None,
    prompts: options.Prompts = None,
    limit: Annotated[
        int | None, options.integer(help=f"prompts of the file, at most; {_MOST_PROMPTS} by default", low=1)
    ] = None,
    seeds: Annotated[
        int, options.integer(help="images a prompt and schedule, with --seed and the seeds after it", low=1, high=1000)
    ] = 1,
    seed: options.Seed = 0,
    num_steps: options.NumSteps = 30,
    gamma: Annotated[
        list[float] | None,
        options.real(help="shift of early and latter sampling, 60 by default; repeat for several", low=0),
    ] = None,
    guidance: options.Guidance = None,
    negative_prompt: options.NegativePrompt = "",
    images: Annotated[Path | None, options.path_option(help="a folder to write the single images to as well")] = None,
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = "auto",
) -> None:
    """Generate the same prompts and seeds by uniform, early and latter sampling, side by side (Figures 6 and 10)."""
    from dfengine import figures
    from dfengine.diffusion.job import Job

    options.refuse(limit is not None and prompts is None, "--limit", "for the prompts of a file (--prompts)")
    texts = [*(prompt or []), *options.prompts_of(prompts, limit or _MOST_PROMPTS)]
    if not texts:
        raise ValueError("there is nothing to show: name a prompt, or a file of them (--prompts)")
    for text in texts:
        Job(text, timesteps=(0,), negative_prompt=negative_prompt)  # raises ValueError
    figures.check_name(out)
    if images is not None:
        options.check_folder(images)
    engine = options.engine(
        model,
        device=device,
        dtype=dtype,
        variant=variant,
        revision=revision,
        random_weights=random_weights,
        image_size=image_size,
        batch_size=batch_size,
    )
    gammas = list(dict.fromkeys(gamma or [60.0]))
    schedules: dict[str, tuple[str, float]] = {"uniform": ("uniform", 0.0)}
    for stage in ("early", "latter"):
        schedules |= {f"{stage}, γ = {shift:g}": (stage, shift) for shift in gammas}
    rows = [(text, seed + number) for text in texts for number in range(seeds)]
    jobs = [
        engine.job(
            text,
            negative_prompt=negative_prompt,
            seed=start,
            num_steps=num_steps,
            sampling=sampling,
            gamma=shift,
            guidance=guidance,
        )
        for text, start in rows
        for sampling, shift in schedules.values()
    ]
    generated = [path.image.numpy() for path in progress.counted(engine.sample(jobs), "generating", len(jobs))]
    by_row = {
        f"{text}, seed {start}" if seeds > 1 else text: generated[len(schedules) * row :][: len(schedules)]
        for row, (text, start) in enumerate(rows)
    }
    lists = {name: job.timesteps for name, job in zip(schedules, jobs, strict=False)}
    screen.say(figures.save(figures.samples(by_row, lists, engine.denoiser.schedule.num_train_timesteps - 1), out))
    if images is not None:
        names = [
            f"{row:04}-seed{start}-{s}-{g:g}" for row, (_, start) in enumerate(rows) for s, g in schedules.values()
        ]
        screen.say(f"{figures.save_images(dict(zip(names, generated, strict=True)), images)}: {len(generated)} images")
