"""Regenerate every table from the recorded rows, without measuring anything.

python bench/tables.py
"""

from __future__ import annotations

import importlib

import record

#: The benchmarks that record rows. Each is the name of its script and of its result, and declares TABLES.
BENCHMARKS = (
    "certainty",
    "concepts",
    "estimators",
    "explainers",
    "games",
    "kernels_compiled",
    "kernels_measured",
    "profiles",
    "inner_maps",
    "rise_settings",
    "scores",
    "shapes_model",
    "store",
    "sweeps",
    "throughput",
    "waterfall",
)


def tables(benchmark: str) -> record.Tables:
    """The tables that a benchmark declares."""
    return importlib.import_module(benchmark).TABLES


if __name__ == "__main__":
    for name in BENCHMARKS:
        record.regenerate(name, tables(name))
