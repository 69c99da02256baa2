"""Deletion and insertion: every point of both curves against a literal implementation, and the result cache."""

import dataclasses
import inspect
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve, gaussian_filter

from dfengine import Engine
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate import (
    GAMES,
    TABLES,
    VARIATIONS,
    GameCache,
    GameCurves,
    GameResult,
    make_methods,
    play_games,
    playing,
)
from dfengine.evaluate.games import play, ranks_pixels, to_latent_size, xdiffusion_blur
from dfengine.explain import (
    Attention,
    Cam,
    Explainer,
    Lime,
    OutputSpec,
    Random,
    Relevance,
    Rise,
    StepMap,
    XDiffusionRise,
)
from dfengine.shapes import FOLDER

#: ᾱ of Analytic's schedule: betas from 0.0001 to 0.02 over 1000 steps, then 1, where the last step ends.
ALPHA_BAR = [*np.cumprod(1 - np.linspace(0.0001, 0.02, 1000)), 1.0]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Every pixel depends on its neighbour, the mean of all pixels and the prompt."""
    scale = 1 + number[:, None, None, None]
    return torch.tanh(x_t.roll(1, -1) * scale) + 0.2 * x_t.mean((1, 2, 3), keepdim=True) * scale


def extract(images: torch.Tensor) -> torch.Tensor:
    """Three features, each computed from other pixels."""
    flat = images.flatten(1).double()
    return torch.stack([flat[:, k::3].square().sum(1) + k * flat[:, 0] for k in range(3)], 1).float()


class NamedExtractor:
    """An extractor with a name."""

    def __init__(self, name: str = "three sums", dtype: torch.dtype = torch.float32) -> None:
        self.name, self.dtype = name, dtype

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return extract(images)


def path_of(
    denoiser: Analytic,
    step: int,
    timesteps: tuple[int, ...],
    *,
    prompt: str = "1",
    guidance: float = 2.0,
    seed: int = 0,
) -> Trajectory:
    """A trajectory to be explained at one step."""
    latents = randn(len(timesteps), *denoiser.latent_shape, seed=seed)
    path = denoiser.trajectory(latents, prompt, guidance=guidance)
    return dataclasses.replace(path, job=dataclasses.replace(path.job, timesteps=timesteps), explain_steps=(step,))


# Every point, one latent at a time -----------------------------------------------------------------------------------


def perturbed(latent: np.ndarray, saliency: np.ndarray, xdiffusion: bool) -> Iterator[tuple[int, int, np.ndarray]]:
    """Game, point and latent: pixels are replaced by descending saliency, ties in pixel order."""
    _, h, w = latent.shape
    if xdiffusion:
        saliency = np.where(saliency < 0, 0, saliency)
        impulse = np.zeros((11, 11))
        impulse[5, 5] = 1
        kernel, border = gaussian_filter(impulse, 5.0), "constant"
    else:
        offsets = np.arange(11) - 5
        kernel, border = np.exp(-(offsets**2 + offsets[:, None] ** 2) / 50), "reflect"
        kernel = kernel / kernel.sum()
    blurred = np.stack([convolve(channel, kernel, mode=border) for channel in latent.astype(np.float64)])
    order = sorted(range(h * w), key=lambda pixel: (-saliency.flat[pixel], pixel))
    for game, (start, end) in enumerate(((latent, np.zeros_like(latent)), (blurred, latent))):
        for point in range(h + 1):
            x = np.array(start, np.float32)
            for pixel in order[: point * w]:
                x[:, pixel // w, pixel % w] = end[:, pixel // w, pixel % w]
            yield game, point, x


def next_image(denoiser: Analytic, path: Trajectory, x: np.ndarray) -> torch.Tensor:
    """Decode one latent after two forwards, guidance and a DDIM step in float64."""
    (step,), job = path.steps, path.job
    latent = torch.from_numpy(x)[None]
    unconditional, conditional = (
        answer(latent, part.tensors["number"]).double() for part in (path.negative, path.prompt)
    )
    epsilon = unconditional + max(job.guidance, 1) * (conditional - unconditional)
    alpha_bar, alpha_bar_next = (ALPHA_BAR[(*job.timesteps, -1)[place]] for place in (step, step + 1))
    x0 = (latent.double() - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
    return denoiser.decode((alpha_bar_next**0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * epsilon).float())


def play_literally(
    denoiser: Analytic, path: Trajectory, saliency: torch.Tensor, xdiffusion: bool = False
) -> GameCurves:
    unperturbed = next_image(denoiser, path, path.latents[path.steps[0]].numpy())
    h = saliency.shape[0]
    features, mse = torch.zeros(2, h + 1, 3), torch.zeros(2, h + 1)
    for game, point, x in perturbed(path.latents[path.steps[0]].numpy(), saliency.numpy(), xdiffusion):
        image = next_image(denoiser, path, x)
        features[game, point] = extract(image)[0]
        mse[game, point] = (image - unperturbed).square().mean()
    return GameCurves(features, mse)


def assert_curves(ours: GameCurves, expected: GameCurves) -> None:
    np.testing.assert_allclose(ours.features, expected.features, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(ours.mse, expected.mse, rtol=2e-5, atol=2e-6)


TIMESTEPS = (903, 411, 20)
#: Two maps of two items, with ties.
MAPS = {name: randn(2, 6, 5, seed=seed).round(decimals=1) for name, seed in (("one", 1), ("other", 2))}


def two_paths(denoiser: Analytic) -> list[Trajectory]:
    """Two trajectories that differ in everything; the first is explained at its last step."""
    return [
        path_of(denoiser, 2, TIMESTEPS),
        path_of(denoiser, 0, (700, 650, 3), prompt="0.4", guidance=-1.5, seed=5),
    ]


@pytest.mark.parametrize("xdiffusion", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 512])
def test_every_point_equals_the_literal_implementation(batch_size: int, xdiffusion: bool) -> None:
    """Results do not depend on the batch size; 6 × 5 pixels give 7 points, 5 pixels apart."""
    denoiser = Analytic(answer, batch_size=batch_size)
    paths = two_paths(denoiser)
    results = play(denoiser, paths, MAPS, extract, xdiffusion=xdiffusion)
    assert list(results) == ["one", "other"]
    for name, curves in results.items():
        for place, path in enumerate(paths):
            assert curves[place].features.shape == (2, 7, 3)
            assert_curves(curves[place], play_literally(denoiser, path, MAPS[name][place], xdiffusion))
            # Nothing deleted and everything inserted both give the unperturbed image.
            assert torch.equal(curves[place].features[0, 0], curves[place].features[1, 6])
            assert curves[place].mse[0, 0] == curves[place].mse[1, 6] == 0
    # Two forwards each for the inner points of 2 maps of 2 items in 2 games, 2 ends per item, 2 unperturbed images.
    entries = 2 * 2 * 2 * 5 + 2 * 2
    batch = min(batch_size, entries)
    assert sum(denoiser.batches) == 2 * (-(-entries // batch) * batch + -(-2 // min(2, batch)) * min(2, batch))


@pytest.mark.slow
@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    items=st.integers(1, 3),
    names=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    xdiffusion=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_sizes_of_latents_batches_and_methods(
    h: int, w: int, items: int, names: int, batch_size: int, xdiffusion: bool, seed: int
) -> None:
    denoiser = Analytic(answer, (1 + seed % 3, h, max(w, 2)), batch_size)
    paths = [
        path_of(denoiser, (seed + i) % 3, TIMESTEPS, prompt=str(i), guidance=i + 0.5, seed=i) for i in range(items)
    ]
    maps = {str(m): randn(items, *denoiser.latent_shape[1:], seed=seed + m) + 0.5 for m in range(names)}
    for saliency in itertools.chain(*maps.values()):
        saliency[0, :2] = torch.tensor([3.0, 1.0])  # so that no map is constant
    for name, curves in play(denoiser, paths, maps, extract, xdiffusion=xdiffusion).items():
        for place, path in enumerate(paths):
            assert_curves(curves[place], play_literally(denoiser, path, maps[name][place], xdiffusion))


def test_methods_and_items_can_be_played_separately_or_together() -> None:
    """The ends shared by methods equal those of a method played alone."""
    denoiser = Analytic(answer)
    paths = two_paths(denoiser)
    together = play(denoiser, paths, MAPS, extract)
    for name, saliency in MAPS.items():
        for place, path in enumerate(paths):
            (curves,) = play(denoiser, [path], {"it": saliency[place : place + 1]}, extract)["it"]
            assert_curves(together[name][place], curves)


def test_ties_are_broken_by_pixel_order_and_points_are_a_row_apart() -> None:
    """For the map 0 0 0 / 0 0 1 the first point replaces the last pixel and the first two."""
    denoiser = Analytic(lambda x_t, _: 0 * x_t, (1, 2, 3))
    path = path_of(denoiser, 0, (0,))
    saliency = torch.zeros(1, 2, 3)
    saliency[0, 1, 2] = 1
    path = dataclasses.replace(path, latents=torch.tensor([[[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]]]))
    (curves,) = play(denoiser, [path], {"it": saliency}, lambda images: images[:, 0].flatten(1))["it"]
    # ε = 0, so the image is the latent over √ᾱ_0 = √0.9999.
    deleted = curves.features[0] * 0.9999**0.5
    np.testing.assert_allclose(deleted[1], [0, 0, 0.3, 0.4, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(deleted[2], [0] * 6)
    inserted = curves.features[1] * 0.9999**0.5
    np.testing.assert_allclose(inserted[1, [0, 1, 5]], [0.1, 0.2, 0.6], rtol=1e-6)
    np.testing.assert_allclose(curves.mse[0], [0, (0.01 + 0.04 + 0.36) / 6 / 0.9999, 0.91 / 6 / 0.9999], rtol=1e-5)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    class Small(Analytic):
        """Holds four latents."""

        def predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
            if len(x_t) > 4:
                raise torch.OutOfMemoryError
            return super().predict(x_t, timesteps, condition)

    small = Small(answer, batch_size=23)
    results = play(small, two_paths(small), MAPS, extract)
    assert small.batch_size <= 5
    plain = Analytic(answer)
    for name, curves in play(plain, two_paths(plain), MAPS, extract).items():
        for ours, expected in zip(results[name], curves, strict=True):
            assert_curves(ours, expected)


def test_a_batch_that_does_not_fit_the_extractor_is_halved() -> None:
    """This includes the unperturbed images of many items."""
    denoiser, batches = Analytic(answer, batch_size=8), []

    def small_extract(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError
        batches.append(len(images))
        return extract(images)

    paths = [path_of(denoiser, 1, TIMESTEPS, seed=seed) for seed in range(7)]
    saliency = randn(7, 6, 5)
    results = play(denoiser, paths, {"it": saliency}, small_extract)["it"]
    assert set(batches) == {3}
    assert_curves(results[6], play_literally(denoiser, paths[6], saliency[6]))


@pytest.mark.soak
def test_points_of_the_embedded_model_match_the_scheduler_of_diffusers() -> None:
    """The steps have `leading` spacing, as in DDIMScheduler; the second item is played at its last step."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser
    denoiser.batch_size = 6
    assert denoiser.features is not None
    # The texts are encoded separately.
    texts = {
        text: denoiser.encode_prompts([text]) for text in ("a red circle on a black background", "", "a pink star")
    }
    timesteps = tuple(denoiser.schedule.timesteps("uniform", 4))
    jobs = [Job("a red circle on a black background", timesteps, 3, guidance=2.5), Job("a pink star", timesteps, 4)]
    paths = [
        dataclasses.replace(path, explain_steps=(step,))
        for path, step in zip(trajectories(denoiser, jobs), (1, 3), strict=True)
    ]
    saliency = randn(2, 16, 16)
    results = play(denoiser, paths, {"it": saliency}, denoiser.features)["it"]
    config = json.loads((FOLDER / "scheduler/scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == timesteps
    with torch.no_grad():
        for path, item_saliency, curves in zip(paths, saliency, results, strict=True):
            (step,), job = path.steps, path.job
            timestep = torch.tensor([timesteps[step]])
            for game, point, x in perturbed(path.latents[step].numpy(), item_saliency.numpy(), False):
                if point not in (0, 1, 9, 16):
                    continue
                latent = torch.from_numpy(x)[None]
                unconditional, conditional = (
                    denoiser.predict(latent, timestep, texts[text]) for text in ("", job.prompt)
                )
                epsilon = unconditional + max(job.guidance, 1) * (conditional - unconditional)
                next_latent = scheduler.step(epsilon, timesteps[step], latent).prev_sample
                expected = denoiser.features(denoiser.decode(next_latent))[0]
                np.testing.assert_allclose(curves.features[game, point], expected, rtol=2e-3, atol=2e-3)


# Maps ----------------------------------------------------------------------------------------------------------------


def test_maps_of_image_size_are_averaged() -> None:
    denoiser = Analytic(answer, (2, 2, 3))
    denoiser.image_shape = (4, 6)
    rows = [[1.0, 3, 0, 0, 8, 0], [5, 7, 0, 4, 0, 0], [0, 0, 2, 2, 1, 1], [0, 0, 2, 2, 1, -1]]
    assert to_latent_size(torch.tensor(rows), denoiser).tolist() == [[4, 1, 2], [0, 2, 0.5]]
    small = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
    assert to_latent_size(small, denoiser).tolist() == small.tolist()
    several = to_latent_size(torch.tensor([rows, rows[::-1]]), denoiser)
    assert several.tolist() == [[[4, 1, 2], [0, 2, 0.5]], [[0, 2, 0.5], [4, 1, 2]]]
    # The games are played at the size of the latent.
    path = path_of(denoiser, 0, TIMESTEPS)
    (curves,) = play(denoiser, [path], {"it": torch.tensor([rows]).float()}, extract)["it"]
    assert_curves(curves, play_literally(denoiser, path, torch.tensor([[4, 1, 2], [0, 2, 0.5]])))


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        (torch.ones(2, 6), r"it has 2×6 pixels: expected the latent's 2×3 or the image's 4×6"),
        (torch.ones(3, 2), r"it has 3×2 pixels"),
        (torch.tensor([[1.0, 2, 3], [4, torch.nan, 6]]), r"it has values that are not finite: its pixels cannot be"),
        (torch.tensor([[1.0, 2, 3], [4, torch.inf, 6]]), r"it has values that are not finite"),
        (torch.full((2, 3), 7.0), r"it is constant: its pixels cannot be ranked"),
        (torch.tensor([[1.0, -1] * 3, [-1.0, 1] * 3] * 2), r"it is constant"),
        (torch.stack([torch.eye(2, 3), torch.zeros(2, 3)]), r"it \(number 1\) is constant"),
    ],
)
def test_maps_that_cannot_be_ranked_are_refused(saliency: torch.Tensor, message: str) -> None:
    denoiser = Analytic(answer, (2, 2, 3))
    denoiser.image_shape = (4, 6)
    with pytest.raises(ValueError, match=message):
        to_latent_size(saliency, denoiser, "it")


