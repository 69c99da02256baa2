"""Relevance against values worked out by hand, the rules in full matrices, and the forward of diffusers."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CAPTIONS
from hypothesis import example, given
from hypothesis import strategies as st
from literal_relevance import AttentionLayer, Grid, literal_relevance
from marks import soak
from reduced import PROMPT
from scipy.stats import spearmanr
from torch import Tensor
from torch.testing import assert_close

from dfengine import Engine, Relevance, StepMap
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.explain.relevance import by_token
from dfengine.explain.rules import (
    RelevanceRules,
    average_rows,
    coarse_positions,
    normalize_rows,
    relevance_weights,
    self_relevance,
)
from dfengine.models import load
from dfengine.models.attention import hooked_attention
from dfengine.tokens import PADDING, Tokens

#: Sums of at most some tens of small rational numbers, a few of which are not exact in float32.
BY_HAND = {"rtol": 1e-6, "atol": 1e-6}
#: A few layers in float32: R_ss − I keeps 1e-7 of entries near 1, divided by row sums above 1e-2.
RULES = {"rtol": 1e-5, "atol": 1e-6}
#: float32 through a network and back, with sums in another order: 1e-5 at the worst step; then as `RULES`.
NETWORK = {"rtol": 1e-4, "atol": 1e-5}
#: The same network with other batches: only the order of sums differs, by 1.3e-4 of a small pixel on some processors.
BATCHES = {"rtol": 5e-4, "atol": 1e-6}
#: float16 keeps 1e-3 of every activation and gradient of a small network; processors sum in different orders.
HALF = {"rtol": 4e-2, "atol": 0.0}


def array(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def attention_layer(kind: str, heads: Sequence[Any], gradients: Sequence[Any], grid: Grid) -> AttentionLayer:
    return AttentionLayer(kind, array(heads), array(gradients), grid)


def text_to_image_relevance(
    layers: Sequence[list[AttentionLayer]],
    finest: Grid,
    num_tokens: int,
    text_layers: Sequence[list[AttentionLayer]] = (),
) -> Tensor:
    """R_sq by dfengine's rules. Every layer is a list over the batch."""

    def weights_of(batch: list[AttentionLayer]) -> Tensor:
        pairs = [(layer.probabilities, layer.gradient) for layer in batch]
        return relevance_weights(*(torch.from_numpy(np.stack(part)).float() for part in zip(*pairs, strict=True)))

    text = torch.zeros(len(layers[0]), num_tokens, num_tokens)
    if text_layers:
        text = self_relevance([weights_of(batch) for batch in text_layers])
    relevancy = RelevanceRules(finest, text)
    for batch in layers:
        update = relevancy.self_attention if batch[0].kind == "image" else relevancy.cross_attention
        update(weights_of(batch), batch[0].grid)
    return relevancy.text_to_image


# By hand: three positions, two tokens, two heads. ∇A ⊙ A of the self-attention, clamped at 0, is
#   head 0: [0 1 0; 0 1/2 1; 0 0 0]  (−2 and the last row clamped),  head 1: [1 0 1; 0 3/2 0; 0 0 0]  (−1 clamped)
# so that Ā = [1/2 1/2 1/2; 0 1 1/2; 0 0 0]. Without clamping before the mean, Ā_02 would be −1/2.
SELF = attention_layer(
    "image",
    [
        [[1 / 2, 1 / 4, 1 / 4], [0, 1 / 2, 1 / 2], [1 / 4, 1 / 2, 1 / 4]],
        [[1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]],
    ],
    [[[0, 4, -8], [3, 1, 2], [-4, 0, -1]], [[4, 0, 2], [-2, 6, 0], [0, -3, 0]]],
    (1, 3),
)
# ∇A ⊙ A, clamped: head 0: [2 0; 0 3; 0 2], head 1: [0 0; 1 0; 0 2]; Ā = [1 0; 1/2 3/2; 0 2].
CROSS = attention_layer(
    "cross",
    [[[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 2, 1 / 2]], [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [1 / 3, 2 / 3]]],
    [[[4, -2], [0, 4], [-6, 4]], [[-4, 0], [2, 0], [0, 3]]],
    (1, 3),
)
# R_ss = I + Ā; R̄_ss = [4/3 1/3 1/3; 0 5/3 1/3; 0 0 1], the last row being 0/0 → 0, plus I; R_sq = R̄_ssᵀ Ā.
AFTER_CROSS = [[4 / 3, 0], [7 / 6, 5 / 2], [1 / 2, 5 / 2]]
# After the same self-attention again: R_sq + Ā R_sq.
AFTER_SELF = [[17 / 6, 5 / 2], [31 / 12, 25 / 4], [1 / 2, 5 / 2]]
# One text layer of one head with ∇A ⊙ A = Ā = [0 0; 1 3]: R_qq = [1 0; 1 4], R̄_qq = [1 0; 1/4 7/4].
TEXT = attention_layer("text", [[[1, 0], [1 / 4, 3 / 4]]], [[[-1, 2], [4, 4]]], (1, 2))
# AFTER_CROSS times R̄_qq.
WITH_TEXT = [[4 / 3, 0], [7 / 6 + 5 / 8, 35 / 8], [1 / 2 + 5 / 8, 35 / 8]]


