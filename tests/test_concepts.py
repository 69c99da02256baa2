"""Table 3 worked out by hand on synthetic relevance, the judge's verdicts on scenes, and both end to end."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import dfengine_command
from matplotlib.figure import Figure

from dfengine import Engine, Relevance, StepMap, exponential_timesteps, figures
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
#: Two steps; the special tokens have the extreme values.
RELEVANCE = np.array([[99, 99], [1, 0], [5, 0], [2, 0], [3, 0], [4, 0], [-9, 7]], dtype=float)


def test_min_max_scaling_excludes_the_special_tokens() -> None:
    """(r − 1) / (5 − 1) at the first step; the second step is constant, which gives zeros."""
    scaled = normalised(RELEVANCE, TOKENS)[1:6]
    np.testing.assert_allclose(scaled, [[0, 0], [1, 0], [0.25, 0], [0.5, 0], [0.75, 0]])


def test_the_relevance_of_a_concept_is_the_mean_over_its_tokens() -> None:
    relevance = concept_relevance(RELEVANCE, TOKENS, PROMPT)
    assert {role: line.tolist() for role, line in relevance.items()} == {
        "subject": [1, 0], "relation": [0.25, 0], "object": [0.625, 0],
    }  # fmt: skip


def test_the_released_code_sums_over_the_tokens() -> None:
    assert concept_relevance(RELEVANCE, TOKENS, PROMPT, summed=True)["object"].tolist() == [1.25, 0]


def records() -> list[ConceptRecord]:
    """Two prompts, two seeds, one schedule; the subject's sums are 1 and 3 for the first prompt, 5 and 5 else."""
    all_records = []
    for prompt, seed, total, right in [(0, 0, 1.0, False), (0, 1, 3.0, True), (1, 0, 5.0, True), (1, 1, 5.0, True)]:
        record = ConceptRecord(
            "early", prompt, seed, relevance={role: np.array([total / 2, total / 2]) for role in ROLES}
        )
        record.is_right = dict.fromkeys(ROLES, right)
        all_records.append(record)
    return all_records


def test_means_are_over_seeds_then_over_prompts() -> None:
    prompts = [PROMPT, Prompt("a dog on a hat", {"subject": "dog", "relation": "on", "object": "hat"})]
    (summary,) = summarise_concepts(records(), prompts, {"early": (900, 100)})
    subject = summary.relevance["early"]["subject"]
    assert (subject.mean, subject.count) == (3.5, 2)
    assert summary.right["early"]["subject"].mean == 0.75
    # For the first prompt the right image has the higher relevance; the second has no wrong image.
    assert (summary.agreement["subject"].mean, summary.agreement["subject"].count) == (1, 1)
    assert summary.lines["early"]["object"] == [1.75, 1.75]
    assert (summary.num_prompts, summary.num_seeds, summary.title) == (2, 2, "2 prompts")
    rows = summary.table().splitlines()
    assert rows[0] == "| relevance, summed over the steps | subject | relation | object |"
    assert rows[2].startswith("| early | 3.50 [")
    assert rows[3:5] == [
        "",
        "The paper's figures are left out, since its Table 3 has 30 steps, 50 prompts, images of Stable Diffusion for "
        "prompts of Visual Genome.",
    ]
    assert rows[-1] == (
        "| probability that relevance is higher in images that show it | 1.00 (1 prompt) | 1.00 (1 prompt) | "
        "1.00 (1 prompt) |"
    )


