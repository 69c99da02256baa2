"""Studies end to end on the embedded model: their numbers against single explanations, their files and errors."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dfengine import Cam, Engine, Job, Random, Relevance, Rise, XDiffusionRise, studies
from dfengine.cli import main
from dfengine.diffusion.denoiser import Denoiser
from dfengine.evaluate import (
    GameCache,
    NoFeatures,
    captions,
    embedded_prompts,
    play_games,
    summarise_games,
)
from dfengine.evaluate.concepts import concept_relevance
from dfengine.evaluate.localisation import SCORES, TARGETS
from dfengine.evaluate.recovery import MEASURES
from dfengine.explain import OutputSpec
from dfengine.prompts import Prompt

TWO = captions(2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("shapes", device="cpu")


class Reports:
    """Collects the progress of a study, which never decreases and ends at the total."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        self.calls.append((what, done, total))


def assert_counted(reports: Reports, *stages: tuple[str, int]) -> None:
    assert reports.calls == [(what, done, total) for what, total in stages for done in range(1, total + 1)]


# Games ---------------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_games_have_tables_figures_and_a_cache(engine: Engine, tmp_path: Path) -> None:
    """Methods by name, explainers and another tool's maps; the second time from the cache."""
    theirs = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    methods: list[Any] = ["random", Rise(6), "rise-cosine"]
    options: dict[str, Any] = {"num_steps": 3, "num_masks": 6, "distance": "frechet-single", "maps": {"theirs": theirs}}
    reports = Reports()
    study = studies.games(engine, TWO, methods, cache=GameCache(tmp_path / "c"), on_progress=reports, **options)
    assert_counted(reports, ("playing", 2 * 4))
    (summary,) = study.summaries
    assert list(summary.methods) == ["random", "rise", "rise-cosine", "theirs"]
    assert (summary.num_items, summary.step, summary.preset) == (2, 1, "default")
    assert len(list((tmp_path / "c").iterdir())) == 8
    cached = studies.games(engine, TWO, methods, cache=GameCache(tmp_path / "c"), **options)
    assert cached.summaries == study.summaries
    assert len(list((tmp_path / "c").iterdir())) == 8

    jobs = [engine.job(text, seed=seed, num_steps=3) for seed, text in enumerate(TWO)]
    single = play_games(engine.denoiser, engine.sample, jobs, [Rise(6)])
    expected = summarise_games(single, "frechet-single").methods["rise"]["deletion"].auc.band
    assert summary.methods["rise"]["deletion"].auc.band == pytest.approx(expected, rel=1e-4)

    assert study.labels == [f"{TWO[0]}, seed 0", f"{TWO[1]}, seed 1"]
    folder = study.save(tmp_path / "new" / "games")
    pictures = {f"{name}.{suffix}" for name in ("curves", "comparison", "ablation") for suffix in ("png", "pdf")}
    assert {path.name for path in folder.iterdir()} == {"table.md", "table.json", *pictures}
    assert (folder / "table.md").read_text() == study.table() + "\n"
    assert json.loads((folder / "table.json").read_text()) == json.loads(study.to_json())


@pytest.mark.slow
def test_several_steps_have_figures_each(engine: Engine) -> None:
    study = studies.games(engine, TWO[:1], [Random()], steps=(2, 0, 2), num_steps=3, distance="mse")
    assert [summary.step for summary in study.summaries] == [2, 0]
    assert list(study.figures()) == ["step-02-curves", "step-02-comparison", "step-00-curves", "step-00-comparison"]
    assert study.table().count("| random |") == 2


@pytest.mark.soak
def test_the_preset_holds_for_methods_and_games(engine: Engine) -> None:
    options: dict[str, Any] = {"num_steps": 2, "num_masks": 6, "distance": "frechet-single"}
    default = studies.games(engine, TWO[:1], ["rise"], **options)
    released = studies.games(engine, TWO[:1], ["rise"], preset="xdiffusion", **options)
    explicit = studies.games(engine, TWO[:1], [XDiffusionRise(6)], preset="xdiffusion", **options)
    assert released.summaries == explicit.summaries
    assert released.summaries[0].preset == "xdiffusion"
    raw = [one.summaries[0].methods["rise"]["deletion"].raw for one in (default, released)]
    assert raw[0] != raw[1]


@pytest.mark.slow
def test_the_mean_squared_error_needs_no_extractor(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"num_steps": 1, "distance": "mse"}
    own = studies.games(engine, TWO[:1], ["random"], **options)
    monkeypatch.setattr(engine.denoiser, "features", None)
    without = studies.games(engine, TWO[:1], ["random"], **options)
    assert without.summaries == own.summaries
    assert without.runs[0].features == NoFeatures.name


