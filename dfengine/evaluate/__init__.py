"""Whether explanations can be trusted."""

from dfengine.evaluate.checks import STEPS, Sanity, captions, lines, sanity

__all__ = ["STEPS", "Sanity", "captions", "lines", "sanity"]
