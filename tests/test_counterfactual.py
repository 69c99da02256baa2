"""Counterfactual maps against maps worked out by hand, the edits of prompts, and the embedded model's truth."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic
from commands import dfengine_command
from torch import Tensor
from torch.testing import assert_close

import dfengine
from dfengine import Counterfactual, Engine, Random, StepMap, store
from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate import ConceptJudge, embedded_prompts
from dfengine.evaluate.truth import auroc
from dfengine.explain import describe, hot, rebuild
from dfengine.explain.counterfactual import EDITS, OUTPUTS
from dfengine.explain.edits import Replacements
from dfengine.report.packing import pack
from dfengine.result import heatmap
from dfengine.shapes import world
from dfengine.shapes.world import Caption
from dfengine.tokens import Tokens, remove, word_spans

WORDS = ("red", "green", "blue", "circle", "star", "on")
CAPTION = "a red circle above a blue square on a gray background"
INF = float("inf")


class Worded(Analytic):
    """f(x | prompt) = Σ over its words of x ⊙ pattern, where a word's pattern is one of `values` at its own pixel.

    The values of both channels at a pixel: red (3, 4), green (0, 1), blue (3, 0), circle (0, 2), star (6, 2).
    """

    values = torch.tensor([(3.0, 4.0), (0.0, 1.0), (3.0, 0.0), (0.0, 2.0), (6.0, 2.0), (1.0, 0.0)])
    #: The colours share a pixel, and so do the kinds.
    pixels = ((0, 0), (0, 0), (0, 0), (1, 2), (1, 2), (2, 3))

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(lambda x, _: x, (2, 3, 4), batch_size)
        self.encoded: list[str] = []
        self.patterns = torch.zeros(len(WORDS), 2, 3, 4)
        for pattern, value, (row, column) in zip(self.patterns, self.values, self.pixels, strict=True):
            pattern[:, row, column] = value

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        self.encoded += prompts
        counts = [[float(prompt.split().count(word)) for word in WORDS] for prompt in prompts]
        return Condition({"counts": torch.tensor(counts)})

    def predict(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x_t))
        return x_t * torch.einsum("nw,wchv->nchv", condition.tensors["counts"], self.patterns)


class Tokenised(Worded):
    """Its tokens are its words, and their encodings can be set to zero."""

    def tokens(self, prompt: str) -> Tokens:
        spans = tuple(word_spans(prompt))
        return Tokens(prompt, tuple(prompt[start:stop] for start, stop in spans), spans)

    def zero_tokens(self, condition: Condition, places: Sequence[int]) -> Condition:
        counts = condition.tensors["counts"].clone()
        counts[:, [WORDS.index(["red", "circle", "on"][place]) for place in places]] = 0
        return Condition({"counts": counts})


def at(pixels: dict[tuple[int, int], float]) -> Tensor:
    """A map with some values."""
    values = torch.zeros(3, 4)
    for place, value in pixels.items():
        values[place] = value
    return values


def maps_of(
    explainer: Counterfactual, denoiser: Denoiser, paths: list[Trajectory], done: Any = ()
) -> dict[tuple[int, int], StepMap]:
    return {(step_map.item, step_map.step): step_map for step_map in explainer.explain(denoiser, paths, done)}


def constant(*levels: float) -> Tensor:
    """R_t of some steps, each the same everywhere."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 2, 3, 4).contiguous()


# Maps by hand --------------------------------------------------------------------------------------------------------


def test_a_removed_word_leaves_its_own_pattern_behind() -> None:
    denoiser = Worded()
    maps = maps_of(Counterfactual(edit="remove"), denoiser, [denoiser.trajectory(constant(1.0, 2.0), "red circle on")])
    for step, scale in enumerate((1, 2)):
        found = maps[0, step]
        assert found.word_maps is not None
        by_word = [at({(0, 0): 5 * scale}), at({(1, 2): 2 * scale}), at({(2, 3): scale})]  # √(3² + 4²), 2, 1
        assert_close(found.word_maps, torch.stack(by_word))
        assert found.word_errors is None
        assert_close(found.saliency, sum(by_word))  # against the empty negative prompt


