"""`dfengine evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    import numpy as np

    from dfengine.studies.base import OnProgress, Study


def evaluate(
    sanity: Annotated[bool, typer.Option("--sanity", help="do maps depend on the model and the prompt?")] = False,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="relevance of subject, relation and object by schedule (Table 3)")
    ] = False,
    recovery: Annotated[
        bool, typer.Option("--recovery", help="do maps begin on the shapes and spread? (in the embedded world)")
    ] = False,
    games: Annotated[
        bool, typer.Option("--games", help="areas under the deletion and insertion curves (Tables 1 and 2)")
    ] = False,
    truth: Annotated[
        bool, typer.Option("--truth", help="do maps lie on the subject and the object? (in the embedded world)")
    ] = False,
    model: options.Model = "shapes",
    random_weights: options.RandomWeights = False,
    image_size: options.ImageSize = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt; repeat for several; the embedded world's own by default")
    ] = None,
    prompts: options.Prompts = None,
    limit: Annotated[int, typer.Option(help="prompts of the file or of the embedded world, at most")] = 50,
    seed: options.Seed = 0,
    seeds: Annotated[int, typer.Option(help="--concepts: images for each prompt and schedule")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="denoising steps: 30 by default, 4 for --sanity", show_default=False)
    ] = None,
    step: Annotated[
        list[int] | None,
        typer.Option(help="--games: step to explain, from 0; repeat for several; by default 0.75 l - 1"),
    ] = None,
    gamma: Annotated[float, typer.Option(help="--concepts: shift of early and latter sampling")] = 60,
    masks: Annotated[
        int | None, typer.Option(help="masks of DF-RISE a step: those of the preset by default, 60 for --sanity")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="samples of LIME: those of the preset by default")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="random, lime, rise, cam, relevance, attention, rise-global, -grid, -frechet, -cosine, -contrast, "
            "-luminance, -contrast_structure, -ssim; repeat for several"
        ),
    ] = None,
    tables: Annotated[
        list[int] | None, typer.Option("--table", help="--games: the methods of Table 1 or 2; 1 by default")
    ] = None,
    given_maps: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=FILE.npy", help="--games: another tool's maps (prompts, height, width)"),
    ] = None,
    distance: Annotated[
        str, typer.Option(help="--games: frechet-set, or frechet-single, features, mse for few images")
    ] = "frechet-set",
    features: Annotated[
        Path | None,
        typer.Option(
            help="--games: a transformers vision folder, or Inception-v3's weights; the model's own by default"
        ),
    ] = None,
    preset: options.Preset = "default",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="folder for table and figures; --games resumes from it, too")
    ] = None,
    batch_size: options.BatchSize = "auto",
    figure: Annotated[
        Path | None, typer.Option(help="--concepts (Figure 11), --recovery and --truth: a picture, too")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check that maps can be trusted (exit status 1 where they cannot), or say what they tell of many prompts."""
    from dfengine import evaluate as evaluation
    from dfengine import figures, studies
    from dfengine.prompts import Prompt, read

    if sanity + concepts + recovery + games + truth != 1:
        raise ValueError("say one thing to evaluate: --sanity, --concepts, --recovery, --games or --truth")
    if min(limit, seeds) < 1:
        raise ValueError(f"{limit} prompts and {seeds} seeds are not possible: expected at least 1")
    if figure is not None:
        figures.check_name(figure)
    given = [*map(Prompt, prompt or []), *([] if prompts is None else read(prompts, limit))]
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
    shared: dict[str, Any] = {"seed": seed, "preset": preset}
    shared |= {} if steps is None else {"num_steps": steps}
    counts: dict[str, Any] = {"num_masks": masks, "num_samples": samples}
    counts = {name: count for name, count in counts.items() if count is not None}
    methods: dict[str, Any] = {"methods": method} if method else {}
    study: Study
    with _progress() as on_progress:
        shared["on_progress"] = on_progress
        if concepts:
            named = given or evaluation.embedded_prompts(limit, seed)
            study = studies.concepts(engine, named, num_seeds=seeds, gamma=gamma, **shared)
        elif games:
            study = studies.games(
                engine,
                given or evaluation.captions(limit, seed),
                table=tables or (),
                maps=dict(map(_read_map, given_maps or [])),
                steps=step or (),
                distance=distance,
                features=features,
                cache=None if out is None else evaluation.GameCache(out / "cache"),
                **methods,
                **counts,
                **shared,
            )
        else:
            run = studies.sanity if sanity else studies.truth if truth else studies.recovery
            study = run(engine, given or evaluation.captions(limit, seed), **methods, **counts, **shared)
    print(study.to_json() if as_json else study.table())
    if out is not None:
        study.save(out)
    if figure is not None and (drawn := study.figures()):
        figures.save(next(iter(drawn.values())), figure)
    if isinstance(study, studies.SanityStudy) and not study.passed:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar that follows a study."""
    with screen.bar("starting", 1) as (shown, task):
        yield lambda what, done, total: shown.update(task, description=what, completed=done, total=total)


def _read_map(given: str) -> tuple[str, np.ndarray]:
    """A name and its maps, from NAME=FILE."""
    import numpy as np

    name, equals, path = given.partition("=")
    if not (name and equals and Path(path).suffix == ".npy"):
        raise ValueError(f"map {given!r} is not understood: expected NAME=FILE.npy, an array (images, height, width)")
    try:
        array = np.load(path, allow_pickle=False)
    except ValueError:
        raise ValueError(f"{path!r} is not a NumPy array: write it with numpy.save") from None
    return name, array[None] if array.ndim == 2 else array