@pytest.mark.parametrize(
    ("steps", "gamma", "changes", "reason"),
    [
        (30, 60, {}, ""),
        (29, 60, {}, "30 steps"),
        (30, 10, {}, "γ = 60"),
        (30, 60, {"num_prompts": 49}, "50 prompts"),
        (30, 60, {}, "images of Stable Diffusion for prompts of Visual Genome"),
    ],
)
def test_the_papers_values_stand_beside_ours_where_the_settings_are_the_papers(
    steps: int, gamma: float, changes: dict[str, Any], reason: str
) -> None:
    (summary,) = summarise_concepts(records(), [PROMPT, PROMPT], {"early": exponential_timesteps(steps, gamma)})
    same: dict[str, Any] = {"num_prompts": 50, "right": summary.right if "images" in reason else {}}
    table = dataclasses.replace(summary, **same | changes).table().splitlines()
    if reason:
        assert f"The paper's figures are left out, since its Table 3 has {reason}." in table
    assert ("| early, paper | 19.98 | 3.04 | 18.51 |" in table) == (not reason)


def test_each_prompt_without_roles_has_its_own_table_of_words() -> None:
    prompts = with_concepts([Prompt("an astronaut riding a horse"), PROMPT, Prompt("the of")])
    assert [list(prompt.concepts) for prompt in prompts] == [["astronaut", "riding", "horse"], [*ROLES], ["the", "of"]]
    all_records = [
        ConceptRecord("uniform", place, 0, relevance={role: np.ones(2) for role in prompt.concepts})
        for place, prompt in enumerate(prompts)
    ]
    summaries = summarise_concepts(all_records, prompts, {"uniform": (900, 100)})
    assert [summary.title for summary in summaries] == ["“a cat on mats”", "“an astronaut riding a horse”", "“the of”"]
    assert summaries[1].table().splitlines()[2:] == ["| uniform | 2.00 | 2.00 | 2.00 |"]
    assert not summaries[1].right


