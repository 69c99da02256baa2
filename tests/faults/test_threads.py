"""Threads that share an engine, or a network, get the maps that each would get alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from marks import soak

from dfengine import Attention, Cam, Engine, Lime, Random, Relevance, Rise
from dfengine.engine import Explainers
from dfengine.models.loading import quiet

CAPTIONS = ["a red circle above a blue square on a gray background", "a yellow star on a black background"]
EXPLAINERS = [
    Cam(),
    Relevance(text_attention=True),
    Attention(),
    Rise(32),
    Rise(32, target="guided"),
    Lime(num_samples=16),
    Random(),
    Cam.xdiffusion(),
]


def maps(engine: Engine, prompt: str, explainers: Explainers) -> dict[str, np.ndarray]:
    result = engine.explain(prompt, explainers, num_steps=3, guidance=2)
    return {"previews": result.previews, **{name: result.heatmap(name, step=1) for name in result.maps}}


def together(*calls: Callable[[], dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [one.result() for one in [threads.submit(call) for call in calls]]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("explainer", [*EXPLAINERS[:2], *map(soak, EXPLAINERS[2:])], ids=lambda one: type(one).__name__)
def test_two_threads_share_an_engine(engine: Engine, explainer: Explainers) -> None:
    alone = [maps(engine, prompt, explainer) for prompt in CAPTIONS]
    for _ in range(2):
        shared = together(*(lambda prompt=prompt: maps(engine, prompt, explainer) for prompt in CAPTIONS))
        for ours, expected in zip(shared, alone, strict=True):
            for name, values in expected.items():
                np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.slow
def test_two_engines_of_one_pipeline_in_two_threads(tiny_folder: Path) -> None:
    """Hooks of one engine's DF-CAM sit on the modules that the other computes with."""
    from diffusers import DiffusionPipeline

    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    first, second = (Engine(pipeline, batch_size=16) for _ in range(2))
    alone = maps(first, CAPTIONS[0], Cam()), maps(second, CAPTIONS[1], Relevance())
    for _ in range(3):
        shared = together(lambda: maps(first, CAPTIONS[0], Cam()), lambda: maps(second, CAPTIONS[1], Relevance()))
        for ours, expected in zip(shared, alone, strict=True):
            for name, values in expected.items():
                np.testing.assert_array_equal(ours[name], values, err_msg=name)


def test_engines_of_one_pipeline_share_a_lock(tiny_folder: Path) -> None:
    from diffusers import DiffusionPipeline

    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    first, second = Engine(pipeline), Engine(pipeline)

    def use() -> None:
        with second.denoiser.exclusive():
            pass

    with ThreadPoolExecutor(1) as threads:
        with first.denoiser.exclusive():
            waiting = threads.submit(use)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.2)
        waiting.result(timeout=60)


def test_a_thread_waits_while_another_uses_the_network(engine: Engine) -> None:
    cost = engine.forward_cost()  # from now on known at once
    with ThreadPoolExecutor(1) as threads:
        with engine.denoiser.exclusive():
            waiting = threads.submit(engine.forward_cost)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
        assert waiting.result(timeout=60) == cost


def test_the_callers_settings_of_torch_change_nothing(engine: Engine) -> None:
    expected = maps(engine, CAPTIONS[0], EXPLAINERS[:3])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
            ours = maps(engine, CAPTIONS[0], EXPLAINERS[:3])
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    for name, values in expected.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
