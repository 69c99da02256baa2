"""Sanity checks: maps must depend on the weights (Adebayo et al. 2018) and on the prompt, and find what it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy import ndarray
from scipy import stats

from dfengine.diffusion.denoiser import Condition, Denoiser, HasLayers, HasTokens, Layer, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate.intervals import CORRELATIONS, SHARES, Interval, mean_interval, proportion_interval
from dfengine.evaluate.truth import ConceptJudge, auroc
from dfengine.explain import Attention, Explainer, Relevance
from dfengine.result import heatmap
from dfengine.shapes.world import SIZE, Caption
from dfengine.tokens import STOP_WORDS, word_spans

#: With all weights random, maps share less than half of the variance of their ranks with the model's own; the whole
#: interval has to lie below.
MAX_CORRELATION = 0.5**0.5
#: Images whose maps are computed again for every randomised stage, and images whose words are removed one by one; the
#: subject is looked for in all images.
_NUM_RANDOMISED, _NUM_REMOVED = 6, 24

#: Called with what is being checked, the number of parts that are done, and of all parts.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sanity:
    """The outcome of the checks; intervals are over prompts."""

    model: str
    randomised: Mapping[str, Mapping[str, Interval]]
    """by method, the rank correlation of its maps with the model's own, by the last stage whose weights are random"""
    relevance_kept: Interval
    """the share of its relevance that a word keeps when its encoding is zeroed: a check of the word's tokens"""
    share_decreased: Interval
    """the share of words whose relevance then decreases"""
    effect_correlation: Interval
    """rank correlation, over a prompt's words, of relevance with how much the prediction changes without the word"""
    subject_auroc: Interval | None
    """in the embedded world, the probability that attention to the subject's noun is higher on the subject than
    elsewhere"""
    num_excluded: int
    """images that do not match their caption, or whose subject its colour does not identify"""
    failures: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def table(self) -> str:
        """The outcome as text, with a line for each failure."""
        return "\n".join(_table(self))


def run_sanity_checks(
    denoiser: Denoiser,
    jobs: Sequence[Job],
    explainers: Sequence[Explainer],
    *,
    on_progress: OnProgress = lambda *_: None,
) -> Sanity:
    """Run the checks on jobs with equally many steps; `explainers` are those whose maps must depend on the weights.

    Raises ValueError if the model lacks the layers, tokens or attention that the checks need.
    """
    if not jobs:
        raise ValueError("there is no prompt to check with: give at least one")
    network = require(denoiser, HasLayers, "randomising layers")
    with denoiser.exclusive():  # the weights are random for a while
        layers = network.layers()
        stages = _stages(layers)
        total = len(stages) + 3
        on_progress("generating the images", 0, total)
        sampled = trajectories(denoiser, jobs)
        randomised = _randomise(
            denoiser,
            layers,
            stages,
            sampled[:_NUM_RANDOMISED],
            explainers,
            lambda stage, number: on_progress(f"random weights down to {stage}", 1 + number, total),
        )
        on_progress("removing words", total - 2, total)
        kept, correlations = _remove_words(denoiser, sampled[:_NUM_REMOVED])
        on_progress("attention to the subject", total - 1, total)
        subject_auroc, num_excluded = _subject_auroc(denoiser, sampled)
    outcome = Sanity(
        denoiser.name,
        randomised,
        mean_interval(kept),
        proportion_interval([float(share < 1) for share in kept]),
        mean_interval(correlations, CORRELATIONS),
        subject_auroc,
        num_excluded,
        [],
    )
    return dataclasses.replace(outcome, failures=list(_failures(outcome)))


def _failures(outcome: Sanity) -> Iterator[str]:
    for method, stages in outcome.randomised.items():
        *_, (stage, last) = stages.items()
        if not abs(last.mean) < MAX_CORRELATION:
            yield f"{method} hardly changes with random weights down to {stage}: rank correlation {last}"
        elif not -MAX_CORRELATION < last.low <= last.high < MAX_CORRELATION:
            yield (
                f"{last.count} prompts do not show that {method} changes with random weights down to {stage}: rank "
                f"correlation {last}; give more"
            )
    if not outcome.relevance_kept.high < 1:
        yield f"a word's relevance does not decrease when it is removed: it keeps {outcome.relevance_kept}"
    if outcome.effect_correlation.count > 1 and not outcome.effect_correlation.low > 0:
        yield f"relevance does not increase with a word's effect: rank correlation {outcome.effect_correlation}"
    if outcome.subject_auroc is not None and not outcome.subject_auroc.low > 0.5:
        yield f"attention to the subject is no better than chance: {outcome.subject_auroc}"