def test_maps_that_rank_pixels_are_finite_and_not_constant() -> None:
    """The released code also needs a positive value."""
    assert ranks_pixels(torch.tensor([[0.0, 1e-30]]))
    assert not ranks_pixels(torch.zeros(2, 3))
    assert not ranks_pixels(torch.tensor([[0.0, torch.nan]]))
    assert not ranks_pixels(torch.tensor([[0.0, torch.inf]]))
    negative = -torch.arange(6.0).view(2, 3)
    assert ranks_pixels(negative)
    assert not ranks_pixels(negative, positive=True)
    assert ranks_pixels(negative + 1, positive=True)
    assert to_latent_size(negative, Analytic(answer, (2, 2, 3))).tolist() == negative.tolist()
    with pytest.raises(ValueError, match="constant after the released code's ReLU: its pixels"):
        to_latent_size(negative, Analytic(answer, (2, 2, 3)), positive=True)


def test_the_released_blur_is_zero_padded() -> None:
    x = randn(2, 3, 7, 13)
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = gaussian_filter(impulse, 5)
    expected = np.stack([[convolve(c, kernel, mode="constant") for c in one] for one in x.double().numpy()])
    np.testing.assert_allclose(xdiffusion_blur(x), expected, atol=1e-6)
    # Reflected within the window it is far flatter than a Gaussian, whose value at the corner would be exp(−1).
    impulse_image = torch.zeros(1, 1, 21, 21)
    impulse_image[..., 10, 10] = 1
    response = xdiffusion_blur(impulse_image)[0, 0]
    assert response[5, 5] / response[10, 10] > 0.45
    assert float(response.sum()) == pytest.approx(1, rel=1e-5)


