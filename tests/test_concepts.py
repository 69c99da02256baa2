"""Table 3 by hand on made-up relevance, the judge's reading of scenes, and both end to end."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import dfengine_command
from matplotlib.figure import Figure

from dfengine import Engine, Relevance, StepMap, figures
from dfengine.evaluate import (
    ConceptJudge,
    ConceptRecord,
    embedded_prompts,
    measure_concepts,
    summarise_concepts,
    with_concepts,
)
from dfengine.evaluate.concepts import concept_relevance
from dfengine.prompts import ROLES, Prompt
from dfengine.result import normalised
from dfengine.shapes.world import COLOURS, KINDS, Caption, render, sample_scenes
from dfengine.tokens import Tokens

TOKENS = Tokens("a cat on mats", ("<s>", "a", "cat", "on", "ma", "ts", "</s>"), (
    (0, 0), (0, 1), (2, 5), (6, 8), (9, 11), (11, 13), (0, 0),
))  # fmt: skip
PROMPT = Prompt("a cat on mats", {"subject": "cat", "relation": "on", "object": "mats"})
#: Two steps; the special tokens would be the extremes.
RELEVANCE = np.array([[99, 99], [1, 0], [5, 0], [2, 0], [3, 0], [4, 0], [-9, 7]], dtype=float)


def test_min_max_is_over_the_tokens_between_the_special_ones() -> None:
    """(r − 1) / (5 − 1) at the first step; at the second all are the same, which is nothing."""
    own = normalised(RELEVANCE, TOKENS)[1:6]
    np.testing.assert_allclose(own, [[0, 0], [1, 0], [0.25, 0], [0.5, 0], [0.75, 0]])


def test_a_concepts_relevance_is_the_mean_over_its_tokens() -> None:
    found = concept_relevance(RELEVANCE, TOKENS, PROMPT)
    assert {role: line.tolist() for role, line in found.items()} == {
        "subject": [1, 0], "relation": [0.25, 0], "object": [0.625, 0],
    }  # fmt: skip


def test_in_the_released_code_it_is_the_sum() -> None:
    assert concept_relevance(RELEVANCE, TOKENS, PROMPT, summed=True)["object"].tolist() == [1.25, 0]


def records() -> list[ConceptRecord]:
    """Two prompts, two seeds, one schedule; sums of the subject 1, 3 of the first prompt, 5, 5 of the second."""
    made = []
    for prompt, seed, total, right in [(0, 0, 1.0, False), (0, 1, 3.0, True), (1, 0, 5.0, True), (1, 1, 5.0, True)]:
        one = ConceptRecord("early", prompt, seed, relevance={role: np.array([total / 2, total / 2]) for role in ROLES})
        one.is_right = dict.fromkeys(ROLES, right)
        made.append(one)
    return made


def test_means_are_over_seeds_then_over_prompts() -> None:
    prompts = [PROMPT, Prompt("a dog on a hat", {"subject": "dog", "relation": "on", "object": "hat"})]
    (found,) = summarise_concepts(records(), prompts, {"early": (900, 100)})
    subject = found.relevance["early"]["subject"]
    assert (subject.mean, subject.count) == (3.5, 2)
    assert found.right["early"]["subject"].mean == 0.75
    # Of the first prompt the right image has more, the second has no wrong one.
    assert (found.agreement["subject"].mean, found.agreement["subject"].count) == (1, 1)
    assert found.lines["early"]["object"] == [1.75, 1.75]
    assert (found.num_prompts, found.num_seeds, found.title) == (2, 2, "2 prompts")
    told = found.table().splitlines()
    assert told[0] == "| relevance, summed over the steps | subject | relation | object |"
    assert told[2].startswith("| early | 3.50 [")
    assert told[3] == "| early, paper | 19.98 | 3.04 | 18.51 |"
    assert told[-1] == (
        "| probability that relevance is higher in images that show it | 1.00 (1 prompt) | 1.00 (1 prompt) | "
        "1.00 (1 prompt) |"
    )


def test_prompts_without_roles_have_a_table_each_by_their_words() -> None:
    prompts = with_concepts([Prompt("an astronaut riding a horse"), PROMPT, Prompt("the of")])
    assert [list(prompt.concepts) for prompt in prompts] == [["astronaut", "riding", "horse"], [*ROLES], ["the", "of"]]
    made = [
        ConceptRecord("uniform", place, 0, relevance={role: np.ones(2) for role in prompt.concepts})
        for place, prompt in enumerate(prompts)
    ]
    found = summarise_concepts(made, prompts, {"uniform": (900, 100)})
    assert [part.title for part in found] == ["“a cat on mats”", "“an astronaut riding a horse”", "“the of”"]
    assert found[1].table().splitlines()[2:] == ["| uniform | 2.00 | 2.00 | 2.00 |"]
    assert not found[1].right


def test_events_are_gathered_whatever_their_order() -> None:
    """Steps of two items come in turns; each item's own make its lines."""
    planned = [ConceptRecord("early", 0, 0), ConceptRecord("latter", 0, 0)]

    def events() -> Iterator[Any]:
        for step in (0, 1):
            for item in (0, 1):
                values = torch.tensor(RELEVANCE[:, step] if item == 0 else RELEVANCE[:, 0], dtype=torch.float32)
                yield StepMap(item, step, "relevance", torch.zeros(1, 1), relevance=values)
        yield SimpleNamespace(item=1)
        yield SimpleNamespace(item=0)

    measure_concepts(events(), planned, [PROMPT], lambda _: TOKENS)
    first, second = planned
    assert first.relevance["subject"].tolist() == [1, 0]
    assert second.relevance["subject"].tolist() == [1, 1]
    assert first.is_right == {}