def test_replacements_are_averaged_and_their_spread_is_the_error() -> None:
    denoiser = Worded()
    explainer = Counterfactual(words=("red", "circle", "on"), replace={"red": ["green", "blue"], "circle": "star"})
    found = maps_of(explainer, denoiser, [denoiser.trajectory(constant(1.0), "red circle on")])[0, 0]
    assert found.word_maps is not None
    assert found.word_errors is not None
    # Red and green differ by (3, 3), red and blue by (0, 4): 4.243 and 4. Circle and star differ by (6, 0).
    first, second = math.hypot(3, 3), 4
    assert_close(found.word_maps[0], at({(0, 0): (first + second) / 2}))
    assert_close(found.word_errors[0], at({(0, 0): (first - second) / 2}))  # |a − b| / √2 / √2
    assert_close(found.word_maps[1], at({(1, 2): 6}))
    assert_close(found.word_maps[2], at({(2, 3): 1}))
    assert (found.word_errors[1:] == INF).all()


def test_a_phrase_is_replaced_word_by_word() -> None:
    denoiser = Worded()
    explainer = Counterfactual("red circle", replace={"red": ["green", "blue"], "circle": ["star"]})
    found = maps_of(explainer, denoiser, [denoiser.trajectory(constant(1.0), "red circle on")])[0, 0]
    assert found.word_maps is not None
    assert_close(found.word_maps[0], at({(0, 0): (math.hypot(3, 3) + 4) / 2, (1, 2): 6}))


def test_x0_differs_by_b_over_a() -> None:
    denoiser = Worded()
    path = denoiser.trajectory(constant(1.0, 2.0), "red circle on")
    epsilon, x0 = (maps_of(Counterfactual(output=output), denoiser, [path]) for output in ("epsilon", "x0"))
    a, b = denoiser.schedule.coefficients(torch.tensor(path.job.timesteps))
    for step in range(2):
        ratio = float(b[step] / a[step])
        assert_close(x0[0, step].saliency, epsilon[0, step].saliency * ratio)
        assert_close(x0[0, step].word_maps, epsilon[0, step].word_maps * ratio)


def test_the_negative_prompt_is_what_the_saliency_compares_with() -> None:
    denoiser = Worded()
    path = denoiser.trajectory(constant(1.0), "red circle")
    path = dataclasses.replace(path, negative=denoiser.encode_prompts(["green star"]))
    assert_close(maps_of(Counterfactual(), denoiser, [path])[0, 0].saliency, at({(0, 0): math.hypot(3, 3), (1, 2): 6}))


def test_a_prompt_of_one_word_without_it_is_empty() -> None:
    denoiser = Worded()
    path = denoiser.trajectory(constant(1.0), "red")
    found = maps_of(Counterfactual(), denoiser, [path])[0, 0]
    assert found.word_maps is not None
    assert_close(found.word_maps[0], at({(0, 0): 5}))
    both = maps_of(Counterfactual(("red", "red on")), denoiser, [denoiser.trajectory(constant(1.0), "red on")])[0, 0]
    assert_close(both.word_maps, torch.stack([at({(0, 0): 5}), at({(0, 0): 5, (2, 3): 1})]))


def test_zeroed_encodings() -> None:
    denoiser = Tokenised()
    path = denoiser.trajectory(constant(1.0), "red circle on")
    found = maps_of(Counterfactual(("circle", "red circle"), "zero"), denoiser, [path])[0, 0]
    assert_close(found.word_maps, torch.stack([at({(1, 2): 2}), at({(0, 0): 5, (1, 2): 2})]))
    assert found.word_errors is None


@pytest.mark.slow
def test_zeroed_encodings_of_a_network(tiny: Denoiser) -> None:
    (path,) = trajectories(tiny, [Engine(tiny).job(CAPTION, num_steps=1)])
    (found,) = Counterfactual("red circle", edit="zero").explain(tiny, [path])
    timesteps, edited = torch.tensor(path.job.timesteps), path.prompt.tensors["text"].clone()
    edited[:, 2:4] = 0  # after the start and "a"
    with torch.no_grad():
        outputs = [tiny(path.latents, timesteps, one) for one in (path.prompt, Condition({"text": edited}))]
    assert found.word_maps is not None
    assert_close(found.word_maps[0], (outputs[0] - outputs[1])[0].norm(dim=0), rtol=1e-3, atol=1e-5)


