"""Everything written to a file is read back unchanged."""

import dataclasses
import json
import re
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_example import PLAN, SMALL, check, fill, step, total, trajectory

from dfengine import store
from dfengine.store.file.swmr import SWMRFile, Write
from dfengine.store.file.values import round_mantissa


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "run.h5"
    with store.Writer.create(path, PLAN, device="cpu: a test") as writer:
        fill(writer)
    return path


@pytest.fixture
def run(path):
    with store.open(path) as run:
        yield run


def test_every_value_survives_a_round_trip(run):
    assert check(run) == total(PLAN)
    assert [len(item.relevance) for item in run] == [3, 2]
    assert [len(item.word_maps) for item in run] == [2, 1]
    assert list(run[0].errors) == list(run[0].scores) == ["rise"]


def test_plan_and_environment_survive_a_round_trip(run):
    assert run.plan == PLAN
    assert [(item.key, item.prompt, item.seed) for item in run] == [
        ("k0", "a red circle", 1),
        ("k1", "ein Würfel", 2**64 - 1),
    ]
    assert run.environment["device"] == "cpu: a test"
    assert run.environment["h5py"] == h5py.__version__
    assert [item.seconds for item in run] == [1.5, 2.5]


def test_items_are_stored_as_tables(path):
    with h5py.File(path) as h5:
        items = h5["entry/items"]
        prompts = items["prompts"].asstr()[:]
        assert prompts[items["prompt_index"][:]].tolist() == ["a red circle", "ein Würfel"]
        assert prompts[items["negative_prompt_index"][:]].tolist() == ["", "blurry"]
        assert items["seed"][:].tolist() == [1, 2**64 - 1]
        assert json.loads(items["settings"][0]) == PLAN.methods[0].settings
        assert items["attempt"][:].tolist() == [1, 1]
        assert h5["entry/curves/token_text"].asstr()[:].tolist() == [["a", "red", "circle"], ["ein", "Würfel", ""]]


def test_a_finished_run_is_a_single_file(path):
    assert [entry.name for entry in path.parent.iterdir()] == ["run.h5"]


@pytest.mark.parametrize(
    "key", [0, -1, np.int64(1), slice(1, None), (slice(None), 2), (..., 0), (1, ..., slice(0, 4, 2)), [0, 2], ...]
)
def test_slices_match_numpy(run, key):
    complete = np.asarray(run[0].maps["rise"])
    assert complete.shape == run[0].maps["rise"].shape == (3, 5, 6)
    np.testing.assert_array_equal(run[0].maps["rise"][key], complete[key])


@pytest.mark.parametrize(
    "key",
    [
        [2, 0, 0, -1],
        (slice(None), [4, 0, 4]),
        (0, [1, 3]),
        [],
        [True, False, True],
        (slice(1, 3), slice(0, 2), [3, 3, 0]),
    ],
)
def test_lists_and_masks_match_numpy(run, key):
    complete = np.asarray(run[0].maps["rise"])
    np.testing.assert_array_equal(run[0].maps["rise"][key], complete[key])


@pytest.mark.parametrize(
    "key", [3, -4, (0, 0, 0, 0), [3], [True, False], (..., ...), True, 0.5, [0.5], ([0], [0]), [[0]]]
)
def test_invalid_indices_are_rejected(run, key):
    with pytest.raises(IndexError):
        run[0].maps["rise"][key]
    with pytest.raises(IndexError):
        run[1].relevance[[2]]  # this item has two tokens, the other three
    with pytest.raises(IndexError):
        run[2]


def test_chunks_and_filters(path):
    with h5py.File(path) as h5:
        entry = h5["entry"]
        for name, chunk in {
            "maps/saliency": (1, 1, 1, 5, 6),
            "maps/error": (1, 1, 1, 5, 6),
            "cam/3x3/saliency": (1, 1, 1, 3, 3),
            "curves/heat": (1, 1, 1, 5, 6),
            "images/rgb": (1, 10, 12, 3),
            "latents/latent": (1, 1, 2, 5, 6),
        }.items():
            dataset = entry[name]
            assert (dataset.chunks, dataset.maxshape[0]) == (chunk, None), name
            assert (dataset.compression, dataset.compression_opts, dataset.shuffle, dataset.fletcher32) == (
                "gzip",
                1,
                True,
                True,
            )
        assert np.isnan(entry["maps/saliency"].fillvalue)
        assert (entry["scores/score"].chunks, entry["scores/score"].id.get_create_plist().get_nfilters()) == (
            (1, 1, 1, 7),
            0,
        )
        written = entry["maps/error"].id.get_num_chunks()
    assert written == len(PLAN.items) * PLAN.num_steps, "methods without an error take no space"