@pytest.mark.parametrize(
    ("layers", "text_layers", "expected"),
    [
        ([CROSS], [], [[1, 0], [1 / 2, 3 / 2], [0, 2]]),
        ([SELF, CROSS], [], AFTER_CROSS),
        ([SELF, CROSS, SELF], [], AFTER_SELF),
        ([SELF, CROSS], [TEXT], WITH_TEXT),
    ],
    ids=["cross", "self, cross", "self, cross, self", "text, self, cross"],
)
def test_small_numbers_worked_out_by_hand(
    layers: list[AttentionLayer], text_layers: list[AttentionLayer], expected: list[list[float]]
) -> None:
    np.testing.assert_allclose(literal_relevance(layers, (1, 3), 2, text_layers), expected, rtol=1e-12, atol=1e-12)
    ours = text_to_image_relevance([[layer] for layer in layers], (1, 3), 2, [[layer] for layer in text_layers])
    assert_close(ours, torch.tensor([expected]), **BY_HAND)


def test_a_coarser_grid_worked_out_by_hand() -> None:
    # The first two of three positions lie on the first of two coarse ones: U = [1 0; 1 0; 0 1], D = [1/2 1/2 0; 0 0 1].
    assert coarse_positions((1, 3), (1, 2), torch.device("cpu")).tolist() == [0, 0, 1]
    assert average_rows(torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([0, 0, 1])).tolist() == [[[1.5], [5.0]]]
    # U Ā D = [1/2 1/2 2; 1/2 1/2 2; 0 0 3], R̄_ss = [7/6 1/6 2/3; 1/6 7/6 2/3; 0 0 2], U Ā of the other = [3 3 1]ᵀ.
    layers = [
        attention_layer("image", [[[1 / 2, 1 / 2], [0, 1]]], [[[2, 4], [1, 3]]], (1, 2)),
        attention_layer("cross", [[[1], [1]]], [[[3], [1]]], (1, 2)),
    ]
    np.testing.assert_allclose(literal_relevance(layers, (1, 3), 1), [[4], [4], [6]], rtol=1e-12)
    assert_close(
        text_to_image_relevance([[layer] for layer in layers], (1, 3), 1), torch.tensor([[[4.0], [4], [6]]]), **BY_HAND
    )


def test_parts_of_the_rules_worked_out_by_hand() -> None:
    A = relevance_weights(*(torch.from_numpy(part)[None].float() for part in (SELF.probabilities, SELF.gradient)))
    assert_close(A, torch.tensor([[[1 / 2, 1 / 2, 1 / 2], [0, 1, 1 / 2], [0, 0, 0]]]), **BY_HAND)
    normal = torch.tensor([[[1 / 3, 1 / 3, 1 / 3], [0, 2 / 3, 1 / 3], [0, 0, 0]]])
    assert_close(normalize_rows(A), normal, **BY_HAND)
    assert_close(self_relevance([A]), A, **BY_HAND)
    # (I + Ā)² = I + 2 Ā + Ā²
    assert_close(self_relevance([A, A]), 2 * A + A @ A, **BY_HAND)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9])
