"""Relevance against values worked out by hand, the rules written out in full matrices, and diffusers' own forward."""

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

#: Sums of at most some tens of small rational numbers in float32, a few of which it does not have exactly.
BY_HAND = {"rtol": 1e-6, "atol": 1e-6}
#: A few layers in float32: R_ss − I keeps 1e-7 of entries near 1, to be divided by row sums above 1e-2.
RULES = {"rtol": 1e-5, "atol": 1e-6}
#: float32 through a whole network and back, its sums in another order: 1e-5 at the worst step; then as `RULES`.
NETWORK = {"rtol": 1e-4, "atol": 1e-5}
#: One network with other batches: only the order of its sums differs, by 1.3e-4 of a small pixel on some processors.
BATCHES = {"rtol": 5e-4, "atol": 1e-6}
#: float16 keeps 1e-3 of every activation and gradient, over a small network; processors sum it differently.
HALF = {"rtol": 4e-2, "atol": 0.0}


def array(values: Any) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def products(kind: str, heads: Sequence[Any], gradients: Sequence[Any], grid: Grid) -> AttentionLayer:
    return AttentionLayer(kind, array(heads), array(gradients), grid)


def by_the_product(
    layers: Sequence[list[AttentionLayer]],
    finest: Grid,
    num_tokens: int,
    text_layers: Sequence[list[AttentionLayer]] = (),
) -> Tensor:
    """R_sq of dfengine's rules; every layer is the list of a batch's."""

    def gathered(batch: list[AttentionLayer]) -> Tensor:
        pairs = [(layer.probabilities, layer.gradient) for layer in batch]
        return relevance_weights(*(torch.from_numpy(np.stack(part)).float() for part in zip(*pairs, strict=True)))

    text = torch.zeros(len(layers[0]), num_tokens, num_tokens)
    if text_layers:
        text = self_relevance([gathered(batch) for batch in text_layers])
    relevancy = RelevanceRules(finest, text)
    for batch in layers:
        pass_on = relevancy.self_attention if batch[0].kind == "image" else relevancy.cross_attention
        pass_on(gathered(batch), batch[0].grid)
    return relevancy.text_to_image


# By hand: three positions, two tokens, two heads. ∇A ⊙ A of the self-attention is, cut off at 0,
#   head 0: [0 1 0; 0 1/2 1; 0 0 0]  (−2 and the last row cut off),  head 1: [1 0 1; 0 3/2 0; 0 0 0]  (−1 cut off)
# so that Ā = [1/2 1/2 1/2; 0 1 1/2; 0 0 0]: without the cut before the mean, Ā_02 would be −1/2.
SELF = products(
    "image",
    [
        [[1 / 2, 1 / 4, 1 / 4], [0, 1 / 2, 1 / 2], [1 / 4, 1 / 2, 1 / 4]],
        [[1 / 4, 1 / 4, 1 / 2], [1 / 2, 1 / 4, 1 / 4], [1 / 3, 1 / 3, 1 / 3]],
    ],
    [[[0, 4, -8], [3, 1, 2], [-4, 0, -1]], [[4, 0, 2], [-2, 6, 0], [0, -3, 0]]],
    (1, 3),
)
# ∇A ⊙ A, cut off: head 0: [2 0; 0 3; 0 2], head 1: [0 0; 1 0; 0 2]; Ā = [1 0; 1/2 3/2; 0 2].
CROSS = products(
    "cross",
    [[[1 / 2, 1 / 2], [1 / 4, 3 / 4], [1 / 2, 1 / 2]], [[1 / 4, 3 / 4], [1 / 2, 1 / 2], [1 / 3, 2 / 3]]],
    [[[4, -2], [0, 4], [-6, 4]], [[-4, 0], [2, 0], [0, 3]]],
    (1, 3),
)
# R_ss = I + Ā; R̄_ss = [4/3 1/3 1/3; 0 5/3 1/3; 0 0 1], the last row being 0/0 → 0, plus I; R_sq = R̄_ssᵀ Ā.
AFTER_CROSS = [[4 / 3, 0], [7 / 6, 5 / 2], [1 / 2, 5 / 2]]
# The same self-attention again: R_sq + Ā R_sq.
AFTER_SELF = [[17 / 6, 5 / 2], [31 / 12, 25 / 4], [1 / 2, 5 / 2]]
# One text layer of one head with ∇A ⊙ A = Ā = [0 0; 1 3]: R_qq = [1 0; 1 4], R̄_qq = [1 0; 1/4 7/4].
TEXT = products("text", [[[1, 0], [1 / 4, 3 / 4]]], [[[-1, 2], [4, 4]]], (1, 2))
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
    ours = by_the_product([[layer] for layer in layers], (1, 3), 2, [[layer] for layer in text_layers])
    assert_close(ours, torch.tensor([expected]), **BY_HAND)


