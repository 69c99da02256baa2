"""Which prediction of a guided model is sampled from or explained: conditional, guided or unconditional."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.path import Prediction

TARGETS = ("conditional", "guided", "unconditional")


class GuidedDenoiser:
    """A denoiser with its conditions and its target fixed: `explained(x_t, t, rows) → Prediction`.

    conditional    f(x | prompt): one forward
    unconditional  f(x | negative prompt): one forward
    guided         f(x | negative) + scale (f(x | prompt) − f(x | negative)): two forwards

    As in diffusers, a scale of 1 or less means the prompt alone: then guided is conditional, in one forward.

    `rows` is the condition of each latent, [n], or one number if they share it, which costs less.
    """

    def __init__(
        self, denoiser: Denoiser, prompts: Condition, negatives: Condition, target: str, scale: Sequence[float]
    ) -> None:
        """`scale` is w of each condition. Raises ValueError for an unknown target."""
        if target not in TARGETS:
            raise ValueError(f"target {target!r} is not known: expected one of {', '.join(TARGETS)}")
        if target == "guided" and max(scale) <= 1:
            target = "conditional"
        self.denoiser, self.schedule, self.target = denoiser, denoiser.schedule, target
        self.scale = torch.tensor(scale, dtype=torch.float32, device=denoiser.device)
        self._count = len(prompts)
        conditions = {"conditional": prompts, "unconditional": negatives}
        self._network = denoiser.with_prompts(conditions.get(target) or Condition.cat([negatives, prompts]))

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Prediction:
        """x0 and ε for each latent."""
        return self.schedule.to_x0_and_eps(self.output(x_t, timesteps, rows), x_t, timesteps)

    def epsilon(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        """ε alone."""
        return self.schedule.epsilon(self.output(x_t, timesteps, rows), x_t, timesteps)

    def output(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output, or with guidance that of its two: linear, as what is read from it is."""
        if self.target != "guided":
            return self._network(x_t, timesteps, rows)
        both = (rows, rows + self._count) if isinstance(rows, int) else torch.stack([rows, rows + self._count])
        unconditional, conditional = (output.float() for output in self._network.both(x_t, timesteps, both))
        scale = self.scale[rows].reshape(-1, 1, 1, 1)
        return torch.where(scale > 1, unconditional + scale * (conditional - unconditional), conditional)
