"""Tables 1 and 2: areas under the deletion and the insertion curve, of many prompts and methods, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from dfengine.evaluate.distances import DISTANCES, FEWEST_IN_A_SET, OF_FEATURES, frechet_influence, frechet_set
from dfengine.evaluate.games import GAMES
from dfengine.evaluate.intervals import Interval
from dfengine.evaluate.kept import Turn
from dfengine.evaluate.methods import PAPER
from dfengine.evaluate.playing import Games

#: The share of its height by which a curve that is the same everywhere can seem to rise.
_ROUNDING = 1e-9

#: A curve: its points, and the low and high end of each point's 95 % interval.
Band = tuple[list[float], list[float], list[float]]


@dataclass(frozen=True)
class Score:
    """One game of one method over all items."""

    auc: Interval
    """of the mean curve after min–max"""
    raw: Interval
    """of the mean curve as it is, in the distance's unit"""
    curve: Band
    """the mean curve after min–max"""
    better_than_random: float | None
    """the share of resamples in which the area is on the better side of random's: higher in deletion, lower in
    insertion"""


@dataclass(frozen=True)
class Faithfulness:
    """A table's figures; intervals are over items, by bootstrap, with the same resamples for every method.

    What a resample is worth is exact for means over items and, of a distance between sets, of first order.
    """

    model: str
    step: int
    timestep: int
    num_steps: int
    distance: str
    features: str
    behaviour: str
    num_items: int
    left_out: Mapping[str, int]
    methods: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """by method and game"""


def faithfulness(found: Games, distance: str = "frechet-set", *, resamples: int = 2000) -> Faithfulness:
    """The areas under the mean curves of what was played.

    Raises ValueError for a distance that is not known, too few items for it, and a curve that is the same everywhere.
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r} is not known: expected one of {', '.join(DISTANCES)}")
    items = found.shared()
    if not items or (distance == "frechet-set" and len(items) < FEWEST_IN_A_SET):
        raise ValueError(
            f"{len(items)} images with maps of all methods are too few for {distance}: expected at least "
            f"{FEWEST_IN_A_SET if distance == 'frechet-set' else 1}"
            + (", or take frechet-single" if items else f"; of no use: {found.left_out()}")
        )
    drawn = np.random.default_rng(0).multinomial(
        len(items), [1 / len(items)] * len(items), size=resamples if len(items) > 1 else 0
    )
    curves = {}
    for name, turns in found.turns.items():
        mean, influence = _mean_curves([turns[i] for i in items], distance)
        curves[name] = np.concatenate([mean[None], mean + np.tensordot(drawn / len(items), influence, 1)])
    areas = {name: _areas(values, name) for name, values in curves.items()}
    return Faithfulness(
        model=found.model,
        step=found.step,
        timestep=int(found.timesteps[found.step]),
        num_steps=len(found.timesteps),
        distance=distance,
        features="none" if distance == "mse" else found.features,
        behaviour=found.behaviour,
        num_items=len(items),
        left_out=found.left_out(),
        methods={
            name: {
                game: Score(
                    auc=_interval(areas[name][:, g], len(items)),
                    raw=_interval(_area(values[:, g]), len(items)),
                    curve=_band(normalised(values[:, g])),
                    better_than_random=_share_better(areas, name, g),
                )
                for g, game in enumerate(GAMES)
            }
            for name, values in curves.items()
        },
    )


def _mean_curves(
    turns: Sequence[Turn], distance: str
) -> tuple[Float[ndarray, "games points"], Float[ndarray, "items games points"]]:
    """The curves of all items, of the sets or the means of each one's, and what each item adds to them."""
    if distance != "frechet-set":
        each = item_curves(turns, distance)
        return each.mean(0), each - each.mean(0)
    features = [turn.played.features for turn in turns if turn.played is not None]
    size = features[0].shape[:2]
    mean, influence = np.empty(size), np.empty((len(features), *size))
    unperturbed = torch.stack([one[0, 0] for one in features])
    for at in np.ndindex(*size):  # one by one: all points of many items would not fit into memory twice
        perturbed = torch.stack([one[at] for one in features])
        mean[at] = frechet_set(perturbed, unperturbed)
        influence[:, *at] = frechet_influence(perturbed, unperturbed)
    return mean, influence


