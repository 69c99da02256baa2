"""What every study has: a table, JSON and figures; and how its images are generated."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from numpy import ndarray

from dfengine import figures as drawing
from dfengine.arguments import check_arguments
from dfengine.checks import mistake
from dfengine.diffusion.job import Job
from dfengine.engine import Engine
from dfengine.explain import Explainer
from dfengine.figures import Figure
from dfengine.files import check_local, published
from dfengine.prompts import Prompt

Method = str | Explainer
#: Called with what is being done, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Study:
    """The outcome of a study, as a Markdown table, as JSON and as figures."""

    summaries: Sequence[Any]
    """the numbers: one for each step (`games`), source (`truth`) or group of prompts (`concepts`), otherwise one"""

    def table(self) -> str:
        """The numbers in Markdown."""
        return "\n\n".join(summary.table() for summary in self.summaries)

    def to_json(self) -> str:
        """All summaries as a list, with null for numbers that are not finite."""
        data = _without_nan([dataclasses.asdict(summary) for summary in self.summaries])
        return json.dumps(data, indent=2, ensure_ascii=False)

    def figures(self) -> dict[str, Figure]:
        """The figures by name, if the study has any."""
        return {}

    def save(self, folder: str | Path) -> Path:
        """Write table.md, table.json and every figure as PNG and PDF into a folder; returns the folder."""
        folder = check_local(Path(folder))
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("table.md", self.table()), ("table.json", self.to_json())):
            with published(folder / name) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
        for name, figure in self.figures().items():
            drawing.save_both(figure, folder / name)
        return folder


def check_request(engine: Engine, **arguments: Any) -> None:
    """Raise ValueError for an argument of a study that is not possible, whatever the model."""
    if not isinstance(engine, Engine):
        raise mistake("engine", engine, "an Engine")
    check_arguments(**arguments)


def texts_of(prompts: Iterable[str | Prompt]) -> list[str]:
    """The prompts' texts. Raises ValueError if there are none, and for what is no prompt."""
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | Mapping):
        raise mistake("prompts", prompts, "a list of prompts")
    texts = [one.text if isinstance(one, Prompt) else Prompt(one).text for one in prompts]
    if not texts:
        raise ValueError("there is no prompt: give at least one")
    return texts


def make_jobs(
    engine: Engine,
    texts: Sequence[str],
    seed: int,
    num_steps: int,
    images: Sequence[UInt8[ndarray, "H W 3"]] | None = None,
) -> list[Job]:
    """A job for each prompt, the i-th with seed + i; `images` are explained instead of generated ones."""
    return [
        engine.job(text, image=None if images is None else images[i], seed=seed + i, num_steps=num_steps)
        for i, text in enumerate(texts)
    ]


def stream(
    engine: Engine, jobs: Sequence[Job], explainers: Sequence[Explainer], what: str, on_progress: OnProgress
) -> Iterator[Any]:
    """The engine's events, with progress: an event for each map, and two more for each image."""
    total = sum(len(explainers) * len(job.timesteps) + 2 for job in jobs)
    for done, event in enumerate(engine.stream(jobs, explainers), start=1):
        on_progress(what, done, total)
        yield event


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: the value with None in their place."""
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
