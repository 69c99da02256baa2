"""Every method's map of one step of many prompts, and both games of each: what tables are made of."""

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

from dfengine.diffusion.denoiser import Denoiser, Features
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.evaluate.games import fitted, play, usable
from dfengine.evaluate.kept import Kept, Turn
from dfengine.explain import Explainer, check_behaviour, describe, is_serializable
from dfengine.plan import item_key

#: Items in a group, as a share of a batch of latents: masks and points fill batches all the same, and a run that is cut
#: off loses a group at most.
_SHARE = 16


@dataclass(frozen=True)
class Games:
    """Every method's map of one step of every item, and both games of it."""

    model: str
    step: int
    timesteps: Sequence[float]
    features: str
    """what extracted them"""
    behaviour: str
    turns: Mapping[str, Sequence[Turn]]
    """by method, an item each"""

    def left_out(self) -> dict[str, int]:
        """By method, items of which there is nothing to compare; a table leaves them out of every method."""
        counts = {name: sum(not turn.counts for turn in turns) for name, turns in self.turns.items()}
        return {name: count for name, count in counts.items() if count}

    def shared(self) -> list[int]:
        """The items that are left."""
        return [i for i, turns in enumerate(zip(*self.turns.values(), strict=True)) if all(t.counts for t in turns)]


def explained_step(num_steps: int) -> int:
    """The step that tables are of: index ⌊0.75·l⌋ − 1."""
    return max(0, int(0.75 * num_steps) - 1)


def features_of(denoiser: Denoiser, given: Features | None = None) -> tuple[Features, str]:
    """What extracts features, and its name. Raises ValueError where there is none."""
    extract = denoiser.features if given is None else given
    if extract is None:
        raise ValueError(
            f"distances compare image features, and {denoiser.name} comes with no extractor: give a folder of a "
            "transformers vision model, or a file of Inception-v3's weights (--features)"
        )
    own = f"{denoiser.name}'s own"
    return extract, getattr(extract, "name", own if given is None else getattr(extract, "__qualname__", "unnamed"))


