"""Explanations of a pipeline include a LoRA that the caller loaded into it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from marks import soak
from peft import LoraConfig, get_peft_model_state_dict
from reduced import CLOSE, engine_and_pipeline_latents, pipeline_of
from torch.testing import assert_close

from dfengine.models import adapt, load

PROMPT = "a photo of a cat"


@pytest.mark.soak
@pytest.mark.parametrize("name", ["sd15", soak("sdxl")])
def test_a_loaded_lora_is_part_of_the_model(saved: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    donor = pipeline_of(saved(name))
    torch.manual_seed(0)
    donor.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(donor.unet))
    type(donor).save_lora_weights(tmp_path, unet_lora_layers=layers)

    pipeline = pipeline_of(saved(name))
    pipeline.load_lora_weights(tmp_path)
    ours, theirs = engine_and_pipeline_latents(adapt(pipeline), pipeline, PROMPT, {}, {})
    assert_close(ours, theirs, **CLOSE)
    without, _ = engine_and_pipeline_latents(load(saved(name), device="cpu"), pipeline, PROMPT, {}, {})
    assert (without - ours).abs().max() > 0.1
