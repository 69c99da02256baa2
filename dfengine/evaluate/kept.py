"""What has been played, in a folder: a study that was cut off goes on, and one that is there can be added to."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dfengine.evaluate.games import Played

_VERSION = 1


@dataclass(frozen=True)
class Turn:
    """A map, and both games of it."""

    saliency: Float[Tensor, "h w"]
    played: Played | None
    """None for a map that does not rank its pixels"""

    @cached_property
    def counts(self) -> bool:
        """Whether there is something to compare: both games were played, and all that came of them is finite."""
        played = self.played
        return played is not None and bool(played.features.isfinite().all() and played.mse.isfinite().all())


class Kept:
    """Turns by what they depend on; in memory, and in a folder if there is one."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._turns: dict[str, Turn] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def key(**described: Any) -> str:
        """What a turn is kept under, of everything that it depends on, as JSON values."""
        text = json.dumps(described | {"version": _VERSION}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def get(self, key: str) -> Turn | None:
        """What is kept under a key. A file that cannot be read counts as absent: it is made again."""
        if key not in self._turns and self._folder is not None and (path := self._path(key)).exists():
            try:
                with path.open("rb") as file, np.load(file) as stored:
                    self._turns[key] = _turn(dict(stored))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                return None
        return self._turns.get(key)

    def put(self, key: str, turn: Turn) -> None:
        """Keep one; its file is there whole or not at all."""
        self._turns[key] = turn
        if self._folder is None:
            return
        features, mse = (turn.played.features, turn.played.mse) if turn.played else [torch.empty(0)] * 2
        unfinished = self._path(key).with_suffix(f".{os.getpid()}.part")
        with unfinished.open("wb") as file:
            np.savez(file, saliency=turn.saliency, features=features, mse=mse)
        unfinished.replace(self._path(key))

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.npz"


def _turn(stored: Mapping[str, np.ndarray]) -> Turn:
    saliency, features, mse = (torch.from_numpy(stored[name]) for name in ("saliency", "features", "mse"))
    return Turn(saliency, Played(features, mse) if len(features) else None)
