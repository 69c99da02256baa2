"""One self-contained page of explanations: it opens in any browser, offline, and asks nothing of a network."""

from dfengine.report.writing import write

__all__ = ["write"]
