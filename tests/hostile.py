"""Files that somebody wrote to do harm, or that were damaged, each made of a complete small run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import store_example

from dfengine import Attention, Cam, Relevance, Rise, store
from dfengine.explain.registry import describe
from dfengine.store.file.checking import CHECKSUM, checksum

#: What must not be read: the contents of other files of the user's.
SECRET = b"-----BEGIN PRIVATE KEY-----" * 40

PLAN = store.Plan(
    items=(
        store.Item(
            "k1",
            "a red circle",
            seed=1,
            tokens=("<start>", "a", "red", "circle", "<end>"),
            spans=((0, 0), (0, 1), (2, 5), (6, 12), (0, 0)),
            words=("a", "red", "circle"),
            settings={"timesteps": [900, 500], "guidance": 7.5, "image": None},
        ),
    ),
    methods=(
        store.Method("rise", describe(Rise(3)), num_masks=3, has_error=True, label="DF-RISE", form="saliency"),
        store.Method("cam", describe(Cam()), has_layers=True, label="DF-CAM", form="layers"),
        store.Method("relevance", describe(Relevance()), label="relevance", form="tokens"),
        store.Method("attention", describe(Attention()), label="attention", form="words"),
    ),
    num_steps=2,
    latent=(2, 4, 4),
    image=(16, 16),
    layers=(("mid", (2, 2)),),
    previews=True,
    model="shapes",
)

FILES: dict[str, Callable[[Path], object]] = {}


def write(path: Path, plan: store.Plan = PLAN) -> Path:
    """A complete run."""
    with store.Writer.create(path, plan) as writer:
        store_example.fill(writer)
    return path


def _file(make: Callable[[Path], object]) -> Callable[[Path], object]:
    FILES[make.__name__.removeprefix("_")] = make
    return make


def _in_hdf5(name: str, edit: Callable[[h5py.File, Path], object]) -> None:
    def make(path: Path) -> None:
        with h5py.File(path, "r+") as h5:
            edit(h5, path.parent)

    FILES[name] = make


def _replace(path: str, **created: Any) -> Callable[[h5py.File, Path], object]:
    def edit(h5: h5py.File, _: Path) -> None:
        del h5["entry"][path]
        h5["entry"].create_dataset(path, **created)

    return edit


def _link(path: str, link: Callable[[Path], object]) -> Callable[[h5py.File, Path], object]:
    def edit(h5: h5py.File, folder: Path) -> None:
        del h5["entry"][path]
        h5["entry"][path] = link(folder)

    return edit


def _texts(h5: h5py.File, **texts: Any) -> None:
    """Change root attributes, with the checksum that fits them."""
    for name, value in texts.items():
        h5.attrs[name] = value
    h5.attrs[CHECKSUM] = checksum(dict(h5.attrs))


def _with_plan(change: Callable[[dict[str, Any]], object], text: Callable[[str], Any] = lambda text: text) -> Any:
    """Change the plan's JSON, with the checksum that fits it."""

    def edit(h5: h5py.File, _: Path) -> None:
        plan = json.loads(h5.attrs["plan"])
        change(plan)
        _texts(h5, plan=text(json.dumps(plan)))

    return edit


def _planned(name: str, /, **values: Any) -> None:
    _in_hdf5(f"plan with {name}", _with_plan(lambda plan: plan.update(values)))


def _item(name: str, /, **values: Any) -> None:
    _in_hdf5(f"item with {name}", _with_plan(lambda plan: plan["items"][0].update(values)))


def _method(name: str, /, **values: Any) -> None:
    _in_hdf5(f"method with {name}", _with_plan(lambda plan: plan["methods"][0].update(values)))


def _other(folder: Path) -> Path:
    """Another file of the user's, whose image is the secret."""
    path = folder / "other.h5"
    if not path.exists():
        with h5py.File(write(path), "r+") as h5:
            h5["entry/images/rgb"][...] = np.frombuffer(SECRET[:768], np.uint8).reshape(1, 16, 16, 3)
    return path


# Other files ----------------------------------------------------------------------------------------------------------

for _name in ("images/rgb", "maps/saliency", "items/done", "images", "maps", "items"):
    _in_hdf5(
        f"external link {_name}",
        _link(_name, lambda folder, at=_name: h5py.ExternalLink(_other(folder), f"entry/{at}")),
    )
