"""DF-CAM against a linear network worked out by hand, and against plain autograd on one sample at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from analytic import Analytic
from diffusers.models.attention_processor import XFormersAttnProcessor
from marks import soak
from reduced import PROMPT
from scipy import stats
from torch import Tensor, nn
from torch.testing import assert_close

from dfengine import Cam, Engine
from dfengine.diffusion.denoiser import Condition, Denoiser, Layer
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.explain.cam import combine
from dfengine.models import load
from dfengine.result import COMBINED

#: Relative to the largest value of a map. Float32 forwards and backwards in batches of another size; α is the mean of
#: gradients of both signs, which cancel to a hundredth of their size.
CLOSE = {"rtol": 1e-3, "atol": 5e-4}
CAPTION = "a red circle above a blue square on a gray background"


class Linear(Analytic):
    """ε = 3 A¹ − A² + 5 mean A², of two feature maps A = (x_0, x_0 + x_1) of a latent's two channels."""

    def __init__(self, prediction_type: str = "epsilon") -> None:
        super().__init__(self.linear, shape=(2, 2, 2))
        self.first = nn.Conv2d(2, 2, 1, bias=False)
        self.second = nn.AvgPool2d(2)
        self.schedule = type(self.schedule).from_config({"clip_sample": False, "prediction_type": prediction_type})
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 1.0]])[..., None, None])

    def linear(self, x_t: Tensor, number: Tensor) -> Tensor:
        features = self.first(x_t)
        pooled = self.second(features)
        output = (3 * features[:, :1] - features[:, 1:]) + 5 * F.interpolate(pooled[:, 1:], size=(2, 2))
        return torch.cat([output, 0 * output], dim=1)

    def layers(self) -> dict[str, Layer]:
        return {"first": Layer(self.first, (2, 2, 2)), "second": Layer(self.second, (2, 1, 1))}


#: R_t of one step: x_0 = (1, 2; 3, 4), x_1 = (0, 0; −20, 0).
LATENT = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [-20.0, 0.0]]]])


def maps_of(denoiser: Denoiser, cam: Cam, paths: Sequence[Trajectory]) -> dict[tuple[int, int], dict[str, Tensor]]:
    return {
        (step_map.item, step_map.step): {COMBINED: step_map.saliency, **step_map.layers}
        for step_map in cam.explain(denoiser, paths)
    }


def test_a_linear_network_worked_out_by_hand() -> None:
    """
    y = Σ (3 A¹ − A² + 5 · mean A²), so ∂y/∂A¹ = 3 and ∂y/∂A² = −1 + 5 = 4 everywhere, α = (3, 4):
    L = ReLU(3 x_0 + 4 (x_0 + x_1)) = ReLU(7 x_0 + 4 x_1) = (7, 14; 0, 28) with 21 − 80 clamped.
    Pooled, ∂y/∂A² = 4 · 5 at the one position, α = (0, 20), A² = (10 − 20) / 4 = −2.5: L is zero.
    """
    denoiser = Linear()
    (maps,) = maps_of(denoiser, Cam(), [denoiser.trajectory(LATENT)]).values()
    assert_close(maps["first"], torch.tensor([[7.0, 14.0], [0.0, 28.0]]))
    assert_close(maps["second"], torch.tensor([[0.0]]))
    # Min–max of the first; the second is constant and contributes zero.
    assert_close(maps[COMBINED], torch.tensor([[0.25, 0.5], [0.0, 1.0]]))


def test_only_gradients_are_averaged_over_positions() -> None:
    """α is a mean over positions: if ε depends on one pixel in four, α is a quarter of the gradient there."""
    denoiser = Linear()
    denoiser.answer = lambda x_t, number: denoiser.first(x_t) * torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    (maps,) = maps_of(denoiser, Cam(layers="first"), [denoiser.trajectory(LATENT)]).values()
    # y = A¹ + A² at the first pixel: α = (1/4, 1/4), L = ReLU((2 x_0 + x_1) / 4).
    assert_close(maps["first"], torch.tensor([[0.5, 1.0], [0.0, 2.0]]))