# Many items and methods ----------------------------------------------------------------------------------------------

JOBS = [Job(str(number), TIMESTEPS, seed=number) for number in range(7)]


@dataclasses.dataclass(frozen=True)
class Ramp(Explainer):
    """Yields one map per trajectory, in reverse order; its values increase along the pixels."""

    name: str = "ramp"
    slope: float = 1.0
    flat: str = ""
    """a prompt whose map is constant"""

    def num_forwards(self, num_steps: int) -> int:
        return 0

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        if job.prompt == "refused":
            raise ValueError("this prompt has no ramp")
        return OutputSpec()

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        for item, path in reversed(list(enumerate(trajectories))):
            for step in path.steps:
                yield StepMap(item, step, self.name, self.map(denoiser, path.job))

    def map(self, denoiser: Denoiser, job: Job) -> torch.Tensor:
        h, w = denoiser.latent_shape[1:]
        slope = 0.0 if job.prompt == self.flat else self.slope
        return (slope * torch.arange(h * w).float() + 3).view(h, w).roll(job.seed, -1)


@dataclasses.dataclass(frozen=True)
class WithFunction(Ramp):
    """A ramp with a user's function, which is described by its name only."""

    function: Callable[[float], float] = abs


class GamesPlayer:
    """`play_games` on an analytic denoiser, which records its cost and its progress reports."""

    def __init__(self, batch_size: int = 8) -> None:
        self.denoiser, self.reported, self.sampled = Analytic(answer, batch_size=batch_size), 0, list[str]()

    def sample(self, jobs: Sequence[Job]) -> Iterator[Trajectory]:
        self.sampled += [job.prompt for job in jobs]
        yield from trajectories(self.denoiser, jobs)

    def report(self) -> None:
        self.reported += 1

    def __call__(self, *explainers: Any, jobs: Sequence[Job] = JOBS, **options: Any) -> Any:
        self.reported, self.sampled = 0, []
        self.denoiser.batches.clear()
        options = {"features": NamedExtractor()} | options
        return play_games(self.denoiser, self.sample, jobs, explainers, on_progress=self.report, **options)

    @property
    def forwards(self) -> int:
        return sum(self.denoiser.batches)


