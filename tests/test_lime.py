"""LIME against a peer that asks one sample at a time, its samples bit by bit, and images that are hard to divide."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic
from marks import soak
from scipy.spatial.distance import cosine
from skimage.segmentation import quickshift
from test_dfkernels_masks import random_uint32_scalar
from tolerance import tolerance
from torch.testing import assert_close

import dfengine
from dfengine import Engine, Lime
from dfengine.diffusion.trajectory import Trajectory
from dfengine.evaluate import scenes
from dfengine.explain import StepMap, describe, rebuild
from dfengine.explain.lime import downsample_labels

SHAPE = (6, 5)
C3 = 0.03**2 / 2
IMAGES = [scene.image for scene in scenes(4, seed=3)]


def mixing(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Mixes neighbours and channels, and depends on the prompt."""
    mixed = torch.tanh(x_t.roll(1, 2) + 0.3 * x_t.roll(1, 3)) * x_t + 0.2 * x_t.flip(1)
    return mixed * (1 + number[:, None, None, None]) + 0.5 * number[:, None, None, None] * x_t.roll(2, 3)


def path_of(denoiser: Analytic, steps: int = 1, image: np.ndarray | None = None, **settings: Any) -> Trajectory:
    latents = torch.randn(steps, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    image = IMAGES[0] if image is None else image
    return dataclasses.replace(denoiser.trajectory(latents, **settings), image=torch.from_numpy(image))


def carried_literally(segments: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count the pixels of each cell, whose centres are in it."""
    inside: dict[tuple[int, int], Counter[int]] = {}
    rows, columns = (
        [int(Fraction(2 * at + 1, 2) / Fraction(size, cells)) for at in range(size)]
        for size, cells in zip(segments.shape, shape, strict=True)
    )
    for (y, x), segment in np.ndenumerate(segments):
        inside.setdefault((rows[y], columns[x]), Counter())[int(segment)] += 1
    most = {cell: max(sorted(count), key=lambda one, c=count: c[one]) for cell, count in inside.items()}
    names = sorted(set(most.values()))
    return np.array([[names.index(most[y, x]) for x in range(shape[1])] for y in range(shape[0])])


def divided_literally(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    distance = 200.0
    while True:
        found = carried_literally(quickshift(image, kernel_size=4, max_dist=distance, ratio=0.2), shape)
        if len(np.unique(found)) >= 4:
            return found
        distance /= 2


def kept_literally(path: Trajectory, step: int, samples: int, count: int) -> np.ndarray:
    """Philox, a word at a time: stream 3."""
    seed = path.job.mask_seed % 2**64
    drawn = [[random_uint32_scalar(seed, step, n, j, 3) < 2**31 for j in range(count)] for n in range(1, samples)]
    return np.array([[True] * count, *drawn])


def structure_literally(a: np.ndarray, b: np.ndarray) -> float:
    """(σ_ab + C3) / (σ_a σ_b + C3) over all pixels of a channel, mean over channels."""
    each = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        each.append((covariance + C3) / (x.std() * y.std() + C3))
    return float(np.mean(each))


def regressed_literally(kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted ridge with an intercept, in closed form."""
    everything = np.ones(kept.shape[1])
    d = np.array([cosine(everything, row) if row.any() else 1.0 for row in kept.astype(np.float64)])
    w = np.sqrt(np.exp(-(d**2) / 0.25**2))
    x = np.column_stack([kept, np.ones(len(kept))])
    penalty = np.diag([1.0] * kept.shape[1] + [0.0])
    return np.linalg.solve(x.T * w @ x + penalty, x.T * w @ scores)[:-1]


def lime_literally(
    denoiser: Analytic, path: Trajectory, step: int, samples: int, target: str
) -> tuple[np.ndarray, np.ndarray]:
    """The map and the scores, a forward a sample."""

    def ask(latent: torch.Tensor) -> np.ndarray:
        t = torch.tensor([path.job.timesteps[step]])
        given, without = (denoiser(latent[None], t, told)[0] for told in (path.prompt, path.negative))
        guided = without + path.job.guidance * (given - without)
        return {"conditional": given, "unconditional": without, "guided": guided}[target].numpy()

    segments = divided_literally(path.image.numpy(), denoiser.latent_shape[1:])
    kept = kept_literally(path, step, samples, int(segments.max()) + 1)
    reference = ask(path.latents[step])
    scores = np.array(
        [structure_literally(ask(path.latents[step] * torch.from_numpy(row[segments])), reference) for row in kept]
    )
    return regressed_literally(kept, scores)[segments], scores


@pytest.mark.slow
@pytest.mark.parametrize("target", ["conditional", "guided", "unconditional"])
def test_lime_is_its_literal_peer(target: str) -> None:
    denoiser = Analytic(mixing, (2, *SHAPE), batch_size=7)
    path = path_of(denoiser, 2, guidance=3.0)
    for found in Lime(25, target=target).explain(denoiser, [path]):
        saliency, scores = lime_literally(denoiser, path, found.step, 25, target)
        assert found.scores is not None
        assert_close(found.scores.double(), torch.from_numpy(scores), **tolerance("similarity"))
        # Coefficients are weighted means of scores, by sums of weights above 1: no farther off than these.
        assert_close(found.saliency.double(), torch.from_numpy(saliency), **tolerance("similarity"))
        assert (found.error, dict(found.layers), found.method) == (None, {}, "lime")


def test_the_regression_is_a_weighted_ridge_with_an_intercept() -> None:
    generator = np.random.default_rng(0)
    kept, scores = generator.random((50, 6)) < 0.5, generator.normal(3, 1, 50)
    kept[0], kept[1] = True, False
    assert_close(Lime().regress(kept, scores), regressed_literally(kept, scores), rtol=1e-9, atol=1e-9)
    # Its settings: by another width all samples weigh the same, and of much ridge nothing is left.
    flat, x = Lime(width=1e6, alpha=1e-9).regress(kept, scores), np.column_stack([kept, np.ones(50)])
    assert_close(flat, np.linalg.lstsq(x, scores)[0][:-1], rtol=1e-6, atol=1e-6)
    assert np.abs(Lime(alpha=1e9).regress(kept, scores)).max() < 1e-6


@pytest.mark.parametrize(
    ("image", "shape"),
    [((7, 9), (3, 2)), ((8, 8), (2, 4)), ((5, 5), (5, 5)), ((5, 7), (3, 4)), ((64, 64), (6, 5)), ((3, 1), (1, 1))],
)
def test_segments_are_carried_by_majority(image: tuple[int, int], shape: tuple[int, int]) -> None:
    for seed in range(5):
        # Few and many segments: with three, cells are full of ties.
        segments = np.random.default_rng(seed).integers(0, 3 + 20 * seed, image)
        np.testing.assert_array_equal(downsample_labels(segments, shape), carried_literally(segments, shape))


def test_carried_by_hand() -> None:
    # Five columns on three cells, by their centres: 2, 1 and 2. Segment 7 wins nowhere and leaves no number free.
    np.testing.assert_array_equal(downsample_labels(np.array([[3, 3, 9, 5, 5]]), (1, 3)), [[0, 2, 1]])
    np.testing.assert_array_equal(downsample_labels(np.array([[3, 7, 7, 9], [3, 3, 9, 9]]), (1, 2)), [[0, 1]])


def test_the_distance_is_halved_until_the_latent_has_four(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    # Quarters; five segments, of which four cells of the latent show three; one.
    quarters = np.arange(4).reshape(2, 2).repeat(4, 0).repeat(4, 1)
    hidden = np.minimum(quarters, 2)
    hidden[0, 0], hidden[7, 7] = 3, 4
    answers = {200.0: np.zeros((8, 8), int), 100.0: hidden, 50.0: quarters}

    def divide(image: np.ndarray, **given: Any) -> np.ndarray:
        asked.append(given)
        return answers[given["max_dist"]]

    monkeypatch.setattr("skimage.segmentation.quickshift", divide)
    found = Lime().segment(np.zeros((8, 8, 3), np.uint8), (2, 2))
    np.testing.assert_array_equal(found, [[0, 1], [2, 3]])
    assert asked == [{"kernel_size": 4, "max_dist": distance, "ratio": 0.2} for distance in (200, 100, 50)]
    monkeypatch.setitem(answers, 7.0, quarters)
    Lime(kernel_size=2, max_distance=7, ratio=0.9).segment(np.zeros((8, 8, 3), np.uint8), (2, 2))
    assert asked[-1] == {"kernel_size": 2, "max_dist": 7, "ratio": 0.9}


@pytest.mark.parametrize(
    ("image", "shape", "least"),
    [
        ((64, 64), (16, 16), 4),
        ((16, 16), (4, 4), 4),
        ((2, 2), (2, 2), 4),
        ((8, 8), (2, 2), 4),
        ((3, 8), (1, 4), 4),
        ((5, 5), (1, 3), 3),
        ((8, 8), (1, 1), 1),
        ((1, 1), (1, 1), 1),
    ],
)
def test_a_constant_image_is_divided(image: tuple[int, int], shape: tuple[int, int], least: int) -> None:
    segments = Lime().segment(np.full((*image, 3), 128, np.uint8), shape)
    assert segments.shape == shape
    assert np.unique(segments).tolist() == list(range(int(segments.max()) + 1))
    assert segments.max() + 1 >= least
    denoiser = Analytic(mixing, (1, *shape))
    (found,) = Lime(10).explain(denoiser, [path_of(denoiser, image=np.full((*image, 3), 128, np.uint8))])
    assert found.saliency.isfinite().all()


@pytest.mark.slow
def test_images_of_few_segments_are_divided_as_the_peer_does() -> None:
    for image in (*IMAGES[1:3], np.full((20, 30, 3), 9, np.uint8)):
        for shape in ((2, 2), (3, 7)):
            np.testing.assert_array_equal(Lime().segment(image, shape), divided_literally(image, shape))


@pytest.mark.slow
def test_samples_are_drawn_by_counter_and_the_first_keeps_everything() -> None:
    seen: list[torch.Tensor] = []

    def see(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(x_t[:, 0].clone())
        return x_t

    denoiser = Analytic(see, (2, *SHAPE), batch_size=8)
    paths = [
        dataclasses.replace(denoiser.trajectory(torch.ones(2, 2, *SHAPE), seed=seed), image=torch.from_numpy(image))
        for seed, image in ((0, IMAGES[0]), (2**40 + 1, IMAGES[1]))
    ]
    list(Lime(13).explain(denoiser, paths))
    masks = torch.cat(seen[1:])  # behind the references
    assert len(masks) == 56
    assert not masks[52:].any()
    for row, mask in enumerate(masks[:52].reshape(4, 13, *SHAPE)):
        path, step = paths[row // 2], row % 2
        segments = divided_literally(path.image.numpy(), SHAPE)
        kept = kept_literally(path, step, 13, int(segments.max()) + 1)
        np.testing.assert_array_equal(mask.numpy(), kept[:, segments])
        assert mask[0].all()


def everything(batch_size: int, items: list[int], done: set[tuple[int, int]] | None = None, most: int = 10**6) -> dict:
    """Maps and scores by (image, step); images differ in how many segments they have."""

    def answer(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        if len(x_t) > most:
            raise torch.OutOfMemoryError("out of memory")
        return mixing(x_t, number)

    denoiser = Analytic(answer, (2, *SHAPE), batch_size=batch_size)
    paths = [path_of(denoiser, 3, IMAGES[item], seed=item) for item in items]
    found = list(Lime(20).explain(denoiser, paths, done or set()))
    assert len({(m.item, m.step) for m in found}) == len(found)
    if most < batch_size:
        assert denoiser.batch_size <= most
    return {(items[m.item], m.step): m for m in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "items", "most"),
    [
        (7, [0, 1, 2], 99),
        (16, [2, 0, 1], 5),
        *(soak(*case) for case in [(1, [0, 1, 2], 99), (1000, [0, 1, 2], 1000), (16, [1], 99)]),
    ],
)
def test_maps_do_not_depend_on_their_batch(batch_size: int, items: list[int], most: int) -> None:
    whole = everything(16, [0, 1, 2])
    counts = {int(divided_literally(image, SHAPE).max()) for image in IMAGES[:3]}
    assert len(counts) > 1
    found = everything(batch_size, items, most=most)
    assert set(found) == {(item, step) for item in items for step in range(3)}
    for key, one in found.items():
        assert_close(one.scores, whole[key].scores, rtol=1e-6, atol=1e-6)
        assert_close(one.saliency, whole[key].saliency, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_is_done_is_left_out_and_the_rest_is_the_same_to_the_bit() -> None:
    whole, rest = everything(16, [0, 1]), everything(16, [0, 1], done={(0, 0), (0, 2), (1, 1)})
    assert set(rest) == {(0, 1), (1, 0), (1, 2)}
    for key, one in rest.items():
        assert torch.equal(one.saliency, whole[key].saliency)
        assert torch.equal(one.scores, whole[key].scores)
    denoiser = Analytic(mixing, (2, *SHAPE))
    assert list(Lime(5).explain(denoiser, [path_of(denoiser)], {(0, 0)})) == []
    assert denoiser.batches == []


def test_a_prediction_that_is_not_finite_leaves_its_own_map_empty() -> None:
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        overflows = (x_t[:, :1, :1, :1] == 0) & (x_t[:, :1, 5:, 4:] != 0)
        return torch.where(overflows, torch.inf, x_t)

    denoiser = Analytic(answer, (1, *SHAPE))
    latents = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    latents[1, :, 5, 4] = 0
    path = dataclasses.replace(denoiser.trajectory(latents), image=torch.from_numpy(IMAGES[0]))
    with pytest.warns(UserWarning, match="a map is not finite"):
        first, second = Lime(20).explain(denoiser, [path])
    assert first.saliency.isnan().all()
    assert second.saliency.isfinite().all()
    assert second.scores.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"num_samples": 1}, "1 samples .* at least 2"),
        ({"num_samples": 2**25}, "33554432 samples .* at most"),
        ({"kernel_size": 0}, r"kernel_size 0\.0"),
        ({"kernel_size": 0.5}, r"kernel_size 0\.5 .* at least 1 pixel"),
        ({"max_distance": -1}, "max_distance"),
        ({"ratio": 0}, "ratio"),
        ({"width": float("nan")}, "width nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"target": "both"}, "target 'both' .* conditional, guided, unconditional"),
    ],
)
def test_settings_that_are_not_possible(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Lime(**wrong)


def test_settings_are_plain_numbers_and_come_back() -> None:
    lime = Lime(7, kernel_size=3, width=np.float64(0.5), target="guided", name="other")
    assert {type(value) for value in dataclasses.asdict(lime).values()} == {int, float, str}
    assert rebuild(json.loads(json.dumps(describe(lime)))) == lime
    assert (lime.num_samples, lime.num_forwards(3), Lime(7).num_forwards(3)) == (7, 48, 24)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2])
def test_a_run_in_a_file_is_gone_on_with_to_the_bit(engine: Engine, tmp_path: Path, cut: int) -> None:
    prompt, lime, seen = "a red circle on a gray background", Lime(6), list[StepMap]()
    whole = engine.explain(prompt, lime, num_steps=3)

    def until(last: int) -> Callable[[Any], None]:
        def watch(event: Any) -> None:
            if isinstance(event, StepMap):
                seen.append(event)
                if len(seen) == last:
                    raise KeyboardInterrupt

        return watch

    with pytest.raises(KeyboardInterrupt):
        engine.explain(prompt, lime, num_steps=3, out=tmp_path / "run.h5", on_event=until(cut))
    engine.explain(prompt, lime, num_steps=3, out=tmp_path / "run.h5", on_event=until(99))
    assert [one.step for one in seen] == [0, 1, 2]
    with dfengine.open(tmp_path / "run.h5") as run:
        (item,) = run
        assert item.settings["lime"] == lime
        np.testing.assert_array_equal(item.maps["lime"], whole.maps["lime"])
        np.testing.assert_array_equal(item.scores["lime"], whole.scores["lime"])
        np.testing.assert_array_equal(item.scores["lime"], np.stack([one.scores for one in seen]))
        assert np.isfinite(np.asarray(item.scores["lime"])).all()
        assert "lime" not in item.errors
