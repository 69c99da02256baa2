"""Cross-attention maps: where the network looks up each word of the prompt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser, HasAttention, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.registry import register
from dfengine.explain.steps import Steps, by_steps
from dfengine.tokens import concept_spans


@register(
    "attention",
    label="attention",
    form="words",
    hot="the network looks the prompt's words up here, which alone does not show that they change anything.",
)
@dataclass(frozen=True)
class Attention(Explainer):
    """Where each word of the prompt is looked up: the conditional prediction's cross-attention, by word and step.

    The mean over heads and layers, each resized to the latent (bilinear); a word's map is the mean over its tokens. The
    saliency is the share of attention that the prompt's own tokens have together; special tokens have the rest.
    """

    words: Sequence[str] | None = option(None, "words or phrases of the prompt to map; every word by default")
    name: str = option("attention", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for an empty list of words."""
        super().__post_init__()
        if self.words is not None:
            object.__setattr__(self, "words", tuple(dict.fromkeys(self.words)))
            if not self.words:
                raise ValueError("attention needs at least one word: name some, or leave words out for all")

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The words. Raises ValueError for one that is not in the prompt, or if attention is not accessible."""
        require(denoiser, HasAttention, "attention").require_attention()
        return OutputSpec(words=[concept for concept, _ in concept_spans(job.prompt, self.words)])

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        prompts = Condition.cat([path.prompt for path in trajectories])
        attentive = require(denoiser, HasAttention, "attention")
        tokens = [attentive.tokens(path.job.prompt) for path in trajectories]
        spans = [concept_spans(path.job.prompt, self.words) for path in trajectories]

        def compute(steps: Steps) -> dict[str, Tensor]:
            return {"maps": self._maps(attentive, steps, prompts, denoiser.latent_shape[1:])}

        for item, step, tensors in by_steps(denoiser, trajectories, done, compute):
            maps = tensors["maps"]
            places = [
                sorted({place for span in word_spans for place in tokens[item].places(*span)})
                for _, word_spans in spans[item]
            ]
            word_maps = torch.stack([maps[each].mean(0) for each in places]) if places else None
            yield StepMap(item, step, self.name, maps[tokens[item].own].sum(0), word_maps=word_maps)

    def _maps(
        self, denoiser: HasAttention, steps: Steps, prompts: Condition, size: tuple[int, int]
    ) -> Float[Tensor, "n q h w"]:
        """The map of every position of the text, averaged over heads and layers."""
        total, num_layers = torch.zeros((), device=steps.latents.device), 0

        def hook(probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
            nonlocal total, num_layers
            maps = probabilities.float().mean(1).transpose(1, 2).unflatten(2, grid)
            total = total + F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            num_layers += 1
            return probabilities

        denoiser.with_attention_hook(prompts, hook)(steps.latents, steps.timesteps, steps.items)
        return total / num_layers