def assert_result(
    result: GameResult, denoiser: Analytic, job: Job, step: int, saliency: torch.Tensor, xdiffusion: bool = False
) -> None:
    """Assert that a result has the curves of the literal implementation for one map of one job."""
    (path,) = trajectories(denoiser, [job])
    assert torch.equal(result.saliency, saliency)
    assert result.curves is not None
    path = dataclasses.replace(path, explain_steps=(step,))
    assert_curves(result.curves, play_literally(denoiser, path, saliency, xdiffusion))


@pytest.mark.grid
@pytest.mark.parametrize("preset", ["default", "paper", "xdiffusion"])
def test_every_map_of_every_job_is_played(preset: str) -> None:
    """Maps of explainers may arrive out of order, and external maps are played too."""
    run = GamesPlayer()
    external = randn(7, 6, 5).numpy()
    ramp, fall = Ramp(), Ramp("fall", slope=-0.1)
    outcome = run(ramp, fall, maps={"theirs": external.astype(np.float64)}, step=1, preset=preset)
    assert list(outcome.results) == ["ramp", "fall", "theirs"]
    assert run.sampled == [job.prompt for job in JOBS]
    assert run.reported == 7 * 3
    assert (outcome.model, outcome.step, outcome.timesteps) == ("analytic", 1, TIMESTEPS)
    assert (outcome.features, outcome.preset) == ("three sums", preset)
    for item, job in enumerate(JOBS):
        for name, saliency in (
            ("ramp", ramp.map(run.denoiser, job)),
            ("fall", fall.map(run.denoiser, job)),
            ("theirs", torch.from_numpy(external[item])),
        ):
            assert_result(outcome.results[name][item], run.denoiser, job, 1, saliency, preset == "xdiffusion")
    assert outcome.valid_items() == list(range(7))
    assert outcome.excluded() == {}


