"""Results that plot, tabulate and render themselves: what `Engine.explain` and `dfengine.open` return."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dfengine import result, store
from dfengine.diffusion.job import Job
from dfengine.display.dataset import dataset
from dfengine.explain import rebuild
from dfengine.result import Explanation

if TYPE_CHECKING:
    import xarray

    from dfengine import figures


class DisplayMixin(Explanation):
    """An explanation with figures, a dataset and a notebook view."""

    def plot(
        self,
        method: str | None = None,
        steps: Sequence[int] | None = None,
        *,
        layers: Sequence[str] | None = None,
        concepts: Sequence[str] | None = None,
        words: Sequence[str] | None = None,
    ) -> figures.Figure:
        """The figure of a method's maps in the form that suits them, as `dfengine.figures.draw`; notebooks display it.

        Without `method`, the first one whose figure takes the given rows: `layers` of DF-CAM, `concepts` of relevance,
        `words` of attention and counterfactual. Raises ValueError for what the result does not have or has not
        finished.
        """
        from dfengine.figures.forms import draw, form_of

        given = {"layers": layers, "concepts": concepts, "words": words}
        rows = {name: values for name, values in given.items() if values is not None}
        fitting = [name for name in self.maps if rows.keys() <= {form_of(self, name).rows}]
        chosen = method or next(iter(fitting or self.maps), "")
        if rows and chosen not in fitting:
            raise ValueError(
                f"the figure of {chosen!r} takes no {' or '.join(sorted(rows))}: layers are for methods with maps by "
                "layer, concepts for relevance, words for attention and counterfactual"
            )
        return draw(self, chosen, steps, next(iter(rows.values()), None))

    def to_xarray(self) -> xarray.Dataset:
        """All arrays in memory with named axes and coordinates, named as in `dfengine.store.Run.to_xarray`.

        In addition `preview`, `latent`, `epsilon`, and for each resolution of DF-CAM's layers `cam_{u}x{v}` with axes
        (layer_{u}x{v}, step, u_{u}x{v}, v_{u}x{v}). Prompts, seed, model and settings (JSON) are attributes. Raises
        ValueError if xarray is not installed or the image is not generated yet.
        """
        return dataset(self)

    def _repr_html_(self) -> str:
        from dfengine.display.notebook import html

        return html(self)


class Result(DisplayMixin, result.Result):
    __doc__ = result.Result.__doc__


class Item(DisplayMixin, store.StoredItem):
    __doc__ = store.StoredItem.__doc__

    @property
    def settings(self) -> dict[str, Any]:
        """The explainer of each method; with `job`, all that is needed to compute the item again.

        Raises ValueError if one is not known to this dfengine; `settings_of` gives its settings all the same.
        """
        return {name: rebuild(description) for name, description in super().settings.items()}

    @property
    def job(self) -> Job:
        """What was generated, as `Engine.stream` takes it."""
        settings = self.item.settings
        return Job(
            prompt=self.prompt,
            timesteps=tuple(settings["timesteps"]),
            seed=self.seed,
            negative_prompt=self.negative_prompt,
            guidance=settings["guidance"],
            image=torch.from_numpy(self.image) if settings["image"] else None,
        )


def open(path: str | os.PathLike[str]) -> store.Run | store.RunFolder:
    """Open a file or run folder like `dfengine.store.open`, with items that plot, tabulate and render themselves."""
    return store.open(path, Item)
