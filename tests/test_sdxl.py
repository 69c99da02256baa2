"""Stable Diffusion XL: two text encoders, added conditions, and a codec that overflows in float16."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from reduced import CLOSE, engine_and_pipeline_latents, pipeline_of
from torch.testing import assert_close

from dfengine.models import adapt
from dfengine.models.loading import quiet
from dfengine.models.unet.stable_diffusion_xl import StableDiffusionXL

PROMPTS = ["a photo of a cat", "an oil painting of a tree"]
KINDS = [StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline]


@pytest.fixture
def pipeline(saved: Callable[[str], Path]) -> Any:
    return pipeline_of(saved("sdxl"))


def adapted(pipeline: Any, **options: Any) -> StableDiffusionXL:
    denoiser = adapt(pipeline, **options)
    assert isinstance(denoiser, StableDiffusionXL)
    return denoiser


def kind_of(kind: Any, pipeline: Any, **options: Any) -> Any:
    with quiet():
        return kind(**pipeline.components, **options)


@pytest.mark.soak
@torch.no_grad()
def test_conditions_match_those_of_the_pipeline(pipeline: Any) -> None:
    """Texts and pooled texts of prompts, of empty prompts and of a blank."""
    denoiser = adapted(pipeline)
    got, blank, empty = (denoiser.encode_prompts(prompts).tensors for prompts in (PROMPTS, [" "] * 2, [""] * 2))
    text, no_text, pooled, no_pooled = pipeline.encode_prompt(PROMPTS)
    assert_close((got["text"], got["text_embeds"]), (text, pooled), rtol=0, atol=1e-6)
    assert_close((empty["text"], empty["text_embeds"]), (no_text, no_pooled), rtol=0, atol=0)
    assert not empty["text"].any()
    _, no_text, _, no_pooled = pipeline.encode_prompt(PROMPTS, negative_prompt=" ")
    assert_close((blank["text"], blank["text_embeds"]), (no_text, no_pooled), rtol=0, atol=1e-6)
    assert blank["text"].any()
    mixed = denoiser.encode_prompts([PROMPTS[0], ""]).tensors
    assert_close(mixed["text"], torch.stack([text[0], torch.zeros_like(text[0])]), rtol=0, atol=1e-5)
    assert_close(mixed["text_embeds"][1], torch.zeros_like(pooled[0]), rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_pooled_text_is_read_at_the_end_of_the_text(pipeline: Any) -> None:
    denoiser = adapted(pipeline)
    tokens = pipeline.tokenizer_2(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder_2(tokens).last_hidden_state
    ends = (tokens == pipeline.tokenizer_2.eos_token_id).int().argmax(1)
    assert ends[0] != ends[1]
    want = pipeline.text_encoder_2.text_projection(states[torch.arange(2), ends])
    assert_close(denoiser.encode_prompts(PROMPTS).tensors["text_embeds"], want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_size_conditions_are_those_of_the_image(pipeline: Any) -> None:
    with torch.no_grad():
        sizes = adapted(pipeline, image_size=(64, 96)).encode_prompts(PROMPTS).tensors["time_ids"]
    assert sizes.tolist() == [[64, 96, 0, 0, 64, 96]] * 2


@pytest.mark.soak
def test_empty_prompts_are_encoded_if_the_pipeline_is_configured_so(pipeline: Any) -> None:
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    denoiser = adapted(pipeline)
    with torch.no_grad():
        assert denoiser.encode_prompts([""]).tensors["text"].any()
    ours, theirs = engine_and_pipeline_latents(denoiser, pipeline, PROMPTS[0], {}, {})
    assert_close(ours, theirs, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_img2img_and_inpaint_pipelines_are_the_same_model(pipeline: Any, kind: Any) -> None:
    denoiser, same = adapted(pipeline), adapted(kind_of(kind, pipeline))
    x = torch.randn(1, *denoiser.latent_shape)
    with torch.no_grad():
        want, got = (each(x, torch.tensor([500]), each.encode_prompts(PROMPTS[:1])) for each in (denoiser, same))
    assert torch.equal(got, want)


@pytest.mark.slow
def test_the_refiner_is_refused(pipeline: Any) -> None:
    refiner = kind_of(StableDiffusionXLImg2ImgPipeline, pipeline, requires_aesthetics_score=True)
    pipeline.text_encoder = pipeline.tokenizer = None
    for candidate, missing in ((refiner, "no plain size condition"), (pipeline, "no text_encoder and no tokenizer")):
        with pytest.raises(ValueError, match=f"the pipeline has {missing}: .*the refiner is not supported"):
            adapt(candidate)


@pytest.mark.slow
def test_a_prompt_must_fit_both_tokenizers(pipeline: Any) -> None:
    pipeline.tokenizer_2.model_max_length = 10
    denoiser = adapted(pipeline)
    with torch.no_grad(), pytest.raises(ValueError, match=r"has 9 tokens and the model takes 8: 'of' would be cut"):
        denoiser.encode_prompts(["of " * 8 + "of"])
    pipeline.tokenizer_2.model_max_length, pipeline.tokenizer.model_max_length = 77, 10
    with torch.no_grad(), pytest.raises(ValueError, match=r"has 9 tokens and the model takes 8: 'of' would be cut"):
        denoiser.encode_prompts(["of " * 8 + "of"])


@pytest.mark.soak
@torch.no_grad()
def test_the_codec_is_upcast_only_while_it_is_used(pipeline: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Latents that overflow a float16 decoder are decoded in float32; the pipeline keeps its dtype."""
    single = adapted(pipeline)
    x = 4 * torch.randn(2, *single.latent_shape, generator=torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, *single.image_shape, generator=torch.Generator().manual_seed(1))
    pipeline.vae.decoder.conv_in.weight.mul_(2000)
    rounded = pipeline.vae.state_dict()
    pipeline.vae.load_state_dict({name: weight.half().float() for name, weight in rounded.items()})
    want = single.decode(x), single.encode(images)
    with quiet():
        half = adapted(pipeline.to(torch.float16))
    assert half.vae.dtype == torch.float16
    assert_close((half.decode(x), half.encode(images)), want, rtol=1e-5, atol=1e-5)
    assert half.vae.dtype == torch.float16
    assert half.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    half.vae.register_to_config(force_upcast=False)
    assert not half.decode(x).isfinite().all()
    with pytest.raises(RuntimeError):
        half.decode(x[:, :3])
    assert half.vae.dtype == torch.float16
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@torch.no_grad()
def test_latents_are_normalised_as_configured_by_the_codec(pipeline: Any) -> None:
    mean, std = [0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 0.5, 3.0]
    plain = adapted(pipeline)
    x = torch.randn(1, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, *plain.image_shape, generator=torch.Generator().manual_seed(1))
    encoded, scale = plain.encode(images), pipeline.vae.config.scaling_factor
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    denoiser = adapted(pipeline)
    row = torch.tensor([mean, std])[:, None, :, None, None]
    assert_close(denoiser.encode(images), (encoded / scale - row[0]) / row[1] * scale, rtol=1e-5, atol=1e-5)
    want = pipeline.image_processor.postprocess(
        pipeline.vae.decode(x * row[1] / scale + row[0]).sample, output_type="pt"
    )
    assert_close(denoiser.decode(x), want, rtol=1e-5, atol=1e-5)
