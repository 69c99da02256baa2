"""DF-CAM against a linear network worked out by hand, and against plain autograd, one sample at a time."""

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

#: Of the largest value of a map. Float32 forwards and backwards in batches of another size; then α is the mean of
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
        told = (3 * features[:, :1] - features[:, 1:]) + 5 * F.interpolate(pooled[:, 1:], size=(2, 2))
        return torch.cat([told, 0 * told], dim=1)

    def layers(self) -> dict[str, Layer]:
        return {"first": Layer(self.first, (2, 2, 2)), "second": Layer(self.second, (2, 1, 1))}


#: R_t of one step: x_0 = (1, 2; 3, 4), x_1 = (0, 0; −20, 0).
LATENT = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [-20.0, 0.0]]]])


def maps_of(denoiser: Denoiser, cam: Cam, paths: Sequence[Trajectory]) -> dict[tuple[int, int], dict[str, Tensor]]:
    return {(made.item, made.step): {COMBINED: made.saliency, **made.layers} for made in cam.explain(denoiser, paths)}


def test_a_linear_network_worked_out_by_hand() -> None:
    """
    y = Σ (3 A¹ − A² + 5 · mean A²), so ∂y/∂A¹ = 3 and ∂y/∂A² = −1 + 5 = 4 everywhere, α = (3, 4):
    L = ReLU(3 x_0 + 4 (x_0 + x_1)) = ReLU(7 x_0 + 4 x_1) = (7, 14; 0, 28) with 21 − 80 cut off.
    Pooled, ∂y/∂A² = 4 · 5 at the one position, α = (0, 20), A² = (10 − 20) / 4 = −2.5: nothing is left.
    """
    denoiser = Linear()
    (maps,) = maps_of(denoiser, Cam(), [denoiser.trajectory(LATENT)]).values()
    assert_close(maps["first"], torch.tensor([[7.0, 14.0], [0.0, 28.0]]))
    assert_close(maps["second"], torch.tensor([[0.0]]))
    # Min–max of the first; the second is the same everywhere and adds nothing.
    assert_close(maps[COMBINED], torch.tensor([[0.25, 0.5], [0.0, 1.0]]))


def test_the_mean_over_positions_is_of_the_gradient_alone() -> None:
    """α is a mean over positions: with ε seen at one pixel in four, a quarter of the gradient there."""
    denoiser = Linear()
    denoiser.answer = lambda x_t, number: denoiser.first(x_t) * torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    (maps,) = maps_of(denoiser, Cam(layers="first"), [denoiser.trajectory(LATENT)]).values()
    # y = A¹ + A² at the first pixel: α = (1/4, 1/4), L = ReLU((2 x_0 + x_1) / 4).
    assert_close(maps["first"], torch.tensor([[0.5, 1.0], [0.0, 2.0]]))


@pytest.mark.parametrize(("prediction_type", "sign"), [("v_prediction", 1), ("sample", -1)])
def test_the_target_is_the_noise_whatever_the_network_predicts(prediction_type: str, sign: int) -> None:
    """ε = √ᾱ v + √(1−ᾱ) x, or (x − √ᾱ x0) / √(1−ᾱ): the output's gradient times a factor, sign included."""
    denoiser = Linear(prediction_type)
    path = denoiser.trajectory(LATENT)
    alpha_bar = path.signal[0] ** 2
    factor = alpha_bar.sqrt() if sign > 0 else -(alpha_bar / (1 - alpha_bar)).sqrt()
    (maps,) = maps_of(denoiser, Cam(layers="first"), [path]).values()
    expected = F.relu(factor * torch.tensor([[7.0, 14.0], [-59.0, 28.0]]))
    assert_close(maps["first"], expected)


