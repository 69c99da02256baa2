"""The check of a file at opening. Anybody may have written it, and HDF5 would follow wherever it leads.

Links to other files, external storage and virtual datasets show the contents of files that the sender of this one does
not have; a filter of another number loads a shared library; and sizes are claims until they are compared.
"""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t, h5z

#: The filters that HDF5 and h5py have built in.
_FILTERS = {
    *(h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, h5z.FILTER_SZIP, h5z.FILTER_NBIT),
    *(h5z.FILTER_SCALEOFFSET, h5z.FILTER_LZF),
}
#: Deflate makes at most this many bytes of one.
_MAX_RATIO = 1032
#: The attribute with the checksum of the others, and those it covers.
CHECKSUM = "checksum"
_TEXTS = ("environment", "merged_from", "model", "plan", "run_id", "unit_id")


@dataclass(frozen=True)
class Expected:
    """What the plan says about a dataset."""

    dtype: str
    shape: tuple[int, ...]
    read_at_once: tuple[int, ...]
    """the part of the shape that the store reads in one piece"""


def open_datasets(h5: h5py.File, expected: Mapping[str, Expected]) -> dict[str, h5py.Dataset]:
    """The datasets of these paths, under /entry. Raises ValueError unless each is in the file as it is expected."""
    num_bytes = os.fstat(h5.id.get_vfd_handle()).st_size
    groups = {"": _member(h5.id, "/", "entry", h5g.GroupID)}
    datasets = {}
    for path, one in expected.items():
        *names, name = path.split("/")
        place = ""
        for group in names:
            parent, place = place, f"{place}/{group}"
            if place not in groups:
                groups[place] = _member(groups[parent], parent, group, h5g.GroupID)
        opened = _member(groups[place], place, name, h5d.DatasetID)
        _check_storage(path, opened, one, num_bytes)
        datasets[path] = h5py.Dataset(opened)
    return datasets


def read_texts(h5: h5py.File) -> dict[str, str]:
    """The root attributes that are texts.

    Raises ValueError if one is something else, or if they do not match their checksum, which earlier files lack.
    """
    texts = {name: _read_text(h5, name) for name in (*_TEXTS, CHECKSUM) if name in h5.attrs}
    stored = texts.pop(CHECKSUM, None)
    if stored not in (None, checksum(texts)):
        raise ValueError("its plan or another text does not match the checksum: copy it again from its source")
    return texts


def checksum(attributes: Mapping[str, Any]) -> str:
    """SHA-256 of the texts among a file's root attributes."""
    digest = hashlib.sha256()
    for name in _TEXTS:
        if name in attributes:
            text = str(attributes[name]).encode(errors="surrogateescape")
            digest.update(f"{name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _read_text(h5: h5py.File, name: str) -> str:
    attribute = h5.attrs.get_id(name)
    if attribute.shape != () or not isinstance(attribute.get_type(), h5t.TypeStringID):
        raise ValueError(f"its attribute {name} is not a text")
    text = h5.attrs[name]
    return text if isinstance(text, str) else bytes(text).decode()


def _member(parent: h5g.GroupID, place: str, name: str, kind: type) -> Any:
    """A group or dataset that the parent itself holds."""
    what = f"{place}/{name}".lstrip("/")
    try:
        link = parent.links.get_info(name.encode())
    except KeyError:
        raise ValueError(f"{what} is missing") from None
    if link.type != h5l.TYPE_HARD:
        raise ValueError(f"{what} is a link to another place, which is not followed")
    opened = h5o.open(parent, name.encode())
    if not isinstance(opened, kind):
        raise ValueError(f"{what} is not a {'group' if kind is h5g.GroupID else 'dataset'}")
    return opened


def _check_storage(path: str, dataset: h5d.DatasetID, expected: Expected, num_bytes: int) -> None:
    created = dataset.get_create_plist()
    if created.get_layout() == h5d.VIRTUAL or created.get_external_count():
        raise ValueError(f"{path} lies in other files, which are not read")
    if others := _filters(created) - _FILTERS:
        raise ValueError(f"{path} needs the HDF5 filter {min(others)}, which is not built in: store it with gzip")
    kind = dataset.get_type()
    if not _has_type(kind, expected.dtype):
        raise ValueError(f"{path} is not of type {expected.dtype}")
    space = dataset.get_space()
    shape = space.get_simple_extent_dims() if space.get_simple_extent_type() == h5s.SIMPLE else None
    if shape != expected.shape:
        raise ValueError(f"{path} has shape {shape}: its plan says {expected.shape}")
    # An unfinished file is smaller than its arrays, by any factor. But it holds the coordinates of every axis, and HDF5
    # reads whole chunks: what is read in one piece has to fit into the file, compressed as far as that is possible.
    chunk = created.get_chunk() if created.get_layout() == h5d.CHUNKED else ()
    pieces = (expected.read_at_once, chunk)
    largest = max(math.prod(piece) for piece in pieces) * kind.get_size()
    if max(shape) > num_bytes or largest > _MAX_RATIO * num_bytes:
        raise ValueError(f"{path} of shape {shape} cannot be in a file of {num_bytes} bytes")


def _filters(created: Any) -> set[int]:
    return {created.get_filter(number)[0] for number in range(created.get_nfilters())}


def _has_type(stored: h5t.TypeID, dtype: str) -> bool:
    """Whether a type is the expected one, in either byte order."""
    if stored.committed():
        return False
    if dtype == "str":
        return isinstance(stored, h5t.TypeStringID) and bool(stored.is_variable_str())
    return any(stored.equal(one) for one in _types(dtype))


@cache
def _types(dtype: str) -> list[h5t.TypeID]:
    return [h5t.py_create(np.dtype(f"{order}{dtype}")) for order in "<>"]
