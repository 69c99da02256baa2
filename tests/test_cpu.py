"""The fast forms for a CPU against diffusers' modules, torch's operations and autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dfengine.models.unet import cpu

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def cross(heads: int, d: int, channels: int, *, bias: bool = True) -> Any:
    return seeded(lambda: Attention(channels, 10, heads, dim_head=d, out_bias=bias)).eval().requires_grad_(False)


@pytest.mark.slow
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_a_folded_attention_equals_the_attention(
    prompts: int, latents: int, positions: int, heads: int, tokens: int, bias: bool
) -> None:
    attention = cross(heads, 32, 24, bias=bias)
    text = seeded(lambda: torch.randn(prompts, tokens, 10))
    x = seeded(lambda: torch.randn(prompts * latents, positions, 24), 1)
    folded = cpu.fold_attention(attention, attention.to_k(text), attention.to_v(text))
    assert folded is not None
    expected = attention(x, text.repeat_interleave(latents, dim=0))
    assert_close(folded(x), expected, **CLOSE)


@pytest.mark.parametrize(
    ("heads", "d", "channels", "tokens", "folds"),
    [(8, 40, 320, 77, False), (8, 80, 640, 77, True), (8, 160, 1280, 77, True), (4, 12, 48, 16, True)],
)
def test_weights_are_folded_if_that_is_less_work(heads: int, d: int, channels: int, tokens: int, folds: bool) -> None:
    """Products at one position, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    attention, text, x = cross(heads, d, channels), torch.randn(1, tokens, 10), torch.randn(1, 1, channels)
    key, value = attention.to_k(text), attention.to_v(text)
    folded = cpu.fold_attention(attention, key, value)
    assert (folded is not None) == folds
    unfolded = 2 * (2 * channels * heads * d + 2 * tokens * heads * d)
    if folded is None:
        assert unfolded < 2 * 2 * heads * tokens * channels
        return
    with FlopCounterMode(display=False) as counter:
        folded(x)
    assert counter.get_total_flops() <= unfolded


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def hooked_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def hooked_after(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda *_: None)


def offloaded(module: Any) -> None:
    module._hf_hook = None


def replaced(module: Any) -> None:
    original = module.forward
    module.forward = lambda x: original(x)


def subclassed(module: nn.Module) -> None:
    module.__class__ = type("Subclass", (type(module),), {})


CHANGES = [hooked, hooked_before, hooked_after, offloaded, replaced, subclassed]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["to_q", "to_out.0"])
def test_an_attention_with_changed_layers_is_not_folded(change: Callable[[Any], None], part: str) -> None:
    attention, text = cross(2, 8, 16), torch.randn(1, 3, 10)
    key, value = attention.to_k(text), attention.to_v(text)
    assert cpu.fold_attention(attention, key, value) is not None
    change(attention.get_submodule(part))
    assert cpu.fold_attention(attention, key, value) is None


def test_queries_with_a_bias_are_not_folded() -> None:
    attention = Attention(16, 10, 2, dim_head=8, bias=True)
    text = torch.randn(1, 3, 10)
    assert cpu.fold_attention(attention, attention.to_k(text), attention.to_v(text)) is None


def convolution(channels: int = 3, out: int = 5, **options: Any) -> nn.Conv2d:
    options = {"kernel_size": 3, "padding": 1} | options
    return seeded(lambda: nn.Conv2d(channels, out, **options)).requires_grad_(False)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_upsampling_is_one_transposed_convolution(n: int, height: int, width: int, bias: bool) -> None:
    conv = convolution(bias=bias)
    x = seeded(lambda: torch.randn(n, 3, height, width), 2).contiguous(memory_format=torch.channels_last)
    kernel = cpu.transposed_kernel(conv)
    assert kernel is not None
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    assert_close(F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1), expected, **CLOSE)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_convolution_has_no_kernel(change: Callable[[Any], None]) -> None:
    conv = convolution()
    change(conv)
    assert cpu.transposed_kernel(conv) is None


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5},
        {"kernel_size": 5, "padding": 2},
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2},
        {"channels": 4, "out": 4, "groups": 2},
        {"padding_mode": "circular"},
    ],
    ids=str,
)
def test_another_convolution_has_no_kernel(options: dict[str, Any]) -> None:
    assert cpu.transposed_kernel(convolution(**options)) is None