@pytest.mark.parametrize(("num_steps", "step"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (30, 21)])
def test_the_default_step_is_at_three_quarters(num_steps: int, step: int) -> None:
    jobs = [dataclasses.replace(JOBS[0], timesteps=tuple(range(900, 900 - num_steps, -1)))]
    assert GamesPlayer()(Ramp(), jobs=jobs).step == step


@pytest.mark.slow
def test_an_item_whose_map_ranks_no_pixels_is_excluded_for_every_method() -> None:
    run = GamesPlayer()
    outcome = run(Ramp(), Ramp("flat", flat="3"), Ramp("down", slope=-1.0))
    assert outcome.excluded() == {"flat": 1}
    assert outcome.valid_items() == [0, 1, 2, 4, 5, 6]
    assert outcome.results["flat"][3].curves is None
    assert torch.equal(outcome.results["flat"][3].saliency, torch.full((6, 5), 3.0))
    assert outcome.results["ramp"][3].curves is not None
    for item in (2, 4):  # its neighbours, inside and outside its group
        saliency = Ramp().map(run.denoiser, JOBS[item])
        assert_result(outcome.results["flat"][item], run.denoiser, JOBS[item], 1, saliency)
    all_excluded = run(Ramp("nothing", slope=0.0), Ramp())
    assert (all_excluded.excluded(), all_excluded.valid_items(), run.reported) == ({"nothing": 7}, [], 14)
    released = run(Ramp("negative", slope=-1.0), jobs=JOBS[:2], preset="xdiffusion")
    assert released.excluded() == {}  # the maximum is 3
    negative = {"below": -1 - torch.rand(7, 6, 5).numpy()}
    with pytest.raises(ValueError, match=r"map 'below' .* is constant after the released code's ReLU"):
        run(maps=negative, preset="xdiffusion")


def test_a_non_finite_image_excludes_only_its_item() -> None:
    class Overflows(NamedExtractor):
        """Overflows for images whose first pixel is bright."""

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.where(images[:, 0, 0, 0, None] > 0.9, torch.inf, extract(images))

    outcome = GamesPlayer()(Ramp(), Ramp("down", slope=-1.0), features=Overflows())
    valid = [all(outcome.results[name][item].is_valid for name in outcome.results) for item in range(7)]
    assert 0 < sum(valid) < 7
    assert outcome.valid_items() == [item for item in range(7) if valid[item]]
    assert all(outcome.excluded().values())


@pytest.mark.slow
def test_cached_results_are_not_computed_again(tmp_path: Path) -> None:
    run = GamesPlayer()
    first = run(Ramp(), jobs=JOBS[:4], cache=GameCache(tmp_path))
    cost = run.forwards
    assert run.reported == 4
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.iterdir())) == 4
    again = run(Ramp(), jobs=JOBS[:4], cache=GameCache(tmp_path))
    assert (run.forwards, run.sampled, run.reported) == (0, [], 4)
    for result, other in zip(first.results["ramp"], again.results["ramp"], strict=True):
        assert torch.equal(result.saliency, other.saliency)
        assert torch.equal(result.curves.features, other.curves.features)
        assert torch.equal(result.curves.mse, other.curves.mse)
    # Only new items are computed; the same cache also holds them in memory.
    cache = GameCache(tmp_path)
    run(Ramp(), cache=cache)
    assert (run.sampled, run.reported) == (["4", "5", "6"], 7)
    run(Ramp(), cache=cache)
    assert (run.forwards, run.reported) == (0, 7)
    # A new method costs only its own games; progress is reported for every method, including cached ones.
    run(Ramp(), Ramp("more", slope=2.0), jobs=JOBS[:4], cache=cache)
    assert (run.forwards, run.reported) == (cost, 8)
    # External maps are identified by their values, not by their name.
    theirs = randn(4, 6, 5).numpy()
    run(maps={"theirs": theirs}, jobs=JOBS[:4], cache=cache)
    run(Ramp(), maps={"renamed": theirs}, jobs=JOBS[:4], cache=cache)
    assert (run.forwards, run.reported) == (0, 8)


