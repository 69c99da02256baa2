"""Every method's map of one step of many prompts, and both games of each: the data of Tables 1 and 2."""

from __future__ import annotations

import dataclasses
import hashlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from dfengine.checks import one_of, whole_number
from dfengine.diffusion.denoiser import Denoiser, Features
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.evaluate.cache import GameCache, GameResult
from dfengine.evaluate.games import REFILLS, play, ranks_pixels, to_latent_size
from dfengine.explain import Explainer
from dfengine.explain.registry import PRESETS, describe, is_serializable
from dfengine.plan import item_key

#: A group has one item for so many latents of a batch. Masks and points fill batches in any case, and an interrupted
#: run loses at most one group.
_LATENTS_PER_ITEM = 16


@dataclass(frozen=True)
class GamesRun:
    """Every method's map of one step of every item, and both games of it."""

    model: str
    step: int
    """index into `timesteps`, from 0"""
    timesteps: Sequence[float]
    features: str
    """name of the feature extractor"""
    preset: str
    results: Mapping[str, Sequence[GameResult]]
    """by method, one for each item"""
    refill: str = "zero"
    """what took deleted pixels' place: one of `games.REFILLS`"""

    def excluded(self) -> dict[str, int]:
        """By method, the number of items without a valid result; these items are excluded from every method."""
        counts = {name: sum(not one.is_valid for one in results) for name, results in self.results.items()}
        return {name: count for name, count in counts.items() if count}

    def valid_items(self) -> list[int]:
        """The items that are valid for every method."""
        rows = zip(*self.results.values(), strict=True)
        return [item for item, row in enumerate(rows) if all(one.is_valid for one in row)]


def default_step(num_steps: int) -> int:
    """The step that tables explain: index ⌊0.75·l⌋ − 1."""
    return max(0, int(0.75 * whole_number("num_steps", num_steps, 1, 2**31)) - 1)


def resolve_features(denoiser: Denoiser, features: Features | None = None) -> tuple[Features, str]:
    """The given extractor, or the model's own, and its name. Raises ValueError if there is neither."""
    extract = denoiser.features if features is None else features
    if extract is None:
        raise ValueError(
            f"distances compare image features, and {denoiser.name} comes with no extractor: give a folder of a "
            "transformers vision model, or a file of Inception-v3's weights (--features)"
        )
    unnamed = f"{denoiser.name}'s own" if features is None else getattr(extract, "__qualname__", "unnamed")
    return extract, getattr(extract, "name", unnamed)


