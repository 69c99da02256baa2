"""Where the released code departs from the paper: each departure against a literal implementation or by hand."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import dfkernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analytic import Analytic
from marks import soak
from reduced import PROMPT
from scipy import ndimage
from tolerance import tolerance
from torch import Tensor, nn
from torch.testing import assert_close

from dfengine import Engine, Lime, Rise, XDiffusionLime
from dfengine.diffusion.denoiser import Condition, Denoiser, Layer
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, to_bytes, trajectories
from dfengine.explain import Explainer, describe, rebuild, xdiffusion
from dfengine.explain.cam import combine
from dfengine.explain.xdiffusion import XDiffusionCam, XDiffusionRise, released_similarity, zero_padded_mean
from dfengine.models import load

SHAPE = (6, 5)
GUIDANCE = 3.5
TIMESTEPS = (800, 310, 45)
#: Sums of N scores from float32 statistics.
SUMS = {"rtol": 1e-4, "atol": 1e-2}
#: As in test_cam.py, relative to the largest value of a map.
CLOSE = {"rtol": 1e-3, "atol": 5e-4}
CAPTION = "a red circle above a blue square on a gray background"


def answer(x_t: Tensor, number: Tensor) -> Tensor:
    """Differs between the prompt "1" and the negative prompt, 0, and from x_t."""
    number = number[:, None, None, None]
    return torch.tanh(x_t.roll(1, 2) + (0.3 + number) * x_t.roll(1, 3)) * (x_t + 0.4 * number)


def path_of(denoiser: Analytic, guidance: float = GUIDANCE, seed: int = 0, count: int = 3) -> Trajectory:
    """Three steps through arbitrary latents, so that x_next is not the latent of the next step."""
    latents = torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))[:count]
    path = denoiser.trajectory(latents, seed=seed, guidance=guidance)
    return dataclasses.replace(path, job=dataclasses.replace(path.job, timesteps=TIMESTEPS[:count]))


def maps_of(explainer: Explainer, denoiser: Denoiser, *paths: Trajectory) -> dict[tuple[int, int], Tensor]:
    return {(step_map.item, step_map.step): step_map.saliency for step_map in explainer.explain(denoiser, paths)}


# The similarity ------------------------------------------------------------------------------------------------------


def blur(x: np.ndarray) -> np.ndarray:
    """15 × 15, σ 1.5, over [..., h, w], zero-padded without renormalising the weights at the border."""
    return ndimage.gaussian_filter(x, 1.5, mode="constant", cval=0.0, radius=7, axes=(-2, -1))


def structure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    c3 = 0.03**2 / 2
    mean_a, mean_b = blur(a), blur(b)
    sigma_a, sigma_b = (np.sqrt(blur(x * x) - mean**2) for x, mean in ((a, mean_a), (b, mean_b)))
    return ((2 * (blur(a * b) - mean_a * mean_b) + c3) / (sigma_a * sigma_b + c3)).mean(-3)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 6, 5), (1, 2, 31, 17), (3, 1, 4, 40)])
def test_the_window_has_fifteen_pixels_and_zero_padding(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) + 2 for _ in range(2))
    assert_close(zero_padded_mean(a), torch.from_numpy(blur(a.numpy())), **tolerance("blur_float64"))
    expected = torch.from_numpy(structure(a.numpy(), b.numpy()))
    assert_close(released_similarity(a, b), expected, **tolerance("similarity_float64"))


def test_self_similarity_is_nearly_two_and_depends_on_the_offset() -> None:
    """(2σ² + C₃) / (σ² + C₃) of one pixel by hand: zero padding gives a constant a variance."""
    single = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    weight = 1 / sum(np.exp(-0.5 * (k / 1.5) ** 2) for k in range(-7, 8)) ** 2
    variance, c3 = 9 * weight - (3 * weight) ** 2, 0.00045
    assert float(released_similarity(single, single)) == pytest.approx((2 * variance + c3) / (variance + c3))


def test_contrast_equals_structure_and_cosine_is_over_channels() -> None:
    a, b = torch.randn(2, 4, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(released_similarity(a, b, "contrast"), released_similarity(a, b, "structure"))
    expected = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
    assert_close(released_similarity(a, b, "cosine"), expected, **tolerance("similarity"))


@pytest.mark.parametrize(
    ("square_a", "square_b", "expected"),
    [(1.25, 4.25, (2 * 0.1 + 0.00045) / 0.25045), (1 - 1e-6, 4.25, np.nan), (1.25, 3.9, np.nan), (0.5, 3.5, np.nan)],
)
def test_a_negative_variance_gives_nan(
    monkeypatch: pytest.MonkeyPatch, square_a: float, square_b: float, expected: float
) -> None:
    """E[a] = 1, E[b] = 2, E[ab] = 2.1: also if both variances are negative and their product has a root."""
    moments = torch.tensor([1.0, 2.0, square_a, square_b, 2.1]).reshape(5, 1, 1, 1, 1)
    monkeypatch.setattr(xdiffusion, "zero_padded_mean", lambda x: moments)
    (score,) = released_similarity(*torch.zeros(2, 1, 1, 1, 1)).flatten()
    assert float(score) == pytest.approx(expected, nan_ok=True, rel=1e-4)


def test_rounding_of_a_constant_prediction_gives_nan() -> None:
    """ε is constant over pixels for every mask, so rounding makes some variances negative."""

    def constant(x_t: Tensor, _: Tensor) -> Tensor:
        return 1 + x_t.mean((1, 2, 3), keepdim=True).expand_as(x_t).contiguous()

    denoiser = Analytic(constant, (1, 20, 18), batch_size=64)
    with pytest.warns(UserWarning, match="not finite"):
        (saliency,) = maps_of(XDiffusionRise(200), denoiser, path_of(denoiser, count=1)).values()
    # Hidden pixels are NaN too, as 0 · NaN is NaN. Near the border the zero padding contributes a variance.
    assert saliency[8:12, 8:10].isnan().all()
    assert saliency[0].isfinite().all()


# DF-RISE -------------------------------------------------------------------------------------------------------------


def ddim(denoiser: Analytic, x: Tensor, epsilon: Tensor, step: int) -> Tensor:
    """x_next by Eq. 4, with ᾱ = 1 after the last step."""
    alpha_bar = denoiser.schedule.alpha_bar
    alpha_bar_now, alpha_bar_next = (float(alpha_bar[t]) if t >= 0 else 1.0 for t in (*TIMESTEPS, -1)[step : step + 2])
    x0 = (x - (1 - alpha_bar_now) ** 0.5 * epsilon) / alpha_bar_now**0.5
    return alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * epsilon


def rise_literally(denoiser: Analytic, path: Trajectory, step: int, num_masks: int) -> tuple[Tensor, Tensor]:
    """The map and each mask's mean score, one mask at a time."""

    def guided(x: Tensor) -> Tensor:
        unconditional, conditional = (answer(x[None], torch.tensor([number]))[0] for number in (0.0, 1.0))
        return unconditional + max(path.job.guidance, 1) * (conditional - unconditional)

    latent = path.latents[step].double()
    reference = ddim(denoiser, latent, guided(latent), step)
    total, means = torch.zeros(latent.shape[1:], dtype=torch.float64), []
    for mask in dfkernels.masks(path.job.mask_seed, step, 0, num_masks, tuple(latent.shape[1:])):
        score = torch.from_numpy(structure(guided(latent * mask).numpy(), reference.numpy()))
        total += mask * score
        means.append(score.mean())
    return total.float(), torch.stack(means).float()


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 16, 1000])
@pytest.mark.parametrize("shape", [(2, 6, 5), (1, 9, 16)])
def test_df_rise_equals_one_mask_at_a_time(batch_size: int, shape: tuple[int, int, int]) -> None:
    denoiser = Analytic(answer, shape, batch_size)
    paths = [path_of(denoiser), path_of(denoiser, guidance=-1.0, seed=5)]
    step_maps = list(XDiffusionRise(21).explain(denoiser, paths))
    assert [(step_map.item, step_map.step) for step_map in step_maps] == [(i, k) for i in range(2) for k in range(3)]
    for step_map in step_maps:
        saliency, scores = rise_literally(denoiser, paths[step_map.item], step_map.step, 21)
        assert_close(step_map.saliency, saliency, **SUMS)
        assert_close(step_map.scores, scores, **SUMS)
        assert step_map.method == "rise"
        assert step_map.error is not None
        assert step_map.error.isfinite().all()


