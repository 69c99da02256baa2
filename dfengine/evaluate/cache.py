"""A cache of played games: an interrupted study resumes, and a finished one can be extended."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dfengine.evaluate.games import GameCurves
from dfengine.files import check_local, published, remove_stale

_VERSION = 2


@dataclass(frozen=True)
class GameResult:
    """One method's map of one item, and both games of it."""

    saliency: Float[Tensor, "h w"]
    curves: GameCurves | None
    """None if the map does not rank its pixels"""

    @cached_property
    def is_valid(self) -> bool:
        """Whether both games were played and everything they produced is finite."""
        curves = self.curves
        return curves is not None and bool(curves.features.isfinite().all() and curves.mse.isfinite().all())


class GameCache:
    """Game results by a key of everything they depend on, in memory and, if given one, in a folder."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._results: dict[str, GameResult] = {}
        if self._folder is not None:
            check_local(self._folder).mkdir(parents=True, exist_ok=True)
            remove_stale(self._folder)

    @staticmethod
    def key(**described: Any) -> str:
        """The key of a result that depends on the given JSON values."""
        text = json.dumps(described | {"version": _VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> GameResult | None:
        """The result under a key. A file that cannot be read counts as missing, and is computed again."""
        if key not in self._results and (path := self._path(key)) is not None and path.is_file():
            try:
                self._results[key] = _read(path)
            except MemoryError:
                raise
            except Exception:  # the errors that a damaged archive raises are of any type
                return None
        return self._results.get(key)

    def put(self, key: str, result: GameResult) -> None:
        """Store a result; its file is written atomically."""
        self._results[key] = result
        if (path := self._path(key)) is None:
            return
        features, mse = (result.curves.features, result.curves.mse) if result.curves else [torch.empty(0)] * 2
        with published(path) as temporary:
            np.savez(temporary, saliency=result.saliency, features=features, mse=mse)

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{key}.npz"


def _read(path: Path) -> GameResult:
    """A result from its file. Raises an error of any type if it is damaged."""
    with path.open("rb") as file, np.load(file) as stored:
        saliency, features, mse = (torch.from_numpy(stored[name]) for name in ("saliency", "features", "mse"))
    if saliency.ndim != 2 or len(features) not in (0, 2) or not all(one.is_floating_point() for one in (saliency, mse)):
        raise ValueError(f"{path} is not a result of the games")
    if len(features) and (features.ndim != 3 or mse.shape != features.shape[:2]):
        raise ValueError(f"{path} has curves of different lengths")
    return GameResult(saliency, GameCurves(features, mse) if len(features) else None)
