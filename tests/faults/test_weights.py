"""Results of different weights are never mixed, and the caller's networks stay as they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from dfengine import Cam, Engine, Random, Relevance, Rise, store
from dfengine.diffusion.fingerprint import fingerprint
from dfengine.models.loading import quiet

CAPTION = "a red circle above a blue square on a gray background"


@pytest.fixture
def pipeline(tiny_folder: Path) -> Any:
    with quiet():
        return DiffusionPipeline.from_pretrained(tiny_folder)


def one_weight(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.mid_block.resnets[0].conv1.weight[3, 2, 1, 0] += 1e-3


def swapped_weights(pipeline: Any) -> None:
    """The same values in another order, the first where it was."""
    with torch.no_grad():
        weight = pipeline.unet.conv_in.weight
        weight[1:3] = weight[1:3].flip(0)


def a_weight_of(part: str) -> Callable[[Any], None]:
    def change(pipeline: Any) -> None:
        with torch.no_grad():
            weight = next(getattr(pipeline, part).parameters())
            weight[(0,) * weight.ndim] += 1

    return change


def free_u(pipeline: Any) -> None:
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def scheduler(pipeline: Any) -> None:
    pipeline.scheduler.register_to_config(prediction_type="v_prediction")


CHANGES = [one_weight, swapped_weights, a_weight_of("vae"), a_weight_of("text_encoder"), free_u, scheduler]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_changes_its_fingerprint(pipeline: Any, change: Callable[[Any], None]) -> None:
    before = Engine(pipeline).denoiser.fingerprint()
    assert Engine(pipeline).denoiser.fingerprint() == before
    change(pipeline)
    assert Engine(pipeline).denoiser.fingerprint() != before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_choice_and_scale_of_adapters_change_the_fingerprint(pipeline: Any) -> None:
    denoiser = Engine(pipeline).denoiser
    seen = [denoiser.fingerprint()]
    for name in ("one", "two"):  # both are zero, so that no map tells them apart
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
        seen.append(denoiser.fingerprint())
    pipeline.unet.set_adapters(["one"])
    seen.append(denoiser.fingerprint())
    pipeline.unet.set_adapters(["one"], weights=[0.5])
    seen.append(denoiser.fingerprint())
    pipeline.unet.disable_adapters()
    seen.append(denoiser.fingerprint())
    assert len(set(seen)) == len(seen)
    pipeline.unet.enable_adapters()
    assert denoiser.fingerprint() == seen[-2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8])
def test_layout_does_not_count_and_every_type_has_a_fingerprint(dtype: torch.dtype) -> None:
    plain, other = nn.Module(), nn.Module()
    values = (torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    plain.register_buffer("values", values)
    other.register_buffer("values", values.contiguous(memory_format=torch.channels_last))
    assert fingerprint({"a": plain}) == fingerprint({"a": other})
    changed = nn.Module()
    changed.register_buffer("values", values.clone().index_fill_(0, torch.tensor([2]), 0))
    assert fingerprint({"a": plain}) != fingerprint({"a": changed})


def test_a_file_is_not_continued_with_other_weights(pipeline: Any, tmp_path: Path) -> None:
    out = tmp_path / "run.h5"

    def interrupt(event: Any) -> None:
        if getattr(event, "step", None) == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Engine(pipeline).explain(CAPTION, Random(), num_steps=2, out=out, on_event=interrupt)
    one_weight(pipeline)
    with pytest.raises(store.StoreError, match=r'begun with other settings: weights \("\w+", now'):
        Engine(pipeline).explain(CAPTION, Random(), num_steps=2, out=out)


def test_a_pipeline_in_training_stays_in_training(pipeline: Any) -> None:
    expected = Engine(pipeline).explain(CAPTION, [Rise(16), Relevance(), Cam()], num_steps=2)
    pipeline.unet.train()
    pipeline.unet.conv_in.requires_grad_(False)
    before = [(name, one.requires_grad) for name, one in pipeline.unet.named_parameters()]
    modes: list[bool] = []
    result = Engine(pipeline).explain(
        CAPTION, [Rise(16), Relevance(), Cam()], num_steps=2, on_event=lambda _: modes.append(pipeline.unet.training)
    )
    assert all(modes)
    assert all(module.training for module in pipeline.unet.modules())
    assert [(name, one.requires_grad) for name, one in pipeline.unet.named_parameters()] == before
    assert sum(is_trained for _, is_trained in before) == len(before) - 2
    for name in ("rise", "relevance", "cam"):
        assert (result.heatmap(name, step=1) == expected.heatmap(name, step=1)).all()


def test_a_failure_restores_the_training_mode(pipeline: Any) -> None:
    engine = Engine(pipeline)
    pipeline.unet.train()
    seen: list[bool] = []

    def fail() -> None:
        with engine.denoiser.exclusive():
            seen.append(pipeline.unet.training)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (seen, pipeline.unet.training) == ([False], True)
