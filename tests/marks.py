"""Marks of single cases of a test; pyproject.toml lists the marks."""

from typing import Any

import pytest


def soak(*values: Any) -> Any:
    """A case of a parametrized test for `make soak` alone."""
    return pytest.param(*values, marks=pytest.mark.soak)