def test_a_coarser_grid_worked_out_by_hand() -> None:
    # Of three positions two lie on the first of two coarse ones: U = [1 0; 1 0; 0 1], D = [1/2 1/2 0; 0 0 1].
    assert coarse_positions((1, 3), (1, 2), torch.device("cpu")).tolist() == [0, 0, 1]
    assert average_rows(torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([0, 0, 1])).tolist() == [[[1.5], [5.0]]]
    # U Ā D = [1/2 1/2 2; 1/2 1/2 2; 0 0 3], R̄_ss = [7/6 1/6 2/3; 1/6 7/6 2/3; 0 0 2], U Ā of the other = [3 3 1]ᵀ.
    layers = [
        products("image", [[[1 / 2, 1 / 2], [0, 1]]], [[[2, 4], [1, 3]]], (1, 2)),
        products("cross", [[[1], [1]]], [[[3], [1]]], (1, 2)),
    ]
    np.testing.assert_allclose(literal_relevance(layers, (1, 3), 1), [[4], [4], [6]], rtol=1e-12)
    assert_close(by_the_product([[layer] for layer in layers], (1, 3), 1), torch.tensor([[[4.0], [4], [6]]]), **BY_HAND)


def test_parts_of_the_rules_worked_out_by_hand() -> None:
    A = relevance_weights(*(torch.from_numpy(part)[None].float() for part in (SELF.probabilities, SELF.gradient)))
    assert_close(A, torch.tensor([[[1 / 2, 1 / 2, 1 / 2], [0, 1, 1 / 2], [0, 0, 0]]]), **BY_HAND)
    normal = torch.tensor([[[1 / 3, 1 / 3, 1 / 3], [0, 2 / 3, 1 / 3], [0, 0, 0]]])
    assert_close(normalize_rows(A), normal, **BY_HAND)
    assert_close(self_relevance([A]), A, **BY_HAND)
    # (I + Ā)² = I + 2 Ā + Ā²
    assert_close(self_relevance([A, A]), 2 * A + A @ A, **BY_HAND)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-9])
def test_small_relevance_is_not_lost_beside_the_ones_of_r(size: float) -> None:
    """Whatever size gradients have: R̄ divides it out, so the image's part must keep its digits."""
    layers = random_layers([("image", (4, 4)), ("image", (2, 2)), ("cross", (4, 4))], 5, 1, 0)
    for batch in layers:
        batch[:] = [AttentionLayer(one.kind, one.probabilities, one.gradient * size, one.grid) for one in batch]
    expected = literal_relevance([batch[0] for batch in layers], (4, 4), 5)
    ours = by_the_product(layers, (4, 4), 5)[0].numpy()
    np.testing.assert_allclose(ours / size, expected / size, rtol=1e-4, atol=1e-6)


def random_layers(
    kinds: Sequence[tuple[str, Grid]], num_tokens: int, count: int, seed: int
) -> list[list[AttentionLayer]]:
    """Of every kind and grid the layers of a batch: softmax of noise, and gradients of noise."""
    generator = np.random.default_rng(seed)

    def layer(kind: str, grid: Grid, heads: int) -> AttentionLayer:
        positions = num_tokens if kind == "text" else grid[0] * grid[1]
        shape = (heads, positions, positions if kind == "image" else num_tokens)
        weights = np.exp(2 * generator.standard_normal(shape))
        gradient = generator.standard_normal(shape)
        gradient[:, generator.random(positions) < 0.1] = -1  # nothing is left of these rows
        return AttentionLayer(kind, weights / weights.sum(-1, keepdims=True), gradient, grid)

    heads = [int(number) for number in generator.integers(1, 4, len(kinds))]
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
def test_random_layers_give_what_the_full_matrices_give(
    finest: Grid, others: list[tuple[str, float, float]], text_layers: int, num_tokens: int, seed: int
) -> None:
    def part(size: int, share: float) -> int:
        return round(1 + share * (size - 1))

    coarser = [(kind, (part(finest[0], rows), part(finest[1], columns))) for kind, rows, columns in others]
    kinds = [("image", finest), ("cross", finest), *coarser, ("image", finest), ("cross", finest)]
    layers = random_layers(kinds, num_tokens, 2, seed)
    texts = random_layers([("text", (1, num_tokens))] * text_layers, num_tokens, 2, seed + 1)
    ours = by_the_product(layers, finest, num_tokens, texts)
    for sample in range(2):
        alone, text = ([batch[sample] for batch in all_layers] for all_layers in (layers, texts))
        expected = literal_relevance(alone, finest, num_tokens, text)
        np.testing.assert_allclose(ours[sample].numpy(), expected, **RULES)