def test_unwritten_maps_read_as_nan(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        writer.step(0, "rise", 1, **step(SMALL, 0, 0, 1))
    with store.open(tmp_path / "run.h5") as run:
        assert run[0].done["rise"].tolist() == [False, True]
        assert np.isnan(run[0].maps["rise"][0]).all()
        assert not np.isnan(run[0].maps["rise"][1]).any()
        assert not run[0].has_trajectory
        with pytest.raises(store.StoreError, match="no trajectory yet"):
            _ = run[0].image
        assert check(run) == 1


def test_arrays_may_change_after_the_call(tmp_path, monkeypatch):
    started, blocked = threading.Event(), threading.Event()
    write = SWMRFile.write

    def blocked_write(self, job):
        started.set()
        blocked.wait()
        write(self, job)

    monkeypatch.setattr(SWMRFile, "write", blocked_write)
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        arrays = step(SMALL, 0, 0, 0)
        writer.step(0, "rise", 0, **arrays)
        arrays["saliency"][:] = 0
        started.wait()
        blocked.set()
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == 1


@pytest.mark.slow
def test_a_full_queue_blocks_the_producer(tmp_path, monkeypatch):
    blocked, returned, write = threading.Event(), [], SWMRFile.write

    def blocked_write(self, job):
        blocked.wait()
        write(self, job)

    def produce():
        for _ in range(4):
            writer.step(0, "rise", 0, **step(SMALL, 0, 0, 0))
            returned.append(True)

    monkeypatch.setattr(SWMRFile, "write", blocked_write)
    with store.Writer.create(tmp_path / "run.h5", SMALL, queue_size=1) as writer:
        producer = threading.Thread(target=produce)
        producer.start()
        producer.join(timeout=0.5)
        assert len(returned) <= 2, "one in the thread's hands, one in the queue"
        blocked.set()
        producer.join()
    assert len(returned) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict.fromkeys(("saliency", "error"), np.zeros((5, 4), np.float32)),
            r"has shape \(5, 4\): expected \(4, 4\), y × x",
        ),
        ({"scores": np.zeros(4, np.float32)}, "4 scores of method 'rise': the plan has 3 masks"),
        ({"error": None}, "error of method 'rise': in the plan, but not given"),
        ({"step": 2}, r"step 2 is outside \[0, 1\]"),
        ({"step": -1}, r"step -1 is outside \[0, 1\]"),
        ({"method": "lime"}, "'lime' is not in the plan: expected one of rise"),
    ],
)
def test_data_that_do_not_match_the_plan_are_rejected(tmp_path, change, message):
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        arguments = {"item": 0, "method": "rise", "step": 0} | step(SMALL, 0, 0, 0) | change
        with pytest.raises(ValueError, match=message):
            writer.step(**arguments)
        arguments = trajectory(SMALL, 0)
        with pytest.raises(ValueError, match="previews: given, but not in the plan"):
            writer.trajectory(0, **arguments, previews=np.zeros((2, 4, 4, 3), np.uint8))
        with pytest.raises(ValueError, match="layers: down missing or unknown"):
            writer.cam(0, 0, {"mid": np.zeros((2, 2), np.float32), "down": np.zeros((2, 2), np.float32)})
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"items": ()}, "items has size 0"),
        ({"num_steps": 0}, "num_steps has size 0"),
        ({"methods": (store.Method("rise"), store.Method("rise"))}, "duplicate method names: rise"),
        ({"items": (store.Item("k", "a"), store.Item("k", "b"))}, "duplicate item keys: k"),
        ({"items": (store.Item("k", "a", seed=-1),)}, r"seed -1 is outside \[0, 2\^64\)"),
        ({"items": (store.Item("k", "a\0b"),)}, "contains a NUL character"),
        ({"mantissa_bits": 0}, "mantissa_bits is 0: expected 1 to 23"),
    ],
)
def test_invalid_plans_are_rejected(plan, message):
    with pytest.raises(store.StoreError, match=message):
        store.Plan(**vars(SMALL) | plan)


def test_only_widely_readable_compression_is_supported(tmp_path):
    with store.Writer.create(tmp_path / "run.h5", SMALL, compression="none") as writer:
        fill(writer)
    with h5py.File(tmp_path / "run.h5") as h5:
        dataset = h5["entry/maps/saliency"]
        assert (dataset.compression, dataset.shuffle, dataset.fletcher32) == (None, True, True)
    with pytest.raises(store.StoreError, match="compression 'zstd' is not supported: expected one of gzip, none"):
        store.Writer.create(tmp_path / "other.h5", SMALL, compression="zstd")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.h5"]


def test_settings_must_be_json(tmp_path):
    plan = store.Plan(**vars(SMALL) | {"settings": {"score": print}})
    with pytest.raises(store.StoreError, match=r"must be JSON values.*print"):
        store.Writer.create(tmp_path / "run.h5", plan)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_created_while_writing(path, tmp_path):
    def structure_of(name):
        structure = {}
        with h5py.File(name, "r", swmr=True) as h5:
            h5.visititems(lambda name, thing: structure.update({name: (type(thing), sorted(thing.attrs))}))
            return structure | {"/": sorted(h5.attrs)}

    with store.Writer.create(tmp_path / "run.h5", PLAN) as writer:
        before = structure_of(tmp_path / "run.part.h5")
        fill(writer)
    assert structure_of(tmp_path / "run.h5") == structure_of(path) == before


