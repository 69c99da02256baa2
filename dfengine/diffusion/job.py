"""What is to be generated and explained: one job is one image."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

import dfengine.checks as checks


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
    """the scale; 1 or less means the prompt alone, in one forward instead of two, as in diffusers"""
    image: UInt8[Tensor, "H W 3"] | None = None
    """a given image: it is encoded and noised to each step instead of being generated"""

    def __post_init__(self) -> None:
        """Raises ValueError for an empty prompt without an image, a negative seed, or a guidance that is not finite."""
        checks.text("prompt", self.prompt)
        checks.text("negative_prompt", self.negative_prompt)
        object.__setattr__(self, "seed", checks.whole_number("seed", self.seed))
        object.__setattr__(self, "guidance", checks.finite_number("guidance", self.guidance))
        if not self.prompt.strip() and self.image is None:
            raise ValueError("the prompt is empty: say what the image should show")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2^63): choose one inside")

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
