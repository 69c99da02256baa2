"""`dfengine evaluate games|truth|words|sanity|concepts|recovery`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dfengine.cli import options, progress, screen
from dfengine.cli.request import MOST_PROMPTS, Request, with_request

if TYPE_CHECKING:
    import numpy as np

    from dfengine.prompts import Prompt
    from dfengine.studies.base import OnProgress

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="random, lime, rise, cam, relevance, attention, counterfactual, rise-global, rise-grid, rise-frechet, "
        "rise-cosine, rise-mse, rise-contrast, rise-luminance, rise-contrast_structure, rise-ssim, rise-identity, "
        "rise-frozen; repeat for several",
    ),
]
NumMasks = Annotated[
    int | None, options.integer("--num-masks", "--masks", help="DF-RISE: masks a step; its own default", low=1)
]
NumSamples = Annotated[
    int | None, options.integer("--num-samples", "--samples", help="LIME: samples a step; its own default", low=2)
]


def build_evaluate() -> typer.Typer:
    """The group of verbs."""
    app = typer.Typer(
        help="Score maps: do they depend on the model, lie on the objects, and rank the pixels that matter?",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )
    for verb in (games, truth, words, sanity, concepts, recovery):
        app.command(verb.__name__)(with_request(verb))
    return app


def games(
    request: Request,
    method: Methods = None,
    table: Annotated[
        list[int] | None, options.integer(help="the methods of Table 1 or 2; 1 by default", low=1, high=2)
    ] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=FILE.npy", help="another tool's maps, an array (prompts, height, width)"),
    ] = None,
    num_steps: options.NumSteps = 30,
    step: Annotated[
        list[int] | None,
        options.integer(help="step to explain, from 0; repeat for several; by default 0.75 l - 1", low=0),
    ] = None,
    num_masks: NumMasks = None,
    num_samples: NumSamples = None,
    distance: Annotated[
        Literal["frechet-set", "frechet-single", "features", "mse"],
        typer.Option(help="between an image and the original; frechet-set needs many images"),
    ] = "frechet-set",
    refill: Annotated[
        Literal["zero", "noise"],
        typer.Option(help="what deleted pixels become: zero, or noise (a noisy latent without content)"),
    ] = "zero",
    features: Annotated[
        Path | None,
        options.path_option(help="a transformers vision folder or Inception-v3's weights; the model's own by default"),
    ] = None,
) -> None:
    """Areas under the deletion and insertion curves (Tables 1 and 2). With --out an interrupted run resumes."""
    from dfengine import evaluate, studies

    texts, given_maps = request.texts(), dict(map(_read_map, maps or []))
    evaluate.check_distance(distance, len(texts))
    for name, array in given_maps.items():
        if len(array) != len(texts):
            raise ValueError(f"map {name!r} is of {len(array)} images: expected one for each of {len(texts)} prompts")
    if step and max(step) >= num_steps:
        raise ValueError(f"step {max(step)} is outside [0, {num_steps - 1}]: steps index the time-steps")
    if features is not None and not features.exists():
        raise FileNotFoundError(
            f"there is no feature extractor at {str(features)!r}: expected its folder, or a file of its weights"
        )
    names = [*(method or []), *(name for number in table or [] for name in evaluate.TABLES[number])]
    default = () if given_maps else evaluate.TABLES[1]
    _check_methods(request, names or default, num_masks=num_masks, num_samples=num_samples)
    engine = request.engine()
    with _progress(request) as on_progress:
        study = studies.games(
            engine,
            texts,
            **_given(methods=method, num_masks=num_masks, num_samples=num_samples),
            table=table or (),
            maps=given_maps,
            steps=step or (),
            num_steps=num_steps,
            seed=request.seed,
            preset=request.preset,
            distance=distance,
            refill=refill,
            features=features,
            cache=None if request.out is None else evaluate.GameCache(request.out / "cache"),
            on_progress=on_progress,
        )
    request.finish(study)


def truth(
    request: Request,
    method: Methods = None,
    num_steps: options.NumSteps = 30,
    num_masks: NumMasks = None,
    num_samples: NumSamples = None,
) -> None:
    """Whether maps lie on the subject and the object, at each step; in the embedded world."""
    from dfengine import studies

    _run(request, studies.truth, methods=method, num_masks=num_masks, num_samples=num_samples, num_steps=num_steps)


def words(
    request: Request,
    method: Methods = None,
    num_steps: options.NumSteps = 30,
    num_masks: NumMasks = None,
    num_samples: NumSamples = None,
) -> None:
    """Whether maps find what a word changes (counterfactual maps); on any model that takes prompts."""
    from dfengine import evaluate, studies

    prompts = request.given or evaluate.embedded_prompts(request.limit or MOST_PROMPTS, request.seed)
    settings = {"methods": method, "num_masks": num_masks, "num_samples": num_samples, "num_steps": num_steps}
    _run(request, studies.words, prompts, **settings)


def recovery(
    request: Request,
    method: Methods = None,
    num_steps: options.NumSteps = 30,
    num_masks: NumMasks = None,
) -> None:
    """Whether maps start on the shapes and spread over the steps; in the embedded world."""
    from dfengine import studies

    _run(request, studies.recovery, methods=method, num_masks=num_masks, num_steps=num_steps)


def sanity(
    request: Request,
    method: Methods = None,
    num_steps: Annotated[
        int | None, options.integer(*options.STEPS, help="denoising steps, 4 by default", low=1)
    ] = None,
    num_masks: Annotated[
        int | None, options.integer("--num-masks", "--masks", help="DF-RISE: masks a step, 60 by default", low=1)
    ] = None,
    num_samples: NumSamples = None,
) -> None:
    """Whether maps depend on the model's weights and on the prompt; exit status 1 if they do not."""
    from dfengine import studies

    options.refuse(request.figure is not None, "--figure", "for studies that have figures, and sanity has none")
    study = _run(
        request, studies.sanity, methods=method, num_masks=num_masks, num_samples=num_samples, num_steps=num_steps
    )
    if not study.passed:
        raise typer.Exit(1)