def play_games(
    denoiser: Denoiser,
    sample: Callable[[Sequence[Job]], Iterator[Trajectory]],
    jobs: Sequence[Job],
    explainers: Sequence[Explainer] = (),
    *,
    maps: Mapping[str, Float[ndarray, "items a b"]] | None = None,
    step: int | None = None,
    features: Features | None = None,
    preset: str = "default",
    refill: str = "zero",
    cache: GameCache | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> GamesRun:
    """Explain one step of every job by every method, and play both games with each map.

    `sample` generates trajectories (`Engine.sample`); jobs have equally many steps. `maps` are those of another tool,
    by its name: one for each job, at the latent's or the image's size. `step` is an index into the time-steps,
    ⌊0.75·l⌋ − 1 by default. With the preset "xdiffusion" the games are those of the released code, with
    `refill="noise"` they stay in the data's distribution (`play`). Results in `cache` are not computed again.
    `on_progress` is called once for each method of each job.

    Raises ValueError, before anything is computed, if the jobs, maps or settings are not possible.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is not known: expected one of {', '.join(PRESETS)}")
    one_of("refill", refill, REFILLS)
    extract, extractor = resolve_features(denoiser, features)
    step = _check_jobs(jobs, step)
    methods = _check_methods(denoiser, jobs, explainers, maps or {}, positive=preset == "xdiffusion")
    cache = GameCache() if cache is None else cache
    make_key = _KeyMaker(
        denoiser,
        denoiser.fingerprint(),
        {
            "step": step,
            "features": extractor,
            "dtype": str(getattr(extract, "dtype", None)),
            "preset": preset,
            "refill": refill,
        },
        is_named=features is None or hasattr(features, "name"),
    )
    keys = {name: [make_key(job, one, item) for item, job in enumerate(jobs)] for name, one in methods.items()}
    missing = [item for item in range(len(jobs)) if any(cache.get(of[item]) is None for of in keys.values())]
    with denoiser.exclusive():
        for job in {(jobs[item].prompt, jobs[item].negative_prompt): jobs[item] for item in missing}.values():
            for negative in (False, True):
                denoiser.condition([job], negative=negative)  # raises ValueError if the model cannot encode it
    for _ in range((len(jobs) - len(missing)) * len(methods)):
        on_progress()
    size = max(1, denoiser.batch_size // _LATENTS_PER_ITEM)
    for group in (missing[start : start + size] for start in range(0, len(missing), size)):
        trajectories = [dataclasses.replace(one, explain_steps=(step,)) for one in sample([jobs[i] for i in group])]
        pending = {
            name: one[group] if isinstance(one, Tensor) else one
            for name, one in methods.items()
            if any(cache.get(keys[name][item]) is None for item in group)
        }
        played = _play_group(denoiser, trajectories, pending, extract, preset == "xdiffusion", refill)
        for name, results in played.items():
            for item, result in zip(group, results, strict=True):
                cache.put(keys[name][item], result)
        for _ in range(len(group) * len(methods)):
            on_progress()
    by_method = {name: [_stored(cache, key) for key in of] for name, of in keys.items()}
    return GamesRun(denoiser.name, step, jobs[0].timesteps, extractor, preset, by_method, refill)


def _check_jobs(jobs: Sequence[Job], step: int | None) -> int:
    """The step to explain. Raises ValueError if there are no jobs, or not all have that step in equally long lists."""
    if not jobs:
        raise ValueError("there is no prompt to play with: give at least one")
    lengths = {len(job.timesteps) for job in jobs}
    if len(lengths) > 1:
        listed = ", ".join(map(str, sorted(lengths)))
        raise ValueError(f"jobs have different numbers of steps ({listed}): give all the same")
    step = default_step(*lengths) if step is None else step
    if not 0 <= step < len(jobs[0].timesteps):
        raise ValueError(f"step {step} is outside [0, {len(jobs[0].timesteps) - 1}]: steps index the time-steps")
    return step


def _check_methods(
    denoiser: Denoiser,
    jobs: Sequence[Job],
    explainers: Sequence[Explainer],
    maps: Mapping[str, Float[ndarray, "items a b"]],
    *,
    positive: bool,
) -> dict[str, Explainer | Float[Tensor, "items h w"]]:
    """By name, explainers and other tools' maps at the latent's size. Raises ValueError if they do not fit the jobs."""
    names = [*(explainer.name for explainer in explainers), *maps]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods need distinct names, but are: {', '.join(names) or 'none'}")
    methods: dict[str, Explainer | Tensor] = {explainer.name: explainer for explainer in explainers}
    for name, array in maps.items():
        values = np.array(array)
        if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise ValueError(f"maps {name!r} are of type {values.dtype}: expected numbers, as float32")
        given = torch.from_numpy(values)
        if given.ndim != 3 or len(given) != len(jobs):
            shape = tuple(given.shape)
            raise ValueError(f"maps {name!r} have shape {shape}: expected one for each prompt, ({len(jobs)}, h, w)")
        methods[name] = to_latent_size(given, denoiser, f"map {name!r}", positive=positive)
    for explainer in explainers:
        for job in jobs:
            explainer.output_spec(denoiser, job)
    return methods


def _play_group(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    methods: Mapping[str, Explainer | Float[Tensor, "items h w"]],
    extract: Features,
    xdiffusion: bool,
    refill: str,
) -> dict[str, list[GameResult]]:
    """By method, the result of every trajectory."""
    maps: dict[str, Tensor] = {}
    for name, method in methods.items():
        if isinstance(method, Tensor):
            maps[name] = method
        else:
            with denoiser.exclusive():
                by_item = {one.item: one.saliency for one in method.explain(denoiser, trajectories)}
            maps[name] = torch.stack([by_item[item] for item in range(len(trajectories))])
    is_ranked = {name: [ranks_pixels(one, positive=xdiffusion) for one in of] for name, of in maps.items()}
    # A map that does not rank its pixels is replaced, to keep batches full, and its curves are dropped.
    height, width = denoiser.latent_shape[1:]
    substitute = torch.arange(float(height * width)).view(height, width)
    playable = {
        name: torch.stack([one if ok else substitute for one, ok in zip(of, is_ranked[name], strict=True)])
        for name, of in maps.items()
    }
    with denoiser.exclusive():
        curves = play(denoiser, trajectories, playable, extract, xdiffusion=xdiffusion, refill=refill)
    return {
        name: [
            GameResult(one, curve if ok else None)
            for one, curve, ok in zip(maps[name], curves[name], is_ranked[name], strict=True)
        ]
        for name in methods
    }


def _stored(cache: GameCache, key: str) -> GameResult:
    result = cache.get(key)
    assert result is not None
    return result


@dataclass(frozen=True)
class _KeyMaker:
    """Keys of results: by the method that makes a map or, of another tool's map, by its values."""

    denoiser: Denoiser
    weights: str
    settings: Mapping[str, Any]
    """those of the games"""
    is_named: bool
    """whether the name of the features identifies them"""
    call: str = field(default_factory=lambda: uuid.uuid4().hex)
    """part of the key if a caller's function is involved, whose name does not identify it: such a result is not reused
    by another call"""

    def __call__(self, job: Job, method: Explainer | Tensor, item: int) -> str:
        if isinstance(method, Tensor):
            described: dict[str, Any] = {"map": hashlib.sha256(method[item].numpy().tobytes()).hexdigest()}
        else:
            described = describe(method)
        is_identified = self.is_named and (isinstance(method, Tensor) or is_serializable(method))
        key = item_key(self.denoiser, self.weights, job, described)
        return GameCache.key(item=key, **self.settings, call=None if is_identified else self.call)
