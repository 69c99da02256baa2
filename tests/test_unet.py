"""The fast forward against that of diffusers, on the published topologies, and the cases it leaves to diffusers."""

import logging
import re
from collections.abc import Callable
from copy import copy, deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from marks import soak
from reduced import PROMPT, pipeline_of, reduced
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dfengine import Engine
from dfengine.diffusion.denoiser import Condition, Denoiser, PromptedDenoiser
from dfengine.models import adapt, load
from dfengine.models.unet.cpu import FoldedAttention
from dfengine.models.unet.forward import unsupported_reason

#: float32 through a complete network, summed in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
PROMPTS = [PROMPT, "an oil painting of a tree", ""]
MODELS = ["shapes", "sd15", "sd21", "sdxl"]
#: For properties that all of them share.
DIFFERENT = ["shapes", "sd15", soak("sd21"), soak("sdxl")]


@pytest.fixture(scope="module")
def model(saved: Callable[[str], Path]) -> Callable[[str], Denoiser]:
    """A model of `MODELS` on the CPU: the embedded one, or a published topology at an eighth of its width.

    The weights are loaded once: tests change only attributes of their copy of the denoiser.
    """

    @cache
    def load_once(name: str) -> Denoiser:
        return embedded() if name == "shapes" else load(saved(name), device="cpu")

    return lambda name: copy(load_once(name))


def embedded() -> Denoiser:
    return Engine.from_pretrained("shapes", device="cpu").denoiser