# Batches -------------------------------------------------------------------------------------------------------------

PROMPTS = ("red circle on", "blue star", "on red", "red red circle")


def paths_of(denoiser: Worded) -> list[Trajectory]:
    random = torch.Generator().manual_seed(0)
    return [denoiser.trajectory(torch.randn(3, 2, 3, 4, generator=random), prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 1000])
def test_the_batch_size_and_other_items_change_nothing(batch_size: int) -> None:
    denoiser = Worded(batch_size)
    denoiser.alternatives = {"red": ("green", "blue"), "circle": ("star",), "star": ("circle",)}
    together = maps_of(Counterfactual(), denoiser, paths_of(denoiser))
    assert set(together) == {(item, step) for item in range(4) for step in range(3)}
    if batch_size > 1:  # every batch is full, the last one padded
        assert len(set(denoiser.batches[:-1])) <= 2
    for item, path in enumerate(paths_of(denoiser)):
        other = Worded(16)
        other.alternatives = denoiser.alternatives
        for (_, step), alone in maps_of(Counterfactual(), other, [path]).items():
            for name in ("saliency", "word_maps", "word_errors"):
                assert torch.equal(getattr(together[item, step], name), getattr(alone, name)), name


def test_done_steps_are_left_out_without_a_change_of_the_others() -> None:
    denoiser = Worded(5)
    every = maps_of(Counterfactual(), denoiser, paths_of(denoiser))
    done = {(0, 0), (0, 1), (0, 2), (1, 1), (3, 2)}
    rest = maps_of(Counterfactual(), denoiser, paths_of(denoiser), done)
    assert set(rest) == set(every) - done
    assert all(torch.equal(rest[place].word_maps, every[place].word_maps) for place in rest)  # type: ignore[arg-type]
    before = len(denoiser.batches)
    assert maps_of(Counterfactual(), denoiser, paths_of(denoiser), set(every)) == {}
    assert len(denoiser.batches) == before


def test_forwards_are_counted_and_each_edit_is_encoded_once() -> None:
    denoiser = Worded(1)
    denoiser.alternatives = {"red": ("green", "blue"), "circle": ("star",)}
    (path,) = [denoiser.trajectory(constant(1.0, 2.0), "red red circle")]
    spec = Counterfactual().output_spec(denoiser, path.job)
    denoiser.encoded.clear()
    maps_of(Counterfactual(), denoiser, [path])
    assert denoiser.encoded == [
        "green red circle",
        "blue red circle",
        "red green circle",
        "red blue circle",
        "red red star",
    ]
    assert len(denoiser.batches) == 2 * (spec.num_forwards or 0) == 2 * (2 + 5)
    assert (spec.words, spec.has_word_errors) == (["red", "red", "circle"], True)
    # Without a prompt it is an estimate; with named words it holds for as many replacements as there may be.
    assert Counterfactual(("red", "circle")).num_forwards(3) == 3 * (2 + 2 * 4)
    assert Counterfactual("red", replace={"red": list("abcdef")}).num_forwards(3) == 3 * (2 + 6)
    assert Counterfactual("red", edit="remove").num_forwards(3) == 3 * 3
    (planned,) = Engine(denoiser).plan([path.job], [Counterfactual(), Random()]).jobs
    assert [planned.num_forwards(explainer, 10) for explainer in (Counterfactual(), Random())] == [70, 0]


def test_explained_steps_of_a_trajectory_alone_are_computed() -> None:
    denoiser = Worded()
    path = dataclasses.replace(denoiser.trajectory(constant(1.0, 2.0, 3.0), "red on"), explain_steps=(2,))
    assert list(maps_of(Counterfactual(), denoiser, [path])) == [(0, 2)]


# Edits ---------------------------------------------------------------------------------------------------------------


def edited(prompt: str, words: Any = None, **settings: Any) -> dict[str, list[str]]:
    denoiser = Worded()
    denoiser.alternatives = world.alternatives()
    return {edit.concept: list(edit.prompts) for edit in Counterfactual(words, **settings).edits(denoiser, prompt)}