@dataclass(frozen=True)
class UsesFeatures(Random):
    """Needs an extractor, like DF-RISE's Fréchet similarity."""

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        assert denoiser.features is not None
        return super().output_spec(denoiser, job)


@pytest.mark.slow
def test_explainers_may_use_the_given_extractor_during_the_study(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = engine.denoiser.features
    monkeypatch.setattr(engine.denoiser, "features", None)
    options: dict[str, Any] = {"num_steps": 1, "distance": "features"}
    study = studies.games(engine, TWO[:1], [UsesFeatures()], features=extract, **options)
    assert study.runs[0].valid_items() == [0]
    assert engine.denoiser.features is None
    with pytest.raises(ValueError, match="comes with no extractor"):
        studies.games(engine, TWO[:1], ["random"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "2 images are too few for frechet-set: give at least 10, or take frechet-single"),
        ({"distance": "l1"}, "distance 'l1' is not known: expected one of frechet-set"),
        ({"distance": "mse", "methods": ["shap"]}, "method 'shap' is not known: expected one of .*rise"),
        ({"distance": "mse", "table": 3}, "table 3 is not one of the games: expected 1 or 2"),
        ({"distance": "mse", "steps": [30]}, r"step 30 is outside \[0, 29\]"),
        ({"distance": "mse", "features": "nowhere"}, "no feature extractor at 'nowhere'"),
        ({"distance": "mse", "preset": "code", "methods": ["random"]}, "preset 'code' is not known"),
        ({"distance": "mse", "prompts": []}, "there is no prompt: give at least one"),
    ],
)
def test_impossible_games_are_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        studies.games(engine, **{"prompts": TWO, **options})


# Concepts ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_concepts_of_many_schedules_and_seeds(engine: Engine) -> None:
    """Averages of the totals of single explanations; with the preset of the released code, sums over tokens."""
    prompts, reports = embedded_prompts(1), Reports()
    options: dict[str, Any] = {"num_steps": 2, "num_seeds": 2, "seed": 3}
    study = studies.concepts(engine, prompts, schedules=("uniform", "latter"), on_progress=reports, **options)
    assert_counted(reports, ("measuring", 2 * 2 * (2 + 2)))
    (summary,) = study.summaries
    assert (summary.num_prompts, summary.num_seeds) == (1, 2)
    for schedule in ("uniform", "latter"):
        totals = []
        for seed in (3, 4):
            job = {"seed": seed, "num_steps": 2, "sampling": schedule}
            single = engine.explain(prompts[0].text, Relevance(), **job)  # type: ignore[arg-type]
            assert single.relevance is not None
            assert single.tokens is not None
            totals.append(concept_relevance(single.relevance, single.tokens, prompts[0])["subject"].sum())
        assert summary.relevance[schedule]["subject"].mean == pytest.approx(np.mean(totals), rel=1e-3)
    assert study.table().startswith(f"“{prompts[0].text}”, shapes")
    assert list(study.figures()) == ["concepts"]
    summed = studies.concepts(engine, prompts, schedules=("uniform",), preset="xdiffusion", **options)
    # "red circle" has two tokens: the sum is twice the mean.
    ratio = summed.summaries[0].relevance["uniform"]["subject"].mean / summary.relevance["uniform"]["subject"].mean
    assert ratio == pytest.approx(2, rel=1e-3)


@pytest.mark.slow
def test_prompts_without_concepts_are_measured_word_by_word(engine: Engine) -> None:
    study = studies.concepts(engine, ["a red star on a black background"], num_steps=1)
    (summary,) = study.summaries
    assert list(summary.lines) == list(studies.SCHEDULES)
    assert list(summary.lines["early"]) == ["red", "star", "black", "background"]
    for prompts, seeds, message in (([], 1, "there is no prompt"), (TWO, 0, "num_seeds 0 is not possible")):
        with pytest.raises(ValueError, match=message):
            studies.concepts(engine, prompts, num_seeds=seeds)
    with pytest.raises(ValueError, match="does not know 'dog'"):
        studies.concepts(engine, [Prompt("a red dog")])


# Truth, recovery and sanity ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_truth_of_generated_and_rendered_images(engine: Engine) -> None:
    reports = Reports()
    study = studies.truth(engine, TWO, ("random", "counterfactual", "attention"), num_steps=3, on_progress=reports)
    sources = ("generated images", "rendered scenes")
    assert_counted(reports, *((f"explaining {source}", 2 * (3 * 3 + 2)) for source in sources))
    assert tuple(summary.source for summary in study.summaries) == sources
    for summary in study.summaries:
        assert list(summary.steps) == list(summary.overall) == ["random", "counterfactual", "attention"]
        assert summary.num_images + summary.num_excluded == 2
        for by_target in summary.steps.values():
            assert list(by_target) == list(TARGETS)
            assert all(list(by_score) == list(SCORES) for by_score in by_target.values())
            assert all(0 <= one.mean <= 1 for one in by_target["subject"]["auroc"])
    assert (study.summaries[1].num_images, study.summaries[1].num_excluded) == (2, 0)
    found = study.summaries[1].overall["counterfactual"]
    assert min(found["subject"]["auroc"].mean, found["object"]["auroc"].mean) > 0.9
    assert len(study.figures()["truth"].axes) == 6
    with pytest.raises(ValueError, match="in the embedded world alone"):
        studies.truth(engine, ["a cat"])
    with pytest.raises(ValueError, match="'a cat' is not a caption"):
        studies.truth(engine, [*TWO, "a cat"])


