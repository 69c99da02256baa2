"""Maps against what a word changes: areas and scores worked out by hand, and the study on the embedded model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from analytic import Analytic

from dfengine import Attention, Counterfactual, Engine, Random, StepMap, studies
from dfengine.evaluate import STANDARD, WordAgreement, embedded_prompts, measure_words, with_phrases
from dfengine.evaluate.words import SCORES, otsu_area
from dfengine.prompts import Prompt

PROMPT = "a red circle above a blue square"
ROLES = {"subject": "red circle", "object": "blue square"}
#: What the subject and the object change: the first two pixels, the last two.
CHANGES = np.array([[[9.0, 8.0], [1.0, 2.0]], [[2.0, 1.0], [8.0, 9.0]]])


def step_map(method: str, saliency: Any = ((0, 1), (2, 3)), words: Any = None, item: int = 0, step: int = 0) -> StepMap:
    word_maps = None if words is None else torch.tensor(np.array(words)).float()
    return StepMap(item, step, method, torch.tensor(saliency).float(), word_maps=word_maps)


def measure(
    events: Sequence[StepMap],
    words: Mapping[str, Sequence[str]] | None = None,
    concepts: Sequence[Mapping[str, str]] = (ROLES,),
    steps: int = 1,
) -> WordAgreement:
    names = {STANDARD: ["red circle", "blue square"]} | dict(words or {})
    return measure_words(
        iter(events), concepts, [PROMPT] * len(concepts), range(steps), lambda method, _: names.get(method, [])
    )


def means(agreement: WordAgreement, method: str) -> tuple[float, ...]:
    assert list(agreement.overall[method]) == list(SCORES) == ["auroc", "correlation", "leakage"]
    return tuple(one.mean for one in agreement.overall[method].values())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ([[9, 8], [1, 2]], [[1, 1], [0, 0]]),
        # 0 0 0 | 6 has the variance 3·1·6² = 108, as every threshold between 0 and 6.
        ([[0, 6], [0, 0]], [[0, 1], [0, 0]]),
        # After 1: 1·3·(17/3 − 1)² = 65.3; after 4: 2·2·(6.5 − 2.5)² = 64; after 5: 3·1·(8 − 10/3)² = 65.3; the first.
        ([[1, 4], [5, 8]], [[0, 1], [1, 1]]),
        ([[2, 2], [2, 2]], [[0, 0], [0, 0]]),
    ],
)
def test_areas_by_hand(change: list, expected: list) -> None:
    assert otsu_area(np.array(change, dtype=np.float32)).tolist() == np.array(expected, dtype=bool).tolist()


def test_areas_have_the_threshold_of_an_independent_implementation() -> None:
    from skimage.filters import threshold_otsu

    random = np.random.default_rng(0)
    change = np.concatenate([random.normal(1, 0.2, 190), random.normal(3, 0.4, 66)]).reshape(16, 16)
    area = otsu_area(change)
    assert (area != (change > threshold_otsu(change, nbins=4096))).sum() <= 1
    assert 60 < area.sum() < 72


def test_scores_of_maps_by_hand() -> None:
    perfect, swapped = CHANGES, CHANGES[::-1]
    one = [[7, 7], [0, 3]]
    agreement = measure(
        [
            step_map(STANDARD, words=CHANGES),
            step_map("same", words=perfect),
            step_map("swapped", words=swapped),
            step_map("single", one),
        ],
        {method: ["red circle", "blue square"] for method in ("same", "swapped")},
    )
    # The subject's own map has its two lowest values on the object, as 1 and 2 lie below 8 and 9.
    assert means(agreement, STANDARD) == means(agreement, "same") == (1, 1, 0)
    # Ranks 4 3 1 2 against 2 1 3 4: differences 2 2 2 2, 1 − 6·16/60.
    assert means(agreement, "swapped") == pytest.approx((0, -0.6, 1))
    # 7 7 | 0 3: AUROC 1 for the subject, 0 for the object. Ranks 3.5 3.5 1 2 against 4 3 1 2 and 2 1 3 4.
    ranks = np.array([3.5, 3.5, 1, 2])
    correlations = [np.corrcoef(ranks, other)[0, 1] for other in ([4, 3, 1, 2], [2, 1, 3, 4])]
    assert means(agreement, "single") == pytest.approx((0.5, np.mean(correlations), 0))


def test_a_phrase_is_looked_for_in_the_maps_of_its_words() -> None:
    words = PROMPT.split()
    maps = np.zeros((len(words), 2, 2))
    maps[1], maps[2] = [[5, 0], [0, 1]], [[0, 4], [0, 0]]  # together highest in the first two pixels
    maps[5:] = CHANGES[1]
    found = measure([step_map(STANDARD, words=CHANGES), step_map("attention", words=maps)], {"attention": words})
    assert found.overall["attention"]["auroc"].mean == 1
    # Other words are mapped, and these two are not: there is nothing to score.
    other = measure(
        [step_map(STANDARD, words=CHANGES), step_map("attention", words=maps[:2])], {"attention": ["a", "red"]}
    )
    assert other.overall["attention"]["auroc"].count == 0
    assert other.unranked == {"attention": 1}


def test_means_are_over_concepts_then_steps_then_prompts() -> None:
    flat, right, wrong = np.ones((2, 2)), CHANGES[0], -CHANGES[0]
    concepts = [{"subject": "red circle", "object": "blue square"}] * 2
    events = [step_map(STANDARD, words=CHANGES, item=item, step=step) for item in range(2) for step in range(2)]
    maps = {(0, 0): right, (0, 1): flat, (1, 0): wrong, (1, 1): right}
    events += [step_map("a", words=[values, CHANGES[1]], item=item, step=step) for (item, step), values in maps.items()]
    agreement = measure(events, {"a": ["red circle", "blue square"]}, concepts, steps=2)
    # Of the flat map's step the object alone counts. Items: (1 + 1) / 2 and (½ + 1) / 2.
    assert agreement.overall["a"]["auroc"].mean == pytest.approx(0.875)
    assert [one.mean for one in agreement.steps["a"]["auroc"]] == pytest.approx([0.75, 1])
    # −9 −8 −1 −2 has the object's area of the last two as its highest.
    assert [one.mean for one in agreement.steps["a"]["leakage"]] == pytest.approx([0.5, 0])
    assert [one.count for one in agreement.steps["a"]["leakage"]] == [2, 1]
    assert agreement.unranked == {"a": 1}
    lines = agreement.table().splitlines()
    assert lines[0].startswith(
        "| what a word changes, 2 prompts | auroc | correlation | leakage | auroc, step 0, t = 0 |"
    )
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[-1].endswith("have no score: 1 of a.")


def test_leakage_needs_a_subject_and_an_object() -> None:
    concepts = [{"red circle": "red circle", "blue square": "blue square"}]
    agreement = measure([step_map(STANDARD, words=CHANGES)], concepts=concepts)
    assert agreement.overall[STANDARD]["leakage"].count == 0
    assert "| standard | 1.00 | 1.00 | – |" in agreement.table()
    assert measure([step_map(STANDARD)], concepts=[{}]).overall[STANDARD]["auroc"].count == 0


def test_phrases_take_the_place_of_every_word_alone() -> None:
    phrases = {PROMPT: ["red circle"], "other": []}
    named, random = Counterfactual("red"), Random()
    given = [Counterfactual(edit="remove", output="x0", name="mine"), named, random, Attention()]
    adapted, *others = with_phrases(given, phrases)
    assert others == [named, random, Attention()]
    assert isinstance(adapted, Counterfactual)
    assert (adapted.edit, adapted.output, adapted.name) == ("remove", "x0", "mine")
    assert [adapted.concepts(prompt) for prompt in (PROMPT, "other", "third")] == [("red circle",), (), None]
    assert isinstance(hash(adapted), int)


# The study -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu")


@pytest.mark.slow
def test_the_study_has_a_row_a_method_and_the_standard(engine: Engine) -> None:
    calls: list[tuple[str, int, int]] = []
    removed = Counterfactual(edit="remove", name="removed")
    prompts, methods = embedded_prompts(2, seed=5), ("random", "attention", removed)
    study = studies.words(engine, prompts, methods, num_steps=2, on_progress=lambda *call: calls.append(call))
    (summary,) = study.summaries
    assert list(summary.steps) == list(summary.overall) == [STANDARD, "random", "attention", "removed"]
    assert [calls[0], calls[-1]] == [("explaining", 1, 20), ("explaining", 20, 20)]
    found = {method: by_score["auroc"].mean for method, by_score in summary.overall.items()}
    assert found[STANDARD] == 1
    assert found["removed"] > 0.9
    assert found["random"] == pytest.approx(0.5, abs=0.1)
    assert summary.overall["removed"]["correlation"].mean > 0.5
    assert [axis.get_title() for axis in study.figures()["words"].axes] == list(SCORES)
    assert json.loads(study.to_json())[0]["num_prompts"] == 2


def test_plain_prompts_are_measured_by_their_words() -> None:
    values = {"red": 1.0, "cat": 2.0}

    class Two(Analytic):
        def encode_prompts(self, prompts: Sequence[str]) -> Any:
            from dfengine.diffusion.denoiser import Condition

            return Condition({"number": torch.tensor([sum(values.get(w, 0) for w in p.split()) for p in prompts])})

    pattern = torch.arange(30.0).reshape(6, 5)
    engine = Engine(Two(lambda x, number: x * 0 + pattern * number[:, None, None, None]))
    (summary,) = studies.words(
        engine, ["a red cat", Prompt("the cat", {"subject": "cat"})], [Random()], num_steps=2
    ).summaries
    assert summary.num_prompts == 2
    assert summary.overall[STANDARD]["auroc"].mean == 1
    assert summary.overall[STANDARD]["leakage"].count == 0


@pytest.mark.parametrize(
    ("prompts", "methods", "message"),
    [
        ([], ("random",), "there is no prompt"),
        (["red"], ("shap",), "method 'shap' is not known: expected one of .*counterfactual"),
        (["red"], (Random(name="standard"),), r"explainers share a name \(standard, standard\)"),
        (["red"], ("random",), "analytic takes no prompts"),
    ],
)
def test_impossible_requests_are_refused(prompts: Any, methods: Any, message: str) -> None:
    class Promptless(Analytic):
        def encode_prompts(self, prompts: Sequence[str]) -> Any:
            raise ValueError("analytic takes no prompts")

    denoiser = Promptless(lambda x, _: x)
    with pytest.raises(ValueError, match=message):
        studies.words(Engine(denoiser), prompts, methods if isinstance(methods, tuple) else (methods,))
    assert denoiser.batches == []
