"""Sanity checks: maps must depend on the model (Adebayo et al. 2018) and on the prompt, and find what was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from scipy import stats

from dfengine.diffusion.denoiser import Condition, Denoiser, HasLayers, HasTokens, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory, trajectories
from dfengine.evaluate.intervals import Interval, interval, rate
from dfengine.evaluate.truth import area, auroc, has_distinct_colours
from dfengine.explain import Attention, Cam, Explainer, Relevance, Rise
from dfengine.result import heatmap
from dfengine.shapes.judge import Judge
from dfengine.shapes.world import Caption, sample_scenes
from dfengine.tokens import STOP_WORDS, word_spans

#: Denoising steps of the generations that are checked.
STEPS = 4
#: With every layer randomised, maps may keep half of the variance of the ranks that they had.
_STILL_ALIKE = 0.5**0.5
#: Draws of captions, of four times as many as are wanted, before there are too few.
_MOST_ROUNDS = 50
#: Images that weights are randomised for; the subject is looked for in all.
_FEW = 6
#: Images whose words are removed.
_SOME = 24


@dataclass(frozen=True)
class Sanity:
    """What the checks found, each with the interval over prompts."""

    model: str
    randomised: Mapping[str, Mapping[str, Interval]]
    """by method, the rank correlation of its maps with the model's own, by the last stage whose weights are random"""
    removed: Interval
    """what is left of a word's relevance when its encoding is zeroed, as a share: whether words are filed rightly"""
    fallen: Interval
    """the share of words whose relevance falls then"""
    weighs: Interval
    """rank correlation, over a prompt's words, of relevance with how much the prediction changes without the word"""
    subject: Interval | None
    """of the embedded world, the probability that attention to the subject's noun is higher on the subject than
    elsewhere"""
    left_out: int
    """images whose subject cannot be told by its colour, or which are not what was asked for"""
    failures: Sequence[str]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return not self.failures


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions of the embedded world, each once, whose subject and object differ in colour and in kind."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, None]()
    rounds = 0
    while len(found) < count:
        rounds += 1
        if rounds > _MOST_ROUNDS:
            raise ValueError(f"{count} captions are more than the embedded world has: {len(found)} were found")
        for caption in sample_scenes(4 * count, generator).captions:
            differ = caption.object is None or caption.object[1] != caption.subject[1]
            if differ and has_distinct_colours(caption) and len(found) < count:
                found[str(caption)] = None
    return list(found)


def sanity(
    denoiser: Denoiser, jobs: Sequence[Job], *, num_masks: int = 60, tell: Callable[[str], None] = lambda _: None
) -> Sanity:
    """Run the checks on some jobs with equally many steps. Raises ValueError for a model that cannot be looked into."""
    if not jobs:
        raise ValueError("there is no prompt to check with: give at least one")
    tell("the images")
    paths = trajectories(denoiser, jobs)
    explainers: list[Explainer] = [Rise(num_masks), Cam(), Relevance(), Attention()]
    randomised = _randomised(denoiser, paths[:_FEW], explainers, tell)
    tell("words that are removed")
    ratios, weighs = _removed(denoiser, paths[:_SOME])
    tell("where the subject is")
    subject, left_out = _subject(denoiser, paths)
    found = Sanity(
        denoiser.name,
        randomised,
        interval(ratios),
        rate([float(ratio < 1) for ratio in ratios]),
        interval(weighs),
        subject,
        left_out,
        [],
    )
    return dataclasses.replace(found, failures=list(_failures(found)))


def _failures(found: Sanity) -> Iterator[str]:
    for method, stages in found.randomised.items():
        *_, (stage, last) = stages.items()
        if not abs(last.mean) < _STILL_ALIKE:
            yield f"{method} hardly changes with random weights down to {stage}: rank correlation {last}"
    if not found.removed.high < 1:
        yield f"a word's relevance does not fall when it is removed: to {found.removed} of what it was"
    if found.weighs.count > 1 and not found.weighs.low > 0:
        yield f"relevance does not rise with what a word changes: rank correlation {found.weighs}"
    if found.subject is not None and not found.subject.low > 0.5:
        yield f"attention to the subject is no better than chance: {found.subject}"


def _randomised(
    denoiser: Denoiser,
    paths: Sequence[Trajectory],
    explainers: Sequence[Explainer],
    tell: Callable[[str], None],
) -> dict[str, dict[str, Interval]]:
    """Weights made random a stage at a time, from the output on: how far maps then agree with the model's own."""
    names = require(denoiser, HasLayers, "randomising layers").layers()
    stages = [(stage, list(layers)) for stage, layers in groupby(names, key=_stage)]
    own = {explainer.name: _maps(explainer, denoiser, paths) for explainer in explainers}
    agreement: dict[str, dict[str, Interval]] = {explainer.name: {} for explainer in explainers}
    with _restored(denoiser):
        for number, (stage, layers) in enumerate(reversed(stages)):
            tell(f"random weights down to {stage}")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                for name in layers:
                    _reset(names[name].module)
            for explainer in explainers:
                maps = _maps(explainer, denoiser, paths)
                agreement[explainer.name][stage] = interval(
                    [
                        float(np.mean([_correlation(a, b) for a, b in zip(before, after, strict=True)]))
                        for before, after in zip(own[explainer.name], maps, strict=True)
                    ]
                )
    return agreement


def _stage(layer: str) -> str:
    """The block that a layer belongs to."""
    return layer.rsplit(".", 2)[0]


