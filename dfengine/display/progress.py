"""The progress bar shown while an image is generated and explained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import TqdmWarning

from dfengine.explain import StepMap

with warnings.catch_warnings():
    # Without ipywidgets tqdm warns and falls back to text, which is good enough.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm


@contextmanager
def bar(total: int, shown: bool | None, done: int = 0) -> Iterator[Callable[[object], None]]:
    """Show a bar of `total` step maps, `done` of them complete; yields the function to call with each engine event.

    With `shown` None, the bar appears in notebooks only. It is removed at the end.
    """
    disable = not (in_notebook() if shown is None else shown)
    with tqdm(total=total, initial=done, desc="generating", unit="map", leave=False, disable=disable) as line:

        def follow(event: object) -> None:
            if isinstance(event, StepMap):
                line.set_description(f"explaining: {event.method}, step {event.step}", refresh=False)
                line.update()
            else:
                line.set_description("explaining")

        yield follow


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel (not in a script, nor in IPython in a terminal)."""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")
