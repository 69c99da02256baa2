"""Tables 1 and 2: areas under the deletion and the insertion curve, for many prompts and methods, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dfengine.checks import one_of, whole_number
from dfengine.evaluate.cache import GameResult
from dfengine.evaluate.distances import (
    DISTANCES,
    FEATURE_DISTANCES,
    MIN_SET_SIZE,
    frechet_influence,
    frechet_set,
)
from dfengine.evaluate.games import GAMES
from dfengine.evaluate.intervals import NUM_RESAMPLES, Interval, widening
from dfengine.evaluate.methods import PAPER
from dfengine.evaluate.playing import GamesRun, default_step

#: What Tables 1 and 2 of the paper are of.
_PAPER_IMAGES, _PAPER_STEPS = 1000, 30
#: A curve is constant if its range is at most this share of its height.
_ROUNDING = 1e-9

#: A curve: its points, and the low and high end of each point's 95 % interval.
Band = tuple[list[float], list[float], list[float]]


@dataclass(frozen=True)
class GameScore:
    """One game of one method over all items."""

    auc: Interval
    """area under the mean curve after min–max"""
    raw: Interval
    """area under the mean curve as it is, in the distance's unit"""
    curve: Band
    """the mean curve after min–max"""
    better_than_random: float | None
    """share of resamples whose area is better than random's: higher in deletion, lower in insertion"""


@dataclass(frozen=True)
class Faithfulness:
    """The figures of a table. Intervals are over items, by bootstrap with the same resamples for every method.

    A resample is exact for means over items, and first order for a distance between sets.
    """

    model: str
    step: int
    """index into the time-steps, from 0"""
    timestep: float
    num_steps: int
    distance: str
    features: str
    preset: str
    num_items: int
    excluded: Mapping[str, int]
    refill: str
    """what took deleted pixels' place: zero, or noise"""
    methods: Mapping[str, Mapping[str, GameScore]] = field(default_factory=dict)
    """by method and game"""

    def table(self) -> str:
        """The table in Markdown, with the paper's figures beside ours if the settings are the paper's."""
        return "\n".join(_table(self))


def check_distance(distance: str, num_images: int) -> None:
    """Raise ValueError for an unknown distance, or too few images for it."""
    one_of("distance", distance, DISTANCES)
    if whole_number("num_images", num_images, 1) and distance == "frechet-set" and num_images < MIN_SET_SIZE:
        raise ValueError(
            f"{num_images} images are too few for frechet-set: give at least {MIN_SET_SIZE}, or take frechet-single"
        )


def summarise_games(run: GamesRun, distance: str = "frechet-set", *, resamples: int = NUM_RESAMPLES) -> Faithfulness:
    """The areas under the mean curves over the items that are valid for every method.

    Raises ValueError if the distance is unknown or has too few items, or a curve is constant.
    """
    items = run.valid_items()
    if not items:
        raise ValueError(f"no image has valid maps of all methods; invalid ones by method: {run.excluded()}")
    check_distance(distance, len(items))
    even, num_drawn = [1 / len(items)] * len(items), resamples if len(items) > 1 else 0
    weights = np.random.default_rng(0).multinomial(len(items), even, size=num_drawn) / len(items)
    curves = {}
    for name, results in run.results.items():
        mean, influence = _mean_curves([results[item] for item in items], distance)
        curves[name] = np.concatenate([mean[None], mean + np.tensordot(weights, influence, 1)])
    areas = {name: _checked_areas(samples, name) for name, samples in curves.items()}
    return Faithfulness(
        model=run.model,
        step=run.step,
        timestep=run.timesteps[run.step],
        num_steps=len(run.timesteps),
        distance=distance,
        features="none" if distance == "mse" else run.features,
        preset=run.preset,
        num_items=len(items),
        excluded=run.excluded(),
        refill=run.refill,
        methods={
            name: {
                game: GameScore(
                    auc=_interval(areas[name][:, g], len(items), 1),
                    raw=_interval(_area(samples[:, g]), len(items)),
                    curve=_band(min_max(samples[:, g]), len(items)),
                    better_than_random=_share_better(areas, name, g),
                )
                for g, game in enumerate(GAMES)
            }
            for name, samples in curves.items()
        },
    )


def _mean_curves(
    results: Sequence[GameResult], distance: str
) -> tuple[Float[ndarray, "games points"], Float[ndarray, "items games points"]]:
    """The curves of all items together, and each item's influence on them."""
    if distance != "frechet-set":
        curves = item_curves(results, distance)
        return curves.mean(0), curves - curves.mean(0)
    features = [result.curves.features for result in results if result.curves is not None]
    size = features[0].shape[:2]
    mean, influence = np.empty(size), np.empty((len(features), *size))
    unperturbed = torch.stack([one[0, 0] for one in features])
    for point in np.ndindex(*size):  # one by one, to limit memory: a copy of all points of many items is large
        perturbed = torch.stack([one[point] for one in features])
        mean[point] = frechet_set(perturbed, unperturbed)
        influence[:, *point] = frechet_influence(perturbed, unperturbed)
    return mean, influence


def item_curves(results: Sequence[GameResult], distance: str) -> Float[ndarray, "items games points"]:
    """The curves of every image by itself, for a distance between two images."""
    curves = [result.curves for result in results if result.curves is not None]
    if distance == "mse":
        return torch.stack([one.mse for one in curves]).double().numpy()
    between = FEATURE_DISTANCES[distance]
    return torch.stack([between(one.features, one.features[:1, :1].expand_as(one.features)) for one in curves]).numpy()