def test_the_reference_is_the_next_latent_of_the_sampler(tiny: Denoiser) -> None:
    """With any spacing the reference is the next latent, and at the last step the latent that is decoded."""
    job = Job(CAPTION, TIMESTEPS, guidance=4.0, negative_prompt="a pink star on a black background")
    (path,) = trajectories(tiny, [job])
    with torch.no_grad():
        masking = xdiffusion._XDiffusionForwards(XDiffusionRise(2), tiny, [path])
        masking.start()
        assert_close(masking.references[:2], path.latents[1:], rtol=1e-4, atol=1e-4)
        image = to_bytes(tiny.decode(masking.references[2:3]))[0]
    assert (image.int() - path.image.int()).abs().max() <= 1


def test_selected_steps_match_a_complete_run_and_completed_ones_are_skipped() -> None:
    denoiser = Analytic(answer, batch_size=9)
    path = path_of(denoiser)
    for explainer in (XDiffusionRise(9), XDiffusionRise(9, "cosine", "other")):
        all_maps = maps_of(explainer, denoiser, path)
        selected = maps_of(explainer, denoiser, dataclasses.replace(path, explain_steps=(0, 2)))
        step_maps = list(explainer.explain(denoiser, [path], done={(0, 1)}))
        remaining = {step_map.step: step_map.saliency for step_map in step_maps}
        assert {step_map.method for step_map in step_maps} == {explainer.name}
        assert list(selected) == [(0, 0), (0, 2)]
        assert list(remaining) == [0, 2]
        for (_, step), saliency in selected.items():
            assert_close(saliency, all_maps[0, step], **SUMS)
            assert torch.equal(remaining[step], all_maps[0, step])
        assert list(explainer.explain(denoiser, [path], done=set(all_maps))) == []


