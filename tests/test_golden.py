"""The maps, errors, images and lists of the embedded model equal the recorded values."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import soak
from scipy.stats import spearmanr

from dfengine import Attention, Cam, Engine, Lime, Random, Relevance, Rise
from dfengine.explain import Explainer
from dfengine.recorder import Recorder

GOLDEN = Path(__file__).parent / "data/golden.npz"
PROMPTS = ["a red circle above a blue square on a gray background", "a yellow star on a black background"]
RISE = {
    "local": {},
    "global": {"score": "global", "estimator": "ridge", "num_masks": 96},
    "sum": {"estimator": "sum"},
    "contrast": {"estimator": "contrast"},
    "rise-masks": {"mask_kind": "rise"},
    "guided": {"target": "guided"},
    "unconditional": {"target": "unconditional"},
    "p03": {"keep_probability": 0.3},
    "window5": {"window": 5},
} | {name: {"similarity": name} for name in ("luminance", "contrast_structure", "contrast", "ssim", "cosine")}


@cache
def engine() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu", batch_size=32)


def computed(i: int, sampling: str, steps: Sequence[int]) -> dict[str, np.ndarray]:
    """The current values, by the names in the golden file; methods with masks compute `steps` only."""
    explainers: list[Explainer] = [
        Cam(),
        Relevance(),
        Attention(),
        Random(),
        Lime(num_samples=64, segmentation="quickshift"),
    ]
    explainers += [Rise.paper(**{"num_masks": 48} | kwargs, name=f"rise {name}") for name, kwargs in RISE.items()]
    job = engine().job(PROMPTS[i], num_steps=4, seed=7 + i, sampling=sampling)
    plan = engine().plan([job], explainers)
    recorder = Recorder(engine().denoiser, plan)
    masked = [explainer.name for explainer in explainers if isinstance(explainer, Rise | Lime)]
    skipped = [(0, name, step) for name in masked for step in range(4) if step not in steps]
    for event in engine().run(plan, done=skipped):
        recorder.take(event)
    result = recorder.results[0]
    arrays = {name: getattr(result, name) for name in ("image", "timesteps", "latents", "epsilon", "relevance")}
    arrays["heat"] = result.word_maps
    arrays |= {f"cam | {layer}": maps for layer, maps in result.maps["cam"].items()}
    arrays |= {name: maps for name, maps in result.maps.items() if name not in ("cam", *masked)}
    arrays |= {name: result.maps[name][steps] for name in masked}
    arrays |= {f"{name} | error": values[steps] for name, values in result.errors.items()}
    # A ridge of fewer masks than pixels has had no error since the file was recorded.
    assert np.isinf(arrays.pop("rise global | error")).all()
    return arrays


def assert_same(name: str, ours: np.ndarray, golden: np.ndarray) -> None:
    assert ours.shape == golden.shape, name
    if name.endswith("timesteps"):
        np.testing.assert_array_equal(ours, golden)
        return
    if name.endswith("image"):
        assert np.abs(ours.astype(int) - golden.astype(int)).max() <= 1, name
        return
    # Relative to the range of a map: a coverage map lies in a narrow band far from zero.
    both = np.isfinite(golden)
    np.testing.assert_array_equal(both, np.isfinite(ours), err_msg=name)
    scale = np.ptp(golden[both]) or np.abs(golden[both]).max()
    assert np.abs(ours[both] - golden[both]).max() <= 1e-3 * scale, name
    for mine, theirs in zip(ours, golden, strict=True):
        if "error" not in name and np.isfinite(theirs).all() and np.ptp(theirs) > 0:
            assert spearmanr(mine.ravel(), theirs.ravel()).statistic >= 0.9999, name


@pytest.mark.filterwarnings("ignore:96 masks are few for the ridge")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("i", "sampling", "steps"),
    [
        (0, "early", [2]),
        *(soak(i, name, [0, 1, 2, 3]) for i in (0, 1) for name in ("uniform", "early")),
    ],
)
def test_every_method_matches_the_golden_values(i: int, sampling: str, steps: list[int]) -> None:
    golden = np.load(GOLDEN)
    ours = computed(i, sampling, steps)
    names = [key for key in golden.files if key.startswith(f"{i} {sampling} | ") and "global | error" not in key]
    assert sorted(f"{i} {sampling} | {name}" for name in ours) == sorted(names)
    for name, values in ours.items():
        expected = golden[f"{i} {sampling} | {name}"]
        assert_same(name, np.asarray(values), expected[steps] if name.startswith(("rise", "lime")) else expected)


@pytest.mark.slow
def test_the_released_code_matches_the_golden_values() -> None:
    golden = np.load(GOLDEN)
    result = engine().explain(
        PROMPTS[0], [Rise.xdiffusion(num_masks=48), Cam.xdiffusion()], num_steps=4, seed=7, progress=False
    )
    assert_same("rise", result.maps["rise"], golden["xdiffusion | rise"])
    assert_same("cam", result.maps["cam"]["combined"], golden["xdiffusion | cam"])