def min_max(curves: Float[ndarray, "*n points"]) -> Float[ndarray, "*n points"]:
    """Each curve scaled to [0, 1]; NaN for a constant one."""
    low, high = curves.min(-1, keepdims=True), curves.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(high - low > _ROUNDING * abs(high), (curves - low) / (high - low), np.nan)


def _area(curves: Float[ndarray, "*n points"]) -> Float[ndarray, "*n"]:
    """The area under each curve over [0, 1], by trapezoids."""
    return np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1), axis=-1)


def _checked_areas(curves: Float[ndarray, "samples games points"], name: str) -> Float[ndarray, "samples games"]:
    """The areas under the curves after min–max. Raises ValueError if a method's own curve, the first, is constant."""
    areas = _area(min_max(curves))
    for g, game in enumerate(GAMES):
        if not np.isfinite(areas[0, g]):
            raise ValueError(
                f"the {game} curve of {name} is constant, so that the area under it is undefined: the step's result "
                "does not depend on its latent, or the features do not distinguish images"
            )
    return areas


def _interval(samples: Float[ndarray, " samples"], count: int, largest: float = np.inf) -> Interval:
    """The value of all items, which is first, with the 95 % interval of the resamples, in [0, largest]."""
    value, low, high = _bounds(samples, count, (0, largest))
    return Interval(float(value), float(low), float(high), count)


def _band(curves: Float[ndarray, "samples points"], count: int) -> Band:
    value, low, high = _bounds(curves, count, (0, 1))
    return value.tolist(), low.tolist(), high.tolist()


def _bounds(samples: ndarray, count: int, limits: tuple[float, float]) -> tuple[Any, Any, Any]:
    """The first of the samples, along axis 0, and percentiles of the others; of few items as wide as Student's t.

    The percentiles stay within the limits.
    """
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, high = np.nanpercentile(samples[1:], [2.5, 97.5], axis=0)
    value, factor = samples[0], widening(count)
    return value, *(np.clip(value + factor * (bound - value), *limits) for bound in (low, high))


def _share_better(areas: Mapping[str, Float[ndarray, "samples games"]], name: str, game: int) -> float | None:
    if name == "random" or "random" not in areas or len(areas[name]) < 2:
        return None
    ours, random = areas[name][1:, game], areas["random"][1:, game]
    return float((ours > random if GAMES[game] == "deletion" else ours < random).mean())


def _differences(summary: Faithfulness) -> list[str]:
    """What the paper's Tables 1 and 2 have otherwise, as far as a summary tells; the prompts are not compared."""
    expected = {
        f"{_PAPER_IMAGES} images": summary.num_items == _PAPER_IMAGES,
        f"step {default_step(_PAPER_STEPS)} of {_PAPER_STEPS}": (summary.step, summary.num_steps)
        == (default_step(_PAPER_STEPS), _PAPER_STEPS),
        "the distance frechet-set": summary.distance == "frechet-set",
        "features of Inception-v3": "inception" in summary.features.casefold(),
        "its own equations (preset paper)": summary.preset == "paper",
        "deleted pixels set to 0": summary.refill == "zero",
    }
    return [setting for setting, is_same in expected.items() if not is_same]


def _table(summary: Faithfulness) -> Iterator[str]:
    differences = _differences(summary)
    has_paper = not differences
    images = f"{summary.num_items} image{'s' * (summary.num_items != 1)}"
    yield f"| | deletion ↑ | insertion ↓ | better than random, in resamples of {images} | unnormalised |" + (
        " paper: deletion, insertion |" if has_paper else ""
    )
    yield "|---|---|---|---|---|" + ("---|" if has_paper else "")
    for name, by_game in summary.methods.items():
        deletion, insertion = (by_game[game] for game in GAMES)
        shares = [score.better_than_random for score in (deletion, insertion)]
        better = "–" if None in shares else ", ".join(f"{share:.0%}" for share in shares)
        raw = f"{deletion.raw.mean:.4g}, {insertion.raw.mean:.4g}"
        paper = f"{PAPER[name][0]:.4f}, {PAPER[name][1]:.4f}" if name in PAPER else "–"
        row = f"| {name} | {deletion.auc:.4f} | {insertion.auc:.4f} | {better} | {raw} |"
        yield f"{row} {paper} |" if has_paper else row
    yield ""
    yield (
        f"{images}, step {summary.step} (t = {summary.timestep}) of {summary.num_steps} steps, "
        f"distance {summary.distance}"
        + (f" on features of {summary.features}" if summary.features != "none" else "")
        + (f"; preset {summary.preset}" if summary.preset != "default" else "")
        + ("; deleted pixels are noise without content" if summary.refill == "noise" else "")
        + ". The distance increases: deletion is better high, insertion better low."
    )
    if differences and any(name in PAPER for name in summary.methods):
        yield f"The paper's figures are left out, since its tables have {', '.join(differences)}."
    if summary.excluded:
        counts = ", ".join(f"{count} by {name}" for name, count in summary.excluded.items())
        yield f"Excluded for every method, because a map does not rank pixels or an image is not finite: {counts}."