def feed_forward() -> Any:
    return seeded(lambda: FeedForward(6, activation_fn="geglu")).eval().requires_grad_(False)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if isinstance(returned, Tensor):
            self.elements = max(self.elements, returned.numel())
        return returned


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 15, 16, 17, 30])
def test_a_feed_forward_layer_in_pieces(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    layers = feed_forward()
    widest = layers.net[0].proj.out_features
    monkeypatch.setattr(cpu, "_PIECE_ELEMENTS", 4 * widest)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(cpu, "_MIN_PIECE_ROWS", 2)
    for x in (torch.randn(rows, 1, 6), torch.randn(1, rows, 6), torch.randn(3, rows, 6)):
        with Largest() as largest:
            output = cpu.feed_forward(layers, x)
        assert_close(output, layers(x), **CLOSE)
        weights = layers.net[0].proj.weight.numel()
        assert largest.elements == max(min(8, x.shape[0] * x.shape[1]) * widest, weights, x.numel())


def test_pieces_have_a_minimum_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_PIECE_ELEMENTS", 1)
    layers, x = feed_forward(), torch.randn(4, 300, 6)
    with Largest() as largest:
        cpu.feed_forward(layers, x)
    assert largest.elements == 512 * layers.net[0].proj.out_features


def test_a_feed_forward_layer_is_differentiable() -> None:
    layers, x = feed_forward(), torch.randn(2, 700, 6)
    expected = torch.func.grad(lambda x: layers(x).square().sum())(x)
    ours = torch.func.grad(lambda x: cpu.feed_forward(layers, x).square().sum())(x)
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    leaf = x.clone().requires_grad_()
    cpu.feed_forward(layers, leaf).square().sum().backward()
    assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["", "net.0", "net.0.proj", "net.1", "net.2"])
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_changed_feed_forward_layer_is_called(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] | None, part: str
) -> None:
    layers, x, calls = feed_forward(), torch.randn(2, 3, 6), []
    if change is not None:
        change(layers.get_submodule(part))
    forward = FeedForward.forward

    def noted(self: Any, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args)

    if change is replaced and part == "":
        layers.forward = lambda x: noted(layers, x)
    monkeypatch.setattr(FeedForward, "forward", noted)
    cpu.feed_forward(layers, x)
    assert bool(calls) == (change is not None)


def test_an_unknown_feed_forward_layer_is_called() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = torch.randn(2, 3, 6)
    assert_close(cpu.feed_forward(Own(), x), 2 * x)


@pytest.mark.parametrize("options", [{"activation_fn": "gelu"}, {"activation_fn": "geglu", "bias": False}], ids=str)
def test_other_feed_forward_layers_are_called_as_they_are(options: dict[str, Any]) -> None:
    layers, x = FeedForward(6, **options).eval(), torch.randn(2, 3, 6)
    assert_close(cpu.feed_forward(layers, x), layers(x), rtol=0, atol=0)


def test_other_devices_call_the_feed_forward_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, x: calls.append(1) or forward(self, x))
    x = torch.randn(2, 3, 6, device="meta")
    assert cpu.feed_forward(feed_forward().to("meta"), x).shape == x.shape
    assert calls == [1]


def test_a_class_of_the_same_name_is_called() -> None:
    layers, x = feed_forward(), torch.randn(2, 3, 6)
    gate = layers.net[0]
    gate.__class__ = type(
        "GEGLU", (type(gate),), {"forward": lambda self, x: 2 * type(gate).__mro__[1].forward(self, x)}
    )
    expected = layers(x)
    assert_close(cpu.feed_forward(layers, x), expected, **CLOSE)


def test_an_output_layer_without_bias_is_called() -> None:
    layers, x = feed_forward(), torch.randn(2, 3, 6)
    layers.net[2].bias = None
    assert_close(cpu.feed_forward(layers, x), layers(x), **CLOSE)