_in_hdf5("soft link", _link("images/rgb", lambda _: h5py.SoftLink("/entry/images/preview")))
_in_hdf5("dangling link", _link("maps", lambda _: h5py.SoftLink("/nowhere")))


def _external_entry(h5: h5py.File, folder: Path) -> None:
    del h5["entry"]
    h5["entry"] = h5py.ExternalLink(_other(folder), "entry")


def _external_storage(h5: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(SECRET)
    del h5["entry/images/rgb"]
    shape = (1, 16, 16, 3)
    h5["entry/images"].create_dataset("rgb", shape, "u1", external=[(folder / "secret", 0, h5py.h5f.UNLIMITED)])


def _virtual(h5: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((1, 16, 16, 3), "u1")
    layout[...] = h5py.VirtualSource(_other(folder), "entry/images/rgb", (1, 16, 16, 3))
    del h5["entry/images/rgb"]
    h5["entry/images"].create_virtual_dataset("rgb", layout)


_in_hdf5("external entry", _external_entry)
_in_hdf5("external storage", _external_storage)
_in_hdf5("virtual dataset", _virtual)

# Kinds, shapes and types ----------------------------------------------------------------------------------------------


def _named_type(h5: h5py.File, _: Path) -> None:
    h5["type"] = np.dtype("u1")
    del h5["entry/images/rgb"]
    h5["entry/images"].create_dataset("rgb", (1, 16, 16, 3), dtype=h5["type"])


def _plugin_filter(h5: h5py.File, _: Path) -> None:
    del h5["entry/images/rgb"]
    created = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    created.set_chunk((1, 16, 16, 3))
    created.set_filter(32001, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((1, 16, 16, 3))
    h5py.h5d.create(h5["entry/images"].id, b"rgb", h5py.h5t.NATIVE_UINT8, space, created)


def _deleted(path: str) -> Callable[[h5py.File, Path], object]:
    return lambda h5, _: h5["entry"].__delitem__(path)


def _loop(h5: h5py.File, _: Path) -> None:
    del h5["entry/maps"]
    h5["entry/maps"] = h5["entry"]


for _name in ("images/rgb", "items/done", "items/seconds", "scores", "cam/2x2", "schedule/signal"):
    _in_hdf5(f"without {_name}", _deleted(_name))
_in_hdf5("group for a dataset", lambda h5, _: (_deleted("images/rgb")(h5, _), h5["entry/images"].create_group("rgb")))
_in_hdf5("dataset for a group", _replace("images", data=np.zeros(3)))
_in_hdf5("group in itself", _loop)
_in_hdf5("named type", _named_type)
_in_hdf5("plugin filter", _plugin_filter)
for _name, _created in {
    "smaller": {"data": np.zeros((1, 8, 8, 3), "u1")},
    "larger": {"data": np.zeros((1, 32, 32, 3), "u1")},
    "other rank": {"data": np.zeros((16, 16, 3), "u1")},
    "scalar": {"data": np.uint8(3)},
    "null": {"data": h5py.Empty("u1")},
    "floats": {"data": np.zeros((1, 16, 16, 3), "f4")},
    "signed": {"data": np.zeros((1, 16, 16, 3), "i1")},
    "booleans": {"data": np.zeros((1, 16, 16, 3), bool)},
    "texts": {"shape": (1, 16, 16, 3), "dtype": h5py.string_dtype()},
    "lists": {"shape": (1, 16, 16, 3), "dtype": h5py.vlen_dtype("u1")},
    "compounds": {"shape": (1, 16, 16, 3), "dtype": np.dtype([("a", "u1"), ("b", "f8")])},
    "arrays": {"shape": (1, 16, 16), "dtype": np.dtype(("u1", (3,)))},
    "references": {"shape": (1, 16, 16, 3), "dtype": h5py.ref_dtype},
    "opaque": {"shape": (1, 16, 16, 3), "dtype": np.dtype("V1")},
}.items():
    _in_hdf5(f"image of {_name}", _replace("images/rgb", **_created))
_in_hdf5("times of texts", _replace("items/seconds", data=["soon"]))
_in_hdf5("keys of numbers", _replace("items/key", data=[7]))

_RGB: dict[str, Any] = {"shape": (1, 16, 16, 3), "dtype": "u1"}

# Sizes ----------------------------------------------------------------------------------------------------------------


def _huge(**changed: Any) -> Callable[[h5py.File, Path], object]:
    """A plan with other sizes, and every dataset of its shape, of which no chunk is stored."""

    def edit(h5: h5py.File, _: Path) -> None:
        plan = dataclasses.replace(PLAN, **changed)
        for path, (row, size) in store.file.schema.layout(plan).items():
            if path in h5["entry"]:
                del h5["entry"][path]
            dtype = h5py.string_dtype() if row.dtype == "str" else row.dtype
            chunks = tuple(min(length, 64) for length in size.values())
            h5["entry"].create_dataset(path, tuple(size.values()), dtype, chunks=chunks)
        _texts(h5, plan=plan.to_json())

    return edit


_in_hdf5("10^9 steps", _huge(num_steps=10**9))
_in_hdf5("10^9 × 10^9", _huge(num_steps=10**9, latent=(1, 10**9, 2)))
_in_hdf5("10^5 × 10^5 pixels", _huge(image=(10**5, 10**5)))
_in_hdf5("10^4 × 10^4 × 10^4", _huge(num_steps=10**4, latent=(10**4, 10**4, 4)))
_in_hdf5("10^9 masks", _huge(methods=(dataclasses.replace(PLAN.methods[0], num_masks=10**9),)))
_in_hdf5("layers of 10^6 × 10^6", _huge(layers=(("mid", (10**6, 10**6)),)))
_in_hdf5(
    "one chunk of 2 GB",
    _replace("images/rgb", shape=(1, 16, 16, 3), dtype="u1", chunks=(2**19, 64, 16, 4), maxshape=(None,) * 4),
)

# The description ------------------------------------------------------------------------------------------------------

_in_hdf5("no plan", lambda h5, _: h5.attrs.__delitem__("plan"))
_in_hdf5("no environment", lambda h5, _: h5.attrs.__delitem__("environment"))
_in_hdf5("plan of numbers", lambda h5, _: h5.attrs.__setitem__("plan", np.arange(4)))
_in_hdf5("plan of bytes", lambda h5, _: _texts(h5, plan=np.bytes_(b"\xff\xfe{")))
_in_hdf5("plan of texts", lambda h5, _: h5.attrs.__setitem__("plan", ["{}", "{}"]))
_in_hdf5("plan that is no JSON", lambda h5, _: _texts(h5, plan="{"))
_in_hdf5("plan that is a list", lambda h5, _: _texts(h5, plan="[]"))
_in_hdf5("plan nested deeply", lambda h5, _: _texts(h5, plan="[" * 20_000))
_in_hdf5(
    "plan without its checksum", lambda h5, _: h5.attrs.__setitem__("plan", h5.attrs["plan"].replace("red", "rad"))
)
_in_hdf5("environment that is a list", lambda h5, _: _texts(h5, environment="[1]"))
_in_hdf5("environment of numbers", lambda h5, _: _texts(h5, environment='{"device": 3}'))
_in_hdf5("environment without device", lambda h5, _: _texts(h5, environment="{}"))
_in_hdf5("sources that are numbers", lambda h5, _: _texts(h5, merged_from="[1, 2]"))
_in_hdf5("sources without names", lambda h5, _: _texts(h5, merged_from='[{"environment": {}}]'))
_in_hdf5("sources that are a number", lambda h5, _: _texts(h5, merged_from="7"))
_in_hdf5("run id that is a number", lambda h5, _: h5.attrs.__setitem__("run_id", 7))
for _version in (0, -1, 10**18, np.inf, "two", [2, 2]):
    _in_hdf5(f"version {_version}", lambda h5, _, value=_version: h5.attrs.__setitem__("format_version", value))
_in_hdf5("format of numbers", lambda h5, _: h5.attrs.__setitem__("format", np.arange(3)))
_planned("steps as text", num_steps="2")
_planned("steps as float", num_steps=2.0)
_planned("true steps", num_steps=True)
_planned("no items", items=[])
_planned("items as text", items="abc")
_planned("items of numbers", items=[1])
_planned("a negative size", latent=[2, -4, 4])
_planned("two sizes", latent=[2, 4])
_planned("sizes as text", image=["16", "16"])
_planned("another key", exec="rm -rf ~")
_planned("no methods", methods=[])
_planned("layers of numbers", layers=[["mid", 2]])
_planned("the model a number", model=7)
_planned("escapes in the model", model="\x1b]0;owned\x07\x1b[2J\x9b31m\u202e")
_in_hdf5("plan with a method twice", _with_plan(lambda plan: plan["methods"].append(plan["methods"][0])))
_item("prompt a number", prompt=7)
_item("no seed", seed=None)
_item("a huge seed", seed=2**64)
_item("tokens as text", tokens="abcde")
_item("spans that do not fit", spans=[[0, 0]] * 9)
_item("spans far away", spans=[[10**12, 10**13]] * 5)
_item("spans of texts", spans=[["a", "b"]] * 5)
_item("settings as a list", settings=[1])
_item("time-steps as text", settings={"timesteps": "late", "guidance": 7.5})
_item("no time-steps", settings={"timesteps": [], "guidance": [1]})
_item("escapes in the prompt", prompt="\x1b[31mred\nline")
_item("markup in the prompt", prompt="</script><script>alert(1)</script> $\\frac{")
_item("empty words", words=["", " ", ""])
_method("a path as its name", name="../../../../tmp/owned")
_method("an empty name", name="")
_method("escapes in its name", name="\x1b[2J\x07")
_method("a form that is not known", form="javascript", label="$\\undefined{")
_method("masks as text", num_masks="3")
_method("settings of other types", settings={"explainer": ["Rise"], "num_masks": {"a": [1]}})
_method("settings that are not possible", settings={"explainer": "Rise", "num_masks": "many", "similarity": 7})
_method("settings nested deeply", settings={"explainer": "Rise", "name": json.loads("[" * 500 + "]" * 500)})
_method("a function as setting", settings={"explainer": "Rise", "similarity": {"function": "os.system"}})

# Values ---------------------------------------------------------------------------------------------------------------


def _values(path: str, value: float) -> Callable[[h5py.File, Path], object]:
    return lambda h5, _: h5["entry"][path].__setitem__(..., value)


for _path, _value in (
    *(("maps/saliency", np.inf), ("maps/saliency", np.nan), ("maps/saliency", 3e38), ("maps/error", -np.inf)),
    *(
        ("curves/relevance", np.inf),
        ("curves/heat", np.nan),
        ("schedule/timestep", np.nan),
        ("schedule/timestep", 1e300),
    ),
    *(("schedule/signal", np.nan), ("items/seconds", -np.inf), ("items/seconds", 1e300), ("items/done", 255)),
    *(("items/prompt_index", 2**32 - 1), ("items/attempt", 2**32 - 1), ("latents/latent", np.inf)),
):
    _in_hdf5(f"{_path} {_value}", _values(_path, _value))


def _unwritten(h5: h5py.File, _: Path) -> None:
    """Marked as stored, but never stored."""
    created = {path: h5["entry"][path] for path in ("maps/saliency", "images/rgb", "latents/epsilon")}
    for path, dataset in created.items():
        copied = dataset.id.get_create_plist()
        name = path.split("/")[1].encode()
        group, space, kind = dataset.parent.id, dataset.id.get_space(), dataset.id.get_type()
        group.unlink(name)
        h5py.h5d.create(group, name, kind, space, copied)


_in_hdf5("nothing stored", _unwritten)

# Bytes ----------------------------------------------------------------------------------------------------------------


@_file
def _empty(path: Path) -> None:
    path.write_bytes(b"")


@_file
def _signature_only(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:12])


@_file
def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@_file
def _text(path: Path) -> None:
    path.write_text("a red circle\n" * 100)


@_file
def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@_file
def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@_file
def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@_file
def _marked_as_live(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[11] |= 5
    path.write_bytes(content)


@_file
def _other_program(path: Path) -> None:
    path.unlink()
    with h5py.File(path, "w") as h5:
        h5["data"] = np.arange(3)


@_file
def _chunk_damaged(path: Path) -> None:
    with h5py.File(path) as h5:
        start = h5["entry/maps/saliency"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xaa" * 40)


def _flipped(seed: int) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        content, random = bytearray(path.read_bytes()), np.random.default_rng(seed)
        for place in random.integers(12, len(content), 20):
            content[place] ^= 1 << int(random.integers(8))
        path.write_bytes(content)

    return make


for _seed in range(20):
    FILES[f"bits flipped {_seed}"] = _flipped(_seed)