def test_small_relevance_keeps_its_precision(size: float) -> None:
    """R̄ divides by the scale of the gradients, so the image part must keep its precision at any scale."""
    layers = random_layers([("image", (4, 4)), ("image", (2, 2)), ("cross", (4, 4))], 5, 1, 0)
    for batch in layers:
        batch[:] = [
            AttentionLayer(layer.kind, layer.probabilities, layer.gradient * size, layer.grid) for layer in batch
        ]
    expected = literal_relevance([batch[0] for batch in layers], (4, 4), 5)
    ours = text_to_image_relevance(layers, (4, 4), 5)[0].numpy()
    np.testing.assert_allclose(ours / size, expected / size, rtol=1e-4, atol=1e-6)


def random_layers(
    kinds: Sequence[tuple[str, Grid]], num_tokens: int, count: int, seed: int
) -> list[list[AttentionLayer]]:
    """Layers of every kind and grid for a batch: softmax of noise, and noise as gradients."""
    random = np.random.default_rng(seed)

    def layer(kind: str, grid: Grid, heads: int) -> AttentionLayer:
        positions = num_tokens if kind == "text" else grid[0] * grid[1]
        shape = (heads, positions, positions if kind == "image" else num_tokens)
        weights = np.exp(2 * random.standard_normal(shape))
        gradient = random.standard_normal(shape)
        gradient[:, random.random(positions) < 0.1] = -1  # these rows are clamped to zero
        return AttentionLayer(kind, weights / weights.sum(-1, keepdims=True), gradient, grid)

    heads = [int(number) for number in random.integers(1, 4, len(kinds))]
    return [[layer(*kind, number) for _ in range(count)] for kind, number in zip(kinds, heads, strict=True)]


@pytest.mark.slow
@given(
    finest=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    others=st.lists(st.tuples(st.sampled_from(["image", "cross"]), st.floats(0, 1), st.floats(0, 1)), max_size=5),
    text_layers=st.integers(0, 2),
    num_tokens=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
@example((9, 5), [("image", 0.5, 0.5), ("cross", 0.5, 0.5), ("image", 0.3, 0.3)], 0, 4, 1)
@example((9, 5), [("image", 1.0, 1.0), ("cross", 0.5, 0.5), ("image", 0.5, 0.5), ("cross", 1.0, 1.0)], 2, 5, 2)
def test_random_layers_match_the_full_matrices(
    finest: Grid, others: list[tuple[str, float, float]], text_layers: int, num_tokens: int, seed: int
) -> None:
    def scaled(size: int, share: float) -> int:
        return round(1 + share * (size - 1))

    coarser = [(kind, (scaled(finest[0], rows), scaled(finest[1], columns))) for kind, rows, columns in others]
    kinds = [("image", finest), ("cross", finest), *coarser, ("image", finest), ("cross", finest)]
    layers = random_layers(kinds, num_tokens, 2, seed)
    texts = random_layers([("text", (1, num_tokens))] * text_layers, num_tokens, 2, seed + 1)
    ours = text_to_image_relevance(layers, finest, num_tokens, texts)
    for sample in range(2):
        image_layers, text = ([batch[sample] for batch in all_layers] for all_layers in (layers, texts))
        expected = literal_relevance(image_layers, finest, num_tokens, text)
        np.testing.assert_allclose(ours[sample].numpy(), expected, **RULES)


class ExplicitProcessor:
    """An attention processor that computes softmax(Q Kᵀ / √d) V explicitly and keeps the probabilities."""

    def __init__(self, keep: Callable[[str, Tensor], None]) -> None:
        self.keep = keep

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        q, k, v = (attn.head_to_batch_dim(part) for part in parts)  # [heads, s, d], of one sample
        A = torch.softmax(torch.einsum("hsd,htd->hst", q, k) / q.shape[-1] ** 0.5, dim=-1)
        A.retain_grad()
        self.keep("image" if encoder_hidden_states is None else "cross", A)
        out = attn.batch_to_head_dim(torch.einsum("hst,htd->hsd", A, v))
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def explicit_attention(unet: Any) -> Iterator[list[tuple[str, Grid, Tensor]]]:
    """Record the kind, the grid and the probabilities of every attention in the forward of one sample."""
    layers: list[tuple[str, Grid, Tensor]] = []
    grids: list[Grid] = []

    def record_grid(_: Any, args: tuple[Tensor, ...]) -> None:
        grids.append(tuple(args[0].shape[2:]))

    hooks = [
        module.register_forward_pre_hook(record_grid)
        for module in unet.modules()
        if type(module).__name__ == "Transformer2DModel"
    ]
    before = unet.attn_processors
    unet.set_attn_processor(ExplicitProcessor(lambda kind, A: layers.append((kind, grids[-1], A))))
    try:
        yield layers
    finally:
        unet.set_attn_processor(before)
        for hook in hooks:
            hook.remove()


def layers_of_network(denoiser: Any, path: Trajectory, step: int) -> list[AttentionLayer]:
    """The layers of one step, by the forward of diffusers and a plain backward of y = Σ ε under the prompt."""
    conditioning = dict(denoiser.encode_prompts([path.job.prompt]).tensors)
    x, t = path.latents[step : step + 1].clone().requires_grad_(), torch.tensor([path.job.timesteps[step]])
    with explicit_attention(denoiser.pipeline.unet) as layers:
        text = conditioning.pop("text")
        output = denoiser.pipeline.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=conditioning).sample
        denoiser.schedule.epsilon(output, x, t).sum().backward()
    return [AttentionLayer(kind, A.detach().numpy(), A.grad.numpy(), grid) for kind, grid, A in layers]