@pytest.mark.slow
def test_recovery_of_methods_by_name_and_explainers(engine: Engine) -> None:
    reports = Reports()
    study = studies.recovery(engine, TWO, ("rise", Cam()), num_steps=3, num_masks=4, on_progress=reports)
    assert_counted(reports, ("measuring", 2 * (2 * 3 + 2)))
    (summary,) = study.summaries
    assert list(summary.steps) == ["rise", "cam"]
    assert list(summary.steps["cam"]) == list(MEASURES)
    assert [axis.get_title() for axis in study.figures()["recovery"].axes] == list(MEASURES)


@pytest.mark.slow
def test_sanity_reports_what_it_checks(engine: Engine) -> None:
    reports = Reports()
    study = studies.sanity(engine, TWO[:1], ("cam",), num_steps=1, on_progress=reports)
    (summary,) = study.summaries
    assert list(summary.randomised) == ["cam"]
    assert study.passed == summary.passed == (not summary.failures)
    num_stages = len(summary.randomised["cam"])
    assert [(done, total) for _, done, total in reports.calls] == [(k, num_stages + 3) for k in range(num_stages + 3)]
    assert study.figures() == {}


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    from dfengine.evaluate.intervals import mean_interval

    (nothing,) = json.loads(studies.Study([mean_interval([])]).to_json())
    assert nothing == {"mean": None, "low": None, "high": None, "count": 0}


# On the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `dfengine evaluate` and returns its exit status, stdout and stderr."""

    def evaluate(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfengine", "evaluate", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return left.value.code or 0, printed.out, printed.err  # type: ignore[return-value]

    return evaluate


@pytest.mark.soak
def test_games_on_the_command_line(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    np.save(tmp_path / "theirs.npy", np.random.default_rng(0).random((2, 16, 16)))
    out = tmp_path / "games"
    options = ["games", "--limit", "2", "--steps", "3", "--masks", "6", "--distance", "frechet-single"]
    options += ["--method", "random", "--method", "rise", "--map", f"theirs={tmp_path / 'theirs.npy'}", "-o", str(out)]
    status, printed, _ = run(*options, "--json")
    assert status == 0
    assert json.loads(printed) == json.loads((out / "table.json").read_text())
    assert list(json.loads(printed)[0]["methods"]) == ["random", "rise", "theirs"]
    assert len(list((out / "cache").iterdir())) == 6
    assert run(*options)[1] == (out / "table.md").read_text()
    assert len(list((out / "cache").iterdir())) == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "keys"),
    [
        (["concepts"], ["uniform", "early", "latter"]),
        (["truth", "--method", "random"], ["random"]),
        (["recovery", "--masks", "4"], ["rise", "cam"]),
        (["words", "--method", "attention"], ["standard", "attention"]),
    ],
)
def test_other_studies_on_the_command_line(
    run: Callable[..., tuple[int, str, str]], options: list[str], keys: list[str], tmp_path: Path
) -> None:
    picture = tmp_path / "figure.png"
    status, printed, _ = run(*options, "--limit", "2", "--steps", "2", "--figure", str(picture), "--json")
    assert status == 0
    first = json.loads(printed)[0]
    assert list(first["relevance" if "concepts" in options else "steps"]) == keys
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["games", "--limit", "3"], "3 images are too few for frechet-set: give at least 10"),
        (["games", "--map", "x=text.npy"], "'text.npy' is not a NumPy array: write it with numpy.save"),
        (["games", "--map", "theirs"], "map 'theirs' is not understood: expected NAME=FILE.npy"),
        (["games", "--features", "nowhere", "--distance", "mse"], "no feature extractor at 'nowhere'"),
        (["games", "truth"], "unexpected extra argument"),
        (["truth", "--prompt", "a cat"], "in the embedded world alone"),
    ],
)
def test_errors_are_one_line(
    run: Callable[..., tuple[int, str, str]],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.npy").write_text("no array")
    status, printed, error = run(*options)
    assert (status, printed) == (2, "")
    assert message in error
    assert error.count("\n") == 1
