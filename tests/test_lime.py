"""LIME against a literal implementation, its samples bit by bit, and images that are hard to segment."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import partial
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

#: LIME with quickshift's segments, as the literal implementation has.
few = partial(Lime, segmentation="quickshift")
SHAPE = (6, 5)
C3 = 0.03**2 / 2
IMAGES = [scene.image for scene in scenes(4, seed=3)]


def mix(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """A prediction that mixes neighbours and channels and depends on the prompt."""
    mixed = torch.tanh(x_t.roll(1, 2) + 0.3 * x_t.roll(1, 3)) * x_t + 0.2 * x_t.flip(1)
    return mixed * (1 + number[:, None, None, None]) + 0.5 * number[:, None, None, None] * x_t.roll(2, 3)


def path_of(denoiser: Analytic, steps: int = 1, image: np.ndarray | None = None, **settings: Any) -> Trajectory:
    latents = torch.randn(steps, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    image = IMAGES[0] if image is None else image
    return dataclasses.replace(denoiser.trajectory(latents, **settings), image=torch.from_numpy(image))


def downsample_labels_literally(segments: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The most frequent label of each cell, over the pixels whose centres lie in it."""
    inside: dict[tuple[int, int], Counter[int]] = {}
    rows, columns = (
        [int(Fraction(2 * at + 1, 2) / Fraction(size, cells)) for at in range(size)]
        for size, cells in zip(segments.shape, shape, strict=True)
    )
    for (y, x), segment in np.ndenumerate(segments):
        inside.setdefault((rows[y], columns[x]), Counter())[int(segment)] += 1
    majority = {cell: max(sorted(count), key=lambda one, c=count: c[one]) for cell, count in inside.items()}
    labels = sorted(set(majority.values()))
    return np.array([[labels.index(majority[y, x]) for x in range(shape[1])] for y in range(shape[0])])


