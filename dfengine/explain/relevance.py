"""Relevance of each token of the prompt to each step (Chefer, Gur & Wolf 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import AttentionHook, Condition, Denoiser
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap
from dfengine.explain.rules import Relevancy, Seen, positive, self_relevance
from dfengine.explain.steps import Steps, by_steps, check_scale, in_range
from dfengine.tokens import PADDING, Tokens


@dataclass(frozen=True)
class Relevance:
    """How much each token of the prompt matters to the conditional prediction of a step.

    Gathered over the attentions A of the network in the forward's order (`explain.rules`), with gradients of
    y = Σ f(R_t) and Ā the mean over heads of (∇A ⊙ A)⁺. A token's relevance is the sum over image positions; what all
    padding has is given as one. The saliency is where the relevance of the prompt's own tokens lies.
    """

    self_attention: bool = True
    """whether relevance also passes from position to position of the image; without it far less memory is needed"""
    text_attention: bool = False
    """whether it also passes from token to token in the text encoder"""
    scale: float = 256.0
    """what y is multiplied by while gradients are taken in float16, which loses small ones; divided out again"""
    name: str = "relevance"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        check_scale(self.scale)

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward a step; without gradients of weights that costs what a forward does."""
        return 2 * num_steps

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The tokens. Raises ValueError where the model does not show its attention."""
        denoiser.require_attention()
        if self.text_attention:
            denoiser.with_text_attention_hook([""], lambda probabilities, _: probabilities)
        return OutputSpec(tokens=denoiser.tokens(job.prompt))

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the relevance of every step of every trajectory.

        Raises ValueError where the network does not show its attention.
        """
        prompts = Condition.cat([path.prompt for path in trajectories])
        tokens = [denoiser.tokens(path.job.prompt) for path in trajectories]

        def work(steps: Steps) -> dict[str, Tensor]:
            told = [trajectories[item].job.prompt for item in steps.items.tolist()]
            relevance, grid = self._relevance(denoiser, steps, prompts, told)
            own = relevance.new_zeros(len(told), relevance.shape[2])
            for row, item in enumerate(steps.items.tolist()):
                own[row, tokens[item].own] = 1
            where = torch.einsum("nsq,nq->ns", relevance, own).unflatten(1, grid)[:, None]
            saliency = F.interpolate(where, denoiser.latent_shape[1:], mode="bilinear", align_corners=False)[:, 0]
            return {"relevance": relevance.sum(1), "saliency": saliency}

        for item, step, made in by_steps(denoiser, trajectories, done, work):
            relevance = by_token(made["relevance"], tokens[item])
            if not relevance.isfinite().all():
                warnings.warn(f"the relevance of step {step} is not finite: its gradients overflow", stacklevel=2)
            yield StepMap(item, step, self.name, made["saliency"], relevance=relevance)

    def _relevance(
        self, denoiser: Denoiser, steps: Steps, prompts: Condition, told: Sequence[str]
    ) -> tuple[Float[Tensor, "n s q"], tuple[int, int]]:
        """R_sq after the last layer, and the grid of its image positions."""

        def attentions(scale: float) -> _Seen:
            seen = _Seen(scale)
            # A caller may be in inference mode, whose tensors nothing can be differentiated with: copies can.
            with torch.inference_mode(False), torch.enable_grad():
                x = steps.latents.clone().requires_grad_()
                given = {name: value[steps.items].clone() for name, value in prompts.tensors.items()}
                text = (
                    denoiser.with_text_attention_hook(told, seen.watch("text"))
                    if self.text_attention
                    else Condition(given)
                )
                network = denoiser.with_attention_hook(
                    text, seen.watch("cross"), seen.watch("image") if self.self_attention else None
                )
                output = network(x, steps.timesteps, torch.arange(len(x), device=x.device))
                target = denoiser.schedule.epsilon(output, x, steps.timesteps).sum()
                torch.autograd.grad(scale * target, [x, *seen.leaves])
            return seen

        seen = in_range(denoiser.dtype, self.scale, attentions, lambda seen: [layer.attention for layer in seen.layers])
        with torch.no_grad():
            layers = [layer for layer in seen.layers if layer.kind != "text"]
            finest = max((layer.grid for layer in layers), key=lambda grid: grid[0] * grid[1])
            in_text = [layer.attention for layer in seen.layers if layer.kind == "text"]
            tokens = next(layer.attention.shape[2] for layer in layers if layer.kind == "cross")
            alone = torch.zeros(len(told), tokens, tokens, device=denoiser.device)
            gathered = Relevancy(finest, self_relevance(in_text) if in_text else alone)
            for layer in layers:
                pass_on = gathered.cross_attention if layer.kind == "cross" else gathered.self_attention
                pass_on(layer.attention, layer.grid)
        return gathered.text_to_image, finest


@dataclass
class _Layer:
    """Ā of one attention, which the backward pass fills in."""

    kind: str
    grid: tuple[int, int]
    attention: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class _Seen:
    """Every attention of a forward, in its order."""

    scale: float
    layers: list[_Layer] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    """what nothing before asks for a gradient of: the first probabilities of a text"""

    def watch(self, kind: str) -> AttentionHook:
        def see(probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
            if not probabilities.requires_grad:
                probabilities = probabilities.detach().requires_grad_()
                self.leaves.append(probabilities)
            layer = _Layer(kind, grid)
            self.layers.append(layer)
            return Seen.apply(probabilities, self._keep(layer))

        return see

    def _keep(self, layer: _Layer) -> Callable[[Tensor, Tensor], None]:
        def keep(probabilities: Tensor, gradient: Tensor) -> None:
            layer.attention = positive(probabilities, gradient) / self.scale

        return keep


def by_token(values: Float[Tensor, " positions *rest"], tokens: Tokens) -> Float[Tensor, " tokens *rest"]:
    """What positions have, by token: all padding as one."""
    if tokens.texts[-1] != PADDING:
        return values
    last = len(tokens) - 1
    return torch.cat([values[:last], values[last:].sum(0, keepdim=True)])
