"""The store: explanations in HDF5, written so that nothing computed is lost and read by any tool.

It knows plain arrays, strings and settings; models and explainers are the engine's. docs/format.md describes the file.
"""

from dfengine.store.exporting import export_zarr
from dfengine.store.failures import Failure, Troubles, failures, let_go, units_left
from dfengine.store.folder import Folder, check_free, is_folder
from dfengine.store.folder_reader import RunFolder, open
from dfengine.store.item import LazyArray, StoredItem
from dfengine.store.merging import merge
from dfengine.store.plan import Busy, Item, Method, Plan, StoreError
from dfengine.store.reader import Run
from dfengine.store.schema import FORMAT_VERSION, nbytes
from dfengine.store.table import lines
from dfengine.store.units import Unit, plan_units, planned_specs, planned_units
from dfengine.store.watching import Latest, Look, Part, look
from dfengine.store.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "Busy",
    "Failure",
    "Folder",
    "Item",
    "Latest",
    "LazyArray",
    "Look",
    "Method",
    "Part",
    "Plan",
    "Run",
    "RunFolder",
    "StoreError",
    "StoredItem",
    "Troubles",
    "Unit",
    "Writer",
    "check_free",
    "export_zarr",
    "failures",
    "is_folder",
    "let_go",
    "lines",
    "look",
    "merge",
    "nbytes",
    "open",
    "plan_units",
    "planned_specs",
    "planned_units",
    "units_left",
]
