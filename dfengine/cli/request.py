"""What every study of `dfengine evaluate` is asked: its options, and their checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dfengine.cli import options, screen

if TYPE_CHECKING:
    from dfengine.engine import Engine
    from dfengine.prompts import Prompt
    from dfengine.studies.base import Study

#: Prompts if nothing says how many.
MOST_PROMPTS = 50


@dataclass(frozen=True)
class Request:
    """What all studies are asked: the model, the prompts, and where the result goes."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="a prompt; repeat for several; the embedded world's captions by default")
    ] = None
    prompts: options.Prompts = None
    limit: Annotated[
        int | None,
        options.integer(
            help=f"prompts of the file or of the embedded world, at most; {MOST_PROMPTS} by default", low=1
        ),
    ] = None
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

    def __post_init__(self) -> None:
        """Raises ValueError, before a model is read, for what is not possible with any."""
        from dfengine import figures

        is_unused = self.limit is not None and bool(self.prompt) and self.prompts is None
        options.refuse(is_unused, "--limit", "for the prompts of a file (--prompts) or of the embedded world")
        if self.out is not None:
            options.check_folder(self.out)
        if self.figure is not None:
            figures.check_name(self.figure)

    @functools.cached_property
    def given(self) -> list[Prompt]:
        """The prompts that were named."""
        from dfengine.prompts import Prompt, read

        most = self.limit or MOST_PROMPTS
        return [*map(Prompt, self.prompt or []), *([] if self.prompts is None else read(self.prompts, most))]

    def texts(self) -> list[Any]:
        """The prompts, or captions of the embedded world."""
        from dfengine import evaluate

        return self.given or evaluate.captions(self.limit or MOST_PROMPTS, self.seed)

    def engine(self) -> Engine:
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

        screen.say(*(study.to_json() if self.as_json else study.table()).split("\n"))
        if self.out is not None:
            study.save(self.out)
        if self.figure is not None and (drawn := study.figures()):
            figures.save(next(iter(drawn.values())), self.figure)


def with_request(verb: Callable[..., None]) -> Callable[..., None]:
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
