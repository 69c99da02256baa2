"""DF-CAM, relevance and attention through the engine: one file beside DF-RISE's, resumed, read back, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import soak

import dfengine
from dfengine import Attention, Cam, Engine, Relevance, Rise, store
from dfengine.explain import Explainer, StepMap, describe, rebuild
from dfengine.models import load
from dfengine.result import Explanation

CAPTION = "a red circle above a red square on a gray background"
ALL: list[Explainer] = [Rise(6), Cam(), Relevance(), Attention()]


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return Engine.from_pretrained(tiny_folder, device="cpu", batch_size=8)


def same(a: Explanation, b: Explanation) -> None:
    """Everything that two explanations of one image hold is equal, to the bit."""
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
def test_all_stream_into_the_same_file(engine: Engine, tmp_path: Path) -> None:
    seen: list[Any] = []
    result = engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=seen.append)
    made = [event for event in seen if isinstance(event, StepMap)]
    assert [(one.method, one.step) for one in made] == [(e.name, k) for e in ALL for k in range(3)]
    assert set(result.errors) == set(result.scores) == {"rise"}
    with dfengine.open(tmp_path / "run.h5") as run:
        (item,) = run
        same(item, result)
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
@pytest.mark.parametrize("cut", [5, *map(soak, (2, 8, 11))])
def test_a_run_that_was_cut_off_is_gone_on_with_to_the_bit(engine: Engine, tmp_path: Path, cut: int) -> None:
    whole = engine.explain(CAPTION, ALL, num_steps=3)
    seen: list[Any] = []

    def interrupt(event: Any) -> None:
        seen.append(event)
        if sum(isinstance(one, StepMap) for one in seen) == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=interrupt)
    again: list[Any] = []
    result = engine.explain(CAPTION, ALL, num_steps=3, out=tmp_path / "run.h5", on_event=again.append)
    assert sum(isinstance(one, StepMap) for one in again) == 12 - cut
    same(result, whole)
    with dfengine.open(tmp_path / "run.h5") as run:
        same(run[0], whole)


@pytest.mark.parametrize(
    ("explainers", "said"),
    [
        ([Cam(), Cam(layers="mid*", name="deep")], "cam and deep both output layers, and a result holds one set"),
        ([Relevance(), Relevance(self_attention=False, name="cheap")], "relevance and cheap both output tokens"),
        ([Attention(), Attention(words="red", name="red")], "attention and red both output words"),
        ([Rise(2), Cam(layers=("nowhere",))], "no layer is called 'nowhere'"),
        ([Rise(2), Attention(words=("dog",))], "'dog' is not in the prompt"),
        ([Rise(2), Rise(3)], "share a name"),
    ],
)
def test_what_is_not_possible_is_refused_before_anything_is_written(
    engine: Engine, tmp_path: Path, explainers: list[Explainer], said: str
) -> None:
    for out in (None, tmp_path / "run.h5"):
        with pytest.raises(ValueError, match=said):
            engine.explain(CAPTION, explainers, num_steps=2, out=out)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_refuses_before_anything_is_computed(engine: Engine) -> None:
    jobs = [engine.job(prompt, num_steps=2) for prompt in (CAPTION, "a red star on a black background")]
    with pytest.raises(ValueError, match="'circle' is not in the prompt 'a red star"):
        next(engine.stream(jobs, Attention(words="circle")))
    with pytest.raises(ValueError, match="both output words"):
        next(engine.stream(jobs, [Attention(), Attention(name="again")]))


@pytest.mark.slow
def test_a_step_is_done_when_all_of_it_is(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, relevance or heat maps that are not there (damage after a power cut) are made again with their map."""
    whole = engine.explain(CAPTION, ALL, num_steps=2)
    for explainer, marker in ((ALL[1], "has_cam"), (ALL[2], "has_relevance"), (ALL[3], "has_word_maps")):
        out = tmp_path / f"{explainer.name}.h5"

        def interrupt(event: Any, last: str = explainer.name) -> None:
            if isinstance(event, StepMap) and (event.method, event.step) == (last, 1):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            engine.explain(CAPTION, [explainer], num_steps=2, out=out, on_event=interrupt)
        again: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(store.Writer, marker, lambda self, item, step: step == 0)
            result = engine.explain(CAPTION, [explainer], num_steps=2, out=out, on_event=again.append)
        assert [one.step for one in again if isinstance(one, StepMap)] == [1]
        assert np.isfinite(np.asarray(result.heatmap(explainer.name, 1))).all()
        np.testing.assert_array_equal(result.heatmap(explainer.name, 1), whole.heatmap(explainer.name, 1))


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
            alone = engine.explain(job.prompt, Relevance(), num_steps=1)
            np.testing.assert_allclose(np.asarray(item.relevance), alone.relevance, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(item.concept("red"), alone.concept("red"), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_what_was_not_asked_for_is_none(engine: Engine, tmp_path: Path) -> None:
    result = engine.explain(CAPTION, Cam(layers="mid*"), num_steps=1, out=tmp_path / "run.h5")
    with dfengine.open(tmp_path / "run.h5") as run:
        for one in (result, run[0]):
            assert (one.relevance, one.word_maps, one.tokens, tuple(one.words)) == (None, None, None, ())
            with pytest.raises(ValueError, match=r"the result has no relevance: explain with Relevance\(\)"):
                one.concept("red")


@pytest.mark.slow
def test_relevance_inside_inference_mode(engine: Engine) -> None:
    expected = engine.explain(CAPTION, Relevance(text_attention=True), num_steps=1)
    with torch.inference_mode():
        made = engine.explain(CAPTION, [Rise(2), *ALL[1:2], Relevance(text_attention=True)], num_steps=1)
    np.testing.assert_allclose(made.relevance, expected.relevance, rtol=1e-4)


@pytest.mark.slow
def test_other_explainers_than_a_run_was_begun_with_are_one_short_line(engine: Engine, tmp_path: Path) -> None:
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


def test_settings_come_back_from_json() -> None:
    for explainer in (
        Cam(layers=("a.*", "b")),
        Relevance(False, True, 2.0),
        Attention(words=("a cat", "b")),
        Attention(),
    ):
        assert rebuild(describe(explainer)) == explainer


@pytest.mark.slow
def test_both_tokenizers_of_sdxl_name_the_same_places(saved: Callable[[str], Path]) -> None:
    """Each pads with another token; a prompt's own are the same, and cover it whole."""
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
def test_tokenizers_that_disagree_are_refused(saved: Callable[[str], Path]) -> None:
    denoiser = load(saved("sdxl"), device="cpu")
    denoiser.pipeline.tokenizer_2.add_tokens("astronaut")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"divide 'an astronaut' differently"):
        denoiser.tokens("an astronaut")


def test_the_vectors_of_a_textual_inversion_are_the_word_they_stand_for(tiny_folder: Path) -> None:
    """diffusers puts "<dot> <dot>_1 <dot>_2" in place of "<dot>": three tokens of one word."""
    denoiser = load(tiny_folder, device="cpu")
    tokenizer = denoiser.pipeline.tokenizer  # type: ignore[attr-defined]
    tokenizer.add_tokens(["<dot>", "<dot>_1", "<dot>_2"])
    tokenizer.init_kwargs.pop("words", None)
    tokens = denoiser.tokens("a <dot> above a star")
    assert tokens.texts[1:-2] == ("a", "<dot>", "<dot>_1", "<dot>_2", "above", "a", "star")
    assert tokens.find("<dot>") == [2, 3, 4]
    assert tokens.find("star") == [7]
    assert tokens.find("above a") == [5, 6]
