"""The store: explanations in HDF5, written so that nothing computed is lost and read by any tool.

It knows plain arrays, strings and settings; models and explainers are the engine's. docs/format.md describes the file.
"""

from dfengine.store.folder import Folder
from dfengine.store.folder_reader import RunFolder, open
from dfengine.store.item import LazyArray, StoredItem
from dfengine.store.merging import merge
from dfengine.store.plan import Item, Method, Plan, StoreError
from dfengine.store.reader import Run
from dfengine.store.schema import FORMAT_VERSION
from dfengine.store.table import lines
from dfengine.store.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "Folder",
    "Item",
    "LazyArray",
    "Method",
    "Plan",
    "Run",
    "RunFolder",
    "StoreError",
    "StoredItem",
    "Writer",
    "lines",
    "merge",
    "open",
]