# Random weights ------------------------------------------------------------------------------------------------------


def _stages(layers: Iterable[str]) -> list[tuple[str, list[str]]]:
    """The blocks of the network, from the output on, with their layers."""
    stages = groupby(layers, key=lambda name: name.rsplit(".", 2)[0])
    return [(stage, list(names)) for stage, names in stages][::-1]


def _randomise(
    denoiser: Denoiser,
    layers: Mapping[str, Layer],
    stages: Sequence[tuple[str, Sequence[str]]],
    sampled: Sequence[Trajectory],
    explainers: Sequence[Explainer],
    on_stage: Callable[[str, int], None],
) -> dict[str, dict[str, Interval]]:
    """Randomise the weights one stage after the other: how well each method's maps then agree with the model's own.

    The maps are made with other random masks than the model's own, so that no agreement comes from the masks.
    """
    agreement: dict[str, dict[str, Interval]] = {explainer.name: {} for explainer in explainers}
    own = {explainer.name: _maps(explainer, denoiser, sampled) for explainer in explainers}
    sampled = [_with_other_masks(trajectory) for trajectory in sampled]
    with _restored_weights(layers):
        for number, (stage, names) in enumerate(stages):
            on_stage(stage, number)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                for name in names:
                    _reset_parameters(layers[name].module)
            for explainer in explainers:
                pairs = zip(own[explainer.name], _maps(explainer, denoiser, sampled), strict=True)
                correlations = [_mean_rank_correlation(*pair) for pair in pairs]
                agreement[explainer.name][stage] = mean_interval(correlations, CORRELATIONS)
    return agreement


def _with_other_masks(trajectory: Trajectory) -> Trajectory:
    """The same latents under another seed, of which masks alone depend from here on."""
    return dataclasses.replace(trajectory, job=dataclasses.replace(trajectory.job, seed=trajectory.job.seed ^ 1))


def _maps(explainer: Explainer, denoiser: Denoiser, sampled: Sequence[Trajectory]) -> list[list[ndarray]]:
    """The maps of each item, step by step."""
    maps: list[list[ndarray]] = [[] for _ in sampled]
    for step_map in explainer.explain(denoiser, sampled):
        maps[step_map.item].append(step_map.saliency.numpy())
    return maps


def _mean_rank_correlation(before: Sequence[ndarray], after: Sequence[ndarray]) -> float:
    return float(np.mean([_rank_correlation(a, b) for a, b in zip(before, after, strict=True)]))


def _rank_correlation(a: ndarray, b: ndarray) -> float:
    """Spearman's over the pixels: 1 if `a` is constant, otherwise 0 if `b` is.

    A method whose maps are constant from the start cannot change, and must not pass for one that does.
    """
    if np.ptp(a) == 0:
        return 1.0
    if np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)


def _reset_parameters(module: torch.nn.Module) -> None:
    """Initialise all weights of a module again."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()


@contextmanager
def _restored_weights(layers: Mapping[str, Layer]) -> Iterator[None]:
    """On leaving, the layers' weights are what they were."""
    parameters = {id(p): p for layer in layers.values() for p in layer.module.parameters()}
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(before[key])


# Words and subjects --------------------------------------------------------------------------------------------------