def test_maps_that_cannot_be_ranked_are_cached(tmp_path: Path) -> None:
    run = GamesPlayer()
    run(Ramp(flat="1"), jobs=JOBS[:2], cache=GameCache(tmp_path))
    outcome = run(Ramp(flat="1"), jobs=JOBS[:2], cache=GameCache(tmp_path))
    assert (run.forwards, outcome.excluded()) == (0, {"ramp": 1})
    assert outcome.results["ramp"][1].curves is None


@pytest.mark.slow
def test_a_change_of_any_setting_is_a_cache_miss(tmp_path: Path) -> None:
    run, cache = GamesPlayer(), GameCache(tmp_path)
    options: dict[str, Any] = {"jobs": JOBS[:1], "cache": cache, "step": 1}
    run(Ramp(), **options)
    run(Ramp(), **options)
    assert run.forwards == 0
    (job,) = options["jobs"]
    changed: list[tuple[Any, dict[str, Any]]] = [
        (Ramp(slope=2.0), {}),
        *(
            (Ramp(), {"jobs": [dataclasses.replace(job, **change)]})
            for change in (
                {"seed": 9}, {"guidance": 3.0}, {"negative_prompt": "2"}, {"prompt": "5"},
                {"timesteps": (903, 411, 19)},
            )
        ),
        (Ramp(), {"step": 0}),
        (Ramp(), {"step": 2}),
        (Ramp(), {"preset": "xdiffusion"}),
        (Ramp(), {"features": NamedExtractor("others")}),
        (Ramp(), {"features": NamedExtractor(dtype=torch.float16)}),
        (Ramp(), {"features": extract}),
    ]  # fmt: skip
    for explainer, change in changed:
        run(explainer, **options | change)
        assert run.forwards, (explainer, change)
    run(maps={"theirs": randn(1, 6, 5).numpy()}, **options)
    run(maps={"theirs": randn(1, 6, 5, seed=1).numpy()}, **options)
    assert run.forwards
    run(Ramp(), **options)
    assert run.forwards == 0
    # Another model, and another precision of the same model.
    for attribute, value in (("name", "another"), ("dtype", torch.float16)):
        other = GamesPlayer()
        setattr(other.denoiser, attribute, value)
        other(Ramp(), **options)
        assert other.forwards


def test_functions_are_not_identified_by_their_names(tmp_path: Path) -> None:
    """This holds for functions of explainers and for extractors. A given extractor differs from the model's own."""
    run, cache = GamesPlayer(), GameCache(tmp_path)
    for _ in range(2):
        run(WithFunction(), jobs=JOBS[:1], cache=cache)
        assert run.forwards
        outcome = run(Ramp(), jobs=JOBS[:1], cache=cache, features=extract)
        assert run.forwards
        assert outcome.features == "extract"
    run.denoiser.features = lambda images: 2 * extract(images)
    own = run(Ramp(), jobs=JOBS[:1], cache=cache, features=None)
    assert run.forwards
    assert own.features == "analytic's own"
    assert not torch.equal(own.results["ramp"][0].curves.features, outcome.results["ramp"][0].curves.features)
    run(Ramp(), jobs=JOBS[:1], cache=cache, features=None)
    assert run.forwards == 0


def test_a_truncated_file_is_computed_again(tmp_path: Path) -> None:
    """The file may be cut at any size; the other files stay valid."""
    run = GamesPlayer()
    first = run(Ramp(), jobs=JOBS[:3], cache=GameCache(tmp_path))
    files = sorted(tmp_path.iterdir())
    content = files[0].read_bytes()
    assert zipfile.is_zipfile(files[0])
    for size in [0, 1, 3, 4, 5, *range(30, len(content), 97), len(content) - 23, len(content) - 22, len(content) - 1]:
        files[0].write_bytes(content[:size])
        assert GameCache(tmp_path).get(files[0].stem) is None
    run(Ramp(), jobs=JOBS[:3], cache=GameCache(tmp_path))
    assert len(run.sampled) == 1
    assert run.reported == 3
    again = run(Ramp(), jobs=JOBS[:3], cache=GameCache(tmp_path))
    assert run.forwards == 0
    for result, other in zip(first.results["ramp"], again.results["ramp"], strict=True):
        assert_curves(other.curves, result.curves)


