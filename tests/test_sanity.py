"""The sanity checks themselves: they must fail on explainers that are wrong."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dfengine import Attention, Cam, Engine, Random, Relevance, Rise
from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate import Sanity, captions, prompts, run_sanity_checks, sanity
from dfengine.evaluate.intervals import Interval
from dfengine.evaluate.truth import auroc, has_distinct_colours, largest_region
from dfengine.explain import Explainer, StepMap
from dfengine.shapes.world import COLOURS, Caption, render, sample_scenes


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    """Use few images for the slow checks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "_NUM_RANDOMISED", 2)
        patch.setattr(sanity, "_NUM_REMOVED", 8)
        yield


def check(denoiser: Denoiser, make_jobs: Sequence[Job], *explainers: Explainer) -> Sanity:
    """Run the checks; those that randomise weights use the given explainers."""
    return run_sanity_checks(denoiser, make_jobs, explainers)


@pytest.fixture(scope="module")
def embedded_model() -> Denoiser:
    return Engine.from_pretrained("shapes", device="cpu").denoiser


def make_jobs(count: int) -> list[Job]:
    engine = Engine.from_pretrained("shapes", device="cpu")
    return [engine.job(text, seed=seed, num_steps=2) for seed, text in enumerate(captions(count))]


@pytest.fixture(scope="module")
def outcome(embedded_model: Denoiser) -> Sanity:
    return check(embedded_model, make_jobs(12), Rise(8), Cam(), Relevance(), Attention())


@pytest.mark.soak
def test_the_embedded_model_passes(embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanity, "_NUM_RANDOMISED", 6)
    monkeypatch.setattr(sanity, "_NUM_REMOVED", 24)
    outcome = check(embedded_model, make_jobs(30), Rise(8), Cam(), Relevance(), Attention())
    assert outcome.passed, outcome.failures
    assert list(outcome.randomised) == ["rise", "cam", "relevance", "attention"]
    for stages in outcome.randomised.values():
        assert list(stages) == [
            "up_blocks.2", "up_blocks.1", "up_blocks.0", "mid_block", "down_blocks.2", "down_blocks.1", "down_blocks.0",
        ]  # fmt: skip
        assert all(one.count == 6 and one.mean < 0.999 for one in stages.values())
    assert outcome.subject_auroc is not None
    assert outcome.subject_auroc.low > 0.5


def test_randomised_maps_are_made_with_other_masks(tiny: Denoiser) -> None:
    """Maps that are nothing but their masks would otherwise agree with themselves."""
    seeds: list[int] = []

    class Masks(Random):
        def explain(self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Any = ()) -> Iterator[StepMap]:
            seeds.extend(path.job.mask_seed for path in trajectories)
            yield from Random().explain(denoiser, trajectories, done)

    jobs = [Job("a red circle above a blue square on a gray background", (500,), seed=seed) for seed in (0, 1)]
    layers = tiny.layers()
    sampled = trajectories(tiny, jobs)
    sanity._randomise(tiny, layers, [("conv", list(layers)[:1])], sampled, [Masks()], lambda *_: None)
    own, randomised = seeds[:2], seeds[2:]
    assert len(randomised) == 2
    assert all(mine != other for mine, other in zip(own, randomised, strict=True))


def test_an_interval_that_reaches_the_bar_does_not_pass() -> None:
    good = Interval(0.5, 0.4, 0.6, 6)
    unsure = {"rise": {"all": Interval(0.6, 0.4, 0.75, 6)}}
    (failure,) = sanity._failures(Sanity("model", unsure, good, good, good, None, 0, []))
    assert "6 prompts do not show that rise changes with random weights down to all: rank correlation 0.60" in failure


