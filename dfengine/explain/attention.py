"""Cross-attention maps: where each word of the prompt is looked for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap
from dfengine.explain.steps import Steps, by_steps
from dfengine.tokens import concepts


@dataclass(frozen=True)
class Attention:
    """The mean over heads and layers of the conditional prediction's cross-attention, a map a word and step.

    Every layer's maps are brought to the latent's size (bilinear); a word's map is the mean over its tokens. The
    saliency is the share of attention that the prompt's own tokens have together: the rest goes to the special ones.
    """

    words: Sequence[str] | None = None
    """words or phrases of the prompt, each with all its occurrences together; None is every word by itself"""
    name: str = "attention"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        if self.words is not None:
            words = (self.words,) if isinstance(self.words, str) else tuple(dict.fromkeys(self.words))
            object.__setattr__(self, "words", words)
            if not words:
                raise ValueError("attention to no word is not possible: name some, or leave words out for all")

    def num_forwards(self, num_steps: int) -> int:
        """One a step."""
        return num_steps

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The words. Raises ValueError for one that is not in the prompt, or where attention is not to be seen."""
        denoiser.require_attention()
        return OutputSpec(words=[concept for concept, _ in concepts(job.prompt, self.words)])

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of every step of every trajectory.

        Raises ValueError where the network does not show its attention.
        """
        prompts = Condition.cat([path.prompt for path in trajectories])
        tokens = [denoiser.tokens(path.job.prompt) for path in trajectories]
        spans = [concepts(path.job.prompt, self.words) for path in trajectories]

        def work(steps: Steps) -> dict[str, Tensor]:
            return {"maps": self._maps(denoiser, steps, prompts)}

        for item, step, made in by_steps(denoiser, trajectories, done, work):
            maps, told = made["maps"], tokens[item]
            places = [sorted({place for span in each for place in told.places(*span)}) for _, each in spans[item]]
            heat = torch.stack([maps[each].mean(0) for each in places]) if places else None
            yield StepMap(item, step, self.name, maps[told.own].sum(0), word_maps=heat)

    def _maps(self, denoiser: Denoiser, steps: Steps, prompts: Condition) -> Float[Tensor, "n q h w"]:
        """The map of every position of the text."""
        seen: list[Tensor] = []

        def see(probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
            maps = probabilities.float().mean(1).transpose(1, 2).unflatten(2, grid)
            resized = F.interpolate(maps, size=denoiser.latent_shape[1:], mode="bilinear", align_corners=False)
            seen[:] = [seen[0] + resized] if seen else [resized]
            layers.append(grid)
            return probabilities

        layers: list[tuple[int, int]] = []
        denoiser.with_attention_hook(prompts, see)(steps.latents, steps.timesteps, steps.items)
        return seen[0] / len(layers)