def concepts(
    request: Request,
    seeds: Annotated[int, options.integer(help="images for each prompt and schedule", low=1, high=10000)] = 1,
    num_steps: options.NumSteps = 30,
    gamma: Annotated[float, options.real(help="shift of early and latter sampling", low=0)] = 60,
) -> None:
    """Relevance of subject, relation and object by schedule (Table 3)."""
    from dfengine import evaluate, studies

    prompts = request.given or evaluate.embedded_prompts(request.limit or MOST_PROMPTS, request.seed)
    engine = request.engine()
    with _progress(request) as on_progress:
        study = studies.concepts(
            engine,
            prompts,
            preset=request.preset,
            num_seeds=seeds,
            num_steps=num_steps,
            gamma=gamma,
            seed=request.seed,
            on_progress=on_progress,
        )
    request.finish(study)


def _run(
    request: Request, study_of: Callable[..., Any], prompts: Sequence[Prompt] | None = None, **settings: Any
) -> Any:
    """Run a study of prompts, by default plain ones, with the settings that were given, and print it."""
    names = settings["methods"] or inspect.signature(study_of).parameters["methods"].default
    _check_methods(request, names, num_masks=settings["num_masks"], num_samples=settings.get("num_samples"))
    given, engine = prompts or request.texts(), request.engine()
    with _progress(request) as on_progress:
        study = study_of(
            engine, given, preset=request.preset, seed=request.seed, on_progress=on_progress, **_given(**settings)
        )
    request.finish(study)
    return study


def _check_methods(request: Request, names: Sequence[str], **counts: int | None) -> None:
    """Raise ValueError for a method that is not known, and for a setting that none of them has."""
    from dfengine import evaluate

    explainers = evaluate.make_methods(names, preset=request.preset, **_given(**counts))
    for name in _given(**counts):
        is_unused = not any(hasattr(explainer, name) for explainer in explainers)
        owner = {"num_masks": "rise", "num_samples": "lime"}[name]
        options.refuse(is_unused, f"--{name.replace('_', '-')}", f"for --method {owner}")


def _given(**settings: Any) -> dict[str, Any]:
    """Without those that are None: the study has defaults of its own."""
    return {name: value for name, value in settings.items() if value is not None}


@contextmanager
def _progress(request: Request) -> Iterator[OnProgress]:
    """A bar that follows a study."""
    cache = None if request.out is None else request.out / "cache"

    def kept() -> str:
        return f"finished games are in {cache}; {screen.RESUME}" if cache is not None and cache.exists() else ""

    with screen.interruptible(kept), progress.bar("starting") as bar:

        def on_progress(what: str, done: int, total: int) -> None:
            if what != bar.what:
                bar.begin(what, total)
            bar.update(done, what, total)

        yield on_progress


def _read_map(given: str) -> tuple[str, np.ndarray]:
    """A name and its maps, from NAME=FILE."""
    import numpy as np

    name, equals, path = given.partition("=")
    if not (name and equals and Path(path).suffix == ".npy"):
        raise ValueError(f"map {given!r} is not understood: expected NAME=FILE.npy, an array (images, height, width)")
    try:
        array = np.load(options.path(path), allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path!r} is not a NumPy array: write it with numpy.save") from None
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3):
        raise ValueError(
            f"{path!r} holds {array.dtype} of shape {array.shape}: expected numbers (images, height, width)"
        )
    return name, array[None] if array.ndim == 2 else array
