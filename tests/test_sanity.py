"""The sanity checks themselves: they must fail where there is something to find."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dfengine import Attention, Cam, Engine, Relevance, Rise
from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.job import Job
from dfengine.evaluate import Sanity, captions, prompts, run_sanity_checks, sanity
from dfengine.evaluate.truth import auroc, has_distinct_colours, largest_region
from dfengine.explain import Explainer
from dfengine.shapes.world import COLOURS, Caption, render, sample_scenes


@pytest.fixture(scope="module", autouse=True)
def _few_images() -> Iterator[None]:
    """A small number suffices for what takes the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "_NUM_RANDOMISED", 2)
        patch.setattr(sanity, "_NUM_REMOVED", 8)
        yield


def check(denoiser: Denoiser, jobs: Sequence[Job], *explainers: Explainer) -> Sanity:
    """The checks, those of the weights with the explainers that are given."""
    return run_sanity_checks(denoiser, jobs, explainers)


@pytest.fixture(scope="module")
def embedded() -> Denoiser:
    return Engine.from_pretrained("shapes", device="cpu").denoiser


def jobs(count: int) -> list[Job]:
    engine = Engine.from_pretrained("shapes", device="cpu")
    return [engine.job(text, seed=seed, num_steps=2) for seed, text in enumerate(captions(count))]


@pytest.fixture(scope="module")
def found(embedded: Denoiser) -> Sanity:
    return check(embedded, jobs(12), Rise(8), Cam(), Relevance(), Attention())


@pytest.mark.soak
def test_the_embedded_model_passes(found: Sanity) -> None:
    assert found.passed, found.failures
    assert list(found.randomised) == ["rise", "cam", "relevance", "attention"]
    for stages in found.randomised.values():
        assert list(stages) == [
            "up_blocks.2", "up_blocks.1", "up_blocks.0", "mid_block", "down_blocks.2", "down_blocks.1", "down_blocks.0",
        ]  # fmt: skip
        assert all(one.count == 2 and one.mean < 0.999 for one in stages.values())
    assert found.subject_auroc is not None
    assert found.subject_auroc.low > 0.5


