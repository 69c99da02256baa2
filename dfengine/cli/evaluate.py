"""`dfengine evaluate games|truth|sanity|concepts|recovery`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    import numpy as np

    from dfengine.engine import Engine
    from dfengine.prompts import Prompt
    from dfengine.studies.base import OnProgress, Study

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="random, lime, rise, cam, relevance, attention, rise-global, rise-grid, rise-frechet, rise-cosine, "
        "rise-contrast, rise-luminance, rise-contrast_structure, rise-ssim; repeat for several",
    ),
]
NumMasks = Annotated[int | None, typer.Option("--num-masks", "--masks", help="DF-RISE: masks a step; its own default")]
NumSamples = Annotated[
    int | None, typer.Option("--num-samples", "--samples", help="LIME: samples a step; its own default")
]


@dataclass(frozen=True)
class Request:
    """What all studies are asked: the model, the prompts, and where the result goes."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt; repeat for several; the embedded world's captions by default")
    ] = None
    prompts: options.Prompts = None
    limit: Annotated[int, typer.Option(help="prompts of the file or of the embedded world, at most")] = 50
    seed: options.Seed = 0
    preset: options.Preset = "default"
    out: Annotated[
        Path | None, options.path_option("-o", "--out", "--output", help="folder for the table and its figures")
    ] = None
    figure: Annotated[Path | None, options.path_option(help="write the first figure to this file as well")] = None
    as_json: options.Json = False
    model: options.Model = "shapes"
    random_weights: options.RandomWeights = False
    image_size: options.ImageSize = None
    variant: options.Variant = None
    revision: options.Revision = None
    device: options.Device = None
    dtype: options.Dtype = None
    batch_size: options.BatchSize = "auto"

    @functools.cached_property
    def given(self) -> list[Prompt]:
        """The prompts that were named."""
        from dfengine.prompts import Prompt, read

        if self.limit < 1:
            raise ValueError(f"{self.limit} prompts are not possible: expected at least 1")
        return [*map(Prompt, self.prompt or []), *([] if self.prompts is None else read(self.prompts, self.limit))]

    def texts(self) -> list[Any]:
        """The prompts, or captions of the embedded world."""
        from dfengine import evaluate

        return self.given or evaluate.captions(self.limit, self.seed)

    def engine(self) -> Engine:
        from dfengine import figures

        if self.figure is not None:
            figures.check_name(self.figure)
        return options.engine(
            self.model,
            device=self.device,
            dtype=self.dtype,
            variant=self.variant,
            revision=self.revision,
            random_weights=self.random_weights,
            image_size=self.image_size,
            batch_size=self.batch_size,
        )

    def finish(self, study: Study) -> None:
        """Print the study, and write what was asked for."""
        from dfengine import figures

        print(study.to_json() if self.as_json else study.table())
        if self.out is not None:
            study.save(self.out)
        if self.figure is not None and (drawn := study.figures()):
            figures.save(next(iter(drawn.values())), self.figure)


def build_evaluate() -> typer.Typer:
    """The group of verbs."""
    app = typer.Typer(
        help="Score maps: do they depend on the model, lie on the objects, and rank the pixels that matter?",
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )
    for verb in (games, truth, sanity, concepts, recovery):
        app.command(verb.__name__)(_with_request(verb))
    return app


def _with_request(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the options of `Request` besides its own."""
    own = [one for one in inspect.signature(verb, eval_str=True).parameters.values() if one.name != "request"]
    hints = get_type_hints(Request, include_extras=True)
    shared = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
            annotation=hints[one.name],
        )
        for one in fields(Request)
    ]

    @functools.wraps(verb)
    def command(**values: Any) -> None:
        request = Request(**{one.name: values.pop(one.name) for one in fields(Request)})
        verb(request, **values)

    parameters = [*(one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in own), *shared]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def games(
    request: Request,
    method: Methods = None,
    table: Annotated[list[int] | None, typer.Option(help="the methods of Table 1 or 2; 1 by default")] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=FILE.npy", help="another tool's maps, an array (prompts, height, width)"),
    ] = None,
    num_steps: options.NumSteps = 30,
    step: Annotated[
        list[int] | None, typer.Option(help="step to explain, from 0; repeat for several; by default 0.75 l - 1")
    ] = None,
    num_masks: NumMasks = None,
    num_samples: NumSamples = None,
    distance: Annotated[
        str, typer.Option(help="frechet-set; for few images frechet-single, features or mse")
    ] = "frechet-set",
    features: Annotated[
        Path | None,
        options.path_option(help="a transformers vision folder or Inception-v3's weights; the model's own by default"),
    ] = None,
) -> None:
    """Areas under the deletion and insertion curves (Tables 1 and 2). With --out an interrupted run resumes."""
    from dfengine import evaluate, studies

    engine = request.engine()
    with _progress() as on_progress:
        study = studies.games(
            engine,
            request.texts(),
            **_given(methods=method, num_masks=num_masks, num_samples=num_samples),
            table=table or (),
            maps=dict(map(_read_map, maps or [])),
            steps=step or (),
            num_steps=num_steps,
            seed=request.seed,
            preset=request.preset,
            distance=distance,
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
        int | None,
        typer.Option("--num-steps", "--steps", "--num-inference-steps", help="denoising steps, 4 by default"),
    ] = None,
    num_masks: Annotated[
        int | None, typer.Option("--num-masks", "--masks", help="DF-RISE: masks a step, 60 by default")
    ] = None,
    num_samples: NumSamples = None,
) -> None:
    """Whether maps depend on the model's weights and on the prompt; exit status 1 if they do not."""
    from dfengine import studies

    study = _run(
        request, studies.sanity, methods=method, num_masks=num_masks, num_samples=num_samples, num_steps=num_steps
    )
    if not study.passed:
        raise typer.Exit(1)


def concepts(
    request: Request,
    seeds: Annotated[int, typer.Option(help="images for each prompt and schedule")] = 1,
    num_steps: options.NumSteps = 30,
    gamma: Annotated[float, typer.Option(help="shift of early and latter sampling")] = 60,
) -> None:
    """Relevance of subject, relation and object by schedule (Table 3)."""
    from dfengine import evaluate, studies

    engine = request.engine()
    prompts = request.given or evaluate.embedded_prompts(request.limit, request.seed)
    with _progress() as on_progress:
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


def _run(request: Request, study_of: Callable[..., Any], **settings: Any) -> Any:
    """Run a study of plain prompts with the settings that were given, and print it."""
    engine = request.engine()
    with _progress() as on_progress:
        study = study_of(
            engine,
            request.texts(),
            preset=request.preset,
            seed=request.seed,
            on_progress=on_progress,
            **_given(**settings),
        )
    request.finish(study)
    return study


def _given(**settings: Any) -> dict[str, Any]:
    """Without those that are None: the study has defaults of its own."""
    return {name: value for name, value in settings.items() if value is not None}


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
        array = np.load(options.path(path), allow_pickle=False)
    except ValueError:
        raise ValueError(f"{path!r} is not a NumPy array: write it with numpy.save") from None
    return name, array[None] if array.ndim == 2 else array