def item_curves(turns: Sequence[Turn], distance: str) -> Float[ndarray, "items games points"]:
    """Every image's own curves, by a distance between two images."""
    played = [turn.played for turn in turns if turn.played is not None]
    if distance == "mse":
        return torch.stack([one.mse for one in played]).double().numpy()
    of = OF_FEATURES[distance]
    return torch.stack([of(one.features, one.features[:1, :1].expand_as(one.features)) for one in played]).numpy()


def normalised(curves: Float[ndarray, "*n points"]) -> Float[ndarray, "*n points"]:
    """Min–max of each curve, NaN for one that is the same everywhere."""
    low, high = curves.min(-1, keepdims=True), curves.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(high - low > _ROUNDING * abs(high), (curves - low) / (high - low), np.nan)


def _area(curves: Float[ndarray, "*n points"]) -> Float[ndarray, "*n"]:
    """Under each curve over [0, 1], by trapezoids."""
    return np.trapezoid(curves, dx=1 / (curves.shape[-1] - 1), axis=-1)


def _areas(curves: Float[ndarray, "samples games points"], name: str) -> Float[ndarray, "samples games"]:
    areas = _area(normalised(curves))
    for g, game in enumerate(GAMES):
        if not np.isfinite(areas[0, g]):
            raise ValueError(
                f"the {game} curve of {name} is the same everywhere, so that there is no area under it: the step's "
                "result does not depend on its latent, or the features do not tell images apart"
            )
    return areas


def _interval(values: Float[ndarray, " samples"], count: int) -> Interval:
    """The figure of all items, which is first, with the 95 % interval of those of resamples."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5]) if len(values) > 1 else values[[0, 0]]
    return Interval(float(values[0]), float(low), float(high), count)


def _band(curves: Float[ndarray, "samples points"]) -> Band:
    low, high = np.nanpercentile(curves[1:], [2.5, 97.5], axis=0) if len(curves) > 1 else curves[[0, 0]]
    return curves[0].tolist(), low.tolist(), high.tolist()


def _share_better(areas: Mapping[str, Float[ndarray, "samples games"]], name: str, game: int) -> float | None:
    if name == "random" or "random" not in areas or len(areas[name]) < 2:
        return None
    ours, random = areas[name][1:, game], areas["random"][1:, game]
    return float((ours > random if GAMES[game] == "deletion" else ours < random).mean())


def faithfulness_table(found: Faithfulness) -> Iterator[str]:
    """The table in Markdown, the paper's figures beside it where it has them."""
    yield "| | deletion ↑ | insertion ↓ | better than random | unnormalised | the paper's deletion, insertion |"
    yield "|---|---|---|---|---|---|"
    for name, by_game in found.methods.items():
        deletion, insertion = (by_game[game] for game in GAMES)
        shares = [score.better_than_random for score in (deletion, insertion)]
        better = "–" if None in shares else ", ".join(f"{share:.0%}" for share in shares)
        raw = f"{deletion.raw.mean:.4g}, {insertion.raw.mean:.4g}"
        paper = f"{PAPER[name][0]:.4f}, {PAPER[name][1]:.4f}" if name in PAPER else "–"
        yield f"| {name} | {deletion.auc:.4f} | {insertion.auc:.4f} | {better} | {raw} | {paper} |"
    yield ""
    yield (
        f"{found.num_items} images, step {found.step + 1} of {found.num_steps} (t = {found.timestep}), distance "
        f"{found.distance}"
        + (f" on features of {found.features}" if found.features != "none" else "")
        + (f"; {found.behaviour} behaviour" if found.behaviour != "paper" else "")
        + ". The distance rises: deletion is better high, insertion better low."
    )
    if found.left_out:
        told = ", ".join(f"{count} by {name}" for name, count in found.left_out.items())
        yield f"Left out of every method, for maps that rank no pixels or images that are not finite: {told}."