def test_words_of_the_embedded_world_are_replaced_by_others_of_their_kind() -> None:
    rest = " above a blue square on a gray background"
    edits = edited(CAPTION, ("red", "circle", "red circle", "above", "gray", "background"))
    # From the word on, without blue, gray and square, which are there already; a background has three others.
    assert edits["red"] == [f"a {colour} circle{rest}" for colour in ("green", "yellow", "purple", "orange")]
    assert edits["circle"] == [f"a red {kind}{rest}" for kind in ("triangle", "star", "cross", "ring")]
    pairs = ("green triangle", "yellow star", "purple cross", "orange ring")
    assert edits["red circle"] == [f"a {pair}{rest}" for pair in pairs]
    assert edits["above"] == [CAPTION.replace("above", other) for other in ("below", "left of", "right of")]
    assert edits["gray"] == [CAPTION.replace("gray", other) for other in ("brown", "white", "black")]
    assert edits["background"] == [CAPTION.removesuffix(" background")]
    assert edited(CAPTION, "red", num_replacements=1) == {"red": [f"a green circle{rest}"]}


def test_relations_of_two_words_are_replaced_as_one() -> None:
    prompt = "a red circle left of a blue square on a gray background"
    edits = edited(prompt, ("left of", "left", "of", "circle left of"), num_replacements=2)
    assert edits["left of"] == [prompt.replace("left of", other) for other in ("right of", "above")]
    assert edits["left"] == [prompt.replace("left", "right")]
    assert edits["of"] == [prompt.replace("left of", "left")]
    assert edits["circle left of"] == [
        prompt.replace("circle left of", other) for other in ("triangle right of", "star above")
    ]


def test_named_words_are_edited_everywhere_and_others_one_by_one() -> None:
    prompt = "a red star above a red circle on a white background"
    assert edited(prompt, "red", num_replacements=1) == {
        "red": ["a green star above a green circle on a white background"]
    }
    denoiser = Worded()
    first, *_, last = [edit for edit in Counterfactual(edit="remove").edits(denoiser, prompt) if edit.concept == "red"]
    assert first.prompts == ["a star above a red circle on a white background"]
    assert last.prompts == ["a red star above a circle on a white background"]


def test_given_replacements_come_before_those_of_the_model() -> None:
    edits = edited(CAPTION, ("red circle", "square"), replace={"Red  Circle": ["dog", "cat"]})
    rest = "above a blue square on a gray background"
    assert edits["red circle"] == [f"a dog {rest}", f"a cat {rest}"]
    assert edits["square"][0] == CAPTION.replace("square", "triangle")


def test_replacements_that_the_prompt_has_are_left_out_unless_they_are_given() -> None:
    assert edited("red circle blue", "red", num_replacements=2) == {"red": ["green circle blue", "yellow circle blue"]}
    assert edited("red circle blue", "red", replace={"red": "blue"}) == {"red": ["blue circle blue"]}
    kinds = " ".join(world.KINDS)
    assert edited(kinds, "circle") == {"circle": ["square triangle star cross ring"]}, "removed: none is left"


@pytest.mark.parametrize(
    ("prompt", "word", "expected"),
    [
        ("a cat, a dog", "cat", "a, a dog"),
        ("a  red   cat", "red", "a   cat"),
        ("the red cat", "the", "red cat"),
        ("the red cat", "cat", "the red"),
        ("cat🐱dog", "🐱", "cat dog"),
        ("红圆在蓝", "在", "红圆蓝"),
        ("l'été rouge", "l'été", "rouge"),
        ("red and red", "red", "and"),
        ("red", "red", ""),
    ],
)
def test_removed_words_leave_no_gap(prompt: str, word: str, expected: str) -> None:
    from dfengine.tokens import find_occurrences

    assert remove(prompt, find_occurrences(prompt, word)) == expected


def test_replacements_begin_again_where_a_word_has_fewer() -> None:
    replacements = Replacements("red circle", {"red": ["a", "b", "c"], "circle": ["x", "y"]}, {}, 4)
    assert replacements.prompts([(0, 10)]) == ["a x", "b y", "c x"]
    assert replacements.unused() == []