@pytest.mark.parametrize(("prediction_type", "sign"), [("v_prediction", 1), ("sample", -1)])
def test_the_target_is_the_noise_for_every_prediction_type(prediction_type: str, sign: int) -> None:
    """ε = √ᾱ v + √(1−ᾱ) x, or (x − √ᾱ x0) / √(1−ᾱ): the gradient of the output times a signed factor."""
    denoiser = Linear(prediction_type)
    path = denoiser.trajectory(LATENT)
    alpha_bar = path.signal[0] ** 2
    factor = alpha_bar.sqrt() if sign > 0 else -(alpha_bar / (1 - alpha_bar)).sqrt()
    (maps,) = maps_of(denoiser, Cam(layers="first"), [path]).values()
    expected = F.relu(factor * torch.tensor([[7.0, 14.0], [-59.0, 28.0]]))
    assert_close(maps["first"], expected)


def cam_literally(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Tensor]:
    """The maps of one sample by retain_grad on every feature map."""
    features: dict[str, Tensor] = {}

    def retain(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            features[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]
            features[name].retain_grad()

        return hook

    hooks = [layer.module.register_forward_hook(retain(name)) for name, layer in denoiser.layers().items()]
    x = x.clone().requires_grad_()
    denoiser.schedule.epsilon(denoiser.predict(x, t, condition), x, t).sum().backward()
    for hook in hooks:
        hook.remove()
    maps = {}
    for name, feature in features.items():
        assert feature.grad is not None
        weights = feature.grad.mean((2, 3), keepdim=True)
        maps[name] = F.relu((weights * feature).sum(1))[0].detach()
    return maps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "sd15", soak("sd21"), soak("sdxl")])