def test_cosine_and_contrast_are_selected_by_name() -> None:
    denoiser = Analytic(answer)
    path = path_of(denoiser)
    maps = {kind: maps_of(XDiffusionRise(9, kind), denoiser, path)[0, 1] for kind in xdiffusion.SIMILARITIES}
    assert torch.equal(maps["contrast"], maps["structure"])
    assert (maps["cosine"] - maps["structure"]).abs().max() > 0.1
    assert maps["cosine"].abs().max() <= 9


@pytest.mark.parametrize("count", [1, 3])
def test_predictions_for_padding_are_ignored(count: int) -> None:
    """Ten masks per step in batches of 8: the padding is zeros, for which this denoiser returns NaN."""

    def nan_for_zeros(x_t: Tensor, number: Tensor) -> Tensor:
        return torch.where((x_t == 0).all(-1).all(-1).all(-1)[:, None, None, None], torch.nan, answer(x_t, number))

    denoiser, unpadded = Analytic(nan_for_zeros, batch_size=8), Analytic(answer, batch_size=10)
    maps, expected = (maps_of(XDiffusionRise(10), model, path_of(model, count=count)) for model in (denoiser, unpadded))
    assert len(maps) == count
    for row, saliency in maps.items():
        assert_close(saliency, expected[row], **SUMS)


