"""The store: explanations in HDF5, readable by any tool; completed results survive any interruption.

It handles plain arrays, strings and settings, and knows no models or explainers. docs/format.md describes the format.
"""

from dfengine.store.file.files import part_path
from dfengine.store.file.item import StoredItem
from dfengine.store.file.plan import Busy, Item, Method, Plan, StoreError
from dfengine.store.file.reader import Run
from dfengine.store.file.schema import DATASETS, FORMAT_VERSION, nbytes
from dfengine.store.file.writer import Writer
from dfengine.store.run.exporting import export_zarr
from dfengine.store.run.failures import Failure, FailureLog, failures, release_units, units_left
from dfengine.store.run.folder import Folder, check_free, is_folder
from dfengine.store.run.merging import merge
from dfengine.store.run.progress import LatestMap, Part, RunProgress, progress
from dfengine.store.run.reader import RunFolder, open
from dfengine.store.run.table import summary_lines
from dfengine.store.run.units import Unit, plan_units, planned_specs, planned_units

__all__ = [
    "DATASETS",
    "FORMAT_VERSION",
    "Busy",
    "Failure",
    "FailureLog",
    "Folder",
    "Item",
    "LatestMap",
    "Method",
    "Part",
    "Plan",
    "Run",
    "RunFolder",
    "RunProgress",
    "StoreError",
    "StoredItem",
    "Unit",
    "Writer",
    "check_free",
    "export_zarr",
    "failures",
    "is_folder",
    "merge",
    "nbytes",
    "open",
    "part_path",
    "plan_units",
    "planned_specs",
    "planned_units",
    "progress",
    "release_units",
    "summary_lines",
    "units_left",
]