def test_the_swmr_file_creates_no_objects(tmp_path):
    """In SWMR mode HDF5 would create objects and attributes and corrupt the file; `SWMRFile` prevents it.

    It has handles only for what the template created, and nothing else in the store creates objects.
    """
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        with pytest.raises(store.StoreError, match=r"maps/new is not in the file: .* SWMR"):
            writer._file.write(Write({}, {"maps/new": np.zeros(1)}))
        writer.trajectory(0, **trajectory(SMALL, 0))
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == 1, "refused before anything is written"
    verbs = re.compile(r"\.(create_\w+|require_\w+|\w+_scale|resize|move)\(|\.attrs(\.update|\[[^]]*\] =)")
    for source in Path(store.__file__).parent.rglob("*.py"):
        matches = verbs.findall(source.read_text())
        assert bool(matches) == (source.name == "template.py"), (source.name, matches)


@pytest.mark.parametrize("bits", [1, 10, 22, 23])
def test_rounding_is_to_nearest_and_even(bits):
    random = np.random.default_rng(bits)
    values = np.concatenate([random.standard_normal(10_000), 2.0 ** np.arange(-126, 128)]).astype(np.float32)
    mantissa, exponent = np.frexp(values.astype(np.float64))
    nearest = np.ldexp(np.rint(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)
    np.testing.assert_array_equal(round_mantissa(values, bits), nearest.astype(np.float32))
    halfway = np.float32(1 + 2.0**-bits / 2) if bits < 23 else np.float32(1)
    assert round_mantissa(np.array([halfway, -halfway]), bits).tolist() == [1, -1]
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0, -0.0, np.finfo(np.float32).max], np.float32)
    expected = special if bits == 23 else np.append(special[:-1], np.float32(np.inf))
    np.testing.assert_array_equal(round_mantissa(special, bits), expected)


def test_only_errors_cam_and_heat_maps_are_rounded(tmp_path):
    plan = dataclasses.replace(PLAN, mantissa_bits=10)
    with store.Writer.create(tmp_path / "run.h5", plan) as writer:
        fill(writer)
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == total(PLAN)
        np.testing.assert_array_equal(run[1].maps["rise"][2], step(PLAN, 1, 0, 2)["saliency"])
        assert (run[1].errors["rise"][2] != step(PLAN, 1, 0, 2)["error"]).any()
    with h5py.File(tmp_path / "run.h5") as h5:
        bits_by_name = {}
        h5.visititems(lambda name, thing: bits_by_name.update({name: thing.attrs.get("mantissa_bits")}))
    assert {name for name, bits in bits_by_name.items() if bits == 10} == {
        "entry/maps/error",
        "entry/cam/5x6/saliency",
        "entry/cam/3x3/saliency",
        "entry/curves/heat",
        "entry/curves/heat_error",
    }


@pytest.mark.parametrize("parts", ["cam", "curves", "maps"])
def test_a_file_of_one_kind_only(tmp_path, parts):
    changes = {"cam": {"layers": ()}, "maps": {"methods": ()}, "curves": {"items": (store.Item("k", "a"),)}}
    plan = store.Plan(
        **vars(SMALL) | {name: value for part in changes if part != parts for name, value in changes[part].items()}
    )
    with store.Writer.create(tmp_path / "run.h5", plan) as writer:
        writer.trajectory(0, **trajectory(plan, 0))
    with store.open(tmp_path / "run.h5") as run:
        assert check(run) == 1
        assert {path.partition("/")[0] for path in run.layout} & {"cam", "curves", "maps"} == {parts}


def test_the_summary_is_json_and_counts(run, tmp_path):
    summary = json.loads(json.dumps(run.summary()))
    assert summary["maps_done"] == summary["maps_planned"] == {"rise": 6, "random": 6}
    assert summary["methods"]["rise"]["settings"] == {"keep_probability": 0.5, "kind": "gaussian"}
    assert summary["jobs"][1]["prompt"] == "ein Würfel"
    assert run.counts([1]) == run.counts() | {
        "items": 1,
        "items_finished": 1,
        "seconds": 2.5,
        "trajectories": 1,
        "maps_done": {"rise": 3, "random": 3},
        "maps_planned": {"rise": 3, "random": 3},
    }
    assert (summary["items_finished"], summary["seconds"], summary["finished"]) == (2, 4.0, True)
    with store.Writer.create(tmp_path / "run.h5", SMALL) as writer:
        with store.open(tmp_path / "run.part.h5") as live:
            summary = live.summary()
        assert (summary["maps_done"], summary["finished"]) == ({"rise": 0}, False)
        assert writer.plan == SMALL
