"""A self-contained page of explanations that opens offline in any browser."""

from dfengine.report.writing import write

__all__ = ["write"]
