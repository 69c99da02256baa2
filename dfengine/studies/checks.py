"""Ground truth, words, recovery and sanity: can maps be trusted, and does the paper's first claim hold?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfengine import evaluate
from dfengine import figures as drawing
from dfengine.diffusion.job import Job
from dfengine.engine import Engine
from dfengine.explain import Counterfactual, Explainer
from dfengine.figures import Figure
from dfengine.prompts import Prompt
from dfengine.shapes.world import Caption
from dfengine.studies.base import Method, OnProgress, Study, check_request, make_jobs, no_progress, stream, texts_of

TRUTH_METHODS = ("random", "lime", "rise", "cam", "relevance", "attention", "counterfactual")
WORDS_METHODS = ("random", "lime", "rise", "cam", "relevance", "attention")
RECOVERY_METHODS = ("rise", "cam")
SANITY_METHODS = ("rise", "cam", "relevance", "attention")
#: Masks of DF-RISE a step, and denoising steps, of the sanity checks.
SANITY_MASKS, SANITY_STEPS = 60, 4


@dataclass(frozen=True)
class TruthStudy(Study):
    """Maps against true areas: a `Localisation` of generated images, and one of rendered scenes."""

    def figures(self) -> dict[str, Figure]:
        """ "truth": AUROC of each method at each step, a panel for each target and source."""
        bands: dict[str, dict[str, Any]] = {}
        for part in self.summaries:
            for method, by_target in part.steps.items():
                for target, by_score in by_target.items():
                    panel = f"AUROC, {target},\n{part.source}"
                    bands.setdefault(method, {})[panel] = [one.band for one in by_score["auroc"]]
        return {"truth": drawing.recovery(bands, self.summaries[0].timesteps, columns=3, limits=(0, 1))}


def _prepare(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method],
    settings: Mapping[str, Any],
    **arguments: Any,
) -> tuple[list[Explainer], list[str]]:
    """The methods with their settings, and the prompts' texts. Raises ValueError for what is not possible."""
    check_request(engine, methods=methods, **settings, **arguments)
    texts = texts_of(prompts)
    return evaluate.make_methods(methods, **settings), texts


def truth(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method] = TRUTH_METHODS,
    *,
    preset: str = "default",
    num_masks: int | None = None,
    num_samples: int | None = None,
    num_steps: int = 30,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> TruthStudy:
    """Do maps lie on the subject and the object, in images of the prompts and in as many noised, rendered scenes?

    Counterfactual maps are those of the phrases for both, unless an explainer names its words. Raises ValueError,
    before anything is computed, unless the prompts are captions of the embedded world.
    """
    given = {"preset": preset, "num_masks": num_masks, "num_samples": num_samples}
    explainers, texts = _prepare(
        engine, prompts, methods, given, num_steps=num_steps, seed=seed, on_progress=on_progress
    )
    evaluate.check_has_truth(engine.denoiser.image_shape, texts)
    captions, judge = [Caption.parse(text) for text in texts], evaluate.ConceptJudge()
    scenes = evaluate.scenes(len(texts), seed)
    phrases = {text: _shapes_of(Caption.parse(text)) for text in [*texts, *(scene.prompt for scene in scenes)]}
    explainers = evaluate.with_phrases(explainers, phrases)

    def locate(source: str, jobs: Sequence[Job], areas_of: Callable[[int, Any], Any]) -> evaluate.Localisation:
        planned = engine.plan(jobs, explainers).jobs
        return evaluate.measure_localisation(
            stream(engine, jobs, explainers, f"explaining {source}", on_progress),
            areas_of,
            [job.prompt for job in jobs],
            jobs[0].timesteps,
            lambda method, item: planned[item].outputs[method].words,
            source,
        )

    generated = make_jobs(engine, texts, seed, num_steps)
    rendered = make_jobs(engine, [scene.prompt for scene in scenes], seed, num_steps, [scene.image for scene in scenes])
    return TruthStudy(
        [
            locate("generated images", generated, lambda item, image: judge.areas(image, captions[item])),
            locate("rendered scenes", rendered, lambda item, _: scenes[item].areas),
        ]
    )


def _shapes_of(caption: Caption) -> tuple[str, ...]:
    return tuple(phrase for role, phrase in caption.concepts.items() if role in ("subject", "object"))