class Explicit:
    """An attention processor that computes softmax(Q Kᵀ / √d) V as it stands, and keeps the probabilities."""

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
        told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        parts = (attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told))
        q, k, v = (attn.head_to_batch_dim(part) for part in parts)  # [heads, s, d], of one sample
        A = torch.softmax(torch.einsum("hsd,htd->hst", q, k) / q.shape[-1] ** 0.5, dim=-1)
        A.retain_grad()
        self.keep("image" if encoder_hidden_states is None else "cross", A)
        out = attn.batch_to_head_dim(torch.einsum("hst,htd->hsd", A, v))
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def explicit_attention(unet: Any) -> Iterator[list[tuple[str, Grid, Tensor]]]:
    """While inside, every attention of a forward of one sample is kept: its kind, its grid and its probabilities."""
    kept: list[tuple[str, Grid, Tensor]] = []
    grids: list[Grid] = []

    def enter(_: Any, args: tuple[Tensor, ...]) -> None:
        grids.append(tuple(args[0].shape[2:]))

    hooks = [
        module.register_forward_pre_hook(enter)
        for module in unet.modules()
        if type(module).__name__ == "Transformer2DModel"
    ]
    before = unet.attn_processors
    unet.set_attn_processor(Explicit(lambda kind, A: kept.append((kind, grids[-1], A))))
    try:
        yield kept
    finally:
        unet.set_attn_processor(before)
        for hook in hooks:
            hook.remove()


def literal_of_network(denoiser: Any, path: Trajectory, step: int) -> list[AttentionLayer]:
    """The layers of one step, by diffusers' own forward and a plain backward of y = Σ ε under the prompt."""
    told = dict(denoiser.encode_prompts([path.job.prompt]).tensors)
    x, t = path.latents[step : step + 1].clone().requires_grad_(), torch.tensor([path.job.timesteps[step]])
    with explicit_attention(denoiser.pipeline.unet) as kept:
        text = told.pop("text")
        output = denoiser.pipeline.unet(x, t, encoder_hidden_states=text, added_cond_kwargs=told).sample
        denoiser.schedule.epsilon(output, x, t).sum().backward()
    return [AttentionLayer(kind, A.detach().numpy(), A.grad.numpy(), grid) for kind, grid, A in kept]


def all_padding_in_one(values: np.ndarray, denoiser: Any, prompt: str) -> np.ndarray:
    """Values of positions [q, …] with those behind the end token summed."""
    length = len(denoiser.pipeline.tokenizer(prompt).input_ids)
    return np.concatenate([values[:length], values[length:].sum(0, keepdims=True)])


def sampled(denoiser: Denoiser, prompts: Sequence[str]) -> list[Trajectory]:
    """Items with two steps each."""
    steps = tuple(denoiser.schedule.timesteps("uniform", 2))
    return trajectories(denoiser, [Job(prompt, steps, seed=seed) for seed, prompt in enumerate(prompts)])


def embedded(**options: Any) -> Denoiser:
    return Engine.from_pretrained("shapes", device="cpu", **options).denoiser


@pytest.fixture(scope="module")
def shapes() -> Denoiser:
    return embedded()


