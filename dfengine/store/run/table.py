"""The contents of a file or run folder, as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from dfengine.result import as_call
from dfengine.store.file.item import StoredItem
from dfengine.store.file.reader import Run
from dfengine.store.run.failures import QUARANTINED
from dfengine.store.run.reader import RunFolder
from dfengine.text import printable

#: The most images, and the most segments and failures, that are listed.
_MAX_LINES = 20


def summary_lines(
    opened: Run | RunFolder, format_settings: Callable[[Mapping[str, Any]], str] = as_call
) -> Iterator[str]:
    """The lines that `dfengine info` prints. `format_settings` formats the settings of an explainer.

    A file may come from anybody: what a terminal would act on is escaped.
    """
    return map(printable, _lines(opened, format_settings))


def _lines(opened: Run | RunFolder, format_settings: Callable[[Mapping[str, Any]], str]) -> Iterator[str]:
    summary = opened.summary()
    state = "finished" if summary["finished"] else "not finished"
    yield f"{summary['path']}: {state}, {summary['bytes'] / 1e6:.1f} MB"
    for environment in summary.get("environments", [summary.get("environment")]):
        model = ", ".join(summary.get("models", [summary.get("model")]))
        versions = ", ".join(f"{name} {environment[name]}" for name in ("dfengine", "torch") if name in environment)
        yield f"  made with  {model} on {environment.get('device', 'an unknown device')}; {versions}"
    each = ""
    if "steps" in summary:
        each = f", {summary['steps']} steps each, {' × '.join(map(str, summary['image']))} pixels"
    duration = f", in {summary['seconds']:.1f} s" if summary["seconds"] else ""
    # Items of a plan can be the same work, which is done once.
    planned = summary["items"] if summary["finished"] else max(summary["items"], summary.get("planned", 0))
    yield f"  images     {summary['trajectories']} of {planned}{each}{duration}"
    for name, method in summary["methods"].items():
        maps = f"{summary['maps_done'][name]} of {summary['maps_planned'][name]} maps"
        yield f"  {name:<10} {maps}: {format_settings(method['settings'])}"
    for segment in summary.get("segments", [])[:_MAX_LINES]:
        state = "unfinished" if segment["is_part"] else "closed"
        yield f"  segment    {segment['file']}: {segment['finished']} of {segment['items']} images, {state}"
    quarantined = [failure for failure in summary.get("failures", []) if failure["state"] == QUARANTINED]
    for failure in quarantined[:_MAX_LINES]:
        described = failure["described"]
        yield f"  failed     {described['prompt']!r}, seed {described['seed']}: {failure['errors'][-1]}"
    for number, item in enumerate(islice(opened, _MAX_LINES)):
        yield f"  image {number:<4} {', '.join((repr(item.prompt), f'seed {item.seed}', *_inputs(item)))}"
    if len(opened) > _MAX_LINES:
        yield f"  and {len(opened) - _MAX_LINES} more images"


def _inputs(item: StoredItem) -> Iterator[str]:
    settings = item.item.settings
    if item.negative_prompt:
        yield f"negative prompt {item.negative_prompt!r}"
    if "guidance" in settings:
        yield f"guidance {settings['guidance']:g}"
    if "timesteps" in settings:
        yield f"time-steps {settings['timesteps'][0]} to {settings['timesteps'][-1]}"
    if settings.get("image"):
        yield "from a given image"
