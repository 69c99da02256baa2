"""What is in a file or folder, in lines for a person."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dfengine.explain import rebuild
from dfengine.store.folder_reader import RunFolder
from dfengine.store.item import StoredItem
from dfengine.store.reader import Run

#: Of images, or of segments, that are listed.
_MOST_LINES = 20


def lines(opened: Run | RunFolder) -> Iterator[str]:
    """What `dfengine info` prints."""
    told = opened.summary()
    state = "finished" if told["finished"] else "not finished"
    yield f"{told['path']}: {state}, {told['bytes'] / 1e6:.1f} MB"
    for environment in told.get("environments", [told.get("environment")]):
        model = ", ".join(told.get("models", [told.get("model")]))
        versions = ", ".join(f"{name} {environment[name]}" for name in ("dfengine", "torch") if name in environment)
        yield f"  made with  {model} on {environment['device']}; {versions}"
    each = f", {told['steps']} steps each, {' × '.join(map(str, told['image']))} pixels" if "steps" in told else ""
    took = f", in {told['seconds']:.1f} s" if told["seconds"] else ""
    planned = max(told["items"], told.get("planned", 0))
    yield f"  images     {told['trajectories']} of {planned}{each}{took}"
    for name, method in told["methods"].items():
        done = f"{told['maps_done'][name]} of {told['maps_planned'][name]} maps"
        yield f"  {name:<10} {done}: {_shown(method['settings'])}"
    for segment in told.get("segments", [])[:_MOST_LINES]:
        state = "being written, or cut off" if segment["is_part"] else "closed"
        yield f"  segment    {segment['file']}: {segment['finished']} of {segment['items']} images, {state}"
    aside = [one for one in told.get("failures", []) if one["state"] == "aside"]
    for one in aside[:_MOST_LINES]:
        made = f"{one['described']['prompt']!r}, seed {one['described']['seed']}"
        yield f"  set aside  {made}: {one['errors'][-1]}"
    for number, item in enumerate(islice(opened, _MOST_LINES)):
        yield f"  image {number:<4} {', '.join((repr(item.prompt), f'seed {item.seed}', *_made(item)))}"
    if len(opened) > _MOST_LINES:
        yield f"  and {len(opened) - _MOST_LINES} more images"


def _shown(settings: dict[str, Any]) -> str:
    """An explainer's settings as one would write them: those that are not the defaults."""
    try:
        explainer = rebuild(settings)
    except ValueError:
        return ", ".join(f"{name}={value}" for name, value in settings.items())
    changed = [
        f"{field.name}={getattr(explainer, field.name)!r}"
        for field in dataclasses.fields(explainer)
        if getattr(explainer, field.name) != field.default
    ]
    return f"{type(explainer).__name__}({', '.join(changed)})"


def _made(item: StoredItem) -> Iterator[str]:
    settings = item.item.settings
    if item.negative_prompt:
        yield f"not {item.negative_prompt!r}"
    if "guidance" in settings:
        yield f"guidance {settings['guidance']:g}"
    if "timesteps" in settings:
        yield f"time-steps {settings['timesteps'][0]} to {settings['timesteps'][-1]}"
    if settings.get("image"):
        yield "a given image"
