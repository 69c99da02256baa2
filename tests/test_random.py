"""Random maps bit by bit; and the steps that explainers of every kind are asked for."""

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


def still(shape: tuple[int, int]) -> Analytic:
    return Analytic(lambda x_t, _: x_t, (1, *shape))


def paths_of(denoiser: Analytic, steps: int, *told: tuple[str, int]) -> list[Trajectory]:
    return [denoiser.trajectory(torch.zeros(steps, *denoiser.latent_shape), prompt, seed) for prompt, seed in told]


@pytest.mark.parametrize("shape", [(7, 13), (1, 1), (2, 2), (16, 16)])
def test_values_are_the_counters_own(shape: tuple[int, int]) -> None:
    denoiser = still(shape)
    paths = paths_of(denoiser, 3, ("1", 0), ("2", 2**40))
    found = list(Random().explain(denoiser, paths))
    assert [(one.item, one.step) for one in found] == [(i, k) for i in range(2) for k in range(3)]
    for one in found:
        seed = paths[one.item].job.mask_seed % 2**64
        words = [random_uint32_scalar(seed, one.step, 0, pixel, 4) for pixel in range(shape[0] * shape[1])]
        assert one.saliency.dtype == torch.float32
        assert one.saliency.flatten().tolist() == [(word // 256) / 2**24 for word in words]
    assert denoiser.batches == []
    assert Random().num_forwards(30) == 0


def test_maps_are_uniform_and_do_not_depend_on_each_other() -> None:
    denoiser = still((64, 64))
    told = [("1", 0), ("2", 0), ("1", 1)]
    found = list(Random().explain(denoiser, paths_of(denoiser, 2, *told)))
    for one in found:
        assert stats.kstest(one.saliency.flatten().numpy(), "uniform").pvalue > 0.01
    for one, other in itertools.combinations(found, 2):
        # Of 4096 pairs, within four standard deviations of none.
        assert abs(np.corrcoef(one.saliency.flatten(), other.saliency.flatten())[0, 1]) < 4 / 64
    alone = [m for one in told for m in Random().explain(denoiser, paths_of(denoiser, 2, one))]
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one.saliency, other.saliency)


def test_the_greatest_word_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfengine.explain.random.random_uint32", lambda *_: torch.full((1, 4), 2**32 - 1))
    denoiser = still((2, 2))
    (found,) = Random().explain(denoiser, paths_of(denoiser, 1, ("1", 0)))
    assert found.saliency.max() < 1


def test_what_is_done_or_not_asked_for_is_left_out() -> None:
    denoiser = still((3, 3))
    (path,) = paths_of(denoiser, 4, ("1", 0))
    asked = dataclasses.replace(path, explain_steps=(3, 1))
    found = list(Random(name="noise").explain(denoiser, [path, asked], done={(0, 0), (0, 2), (1, 3)}))
    assert [(one.item, one.step, one.method) for one in found] == [(0, 1, "noise"), (0, 3, "noise"), (1, 1, "noise")]
    assert torch.equal(found[0].saliency, found[2].saliency)
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
    ids=lambda one: f"{type(one).__name__}",
)
@pytest.mark.parametrize("steps", [((2,), (3, 1)), ((), (0,))], ids=str)
def test_the_maps_of_some_steps_are_those_of_all(
    tiny: Denoiser, generated: list[Trajectory], explainer: Explainer, steps: Sequence[tuple[int, ...]]
) -> None:
    """Masks are drawn for the step's place in the whole list, and the time-step is that one's."""
    whole = {(one.item, one.step): one for one in explainer.explain(tiny, generated)}
    asked = [dataclasses.replace(path, explain_steps=some) for path, some in zip(generated, steps, strict=True)]
    wanted = [(item, k) for item, some in enumerate(steps) for k in (some or range(4))]
    found = list(explainer.explain(tiny, asked))
    assert sorted((one.item, one.step) for one in found) == sorted(wanted)
    for one in found:
        same = whole[one.item, one.step]
        # Other neighbours in a batch are other roundings: of float32 products, which differences of scores enlarge.
        for name in ("saliency", "scores", "relevance", "word_maps"):
            ours, theirs = getattr(one, name), getattr(same, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
        others = [whole[one.item, k].saliency for k in range(4) if k != one.step]
        assert all((one.saliency - other).abs().max() > (one.saliency - same.saliency).abs().max() for other in others)