def sum_padding(values: np.ndarray, denoiser: Any, prompt: str) -> np.ndarray:
    """Values of positions [q, …], with those after the end token summed."""
    length = len(denoiser.pipeline.tokenizer(prompt).input_ids)
    return np.concatenate([values[:length], values[length:].sum(0, keepdims=True)])


def sample_trajectories(denoiser: Denoiser, prompts: Sequence[str]) -> list[Trajectory]:
    """Items with two steps each."""
    steps = tuple(denoiser.schedule.timesteps("uniform", 2))
    return trajectories(denoiser, [Job(prompt, steps, seed=seed) for seed, prompt in enumerate(prompts)])


def embedded_model(**options: Any) -> Denoiser:
    return Engine.from_pretrained("shapes", device="cpu", **options).denoiser


@pytest.fixture(scope="module")
def shapes() -> Denoiser:
    return embedded_model()


@pytest.fixture(scope="module")
def paths(shapes: Denoiser) -> list[Trajectory]:
    return sample_trajectories(shapes, CAPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"), [("shapes", None), ("sd21", None), ("sd21", (88, 56)), soak("sdxl", None)]
)
def test_real_networks_match_the_rules_applied_to_the_forward_of_diffusers(
    saved: Callable[[str], Path], shapes: Denoiser, name: str, image_size: tuple[int, int] | None
) -> None:
    # 88×56 pixels give latents of 11×7, whose sides are not divisible by two: 6×4, 3×2, 2×1.
    denoiser = shapes if name == "shapes" else load(saved(name), device="cpu", image_size=image_size)
    prompt = CAPTIONS[0] if name == "shapes" else PROMPT
    (path,) = sample_trajectories(denoiser, [prompt])
    layers_by_step = [layers_of_network(denoiser, path, step) for step in range(len(path))]
    maps = {
        self_attention: list(Relevance(self_attention=self_attention).explain(denoiser, [path]))
        for self_attention in (True, False)
    }
    for step, layers in enumerate(layers_by_step):
        finest, tokens = layers[0].grid, layers[1].probabilities.shape[2]
        cross = [layer for layer in layers if layer.kind == "cross"]
        assert len(layers) == 2 * len(cross) >= 4
        for self_attention, selected in ((True, layers), (False, cross)):
            ours = maps[self_attention][step]
            R_sq = literal_relevance(selected, finest, tokens)
            expected = sum_padding(R_sq.sum(0), denoiser, prompt)
            assert (ours.item, ours.step, ours.method) == (0, step, "relevance")
            assert ours.relevance is not None
            np.testing.assert_allclose(ours.relevance.numpy(), expected, **NETWORK)
            # The prompt's own tokens, without start, end and padding.
            own_relevance = torch.from_numpy(R_sq[:, 1 : len(expected) - 2].sum(1).reshape(1, 1, *finest)).float()
            resized = F.interpolate(own_relevance, denoiser.latent_shape[1:], mode="bilinear", align_corners=False)
            assert_close(ours.saliency, resized[0, 0], **NETWORK)
    assert not np.allclose(maps[True][0].relevance, maps[False][0].relevance, rtol=0.1)