def test_other_and_damaged_files_count_as_missing(tmp_path: Path) -> None:
    cache = GameCache(tmp_path)
    (tmp_path / "a.npz").write_text("not an archive")
    np.savez(tmp_path / "b.npz", saliency=np.zeros(3))
    damaged = tmp_path / "c.npz"
    np.savez(damaged, saliency=np.zeros((2, 2)), features=np.zeros(0), mse=np.zeros(0))
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(bytes(32), bytes(31) + b"\1", 1))
    assert [cache.get(key) for key in "abcd"] == [None] * 4
    whole = {"saliency": np.zeros((2, 2), "f4"), "features": np.zeros((2, 3, 4), "f4"), "mse": np.zeros((2, 3), "f4")}
    for number, changed in enumerate(
        (
            {"saliency": np.zeros(4, "f4")},
            {"saliency": np.array([["a", "b"]])},
            {"saliency": np.array([[None]])},
            {"features": np.zeros((3, 3, 4), "f4")},
            {"features": np.array(1.0)},
            {"mse": np.zeros((2, 9), "f4")},
            {"mse": np.array(["a"])},
        )
    ):
        np.savez(tmp_path / f"other{number}.npz", **whole | changed)
        assert cache.get(f"other{number}") is None, changed
    np.savez(tmp_path / "whole.npz", **whole)
    assert cache.get("whole") is not None
    os.mkfifo(tmp_path / "pipe.npz")
    assert cache.get("pipe") is None


@pytest.mark.parametrize(("value", "kind"), [("a", "<U1"), (None, "object"), (1j, "complex128")])
def test_maps_that_are_no_numbers_are_refused(value: Any, kind: str) -> None:
    check = inspect.unwrap(playing._check_methods)  # whose annotations are checked in tests alone
    with pytest.raises(ValueError, match=f"maps 'm' are of type {kind}: expected numbers, as float32"):
        check(Analytic(answer), JOBS[:1], [], {"m": np.full((1, 6, 5), value)}, positive=False)


