"""What the engine is timed against computes the same maps, and the tables say what was measured."""

import sys
from itertools import pairwise
from pathlib import Path

import dfkernels
import numpy as np
import pytest

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import trajectories

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import profiles
import throughput
import waterfall
from plain import Plain


@pytest.mark.parametrize("target", ["guided", "conditional"])
def test_the_plain_loop_makes_the_engines_maps(target: str) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=16)
    job = engine.job("a green star on a white background", num_steps=3, seed=2)
    (path,) = trajectories(engine.denoiser, [job])
    where = (path.latents[1], job.timesteps[1], job.guidance)
    slow = Plain(engine.denoiser.pipeline, job.prompt, *where, target == "guided")
    masks = dfkernels.masks(job.mask_seed, 1, 0, 20, engine.denoiser.latent_shape[1:]).numpy()
    printed, covered = slow.maps(iter(masks))
    for estimator, wanted in (("sum", printed), ("coverage", covered)):
        rise = Rise(20, target=target, estimator=estimator)
        (ours,) = rise.explain(engine.denoiser, [path], {(0, 0), (0, 2)})
        np.testing.assert_allclose(ours.saliency.numpy(), wanted, rtol=1e-3, atol=1e-3)


HERE = {"model": "shapes", "device": "a card", "dtype": "float32"}


def test_the_table_of_throughput() -> None:
    row = {
        **HERE,
        "way": "dfengine",
        "target": "guided",
        "batch": 64,
        "compiled": True,
        "masks_s": [10.0, 12.4, 13.0],
        "times_plain_pair": 8.04,
        "times_plain_alike": 4.01,
        "share_of_ceiling": 0.553,
    }
    other = {**row, "device": "another", "compiled": False}
    first, *_, last = [
        line for line in throughput.table([row, other]).splitlines() if line.startswith("| ") and "64" in line
    ]
    assert first == "| **dfengine, compiled** | guided | 64 | 10 **12** 13 | 8.0 | 4.0 | 55% |"
    assert last.startswith("| dfengine | guided")
    assert throughput.table([row, other]).count("**shapes**, float32, on ") == 2
    plain = {**row, "way": "plain loop", "compiled": False, "masks_s": [1.0, 1.5, 2.0]}
    shipped = {**row, "target": "conditional"}
    default = {**shipped, "compiled": False, "masks_s": [8, 9, 10], "times_plain_pair": 6.0}
    line = throughput.summary([plain, default, row, shipped]).splitlines()[2]
    assert line == "| shapes, float32, a card | 2 | 9 | 6.0 × | 12 | 8.0 × |"


def test_the_table_of_the_waterfall() -> None:
    row = {**HERE, "stage": "channels-last", "batch": 64, "masks_s": [1, 2, 3], "times_first": 4.5, "peak_gib": 1.25}
    line = waterfall.table([row | {"rank_correlation": 0.99987}]).splitlines()[4]
    assert line == "| channels-last | 64 | 1 **2** 3 | 4.5 | 1.25 | 0.9999 |"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_each_stage_of_the_waterfall_changes_one_thing(on_gpu: bool) -> None:
    found = waterfall.stages(on_gpu)
    assert found[0].plain
    assert found[0].target == "guided"
    for before, after in pairwise(found):
        changed = {name for name in vars(after) if vars(after)[name] != vars(before)[name]} - {"name"}
        # Batches are what the plain loop has not.
        assert len(changed - {"plain"}) == 1
    assert found[-2 if not on_gpu else -1].compiled


def test_the_table_of_profiles() -> None:
    row = {
        **HERE,
        "attention": "sdpa",
        "compiled": False,
        "batch_size": 64,
        "masks_per_second": 538.2,
        "tflop_s": 432.0,
        "share_of_ceiling": 0.55,
        "outside_network": 0.018,
        "peak_gib": 9.5,
        "job": {"seconds": 27.9},
    }
    line = profiles.table([row]).splitlines()[2]
    assert line == "| a card | shapes | float32 | sdpa | no | 64 | **538** | 432 | 55% | 1.8% | 9.50 | 28 s |"


def test_nothing_of_the_engine_runs_in_the_plain_loop() -> None:
    source = (Path(__file__).parent.parent / "bench/plain.py").read_text()
    assert "import dfengine" not in source
    assert "from dfengine" not in source
