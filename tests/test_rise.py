"""DF-RISE on denoisers whose maps are known in closed form, and in batches of any size."""

import dataclasses
import itertools
import warnings
from functools import partial
from typing import Any

import dfkernels
import numpy as np
import pytest
import torch
from analytic import Analytic, patch_mean, switch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dfengine.diffusion.path import NoiseSchedule
from dfengine.explain import Lime, Rise, StepMap, describe, rebuild

#: Independent masks of pixels, and the predictions themselves.
pixels = partial(Rise, output="epsilon", similarity="structure", cell=1, shifted=False, design="iid")
PIXEL = (2, 3)
SHAPE = (6, 5)
C2 = 0.03**2
C3 = C2 / 2


@pytest.fixture
def pattern() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(7))


def explain_one(denoiser: Analytic, rise: Rise, latents: torch.Tensor | None = None) -> StepMap:
    latents = torch.ones(1, *denoiser.latent_shape) if latents is None else latents
    (step_map,) = rise.explain(denoiser, [denoiser.trajectory(latents)])
    return step_map


def expected_masks(rise: Rise, denoiser: Analytic, latents: torch.Tensor) -> torch.Tensor:
    """The masks of step 0, drawn independently of the explainer."""
    job = denoiser.trajectory(latents).job
    shape = denoiser.latent_shape[1:]
    return dfkernels.masks(job.mask_seed, 0, 0, rise.num_masks, shape, rise.distribution(shape))


def opposite_structure(pattern: torch.Tensor) -> float:
    """s(−b, b) over all pixels, by hand: (C3 − σ²) / (σ² + C3), mean over channels."""
    variance = pattern.flatten(1).var(1, unbiased=False)
    return float(((C3 - variance) / (variance + C3)).mean())


def test_coverage_of_the_decisive_pixel_is_one(pattern: torch.Tensor) -> None:
    denoiser, rise = Analytic(switch(PIXEL, pattern)), pixels(500, score="global", estimator="coverage")
    step_map = explain_one(denoiser, rise)
    masks = expected_masks(rise, denoiser, torch.ones(1, 2, *SHAPE))
    low = opposite_structure(pattern)
    # At other pixels, masks that keep both pixels score 1 and the rest score `low`.
    both = (masks & masks[:, PIXEL[0], PIXEL[1], None, None]).sum(0) / masks.sum(0)
    assert_close(step_map.saliency, both + (1 - both) * low, rtol=1e-4, atol=1e-4)
    assert step_map.saliency[PIXEL] == pytest.approx(1.0)
    assert divmod(int(step_map.saliency.argmax()), SHAPE[1]) == PIXEL


def test_contrast_is_the_drop_in_score_when_the_pixel_is_hidden(pattern: torch.Tensor) -> None:
    step_map = explain_one(Analytic(switch(PIXEL, pattern)), pixels(400, score="global", estimator="contrast"))
    assert step_map.saliency[PIXEL] == pytest.approx(1 - opposite_structure(pattern), abs=1e-4)
    assert step_map.error[PIXEL] == pytest.approx(0, abs=1e-4)