@dataclass(frozen=True)
class WordsStudy(Study):
    """Maps against counterfactual maps: one `WordAgreement`."""

    def figures(self) -> dict[str, Figure]:
        """ "words": each score of each method at each step."""
        (summary,) = self.summaries
        bands = {m: {name: [one.band for one in v] for name, v in by.items()} for m, by in summary.steps.items()}
        return {"words": drawing.recovery(bands, summary.timesteps)}


def words(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method] = WORDS_METHODS,
    *,
    preset: str = "default",
    num_masks: int | None = None,
    num_samples: int | None = None,
    num_steps: int = 30,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> WordsStudy:
    """Do maps find what a word changes, and keep away from what another one does?

    The standard are the counterfactual maps of the prompts' concepts, their words by default. Image i is generated with
    seed + i. Raises ValueError, before anything is computed, for input that is not possible.
    """
    given = {"preset": preset, "num_masks": num_masks, "num_samples": num_samples}
    explainers, texts = _prepare(
        engine, prompts, methods, given, num_steps=num_steps, seed=seed, on_progress=on_progress
    )
    named = evaluate.with_concepts([one if isinstance(one, Prompt) else Prompt(one) for one in prompts])
    phrases: dict[str, list[str]] = {}
    for one in named:
        phrases.setdefault(one.text, []).extend(one.concepts.values())
    explainers = evaluate.with_phrases([Counterfactual(name=evaluate.STANDARD), *explainers], phrases)
    jobs = make_jobs(engine, texts, seed, num_steps)
    planned = engine.plan(jobs, explainers).jobs
    return WordsStudy(
        [
            evaluate.measure_words(
                stream(engine, jobs, explainers, "explaining", on_progress),
                [one.concepts for one in named],
                texts,
                jobs[0].timesteps,
                lambda method, item: planned[item].outputs[method].words,
            )
        ]
    )


@dataclass(frozen=True)
class RecoveryStudy(Study):
    """The paper's first claim: one `Recovery`."""

    def figures(self) -> dict[str, Figure]:
        """ "recovery": a panel for each measure over the steps."""
        (summary,) = self.summaries
        bands = {m: {name: [one.band for one in v] for name, v in by.items()} for m, by in summary.steps.items()}
        return {"recovery": drawing.recovery(bands, summary.timesteps)}


def recovery(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method] = RECOVERY_METHODS,
    *,
    preset: str = "default",
    num_masks: int | None = None,
    num_samples: int | None = None,
    num_steps: int = 30,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> RecoveryStudy:
    """Do maps begin on the shapes and spread? In the embedded world.

    Raises ValueError, before anything is computed, if no prompt is a caption whose shapes its colours distinguish.
    """
    given = {"preset": preset, "num_masks": num_masks, "num_samples": num_samples}
    explainers, texts = _prepare(
        engine, prompts, methods, given, num_steps=num_steps, seed=seed, on_progress=on_progress
    )
    evaluate.check_has_truth(engine.denoiser.image_shape, texts)
    jobs = make_jobs(engine, texts, seed, num_steps)
    events = stream(engine, jobs, explainers, "measuring", on_progress)
    return RecoveryStudy([evaluate.measure_recovery(events, texts, jobs[0].timesteps)])


@dataclass(frozen=True)
class SanityStudy(Study):
    """Whether maps can be trusted: one `Sanity`."""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(summary.passed for summary in self.summaries)


def sanity(
    engine: Engine,
    prompts: Sequence[str | Prompt],
    methods: Sequence[Method] = SANITY_METHODS,
    *,
    preset: str = "default",
    num_masks: int | None = SANITY_MASKS,
    num_samples: int | None = None,
    num_steps: int = SANITY_STEPS,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> SanityStudy:
    """Do maps depend on the weights and on the prompt? Raises ValueError if a method does not suit the model."""
    given = {"preset": preset, "num_masks": num_masks, "num_samples": num_samples}
    explainers, texts = _prepare(
        engine, prompts, methods, given, num_steps=num_steps, seed=seed, on_progress=on_progress
    )
    jobs = make_jobs(engine, texts, seed, num_steps)
    return SanityStudy([evaluate.run_sanity_checks(engine.denoiser, jobs, explainers, on_progress=on_progress)])