def test_alternatives_of_the_world_are_its_other_words() -> None:
    alternatives = world.alternatives()
    for group in (world.KINDS, world.COLOURS, world.BACKGROUNDS, world.RELATIONS):
        for word in group:
            assert {word, *alternatives[word]} == set(group)
            assert len(alternatives[word]) == len(group) - 1
    assert alternatives["star"] == ("cross", "ring", "circle", "square", "triangle")
    assert Analytic(lambda x, _: x).alternatives == {}


# Errors --------------------------------------------------------------------------------------------------------------


class Deaf(Worded):
    """It is told nothing."""

    def condition(self, jobs: Sequence[Job], *, negative: bool = False) -> Condition:
        return Condition({}, len(jobs))


class Promptless(Worded):
    """It takes no prompts, but says so only when it is asked."""

    encode_prompts = Denoiser.encode_prompts


@pytest.mark.parametrize(
    ("denoiser", "explainer", "message"),
    [
        (Worded(), Counterfactual("dog"), "'dog' is not in the prompt 'red circle on'"),
        (Worded(), Counterfactual(replace={"dog": "cat"}), "replace: 'dog' is not in the prompt 'red circle on'"),
        (
            Worded(),
            Counterfactual("red", replace={"circle": "star"}),
            "replace 'circle' has no effect: it is not among",
        ),
        (Worded(), Counterfactual("red", "replace"), r"no replacement for 'red': give some, as in replace=\{'red': "),
        (Worded(), Counterfactual(edit="replace"), "no replacement for any word of 'red circle on'"),
        (
            Worded(),
            Counterfactual("red", replace={"red": "red"}),
            "'red' is its own replacement, which changes nothing",
        ),
        (Worded(), Counterfactual("red", edit="zero"), "analytic does not expose its tokens"),
        (Deaf(), Counterfactual("red"), "analytic is told the same without 'red': use a model that takes prompts"),
        (Promptless(), Counterfactual("red"), "analytic takes no prompts"),
    ],
)
def test_impossible_edits_are_refused_before_anything_is_computed(
    denoiser: Worded, explainer: Counterfactual, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(denoiser).plan([Job("red circle on", (3, 1))], explainer)
    assert denoiser.batches == []


def test_an_edit_that_the_model_reads_the_same_is_refused() -> None:
    denoiser = Worded()
    denoiser.encode_prompts = lambda prompts: Worded.encode_prompts(denoiser, [one.lower() for one in prompts])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="is told the same without 'red'"):
        Counterfactual("red", replace={"red": "Red"}).output_spec(denoiser, Job("red circle", (1,)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ()}, "needs at least one word"),
        ({"edit": "delete"}, "edit 'delete' is not known: expected one of auto, replace, remove, zero"),
        ({"output": "noise"}, "output 'noise' is not known: expected one of epsilon, x0"),
        ({"num_replacements": 0}, "num_replacements 0 is not possible: expected 1 to 1000"),
        ({"replace": {"red": []}}, "replace 'red' by .* is not possible: expected at least one word"),
        ({"replace": {"red": ["blue", " "]}}, "replace 'red' by .* is not possible"),
        ({"replace": {"red": ["x"]}, "edit": "remove"}, "replace has no effect with edit='remove'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Counterfactual(**settings)


def test_settings_survive_json_and_are_hashable() -> None:
    explainer = Counterfactual(("red", "red"), replace={"function": "x", "red": ["blue", "green"]}, output="x0")
    assert rebuild(json.loads(json.dumps(describe(explainer)))) == explainer
    assert {explainer: 1}[Counterfactual("red", replace={"red": ("blue", "green"), "function": ["x"]}, output="x0")]
    assert all(len(hot(Counterfactual(edit=edit, output=output))) < 130 for edit in EDITS for output in OUTPUTS)


# Through the engine --------------------------------------------------------------------------------------------------


def assert_equal(a: Any, b: Any) -> None:
    assert tuple(a.words) == tuple(b.words)
    for name in ("word_maps", "word_errors"):
        np.testing.assert_array_equal(np.asarray(getattr(a, name)), np.asarray(getattr(b, name)), name)
    np.testing.assert_array_equal(np.asarray(a.maps["counterfactual"]), np.asarray(b.maps["counterfactual"]))


@pytest.fixture
def engine() -> Engine:
    denoiser = Worded()
    denoiser.alternatives = {"red": ("green", "blue"), "circle": ("star",)}
    return Engine(denoiser)


@pytest.mark.parametrize("num_maps", [1, 3])
def test_resuming_gives_the_same_maps_and_errors(engine: Engine, tmp_path: Path, num_maps: int) -> None:
    options: dict[str, Any] = {"num_steps": 4, "previews": False}
    expected = engine.explain("red circle on", Counterfactual(), **options)
    events: list[Any] = []

    def interrupt(event: Any) -> None:
        events.append(event)
        if sum(isinstance(one, StepMap) for one in events) == num_maps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.explain("red circle on", Counterfactual(), out=tmp_path / "run.h5", on_event=interrupt, **options)
    events = []
    resumed = engine.explain(
        "red circle on", Counterfactual(), out=tmp_path / "run.h5", on_event=events.append, **options
    )
    assert sum(isinstance(one, StepMap) for one in events) == 4 - num_maps
    assert expected.word_errors is not None
    assert np.isinf(expected.word_errors[1:]).all()
    assert np.isfinite(expected.word_errors[0]).all()
    assert_equal(resumed, expected)
    with dfengine.open(tmp_path / "run.h5") as run:
        assert_equal(run[0], expected)
        assert run[0].settings["counterfactual"] == Counterfactual()
        assert run[0].form("counterfactual") == "words"
        table = run[0].to_xarray()
        assert table["heat_error"].dims == table["heat"].dims == ("word", "step", "y", "x")
        assert run.to_xarray()["heat_error"].shape == (1, 3, 4, 3, 4)


def test_a_file_without_replacements_has_no_errors(engine: Engine, tmp_path: Path) -> None:
    result = engine.explain("red circle on", Counterfactual(edit="remove"), num_steps=1, out=tmp_path / "run.h5")
    assert result.word_errors is None
    with dfengine.open(tmp_path / "run.h5") as run:
        assert run[0].word_errors is None
        assert "curves/heat_error" not in run.layout


def test_an_image_without_a_prompt_has_the_saliency_alone(engine: Engine, tmp_path: Path) -> None:
    picture = np.full((3, 4, 3), 200, np.uint8)
    result = engine.explain(
        "", Counterfactual(), image=picture, negative_prompt="red", num_steps=1, out=tmp_path / "run.h5"
    )
    assert (result.words, result.word_maps, result.word_errors) == ((), None, None)
    assert (result.maps["counterfactual"][0] > 0).tolist() == at({(0, 0): 1}).bool().tolist()


def test_the_page_has_the_errors_of_words(engine: Engine) -> None:
    result = engine.explain("red circle on", Counterfactual(), num_steps=2)
    (method,) = pack(result, 0)[0]["methods"]
    assert [(one["name"], "error" in one) for one in method["variants"]] == [
        ("", False),
        ("red", True),
        ("circle", True),
        ("on", True),
    ]


def test_errors_of_words_are_stored_if_the_plan_has_them(engine: Engine, tmp_path: Path) -> None:
    plan = engine.plan([engine.job("red circle", num_steps=1)], Counterfactual()).file_plan(
        engine.denoiser, previews=False
    )
    maps = np.zeros((2, 3, 4), np.float32)
    with (
        store.Writer.create(tmp_path / "run.h5", plan) as writer,
        pytest.raises(ValueError, match="errors of the words' maps: in the plan, but not given"),
    ):
        writer.curves(0, 0, word_maps=maps)
    before = json.loads(plan.to_json())
    assert before["methods"][0].pop("has_word_error") is True
    older = store.Plan.from_json(json.dumps(before))
    assert not older.methods[0].has_word_error, "a file from before there were errors is read without"
    with store.Writer.create(tmp_path / "older.h5", older) as writer:
        with pytest.raises(ValueError, match="errors of the words' maps: given, but not in the plan"):
            writer.curves(0, 0, word_maps=maps, word_errors=maps)
        writer.curves(0, 0, word_maps=maps)
    with dfengine.open(tmp_path / "older.h5") as run:
        assert run[0].word_errors is None
        assert (run[0].word_maps[:] == 0).all()


def test_a_stream_may_have_several_explainers_of_words_but_a_result_has_one(engine: Engine) -> None:
    both = [Counterfactual(), Counterfactual(edit="remove", name="removed")]
    events = list(engine.stream([engine.job("red circle", num_steps=2)], both))
    assert [one.method for one in events if isinstance(one, StepMap)] == ["counterfactual"] * 2 + ["removed"] * 2
    with pytest.raises(ValueError, match="counterfactual and removed both output words, and a result holds one set"):
        engine.explain("red circle", both, num_steps=2)


@pytest.fixture(scope="module")
def shapes() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu")


@pytest.mark.slow
def test_maps_find_their_own_concept_in_the_embedded_world(shapes: Engine) -> None:
    judge, own, other = ConceptJudge(), [], []
    texts = [prompt.text for prompt in embedded_prompts(4, seed=5)]
    jobs = [shapes.job(text, seed=seed, num_steps=5) for seed, text in enumerate(texts)]
    for path in shapes.sample(jobs):
        caption = Caption.parse(path.job.prompt)
        areas = judge.areas(path.image.numpy(), caption)
        assert areas is not None
        assert caption.object is not None
        phrases = (" ".join(caption.subject), " ".join(caption.object))
        path = dataclasses.replace(path, explain_steps=(2,))
        (found,) = Counterfactual(words=phrases).explain(shapes.denoiser, [path])
        assert found.word_maps is not None
        heats = [heatmap(one.numpy(), (64, 64)) for one in found.word_maps]
        own += [auroc(heats[0], areas["subject"]), auroc(heats[1], areas["object"])]
        other += [auroc(heats[0], areas["object"]), auroc(heats[1], areas["subject"])]
    assert np.mean(own) > 0.95
    assert np.mean(other) < 0.7


@pytest.mark.soak
def test_batches_of_the_embedded_model_agree(shapes: Engine) -> None:
    texts = [CAPTION, "a pink star on a black background"]
    jobs = [shapes.job(text, seed=3, num_steps=2) for text in texts]
    paths = list(shapes.sample(jobs))
    expected = maps_of(Counterfactual(num_replacements=2), shapes.denoiser, paths)
    before, shapes.denoiser.batch_size = shapes.denoiser.batch_size, 7
    try:
        for place, found in maps_of(Counterfactual(num_replacements=2), shapes.denoiser, paths).items():
            assert_close(found.word_maps, expected[place].word_maps, rtol=1e-3, atol=1e-4)
    finally:
        shapes.denoiser.batch_size = before


@pytest.mark.slow
def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    options = ["-e", "counterfactual", "--word", "red circle", "--word", "square", "--replace", "circle=star, ring"]
    options += ["--replace", "circle=cross", "--num-replacements", "2", "--explained-output", "x0"]
    run = dfengine_command("explain", CAPTION, "-o", str(out), "--steps", "1", *options)
    assert run.returncode == 0, run.stderr
    with dfengine.open(out) as opened:
        (item,) = opened
        assert item.settings["counterfactual"] == Counterfactual(
            ("red circle", "square"), replace={"circle": ["star", "ring", "cross"]}, num_replacements=2, output="x0"
        )
        assert (item.words, item.word_maps.shape) == (("red circle", "square"), (2, 1, 16, 16))
        assert np.isfinite(item.word_errors[:]).all()
    assert "replace={'circle': ('star', 'ring', 'cross')}" in dfengine_command("info", str(out)).stdout
    assert dfengine_command("figures", str(out), "-o", str(tmp_path / "words.png")).returncode == 0
    assert (tmp_path / "words.png").stat().st_size > 10_000
    for wrong in ("circle", "circle=star,,ring"):
        refused = dfengine_command("explain", CAPTION, "-o", "x.h5", "-e", "counterfactual", "--replace", wrong)
        assert refused.returncode == 2
        assert f"{wrong!r} is not understood: expected a word and others, as in circle=star,ring" in refused.stderr


@pytest.mark.slow
def test_every_word_of_two_explainers_is_named_together(tmp_path: Path) -> None:
    run = dfengine_command("explain", CAPTION, "-o", str(tmp_path / "x.h5"), "-e", "attention", "-e", "counterfactual")
    assert run.returncode == 2
    assert "attention and counterfactual both output words" in run.stderr
