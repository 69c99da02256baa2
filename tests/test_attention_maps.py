"""Cross-attention maps against a processor of diffusers' interface, and the restored state of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from analytic import Analytic
from diffusers.models.attention_processor import SlicedAttnProcessor
from marks import soak
from reduced import PROMPT
from torch import Tensor
from torch.testing import assert_close

from dfengine import Attention, Cam, Engine, Relevance, Rise
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.explain import StepMap
from dfengine.models import load

#: Averages of a float32 softmax whose sums are in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
CAPTION = "a red circle above a red square on a gray background"


class RecordingProcessor:
    """An attention processor of diffusers' interface that keeps the probabilities of cross-attention."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(text), attention.to_v(text)
        query, key, value = (attention.head_to_batch_dim(part) for part in (query, key, value))
        probabilities = attention.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None:
            self.maps.append(probabilities)
        return attention.to_out[0](attention.batch_to_head_dim(probabilities @ value))


def attention_literally(denoiser: Any, path: Trajectory, step: int) -> Tensor:
    """Maps [positions of the text, h, w] by the forward of diffusers, one sample at a time."""
    processor, before = RecordingProcessor(), denoiser.unet.attn_processors
    denoiser.unet.set_attn_processor(processor)
    with torch.no_grad():
        denoiser.predict(path.latents[step : step + 1], torch.tensor([path.job.timesteps[step]]), path.prompt)
    denoiser.unet.set_attn_processor(before)
    _, height, width = denoiser.latent_shape
    resized = []
    for maps in processor.maps:
        positions = maps.shape[1]
        v = round((positions * width / height) ** 0.5)
        grid = maps.mean(0).T.reshape(1, -1, positions // v, v)
        resized.append(F.interpolate(grid, size=(height, width), mode="bilinear")[0])
    return torch.stack(resized).mean(0)


def maps_of(attention: Attention, denoiser: Denoiser, paths: list[Trajectory]) -> dict[tuple[int, int], StepMap]:
    return {(step_map.item, step_map.step): step_map for step_map in attention.explain(denoiser, paths)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "sd15", soak("sd21"), soak("sdxl")])
def test_maps_match_the_forward_of_diffusers(saved: Callable[[str], Path], name: str) -> None:
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser if name == "shapes" else load(saved(name))
    prompts = [CAPTION, "a pink star on a black background"] if name == "shapes" else [PROMPT, "a tree"]
    paths = trajectories(denoiser, [Engine(denoiser).job(prompt, num_steps=2, guidance=2.0) for prompt in prompts])
    for (item, step), step_map in maps_of(Attention(), denoiser, paths).items():
        expected, tokens = attention_literally(denoiser, paths[item], step), denoiser.tokens(prompts[item])
        assert step_map.word_maps is not None
        words = prompts[item].split()
        assert len(step_map.word_maps) == len(words)
        start = 0
        for word, word_map in zip(words, step_map.word_maps, strict=True):
            places = tokens.places(start, start + len(word))
            assert_close(word_map, expected[places].mean(0), msg=f"{word} of {name}", **CLOSE)
            start += len(word) + 1
        assert_close(step_map.saliency, expected[tokens.own].sum(0), **CLOSE)


def test_attention_sums_to_one_over_the_positions_of_the_text(tiny: Denoiser) -> None:
    """The word maps sum to the saliency, and the special tokens take the remainder to 1."""
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    (step_map,) = maps_of(Attention(), tiny, [path]).values()
    expected = attention_literally(tiny, path, 0)
    assert_close(expected.sum(0), torch.ones(tiny.latent_shape[1:]))
    assert step_map.word_maps is not None
    assert_close(step_map.word_maps.sum(0), step_map.saliency)
    assert 0 < step_map.saliency.min() < step_map.saliency.max() < 1


def test_repeated_words_and_phrases_are_averaged(tiny: Denoiser) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    (all_words,) = maps_of(Attention(), tiny, [path]).values()
    (selected,) = maps_of(Attention(words=("red", "red square", "circle")), tiny, [path]).values()
    assert all_words.word_maps is not None and selected.word_maps is not None  # noqa: PT018  # for the type checker
    _, red, circle, _, _, other, square, *_ = all_words.word_maps
    assert_close(selected.word_maps, torch.stack([(red + other) / 2, (other + square) / 2, circle]))


@pytest.mark.slow
def test_the_heat_map_of_a_repeated_word_is_averaged(tiny: Denoiser) -> None:
    engine = Engine(tiny)
    all_words, selected = (engine.explain(CAPTION, Attention(words), num_steps=1) for words in (None, "red"))
    np.testing.assert_allclose(all_words.heatmap("Red", 0), selected.heatmap("red", 0), atol=1e-5)
    with pytest.raises(ValueError, match="the map of the word 'red' has no layers"):
        all_words.heatmap("red", 0, layer="mid")


@pytest.mark.slow
def test_explainers_restore_the_model(tiny_folder: Path) -> None:
    """Masked forwards before and after give identical bits, with the same modules and processors."""
    denoiser = load(tiny_folder, device="cpu")
    unet = denoiser.unet  # type: ignore[attr-defined]

    def module_state() -> list[Any]:
        return [
            (
                name,
                type(module),
                type(getattr(module, "processor", None)),
                dict(module._forward_hooks),
                "forward" in vars(module),
            )
            for name, module in unet.named_modules()
        ]

    job = Engine(denoiser).job(CAPTION, num_steps=2)
    paths = trajectories(denoiser, [job])
    before, masks = module_state(), [step_map.saliency for step_map in Rise(20).explain(denoiser, paths)]
    for explainer in (Attention(), Relevance(), Relevance(text_attention=True), Cam()):
        list(explainer.explain(denoiser, paths))
        assert module_state() == before
        assert denoiser.pipeline.text_encoder.config._attn_implementation == "sdpa"  # type: ignore[attr-defined]
        again = [step_map.saliency for step_map in Rise(20).explain(denoiser, paths)]
        assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))
    assert not any(parameter.grad is not None for parameter in unet.parameters())


@pytest.mark.parametrize("explainer", [Attention(), Relevance()])
def test_an_unsupported_attention_processor_is_named_with_the_remedy(
    tiny_folder: Path, explainer: Attention | Relevance
) -> None:
    engine = Engine(load(tiny_folder, device="cpu"))
    engine.denoiser.unet.set_attn_processor(SlicedAttnProcessor(1))  # type: ignore[attr-defined]
    message = r"cannot be seen: .* has a SlicedAttnProcessor from .*unet\.set_default_attn_processor\(\)"
    with pytest.raises(ValueError, match=message):
        engine.explain(CAPTION, explainer, num_steps=1)
    engine.denoiser.unet.set_default_attn_processor()  # type: ignore[attr-defined]
    assert explainer.name in engine.explain(CAPTION, explainer, num_steps=1).maps


def test_words_that_are_not_in_the_prompt_are_rejected(tiny: Denoiser) -> None:
    with pytest.raises(ValueError, match="'horse' is not in the prompt 'a red circle"):
        Engine(tiny).explain(CAPTION, Attention(words=("red", "horse")), num_steps=1)
    with pytest.raises(ValueError, match="attention needs at least one word"):
        Attention(words=())
    assert Attention(words=("red", "red")) == Attention(words="red")


def test_a_model_that_does_not_expose_attention_is_rejected() -> None:
    denoiser = Analytic(lambda x_t, number: x_t)
    for explainer in (Attention(), Relevance()):
        with pytest.raises(ValueError, match="analytic does not expose its attention"):
            Engine(denoiser).explain("1", explainer, num_steps=1)
