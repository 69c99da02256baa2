"""The hot loop on the meta device, whose tensors have no values: reading one fails."""

from pathlib import Path

import pytest
import torch
from analytic import Analytic
from marks import soak
from reduced import reduced
from torch import Tensor

from dfengine.diffusion.denoiser import Condition
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain import Rise
from dfengine.explain.rise_forwards import RiseForwards
from dfengine.models import adapt
from dfengine.models.architectures import build
from dfengine.models.loading import quiet

META = torch.device("meta")
BATCH = 7


def masking_of(rise: Rise, folder: Path, name: str) -> RiseForwards:
    """Two steps of two items with a published topology, in half precision."""
    with quiet():
        pipeline = build(reduced(name, folder), device=META, dtype=torch.float16)
        denoiser = adapt(pipeline, batch_size=BATCH)
    width = denoiser.unet.config.cross_attention_dim
    text = {"text": torch.zeros(1, 77, width, dtype=torch.float16, device=META)}
    if name == "sdxl":
        pooled = pipeline.text_encoder_2.config.projection_dim
        text |= {"text_embeds": torch.zeros(1, pooled, dtype=torch.float16, device=META)}
        text |= {"time_ids": torch.zeros(1, 6, device=META)}
    latents = torch.zeros(2, *denoiser.latent_shape, device=META)
    paths = [
        Trajectory(
            job=Job("a cat", (700, 200), seed=seed),
            latents=latents,
            epsilon=latents,
            x0=None,
            signal=torch.zeros(2),
            noise=torch.ones(2),
            image=torch.zeros(*denoiser.image_shape, 3, dtype=torch.uint8),
            prompt=Condition(text),
            negative=Condition(text),
        )
        for seed in range(2)
    ]
    masking = RiseForwards(rise, denoiser, paths)
    masking.start()
    return masking


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rise"),
    [
        soak("sd15", Rise(4)),
        soak("sd15", Rise(4, score="global", estimator="sum", mask_kind="rise")),
        ("sd15", Rise(4, target="guided")),
        soak("sd21", Rise(4, target="guided", similarity="cosine")),
        soak("sdxl", Rise(4)),
    ],
)
def test_masking_never_synchronises(tmp_path: Path, name: str, rise: Rise) -> None:
    """Over items, steps and a padded tail: 16 masks in batches of 7."""
    masking = masking_of(rise, tmp_path, name)
    completed = [list(rows) for rows in masking.run_masks(range(4), 0, 4)]
    assert [row for rows in completed for row in rows] == [0, 1, 2, 3]
    assert len(completed) == 3


def test_synchronising_fails_on_the_meta_device() -> None:
    values = torch.zeros(3, device=META)
    for synchronise in (
        lambda: values[0].item(),
        values.cpu,
        values.tolist,
        lambda: bool(values.any()),
        values.nonzero,
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            synchronise()


def test_maps_are_fetched_while_the_next_batch_runs() -> None:
    """Each map is fetched after the following batch has been queued, and none is lost."""
    order: list[str] = []

    def answer(x_t: Tensor, _: Tensor) -> Tensor:
        order.append("batch")
        return x_t

    denoiser = Analytic(answer, batch_size=10)
    path = denoiser.trajectory(torch.ones(3, 2, 6, 5))
    maps = Rise(10).explain(denoiser, [path])
    order.extend(f"map {step_map.step}" for step_map in maps)
    # The first batch is f(R) of the three steps.
    assert order == ["batch", "batch", "batch", "map 0", "batch", "map 1", "map 2"]