def test_batched_maps_equal_those_of_single_samples(saved: Callable[[str], Path], name: str) -> None:
    """Every layer of every step of two prompts in batches, against one sample with its own graph at a time."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    engine = Engine(denoiser)
    prompts = [CAPTION, "a pink star on a black background"] if name == "shapes" else [PROMPT, "a tree"]
    paths = trajectories(denoiser, [engine.job(prompt, num_steps=2, guidance=2.0) for prompt in prompts])
    maps_by_step = maps_of(denoiser, Cam(), paths)
    assert sorted(maps_by_step) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (item, step), maps in maps_by_step.items():
        path = paths[item]
        t = torch.tensor([path.job.timesteps[step]])
        expected = cam_literally(denoiser, path.latents[step : step + 1], t, path.prompt)
        assert list(maps) == [COMBINED, *denoiser.layers()]
        for layer, values in expected.items():
            scale = values.abs().max().clamp(min=1e-6)
            assert_close(maps[layer] / scale, values / scale, msg=f"{layer} of {name}", **CLOSE)
    assert not any(module._forward_hooks for module in denoiser.unet.modules())  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("shapes", 22), ("sd15", 44), ("sd21", 44)])
def test_layers_follow_the_order_of_the_forward(saved: Callable[[str], Path], name: str, count: int) -> None:
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    layers = denoiser.layers()
    assert len(layers) == count
    names = list(layers)
    assert names[:2] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0"]
    middle = [layer for layer in names if layer.startswith("mid_block")]
    assert middle == ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    modules = dict(denoiser.unet.named_modules())  # type: ignore[attr-defined]
    assert all(modules[layer] is layer_spec.module for layer, layer_spec in layers.items())


@pytest.mark.slow
def test_maps_of_a_latent_that_is_not_square(saved: Callable[[str], Path]) -> None:
    denoiser = load(saved("sd15"), device="cpu", image_size=(88, 56))
    (path,) = trajectories(denoiser, [Engine(denoiser).job(PROMPT, num_steps=1)])
    ((_, maps),) = maps_of(denoiser, Cam(), [path]).items()
    assert maps[COMBINED].shape == denoiser.latent_shape[1:]
    assert {layer: tuple(values.shape) for layer, values in maps.items() if layer != COMBINED} == {
        layer: layer_spec.shape[1:] for layer, layer_spec in denoiser.layers().items()
    }


def test_layers_are_selected_by_pattern(tiny: Denoiser) -> None:
    names = list(tiny.layers())
    assert list(Cam(layers="mid_block.*").select_layers(tiny)) == [
        name for name in names if name.startswith("mid_block")
    ]
    both = Cam(layers=("up_blocks.*.resnets.1", "down_blocks.0.resnets.0")).select_layers(tiny)
    assert list(both) == [
        "down_blocks.0.resnets.0",
        *(n for n in names if n.startswith("up") and n.endswith("resnets.1")),
    ]
    with pytest.raises(ValueError, match=r"no layer is called 'up_block\.\*': .* has \d+, from .*dfengine layers"):
        Cam(layers=("*", "up_block.*")).select_layers(tiny)


def test_selecting_layers_does_not_change_their_maps(tiny: Denoiser) -> None:
    """The combined map covers the selected layers only."""
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    complete, selected = (maps_of(tiny, cam, [path])[0, 0] for cam in (Cam(), Cam(layers="mid_block.*")))
    for layer in selected.keys() - {COMBINED}:
        assert_close(selected[layer], complete[layer])
    expected = combine({n: m[None] for n, m in selected.items() if n != COMBINED}, tiny.latent_shape[1:])[0]
    assert_close(selected[COMBINED], expected)


def test_combined_is_the_sum_of_resized_and_scaled_maps() -> None:
    maps = {
        "fine": torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]),
        "coarse": torch.tensor([[[2.0]]]),
        "dead": torch.zeros(1, 2, 2),
        "wide": torch.tensor([[[10.0, 30.0]]]),
    }
    # wide: rows are repeated, columns already coincide with the pixel centres.
    expected = torch.tensor([[0.0, 0.25], [0.5, 1.0]]) + torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert_close(combine(maps, (2, 2))[0], expected)


def test_completed_maps_are_skipped_and_the_others_are_bit_identical(tiny: Denoiser) -> None:
    paths = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=3, seed=seed) for seed in range(2)])
    complete = maps_of(tiny, Cam(), paths)
    done = {(0, 1), (1, 0)}
    remaining = {
        (step_map.item, step_map.step): {COMBINED: step_map.saliency, **step_map.layers}
        for step_map in Cam().explain(tiny, paths, done)
    }
    assert set(remaining) == set(complete) - done
    for row, maps in remaining.items():
        assert all(torch.equal(values, complete[row][layer]) for layer, values in maps.items())


def test_the_unconditional_prediction_is_that_of_the_negative_prompt(tiny: Denoiser) -> None:
    job = Engine(tiny).job(CAPTION, num_steps=1, negative_prompt="a pink star on a black background")
    (path,) = trajectories(tiny, [job])
    swapped = Trajectory(**{**vars(path), "prompt": path.negative, "negative": path.prompt})
    unconditional = maps_of(tiny, Cam(target="unconditional"), [path])[0, 0]
    assert_close(unconditional, maps_of(tiny, Cam(), [swapped])[0, 0])
    conditional = maps_of(tiny, Cam(), [path])[0, 0]
    assert not torch.allclose(unconditional[COMBINED], conditional[COMBINED])
    other_negative = Trajectory(**{**vars(path), "negative": path.prompt})
    assert_close(conditional, maps_of(tiny, Cam(), [other_negative])[0, 0])


@pytest.mark.soak
def test_float16_keeps_small_gradients() -> None:
    """Maps in float16 match those in float32 up to half precision, even if the scale is far too large."""
    half_engine = Engine.from_pretrained("shapes", device="cpu", dtype="float16")
    single_engine = Engine.from_pretrained("shapes", device="cpu")
    (path,) = trajectories(single_engine.denoiser, [single_engine.job(CAPTION, num_steps=2)])
    half_path = Trajectory(**{**vars(path), "prompt": half_engine.denoiser.encode_prompts([CAPTION])})
    exact = maps_of(single_engine.denoiser, Cam(), [path])
    for scale in (Cam().loss_scale, 65504.0 * 16):
        maps = maps_of(half_engine.denoiser, Cam(loss_scale=scale), [half_path])
        for row, values in maps.items():
            assert stats.spearmanr(values[COMBINED].ravel(), exact[row][COMBINED].ravel()).statistic > 0.99
            for layer in ("down_blocks.0.resnets.0", "up_blocks.2.attentions.1"):
                error = (values[layer] - exact[row][layer]).abs().max() / exact[row][layer].max()
                assert error < 0.05, (layer, scale, error)


def test_gradients_too_small_for_float16_are_scaled() -> None:
    """The gradient of an output times 2⁻²⁶ underflows in float16, but not with a loss scale of 2⁸."""
    denoiser = Linear()
    denoiser.dtype = torch.float16
    denoiser.first.half()
    denoiser.answer = lambda x_t, number: denoiser.first(x_t.half()) * 2.0**-26
    path = denoiser.trajectory(LATENT.half().float())
    maps = {
        scale: maps_of(denoiser, Cam(layers="first", loss_scale=scale), [path])[0, 0]["first"] for scale in (256.0, 1.0)
    }
    # y = Σ (A¹ + A²) · 2⁻²⁶: α = (1, 1) · 2⁻²⁶, L = ReLU(2 x_0 + x_1) · 2⁻²⁶.
    assert_close(maps[256.0] * 2.0**26, torch.tensor([[2.0, 4.0], [0.0, 8.0]]))
    assert not maps[1.0].any()


def test_a_non_finite_map_is_reported(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    predict = tiny.predict
    monkeypatch.setattr(tiny, "predict", lambda *args: predict(*args) * float("inf"))
    with pytest.warns(UserWarning, match="a DF-CAM map of step 0 is not finite"):
        maps_of(tiny, Cam(), [path])


@pytest.mark.slow
def test_xformers_processors_are_replaced_and_restored(tiny_folder: Path) -> None:
    """torch.func cannot differentiate them. They are never called here, as xformers is not installed."""
    denoiser = load(tiny_folder, device="cpu")
    (path,) = trajectories(denoiser, [Engine(denoiser).job(CAPTION, num_steps=1)])
    expected = maps_of(denoiser, Cam(), [path])[0, 0]
    processors = dict.fromkeys(denoiser.unet.attn_processors, XFormersAttnProcessor())  # type: ignore[attr-defined]
    denoiser.unet.set_attn_processor(processors)  # type: ignore[attr-defined]
    assert_close(maps_of(denoiser, Cam(), [path])[0, 0], expected)
    assert denoiser.unet.attn_processors == processors or all(  # type: ignore[attr-defined]
        isinstance(processor, XFormersAttnProcessor)
        for processor in denoiser.unet.attn_processors.values()  # type: ignore[attr-defined]
    )


def test_running_out_of_memory_halves_the_batch(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=5)])
    expected, predict, sizes = maps_of(tiny, Cam(), [path]), tiny.predict, []

    def predict_up_to_two(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x_t))
        return predict(x_t, timesteps, condition)

    monkeypatch.setattr(tiny, "predict", predict_up_to_two)
    monkeypatch.setattr(tiny, "batch_size", 16)
    before = tiny.batch_size
    maps = maps_of(tiny, Cam(), [path])
    assert sizes == [2, 2, 1]  # the first attempt is a quarter of sixteen
    assert tiny.batch_size == before
    assert_close(maps, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "DF-CAM needs at least one layer"),
        ({"target": "guided"}, "target 'guided' is not possible with DF-CAM: expected conditional or unconditional"),
        ({"loss_scale": 0.0}, r"scale 0\.0 is not possible"),
        ({"loss_scale": float("inf")}, "scale inf is not possible"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cam(**settings)  # type: ignore[arg-type]


def test_a_model_without_layers_is_rejected() -> None:
    denoiser = Analytic(lambda x_t, number: x_t)
    with pytest.raises(ValueError, match="analytic does not expose its layers"):
        list(Cam().explain(denoiser, [denoiser.trajectory(torch.zeros(1, 2, 6, 5))]))