def plain(denoiser: Denoiser, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Tensor]:
    """The maps of one sample by retain_grad on every feature map."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output  # type: ignore[assignment]
            kept[name].retain_grad()

        return hook

    hooks = [layer.module.register_forward_hook(keep(name)) for name, layer in denoiser.layers().items()]
    x = x.clone().requires_grad_()
    denoiser.schedule.epsilon(denoiser.predict(x, t, condition), x, t).sum().backward()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, feature in kept.items():
        assert feature.grad is not None
        weights = feature.grad.mean((2, 3), keepdim=True)
        found[name] = F.relu((weights * feature).sum(1))[0].detach()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "sd15", soak("sd21"), soak("sdxl")])
def test_all_layers_at_once_are_what_each_is_alone(saved: Callable[[str], Path], name: str) -> None:
    """Every layer of every step of two prompts, from batches, against one sample and its own graph at a time."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    engine = Engine(denoiser)
    prompts = [CAPTION, "a pink star on a black background"] if name == "shapes" else [PROMPT, "a tree"]
    paths = trajectories(denoiser, [engine.job(prompt, num_steps=2, guidance=2.0) for prompt in prompts])
    made = maps_of(denoiser, Cam(), paths)
    assert sorted(made) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (item, step), maps in made.items():
        path = paths[item]
        t = torch.tensor([path.job.timesteps[step]])
        expected = plain(denoiser, path.latents[step : step + 1], t, path.prompt)
        assert list(maps) == [COMBINED, *denoiser.layers()]
        for layer, values in expected.items():
            scale = values.abs().max().clamp(min=1e-6)
            assert_close(maps[layer] / scale, values / scale, msg=f"{layer} of {name}", **CLOSE)
    assert not any(module._forward_hooks for module in denoiser.unet.modules())  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("shapes", 22), ("sd15", 44), ("sd21", 44)])
def test_layers_are_those_of_the_module_tree_in_the_forwards_order(
    saved: Callable[[str], Path], name: str, count: int
) -> None:
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    layers = denoiser.layers()
    assert len(layers) == count
    names = list(layers)
    assert names[:2] == ["down_blocks.0.resnets.0", "down_blocks.0.attentions.0"]
    middle = [layer for layer in names if layer.startswith("mid_block")]
    assert middle == ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    modules = dict(denoiser.unet.named_modules())  # type: ignore[attr-defined]
    assert all(modules[layer] is part.module for layer, part in layers.items())


@pytest.mark.slow
def test_of_a_latent_that_is_not_square(saved: Callable[[str], Path]) -> None:
    denoiser = load(saved("sd15"), device="cpu", image_size=(88, 56))
    (path,) = trajectories(denoiser, [Engine(denoiser).job(PROMPT, num_steps=1)])
    ((_, maps),) = maps_of(denoiser, Cam(), [path]).items()
    assert maps[COMBINED].shape == denoiser.latent_shape[1:]
    assert {layer: tuple(values.shape) for layer, values in maps.items() if layer != COMBINED} == {
        layer: part.shape[1:] for layer, part in denoiser.layers().items()
    }


def test_layers_are_chosen_by_pattern(tiny: Denoiser) -> None:
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


def test_a_chosen_layer_has_the_map_that_it_has_among_all(tiny: Denoiser) -> None:
    """Nothing changes by not looking at the others; "combined" is of the chosen ones alone."""
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    everything, some = (maps_of(tiny, cam, [path])[0, 0] for cam in (Cam(), Cam(layers="mid_block.*")))
    for layer in some.keys() - {COMBINED}:
        assert_close(some[layer], everything[layer])
    expected = combine({n: m[None] for n, m in some.items() if n != COMBINED}, tiny.latent_shape[1:])[0]
    assert_close(some[COMBINED], expected)


def test_combined_is_the_sum_of_maps_brought_to_one_size_and_range() -> None:
    maps = {
        "fine": torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]),
        "coarse": torch.tensor([[[2.0]]]),
        "dead": torch.zeros(1, 2, 2),
        "wide": torch.tensor([[[10.0, 30.0]]]),
    }
    # wide: rows repeat, columns are at both pixel centres already.
    expected = torch.tensor([[0.0, 0.25], [0.5, 1.0]]) + torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert_close(combine(maps, (2, 2))[0], expected)


def test_what_is_done_is_left_out_and_the_rest_is_the_same_to_the_bit(tiny: Denoiser) -> None:
    paths = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=3, seed=seed) for seed in range(2)])
    whole = maps_of(tiny, Cam(), paths)
    done = {(0, 1), (1, 0)}
    rest = {
        (made.item, made.step): {COMBINED: made.saliency, **made.layers} for made in Cam().explain(tiny, paths, done)
    }
    assert set(rest) == set(whole) - done
    for row, maps in rest.items():
        assert all(torch.equal(values, whole[row][layer]) for layer, values in maps.items())