def games(
    denoiser: Denoiser,
    sample: Callable[[Sequence[Job]], Iterator[Trajectory]],
    jobs: Sequence[Job],
    explainers: Sequence[Explainer] = (),
    *,
    maps: Mapping[str, Float[ndarray, "items a b"]] | None = None,
    step: int | None = None,
    features: Features | None = None,
    behaviour: str = "paper",
    kept: Kept | None = None,
    tell: Callable[[], None] = lambda: None,
) -> Games:
    """Explain one step of every job by every method, and play both games with each map.

    `sample` generates (`Engine.sample`). `maps` are another tool's, by its name: one a job, of the latent's or of the
    image's size. `step` is an index into the time-steps, ⌊0.75·l⌋ − 1 by default. What `kept` has is not done again.
    `tell` is called once for every method of every job. Jobs must have equally many steps.

    Raises ValueError for what is not possible, before anything is computed.
    """
    check_behaviour(behaviour)
    kept = Kept() if kept is None else kept
    given = {name: torch.from_numpy(np.array(array)) for name, array in (maps or {}).items()}
    extract, extractor = features_of(denoiser, features)
    if not jobs:
        raise ValueError("there is no prompt to play with: give at least one")
    lengths = {len(job.timesteps) for job in jobs}
    if len(lengths) > 1:
        raise ValueError(
            f"jobs have different numbers of steps ({', '.join(map(str, sorted(lengths)))}): one is needed"
        )
    step = explained_step(*lengths) if step is None else step
    if not 0 <= step < len(jobs[0].timesteps):
        raise ValueError(f"step {step} is outside [0, {len(jobs[0].timesteps) - 1}]: steps index the time-steps")
    names = [*(explainer.name for explainer in explainers), *given]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"methods must have a name each, all different, but are: {', '.join(names) or 'none'}")
    for name, array in given.items():
        if array.ndim != 3 or len(array) != len(jobs):
            raise ValueError(f"maps {name!r} are {tuple(array.shape)}: expected one a prompt, ({len(jobs)}, h, w)")
        given[name] = fitted(array, denoiser, f"map {name!r}", behaviour)
    for explainer in explainers:
        for job in jobs:
            explainer.output_spec(denoiser, job)

    told = {"name": extractor, "dtype": str(getattr(extract, "dtype", None))}
    keys = _Keys(denoiser, step, told, behaviour, is_named=features is None or hasattr(features, "name"))
    by_name: dict[str, Any] = {explainer.name: explainer for explainer in explainers} | given
    table = {name: [keys(job, by_name[name], item) for item, job in enumerate(jobs)] for name in names}
    missing = [i for i in range(len(jobs)) if any(kept.get(table[name][i]) is None for name in names)]
    with torch.no_grad():
        for text in {text for i in missing for text in (jobs[i].prompt, jobs[i].negative_prompt)}:
            denoiser.encode_prompts([text])
    for _ in range((len(jobs) - len(missing)) * len(names)):
        tell()
    size = max(1, denoiser.batch_size // _SHARE)
    for group in (missing[start : start + size] for start in range(0, len(missing), size)):
        wanted = [name for name in names if any(kept.get(table[name][i]) is None for i in group)]
        paths = [dataclasses.replace(path, explain_steps=(step,)) for path in sample([jobs[i] for i in group])]
        methods = {name: given[name][group] if name in given else by_name[name] for name in wanted}
        for name, turns in _turns(denoiser, paths, methods, extract, behaviour).items():
            for item, turn in zip(group, turns, strict=True):
                kept.put(table[name][item], turn)
        for _ in range(len(group) * len(names)):
            tell()
    every = {name: [_there(kept, key) for key in table[name]] for name in names}
    return Games(denoiser.name, step, jobs[0].timesteps, extractor, behaviour, every)


def _turns(
    denoiser: Denoiser, paths: Sequence[Trajectory], methods: Mapping[str, Any], extract: Features, behaviour: str
) -> dict[str, list[Turn]]:
    """By method, the turn of every trajectory; a method is an explainer, or its maps."""
    made: dict[str, Tensor] = {}
    for name, method in methods.items():
        if isinstance(method, Tensor):
            made[name] = method
        else:
            found = {one.item: one.saliency for one in method.explain(denoiser, paths)}
            made[name] = torch.stack([found[place] for place in range(len(paths))])
    can = {name: [usable(one, behaviour) for one in maps] for name, maps in made.items()}
    # What cannot be ranked is played with any map in its place, so that batches stay full, and not kept.
    height, width = denoiser.latent_shape[1:]
    stand_in = torch.arange(float(height * width)).view(height, width)
    ranked = {
        name: torch.stack([one if fits else stand_in for one, fits in zip(maps, can[name], strict=True)])
        for name, maps in made.items()
    }
    played = play(denoiser, paths, ranked, extract, behaviour=behaviour)
    return {
        name: [
            Turn(one, game if fits else None)
            for one, game, fits in zip(made[name], played[name], can[name], strict=True)
        ]
        for name in methods
    }


def _there(kept: Kept, key: str) -> Turn:
    turn = kept.get(key)
    assert turn is not None
    return turn


@dataclass(frozen=True)
class _Keys:
    """What a turn is kept under: a map's method or, of another tool's, its values."""

    denoiser: Denoiser
    step: int
    features: Mapping[str, str]
    behaviour: str
    is_named: bool
    """whether that tells the features whole"""
    call: str = field(default_factory=lambda: uuid.uuid4().hex)
    """told of what is not told whole, as a function by its name is not: it is never taken for another's"""

    def __call__(self, job: Job, method: Any, item: int) -> str:
        if isinstance(method, Tensor):
            made: dict[str, Any] = {"map": hashlib.sha256(method[item].numpy().tobytes()).hexdigest()}
        else:
            made = describe(method)
        is_whole = self.is_named and (isinstance(method, Tensor) or is_serializable(method))
        return Kept.key(
            item=item_key(self.denoiser, job, made),
            step=self.step,
            features=self.features,
            behaviour=self.behaviour,
            call=None if is_whole else self.call,
        )
