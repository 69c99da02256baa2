"""Results that draw, tabulate and show themselves: what `Engine.explain` and `dfengine.open` give to people."""

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
    """An explanation with all that is made of one."""

    def plot(
        self,
        method: str | None = None,
        steps: Sequence[int] | None = None,
        *,
        layers: Sequence[str] | None = None,
        concepts: Sequence[str] | None = None,
        words: Sequence[str] | None = None,
    ) -> figures.Figure:
        """The figure of a method's maps in the form that suits it (`dfengine.figures`), which a notebook shows.

        Without `method`, of the first that has what is named: `layers` of DF-CAM, `concepts` of relevance, `words` of
        attention. Raises ValueError for what the result does not have, or has not finished.
        """
        from dfengine import figures

        named = {"layers": layers, "concepts": concepts, "words": words}
        given = {name for name, values in named.items() if values is not None}
        takes = {"Cam": "layers", "Relevance": "concepts", "Attention": "words"}
        fitting = [name for name in self.maps if given <= {takes.get(self.explainer_name(name))}]
        chosen = method or next(iter(fitting or self.maps), "")
        if given and chosen not in fitting:
            raise ValueError(
                f"the figure of {chosen!r} has no {' or '.join(sorted(given))} to choose: layers are for DF-CAM, "
                "concepts for relevance, words for attention"
            )
        if layers is not None:
            return figures.layers(self, chosen, steps, [layers] if isinstance(layers, str) else layers)
        if concepts is not None:
            return figures.relevance(self, concepts, steps)
        if words is not None:
            return figures.attention(self, words, steps)
        return figures.draw(self, chosen, steps)

    def to_xarray(self) -> xarray.Dataset:
        """All arrays in memory with named axes and coordinates, as `dfengine.store.Run.to_xarray` names them.

        Beside those: `preview`, `latent`, `epsilon`, and of each resolution of DF-CAM's layers `cam_{u}x{v}` with the
        axes (layer_{u}x{v}, step, u_{u}x{v}, v_{u}x{v}). Prompts, seed, model and settings (JSON) are attributes.
        Raises ValueError where xarray is missing, or the image is not generated yet.
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
    """Opens a file or run folder as `dfengine.store.open` does, with items that draw, tabulate and show themselves."""
    return store.open(path, Item)
