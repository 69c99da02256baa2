"""The bar that a notebook shows while an image is generated and explained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import TqdmWarning

from dfengine.explain import StepMap

with warnings.catch_warnings():
    # Where a notebook has no ipywidgets, tqdm says so and shows text, which will do.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


@contextmanager
def bar(total: int, shown: bool | None, done: int = 0) -> Iterator[Callable[[object], None]]:
    """A bar of so many step maps, some `done` already: it follows the engine's events, and is gone at the end.

    `shown` None is in a notebook only.
    """
    disable = not (in_notebook() if shown is None else shown)
    with tqdm(total=total, initial=done, desc="generating", unit="map", leave=False, disable=disable) as line:

        def follow(event: object) -> None:
            if isinstance(event, StepMap):
                line.set_description(f"explaining: {event.method}, step {event.step + 1}", refresh=False)
                line.update()
            else:
                line.set_description("explaining")

        yield follow


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this, and not a script or IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")
