"""Deletion and insertion: every point of both curves against one latent at a time, and what is kept of them."""

import dataclasses
import itertools
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import convolve, gaussian_filter

from dfengine import Engine
from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate import METHODS, TABLES, Kept, games, methods
from dfengine.evaluate.games import GAMES, Played, fitted, play, released_blur, usable
from dfengine.evaluate.kept import Turn
from dfengine.explain import Lime, OutputSpec, Random, Rise, StepMap
from dfengine.shapes import FOLDER

PROPERTY = settings(max_examples=25, deadline=None, database=None, derandomize=True)

#: ᾱ of Analytic's schedule: betas from 0.0001 to 0.02 over 1000 steps; behind them 1, where the last step lands.
ALPHA_BAR = [*np.cumprod(1 - np.linspace(0.0001, 0.02, 1000)), 1.0]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def answer(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Every pixel's depends on its neighbour, the mean of all and the prompt."""
    told = 1 + number[:, None, None, None]
    return torch.tanh(x_t.roll(1, -1) * told) + 0.2 * x_t.mean((1, 2, 3), keepdim=True) * told


def extract(images: torch.Tensor) -> torch.Tensor:
    """Three features, each of other pixels."""
    flat = images.flatten(1).double()
    return torch.stack([flat[:, k::3].square().sum(1) + k * flat[:, 0] for k in range(3)], 1).float()


class Named:
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
    """To be explained at one step."""
    latents = drawn(len(timesteps), *denoiser.latent_shape, seed=seed)
    path = denoiser.trajectory(latents, prompt, guidance=guidance)
    return dataclasses.replace(path, job=dataclasses.replace(path.job, timesteps=timesteps), explain_steps=(step,))


# Every point, one latent at a time -----------------------------------------------------------------------------------


def perturbed(latent: np.ndarray, saliency: np.ndarray, behaviour: str) -> Iterator[tuple[int, int, np.ndarray]]:
    """Game, point and latent: pixels go or come one by one, the most salient first, of equals the first."""
    _, h, w = latent.shape
    if behaviour == "xdiffusion":
        saliency = np.where(saliency < 0, 0, saliency)
        impulse = np.zeros((11, 11))
        impulse[5, 5] = 1
        kernel, border = gaussian_filter(impulse, 5.0), "constant"
    else:
        away = np.arange(11) - 5
        kernel, border = np.exp(-(away**2 + away[:, None] ** 2) / 50), "reflect"
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
    """Two forwards, the guidance, DDIM in float64, and a decoding, of one latent."""
    (step,), job = path.steps, path.job
    latent = torch.from_numpy(x)[None]
    without, given = (answer(latent, part.tensors["number"]).double() for part in (path.negative, path.prompt))
    epsilon = without + job.guidance * (given - without)
    now, then = (ALPHA_BAR[(*job.timesteps, -1)[place]] for place in (step, step + 1))
    x0 = (latent.double() - (1 - now) ** 0.5 * epsilon) / now**0.5
    return denoiser.decode((then**0.5 * x0 + (1 - then) ** 0.5 * epsilon).float())


def peer(denoiser: Analytic, path: Trajectory, saliency: torch.Tensor, behaviour: str = "paper") -> Played:
    whole = next_image(denoiser, path, path.latents[path.steps[0]].numpy())
    h = saliency.shape[0]
    features, mse = torch.zeros(2, h + 1, 3), torch.zeros(2, h + 1)
    for game, point, x in perturbed(path.latents[path.steps[0]].numpy(), saliency.numpy(), behaviour):
        image = next_image(denoiser, path, x)
        features[game, point] = extract(image)[0]
        mse[game, point] = (image - whole).square().mean()
    return Played(features, mse)


def assert_played(ours: Played, expected: Played) -> None:
    np.testing.assert_allclose(ours.features, expected.features, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(ours.mse, expected.mse, rtol=2e-5, atol=2e-6)


TIMESTEPS = (903, 411, 20)
#: Two maps of two items, some of whose pixels are equal.
MAPS = {name: drawn(2, 6, 5, seed=seed).round(decimals=1) for name, seed in (("one", 1), ("other", 2))}


def two(denoiser: Analytic) -> list[Trajectory]:
    """Other time-steps, steps, prompts, guidance and latents; the first is explained at its last step."""
    return [
        path_of(denoiser, 2, TIMESTEPS),
        path_of(denoiser, 0, (700, 650, 3), prompt="0.4", guidance=-1.5, seed=5),
    ]


@pytest.mark.parametrize("behaviour", ["paper", "xdiffusion"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16, 512])
def test_every_point_is_that_of_one_latent_at_a_time(batch_size: int, behaviour: str) -> None:
    """Whatever the batches; all that is different is different; 6 × 5 pixels make 7 points, 5 pixels apart."""
    denoiser = Analytic(answer, batch_size=batch_size)
    paths = two(denoiser)
    found = play(denoiser, paths, MAPS, extract, behaviour=behaviour)
    assert list(found) == ["one", "other"]
    for name, played in found.items():
        for place, path in enumerate(paths):
            assert played[place].features.shape == (2, 7, 3)
            assert_played(played[place], peer(denoiser, path, MAPS[name][place], behaviour))
            # The unperturbed image: all of it, and none of it.
            assert torch.equal(played[place].features[0, 0], played[place].features[1, 6])
            assert played[place].mse[0, 0] == played[place].mse[1, 6] == 0
    # Both forwards of all inner points of 2 maps of 2 items in 2 games, of 2 ends an item and of the 2 unperturbed.
    entries = 2 * 2 * 2 * 5 + 2 * 2
    most = min(batch_size, entries)
    assert sum(denoiser.batches) == 2 * (-(-entries // most) * most + -(-2 // min(2, most)) * min(2, most))


@PROPERTY
@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    items=st.integers(1, 3),
    names=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    behaviour=st.sampled_from(["paper", "xdiffusion"]),
    seed=st.integers(0, 99),
)
def test_every_size_of_everything(
    h: int, w: int, items: int, names: int, batch_size: int, behaviour: str, seed: int
) -> None:
    denoiser = Analytic(answer, (1 + seed % 3, h, max(w, 2)), batch_size)
    paths = [
        path_of(denoiser, (seed + i) % 3, TIMESTEPS, prompt=str(i), guidance=i + 0.5, seed=i) for i in range(items)
    ]
    maps = {str(m): drawn(items, *denoiser.latent_shape[1:], seed=seed + m) + 0.5 for m in range(names)}
    for one in itertools.chain(*maps.values()):
        one[0, :2] = torch.tensor([3.0, 1.0])  # so that none is the same everywhere
    for name, played in play(denoiser, paths, maps, extract, behaviour=behaviour).items():
        for place, path in enumerate(paths):
            assert_played(played[place], peer(denoiser, path, maps[name][place], behaviour))


def test_methods_and_items_alone_or_together() -> None:
    """Shared ends are those that each computes for itself."""
    denoiser = Analytic(answer)
    paths = two(denoiser)
    together = play(denoiser, paths, MAPS, extract)
    for name, saliency in MAPS.items():
        for place, path in enumerate(paths):
            (alone,) = play(denoiser, [path], {"it": saliency[place : place + 1]}, extract)["it"]
            assert_played(together[name][place], alone)


def test_equal_pixels_go_in_their_order_and_by_rows_of_pixels() -> None:
    """Of the map 0 0 0 / 0 0 1 the last pixel goes first, with the first two."""
    denoiser = Analytic(lambda x_t, _: 0 * x_t, (1, 2, 3))
    path = path_of(denoiser, 0, (0,))
    saliency = torch.zeros(1, 2, 3)
    saliency[0, 1, 2] = 1
    path = dataclasses.replace(path, latents=torch.tensor([[[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]]]))
    (found,) = play(denoiser, [path], {"it": saliency}, lambda images: images[:, 0].flatten(1))["it"]
    # ε = 0, so that the image is the latent over √ᾱ_0 = √0.9999.
    image = found.features[0] * 0.9999**0.5
    np.testing.assert_allclose(image[1], [0, 0, 0.3, 0.4, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(image[2], [0] * 6)
    back = found.features[1] * 0.9999**0.5
    np.testing.assert_allclose(back[1, [0, 1, 5]], [0.1, 0.2, 0.6], rtol=1e-6)
    np.testing.assert_allclose(found.mse[0], [0, (0.01 + 0.04 + 0.36) / 6 / 0.9999, 0.91 / 6 / 0.9999], rtol=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_lost() -> None:
    class Small(Analytic):
        """Holds four latents."""

        def predict(self, x_t: torch.Tensor, timesteps: torch.Tensor, condition: Any) -> torch.Tensor:
            if len(x_t) > 4:
                raise torch.OutOfMemoryError
            return super().predict(x_t, timesteps, condition)

    small = Small(answer, batch_size=23)
    found = play(small, two(small), MAPS, extract)
    assert small.batch_size <= 5
    plain = Analytic(answer)
    for name, played in play(plain, two(plain), MAPS, extract).items():
        for ours, expected in zip(found[name], played, strict=True):
            assert_played(ours, expected)


def test_no_more_images_than_fit_are_shown_to_the_extractor() -> None:
    """The unperturbed ones of many items, too; memory that it lacks is found in smaller batches."""
    denoiser, seen = Analytic(answer, batch_size=8), []

    def few(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 3:
            raise torch.OutOfMemoryError
        seen.append(len(images))
        return extract(images)

    paths = [path_of(denoiser, 1, TIMESTEPS, seed=seed) for seed in range(7)]
    saliency = drawn(7, 6, 5)
    found = play(denoiser, paths, {"it": saliency}, few)["it"]
    assert set(seen) == {3}
    assert_played(found[6], peer(denoiser, paths[6], saliency[6]))


def test_points_of_the_embedded_model_by_diffusers_own_scheduler() -> None:
    """Its steps are `leading`, of which DDIMScheduler is right; the second item is played at the last."""
    denoiser = Engine.from_pretrained("shapes", device="cpu").denoiser
    denoiser.batch_size = 6
    assert denoiser.features is not None
    # Its own texts, encoded apart.
    texts = {
        text: denoiser.encode_prompts([text]) for text in ("a red circle on a black background", "", "a pink star")
    }
    timesteps = tuple(denoiser.schedule.timesteps("uniform", 4))
    jobs = [Job("a red circle on a black background", timesteps, 3, guidance=2.5), Job("a pink star", timesteps, 4)]
    paths = [
        dataclasses.replace(path, explain_steps=(step,))
        for path, step in zip(trajectories(denoiser, jobs), (1, 3), strict=True)
    ]
    saliency = drawn(2, 16, 16)
    found = play(denoiser, paths, {"it": saliency}, denoiser.features)["it"]
    config = json.loads((FOLDER / "scheduler/scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(4)
    assert tuple(scheduler.timesteps.tolist()) == timesteps
    with torch.no_grad():
        for path, one, played in zip(paths, saliency, found, strict=True):
            (step,), job = path.steps, path.job
            now = torch.tensor([timesteps[step]])
            for game, point, x in perturbed(path.latents[step].numpy(), one.numpy(), "paper"):
                if point not in (0, 1, 9, 16):
                    continue
                latent = torch.from_numpy(x)[None]
                without, given = (denoiser.predict(latent, now, texts[text]) for text in ("", job.prompt))
                epsilon = without + job.guidance * (given - without)
                following = scheduler.step(epsilon, timesteps[step], latent).prev_sample
                expected = denoiser.features(denoiser.decode(following))[0]
                np.testing.assert_allclose(played.features[game, point], expected, rtol=2e-3, atol=2e-3)


# Maps ----------------------------------------------------------------------------------------------------------------


def test_maps_of_the_images_size_are_averaged() -> None:
    denoiser = Analytic(answer, (2, 2, 3))
    denoiser.image_shape = (4, 6)
    rows = [[1.0, 3, 0, 0, 8, 0], [5, 7, 0, 4, 0, 0], [0, 0, 2, 2, 1, 1], [0, 0, 2, 2, 1, -1]]
    assert fitted(torch.tensor(rows), denoiser).tolist() == [[4, 1, 2], [0, 2, 0.5]]
    small = torch.tensor([[1.0, 2, 3], [4, 5, 6]], dtype=torch.float64)
    assert fitted(small, denoiser).tolist() == small.tolist()
    several = fitted(torch.tensor([rows, rows[::-1]]), denoiser)
    assert several.tolist() == [[[4, 1, 2], [0, 2, 0.5]], [[0, 2, 0.5], [4, 1, 2]]]
    # They are played at the latent's size.
    path = path_of(denoiser, 0, TIMESTEPS)
    (found,) = play(denoiser, [path], {"it": torch.tensor([rows]).float()}, extract)["it"]
    assert_played(found, peer(denoiser, path, torch.tensor([[4, 1, 2], [0, 2, 0.5]])))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (torch.ones(2, 6), r"it has 2×6 pixels: expected the latent's 2×3 or the image's 4×6"),
        (torch.ones(3, 2), r"it has 3×2 pixels"),
        (torch.tensor([[1.0, 2, 3], [4, torch.nan, 6]]), r"it has values that are not finite: its pixels cannot be"),
        (torch.tensor([[1.0, 2, 3], [4, torch.inf, 6]]), r"it has values that are not finite"),
        (torch.full((2, 3), 7.0), r"it is the same everywhere: its pixels cannot be ranked"),
        (torch.tensor([[1.0, -1] * 3, [-1.0, 1] * 3] * 2), r"it is the same everywhere"),
        (torch.stack([torch.eye(2, 3), torch.zeros(2, 3)]), r"it \(number 1\) is the same everywhere"),
    ],
)
def test_maps_that_cannot_be_played(made: torch.Tensor, told: str) -> None:
    denoiser = Analytic(answer, (2, 2, 3))
    denoiser.image_shape = (4, 6)
    with pytest.raises(ValueError, match=told):
        fitted(made, denoiser, "it")


def test_what_ranks_pixels() -> None:
    """The released code ranks no pixel of a map that is nowhere positive."""
    assert usable(torch.tensor([[0.0, 1e-30]]))
    assert not usable(torch.zeros(2, 3))
    assert not usable(torch.tensor([[0.0, torch.nan]]))
    assert not usable(torch.tensor([[0.0, torch.inf]]))
    negative = -torch.arange(6.0).view(2, 3)
    assert usable(negative)
    assert not usable(negative, "xdiffusion")
    assert usable(negative + 1, "xdiffusion")
    assert fitted(negative, Analytic(answer, (2, 2, 3))).tolist() == negative.tolist()
    with pytest.raises(ValueError, match="same everywhere, what is negative being 0 in xdiffusion: its pixels"):
        fitted(negative, Analytic(answer, (2, 2, 3)), behaviour="xdiffusion")


def test_the_released_blur_is_scipys_kernel_in_zeros() -> None:
    x = drawn(2, 3, 7, 13)
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = gaussian_filter(impulse, 5)
    expected = np.stack([[convolve(c, kernel, mode="constant") for c in one] for one in x.double().numpy()])
    np.testing.assert_allclose(released_blur(x), expected, atol=1e-6)
    # Reflected within the window it is far flatter than a Gaussian, whose corner would be exp(−1) of the middle.
    alone = torch.zeros(1, 1, 21, 21)
    alone[..., 10, 10] = 1
    response = released_blur(alone)[0, 0]
    assert response[5, 5] / response[10, 10] > 0.45
    assert float(response.sum()) == pytest.approx(1, rel=1e-5)


# Many items and methods ----------------------------------------------------------------------------------------------

JOBS = [Job(str(number), TIMESTEPS, seed=number) for number in range(7)]


@dataclasses.dataclass(frozen=True)
class Ramp:
    """Maps that rise along the pixels, of all trajectories in the reverse order; `told` is told of every one."""

    name: str = "ramp"
    slope: float = 1.0
    flat: str = ""
    """a prompt whose map is the same everywhere"""

    def num_forwards(self, num_steps: int) -> int:
        return 0

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
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
class Asked(Ramp):
    """With a function of the caller's, of which there is only a name."""

    question: Callable[[float], float] = abs


class Played7:
    """`games` of an analytic denoiser, what it costs and what it tells."""

    def __init__(self, batch_size: int = 8) -> None:
        self.denoiser, self.told, self.sampled = Analytic(answer, batch_size=batch_size), 0, list[str]()

    def sample(self, jobs: Sequence[Job]) -> Iterator[Trajectory]:
        self.sampled += [job.prompt for job in jobs]
        yield from trajectories(self.denoiser, jobs)

    def tell(self) -> None:
        self.told += 1

    def __call__(self, *explainers: Any, jobs: Sequence[Job] = JOBS, **options: Any) -> Any:
        self.told, self.sampled = 0, []
        self.denoiser.batches.clear()
        options = {"features": Named()} | options
        return games(self.denoiser, self.sample, jobs, explainers, tell=self.tell, **options)

    @property
    def forwards(self) -> int:
        return sum(self.denoiser.batches)


def assert_turn(turn: Turn, denoiser: Analytic, job: Job, step: int, saliency: torch.Tensor, **options: Any) -> None:
    """A turn is the peer's game of one map of one job."""
    (path,) = trajectories(denoiser, [job])
    assert torch.equal(turn.saliency, saliency)
    assert turn.played is not None
    assert_played(turn.played, peer(denoiser, dataclasses.replace(path, explain_steps=(step,)), saliency, **options))


@pytest.mark.parametrize("behaviour", ["paper", "xdiffusion"])
def test_every_map_of_every_job_is_played(behaviour: str) -> None:
    """In groups of two, the last of one; explainers' maps come out of order, another tool's at any size."""
    run = Played7()
    others = drawn(7, 6, 5).numpy()
    ramp, fall = Ramp(), Ramp("fall", slope=-0.1)
    found = run(ramp, fall, maps={"theirs": others.astype(np.float64)}, step=1, behaviour=behaviour)
    assert list(found.turns) == ["ramp", "fall", "theirs"]
    assert run.sampled == [job.prompt for job in JOBS]
    assert run.told == 7 * 3
    assert (found.model, found.step, found.timesteps) == ("analytic", 1, TIMESTEPS)
    assert (found.features, found.behaviour) == ("three sums", behaviour)
    for item, job in enumerate(JOBS):
        for name, saliency in (
            ("ramp", ramp.map(run.denoiser, job)),
            ("fall", fall.map(run.denoiser, job)),
            ("theirs", torch.from_numpy(others[item])),
        ):
            assert_turn(found.turns[name][item], run.denoiser, job, 1, saliency, behaviour=behaviour)
    assert found.shared() == list(range(7))
    assert found.left_out() == {}


@pytest.mark.parametrize(("num_steps", "step"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (30, 21)])
def test_tables_are_of_three_quarters_of_the_steps(num_steps: int, step: int) -> None:
    jobs = [dataclasses.replace(JOBS[0], timesteps=tuple(range(900, 900 - num_steps, -1)))]
    assert Played7()(Ramp(), jobs=jobs).step == step


def test_a_map_that_ranks_nothing_is_left_out_of_every_method() -> None:
    run = Played7()
    found = run(Ramp(), Ramp("flat", flat="3"), Ramp("down", slope=-1.0))
    assert found.left_out() == {"flat": 1}
    assert found.shared() == [0, 1, 2, 4, 5, 6]
    assert found.turns["flat"][3].played is None
    assert torch.equal(found.turns["flat"][3].saliency, torch.full((6, 5), 3.0))
    assert found.turns["ramp"][3].played is not None
    for item in (2, 4):  # those beside it, in its group and out of it
        saliency = Ramp().map(run.denoiser, JOBS[item])
        assert_turn(found.turns["flat"][item], run.denoiser, JOBS[item], 1, saliency)
    nothing = run(Ramp("nothing", slope=0.0), Ramp())
    assert (nothing.left_out(), nothing.shared(), run.told) == ({"nothing": 7}, [], 14)
    released = run(Ramp("negative", slope=-1.0), jobs=JOBS[:2], behaviour="xdiffusion")
    assert released.left_out() == {}  # 3 at most
    below = {"below": -1 - torch.rand(7, 6, 5).numpy()}
    with pytest.raises(ValueError, match=r"map 'below' .* what is negative being 0"):
        run(maps=below, behaviour="xdiffusion")


def test_an_image_that_is_not_finite_costs_its_item_alone() -> None:
    class Overflows(Named):
        """On the images of some time-steps' latents: those whose first pixel is bright."""

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            return torch.where(images[:, 0, 0, 0, None] > 0.9, torch.inf, extract(images))

    found = Played7()(Ramp(), Ramp("down", slope=-1.0), features=Overflows())
    counts = [all(found.turns[name][item].counts for name in found.turns) for item in range(7)]
    assert 0 < sum(counts) < 7
    assert found.shared() == [item for item in range(7) if counts[item]]
    assert all(found.left_out().values())


def test_what_is_kept_is_not_done_again(tmp_path: Path) -> None:
    run = Played7()
    first = run(Ramp(), jobs=JOBS[:4], kept=Kept(tmp_path))
    cost = run.forwards
    assert run.told == 4
    assert len(list(tmp_path.glob("*.npz"))) == len(list(tmp_path.iterdir())) == 4
    again = run(Ramp(), jobs=JOBS[:4], kept=Kept(tmp_path))
    assert (run.forwards, run.sampled, run.told) == (0, [], 4)
    for turn, other in zip(first.turns["ramp"], again.turns["ramp"], strict=True):
        assert torch.equal(turn.saliency, other.saliency)
        assert torch.equal(turn.played.features, other.played.features)
        assert torch.equal(turn.played.mse, other.played.mse)
    # More items: theirs alone. In this Kept's memory, too.
    kept = Kept(tmp_path)
    run(Ramp(), kept=kept)
    assert (run.sampled, run.told) == (["4", "5", "6"], 7)
    run(Ramp(), kept=kept)
    assert (run.forwards, run.told) == (0, 7)
    # One more method: only its games; and every method is told of, those that are kept beside it as well.
    run(Ramp(), Ramp("more", slope=2.0), jobs=JOBS[:4], kept=kept)
    assert (run.forwards, run.told) == (cost, 8)
    # Another tool's maps are known by their values, whatever they are called.
    theirs = drawn(4, 6, 5).numpy()
    run(maps={"theirs": theirs}, jobs=JOBS[:4], kept=kept)
    run(Ramp(), maps={"renamed": theirs}, jobs=JOBS[:4], kept=kept)
    assert (run.forwards, run.told) == (0, 8)


def test_maps_that_rank_nothing_are_kept_as_such(tmp_path: Path) -> None:
    run = Played7()
    run(Ramp(flat="1"), jobs=JOBS[:2], kept=Kept(tmp_path))
    found = run(Ramp(flat="1"), jobs=JOBS[:2], kept=Kept(tmp_path))
    assert (run.forwards, found.left_out()) == (0, {"ramp": 1})
    assert found.turns["ramp"][1].played is None


def test_what_is_different_is_not_taken_for_the_same(tmp_path: Path) -> None:
    run, kept = Played7(), Kept(tmp_path)
    options: dict[str, Any] = {"jobs": JOBS[:1], "kept": kept, "step": 1}
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
        (Ramp(), {"behaviour": "xdiffusion"}),
        (Ramp(), {"features": Named("others")}),
        (Ramp(), {"features": Named(dtype=torch.float16)}),
        (Ramp(), {"features": extract}),
    ]  # fmt: skip
    for explainer, change in changed:
        run(explainer, **options | change)
        assert run.forwards, (explainer, change)
    run(maps={"theirs": drawn(1, 6, 5).numpy()}, **options)
    run(maps={"theirs": drawn(1, 6, 5, seed=1).numpy()}, **options)
    assert run.forwards
    run(Ramp(), **options)
    assert run.forwards == 0
    # Another model, and another precision of it.
    for attribute, value in (("name", "another"), ("dtype", torch.float16)):
        other = Played7()
        setattr(other.denoiser, attribute, value)
        other(Ramp(), **options)
        assert other.forwards


def test_functions_are_not_known_by_their_names(tmp_path: Path) -> None:
    """Neither a similarity's nor an extractor's; nor is one that was given taken for the model's own."""
    run, kept = Played7(), Kept(tmp_path)
    for _ in range(2):
        run(Asked(), jobs=JOBS[:1], kept=kept)
        assert run.forwards
        found = run(Ramp(), jobs=JOBS[:1], kept=kept, features=extract)
        assert run.forwards
        assert found.features == "extract"
    run.denoiser.features = lambda images: 2 * extract(images)
    own = run(Ramp(), jobs=JOBS[:1], kept=kept, features=None)
    assert run.forwards
    assert own.features == "analytic's own"
    assert not torch.equal(own.turns["ramp"][0].played.features, found.turns["ramp"][0].played.features)
    run(Ramp(), jobs=JOBS[:1], kept=kept, features=None)
    assert run.forwards == 0


def test_a_file_that_was_cut_short_is_made_anew(tmp_path: Path) -> None:
    """At whatever byte; the others are not."""
    run = Played7()
    first = run(Ramp(), jobs=JOBS[:3], kept=Kept(tmp_path))
    files = sorted(tmp_path.iterdir())
    whole = files[0].read_bytes()
    assert zipfile.is_zipfile(files[0])
    for size in [0, 1, 3, 4, 5, *range(30, len(whole), 97), len(whole) - 23, len(whole) - 22, len(whole) - 1]:
        files[0].write_bytes(whole[:size])
        assert Kept(tmp_path).get(files[0].stem) is None
    run(Ramp(), jobs=JOBS[:3], kept=Kept(tmp_path))
    assert len(run.sampled) == 1
    assert run.told == 3
    again = run(Ramp(), jobs=JOBS[:3], kept=Kept(tmp_path))
    assert run.forwards == 0
    for turn, other in zip(first.turns["ramp"], again.turns["ramp"], strict=True):
        assert_played(other.played, turn.played)


def test_texts_and_arrays_of_something_else_count_as_absent(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    (tmp_path / "a.npz").write_text("not an archive")
    np.savez(tmp_path / "b.npz", saliency=np.zeros(3))
    damaged = tmp_path / "c.npz"
    np.savez(damaged, saliency=np.zeros((2, 2)), features=np.zeros(0), mse=np.zeros(0))
    content = damaged.read_bytes()
    damaged.write_bytes(content.replace(bytes(32), bytes(31) + b"\1", 1))
    assert [kept.get(key) for key in "abcd"] == [None] * 4


@pytest.mark.parametrize(
    ("explainers", "options", "told"),
    [
        ([], {}, "methods must have a name each"),
        ([Ramp(), Ramp(slope=2.0)], {}, "methods must have a name each"),
        ([Ramp()], {"maps": {"ramp": np.eye(6, 5)[None].repeat(7, 0)}}, "methods must have a name each"),
        ([Ramp()], {"jobs": []}, "there is no prompt to play with: give at least one"),
        ([Ramp()], {"step": 3}, r"step 3 is outside \[0, 2\]: steps index the time-steps"),
        ([Ramp()], {"step": -1}, r"step -1 is outside \[0, 2\]"),
        ([Ramp()], {"behaviour": "released"}, "behaviour 'released' is not known: expected one of paper, xdiffusion"),
        ([Ramp()], {"features": None}, "analytic comes with no extractor: give a folder of a transformers vision"),
        (
            [Ramp()],
            {"maps": {"m": np.eye(6, 5)[None].repeat(6, 0)}},
            r"maps 'm' are \(6, 6, 5\): expected .* \(7, h, w",
        ),
        ([Ramp()], {"maps": {"m": np.eye(6, 4)[None].repeat(7, 0)}}, r"map 'm' has 6×4 pixels: expected .* 6×5"),
        ([Ramp()], {"maps": {"m": np.zeros((7, 6, 5))}}, r"map 'm' \(number 0\) is the same everywhere"),
        ([Ramp()], {"jobs": [*JOBS[:2], Job("2", (9, 8))]}, r"different numbers of steps \(2, 3\): one is needed"),
        ([Ramp()], {"jobs": [*JOBS[:2], Job("refused", TIMESTEPS)]}, "this prompt has no ramp"),
        ([Random()], {"jobs": [*JOBS, Job("no number", TIMESTEPS)]}, "could not convert string to float: 'no number'"),
        ([Random()], {"jobs": [*JOBS, Job("1", TIMESTEPS, negative_prompt="neither")]}, "'neither'"),
    ],
)
def test_what_is_not_possible_is_told_before_anything_is_computed(
    explainers: list[Any], options: dict[str, Any], told: str
) -> None:
    run = Played7()
    with pytest.raises(ValueError, match=told):
        run(*explainers, **options)
    assert (run.forwards, run.sampled, run.told) == (0, [], 0)


def test_an_unknown_behaviour_of_one_play() -> None:
    denoiser = Analytic(answer)
    with pytest.raises(ValueError, match="behaviour 'any' is not known"):
        play(denoiser, two(denoiser), MAPS, extract, behaviour="any")


# Methods -------------------------------------------------------------------------------------------------------------


def test_methods_by_their_names() -> None:
    """Each differs from DF-RISE by what its name says."""
    made = {one.name: one for one in methods(METHODS, num_masks=70, num_samples=80)}
    assert list(made) == list(METHODS)
    changed = {
        "rise": {},
        "rise-global": {"score": "global"},
        "rise-grid": {"masks": "rise"},
        "rise-frechet": {"similarity": "frechet", "score": "global"},
        "rise-cosine": {"similarity": "cosine"},
        "rise-contrast": {"similarity": "contrast"},
        "rise-luminance": {"similarity": "luminance"},
        "rise-contrast_structure": {"similarity": "contrast_structure"},
        "rise-ssim": {"similarity": "ssim"},
    }
    assert {name for name in METHODS if name.startswith("rise")} == set(changed)
    for name, change in changed.items():
        assert made[name] == dataclasses.replace(Rise(70), name=name, **change)
    assert made["lime"] == Lime(80)
    assert {name: type(made[name]).__name__ for name in ("random", "cam", "relevance", "attention")} == {
        "random": "Random", "cam": "Cam", "relevance": "Relevance", "attention": "Attention",
    }  # fmt: skip
    assert [one.name for one in methods(["cam", "rise", "cam"])] == ["cam", "rise"]
    assert (methods(["rise"])[0].num_masks, methods(["lime"])[0].num_samples) == (500, 1000)
    with pytest.raises(ValueError, match=r"method 'gradcam' is not known: expected one of lime, random, cam"):
        methods(["rise", "gradcam"])


def test_tables_have_the_papers_methods() -> None:
    assert TABLES[1] == ("random", "lime", "rise", "cam")
    assert TABLES[2] == ("rise", "rise-frechet", "rise-cosine", "rise-contrast", "rise-grid")
    assert GAMES == ("deletion", "insertion")


def test_the_embedded_model_plays_with_its_own_features() -> None:
    """Of a method's maps the explained step's is what is played."""
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job("a red circle on a black background", seed=1, num_steps=2)
    found = games(engine.denoiser, engine.sample, [job], methods(["random", "rise"], num_masks=8), step=1)
    assert (found.step, found.features, found.shared()) == (1, "shapes's own", [0])
    alone = engine.explain(job.prompt, Rise(8), seed=1, num_steps=2)
    np.testing.assert_allclose(found.turns["rise"][0].saliency, alone.maps["rise"][1], rtol=1e-4, atol=1e-4)
    assert found.turns["random"][0].played.features.shape == (2, 17, 96)