def _maps(explainer: Explainer, denoiser: Denoiser, paths: Sequence[Trajectory]) -> list[list[np.ndarray]]:
    """The maps of each item, step by step."""
    made: list[list[np.ndarray]] = [[] for _ in paths]
    for step in explainer.explain(denoiser, paths):
        made[step.item].append(step.saliency.numpy())
    return made


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation over the pixels: 0 where only the second is the same everywhere, 1 where the first is.

    A method whose maps say nothing from the start cannot change.
    """
    if np.ptp(a) == 0:
        return 1.0
    if np.ptp(b) == 0:
        return 0.0
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)


def _reset(module: torch.nn.Module) -> None:
    """Weights as they are before training."""
    for part in module.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()


@contextmanager
def _restored(denoiser: Denoiser) -> Iterator[None]:
    """While inside, weights may be changed."""
    parameters = {
        id(p): p
        for layer in require(denoiser, HasLayers, "randomising layers").layers().values()
        for p in layer.module.parameters()
    }
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(before[key])


def _removed(denoiser: Denoiser, paths: Sequence[Trajectory]) -> tuple[list[float], list[float]]:
    """What zeroing a word's encoding does, for each word that is no stop word.

    What is left of its share of the relevance; and for each prompt, over its words, the rank correlation of that share
    with how much the prediction changes.
    """
    known = require(denoiser, HasTokens, "removing words")
    relevance = Relevance()
    ratios: list[float] = []
    weighs: list[float] = []
    for path in paths:
        tokens, prompt = known.tokens(path.job.prompt), path.job.prompt
        before = _shares(relevance, denoiser, path)
        shares, changes = [], []
        for start, stop in word_spans(prompt):
            if prompt[start:stop].casefold() in STOP_WORDS:
                continue
            places = tokens.places(start, stop)
            without = dataclasses.replace(path, prompt=known.zero_tokens(path.prompt, places))
            shares.append(float(before[places].sum()))
            ratios.append(float(_shares(relevance, denoiser, without)[places].sum()) / shares[-1])
            changes.append(_change(denoiser, path, without.prompt))
        if len(set(shares)) > 2 and len(set(changes)) > 1:
            weighs.append(float(stats.spearmanr(shares, changes).statistic))
    return ratios, weighs


@torch.no_grad()
def _change(denoiser: Denoiser, path: Trajectory, without: Condition) -> float:
    """How far ε moves at all steps with another condition (root of the mean square)."""
    timesteps = torch.tensor(path.job.timesteps, device=denoiser.device)
    row = torch.zeros_like(timesteps)
    given, removed = (denoiser(path.latents, timesteps, one[row]) for one in (path.prompt, without))
    return float((given - removed).square().mean().sqrt())


def _shares(relevance: Relevance, denoiser: Denoiser, path: Trajectory) -> np.ndarray:
    """Each token's share of the relevance, mean over the steps."""
    steps = [step.relevance.numpy() for step in relevance.explain(denoiser, [path]) if step.relevance is not None]
    return np.mean([step / step.sum() for step in steps], axis=0)


def _subject(denoiser: Denoiser, paths: Sequence[Trajectory]) -> tuple[Interval | None, int]:
    """How well attention to the subject finds it, over the images of which the true area is known."""
    known: list[tuple[Trajectory, Caption]] = []
    for path in paths:
        try:
            known.append((path, Caption.parse(path.job.prompt)))
        except ValueError:
            return None, 0
    images = torch.stack([path.image for path, _ in known]).permute(0, 3, 1, 2) / 255
    if images.shape[1:] != (3, 64, 64):
        return None, 0
    agrees = Judge.load().agrees(images, [caption for _, caption in known]).all(1).tolist()
    kept = [pair for pair, agreed in zip(known, agrees, strict=True) if agreed and has_distinct_colours(pair[1])]
    scores = []
    for path, caption in kept:
        # The encoder reads from left to right: of "red circle", "circle" has read both.
        attention = Attention(words=(caption.subject[1],))
        true = area(path.image.numpy(), caption.subject[0])
        made = attention.explain(denoiser, [path])
        heat = [heatmap(step.word_maps[0].numpy(), denoiser.image_shape) for step in made if step.word_maps is not None]
        scores.append(float(np.mean([auroc(one, true) for one in heat])))
    found = interval(scores)
    return found if found.count else None, len(known) - len(kept)


def lines(found: Sanity) -> Iterator[str]:
    """What `dfengine evaluate --sanity` prints."""
    yield f"{found.model}: rank correlation with the model's own maps, weights random from the output down to"
    stages = list(next(iter(found.randomised.values())))
    width = max(map(len, stages))
    yield "  ".join([" " * width, *(f"{method:>20}" for method in found.randomised)])
    for stage in stages:
        yield "  ".join([f"{stage:<{width}}", *(f"{by[stage]!s:>20}" for by in found.randomised.values())])
    yield (
        f"a word whose encoding is removed keeps {found.removed} of its relevance, which falls for "
        f"{found.fallen.mean:.0%} of {found.fallen.count} words; rank correlation of relevance with how much the "
        f"prediction changes without the word: {found.weighs}"
    )
    if found.subject is not None:
        told = f" ({found.left_out} image{'s' * (found.left_out > 1)} left out)" if found.left_out else ""
        yield f"attention to the subject's noun is higher on it than elsewhere with probability {found.subject}{told}"
    yield from (f"FAILED: {failure}" for failure in found.failures)
    if found.passed:
        yield "all checks passed"
