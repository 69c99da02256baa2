"""Results that plot, tabulate and render themselves."""

from dfengine.display.mixin import DisplayMixin, Item, Result, open

__all__ = ["DisplayMixin", "Item", "Result", "open"]