def test_sum_is_algorithm_one_as_printed(pattern: torch.Tensor) -> None:
    denoiser, rise = Analytic(switch(PIXEL, pattern)), pixels(70, score="global", estimator="sum")
    step_map = explain_one(denoiser, rise)
    masks = expected_masks(rise, denoiser, torch.ones(1, 2, *SHAPE)).float()
    scores = torch.where(masks[:, PIXEL[0], PIXEL[1]] > 0, 1.0, opposite_structure(pattern))
    assert_close(step_map.saliency, torch.einsum("nhw,n->hw", masks, scores), rtol=1e-4, atol=1e-3)
    assert_close(step_map.scores, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_ridge_recovers_the_weight_of_every_pixel() -> None:
    # With R = 1 the prediction is the kept share of the patch, so the score is linear in the mask.
    denoiser = Analytic(patch_mean(slice(1, 3), slice(2, 5)))

    def first_mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.mean((1, 2, 3))

    step_map = explain_one(denoiser, pixels(4000, score="global", similarity=first_mean))
    expected = torch.zeros(SHAPE)
    expected[1:3, 2:5] = 1 / 6
    assert_close(step_map.saliency, expected, rtol=0, atol=1e-3)


def test_local_scores_are_assigned_to_their_pixel() -> None:
    # ε = x: with a pointwise similarity of 1 − |a − b|, a pixel scores 1 exactly when it is kept.
    def pointwise(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return 1 - (a - b).abs().mean(1)

    denoiser = Analytic(lambda x_t, _: x_t)
    rise = pixels(64, similarity=pointwise, estimator="contrast")
    step_map = explain_one(denoiser, rise)
    assert_close(step_map.saliency, torch.ones(SHAPE))
    summed = explain_one(denoiser, dataclasses.replace(rise, estimator="sum"))
    assert_close(summed.saliency, expected_masks(rise, denoiser, torch.ones(1, 2, *SHAPE)).sum(0).float())


@pytest.mark.slow
def test_local_structure_highlights_a_pixel_that_changes_its_neighbourhood() -> None:
    # The denoiser flips the sign of a 5×5 neighbourhood when its centre is hidden.
    neighbourhood = torch.zeros(1, 1, 11, 12)
    neighbourhood[..., 2:7, 3:8] = 1
    pattern = torch.randn(1, 11, 12, generator=torch.Generator().manual_seed(3))

    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        hidden = (x_t[:, :1, 4, 5, None, None] == 0).float()
        return pattern * (1 - 2 * hidden * neighbourhood)

    step_map = explain_one(Analytic(answer, (1, 11, 12)), pixels(600, window=3, sigma=0.5, estimator="contrast"))
    assert divmod(int(step_map.saliency.argmax()), 12) == (4, 5)
    assert step_map.saliency[4, 5] > 1.5
    # Far from it the score is 1 for every mask.
    assert_close(step_map.saliency[9:, :], torch.zeros(2, 12), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 16, 1000])
def test_the_map_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x_t.roll(1, 2) + 0.3 * x_t.roll(1, 3)) * x_t

    latents = torch.randn(3, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    expected = list(pixels(37).explain(d := Analytic(answer, batch_size=7), [d.trajectory(latents)]))
    actual = list(pixels(37).explain(d := Analytic(answer, batch_size=batch_size), [d.trajectory(latents)]))
    assert [m.step for m in actual] == [0, 1, 2]
    assert len({*d.batches[1:]}) == 1 or batch_size == 1000
    for a, b in zip(actual, expected, strict=True):
        assert_close(a.saliency, b.saliency, rtol=1e-6, atol=1e-6)
        assert_close(a.error, b.error, rtol=1e-4, atol=1e-6)
        assert_close(a.scores, b.scores, rtol=1e-6, atol=1e-6)


def test_items_share_batches_but_not_masks() -> None:
    denoiser = Analytic(lambda x_t, _: x_t, batch_size=64)
    latents = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    paths = [denoiser.trajectory(latents), denoiser.trajectory(latents, seed=1), denoiser.trajectory(latents, "2")]
    maps = list(pixels(10).explain(denoiser, paths))
    assert [(m.item, m.step) for m in maps] == [(i, k) for i in range(3) for k in range(2)]
    assert denoiser.batches == [6, 60]
    for one, other in itertools.combinations(maps, 2):
        assert (one.scores != other.scores).any()
    for item, path in enumerate(paths):
        for step_map, single in zip(maps[2 * item :], pixels(10).explain(denoiser, [path]), strict=False):
            assert_close(step_map.saliency, single.saliency)


def test_completed_steps_are_skipped() -> None:
    denoiser = Analytic(lambda x_t, _: x_t, batch_size=9)
    path = denoiser.trajectory(torch.randn(4, 2, *SHAPE, generator=torch.Generator().manual_seed(1)))
    complete = list(pixels(9).explain(denoiser, [path]))
    denoiser.batches.clear()
    remaining = list(pixels(9).explain(denoiser, [path], done={(0, 0), (0, 2)}))
    assert [m.step for m in remaining] == [1, 3]
    # One batch of references, and one for each step that is not done.
    assert denoiser.batches == [4, 9, 9]
    for step_map in remaining:
        assert_close(step_map.saliency, complete[step_map.step].saliency)
    assert list(pixels(9).explain(denoiser, [path], done={(0, k) for k in range(4)})) == []


def test_targets_use_different_predictions() -> None:
    # ε = number of the prompt × x: 1 for the prompt, 0 for the negative one, guidance 2 gives 2.
    denoiser = Analytic(lambda x_t, number: number[:, None, None, None] * x_t)
    references: list[torch.Tensor] = []

    def similarity(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        references.append(b)
        return a.mean((1, 2, 3))

    for target, factor in (("conditional", 1.0), ("guided", 2.0), ("unconditional", 0.0)):
        references.clear()
        explain_one(denoiser, pixels(2, similarity=similarity, score="global", estimator="sum", target=target))
        assert_close(references[0], torch.full((2, *SHAPE), factor))


def test_early_stop_saves_masks_once_the_map_has_converged(pattern: torch.Tensor) -> None:
    # Two equal latents with different masks: one pixel decides, so both maps converge after few masks.
    denoiser = Analytic(switch(PIXEL, pattern), batch_size=50)
    latents = torch.ones(2, 2, *SHAPE)
    rise = pixels(1000, score="global", estimator="contrast", stop_at_error=0.2)
    (first, second) = sorted(rise.explain(denoiser, [denoiser.trajectory(latents)]), key=lambda m: m.step)
    counts = [int(m.scores.isfinite().sum()) for m in (first, second)]
    for step_map, count in zip((first, second), counts, strict=True):
        assert count < 1000
        assert count % 64 == 0
        spread = step_map.saliency.max() - step_map.saliency.min()
        assert step_map.error.mean() < 0.2 * spread
        assert step_map.scores[:count].isfinite().all()
    # The first masks were drawn: requesting exactly that many gives the same map.
    exact = explain_one(
        Analytic(switch(PIXEL, pattern)), dataclasses.replace(rise, num_masks=counts[0], stop_at_error=None)
    )
    assert_close(first.saliency, exact.saliency)


def test_early_stop_is_at_the_first_check_whose_mean_error_is_small_enough() -> None:
    denoiser = Analytic(lambda x_t, _: x_t + x_t.roll(1, 2) * x_t.roll(2, 3), batch_size=64)
    latents = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))

    def explained(rise: Rise) -> tuple[int, float]:
        """The number of masks, and the mean error as a share of the standard deviation of the map's signal."""
        (step_map,) = rise.explain(denoiser, [denoiser.trajectory(latents)])
        signal = np.sqrt(np.var(step_map.saliency.numpy(), ddof=1) - np.mean(step_map.error.numpy() ** 2))
        return int(step_map.scores.isfinite().sum()), float(step_map.error.mean() / signal)

    count, share = explained(pixels(2000, stop_at_error=0.1))
    assert share < 0.1
    _, earlier_share = explained(pixels(count - 64))
    assert earlier_share >= 0.1


