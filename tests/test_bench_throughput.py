"""The plain loop computes the engine's maps, checks stop wrong numbers, and tables show what was measured."""

import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import dfkernels
import numpy as np
import profiles
import pytest
import rise_settings
import throughput
import torch
import waterfall
from marks import soak
from plain import Plain

from dfengine import Engine, Rise
from dfengine.diffusion.trajectory import trajectories


@pytest.mark.soak
@pytest.mark.parametrize("target", ["guided", soak("conditional")])
def test_the_plain_loop_computes_the_engines_maps(target: str) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=16)
    job = engine.job("a green star on a white background", num_steps=3, seed=2)
    (trajectory,) = trajectories(engine.denoiser, [job])
    step = (trajectory.latents[1], job.timesteps[1], job.guidance)
    plain = Plain(engine.denoiser.pipeline, job.prompt, *step, target == "guided")
    masks = dfkernels.masks(job.mask_seed, 1, 0, 20, engine.denoiser.latent_shape[1:]).numpy()
    as_printed, coverage = plain.maps(iter(masks))
    for estimator, expected in (("sum", as_printed), ("coverage", coverage)):
        rise = Rise.paper(num_masks=20, target=target, estimator=estimator)
        (step_map,) = rise.explain(engine.denoiser, [trajectory], {(0, 0), (0, 2)})
        np.testing.assert_allclose(step_map.saliency.numpy(), expected, rtol=1e-3, atol=1e-3)


MEASURED = {"model": "shapes", "device": "a card", "dtype": "float32", "commit": "abc"}


def test_the_table_of_throughput() -> None:
    row = {
        **MEASURED,
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
    assert "**shapes**, float32, on another, commit `abc`:" in throughput.table([row, other])
    plain = {**row, "way": "plain loop", "compiled": False, "masks_s": [1.0, 1.5, 2.0]}
    compiled = {**row, "target": "conditional"}
    default = {**compiled, "compiled": False, "masks_s": [8, 9, 10], "times_plain_pair": 6.0}
    line = throughput.summary([plain, default, row, compiled]).splitlines()[2]
    assert line == "| shapes, float32, a card | 2 | 9 | 6.0 × | 12 | 8.0 × | `abc` |"


def test_the_table_of_the_waterfall() -> None:
    row = {
        **MEASURED,
        "stage": "channels-last",
        "batch": 64,
        "masks_s": [1, 2, 3],
        "times_first": 4.5,
        "peak_gib": 1.25,
    }
    line = waterfall.table([row | {"rank_correlation": 0.99987}]).splitlines()[4]
    assert line == "| channels-last | 64 | 1 **2** 3 | 4.5 | 1.25 | 0.9999 |"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_each_stage_of_the_waterfall_changes_one_thing(on_gpu: bool) -> None:
    stages = waterfall.stages(on_gpu)
    assert stages[0].plain
    assert stages[0].target == "guided"
    for before, after in pairwise(stages):
        changed = {name for name in vars(after) if vars(after)[name] != vars(before)[name]} - {"name"}
        # The plain loop is replaced by batches, which is one change.
        assert len(changed - {"plain"}) == 1
    assert stages[-2 if not on_gpu else -1].compiled


def test_the_table_of_profiles() -> None:
    row = {
        **MEASURED,
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
    assert line == "| a card | `abc` | shapes | float32 | sdpa | no | 64 | **538** | 432 | 55% | 1.8% | 9.50 | 28 s |"


def test_the_plain_implementations_do_not_use_the_engine() -> None:
    for name in ("plain", "plain_games", "plain_gradients"):
        source = (Path(__file__).parent.parent / f"bench/{name}.py").read_text()
        assert not re.search(r"^\s*(import|from) dfengine", source, re.MULTILINE)


def test_no_throughput_is_reported_if_the_maps_disagree() -> None:
    throughput.check({"guided": 0.99995, "conditional": 1.0}, torch.float32)
    with pytest.raises(SystemExit, match=r"rank correlation of the conditional maps .* is 0.9990, expected at least"):
        throughput.check({"guided": 1.0, "conditional": 0.999}, torch.float32)


@pytest.mark.slow
def test_no_setting_is_compared_if_the_maps_or_the_truth_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=16)
    monkeypatch.setattr(rise_settings, "BATCH", 16)
    monkeypatch.setattr(rise_settings, "NUM_STEPS", 3)
    monkeypatch.setattr(rise_settings, "STEPS", (1,))
    (item,) = rise_settings.items(engine, 1)
    rise_settings.check_areas([item])
    rise_settings.check_maps(engine, item[0])
    monkeypatch.setattr(rise_settings, "localisation_scores", lambda saliency, area: {"auroc": 0.9})
    with pytest.raises(SystemExit, match=r"the true area of '.*' has AUROC 0.9, expected 1"):
        rise_settings.check_areas([item])
    monkeypatch.setattr(rise_settings._Ways, "maps", lambda _: defaultdict(lambda: torch.zeros(1, 16, 16)))
    with pytest.raises(SystemExit, match="maps from shared forwards"):
        rise_settings.check_maps(engine, item[0])


@pytest.mark.slow
def test_no_profile_is_reported_if_its_batches_or_its_speed_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained("shapes", device="cpu", batch_size=16)
    monkeypatch.setattr(profiles, "NUM_CHECK_MASKS", 16)
    profiles.check(engine, "a red circle", SimpleNamespace(model="shapes", share_of_ceiling=0.5))
    assert engine.denoiser.batch_size == profiles.SMALL_BATCH
    with pytest.raises(SystemExit, match=r"shapes reaches 150% of a matrix product's speed"):
        profiles.check(engine, "a red circle", SimpleNamespace(model="shapes", share_of_ceiling=1.5))
    monkeypatch.setattr(profiles, "spearmanr", lambda *_: SimpleNamespace(statistic=0.9))
    with pytest.raises(SystemExit, match=r"rank correlation with the map from batches of 4 is 0.9000"):
        profiles.check(engine, "a red circle", SimpleNamespace(model="shapes", share_of_ceiling=0.5))


def test_a_stage_cannot_switch_off_what_does_not_exist() -> None:
    with pytest.raises(AttributeError):
        waterfall.override(SimpleNamespace(), "renamed", None)