def test_the_unconditional_prediction_is_that_of_the_negative_prompt(tiny: Denoiser) -> None:
    job = Engine(tiny).job(CAPTION, num_steps=1, negative_prompt="a pink star on a black background")
    (path,) = trajectories(tiny, [job])
    swapped = Trajectory(**{**vars(path), "prompt": path.negative, "negative": path.prompt})
    unconditional = maps_of(tiny, Cam(target="unconditional"), [path])[0, 0]
    assert_close(unconditional, maps_of(tiny, Cam(), [swapped])[0, 0])
    assert not torch.allclose(unconditional[COMBINED], maps_of(tiny, Cam(), [path])[0, 0][COMBINED])


@pytest.mark.soak
def test_float16_keeps_small_gradients() -> None:
    """Maps of float16 are those of float32 as far as half precision goes, also where the scale is far too large."""
    halves = Engine.from_pretrained("shapes", device="cpu", dtype="float16")
    singles = Engine.from_pretrained("shapes", device="cpu")
    (path,) = trajectories(singles.denoiser, [singles.job(CAPTION, num_steps=2)])
    told = Trajectory(**{**vars(path), "prompt": halves.denoiser.encode_prompts([CAPTION])})
    exact = maps_of(singles.denoiser, Cam(), [path])
    for scale in (Cam().loss_scale, 65504.0 * 16):
        maps = maps_of(halves.denoiser, Cam(loss_scale=scale), [told])
        for row, values in maps.items():
            assert stats.spearmanr(values[COMBINED].ravel(), exact[row][COMBINED].ravel()).statistic > 0.99
            for layer in ("down_blocks.0.resnets.0", "up_blocks.2.attentions.1"):
                worst = (values[layer] - exact[row][layer]).abs().max() / exact[row][layer].max()
                assert worst < 0.05, (layer, scale, worst)


def test_gradients_too_small_for_float16_are_scaled() -> None:
    """An output times 2⁻²⁶: its gradient is nothing in float16, and with the scale of 2⁸ it is what it should be."""
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


def test_a_map_that_is_not_finite_is_told_of(tiny: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    predict = tiny.predict
    monkeypatch.setattr(tiny, "predict", lambda *given: predict(*given) * float("inf"))
    with pytest.warns(UserWarning, match="a DF-CAM map of step 0 is not finite"):
        maps_of(tiny, Cam(), [path])


@pytest.mark.slow
def test_xformers_processors_step_aside_and_come_back(tiny_folder: Path) -> None:
    """They cannot be differentiated by torch.func; nothing is called of them here, where xformers is not installed."""
    denoiser = load(tiny_folder, device="cpu")
    (path,) = trajectories(denoiser, [Engine(denoiser).job(CAPTION, num_steps=1)])
    expected = maps_of(denoiser, Cam(), [path])[0, 0]
    processors = dict.fromkeys(denoiser.unet.attn_processors, XFormersAttnProcessor())  # type: ignore[attr-defined]
    denoiser.unet.set_attn_processor(processors)  # type: ignore[attr-defined]
    assert_close(maps_of(denoiser, Cam(), [path])[0, 0], expected)
    assert denoiser.unet.attn_processors == processors or all(  # type: ignore[attr-defined]
        isinstance(one, XFormersAttnProcessor)
        for one in denoiser.unet.attn_processors.values()  # type: ignore[attr-defined]
    )


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(
    tiny: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=5)])
    expected, predict, sizes = maps_of(tiny, Cam(), [path]), tiny.predict, []

    def short(x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x_t))
        return predict(x_t, timesteps, condition)

    monkeypatch.setattr(tiny, "predict", short)
    monkeypatch.setattr(tiny, "batch_size", 16)
    before = tiny.batch_size
    made = maps_of(tiny, Cam(), [path])
    assert sizes == [2, 2, 1]  # a quarter of sixteen is what is tried first
    assert tiny.batch_size == before
    assert_close(made, expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"layers": ()}, "DF-CAM needs at least one layer"),
        ({"target": "guided"}, "target 'guided' is not possible with DF-CAM: expected conditional or unconditional"),
        ({"loss_scale": 0.0}, r"scale 0\.0 is not possible"),
        ({"loss_scale": float("inf")}, "scale inf is not possible"),
    ],
)
def test_settings_that_are_not_possible(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Cam(**settings)  # type: ignore[arg-type]


def test_a_model_without_layers_says_so() -> None:
    denoiser = Analytic(lambda x_t, number: x_t)
    with pytest.raises(ValueError, match="analytic does not expose its layers"):
        list(Cam().explain(denoiser, [denoiser.trajectory(torch.zeros(1, 2, 6, 5))]))