@torch.no_grad()
def test_no_batch_waits_for_the_device() -> None:
    """Runs on the meta device, where reading a value is an error."""
    meta = torch.device("meta")
    denoiser = Analytic(lambda x_t, number: x_t * number[:, None, None, None], batch_size=7)
    denoiser.device = meta
    condition = Condition({"number": torch.zeros(1, device=meta)})
    path = dataclasses.replace(
        path_of(Analytic(answer)), latents=torch.zeros(3, 2, *SHAPE, device=meta), prompt=condition, negative=condition
    )
    path = dataclasses.replace(path, explain_steps=(0, 2))
    masking = xdiffusion._XDiffusionForwards(XDiffusionRise(6), denoiser, [path])
    masking.start()
    assert [row for rows in masking.run_masks(range(2), 0, 6) for row in rows] == [0, 1]


# DF-CAM --------------------------------------------------------------------------------------------------------------


class ScaledFeatures(nn.Module):
    """A = (1 + number) · (x_0, x_0 + x_1)."""

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        return (1 + number[:, None, None, None]) * torch.stack([x[:, 0], x[:, 0] + x[:, 1]], 1)


class PromptDependent(Analytic):
    """ε = (2 + 3 · number) A¹ − A², of a feature map that depends on the prompt."""

    def __init__(self) -> None:
        super().__init__(self.linear, shape=(2, 2, 2))
        self.module = ScaledFeatures()
        self.share = 1.0

    def linear(self, x_t: Tensor, number: Tensor) -> Tensor:
        features = self.module(x_t, number)
        weights = torch.stack([2 + 3 * number, -torch.ones_like(number)], 1)
        return (weights[..., None, None] * features * self.share).to(self.dtype)

    def layers(self) -> dict[str, Layer]:
        return {"features": Layer(self.module, (2, 2, 2))}


#: x_0 = (1, 2; 3, 4), x_1 = (0, 20; −20, 0).
LATENT = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 20.0], [-20.0, 0.0]]]])


def test_guidance_applies_to_gradients_and_activations() -> None:
    """
    Number 0 for the negative prompt and 1 for the prompt, guidance w = 2:
    A = A_n + 2 (A_p − A_n) = 3 (x_0, x_0 + x_1), G = (2, −1) + 2 (3, 0) = (8, −1),
    L = ReLU(24 x_0 − 3 x_0 − 3 x_1); with w = 1 all of it is the prompt's: ReLU(10 x_0 − 2 x_0 − 2 x_1).
    """
    denoiser = PromptDependent()
    paths = [denoiser.trajectory(LATENT, guidance=guidance) for guidance in (2.0, 1.0)]
    first, second = XDiffusionCam(name="both").explain(denoiser, paths)
    assert (first.method, first.item, second.item) == ("both", 0, 1)
    assert_close(first.layers["features"], torch.tensor([[21.0, 0.0], [123.0, 84.0]]))
    assert_close(second.layers["features"], torch.tensor([[8.0, 0.0], [64.0, 32.0]]))
    assert_close(first.saliency, torch.tensor([[21.0, 0.0], [123.0, 84.0]]) / 123)
    assert denoiser.batches == [4]


def test_gradients_too_small_for_float16_are_scaled() -> None:
    denoiser = PromptDependent()
    denoiser.dtype = torch.float16
    denoiser.share = 2.0**-26
    (step_map,) = XDiffusionCam().explain(denoiser, [denoiser.trajectory(LATENT)])
    assert_close(step_map.layers["features"] * 2.0**26, torch.tensor([[21.0, 0.0], [123.0, 84.0]]), rtol=1e-2, atol=0)