@pytest.fixture(scope="module")
def paths(shapes: Denoiser) -> list[Trajectory]:
    return sampled(shapes, CAPTIONS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"), [("shapes", None), ("sd21", None), ("sd21", (88, 56)), soak("sdxl", None)]
)
def test_real_networks_give_what_the_rules_make_of_diffusers_own_forward(
    saved: Callable[[str], Path], shapes: Denoiser, name: str, image_size: tuple[int, int] | None
) -> None:
    # 88×56 pixels are latents of 11×7, whose sides do not halve evenly: 6×4, 3×2, 2×1.
    denoiser = shapes if name == "shapes" else load(saved(name), device="cpu", image_size=image_size)
    prompt = CAPTIONS[0] if name == "shapes" else PROMPT
    (path,) = sampled(denoiser, [prompt])
    seen = [literal_of_network(denoiser, path, step) for step in range(len(path))]
    made = {on: list(Relevance(self_attention=on).explain(denoiser, [path])) for on in (True, False)}
    for step, layers in enumerate(seen):
        finest, tokens = layers[0].grid, layers[1].probabilities.shape[2]
        cross = [layer for layer in layers if layer.kind == "cross"]
        assert len(layers) == 2 * len(cross) >= 4
        for on, chosen in ((True, layers), (False, cross)):
            ours = made[on][step]
            R_sq = literal_relevance(chosen, finest, tokens)
            expected = all_padding_in_one(R_sq.sum(0), denoiser, prompt)
            assert (ours.item, ours.step, ours.method) == (0, step, "relevance")
            assert ours.relevance is not None
            np.testing.assert_allclose(ours.relevance.numpy(), expected, **NETWORK)
            # Between start, end and padding: the prompt's own tokens.
            own = torch.from_numpy(R_sq[:, 1 : len(expected) - 2].sum(1).reshape(1, 1, *finest)).float()
            resized = F.interpolate(own, denoiser.latent_shape[1:], mode="bilinear", align_corners=False)
            assert_close(ours.saliency, resized[0, 0], **NETWORK)
    assert not np.allclose(made[True][0].relevance, made[False][0].relevance, rtol=0.1)


def keyed(maps: Iterator[StepMap]) -> dict[tuple[int, int], StepMap]:
    return {(one.item, one.step): one for one in maps}


@pytest.mark.slow
@pytest.mark.parametrize("self_attention", [True, False])
def test_what_is_in_a_batch_does_not_matter(shapes: Denoiser, paths: list[Trajectory], self_attention: bool) -> None:
    relevance = Relevance(self_attention=self_attention)
    together = keyed(relevance.explain(shapes, paths))
    assert list(together) == [(item, step) for item in range(2) for step in range(2)]
    for (item, step), ours in together.items():
        path = paths[item]
        only = dataclasses.replace(path.job, timesteps=path.job.timesteps[step : step + 1])
        part = {name: getattr(path, name)[step : step + 1] for name in ("latents", "epsilon", "x0", "signal", "noise")}
        (alone,) = relevance.explain(shapes, [dataclasses.replace(path, job=only, **part)])
        assert_close(ours.relevance, alone.relevance, **BATCHES)
        assert_close(ours.saliency, alone.saliency, **BATCHES)