@pytest.mark.soak
def test_the_weights_are_as_they_were(embedded: Denoiser, found: Sanity) -> None:
    fresh = Engine.from_pretrained("shapes", device="cpu").denoiser
    ours, theirs = (one.unet.state_dict() for one in (embedded, fresh))  # type: ignore[attr-defined]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_weights_come_back_also_when_a_check_breaks_off(embedded: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*_: Any) -> Any:
        calls.append(_)
        if len(calls) > 4:  # after the maps of the model itself
            raise KeyboardInterrupt
        return [[np.zeros((2, 2))]]

    before = {k: v.clone() for k, v in embedded.unet.state_dict().items()}  # type: ignore[attr-defined]
    monkeypatch.setattr(sanity, "_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(embedded, jobs(1), Rise(2), Cam(), Relevance(), Attention())
    assert all(torch.equal(v, before[k]) for k, v in embedded.unet.state_dict().items())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_maps_that_do_not_depend_on_the_model_are_found_out(
    embedded: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DF-CAM that shows the latent itself, an edge detector of sorts, is named."""
    real = Cam.explain

    def blind(self: Cam, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for made in real(self, denoiser, paths, done):
            yield dataclasses.replace(made, saliency=paths[made.item].latents[made.step, 0])

    monkeypatch.setattr(Cam, "explain", blind)
    outcome = check(embedded, jobs(3), Cam())
    assert not outcome.passed
    assert any(
        failure.startswith("cam hardly changes with random weights down to down_blocks.0")
        for failure in outcome.failures
    )
    assert outcome.table().splitlines()[-1].startswith("FAILED")


@pytest.mark.slow
def test_relevance_that_is_filed_under_the_wrong_word_is_found_out(
    embedded: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beside(condition: Condition, places: Sequence[int]) -> Condition:
        text = condition.tensors["text"].clone()
        text[:, [place + 1 for place in places]] = 0
        return Condition({"text": text})

    monkeypatch.setattr(embedded, "zero_tokens", beside)
    outcome = check(embedded, jobs(3))
    assert any(failure.startswith("a word's relevance does not decrease") for failure in outcome.failures)


@pytest.mark.soak
def test_maps_that_say_nothing_are_found_out(embedded: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Cam.explain

    def empty(self: Cam, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for made in real(self, denoiser, paths, done):
            yield dataclasses.replace(made, saliency=torch.zeros_like(made.saliency))

    monkeypatch.setattr(Cam, "explain", empty)
    outcome = check(embedded, jobs(2), Cam())
    assert any(failure.startswith("cam hardly changes") for failure in outcome.failures)


@pytest.mark.soak
def test_relevance_that_says_the_opposite_is_found_out(embedded: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sanity._prediction_change
    monkeypatch.setattr(sanity, "_prediction_change", lambda *given: -real(*given))
    outcome = check(embedded, jobs(4))
    assert any(failure.startswith("relevance does not increase with a word's effect") for failure in outcome.failures)


def test_captions_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_MAX_ROUNDS", 0)
    with pytest.raises(ValueError, match="the embedded world has fewer than 1000000 captions"):
        captions(1_000_000)


@pytest.mark.soak
def test_attention_beside_the_subject_is_found_out(embedded: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Attention.explain

    def beside(self: Attention, denoiser: Denoiser, paths: Sequence[Any], done: Any = ()) -> Any:
        for made in real(self, denoiser, paths, done):
            assert made.word_maps is not None
            yield dataclasses.replace(made, word_maps=-made.word_maps)

    monkeypatch.setattr(Attention, "explain", beside)
    monkeypatch.setattr(sanity, "_NUM_REMOVED", 1)
    outcome = check(embedded, jobs(12))
    assert any(failure.startswith("attention to the subject is no better than chance") for failure in outcome.failures)


@pytest.mark.slow
def test_prompts_of_another_world_have_no_subject_to_look_for(tiny: Denoiser) -> None:
    outcome = check(tiny, [Engine(tiny).job("a red red circle", num_steps=1)], Rise(2), Cam(), Relevance(), Attention())
    assert outcome.subject_auroc is None
    with pytest.raises(ValueError, match="there is no prompt"):
        check(tiny, [])


def test_captions_are_different_and_can_be_told_apart() -> None:
    texts = captions(40, seed=3)
    assert len(set(texts)) == 40
    for caption in map(Caption.parse, texts):
        assert has_distinct_colours(caption)
        assert caption.object is None or caption.object[1] != caption.subject[1]
    assert captions(5, seed=3) == texts[:5] or set(captions(5, seed=3)) != set(captions(5, seed=4))


def test_the_true_area_is_what_the_renderer_painted() -> None:
    scenes = sample_scenes(20, torch.Generator().manual_seed(0))
    images, coverage = render(scenes)
    for caption, image, (subject, _) in zip(scenes.captions, images, coverage, strict=True):
        if not has_distinct_colours(caption):
            continue
        true = largest_region((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy(), caption.subject[0])
        painted = subject.numpy() > 0.5
        assert (true & painted).sum() / (true | painted).sum() > 0.85, str(caption)


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
    true = np.array([[True, True], [False, False]])
    assert auroc(np.array([[2.0, 3.0], [0.0, 1.0]]), true) == 1
    assert auroc(np.array([[0.0, 1.0], [2.0, 3.0]]), true) == 0
    assert auroc(np.ones((2, 2)), true) == 0.5
    # Of the four pairs 2 > 1, 2 = 2 (half), 0 < 1, 0 < 2.
    assert auroc(np.array([[2.0, 0.0], [1.0, 2.0]]), true) == 1.5 / 4
    assert np.isnan(auroc(np.ones((2, 2)), np.zeros((2, 2), bool)))