def test_events_may_arrive_in_any_order() -> None:
    """Steps of two items alternate, and each item's lines are built from its own steps."""
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
def test_the_judge_recognises_rendered_scenes() -> None:
    """Rendered scenes match their captions; with subject and object swapped only the relation is wrong."""
    judge, scenes = ConceptJudge(), sample_scenes(40, torch.Generator().manual_seed(5))
    images = (render(scenes)[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    verdicts, swapped_verdicts = [], []
    for caption, image in zip(scenes.captions, images, strict=True):
        verdicts += [*judge(image, caption).values()]
        if caption.object is not None:
            swapped = Caption(caption.object, caption.background, caption.relation, caption.subject)
            swapped_verdicts.append(list(judge(image, swapped).values()))
            missing = Caption(("cyan", "ring"), caption.background, caption.relation, caption.object)
            if ("cyan", "ring") not in (caption.subject, caption.object):
                assert judge(image, missing)["subject"] is False
    assert np.mean(verdicts) > 0.97
    assert np.mean([verdict == [True, False, True] for verdict in swapped_verdicts]) > 0.9


@pytest.mark.slow
def test_a_missing_second_shape_is_judged_wrong() -> None:
    """The judge reports no second shape in images of one, and rejects images that are not of the embedded world."""
    judge, scenes = ConceptJudge(), sample_scenes(60, torch.Generator().manual_seed(5))
    images = (render(scenes)[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    shapes = [(color, kind) for color in COLOURS for kind in KINDS]
    for caption, image in list(zip(scenes.captions, images, strict=True))[:20]:
        if caption.object is None:
            others = [Caption(caption.subject, caption.background, "above", other) for other in shapes]
            assert not any(judge(image, other)["object"] for other in others if other.object != caption.subject)
    with pytest.raises(ValueError, match="is not of the embedded world"):
        judge(np.zeros((128, 128, 3), np.uint8), scenes.captions[0])


@pytest.mark.parametrize("seed", [0, 21, 22])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_requested_number_of_embedded_prompts_is_returned(count: int, seed: int) -> None:
    assert len(embedded_prompts(count, seed)) == count


def test_embedded_prompts_have_all_roles() -> None:
    prompts = embedded_prompts(20)
    assert len({prompt.text for prompt in prompts}) == 20
    assert all(list(prompt.concepts) == [*ROLES] for prompt in prompts)


@pytest.mark.soak
def test_batched_relevance_equals_that_of_single_explanations() -> None:
    """Prompts and schedules in batches against one `Engine.explain` call each."""
    engine, prompts = Engine.from_pretrained("shapes", device="cpu"), embedded_prompts(2)
    schedules = ("uniform", "latter")
    planned = [ConceptRecord(schedule, place, 3) for schedule in schedules for place in range(2)]
    jobs = [
        engine.job(prompts[record.prompt].text, seed=3, num_steps=3, sampling=record.schedule) for record in planned
    ]
    measure_concepts(engine.stream(jobs, Relevance()), planned, prompts, engine.denoiser.tokens)
    for record in planned:
        prompt = prompts[record.prompt]
        result = engine.explain(prompt.text, Relevance(), seed=3, num_steps=3, sampling=record.schedule)
        assert result.relevance is not None
        assert result.tokens is not None
        expected = concept_relevance(result.relevance, result.tokens, prompt)
        for role in ROLES:
            np.testing.assert_allclose(record.relevance[role], expected[role], rtol=1e-3, atol=1e-4)
        assert set(record.is_right) == set(ROLES)


def panels(figure: Figure) -> Sequence[Any]:
    return figure.axes


@pytest.mark.slow
def test_figure_11_has_one_panel_per_schedule_and_bars_of_the_sums() -> None:
    lines = {s: {"cat": [0.1, 0.9], "mat": [0.5, 0.5]} for s in ("uniform", "early")}
    sums = {s: {"cat": (1.0, 0.5, 1.5), "mat": (1.0, 1.0, 1.0)} for s in lines}
    figure = figures.concepts([("one", lines, sums), ("two", lines, sums)], {"uniform": (900, 1), "early": (999, 80)})
    axes = panels(figure)
    assert [axis.get_title() for axis in axes] == ["uniform", "early", "sum over the steps"] * 2
    assert axes[0].lines[0].get_ydata().tolist() == [0.1, 0.9]
    assert [text.get_text() for text in axes[1].get_xticklabels()] == ["step 0\nt = 999", "step 1\nt = 80"]
    assert [bar.get_height() for bar in axes[2].patches] == [1.0] * 4


@pytest.mark.soak
def test_sample_shows_schedules_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red star on a black background\n")
    out, folder = tmp_path / "s.png", tmp_path / "images"
    options = ["--steps", "2", "--gamma", "0", "--gamma", "60", "--seeds", "2", "--images", str(folder)]
    process = dfengine_command("sample", "-o", str(out), "--prompts", str(tmp_path / "prompts.txt"), *options)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [str(out), f"{folder}: 10 images"]
    assert len(list(folder.glob("*.png"))) == 10
    engine = Engine.from_pretrained("shapes", device="cpu")
    job = engine.job("a red star on a black background", seed=1, num_steps=2, sampling="latter", gamma=0)
    (path,) = engine.sample([job])
    from matplotlib.image import imread

    image = imread(folder / "0001-seed1-latter-0.png")[..., :3] * 255
    assert np.abs(image - path.image.numpy()).max() <= 1


@pytest.mark.slow
def test_samples_are_labelled_and_their_time_steps_marked() -> None:
    images = {name: [np.zeros((4, 6, 3), np.uint8)] * 2 for name in ("a cat", "a dog, seed 3")}
    figure = figures.samples(images, {"uniform": [900, 400, 1], "early, γ = 60": [999, 800, 500]})
    *pictures, schedule = figure.axes
    assert [axis.get_title() for axis in pictures] == ["uniform", "early, γ = 60", "", ""]
    assert [axis.get_ylabel() for axis in pictures[::2]] == ["a cat", "a dog, seed 3"]
    marks = [line.get_xdata() for line in schedule.lines if line.get_marker() == "|"]
    assert [list(steps) for steps in marks] == [[900, 400, 1], [999, 800, 500]]