def batch(denoiser: Denoiser, count: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([999, 700, 700, 20, 0])[:count]


def prompts_of(denoiser: Denoiser) -> Condition:
    known = ["a red circle", "a blue square on a gray background", ""] if denoiser.name == "shapes" else PROMPTS
    return denoiser.encode_prompts(known)


@pytest.mark.grid
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_output_matches_the_forward_of_diffusers(model: Callable[[str], Denoiser], name: str) -> None:
    denoiser = model(name)
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    network = denoiser.with_prompts(condition)
    assert type(network) is not PromptedDenoiser
    rows = torch.tensor([2, 0, 1, 1, 0])
    assert_close(network(x, t, rows), denoiser.predict(x, t, condition[rows]), **CLOSE)


@pytest.mark.grid
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", DIFFERENT)
def test_latents_of_one_prompt_share_its_keys_and_values(model: Callable[[str], Denoiser], name: str) -> None:
    """Folding the batch into the queries gives the same attention, for any batch."""
    denoiser = model(name)
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    network = denoiser.with_prompts(condition)
    for row in range(3):
        shared, apart = network(x, t, row), network(x, t, torch.full((5,), row))
        assert_close(shared, apart, **CLOSE)
        assert_close(shared[1:3], network(x[1:3], t[1:3], row), **CLOSE)
    assert (network(x, t, 0) - network(x, t, 1)).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_latents_whose_sides_do_not_halve_evenly(saved: Callable[[str], Path], name: str) -> None:
    denoiser = load(saved(name), device="cpu", image_size=(88, 56))
    assert denoiser.latent_shape[1:] == (11, 7)
    (x, t), condition = batch(denoiser), denoiser.encode_prompts(PROMPTS)
    rows = torch.tensor([0, 1, 2, 0, 1])
    assert_close(denoiser.with_prompts(condition)(x, t, rows), denoiser.predict(x, t, condition[rows]), **CLOSE)


class Copies(TorchDispatchMode):
    """The elements that each copy of a tensor moves."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.elements.append(returned.numel())
        return returned


@pytest.mark.grid
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", DIFFERENT)
def test_activations_stay_channels_last_and_are_never_copied(saved: Callable[[str], Path], name: str) -> None:
    # Twice the size, as at 1×1 both layouts are one.
    denoiser = embedded() if name == "shapes" else load(saved(name), device="cpu", image_size=(128, 128))
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    x = x.to(memory_format=torch.channels_last)
    is_channels_last: list[bool] = []

    def note(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        is_channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        is_channels_last.append(output.is_contiguous(memory_format=torch.channels_last))

    convolutions = [m for m in denoiser.unet.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [module.register_forward_hook(note) for module in convolutions]
    try:
        network = denoiser.with_prompts(condition)
        with Copies() as copies:
            network(x, t, 0)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(is_channels_last) == 2 * len(convolutions) > 20
    assert all(is_channels_last)
    assert copies.elements == []
    # Without hooks, upsampling is a single operation.
    network = denoiser.with_prompts(condition)
    network(x, t, 0)
    with Copies() as copies:
        assert network(x, t, 0).is_contiguous(memory_format=torch.channels_last)
    assert copies.elements == []


@pytest.mark.grid
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3, 4, 10, 64])
@pytest.mark.parametrize("name", MODELS)
def test_two_prompts_per_latent(model: Callable[[str], Denoiser], name: str, size: int) -> None:
    denoiser = model(name)
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    denoiser.batch_size = size
    network, counts = denoiser.with_prompts(condition), []
    rows = torch.tensor([[2, 0, 1, 1, 0], [0, 0, 2, 1, 1]])
    hooks = [
        module.register_forward_hook(lambda module, args, _: counts.append((module, len(args[0]))))
        for module in (denoiser.unet.conv_in, denoiser.unet.conv_out)
    ]
    try:
        outputs = [network.both(x, t, pair) for pair in (rows, (2, 1))]
    finally:
        for hook in hooks:
            hook.remove()
    for both, pair in zip(outputs, (rows, torch.tensor([[2], [1]]).expand(2, 5)), strict=True):
        for output, row in zip(both, pair, strict=True):
            assert_close(output, denoiser.predict(x, t, condition[row]), **CLOSE)
    if name != "sdxl" and size % 2 == 0:
        assert max(count for _, count in counts) <= size
    into, out = (sum(n for called, n in counts if called is module) for module in counts_of(denoiser))
    assert out == 4 * len(x)
    # SDXL's added condition of the prompt enters at the first layer; an odd batch cannot be halved.
    assert into == (4 if name == "sdxl" or size % 2 else 2) * len(x)


def untyped(denoiser: Denoiser) -> Any:
    """The denoiser as Any: the base class declares no network."""
    return denoiser


def counts_of(denoiser: Denoiser) -> tuple[torch.nn.Module, torch.nn.Module]:
    unet = untyped(denoiser).unet
    return unet.conv_in, unet.conv_out


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "part", ["attn2.to_q", "attn2.to_out.0", "ff", "ff.net.0", "ff.net.0.proj", "ff.net.2", "upsampler"]
)
def test_a_hooked_layer_is_called(part: str) -> None:
    denoiser = embedded()
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    unet = untyped(denoiser).unet
    block = "up_blocks.1.attentions.1.transformer_blocks.0."
    module = unet.get_submodule("up_blocks.0.upsamplers.0.conv" if part == "upsampler" else block + part)
    plain, calls = denoiser.with_prompts(condition)(x, t, 0), []
    hook = module.register_forward_hook(lambda *_: calls.append(1))
    assert unsupported_reason(unet) is None
    assert_close(denoiser.with_prompts(condition)(x, t, 0), plain, **CLOSE)
    assert len(calls) == 1
    hook.remove()
    # A patched forward is called, too.
    original = module.forward
    module.forward = lambda *args, **kwargs: 0 * original(*args, **kwargs)
    assert (denoiser.with_prompts(condition)(x, t, 0) - plain).abs().max() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_keys_values_and_time_embeddings_are_computed_once(
    model: Callable[[str], Denoiser], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, calls = model("sd15"), []
    blocks = [m for name, m in denoiser.unet.named_modules() if name.endswith(("attn2.to_k", "attn2.to_v"))]
    counted = {*blocks, denoiser.unet.time_embedding.linear_1}
    linear = torch.nn.Linear.forward

    def count(module: torch.nn.Linear, x: Tensor) -> Tensor:
        calls.extend([1] * (module in counted))
        return linear(module, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    network = denoiser.with_prompts(prompts_of(denoiser))
    assert len(calls) == len(counted) == 2 * 16 + 1
    for _ in range(3):
        network(*batch(denoiser), 1)
    assert len(calls) == len(counted)


def hook(pipeline: Any) -> None:
    pipeline.unet.mid_block.attentions[0].register_forward_hook(lambda *_: None)


def slice_attention(pipeline: Any) -> None:
    pipeline.unet.set_attn_processor(SlicedAttnProcessor(2))


def free_u(pipeline: Any) -> None:
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def chunk(pipeline: Any) -> None:
    for module in pipeline.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 1)


def rescale(pipeline: Any) -> None:
    pipeline.unet.up_blocks[1].resnets[0].output_scale_factor = 2.0


def hook_before(pipeline: Any) -> None:
    pipeline.unet.register_forward_pre_hook(lambda *_: None)


def hook_keys(pipeline: Any) -> None:
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.register_forward_hook(lambda *_: None)


def offload(pipeline: Any) -> None:
    pipeline.unet.down_blocks[1]._hf_hook = None


def replace_forward(pipeline: Any) -> None:
    attention = pipeline.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    original = attention.forward
    attention.forward = lambda *args, **kwargs: 0.5 * original(*args, **kwargs)


def replace_class(pipeline: Any) -> None:
    block = pipeline.unet.up_blocks[1].attentions[0].transformer_blocks[0]

    class BasicTransformerBlock(type(block)):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 0.9 * super().forward(*args, **kwargs)

    block.__class__ = BasicTransformerBlock


def another_class(pipeline: Any) -> None:
    block = pipeline.unet.up_blocks[1].attentions[0].transformer_blocks[0]
    block.__class__ = type("Merging", (type(block),), {})


def namesake(pipeline: Any) -> None:
    pipeline.unet.set_attn_processor(type("AttnProcessor", (AttnProcessor,), {"__module__": "theirs"})())


def rescale_attention(pipeline: Any) -> None:
    pipeline.unet.set_attn_processor(AttnProcessor())
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.scale *= 2


def train(pipeline: Any) -> None:
    pipeline.unet.mid_block.resnets[0].train()


def normalise(pipeline: Any) -> None:
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.norm_q = torch.nn.LayerNorm(attention.inner_dim // attention.heads).eval()


def no_mid_block(pipeline: Any) -> None:
    pipeline.unet.mid_block = None


@pytest.fixture(scope="module")
def template(saved: Callable[[str], Path]) -> Any:
    return pipeline_of(saved("sd15"))


@pytest.mark.grid
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "expected_reason"),
    [
        (hook, "mid_block.attentions.0 has a hook"),
        (hook_before, "it has a hook"),
        (hook_keys, "attn2.to_k has a hook"),
        (offload, "down_blocks.1 has a hook"),
        (replace_forward, "the forward of up_blocks.1.attentions.0.transformer_blocks.0.attn1 has been replaced"),
        (replace_class, "up_blocks.1.* is not diffusers' own BasicTransformerBlock"),
        (another_class, "it contains a Merging"),
        (namesake, "attn1 has a AttnProcessor from theirs"),
        (rescale_attention, "scale of mid_block.*attn1 is"),
        (train, "it is in training mode"),
        (normalise, "norm_q of mid_block.* is LayerNorm"),
        (no_mid_block, "it has no mid block"),
        (slice_attention, "attn1 has a SlicedAttnProcessor"),
        (free_u, "FreeU is enabled"),
        (chunk, "_chunk_size of .* is 1"),
        (rescale, r"output_scale_factor of up_blocks.1.resnets.0 is 2.0"),
    ],
)
def test_an_unsupported_unet_falls_back_to_diffusers_forward(
    template: Any, change: Callable[[Any], None], expected_reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = deepcopy(template)
    denoiser = adapt(pipeline)
    before = denoiser.with_prompts(denoiser.encode_prompts([PROMPT]))
    change(pipeline)
    with caplog.at_level(logging.INFO):
        network = denoiser.with_prompts(denoiser.encode_prompts([PROMPT]))
    assert type(network) is PromptedDenoiser
    assert type(before) is not PromptedDenoiser
    assert len(denoiser.performance_warnings()) == 1
    for message in (caplog.messages[0], denoiser.performance_warnings()[0]):
        assert re.search(expected_reason, message)
    x, t = batch(denoiser)
    text = denoiser.encode_prompts([PROMPT]).tensors["text"].expand(5, -1, -1)
    assert_close(network(x, t, 0), pipeline.unet(x, t, text).sample, **CLOSE)


@pytest.mark.grid
@pytest.mark.parametrize(
    ("changes", "expected_reason"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, "time_embedding_norm of .* is 'scale_shift'"),
        ({"center_input_sample": True}, "its center_input_sample is True"),
        ({"act_fn": "gelu"}, "the activation of .* is GELU"),
        ({"time_embedding_act_fn": "silu"}, "its time_embedding_act_fn is 'silu'"),
        ({"class_embed_type": "identity"}, "takes more conditions than a prompt"),
        ({"only_cross_attention": True}, "only_cross_attention of .* is True"),
        ({"dual_cross_attention": True}, "contains a DualTransformer2DModel"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "it contains a AttnDownBlock2D"),
        ({"downsample_padding": 0}, "padding of .* is 0"),
    ],
)
def test_other_architectures_are_recognised(tmp_path: Path, changes: dict[str, Any], expected_reason: str) -> None:
    folder = reduced("sd15", tmp_path, {"unet": changes})
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")).eval()
    reason = unsupported_reason(unet)
    assert reason is not None
    assert re.search(expected_reason, reason), reason


@pytest.mark.slow
@torch.no_grad()
def test_weights_changed_between_runs_apply(saved: Callable[[str], Path]) -> None:
    denoiser = load(saved("sd15"), device="cpu")
    (x, t), condition = batch(denoiser), denoiser.encode_prompts([PROMPT])
    before = denoiser.with_prompts(condition)(x, t, 0)
    for part in ("attn2.to_v", "time_embedding", "attn2.to_q", "attn2.to_out", "upsamplers", "ff.net"):
        for name, weight in denoiser.unet.named_parameters():
            if part in name:
                weight.mul_(1.5)
        after = denoiser.with_prompts(condition)(x, t, 0)
        assert (after - before).abs().max() > 1e-4
        assert_close(after, denoiser.predict(x, t, condition[torch.zeros(5, dtype=torch.int64)]), **CLOSE)
        before = after


@pytest.mark.slow
def test_gradients_do_not_depend_on_earlier_calls() -> None:
    denoiser = embedded()
    (x, t), condition = batch(denoiser), prompts_of(denoiser)
    text = condition.tensors["text"].clone().requires_grad_()
    network = denoiser.with_prompts(Condition({"text": text}))
    with torch.no_grad():
        expected = network(x, t, 0)
    with torch.inference_mode():
        network(x, t, 1)
    for row in (0, 1):
        (gradient,) = torch.autograd.grad(network(x, t, row).square().sum(), text, retain_graph=True)
        assert gradient[row].abs().max() > 0
    assert_close(network(x, t, 0).detach(), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "folds"), [("float32", True), ("bfloat16", False)])
def test_attentions_are_folded_in_float32_only(dtype: str, folds: bool) -> None:
    denoiser = Engine.from_pretrained("shapes", device="cpu", dtype=dtype).denoiser
    is_folded: list[bool] = []

    def note(*args: Any, **_: Any) -> Tensor:
        is_folded.extend(isinstance(text, FoldedAttention) for text in args[3])
        return args[1]

    denoiser.compiled, untyped(denoiser)._compiled, untyped(denoiser)._compiled_size = True, note, 5
    denoiser.with_prompts(prompts_of(denoiser))(*batch(denoiser), 0)
    assert is_folded == [folds] * 7