def segment_literally(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    distance = 200.0
    while True:
        labels = downsample_labels_literally(quickshift(image, kernel_size=4, max_dist=distance, ratio=0.2), shape)
        if len(np.unique(labels)) >= 4:
            return labels
        distance /= 2


def sample_literally(path: Trajectory, step: int, samples: int, count: int) -> np.ndarray:
    """Segments kept by each sample, from one Philox word at a time (stream 3)."""
    seed = path.job.mask_seed % 2**64
    samples_kept = [
        [random_uint32_scalar(seed, step, n, j, 3) < 2**31 for j in range(count)] for n in range(1, samples)
    ]
    return np.array([[True] * count, *samples_kept])


def structure_term_literally(a: np.ndarray, b: np.ndarray) -> float:
    """(σ_ab + C3) / (σ_a σ_b + C3) over all pixels of a channel, mean over channels."""
    per_channel = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        covariance = ((x - x.mean()) * (y - y.mean())).mean()
        per_channel.append((covariance + C3) / (x.std() * y.std() + C3))
    return float(np.mean(per_channel))


def regress_literally(kept: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted ridge with an intercept, in closed form."""
    all_kept = np.ones(kept.shape[1])
    d = np.array([cosine(all_kept, row) if row.any() else 1.0 for row in kept.astype(np.float64)])
    w = np.sqrt(np.exp(-(d**2) / 0.25**2))
    x = np.column_stack([kept, np.ones(len(kept))])
    penalty = np.diag([1.0] * kept.shape[1] + [0.0])
    return np.linalg.solve(x.T * w @ x + penalty, x.T * w @ scores)[:-1]


def lime_literally(
    denoiser: Analytic, path: Trajectory, step: int, samples: int, target: str
) -> tuple[np.ndarray, np.ndarray]:
    """The map and the scores, with one forward per sample."""

    def predict(latent: torch.Tensor) -> np.ndarray:
        t = torch.tensor([path.job.timesteps[step]])
        conditional, unconditional = (
            denoiser(latent[None], t, condition)[0] for condition in (path.prompt, path.negative)
        )
        guided = unconditional + path.job.guidance * (conditional - unconditional)
        return {"conditional": conditional, "unconditional": unconditional, "guided": guided}[target].numpy()

    segments = segment_literally(path.image.numpy(), denoiser.latent_shape[1:])
    kept = sample_literally(path, step, samples, int(segments.max()) + 1)
    reference = predict(path.latents[step])
    scores = np.array(
        [
            structure_term_literally(predict(path.latents[step] * torch.from_numpy(row[segments])), reference)
            for row in kept
        ]
    )
    return regress_literally(kept, scores)[segments], scores


@pytest.mark.slow
@pytest.mark.parametrize("target", ["conditional", "guided", "unconditional"])
def test_lime_equals_its_literal_implementation(target: str) -> None:
    denoiser = Analytic(mix, (2, *SHAPE), batch_size=7)
    path = path_of(denoiser, 2, guidance=3.0)
    for step_map in few(25, target=target).explain(denoiser, [path]):
        saliency, scores = lime_literally(denoiser, path, step_map.step, 25, target)
        assert step_map.scores is not None
        assert_close(step_map.scores.double(), torch.from_numpy(scores), **tolerance("similarity"))
        # Coefficients are weighted means of scores, so their error is at most that of the scores.
        assert_close(step_map.saliency.double(), torch.from_numpy(saliency), **tolerance("similarity"))
        assert (step_map.error, dict(step_map.layers), step_map.method) == (None, {}, "lime")


def test_the_regression_is_a_weighted_ridge_with_an_intercept() -> None:
    generator = np.random.default_rng(0)
    kept, scores = generator.random((50, 6)) < 0.5, generator.normal(3, 1, 50)
    kept[0], kept[1] = True, False
    assert_close(few().regress(kept, scores), regress_literally(kept, scores), rtol=1e-9, atol=1e-9)
    # A wide kernel gives all samples the same weight, and a large penalty shrinks the coefficients to zero.
    flat, x = few(width=1e6, alpha=1e-9).regress(kept, scores), np.column_stack([kept, np.ones(50)])
    assert_close(flat, np.linalg.lstsq(x, scores)[0][:-1], rtol=1e-6, atol=1e-6)
    assert np.abs(few(alpha=1e9).regress(kept, scores)).max() < 1e-6


@pytest.mark.parametrize(
    ("image", "shape"),
    [((7, 9), (3, 2)), ((8, 8), (2, 4)), ((5, 5), (5, 5)), ((5, 7), (3, 4)), ((64, 64), (6, 5)), ((3, 1), (1, 1))],
)
def test_segments_are_downsampled_by_majority(image: tuple[int, int], shape: tuple[int, int]) -> None:
    for seed in range(5):
        # Few and many segments: with three, most cells have ties.
        segments = np.random.default_rng(seed).integers(0, 3 + 20 * seed, image)
        np.testing.assert_array_equal(downsample_labels(segments, shape), downsample_labels_literally(segments, shape))


def test_downsampled_labels_by_hand() -> None:
    # Five columns fall into three cells by their centres: 2, 1 and 2.
    np.testing.assert_array_equal(downsample_labels(np.array([[3, 3, 9, 5, 5]]), (1, 3)), [[0, 2, 1]])
    # Segment 7 has no majority in any cell, and the remaining labels are consecutive.
    np.testing.assert_array_equal(downsample_labels(np.array([[3, 7, 7, 9], [3, 3, 9, 9]]), (1, 2)), [[0, 1]])


def test_the_distance_is_halved_until_the_latent_has_four_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []
    # Four quarters; five segments of which three survive in the latent's four cells; one segment.
    quarters = np.arange(4).reshape(2, 2).repeat(4, 0).repeat(4, 1)
    hidden = np.minimum(quarters, 2)
    hidden[0, 0], hidden[7, 7] = 3, 4
    answers = {200.0: np.zeros((8, 8), int), 100.0: hidden, 50.0: quarters}

    def fake_quickshift(image: np.ndarray, **options: Any) -> np.ndarray:
        calls.append(options)
        return answers[options["max_dist"]]

    monkeypatch.setattr("skimage.segmentation.quickshift", fake_quickshift)
    segments = few().segment(np.zeros((8, 8, 3), np.uint8), (2, 2))
    np.testing.assert_array_equal(segments, [[0, 1], [2, 3]])
    assert calls == [{"kernel_size": 4, "max_dist": distance, "ratio": 0.2} for distance in (200, 100, 50)]
    monkeypatch.setitem(answers, 7.0, quarters)
    few(kernel_size=2, max_distance=7, ratio=0.9).segment(np.zeros((8, 8, 3), np.uint8), (2, 2))
    assert calls[-1] == {"kernel_size": 2, "max_dist": 7, "ratio": 0.9}


@pytest.mark.parametrize(
    ("image", "shape", "min_segments"),
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
def test_a_constant_image_is_segmented(image: tuple[int, int], shape: tuple[int, int], min_segments: int) -> None:
    segments = few().segment(np.full((*image, 3), 128, np.uint8), shape)
    assert segments.shape == shape
    assert np.unique(segments).tolist() == list(range(int(segments.max()) + 1))
    assert segments.max() + 1 >= min_segments
    denoiser = Analytic(mix, (1, *shape))
    (step_map,) = few(10).explain(denoiser, [path_of(denoiser, image=np.full((*image, 3), 128, np.uint8))])
    assert step_map.saliency.isfinite().all()


@pytest.mark.slow
def test_images_with_few_segments_are_segmented_like_the_literal_implementation() -> None:
    for image in (*IMAGES[1:3], np.full((20, 30, 3), 9, np.uint8)):
        for shape in ((2, 2), (3, 7)):
            np.testing.assert_array_equal(few().segment(image, shape), segment_literally(image, shape))


@pytest.mark.slow
def test_an_image_has_about_as_many_segments_as_asked_for() -> None:
    for image in IMAGES:
        for count in (8, 32):
            segments = Lime(num_segments=count).segment(image, (16, 16))
            assert segments.shape == (16, 16)
            assert np.unique(segments).tolist() == list(range(int(segments.max()) + 1))
            assert 0.6 * count < segments.max() + 1 <= 1.3 * count


def test_samples_are_counter_based_and_the_first_keeps_all_segments() -> None:
    inputs: list[torch.Tensor] = []

    def record_input(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        inputs.append(x_t[:, 0].clone())
        return x_t

    denoiser = Analytic(record_input, (2, *SHAPE), batch_size=8)
    paths = [
        dataclasses.replace(denoiser.trajectory(torch.ones(2, 2, *SHAPE), seed=seed), image=torch.from_numpy(image))
        for seed, image in ((0, IMAGES[0]), (2**40 + 1, IMAGES[1]))
    ]
    list(few(13).explain(denoiser, paths))
    masks = torch.cat(inputs[1:])  # after the references
    assert len(masks) == 56
    assert not masks[52:].any()
    for row, mask in enumerate(masks[:52].reshape(4, 13, *SHAPE)):
        path, step = paths[row // 2], row % 2
        segments = segment_literally(path.image.numpy(), SHAPE)
        kept = sample_literally(path, step, 13, int(segments.max()) + 1)
        np.testing.assert_array_equal(mask.numpy(), kept[:, segments])
        assert mask[0].all()


def explain_all(
    batch_size: int, items: list[int], done: set[tuple[int, int]] | None = None, max_batch: int = 10**6
) -> dict:
    """Maps and scores by (image, step). The images differ in their number of segments."""

    def answer(x_t: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        if len(x_t) > max_batch:
            raise torch.OutOfMemoryError("out of memory")
        return mix(x_t, number)

    denoiser = Analytic(answer, (2, *SHAPE), batch_size=batch_size)
    paths = [path_of(denoiser, 3, IMAGES[item], seed=item) for item in items]
    step_maps = list(few(20).explain(denoiser, paths, done or set()))
    assert len({(m.item, m.step) for m in step_maps}) == len(step_maps)
    if max_batch < batch_size:
        assert denoiser.batch_size <= max_batch
    return {(items[m.item], m.step): m for m in step_maps}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "items", "max_batch"),
    [
        (7, [0, 1, 2], 99),
        (16, [2, 0, 1], 5),
        *(soak(*case) for case in [(1, [0, 1, 2], 99), (1000, [0, 1, 2], 1000), (16, [1], 99)]),
    ],
)
def test_maps_do_not_depend_on_the_batch(batch_size: int, items: list[int], max_batch: int) -> None:
    expected = explain_all(16, [0, 1, 2])
    counts = {int(segment_literally(image, SHAPE).max()) for image in IMAGES[:3]}
    assert len(counts) > 1
    maps = explain_all(batch_size, items, max_batch=max_batch)
    assert set(maps) == {(item, step) for item in items for step in range(3)}
    for key, one in maps.items():
        assert_close(one.scores, expected[key].scores, rtol=1e-6, atol=1e-6)
        assert_close(one.saliency, expected[key].saliency, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_completed_maps_are_skipped_and_the_others_are_bit_identical() -> None:
    complete, remaining = explain_all(16, [0, 1]), explain_all(16, [0, 1], done={(0, 0), (0, 2), (1, 1)})
    assert set(remaining) == {(0, 1), (1, 0), (1, 2)}
    for key, one in remaining.items():
        assert torch.equal(one.saliency, complete[key].saliency)
        assert torch.equal(one.scores, complete[key].scores)
    denoiser = Analytic(mix, (2, *SHAPE))
    assert list(few(5).explain(denoiser, [path_of(denoiser)], {(0, 0)})) == []
    assert denoiser.batches == []


def test_a_non_finite_prediction_affects_only_its_own_map() -> None:
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        overflows = (x_t[:, :1, :1, :1] == 0) & (x_t[:, :1, 5:, 4:] != 0)
        return torch.where(overflows, torch.inf, x_t)

    denoiser = Analytic(answer, (1, *SHAPE))
    latents = torch.randn(2, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
    latents[1, :, 5, 4] = 0
    path = dataclasses.replace(denoiser.trajectory(latents), image=torch.from_numpy(IMAGES[0]))
    with pytest.warns(UserWarning, match="a map is not finite"):
        first, second = few(20).explain(denoiser, [path])
    assert first.saliency.isnan().all()
    assert second.saliency.isfinite().all()
    assert second.scores.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "1 samples .* at least 2"),
        ({"num_samples": 2**25}, "33554432 samples .* at most"),
        (
            {"segmentation": "felzenszwalb"},
            "segmentation 'felzenszwalb' is not known: expected one of slic, quickshift",
        ),
        ({"num_segments": 1}, "1 segments are not possible: expected 2 to 1048576"),
        ({"kernel_size": 0}, r"kernel_size 0\.0"),
        ({"kernel_size": 0.5}, r"kernel_size 0\.5 .* at least 1 pixel"),
        ({"max_distance": -1}, "max_distance"),
        ({"ratio": 0}, "ratio"),
        ({"width": float("nan")}, "width nan"),
        ({"alpha": float("inf")}, "alpha inf"),
        ({"target": "both"}, "target 'both' .* conditional, guided, unconditional"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        few(**settings)


def test_settings_are_plain_numbers_and_survive_a_round_trip() -> None:
    lime = few(7, kernel_size=3, width=np.float64(0.5), target="guided", name="other")
    assert {type(value) for value in dataclasses.asdict(lime).values()} == {int, float, str}
    assert rebuild(json.loads(json.dumps(describe(lime)))) == lime
    assert (lime.num_samples, lime.num_forwards(3), few(7).num_forwards(3)) == (7, 48, 24)


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("num_maps", [1, 2])
def test_resuming_an_interrupted_run_gives_identical_bits(engine: Engine, tmp_path: Path, num_maps: int) -> None:
    prompt, lime, step_maps = "a red circle on a gray background", few(6), list[StepMap]()
    uninterrupted = engine.explain(prompt, lime, num_steps=3)

    def interrupt_after(limit: int) -> Callable[[Any], None]:
        def on_event(event: Any) -> None:
            if isinstance(event, StepMap):
                step_maps.append(event)
                if len(step_maps) == limit:
                    raise KeyboardInterrupt

        return on_event

    with pytest.raises(KeyboardInterrupt):
        engine.explain(prompt, lime, num_steps=3, out=tmp_path / "run.h5", on_event=interrupt_after(num_maps))
    engine.explain(prompt, lime, num_steps=3, out=tmp_path / "run.h5", on_event=interrupt_after(99))
    assert [one.step for one in step_maps] == [0, 1, 2]
    with dfengine.open(tmp_path / "run.h5") as run:
        (item,) = run
        assert item.settings["lime"] == lime
        np.testing.assert_array_equal(item.maps["lime"], uninterrupted.maps["lime"])
        np.testing.assert_array_equal(item.scores["lime"], uninterrupted.scores["lime"])
        np.testing.assert_array_equal(item.scores["lime"], np.stack([one.scores for one in step_maps]))
        assert np.isfinite(np.asarray(item.scores["lime"])).all()
        assert "lime" not in item.errors