@pytest.mark.slow
def test_the_judge_says_what_is_right_of_rendered_scenes() -> None:
    """Every rendered scene is what its caption says; with its roles exchanged all is there but for the relation."""
    right, scenes = ConceptJudge(), sample_scenes(40, torch.Generator().manual_seed(5))
    images = (render(scenes)[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    shown, turned = [], []
    for caption, image in zip(scenes.captions, images, strict=True):
        shown += [*right(image, caption).values()]
        if caption.object is not None:
            exchanged = Caption(caption.object, caption.background, caption.relation, caption.subject)
            turned.append(list(right(image, exchanged).values()))
            missing = Caption(("cyan", "ring"), caption.background, caption.relation, caption.object)
            if ("cyan", "ring") not in (caption.subject, caption.object):
                assert right(image, missing)["subject"] is False
    assert np.mean(shown) > 0.97
    assert np.mean([found == [True, False, True] for found in turned]) > 0.9


@pytest.mark.slow
def test_a_second_shape_that_is_not_there_is_not_right() -> None:
    """Whatever the judge's heads for a second shape say of single ones, and of images that are not the world's."""
    right, scenes = ConceptJudge(), sample_scenes(60, torch.Generator().manual_seed(5))
    images = (render(scenes)[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    asked = [(color, kind) for color in COLOURS for kind in KINDS]
    for caption, image in list(zip(scenes.captions, images, strict=True))[:20]:
        if caption.object is None:
            others = [Caption(caption.subject, caption.background, "above", other) for other in asked]
            assert not any(right(image, other)["object"] for other in others if other.object != caption.subject)
    with pytest.raises(ValueError, match="is not of the embedded world"):
        right(np.zeros((128, 128, 3), np.uint8), scenes.captions[0])


@pytest.mark.parametrize("seed", [0, 21, 22])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_embedded_prompts_as_are_asked_for(count: int, seed: int) -> None:
    assert len(embedded_prompts(count, seed)) == count


def test_embedded_prompts_have_all_roles() -> None:
    prompts = embedded_prompts(20)
    assert len({prompt.text for prompt in prompts}) == 20
    assert all(list(prompt.concepts) == [*ROLES] for prompt in prompts)


@pytest.mark.slow
def test_the_measure_is_that_of_single_explanations() -> None:
    """Many prompts and schedules in batches against one `Engine.explain` at a time."""
    engine, prompts = Engine.from_pretrained("shapes", device="cpu"), embedded_prompts(2)
    schedules = ("uniform", "latter")
    planned = [ConceptRecord(schedule, place, 3) for schedule in schedules for place in range(2)]
    jobs = [engine.job(prompts[one.prompt].text, seed=3, num_steps=3, sampling=one.schedule) for one in planned]
    measure_concepts(engine.stream(jobs, Relevance()), planned, prompts, engine.denoiser.tokens)
    for one in planned:
        prompt = prompts[one.prompt]
        alone = engine.explain(prompt.text, Relevance(), seed=3, num_steps=3, sampling=one.schedule)
        assert alone.relevance is not None
        assert alone.tokens is not None
        expected = concept_relevance(alone.relevance, alone.tokens, prompt)
        for role in ROLES:
            np.testing.assert_allclose(one.relevance[role], expected[role], rtol=1e-3, atol=1e-4)
        assert set(one.is_right) == set(ROLES)


def panels(figure: Figure) -> Sequence[Any]:
    return figure.axes


@pytest.mark.slow
def test_figure_11_has_a_panel_a_schedule_and_bars_of_the_sums() -> None:
    lines = {s: {"cat": [0.1, 0.9], "mat": [0.5, 0.5]} for s in ("uniform", "early")}
    sums = {s: {"cat": (1.0, 0.5, 1.5), "mat": (1.0, 1.0, 1.0)} for s in lines}
    figure = figures.concepts([("one", lines, sums), ("two", lines, sums)], {"uniform": (900, 1), "early": (999, 80)})
    axes = panels(figure)
    assert [axis.get_title() for axis in axes] == ["uniform", "early", "sum over the steps"] * 2
    assert axes[0].lines[0].get_ydata().tolist() == [0.1, 0.9]
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["step 0\nt = 999", "step 1\nt = 80"]
    assert [bar.get_height() for bar in axes[2].patches] == [1.0] * 4


@pytest.mark.slow
def test_sample_shows_schedules_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star on a black background\n")
    out, folder = tmp_path / "s.png", tmp_path / "images"
    options = ["--steps", "2", "--gamma", "0", "--gamma", "60", "--seeds", "2", "--images", str(folder)]
    told = dfengine_command("sample", "-o", str(out), "--prompts", str(tmp_path / "prompts.txt"), *options)
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines() == [str(out), f"{folder}: 10 images"]
    assert len(list(folder.glob("*.png"))) == 10
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job("a red star on a black background", seed=1, num_steps=2, sampling="latter", gamma=0)
    (path,) = engine.sample([job])
    from matplotlib.image import imread

    image = imread(folder / "0001-seed1-latter-0.png")[..., :3] * 255
    assert np.abs(image - path.image.numpy()).max() <= 1


@pytest.mark.slow
def test_samples_are_labelled_and_their_lists_drawn() -> None:
    images = {name: [np.zeros((4, 6, 3), np.uint8)] * 2 for name in ("a cat", "a dog, seed 3")}
    figure = figures.samples(images, {"uniform": [900, 400, 1], "early, γ = 60": [999, 800, 500]})
    *pictures, schedule = figure.axes
    assert [axis.get_title() for axis in pictures] == ["uniform", "early, γ = 60", "", ""]
    assert [axis.get_ylabel() for axis in pictures[::2]] == ["a cat", "a dog, seed 3"]
    drawn = [line.get_xdata() for line in schedule.lines if line.get_marker() == "|"]
    assert [list(steps) for steps in drawn] == [[900, 400, 1], [999, 800, 500]]