def _remove_words(denoiser: Denoiser, sampled: Sequence[Trajectory]) -> tuple[list[float], list[float]]:
    """Zero the encoding of each word that is not a stop word.

    Returns the share of its relevance that each word keeps, and for each prompt the rank correlation, over its words,
    of relevance with how much the prediction changes.
    """
    encoder, relevance = require(denoiser, HasTokens, "removing words"), Relevance()
    kept: list[float] = []
    correlations: list[float] = []
    for trajectory in sampled:
        tokens, prompt = encoder.tokens(trajectory.job.prompt), trajectory.job.prompt
        before = _relevance_shares(relevance, denoiser, trajectory)
        shares, changes = [], []
        for start, stop in word_spans(prompt):
            if prompt[start:stop].casefold() in STOP_WORDS:
                continue
            places = tokens.places(start, stop)
            edited = dataclasses.replace(trajectory, prompt=encoder.zero_tokens(trajectory.prompt, places))
            shares.append(float(before[places].sum()))
            kept.append(float(_relevance_shares(relevance, denoiser, edited)[places].sum()) / shares[-1])
            changes.append(_prediction_change(denoiser, trajectory, edited.prompt))
        if len(set(shares)) > 2 and len(set(changes)) > 1:
            correlations.append(float(stats.spearmanr(shares, changes).statistic))
    return kept, correlations


@torch.no_grad()
def _prediction_change(denoiser: Denoiser, trajectory: Trajectory, edited: Condition) -> float:
    """Root mean square, over all steps, of the change of ε under another condition."""
    timesteps = torch.tensor(trajectory.job.timesteps, device=denoiser.device)
    row = torch.zeros(len(timesteps), dtype=torch.long, device=denoiser.device)
    given, changed = (
        denoiser(trajectory.latents, timesteps, condition[row]) for condition in (trajectory.prompt, edited)
    )
    return float((given - changed).square().mean().sqrt())


def _relevance_shares(relevance: Relevance, denoiser: Denoiser, trajectory: Trajectory) -> ndarray:
    """Each token's share of the relevance, averaged over the steps."""
    steps = [one.relevance.numpy() for one in relevance.explain(denoiser, [trajectory]) if one.relevance is not None]
    return np.mean([step / step.sum() for step in steps], axis=0)


def _subject_auroc(denoiser: Denoiser, sampled: Sequence[Trajectory]) -> tuple[Interval | None, int]:
    """How well attention to the subject's noun finds it in images with a known area, and how many have none."""
    try:
        captions = [Caption.parse(trajectory.job.prompt) for trajectory in sampled]
    except ValueError:
        return None, 0
    if denoiser.image_shape != (SIZE, SIZE):
        return None, 0
    judge, scores = ConceptJudge(), []
    for trajectory, caption in zip(sampled, captions, strict=True):
        areas = judge.areas(trajectory.image.numpy(), caption)
        if areas is None:
            continue
        # The text encoder reads from left to right: of "red circle", only "circle" has seen both words.
        steps = Attention(words=(caption.subject[1],)).explain(denoiser, [trajectory])
        maps = [step.word_maps[0].numpy() for step in steps if step.word_maps is not None]
        heat = [heatmap(one, denoiser.image_shape) for one in maps]
        scores.append(float(np.mean([auroc(one, areas["subject"]) for one in heat])))
    mean = mean_interval(scores, SHARES)
    return mean if mean.count else None, len(sampled) - len(scores)


def _table(outcome: Sanity) -> Iterator[str]:
    yield f"{outcome.model}: rank correlation with the model's own maps, weights random from the output down to"
    stages = list(next(iter(outcome.randomised.values())))
    width = max(map(len, stages))
    yield "  ".join([" " * width, *(f"{method:>20}" for method in outcome.randomised)])
    for stage in stages:
        yield "  ".join([f"{stage:<{width}}", *(f"{by[stage]!s:>20}" for by in outcome.randomised.values())])
    yield (
        f"a word whose encoding is zeroed keeps {outcome.relevance_kept} of its relevance, which decreases for "
        f"{outcome.share_decreased.mean:.0%} of {outcome.share_decreased.count} words; rank correlation of relevance "
        f"with how much the prediction changes without the word: {outcome.effect_correlation}"
    )
    if outcome.subject_auroc is not None:
        plural = "s" * (outcome.num_excluded > 1)
        excluded = f" ({outcome.num_excluded} image{plural} excluded)" if outcome.num_excluded else ""
        probability = f"{outcome.subject_auroc}{excluded}"
        yield f"attention to the subject's noun is higher on the subject than elsewhere with probability {probability}"
    yield from (f"FAILED: {failure}" for failure in outcome.failures)
    if outcome.passed:
        yield "all checks passed"