def test_any_damaged_byte_is_noticed_or_without_effect(tmp_path: Path) -> None:
    """The errors that an archive raises are of many types."""
    saliency = torch.arange(4.0).view(2, 2)
    GameCache(tmp_path).put("a", GameResult(saliency, None))
    content = (tmp_path / "a.npz").read_bytes()
    for place in range(0, len(content), 3):
        for change in (0x01, 0x40, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= change
            (tmp_path / "a.npz").write_bytes(damaged)
            result = GameCache(tmp_path).get("a")
            assert result is None or torch.equal(result.saliency, saliency)


def test_a_turn_that_was_not_kept_completely_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Any, **arrays: Any) -> None:
        Path(file).write_bytes(b"PK")
        raise OSError("the disk is full")

    cache = GameCache(tmp_path)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="the disk is full"):
        cache.put("a", GameResult(torch.zeros(2, 2), None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("explainers", "options", "message"),
    [
        ([], {}, "methods need distinct names"),
        ([Ramp(), Ramp(slope=2.0)], {}, "methods need distinct names"),
        ([Ramp()], {"maps": {"ramp": np.eye(6, 5)[None].repeat(7, 0)}}, "methods need distinct names"),
        ([Ramp()], {"jobs": []}, "there is no prompt to play with: give at least one"),
        ([Ramp()], {"step": 3}, r"step 3 is outside \[0, 2\]: steps index the time-steps"),
        ([Ramp()], {"step": -1}, r"step -1 is outside \[0, 2\]"),
        (
            [Ramp()],
            {"preset": "released"},
            "preset 'released' is not known: expected one of default, paper, xdiffusion",
        ),
        ([Ramp()], {"features": None}, "analytic comes with no extractor: give a folder of a transformers vision"),
        (
            [Ramp()],
            {"maps": {"m": np.eye(6, 5)[None].repeat(6, 0)}},
            r"maps 'm' have shape \(6, 6, 5\): expected .* \(7, h, w",
        ),
        ([Ramp()], {"maps": {"m": np.eye(6, 4)[None].repeat(7, 0)}}, r"map 'm' has 6×4 pixels: expected .* 6×5"),
        ([Ramp()], {"maps": {"m": np.zeros((7, 6, 5))}}, r"map 'm' \(number 0\) is constant"),
        ([Ramp()], {"jobs": [*JOBS[:2], Job("2", (9, 8))]}, r"different numbers of steps \(2, 3\): give all the same"),
        ([Ramp()], {"jobs": [*JOBS[:2], Job("refused", TIMESTEPS)]}, "this prompt has no ramp"),
        ([Random()], {"jobs": [*JOBS, Job("no number", TIMESTEPS)]}, "could not convert string to float: 'no number'"),
        ([Random()], {"jobs": [*JOBS, Job("1", TIMESTEPS, negative_prompt="neither")]}, "'neither'"),
    ],
)
def test_invalid_input_is_rejected_before_anything_is_computed(
    explainers: list[Any], options: dict[str, Any], message: str
) -> None:
    run = GamesPlayer()
    with pytest.raises(ValueError, match=message):
        run(*explainers, **options)
    assert (run.forwards, run.sampled, run.reported) == (0, [], 0)


# Methods -------------------------------------------------------------------------------------------------------------


def test_variations_differ_from_df_rise_in_the_setting_they_are_named_after() -> None:
    settings = {
        "rise-global": {"score": "global"},
        "rise-grid": {"mask_kind": "rise"},
        "rise-frechet": {"similarity": "frechet", "score": "global"},
        "rise-cosine": {"similarity": "cosine"},
        "rise-mse": {"similarity": "mse"},
        "rise-identity": {"baseline": "identity"},
        "rise-frozen": {"baseline": "frozen"},
        "rise-contrast": {"similarity": "contrast"},
        "rise-luminance": {"similarity": "luminance"},
        "rise-contrast_structure": {"similarity": "contrast_structure"},
        "rise-ssim": {"similarity": "ssim"},
    }
    assert set(VARIATIONS) == set(settings)
    methods = make_methods(["rise", *settings], num_masks=70)
    for method, (name, changes) in zip(methods, {"rise": {}, **settings}.items(), strict=True):
        assert method == dataclasses.replace(Rise(70), name=name, **changes)


def test_methods_are_registered_explainers_without_duplicates() -> None:
    own = Rise(7, name="own")
    methods = make_methods(["cam", "rise", "lime", own, "cam", "random", "relevance", "attention"], num_samples=80)
    assert methods == [Cam(), Rise(), Lime(80), own, Random(), Relevance(), Attention()]
    assert make_methods(["rise"], preset="xdiffusion", num_masks=9) == [XDiffusionRise(9)]
    with pytest.raises(ValueError, match=r"method 'gradcam' is not known: expected one of .*rise.*rise-ssim"):
        make_methods(["rise", "gradcam"])


def test_tables_have_the_papers_methods() -> None:
    assert TABLES[1] == ("random", "lime", "rise", "cam")
    assert TABLES[2] == ("rise", "rise-frechet", "rise-cosine", "rise-contrast", "rise-grid")
    assert GAMES == ("deletion", "insertion")


@pytest.mark.soak
def test_the_embedded_model_plays_with_its_own_features() -> None:
    """The games use the map of the explained step."""
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job("a red circle on a black background", seed=1, num_steps=2)
    outcome = play_games(engine.denoiser, engine.sample, [job], make_methods(["random", "rise"], num_masks=8), step=1)
    assert (outcome.step, outcome.features, outcome.valid_items()) == (1, "shapes's own", [0])
    result = engine.explain(job.prompt, Rise(8), seed=1, num_steps=2)
    np.testing.assert_allclose(outcome.results["rise"][0].saliency, result.maps["rise"][1], rtol=1e-4, atol=1e-4)
    assert outcome.results["random"][0].curves.features.shape == (2, 17, 96)


# In the data's distribution ------------------------------------------------------------------------------------------


def test_refilled_games_keep_latents_in_distribution() -> None:
    """Deletion ends where insertion begins: at the mean colour under fresh noise, scaled as the step has it."""
    seen: list[torch.Tensor] = []

    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    denoiser = Analytic(answer, (2, 24, 24), batch_size=4)
    latents = torch.stack([torch.full((2, 24, 24), 9.0), torch.full((2, 24, 24), 4.0)])
    path = dataclasses.replace(denoiser.trajectory(latents), explain_steps=(0,))
    path = dataclasses.replace(path, signal=torch.tensor([0.6, 1.0]), noise=torch.tensor([0.8, 0.0]))
    saliency = torch.arange(576.0).reshape(1, 24, 24)
    play(denoiser, [path], {"it": saliency}, lambda images: images.flatten(1), refill="noise")
    inputs = torch.cat(seen).flatten(1)
    ends = {int((one == 9.0).sum()): one for one in inputs}
    blank = ends[0]
    assert blank.mean().item() == pytest.approx(0.6 * 4.0, abs=0.1)
    assert blank.std().item() == pytest.approx(0.8, abs=0.06)
    # Every other latent has each pixel either as it was or as in the blank one.
    for one in inputs:
        assert ((one == 9.0) | (one == blank) | (one == 0)).all()


def test_an_unknown_refill_is_refused() -> None:
    denoiser = Analytic(lambda x_t, _: x_t)
    path = dataclasses.replace(denoiser.trajectory(torch.rand(1, 2, 6, 5)), explain_steps=(0,))
    with pytest.raises(ValueError, match="refill 'blur' is not known: expected one of zero, noise"):
        play(denoiser, [path], {"it": torch.rand(1, 6, 5)}, lambda images: images.flatten(1), refill="blur")