@pytest.mark.soak
def test_the_weights_are_restored(embedded_model: Denoiser, outcome: Sanity) -> None:
    fresh = Engine.from_pretrained("shapes", device="cpu").denoiser
    ours, theirs = (one.unet.state_dict() for one in (embedded_model, fresh))  # type: ignore[attr-defined]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_the_weights_are_restored_after_an_interruption(
    embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*_: Any) -> Any:
        calls.append(_)
        if len(calls) > 4:  # after the maps of the model itself
            raise KeyboardInterrupt
        return [[np.zeros((2, 2))]]

    before = {k: v.clone() for k, v in embedded_model.unet.state_dict().items()}  # type: ignore[attr-defined]
    monkeypatch.setattr(sanity, "_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(embedded_model, make_jobs(1), Rise(2), Cam(), Relevance(), Attention())
    assert all(torch.equal(v, before[k]) for k, v in embedded_model.unet.state_dict().items())  # type: ignore[attr-defined]


@pytest.mark.soak
def test_maps_that_do_not_depend_on_the_model_are_detected(
    embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A DF-CAM that returns the latent itself, a kind of edge detector, is named."""
    original = Cam.explain

    def explain_without_model(self: Cam, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for step_map in original(self, denoiser, paths, done):
            yield dataclasses.replace(step_map, saliency=paths[step_map.item].latents[step_map.step, 0])

    monkeypatch.setattr(Cam, "explain", explain_without_model)
    outcome = check(embedded_model, make_jobs(3), Cam())
    assert not outcome.passed
    assert any(
        failure.startswith("cam hardly changes with random weights down to down_blocks.0")
        for failure in outcome.failures
    )
    assert outcome.table().splitlines()[-1].startswith("FAILED")


@pytest.mark.soak
def test_relevance_assigned_to_the_wrong_word_is_detected(
    embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zero_next_tokens(condition: Condition, places: Sequence[int]) -> Condition:
        text = condition.tensors["text"].clone()
        text[:, [place + 1 for place in places]] = 0
        return Condition({"text": text})

    monkeypatch.setattr(embedded_model, "zero_tokens", zero_next_tokens)
    outcome = check(embedded_model, make_jobs(3))
    assert any(failure.startswith("a word's relevance does not decrease") for failure in outcome.failures)


@pytest.mark.soak
def test_empty_maps_are_detected(embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Cam.explain

    def explain_with_zeros(self: Cam, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for step_map in original(self, denoiser, paths, done):
            yield dataclasses.replace(step_map, saliency=torch.zeros_like(step_map.saliency))

    monkeypatch.setattr(Cam, "explain", explain_with_zeros)
    outcome = check(embedded_model, make_jobs(2), Cam())
    assert any(failure.startswith("cam hardly changes") for failure in outcome.failures)


@pytest.mark.soak
def test_inverted_relevance_is_detected(embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sanity._prediction_change
    monkeypatch.setattr(sanity, "_prediction_change", lambda *args: -original(*args))
    outcome = check(embedded_model, make_jobs(4))
    assert any(failure.startswith("relevance does not increase with a word's effect") for failure in outcome.failures)


def test_requesting_too_many_captions_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_MAX_ROUNDS", 0)
    with pytest.raises(ValueError, match=r"count 1[0]+ is not possible: expected a whole number from 1 to"):
        captions(10**20)
    with pytest.raises(ValueError, match="the embedded world has fewer than 30000 captions: 0 were found"):
        captions(30_000)


@pytest.mark.soak
def test_attention_away_from_the_subject_is_detected(embedded_model: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Attention.explain

    def explain_inverted(self: Attention, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for step_map in original(self, denoiser, paths, done):
            assert step_map.word_maps is not None
            yield dataclasses.replace(step_map, word_maps=-step_map.word_maps)

    monkeypatch.setattr(Attention, "explain", explain_inverted)
    monkeypatch.setattr(sanity, "_NUM_REMOVED", 1)
    outcome = check(embedded_model, make_jobs(12))
    assert any(failure.startswith("attention to the subject is no better than chance") for failure in outcome.failures)


@pytest.mark.slow
def test_other_models_are_checked_without_the_subject(tiny: Denoiser) -> None:
    outcome = check(tiny, [Engine(tiny).job("a red red circle", num_steps=1)], Rise(2), Cam(), Relevance(), Attention())
    assert outcome.subject_auroc is None
    with pytest.raises(ValueError, match="there is no prompt"):
        check(tiny, [])


def test_captions_are_unique_and_have_distinct_colours() -> None:
    texts = captions(40, seed=3)
    assert len(set(texts)) == 40
    for caption in map(Caption.parse, texts):
        assert has_distinct_colours(caption)
        assert caption.object is None or caption.object[1] != caption.subject[1]
    assert captions(5, seed=3) == texts[:5] or set(captions(5, seed=3)) != set(captions(5, seed=4))


def test_the_largest_region_is_the_rendered_shape() -> None:
    scenes = sample_scenes(20, torch.Generator().manual_seed(0))
    images, coverage = render(scenes)
    for caption, image, (subject, _) in zip(scenes.captions, images, coverage, strict=True):
        if not has_distinct_colours(caption):
            continue
        region = largest_region((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), caption.subject[0])
        expected = subject.numpy() > 0.5
        assert (region & expected).sum() / (region | expected).sum() > 0.85, str(caption)


def test_the_largest_region_of_the_nearest_colour() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    image[1:3, 1:3] = (230, 20, 30)  # about red, four pixels
    image[0, 5] = (230, 26, 26)  # red, one pixel
    expected = np.zeros((4, 6), bool)
    expected[1:3, 1:3] = True
    np.testing.assert_array_equal(largest_region(image, "red"), expected)
    assert not largest_region(image, "cyan").any()
    assert set(COLOURS) == {Caption.parse(f"a {c} ring on a gray background").subject[0] for c in COLOURS}


def test_auroc_by_hand() -> None:
    truth = np.array([[True, True], [False, False]])
    assert auroc(np.array([[2.0, 3.0], [0.0, 1.0]]), truth) == 1
    assert auroc(np.array([[0.0, 1.0], [2.0, 3.0]]), truth) == 0
    assert auroc(np.ones((2, 2)), truth) == 0.5
    # Of the four pairs 2 > 1, 2 = 2 (half), 0 < 1, 0 < 2.
    assert auroc(np.array([[2.0, 0.0], [1.0, 2.0]]), truth) == 1.5 / 4
    assert np.isnan(auroc(np.ones((2, 2)), np.zeros((2, 2), bool)))
