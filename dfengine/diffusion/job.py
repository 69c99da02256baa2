"""What is to be generated and explained: one job is one image."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from dfengine.tokens import check_text


@dataclass(frozen=True)
class Job:
    """One image to generate, or a given image in place of a generation, and the time-steps to visit."""

    prompt: str
    timesteps: tuple[float, ...]
    """decreasing, in the scheduler's own numbers"""
    seed: int = 0
    """of the start noise and, with the prompt, of the masks"""
    negative_prompt: str = ""
    guidance: float = 7.5
    image: UInt8[Tensor, "H W 3"] | None = None
    """a given image: it is encoded and noised to each step instead of being generated"""

    def __post_init__(self) -> None:
        """Raises ValueError for an empty prompt without an image, one with a lone surrogate, a negative seed, or a
        guidance that is not finite."""
        check_text(self.prompt)
        check_text(self.negative_prompt)
        if not self.prompt.strip() and self.image is None:
            raise ValueError("the prompt is empty: say what the image should show")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2^63): choose one inside")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance {self.guidance} is not possible: expected a finite number")

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines it besides prompts and seed, as JSON values; a given image as its SHA-256."""
        image = None if self.image is None else hashlib.sha256(self.image.numpy().tobytes()).hexdigest()
        return {"timesteps": list(self.timesteps), "guidance": self.guidance, "image": image}

    @property
    def mask_seed(self) -> int:
        """64 bits of seed and prompt (signed), so that no two items share their masks."""
        digest = hashlib.sha256(f"{self.seed}\n{self.prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big", signed=True)