def by_item_and_step(maps: Iterator[StepMap]) -> dict[tuple[int, int], StepMap]:
    return {(step_map.item, step_map.step): step_map for step_map in maps}


@pytest.mark.slow
@pytest.mark.parametrize("self_attention", [True, False])
def test_maps_do_not_depend_on_the_rest_of_the_batch(
    shapes: Denoiser, paths: list[Trajectory], self_attention: bool
) -> None:
    relevance = Relevance(self_attention=self_attention)
    together = by_item_and_step(relevance.explain(shapes, paths))
    assert list(together) == [(item, step) for item in range(2) for step in range(2)]
    for (item, step), ours in together.items():
        path = paths[item]
        job = dataclasses.replace(path.job, timesteps=path.job.timesteps[step : step + 1])
        tensors = {
            name: getattr(path, name)[step : step + 1] for name in ("latents", "epsilon", "x0", "signal", "noise")
        }
        (alone,) = relevance.explain(shapes, [dataclasses.replace(path, job=job, **tensors)])
        assert_close(ours.relevance, alone.relevance, **BATCHES)
        assert_close(ours.saliency, alone.saliency, **BATCHES)


@pytest.mark.slow
def test_maps_do_not_depend_on_batch_boundaries(
    shapes: Denoiser, paths: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = by_item_and_step(Relevance().explain(shapes, paths))
    monkeypatch.setattr(shapes, "batch_size", 12)  # three steps at a time: the second batch has one
    for key, ours in by_item_and_step(Relevance().explain(shapes, paths)).items():
        assert_close(ours.relevance, expected[key].relevance, **BATCHES)


@pytest.mark.slow
def test_only_completed_steps_are_skipped(
    shapes: Denoiser, paths: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "batch_size", 8)  # two steps at a time: one batch is done, and half of the other
    complete = by_item_and_step(Relevance().explain(shapes, paths))
    done = {(0, 0), (0, 1), (1, 0)}
    (ours,) = Relevance().explain(shapes, paths, done)
    assert (ours.item, ours.step) == (1, 1)
    # Equal batches give identical bits.
    assert torch.equal(ours.relevance, complete[1, 1].relevance)
    assert torch.equal(ours.saliency, complete[1, 1].saliency)
    assert list(by_item_and_step(Relevance().explain(shapes, paths, {(0, 1)}))) == [(0, 0), (1, 0), (1, 1)]
    assert list(Relevance().explain(shapes, paths, set(complete))) == []


@pytest.mark.slow
def test_float16_ranks_tokens_as_float32_does(shapes: Denoiser, paths: list[Trajectory]) -> None:
    half = embedded_model(dtype="float16")
    half_path = dataclasses.replace(paths[0], prompt=half.encode_prompts([CAPTIONS[0]]))
    pairs = ((shapes, paths[0]), (half, half_path))
    single, halved = (next(Relevance().explain(model, [path])) for model, path in pairs)
    assert spearmanr(single.relevance, halved.relevance).statistic > 0.95
    assert_close(halved.relevance, single.relevance, **HALF)


def test_all_padding_tokens_are_merged() -> None:
    tokens = Tokens("a", ("<|startoftext|>", "a", "<|endoftext|>", PADDING), ((0, 0), (0, 1), (0, 0), (0, 0)))
    assert by_token(torch.tensor([1.0, 2, 3, 4, 5, 6]), tokens).tolist() == [1, 2, 3, 15]
    full = dataclasses.replace(tokens, texts=tokens.texts[:3], spans=tokens.spans[:3])
    assert by_token(torch.tensor([1.0, 2, 3]), full).tolist() == [1, 2, 3]


def layers_of_network_and_text_encoder(
    denoiser: Any, path: Trajectory, step: int
) -> tuple[list[AttentionLayer], list[AttentionLayer]]:
    """Like `layers_of_network`, with the text encoder's layers by the forward of transformers."""
    pipeline = denoiser.pipeline
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    inputs = tokenizer(
        path.job.prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    embeddings = encoder.get_input_embeddings().weight
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    embeddings.requires_grad_(True)  # so that there is a graph
    try:
        encoded = encoder(inputs.input_ids, output_attentions=True)
        for A in encoded.attentions:
            A.retain_grad()
        x, t = path.latents[step : step + 1].clone().requires_grad_(), torch.tensor([path.job.timesteps[step]])
        with explicit_attention(pipeline.unet) as layers:
            output = pipeline.unet(x, t, encoder_hidden_states=encoded.last_hidden_state).sample
            denoiser.schedule.epsilon(output, x, t).sum().backward()
    finally:
        embeddings.requires_grad_(False)
        embeddings.grad = None
        encoder.set_attn_implementation(before)
    text = [
        AttentionLayer("text", A[0].detach().numpy(), A.grad[0].numpy(), (1, A.shape[-1])) for A in encoded.attentions
    ]
    return [AttentionLayer(kind, A.detach().numpy(), A.grad.numpy(), grid) for kind, grid, A in layers], text


@pytest.mark.slow
def test_relevance_through_the_text_encoder(shapes: Any, paths: list[Trajectory]) -> None:
    """Two prompts in one batch, each with the relevance propagated through its own encoding."""
    maps = by_item_and_step(Relevance(text_attention=True).explain(shapes, paths))
    without_text = by_item_and_step(Relevance().explain(shapes, paths))
    for (item, step), ours in maps.items():
        layers, text = layers_of_network_and_text_encoder(shapes, paths[item], step)
        R_sq = literal_relevance(layers, layers[0].grid, layers[1].probabilities.shape[2], text)
        expected = sum_padding(R_sq.sum(0), shapes, CAPTIONS[item])
        assert ours.relevance is not None
        np.testing.assert_allclose(ours.relevance.numpy(), expected, **NETWORK)
        assert not torch.allclose(ours.relevance, without_text[item, step].relevance, rtol=0.1)
    assert not any(parameter.requires_grad for parameter in shapes.pipeline.text_encoder.parameters())


def test_small_products_do_not_underflow_in_half_precision() -> None:
    """1e-4 · 1e-4 underflows in float16."""
    small = torch.full((1, 2, 1, 1), 1e-4, dtype=torch.float16)
    assert_close(relevance_weights(small, small), torch.full((1, 1, 1), 1e-8), rtol=1e-3, atol=0)


def test_large_queries_and_keys_do_not_overflow_in_half_precision() -> None:
    """60 · 60 · 64 overflows in float16, but an eighth of it, the argument of the softmax, does not."""
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)
    k = torch.cat([q[:, :, :1], q[:, :, 1:] / 2], dim=2)
    probabilities: list[Tensor] = []
    attend = hooked_attention(lambda A, grid: probabilities.append(A) or A, {2: (1, 2)})
    assert_close(attend(q, k, k), q)
    assert_close(probabilities[0], torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float16))


def test_non_finite_relevance_is_reported(shapes: Any, paths: list[Trajectory]) -> None:
    (path, *_) = paths
    broken = dataclasses.replace(path, latents=path.latents * float("nan"))
    with pytest.warns(UserWarning, match="the relevance of step 0 is not finite"):
        next(Relevance().explain(shapes, [broken]))