def cam_literally(denoiser: Denoiser, path: Trajectory, step: int, skipped: str) -> dict[str, Tensor]:
    """The maps of one step by retain_grad on the feature maps, with both prompts in one batch."""
    features: dict[str, Tensor] = {}

    def retain(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            features[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]
            features[name].retain_grad()

        return hook

    layers = {name: layer for name, layer in denoiser.layers().items() if name != skipped}
    hooks = [layer.module.register_forward_hook(retain(name)) for name, layer in layers.items()]
    x = path.latents[[step, step]].clone().requires_grad_()
    t = torch.tensor([path.job.timesteps[step]] * 2)
    denoiser.predict(x, t, Condition.cat([path.negative, path.prompt])).sum().backward()
    for hook in hooks:
        hook.remove()

    def guided(both: Tensor) -> Tensor:
        return (1 - path.job.guidance) * both[0] + path.job.guidance * both[1]

    maps = {}
    for name, feature in features.items():
        assert feature.grad is not None
        maps[name] = F.relu((guided(feature.grad).mean((1, 2), keepdim=True) * guided(feature)).sum(0)).detach()
    return maps


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("shapes", 21), soak("sd15", 43)])
def test_all_layers_except_the_attention_of_the_mid_block(saved: Callable[[str], Path], name: str, count: int) -> None:
    """Every layer of two steps of two prompts in batches, against one sample with its own graph at a time."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    assert denoiser.schedule.prediction_type == "epsilon"
    jobs = [Job(prompt, (700, 310), guidance=guidance) for prompt, guidance in ((PROMPT, 2.0), ("a tree", 7.5))]
    if name == "shapes":
        jobs = [dataclasses.replace(job, prompt=CAPTION, seed=seed) for seed, job in enumerate(jobs)]
    paths: Sequence[Trajectory] = trajectories(denoiser, jobs)
    step_maps = list(XDiffusionCam().explain(denoiser, paths))
    assert [(step_map.item, step_map.step) for step_map in step_maps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for step_map in step_maps:
        expected = cam_literally(denoiser, paths[step_map.item], step_map.step, "mid_block.attentions.0")
        assert len(expected) == count
        assert set(step_map.layers) == set(expected) == set(XDiffusionCam().output_spec(denoiser, jobs[0]).layers)
        for layer, values in expected.items():
            scale = values.abs().max().clamp(min=1e-6)
            assert_close(step_map.layers[layer] / scale, values / scale, msg=f"{layer} of {name}", **CLOSE)
        combined = combine(
            {layer: values[None] for layer, values in step_map.layers.items()}, denoiser.latent_shape[1:]
        )[0]
        assert_close(step_map.saliency, combined)


def test_selected_steps_of_df_cam_match_a_complete_run(tiny: Denoiser) -> None:
    (path,) = trajectories(tiny, [Job(CAPTION, TIMESTEPS)])
    all_maps = maps_of(XDiffusionCam(), tiny, path)
    selected = maps_of(XDiffusionCam(), tiny, dataclasses.replace(path, explain_steps=(0, 2)))
    assert list(selected) == [(0, 0), (0, 2)]
    assert_close(selected, {row: all_maps[row] for row in selected}, rtol=1e-3, atol=1e-3)
    remaining = {step_map.step: step_map.saliency for step_map in XDiffusionCam().explain(tiny, [path], done={(0, 0)})}
    assert list(remaining) == [1, 2]
    assert all(torch.equal(saliency, all_maps[0, step]) for step, saliency in remaining.items())


def test_a_non_finite_map_is_reported() -> None:
    denoiser = PromptDependent()
    denoiser.share = float("inf")
    with pytest.warns(UserWarning, match="a DF-CAM map of step 0 is not finite"):
        list(XDiffusionCam().explain(denoiser, [denoiser.trajectory(LATENT)]))


# Both ----------------------------------------------------------------------------------------------------------------


def test_the_number_of_forwards_is_as_announced() -> None:
    denoiser = Analytic(answer, batch_size=1)
    list(XDiffusionRise(5).explain(denoiser, [path_of(denoiser)]))
    assert sum(denoiser.batches) == XDiffusionRise(5).num_forwards(3) == 2 * 3 * 6
    halves = PromptDependent()
    list(XDiffusionCam().explain(halves, [halves.trajectory(LATENT.expand(3, -1, -1, -1))]))
    assert 2 * sum(halves.batches) == XDiffusionCam().num_forwards(3)


@pytest.mark.parametrize(
    "explainer", [XDiffusionRise(), XDiffusionRise(7, "cosine", "other"), XDiffusionCam(), XDiffusionCam(2.0, "deep")]
)
def test_settings_survive_json(explainer: Explainer) -> None:
    assert rebuild(json.loads(json.dumps(describe(explainer)))) == explainer


def test_output_specs_of_a_job() -> None:
    denoiser = PromptDependent()
    job = Job("1", (3,))
    spec = XDiffusionRise(7).output_spec(denoiser, job)
    assert (spec.num_masks, spec.has_error, spec.layers) == (7, True, {})
    assert XDiffusionCam().output_spec(denoiser, job).layers == {"features": (2, 2)}
    assert (XDiffusionRise().num_masks, XDiffusionRise().name, XDiffusionCam().name) == (500, "rise", "cam")
    assert XDiffusionRise().settings == Rise.paper(estimator="sum", window=15, sigma=1.5, target="guided")


@pytest.mark.parametrize("similarity", ["luminance", "contrast_structure", "ssim", "frechet", "structure_contrast"])
def test_similarities_that_are_not_reproduced_are_rejected(similarity: str) -> None:
    with pytest.raises(ValueError, match=f"'{similarity}' is not .* structure, contrast, cosine, or Rise"):
        XDiffusionRise(similarity=similarity)


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(ValueError, match="0 masks are not possible"):
        XDiffusionRise(0)
    with pytest.raises(ValueError, match="loss_scale inf is not possible"):
        XDiffusionCam(loss_scale=float("inf"))
    denoiser = Analytic(answer)
    with pytest.raises(ValueError, match="analytic does not expose its layers"):
        XDiffusionCam().output_spec(denoiser, Job("1", (3,)))


# LIME ----------------------------------------------------------------------------------------------------------------


def test_lime_ranks_pixels_by_the_brightness_of_the_painted_image() -> None:
    """Seven gray columns, 0 to 0.6: those with the five largest absolute coefficients are painted."""
    gray = np.arange(7) * 0.1
    image = np.broadcast_to((gray * 255).round().astype(np.uint8)[None, :, None], (3, 7, 3)).copy()
    segments = np.broadcast_to(np.arange(7), (3, 7)).copy()
    coefficients = np.array([0.1, -0.9, 0.8, 0.05, -0.7, 0.6, 0.5])
    expected = np.where(np.isin(np.arange(7), [1, 2, 4, 5, 6]), (2 * gray + 0.6) / 3, gray)
    painted = XDiffusionLime().to_map(coefficients, segments, image)
    np.testing.assert_allclose(painted, np.broadcast_to(expected, (3, 7)), atol=2e-3)
    np.testing.assert_allclose(Lime().to_map(coefficients, segments, image), coefficients[segments])


def test_lime_segments_the_downsampled_image() -> None:
    """A fine checkerboard is uniformly gray when downsampled."""
    checkers = (255 * (np.indices((32, 32)).sum(0) % 2)).astype(np.uint8)[..., None].repeat(3, -1)
    cam_literally = np.full((8, 8, 3), 128, np.uint8)
    plain_segments = Lime().segment(cam_literally, (8, 8))
    assert np.array_equal(XDiffusionLime().segment(checkers, (8, 8)), plain_segments)
    assert not np.array_equal(Lime().segment(checkers, (8, 8)), plain_segments)


def test_settings_survive_a_copy() -> None:
    assert dataclasses.replace(XDiffusionLime(5), alpha=3.0) == XDiffusionLime(5, alpha=3.0)


def test_undefined_coefficients_give_a_nan_map() -> None:
    """A regression on non-finite scores has undefined coefficients, and the map must show it."""
    undefined = np.full(2, np.nan)
    painted = XDiffusionLime().to_map(undefined, np.array([[0, 1]]), np.zeros((2, 4, 3), np.uint8))
    assert np.isnan(painted).all()
