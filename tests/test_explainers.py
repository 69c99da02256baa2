"""DF-CAM, relevance and attention through the engine, in one file with DF-RISE: stored, resumed, rejected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import soak

import dfengine
import dfengine.checks as checks
from dfengine import Attention, Cam, Engine, Random, Relevance, Rise, store
from dfengine.explain import Explainer, StepMap, describe, rebuild
from dfengine.explain.base import _hints
from dfengine.models import load
from dfengine.result import Explanation

CAPTION = "a red circle above a red square on a gray background"
ALL: list[Explainer] = [Rise(6), Cam(), Relevance(), Attention()]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=8)


def assert_equal(a: Explanation, b: Explanation) -> None:
    """Assert that two explanations of one image are bit-identical."""
    equal = np.testing.assert_array_equal
    assert list(a.maps) == list(b.maps)
    for name, maps in a.maps.items():
        for layer in [None] if name != "cam" else list(maps):
            ours, theirs = (one.maps[name] if layer is None else one.maps[name][layer] for one in (a, b))
            equal(np.asarray(ours), np.asarray(theirs), f"{name} {layer}")
            assert np.isfinite(np.asarray(ours)).all()
    assert (a.tokens, tuple(a.words)) == (b.tokens, tuple(b.words))
    equal(np.asarray(a.relevance), np.asarray(b.relevance))
    equal(np.asarray(a.word_maps), np.asarray(b.word_maps))


@pytest.mark.slow
def test_all_explainers_write_to_one_file(engine: Engine, tmp_path: Path) -> None:
    events: list[Any] = []
    result = engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=events.append)
    step_maps = [event for event in events if isinstance(event, StepMap)]
    assert [(one.method, one.step) for one in step_maps] == [(e.name, k) for e in ALL for k in range(3)]
    assert set(result.errors) == set(result.scores) == {"rise"}
    with dfengine.open(tmp_path / "run.h5") as run:
        (item,) = run
        assert_equal(item, result)
        assert list(item.settings.values()) == ALL
        assert all(item.done[one.name].all() for one in ALL)
        for concept in ("red", "circle", "red square"):
            np.testing.assert_array_equal(item.concept(concept), result.concept(concept))
        np.testing.assert_array_equal(item.heatmap("circle", 1), result.heatmap("circle", 1))
        layer = "mid_block.attentions.0"
        np.testing.assert_array_equal(item.heatmap("cam", 1, layer), result.heatmap("cam", 1, layer))
    assert result.heatmap("cam", 0).shape == (16, 16)


@pytest.mark.slow
def test_a_concept_is_the_mean_over_its_tokens(engine: Engine) -> None:
    result = engine.explain(CAPTION, Relevance(), num_steps=1)
    assert result.tokens is not None
    assert result.relevance is not None
    texts = list(result.tokens.texts)
    assert texts[:5] == ["<|startoftext|>", "a", "red", "circle", "above"]
    both = [place for place, text in enumerate(texts) if text == "red"]
    assert len(both) == 2
    np.testing.assert_allclose(result.concept("red"), result.relevance[both].mean(0))
    np.testing.assert_allclose(result.concept("Red Circle"), result.relevance[2:4].mean(0))
    with pytest.raises(ValueError, match="'horse' is not in the prompt"):
        result.concept("horse")


@pytest.mark.slow
@pytest.mark.parametrize("num_maps", [5, *map(soak, (2, 8, 11))])
def test_resuming_an_interrupted_run_gives_identical_bits(engine: Engine, tmp_path: Path, num_maps: int) -> None:
    uninterrupted = engine.explain(CAPTION, ALL, num_steps=3)
    events: list[Any] = []

    def interrupt(event: Any) -> None:
        events.append(event)
        if sum(isinstance(event, StepMap) for event in events) == num_maps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=interrupt)
    resumed_events: list[Any] = []
    result = engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=resumed_events.append)
    assert sum(isinstance(event, StepMap) for event in resumed_events) == 12 - num_maps
    assert_equal(result, uninterrupted)
    with dfengine.open(tmp_path / "run.h5") as run:
        assert_equal(run[0], uninterrupted)


@pytest.mark.parametrize(
    ("explainers", "message"),
    [
        ([Cam(), Cam(layers="mid*", name="deep")], "cam and deep both output layers, and a result holds one set"),
        ([Relevance(), Relevance(self_attention=False, name="cheap")], "relevance and cheap both output tokens"),
        ([Attention(), Attention(words="red", name="red")], "attention and red both output words"),
        ([Rise(2), Cam(layers=("nowhere",))], "no layer is called 'nowhere'"),
        ([Rise(2), Attention(words=("dog",))], "'dog' is not in the prompt"),
        ([Rise(2), Rise(3)], "share a name"),
    ],
)
def test_invalid_explainers_are_rejected_before_anything_is_written(
    engine: Engine, tmp_path: Path, explainers: list[Explainer], message: str
) -> None:
    for out in (None, tmp_path / "run.h5"):
        with pytest.raises(ValueError, match=message):
            engine.explain(CAPTION, explainers, num_steps=2, out=out)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_rejects_invalid_explainers_before_anything_is_computed(engine: Engine) -> None:
    jobs = [engine.job(prompt, num_steps=2) for prompt in (CAPTION, "a red star on a black background")]
    with pytest.raises(ValueError, match="'circle' is not in the prompt 'a red star"):
        next(engine.stream(jobs, Attention(words="circle")))


@pytest.mark.slow
def test_incomplete_steps_are_computed_again(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing layers, relevance or word maps (damage after a power cut) are computed again with their map."""
    complete = engine.explain(CAPTION, ALL, num_steps=2)
    for explainer, marker in ((ALL[1], "has_cam"), (ALL[2], "has_relevance"), (ALL[3], "has_word_maps")):
        out = tmp_path / f"{explainer.name}.h5"

        def interrupt(event: Any, last: str = explainer.name) -> None:
            if isinstance(event, StepMap) and (event.method, event.step) == (last, 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.explain(CAPTION, [explainer], num_steps=2, out=out, on_event=interrupt)
        events: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(store.Writer, marker, lambda self, item, step: step == 0)
            result = engine.explain(CAPTION, [explainer], num_steps=2, out=out, on_event=events.append)
        assert [one.step for one in events if isinstance(one, StepMap)] == [1]
        assert np.isfinite(np.asarray(result.heatmap(explainer.name, 1))).all()
        np.testing.assert_array_equal(result.heatmap(explainer.name, 1), complete.heatmap(explainer.name, 1))


@pytest.mark.slow
def test_a_plan_of_several_prompts_has_the_tokens_and_words_of_each(engine: Engine, tmp_path: Path) -> None:
    jobs = [engine.job(prompt, num_steps=1) for prompt in ("a red star on a black background", CAPTION)]
    planned = engine.plan(jobs, ALL).file_plan(engine.denoiser, previews=False)
    assert [len(item.words) for item in planned.items] == [7, 11]
    assert [item.tokens[-2:] for item in planned.items] == [("<|endoftext|>", "<padding>")] * 2
    assert [method.has_layers for method in planned.methods] == [False, True, False, False]
    with store.Writer.create(tmp_path / "run.h5", planned) as writer:
        for event in engine.stream(jobs, [ALL[2]]):
            if isinstance(event, StepMap):
                assert event.relevance is not None
                writer.curves(event.item, event.step, relevance=event.relevance.numpy())
    with dfengine.open(tmp_path / "run.h5") as run:
        for item, job in zip(run, jobs, strict=True):
            single = engine.explain(job.prompt, Relevance(), num_steps=1)
            np.testing.assert_allclose(np.asarray(item.relevance), single.relevance, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(item.concept("red"), single.concept("red"), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_missing_data_is_none(engine: Engine, tmp_path: Path) -> None:
    result = engine.explain(CAPTION, Cam(layers="mid*"), num_steps=1, out=tmp_path / "run.h5")
    with dfengine.open(tmp_path / "run.h5") as run:
        for explanation in (result, run[0]):
            assert (explanation.relevance, explanation.word_maps, explanation.tokens, tuple(explanation.words)) == (
                None,
                None,
                None,
                (),
            )
            with pytest.raises(ValueError, match=r"the result has no relevance: explain with Relevance\(\)"):
                explanation.concept("red")


@pytest.mark.slow
def test_relevance_inside_inference_mode(engine: Engine) -> None:
    expected = engine.explain(CAPTION, Relevance(text_attention=True), num_steps=1)
    with torch.inference_mode():
        actual = engine.explain(CAPTION, [Rise(2), *ALL[1:2], Relevance(text_attention=True)], num_steps=1)
    np.testing.assert_allclose(actual.relevance, expected.relevance, rtol=1e-4)


@pytest.mark.slow
def test_resuming_with_other_explainers_is_a_short_error(engine: Engine, tmp_path: Path) -> None:
    def interrupt(event: Any) -> None:
        if isinstance(event, StepMap):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, ALL, num_steps=2, out=tmp_path / "run.h5", on_event=interrupt)
    with pytest.raises(ValueError, match="other settings") as raised:
        engine.explain(CAPTION, Cam(), num_steps=2, out=tmp_path / "run.h5")
    assert "attention (removed); relevance (removed); rise (removed);" in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.slow
def test_an_image_without_a_prompt_has_no_words(engine: Engine, tmp_path: Path) -> None:
    picture = np.full((16, 16, 3), 200, np.uint8)
    result = engine.explain("", [Relevance(), Attention()], image=picture, num_steps=1, out=tmp_path / "run.h5")
    assert result.tokens is not None
    assert (result.tokens.own, result.words, result.word_maps) == ([], (), None)
    assert result.relevance is not None
    assert np.isfinite(result.relevance).all()
    assert (result.maps["relevance"] == 0).all()


def test_settings_survive_json() -> None:
    for explainer in (
        Cam(layers=("a.*", "b")),
        Relevance(False, True, 2.0),
        Attention(words=("a cat", "b")),
        Attention(),
    ):
        assert rebuild(describe(explainer)) == explainer


@pytest.mark.soak
def test_both_tokenizers_of_sdxl_agree(saved: Callable[[str], Path]) -> None:
    """They pad with different tokens, but a prompt's own tokens are the same and cover it completely."""
    denoiser = load(saved("sdxl"), device="cpu")
    prompt = "an astronaut riding a horse, and a horse"
    tokens = denoiser.tokens(prompt)
    assert "".join(tokens.texts[place] for place in tokens.own) == prompt.replace(" ", "")
    spans = [tokens.spans[place] for place in tokens.find("horse")]
    assert {start for start, _ in spans} >= {prompt.index("horse"), prompt.rindex("horse")}
    assert all(prompt[start:stop] in "horse" for start, stop in spans)
    with pytest.raises(ValueError, match="2 text encoders, and relevance passes through one"):
        Engine(denoiser).explain("a horse", Relevance(text_attention=True), num_steps=1)


@pytest.mark.slow
def test_tokenizers_that_disagree_are_rejected(saved: Callable[[str], Path]) -> None:
    denoiser = load(saved("sdxl"), device="cpu")
    denoiser.pipeline.tokenizer_2.add_tokens("astronaut")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"divide 'an astronaut' differently"):
        denoiser.tokens("an astronaut")


def test_a_setting_of_any_type_may_be_declared() -> None:
    """What is not a number, a switch or text is its explainer's own to check."""

    @dataclass(frozen=True)
    class Third(Random):
        sizes: Sequence[int] = (1, 2)
        side: int | str = "auto"
        places: Any = None
        ready: bool = field(init=False, default=True)

    third = Third(sizes=(3,), side=4, places=np.eye(2))
    assert (third.sizes, third.side, third.ready, Third(side="all").side) == ((3,), 4, True, "all")
    Third.__annotations__["places"] = "Unknown"  # as under TYPE_CHECKING
    _hints.cache_clear()
    assert Third(sizes=(5,)).sizes == (5,)
    _hints.cache_clear()


def test_layers_may_come_from_any_collection() -> None:
    names = {"conv_in": 1, "mid_block": 2}
    assert checks.texts("layers", names) == checks.texts("layers", names.keys()) == tuple(names)
    assert checks.texts("layers", (name for name in names)) == tuple(names)
    for wrong in (b"conv_in", 3, [3]):
        with pytest.raises(ValueError, match=r"layers .* is not possible: expected"):
            checks.texts("layers", wrong)


def test_textual_inversion_tokens_belong_to_their_placeholder(tiny_folder: Path) -> None:
    """diffusers replaces "<dot>" by "<dot> <dot>_1 <dot>_2": three tokens of one word."""
    denoiser = load(tiny_folder, device="cpu")
    tokenizer = denoiser.pipeline.tokenizer  # type: ignore[attr-defined]
    tokenizer.add_tokens(["<dot>", "<dot>_1", "<dot>_2"])
    tokenizer.init_kwargs.pop("words", None)
    tokens = denoiser.tokens("a <dot> above a star")
    assert tokens.texts[1:-2] == ("a", "<dot>", "<dot>_1", "<dot>_2", "above", "a", "star")
    assert tokens.find("<dot>") == [2, 3, 4]
    assert tokens.find("star") == [7]
    assert tokens.find("above a") == [5, 6]