@pytest.mark.slow
def test_batches_cut_in_any_place_make_the_same(
    shapes: Denoiser, paths: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = keyed(Relevance().explain(shapes, paths))
    monkeypatch.setattr(shapes, "batch_size", 12)  # three steps at a time: the second batch has one
    for key, ours in keyed(Relevance().explain(shapes, paths)).items():
        assert_close(ours.relevance, whole[key].relevance, **BATCHES)


@pytest.mark.slow
def test_done_leaves_out_what_it_names_and_nothing_else(
    shapes: Denoiser, paths: list[Trajectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "batch_size", 8)  # two steps at a time: a whole batch is done, and half of the other
    whole = keyed(Relevance().explain(shapes, paths))
    done = {(0, 0), (0, 1), (1, 0)}
    (ours,) = Relevance().explain(shapes, paths, done)
    assert (ours.item, ours.step) == (1, 1)
    # The batches are the same: so are the bits.
    assert torch.equal(ours.relevance, whole[1, 1].relevance)
    assert torch.equal(ours.saliency, whole[1, 1].saliency)
    assert list(keyed(Relevance().explain(shapes, paths, {(0, 1)}))) == [(0, 0), (1, 0), (1, 1)]
    assert list(Relevance().explain(shapes, paths, set(whole))) == []


@pytest.mark.slow
def test_float16_ranks_tokens_as_float32_does(shapes: Denoiser, paths: list[Trajectory]) -> None:
    half = embedded(dtype="float16")
    told = dataclasses.replace(paths[0], prompt=half.encode_prompts([CAPTIONS[0]]))
    wide, narrow = (next(Relevance().explain(model, [path])) for model, path in ((shapes, paths[0]), (half, told)))
    assert spearmanr(wide.relevance, narrow.relevance).statistic > 0.95
    assert_close(narrow.relevance, wide.relevance, **HALF)


def test_all_padding_is_one_token() -> None:
    tokens = Tokens("a", ("<|startoftext|>", "a", "<|endoftext|>", PADDING), ((0, 0), (0, 1), (0, 0), (0, 0)))
    assert by_token(torch.tensor([1.0, 2, 3, 4, 5, 6]), tokens).tolist() == [1, 2, 3, 15]
    full = dataclasses.replace(tokens, texts=tokens.texts[:3], spans=tokens.spans[:3])
    assert by_token(torch.tensor([1.0, 2, 3]), full).tolist() == [1, 2, 3]


def literal_with_text(denoiser: Any, path: Trajectory, step: int) -> tuple[list[AttentionLayer], list[AttentionLayer]]:
    """As `literal_of_network`, and the text encoder's layers by transformers' own forward."""
    pipeline = denoiser.pipeline
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    read = tokenizer(path.job.prompt, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    embedded = encoder.get_input_embeddings().weight
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    embedded.requires_grad_(True)  # so that there is a graph
    try:
        told = encoder(read.input_ids, output_attentions=True)
        for A in told.attentions:
            A.retain_grad()
        x, t = path.latents[step : step + 1].clone().requires_grad_(), torch.tensor([path.job.timesteps[step]])
        with explicit_attention(pipeline.unet) as kept:
            output = pipeline.unet(x, t, encoder_hidden_states=told.last_hidden_state).sample
            denoiser.schedule.epsilon(output, x, t).sum().backward()
    finally:
        embedded.requires_grad_(False)
        embedded.grad = None
        encoder.set_attn_implementation(before)
    text = [AttentionLayer("text", A[0].detach().numpy(), A.grad[0].numpy(), (1, A.shape[-1])) for A in told.attentions]
    return [AttentionLayer(kind, A.detach().numpy(), A.grad.numpy(), grid) for kind, grid, A in kept], text


@pytest.mark.slow
def test_with_the_text_encoders_attention(shapes: Any, paths: list[Trajectory]) -> None:
    """Two prompts in one batch, each with the relevance that its own encoding passes on."""
    made = keyed(Relevance(text_attention=True).explain(shapes, paths))
    plain = keyed(Relevance().explain(shapes, paths))
    for (item, step), ours in made.items():
        layers, text = literal_with_text(shapes, paths[item], step)
        R_sq = literal_relevance(layers, layers[0].grid, layers[1].probabilities.shape[2], text)
        expected = all_padding_in_one(R_sq.sum(0), shapes, CAPTIONS[item])
        assert ours.relevance is not None
        np.testing.assert_allclose(ours.relevance.numpy(), expected, **NETWORK)
        assert not torch.allclose(ours.relevance, plain[item, step].relevance, rtol=0.1)
    assert not any(parameter.requires_grad for parameter in shapes.pipeline.text_encoder.parameters())


def test_small_products_are_not_lost_in_half_precision() -> None:
    """1e-4 · 1e-4 is nothing in float16."""
    small = torch.full((1, 2, 1, 1), 1e-4, dtype=torch.float16)
    assert_close(relevance_weights(small, small), torch.full((1, 1, 1), 1e-8), rtol=1e-3, atol=0)


def test_large_queries_and_keys_stay_within_half_precision() -> None:
    """60 · 60 · 64 is beyond float16, and an eighth of it, which is what the softmax is of, is not."""
    q = torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16)
    k = torch.cat([q[:, :, :1], q[:, :, 1:] / 2], dim=2)
    seen: list[Tensor] = []
    attend = hooked_attention(lambda A, grid: seen.append(A) or A, {2: (1, 2)})
    assert_close(attend(q, k, k), q)
    assert_close(seen[0], torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float16))


def test_relevance_that_is_not_finite_is_told_of(shapes: Any, paths: list[Trajectory]) -> None:
    (one, *_) = paths
    broken = dataclasses.replace(one, latents=one.latents * float("nan"))
    with pytest.warns(UserWarning, match="the relevance of step 0 is not finite"):
        next(Relevance().explain(shapes, [broken]))
