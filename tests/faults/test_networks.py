"""Networks as people load them: quantised, offloaded, cast, compiled, wrapped, hooked, incomplete.

What can run gives the maps of the plain network; the rest is refused in one line before anything is touched.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from marks import soak
from torch import Tensor, nn

from dfengine import Attention, Cam, Engine, Relevance, Rise
from dfengine.explain import Explainer
from dfengine.models.loading import quiet

CAPTION = "a red circle above a blue square on a gray background"


def load(folder: Path) -> Any:
    with quiet():
        return DiffusionPipeline.from_pretrained(folder)


def saliency(pipeline: Any, explainer: Explainer) -> np.ndarray:
    result = Engine(pipeline, batch_size=16).explain(CAPTION, explainer, num_steps=2)
    return np.stack([result.heatmap(explainer.name, step=step) for step in range(2)])


@pytest.fixture(scope="module")
def expected(tiny_folder: Path) -> Callable[[Explainer], np.ndarray]:
    maps: dict[str, np.ndarray] = {}

    def of(explainer: Explainer) -> np.ndarray:
        if explainer.name not in maps:
            maps[explainer.name] = saliency(load(tiny_folder), explainer)
        return maps[explainer.name]

    return of


# Kinds ---------------------------------------------------------------------------------------------------------------


class RoundedWeight(Tensor):
    """A quantised weight, as torchao's: a tensor subclass that only knows how to be multiplied with."""

    values: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> "RoundedWeight":
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, *bias = args
            return torch.nn.functional.linear(x, weight.values.to(x) * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(f"{func} is not implemented for a rounded weight")


def rounded(pipeline: Any) -> None:
    for module in pipeline.unet.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(RoundedWeight(module.weight.detach()), requires_grad=False)


class _Product(torch.autograd.Function):
    """As bitsandbytes and quanto multiply: without the static method that torch.func asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] @ ctx.saved_tensors[0], None


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = _Product.apply(x, self.weight)
        return product if self.bias is None else product + self.bias


def own_product(pipeline: Any) -> None:
    for module in pipeline.unet.modules():
        if type(module) is nn.Linear:
            module.__class__ = OwnProduct


def dynamic_int8(pipeline: Any) -> None:
    pipeline.unet = torch.ao.quantization.quantize_dynamic(pipeline.unet, {nn.Linear}, dtype=torch.qint8)


def layerwise_casting(pipeline: Any) -> None:
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(pipeline: Any) -> None:
    cpu = torch.device("cpu")
    pipeline.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def sequential_offload(pipeline: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipeline.unet, torch.device("cpu"), offload_buffers=True)


def removed_hooks(pipeline: Any) -> None:
    sequential_offload(pipeline)
    pipeline.remove_all_hooks()


def compiled(pipeline: Any) -> None:
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def compiled_in_place(pipeline: Any) -> None:
    pipeline.unet.compile(backend="eager")


def checkpointing(pipeline: Any) -> None:
    pipeline.unet.enable_gradient_checkpointing()


def data_parallel(pipeline: Any) -> None:
    pipeline.unet, pipeline.vae = nn.DataParallel(pipeline.unet), nn.DataParallel(pipeline.vae)


EVERY = (Rise(16), Cam(), Attention(), Relevance())
#: Of each kind what runs, and how closely its maps agree with the plain network's.
RUNS: dict[Callable[[Any], None], tuple[tuple[Explainer, ...], float]] = {
    rounded: ((Rise(16), Attention()), 0.98),
    own_product: (EVERY, 1 - 1e-6),
    dynamic_int8: ((Rise(16), Attention()), 0.98),
    layerwise_casting: ((Rise(16),), 0.9),
    group_offload: ((Rise(16),), 1 - 1e-6),
    sequential_offload: ((Rise(16), Cam()), 1 - 1e-6),
    removed_hooks: (EVERY, 1 - 1e-6),
    compiled: (EVERY, 1 - 1e-6),
    compiled_in_place: (EVERY, 1 - 1e-6),
    checkpointing: (EVERY, 1 - 1e-6),
    data_parallel: (EVERY, 1 - 1e-6),
}


#: One of each mechanism.
QUICK = (own_product, dynamic_int8, group_offload, removed_hooks, data_parallel)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.ao")
@pytest.mark.filterwarnings("ignore:.*(torch.ao.quantization|quantized tensor creation)")
@pytest.mark.parametrize(
    "change",
    [*QUICK, *(soak(change) for change in RUNS if change not in QUICK)],
    ids=lambda change: change.__name__,
)
def test_what_runs_has_the_maps_of_the_plain_network_and_the_rest_is_refused(
    tiny_folder: Path, expected: Callable[[Explainer], np.ndarray], change: Callable[[Any], None]
) -> None:
    pipeline = load(tiny_folder)
    change(pipeline)
    runs, agreement = RUNS[change]
    for explainer in EVERY:
        if explainer in runs:
            ours = saliency(pipeline, explainer)
            assert np.corrcoef(ours.ravel(), expected(explainer).ravel())[0, 1] >= agreement, explainer.name
        else:
            with pytest.raises(
                ValueError, match=r"needs gradients, which .* use an explainer|cannot be seen: .*; undo"
            ):
                saliency(pipeline, explainer)
    # Nothing was moved or destroyed on the way.
    again = saliency(pipeline, runs[0])
    assert np.corrcoef(again.ravel(), expected(runs[0]).ravel())[0, 1] >= agreement


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler", "text_encoder", "tokenizer"])
def test_a_missing_part_is_named(tiny_folder: Path, part: str) -> None:
    pipeline = load(tiny_folder)
    setattr(pipeline, part, None)
    with pytest.raises(ValueError, match=f"the pipeline has no {part}: load it with all of its parts"):
        Engine(pipeline)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_traced_network_is_refused(tiny_folder: Path) -> None:
    pipeline = load(tiny_folder)
    pipeline.unet = torch.jit.script(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"the unet is a .*: give the pipeline diffusers' own model, untraced"):
        Engine(pipeline)


def test_a_tiny_autoencoder_encodes_images(tiny_folder: Path) -> None:
    """It has latents where others have a distribution of them."""
    pipeline = load(tiny_folder)
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    blocks |= {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    pipeline.vae = AutoencoderTiny(**blocks)
    image = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    result = Engine(pipeline).explain(CAPTION, Rise(4), image=image, num_steps=2)
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        latents = pipeline.vae.encode(pixels).latents * pipeline.vae.config.scaling_factor
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = torch.from_numpy(result.latents[0])
    torch.testing.assert_close(ours, result.signal[0] * latents[0] + result.noise[0] * noise, rtol=1e-4, atol=1e-5)


def test_a_network_that_does_not_tell_its_size_needs_an_image_size(tiny_folder: Path) -> None:
    pipeline = load(tiny_folder)
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="give image_size"):
        Engine(pipeline)
    result = Engine(pipeline, image_size=(16, 24)).explain(CAPTION, Rise(4), num_steps=1)
    assert result.image.shape == (16, 24, 3)


@pytest.mark.parametrize("size", [0, -8, 10**9, "8", [8], [8, 8, 8], [8, None], 8.5, True])
def test_a_damaged_size_is_refused(tiny_folder: Path, size: Any) -> None:
    pipeline = load(tiny_folder)
    pipeline.unet.register_to_config(sample_size=size)
    with pytest.raises(ValueError, match=r"sample_size is .*: expected one or two whole numbers"):
        Engine(pipeline)


def test_damaged_weights_are_told_from_too_much_guidance(tiny_folder: Path) -> None:
    pipeline = load(tiny_folder)
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite at its first step, t = 501: its weights are damaged"):
        Engine(pipeline).explain(CAPTION, Rise(4), num_steps=2)
    with pytest.raises(ValueError, match="runs out of range with guidance 1e\\+30: choose a smaller one"):
        Engine(load(tiny_folder)).explain(CAPTION, Rise(4), num_steps=8, guidance=1e30)


def test_names_stand_for_explainers_with_their_defaults(tiny_folder: Path) -> None:
    engine = Engine(load(tiny_folder))
    result = engine.explain(CAPTION, ["random", Cam(layers="mid_block*")], num_steps=1, negative_prompt=None)
    assert list(result.maps) == ["random", "cam"]
    for explainers, message in (("rice", "did you mean 'rise'"), ([], "no explainer")):
        with pytest.raises(ValueError, match=message):
            engine.explain(CAPTION, explainers)
