"""A training run: seeded by (seed, stage, step), resumable from checkpoints and logged."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainingRun:
    """A training run's state folder, seed and device."""

    state: Path
    seed: int
    device: torch.device

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The random generator of a batch, a function of (seed, stage, step)."""
        digest = hashlib.sha256(f"{self.seed}/{stage}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def optimise(
        self,
        stage: str,
        model: Model,
        loss_fn: Callable[[Model, torch.Generator], Tensor],
        *,
        steps: int,
        learning_rate: float,
        ema_decay: float | None = None,
    ) -> Model:
        """The model trained by AdamW with warm-up and cosine decay, or its moving average if `ema_decay` is given.

        Resumes from the checkpoint in the state folder if there is one.
        """
        model.to(self.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # undeclared
        average = deepcopy(model).requires_grad_(False)
        optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
        warm_up = min(200, 1 + steps // 10)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser,
            lambda i: min((i + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * i / steps)) + 1e-3),
        )
        parts: dict[str, Any] = {"model": model, "average": average, "optimiser": optimiser, "scheduler": scheduler}
        path, first = self.state / f"{stage}.pt", 0
        if path.exists():
            checkpoint = torch.load(path, map_location=self.device)
            first = checkpoint.pop("step")
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])

        started, recent_losses = time.monotonic(), []
        for step in range(first, steps):
            loss = loss_fn(model, self.generator(stage, step))
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            scheduler.step()
            decay = min(ema_decay or 0.0, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
            recent_losses.append(loss.item())
            if (step + 1) % 100 == 0 or step + 1 == steps:
                mean_loss, seconds = sum(recent_losses) / len(recent_losses), time.monotonic() - started
                self.log(stage, step=step + 1, loss=mean_loss, seconds=seconds)
                recent_losses.clear()
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({"step": step + 1, **states}, path.with_suffix(".new"))
                os.replace(path.with_suffix(".new"), path)
        return average.eval()

    def log(self, stage: str, **values: float) -> None:
        """Print values as a JSON line and append it to `log.jsonl`."""
        line = json.dumps({"stage": stage} | {k: round(v, 6) for k, v in values.items()})
        print(line, flush=True)
        with open(self.state / "log.jsonl", "a") as file:
            file.write(line + "\n")
