"""Random maps bit by bit, and selected steps for explainers of every kind."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from analytic import Analytic
from scipy import stats
from test_dfkernels_masks import random_uint32_scalar
from torch.testing import assert_close

from dfengine import Attention, Cam, Lime, Random, Relevance, Rise
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.explain import Explainer, describe, rebuild
from dfengine.explain.xdiffusion import XDiffusionCam, XDiffusionRise


def identity_model(shape: tuple[int, int]) -> Analytic:
    return Analytic(lambda x_t, _: x_t, (1, *shape))


def paths_of(denoiser: Analytic, steps: int, *prompts_and_seeds: tuple[str, int]) -> list[Trajectory]:
    return [
        denoiser.trajectory(torch.zeros(steps, *denoiser.latent_shape), prompt, seed)
        for prompt, seed in prompts_and_seeds
    ]


@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (2, 2), (16, 16)])
def test_values_match_the_counter_based_generator(shape: tuple[int, int]) -> None:
    denoiser = identity_model(shape)
    paths = paths_of(denoiser, 3, ("1", 0), ("2", 2**40))
    maps = list(Random().explain(denoiser, paths))
    assert [(step_map.item, step_map.step) for step_map in maps] == [(i, k) for i in range(2) for k in range(3)]
    for step_map in maps:
        seed = paths[step_map.item].job.mask_seed % 2**64
        words = [random_uint32_scalar(seed, step_map.step, 0, pixel, 4) for pixel in range(shape[0] * shape[1])]
        assert step_map.saliency.dtype == torch.float32
        assert step_map.saliency.flatten().tolist() == [(word // 256) / 2**24 for word in words]
    assert denoiser.batches == []
    assert Random().num_forwards(30) == 0


def test_maps_are_uniform_and_independent() -> None:
    denoiser = identity_model((64, 64))
    prompts_and_seeds = [("1", 0), ("2", 0), ("1", 1)]
    maps = list(Random().explain(denoiser, paths_of(denoiser, 2, *prompts_and_seeds)))
    for one in maps:
        assert stats.kstest(one.saliency.flatten().numpy(), "uniform").pvalue > 0.01
    for one, other in itertools.combinations(maps, 2):
        # Over 4096 pairs, within four standard deviations of zero.
        assert abs(np.corrcoef(one.saliency.flatten(), other.saliency.flatten())[0, 1]) < 4 / 64
    single = [m for one in prompts_and_seeds for m in Random().explain(denoiser, paths_of(denoiser, 2, one))]
    for one, other in zip(maps, single, strict=True):
        assert torch.equal(one.saliency, other.saliency)


def test_the_largest_integer_maps_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfengine.explain.random.random_uint32", lambda *_: torch.full((1, 4), 2**32 - 1))
    denoiser = identity_model((2, 2))
    (step_map,) = Random().explain(denoiser, paths_of(denoiser, 1, ("1", 0)))
    assert step_map.saliency.max() < 1


def test_completed_and_unselected_steps_are_skipped() -> None:
    denoiser = identity_model((3, 3))
    (path,) = paths_of(denoiser, 4, ("1", 0))
    restricted = dataclasses.replace(path, explain_steps=(3, 1))
    maps = list(Random(name="noise").explain(denoiser, [path, restricted], done={(0, 0), (0, 2), (1, 3)}))
    assert [(step_map.item, step_map.step, step_map.method) for step_map in maps] == [
        (0, 1, "noise"),
        (0, 3, "noise"),
        (1, 1, "noise"),
    ]
    assert torch.equal(maps[0].saliency, maps[2].saliency)
    assert rebuild(describe(Random("noise"))) == Random("noise")


@pytest.fixture(scope="module")
def generated(tiny: Denoiser) -> list[Trajectory]:
    """Two generations of four steps by the tiny model."""
    prompts = ("a red circle above a blue square on a gray background", "a pink star on a black background")
    return trajectories(tiny, [Job(prompt, (900, 600, 300, 10), seed=seed) for seed, prompt in enumerate(prompts)])


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(
    "explainer",
    [
        Rise(12),
        Rise(200, score="global"),
        Rise(128, stop_at_error=1e-9),
        Lime(12),
        Random(),
        Cam(),
        Relevance(),
        Attention(),
        XDiffusionRise(6),
        XDiffusionCam(),
    ],
    ids=lambda step_map: f"{type(step_map).__name__}",
)
@pytest.mark.parametrize("steps", [((2,), (3, 1)), ((), (0,))], ids=str)
def test_maps_of_selected_steps_match_a_complete_run(
    tiny: Denoiser, generated: list[Trajectory], explainer: Explainer, steps: Sequence[tuple[int, ...]]
) -> None:
    """Masks and time-step depend on the index of a step in the complete list."""
    complete = {(step_map.item, step_map.step): step_map for step_map in explainer.explain(tiny, generated)}
    restricted = [
        dataclasses.replace(path, explain_steps=selected) for path, selected in zip(generated, steps, strict=True)
    ]
    expected = [(item, k) for item, selected in enumerate(steps) for k in (selected or range(4))]
    maps = list(explainer.explain(tiny, restricted))
    assert sorted((step_map.item, step_map.step) for step_map in maps) == sorted(expected)
    for step_map in maps:
        counterpart = complete[step_map.item, step_map.step]
        # Float32 rounding depends on the rest of the batch, and differences of scores amplify it.
        for name in ("saliency", "scores", "relevance", "word_maps"):
            ours, theirs = getattr(step_map, name), getattr(counterpart, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        others = [complete[step_map.item, k].saliency for k in range(4) if k != step_map.step]
        assert all(
            (step_map.saliency - other).abs().max() > (step_map.saliency - counterpart.saliency).abs().max()
            for other in others
        )