@pytest.mark.parametrize("settings", [{"estimator": "contrast"}, {"score": "global"}, {}])
def test_no_early_stop_accepts_pure_noise(settings: dict[str, Any]) -> None:
    """Scores that do not depend on the mask: whatever the map shows, it is noise."""

    def noise(a: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        local = settings.get("score") != "global"
        return torch.randn(len(a), *(SHAPE if local else ()), generator=generator)

    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        rise = pixels(640, similarity=noise, stop_at_error=1.0, **settings)
        assert explain_one(Analytic(lambda x_t, _: x_t), rise).scores.isfinite().all()


def test_no_early_stop_of_a_ridge_has_fewer_masks_than_twice_the_pixels(pattern: torch.Tensor) -> None:
    step_map = explain_one(Analytic(switch(PIXEL, pattern)), pixels(512, score="global", stop_at_error=0.5))
    height, width = SHAPE
    assert 2 * height * width <= int(step_map.scores.isfinite().sum()) < 512


def test_early_stop_draws_all_masks_without_convergence() -> None:
    step_map = explain_one(Analytic(lambda x_t, _: torch.ones_like(x_t)), pixels(130, stop_at_error=1e-9))
    assert step_map.scores.isfinite().all()


@pytest.mark.slow
def test_standard_error_matches_the_spread_over_masks() -> None:
    # The spread of repeated maps from other masks equals the standard error reported by one run.
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return x_t + x_t.roll(1, 2) * x_t.roll(2, 3)

    denoiser = Analytic(answer, batch_size=512)
    latents = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    paths = [denoiser.trajectory(latents, seed=seed) for seed in range(300)]
    maps = list(pixels(60).explain(denoiser, paths))
    spread = torch.stack([m.saliency for m in maps]).std(0)
    reported = torch.stack([m.error for m in maps]).square().mean(0).sqrt()
    assert_close(reported, spread, rtol=0.15, atol=0)


def test_frechet_needs_an_extractor_and_prefers_similar_images(pattern: torch.Tensor) -> None:
    denoiser = Analytic(switch(PIXEL, pattern))
    denoiser.schedule = dataclasses.replace(denoiser.schedule, prediction_type="sample")
    rise = pixels(200, similarity="frechet", score="global", estimator="contrast")
    with pytest.raises(ValueError, match="no extractor"):
        explain_one(denoiser, rise)
    denoiser.features = lambda images: images.flatten(1)
    latents = torch.rand(1, 2, *SHAPE, generator=torch.Generator().manual_seed(2)) + 0.1
    step_map = explain_one(denoiser, rise, latents)
    assert divmod(int(step_map.saliency.argmax()), SHAPE[1]) == PIXEL
    assert step_map.scores.max() == 0
    assert step_map.scores.min() < 0


def test_frechet_is_finite_where_nothing_is_left_of_the_image(pattern: torch.Tensor) -> None:
    """At zero terminal SNR a = 0: ε says nothing about x0, but v does, x0 = −v."""
    denoiser = Analytic(switch(PIXEL, pattern))
    config = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    denoiser.schedule = NoiseSchedule.from_config(config)
    denoiser.features = lambda images: images.flatten(1)
    path = denoiser.trajectory(torch.rand(1, 2, *SHAPE) + 0.1)
    path = dataclasses.replace(path, job=dataclasses.replace(path.job, timesteps=(999,)))
    (step_map,) = pixels(200, similarity="frechet", score="global", estimator="contrast").explain(denoiser, [path])
    assert divmod(int(step_map.saliency.argmax()), SHAPE[1]) == PIXEL


def test_frechet_equals_the_formula_by_hand() -> None:
    # Features are the four pixels of the image; ε = 0.1·x, so x0 has a closed form.
    shape = (1, 2, 2)
    denoiser = Analytic(lambda x_t, _: 0.1 * x_t, shape)
    denoiser.features = lambda images: images[:, 0].flatten(1)
    latents = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    rise = pixels(1, similarity="frechet", score="global", estimator="sum")
    step_map = explain_one(denoiser, rise, latents)
    (mask,) = expected_masks(rise, denoiser, latents)
    alpha_bar = float(denoiser.schedule.alpha_bar[0])

    def decoded(latent: torch.Tensor) -> torch.Tensor:
        x0 = (1 - (1 - alpha_bar) ** 0.5 * 0.1) * latent / alpha_bar**0.5  # of the network's own input
        return x0.clamp(0, 1).flatten()

    a, b = decoded(latents[0, 0] * mask), decoded(latents[0, 0])
    expected = -((a - b).square().sum() + (a.std() - b.std()) ** 2)
    assert_close(step_map.scores[0], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("similarity", dfkernels.SIMILARITIES)
@pytest.mark.parametrize("score", ["local", "global"])
@pytest.mark.parametrize("masks", ["gaussian", "rise"])
def test_every_similarity_of_equal_predictions_is_one(similarity: str, score: str, masks: str) -> None:
    # A denoiser that ignores its input gives the same prediction for every mask.
    pattern = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    denoiser = Analytic(lambda x_t, _: pattern.expand_as(x_t))
    rise = pixels(20, similarity=similarity, score=score, mask_kind=masks, grid=3, estimator="coverage")
    expected = torch.full(SHAPE, 0.0 if similarity == "mse" else 1.0)
    assert_close(explain_one(denoiser, rise).saliency, expected, rtol=1e-4, atol=1e-4)


def test_too_few_masks_for_the_ridge_give_a_warning(pattern: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match="59 masks are few .* wants 60"):
        explain_one(Analytic(switch(PIXEL, pattern)), pixels(59, score="global"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain_one(Analytic(switch(PIXEL, pattern)), pixels(60, score="global"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_masks": 0}, "0 masks .* at least 1"),
        ({"num_masks": -3}, "-3 masks"),
        ({"keep_probability": 0.0}, r"outside \(0, 1\)"),
        ({"keep_probability": 1.0}, r"outside \(0, 1\)"),
        ({"keep_probability": float("nan")}, "keep_probability nan is not possible: expected a finite number"),
        ({"mask_kind": "grid"}, "mask_kind 'grid' .* gaussian, rise"),
        ({"output": "v"}, "output 'v' is not known: expected one of x0, epsilon"),
        ({"cell": 0}, r"cells \(0,\) are not possible: give 1 to 4 sizes of 1 to 127"),
        ({"cell": (2, 200)}, "are not possible"),
        ({"design": "latin"}, "design 'latin' is not known: expected one of iid, orthogonal"),
        ({"design": "orthogonal", "keep_probability": 0.3}, "keeps half of the cells, not 0.3: use iid"),
        ({"design": "orthogonal", "mask_kind": "rise"}, "rise masks have a grid of their own"),
        ({"fill": "blur"}, "fill 'blur' is not known: expected one of zero, noise"),
        ({"baseline": "random"}, "baseline 'random' is not known: expected one of identity, frozen"),
        ({"grid": 0}, "grid 0 is not possible"),
        ({"similarity": "psnr"}, "similarity 'psnr' .* structure"),
        ({"score": "both"}, "score 'both'"),
        ({"estimator": "mean"}, "estimator 'mean'"),
        ({"estimator": "ridge"}, "score='global'"),
        ({"similarity": "frechet"}, "score='global'"),
        ({"window": 10}, "window 10 .* odd"),
        ({"sigma": 0.0}, "sigma 0.0"),
        ({"target": "both"}, "target 'both'"),
        ({"stop_at_error": 0.0}, "stop_at_error"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rise(**settings)


def test_a_similarity_of_the_wrong_shape_is_rejected() -> None:
    denoiser = Analytic(lambda x_t, _: x_t)
    with pytest.raises(ValueError, match=r"returned \(3,\) for 3 masks, but score='local' expects \('n', 6, 5\)"):
        explain_one(denoiser, pixels(3, similarity=lambda a, b: a.mean((1, 2, 3))))
    # One score for all masks is not one score per mask.
    with pytest.raises(ValueError, match=r"returned \(\) for 3 masks"):
        explain_one(denoiser, pixels(3, score="global", estimator="sum", similarity=lambda a, b: a.mean()))
    with pytest.raises(ValueError, match=r"returned \(1, 6, 5\) for 3 masks"):
        explain_one(denoiser, pixels(3, similarity=lambda a, b: a.mean((0, 1))[None]))


def test_a_similarity_that_returns_nothing_is_rejected() -> None:
    rise = pixels(3, similarity=lambda a, b: None)
    with pytest.raises(TypeError, match="the similarity returned NoneType, expected a tensor of scores"):
        explain_one(Analytic(lambda x_t, _: x_t), rise)


def test_a_cell_larger_than_the_latent_is_rejected() -> None:
    denoiser = Analytic(lambda x_t, _: x_t)
    job = denoiser.trajectory(torch.ones(1, *denoiser.latent_shape)).job
    Rise(cell=(2, 6)).output_spec(denoiser, job)
    with pytest.raises(ValueError, match="cell 7 is larger than the latent of analytic, 6×5 pixels"):
        Rise(cell=(2, 7)).output_spec(denoiser, job)


def test_non_finite_scores_give_a_warning() -> None:
    rise = pixels(3, score="global", estimator="sum", similarity=lambda a, b: a.mean((1, 2, 3)) * torch.nan)
    with pytest.warns(UserWarning, match="not finite"):
        explain_one(Analytic(lambda x_t, _: x_t), rise)


@pytest.mark.slow
@given(masks=st.integers(1, 40), steps=st.integers(1, 4), batch_size=st.integers(1, 60))
def test_every_mask_is_evaluated_once(masks: int, steps: int, batch_size: int) -> None:
    denoiser = Analytic(lambda x_t, _: x_t, batch_size=batch_size)
    path = denoiser.trajectory(torch.ones(steps, 2, *SHAPE))
    batch_sizes: list[int] = []

    def total(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        batch_sizes.append(len(a))
        return a.sum((1, 2, 3))

    rise = pixels(masks, similarity=total, score="global", estimator="sum")
    for step_map in rise.explain(denoiser, [path]):
        expected_mask = dfkernels.masks(path.job.mask_seed, step_map.step, 0, masks, SHAPE)
        assert_close(step_map.scores, 2.0 * expected_mask.sum((1, 2)))
        is_covered = expected_mask.any(0)
        assert_close(
            step_map.saliency[is_covered], torch.einsum("nhw,n->hw", expected_mask.float(), step_map.scores)[is_covered]
        )
        assert step_map.error[~is_covered].isinf().all()
    assert sum(batch_sizes) == masks * steps


# x0, cells, fills and null baselines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("output", ["x0", "epsilon"])
def test_what_is_compared_is_read_with_the_masked_input(prediction_type: str, output: str) -> None:
    denoiser = Analytic(lambda x_t, _: 0.3 * x_t + x_t.roll(1, 2))
    denoiser.schedule = dataclasses.replace(denoiser.schedule, prediction_type=prediction_type)
    latents = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = dataclasses.replace(denoiser.trajectory(latents), explain_steps=(0,))
    path = dataclasses.replace(path, job=dataclasses.replace(path.job, timesteps=(600,)))
    rise = pixels(6, output=output, similarity="mse", score="global", estimator="sum")
    (step_map,) = rise.explain(denoiser, [path])
    times = torch.tensor([600])

    def read(x: torch.Tensor) -> torch.Tensor:
        prediction = denoiser.schedule.to_x0_and_eps(denoiser.answer(x, None), x, times)
        return prediction.x0 if output == "x0" else prediction.epsilon

    masks = dfkernels.masks(path.job.mask_seed, 0, 0, 6, SHAPE).float()
    expected = [-(read(latents * mask) - read(latents)).square().mean() for mask in masks]
    assert_close(step_map.scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_a_cell_of_pixels_is_kept_and_dropped_as_one(pattern: torch.Tensor) -> None:
    rise = pixels(64, score="global", estimator="contrast", cell=3, design="orthogonal")
    step_map = explain_one(Analytic(switch(PIXEL, pattern)), rise)
    cells = step_map.saliency.unfold(0, 3, 3)
    assert (cells.amax(-1) == cells.amin(-1)).all()
    assert divmod(int(step_map.saliency.argmax()), SHAPE[1]) == (0, 3)  # the first pixel of its cell
    # A balanced design leaves nothing to chance: all of the other cells' contrasts are zero.
    expected = torch.zeros(SHAPE)
    expected[:3, 3:] = 1 - opposite_structure(pattern)
    assert_close(step_map.saliency, expected, rtol=1e-4, atol=1e-4)
    assert step_map.error.max() < 1e-6


def test_shifted_cells_overlap_by_half(pattern: torch.Tensor) -> None:
    rise = pixels(1024, score="global", estimator="contrast", cell=2, shifted=True, design="orthogonal")
    step_map = explain_one(Analytic(switch(PIXEL, pattern)), rise)
    assert divmod(int(step_map.saliency.argmax()), SHAPE[1]) == PIXEL
    # Its cell is rows 2 and 3, columns 2 and 3, and in the moved grid rows 1 and 2, columns 3 and 4.
    expected = torch.zeros(SHAPE)
    expected[2:4, 2:4] += (1 - opposite_structure(pattern)) / 2
    expected[1:3, 3:5] += (1 - opposite_structure(pattern)) / 2
    assert_close(step_map.saliency, expected, rtol=1e-4, atol=0.02)


def test_a_stop_by_default_saves_masks() -> None:
    denoiser = Analytic(lambda x_t, _: 0.1 * x_t, (2, 16, 16), batch_size=64)
    latents = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    latents[..., 4:9, 4:9] *= 5
    step_map = explain_one(denoiser, Rise(stop_at_error=1.0), latents)
    assert 64 <= int(step_map.scores.isfinite().sum()) < 256


def test_a_global_score_has_errors_by_default() -> None:
    denoiser = Analytic(lambda x_t, _: x_t.roll(1, 2), (2, 16, 16), batch_size=64)
    latents = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    assert explain_one(denoiser, Rise(score="global"), latents).error.isfinite().all()


def test_settings_of_older_files_are_those_of_their_time() -> None:
    old = {"explainer": "Rise", "num_masks": 9, "keep_probability": 0.5, "score": "local", "estimator": None}
    assert rebuild(old) == Rise.paper(num_masks=9)
    assert rebuild(old | {"score": "global"}) == Rise.paper(num_masks=9, score="global", estimator="ridge")
    assert rebuild(describe(Rise(9))) == Rise(9)
    assert rebuild({"explainer": "Lime", "num_samples": 9}) == Lime.paper(num_samples=9)


def test_noise_needs_an_end_at_which_something_is_left_of_the_image() -> None:
    denoiser = Analytic(lambda x_t, _: x_t)
    path = dataclasses.replace(denoiser.trajectory(torch.ones(1, 2, *SHAPE)), signal=torch.zeros(1))
    with pytest.raises(ValueError, match=r"ends where nothing is left of the image \(a = 0\)"):
        list(pixels(4, fill="noise").explain(denoiser, [path]))
    assert denoiser.batches == []


def test_the_default_design_depends_on_the_masks() -> None:
    assert not Rise(score="global").distribution((16, 16)).shifted
    assert Rise().distribution((16, 16)).design == "orthogonal"
    assert Rise(keep_probability=0.3).distribution((16, 16)).design == "iid"
    assert Rise(mask_kind="rise").distribution((16, 16)).design == "iid"
    assert Rise(cell=2).cell == Rise(cell=[2]).cell == (2,)


@pytest.mark.parametrize("num_masks", [3, 70, 256])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_orthogonal_maps_do_not_depend_on_the_batch_size(num_masks: int, batch_size: int) -> None:
    latents = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    rise = Rise(num_masks, cell=(2, 3))
    maps = []
    for size in (batch_size, 1000):
        denoiser = Analytic(lambda x_t, _: torch.tanh(x_t.roll(1, 2)) * x_t, batch_size=size)
        maps.append(list(rise.explain(denoiser, [denoiser.trajectory(latents), denoiser.trajectory(latents, seed=1)])))
    for one, other in zip(*maps, strict=True):
        assert_close(one.saliency, other.saliency, rtol=1e-5, atol=1e-6)
        assert_close(one.error, other.error, rtol=1e-4, atol=1e-6)
        assert one.error.isfinite().all() == (num_masks > 3)


def test_an_early_stop_of_a_design_ends_a_randomisation(pattern: torch.Tensor) -> None:
    rise = pixels(1024, score="global", estimator="contrast", cell=2, design="orthogonal", stop_at_error=0.3)
    size = rise.distribution(SHAPE).randomisation
    step_map = explain_one(Analytic(switch(PIXEL, pattern)), rise)
    count = int(step_map.scores.isfinite().sum())
    assert 4 * size <= count < 1024
    assert count % size == 0


def test_the_identity_shows_the_masks_alone() -> None:
    denoiser = Analytic(lambda x_t, _: torch.full_like(x_t, torch.nan))
    latents = torch.randn(1, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    rise = pixels(64, similarity="mse", window=1, estimator="contrast", baseline="identity")
    step_map = explain_one(denoiser, rise, latents)
    # f(x) = x: a dropped pixel is off by itself, a kept one by nothing.
    assert_close(step_map.saliency, latents[0].square().mean(0), rtol=1e-5, atol=1e-6)
    assert denoiser.batches == []


def test_the_frozen_answer_leaves_the_input_alone() -> None:
    denoiser = Analytic(lambda x_t, _: x_t.roll(1, 2))
    latents = torch.randn(2, 2, *SHAPE, generator=torch.Generator().manual_seed(1))
    path = denoiser.trajectory(latents)
    rise = pixels(64, output="x0", similarity="mse", window=1, estimator="contrast", baseline="frozen")
    for step, step_map in enumerate(rise.explain(denoiser, [path])):
        # x0 = (R⊙M − b ε(R)) / a: what is missing of a dropped pixel is R/a.
        expected = (latents[step] / path.signal[step]).square().mean(0)
        assert_close(step_map.saliency, expected, rtol=1e-4, atol=1e-6)
    assert denoiser.batches == [2]
    # Nothing is missing of ε.
    for step_map in dataclasses.replace(rise, output="epsilon").explain(denoiser, [path]):
        assert_close(step_map.saliency, torch.zeros(SHAPE))


def test_a_noise_fill_has_the_path_s_mean_and_scale() -> None:
    seen: list[torch.Tensor] = []

    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        return x_t

    denoiser = Analytic(answer, (2, 12, 12), batch_size=64)
    path = denoiser.trajectory(torch.stack([torch.full((2, 12, 12), 3.0), torch.full((2, 12, 12), 5.0)]))
    a, b = torch.tensor([0.6, 0.8]), torch.tensor([0.8, 0.6])
    path = dataclasses.replace(path, signal=a, noise=b, explain_steps=(0,))
    list(pixels(64, fill="noise").explain(denoiser, [path]))
    filled = torch.cat(seen[1:])
    filled = filled[filled != 3.0]
    # The mean colour is that of the last step's x0 = 5 / 0.8; a and b are the explained step's.
    assert filled.mean().item() == pytest.approx(0.6 * 5 / 0.8, abs=0.03)
    assert filled.std().item() == pytest.approx(0.8, abs=0.02)
