"""Relevance of each token of the prompt to each step (Chefer, Gur & Wolf 2021)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import AttentionHook, Condition, Denoiser, HasAttention, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.registry import register
from dfengine.explain.rules import GradientTap, RelevanceRules, relevance_weights, self_relevance
from dfengine.explain.steps import Steps, by_steps, check_loss_scale, with_loss_scaling
from dfengine.tokens import PADDING, Tokens


@register(
    "relevance",
    label="relevance",
    form="tokens",
    hot="here the prompt's words bear on the prediction, by attention times its gradient.",
)
@dataclass(frozen=True)
class Relevance(Explainer):
    """How much each token of the prompt matters to the conditional prediction of a step (Chefer, Gur & Wolf 2021).

    Accumulated over the attentions A of the network in the forward's order (`explain.rules`), with gradients of
    y = Σ f(R_t) and Ā the mean over heads of (∇A ⊙ A)⁺. A token's relevance is the sum over image positions; all
    padding counts as one token. The saliency is where the relevance of the prompt's own tokens lies.
    """

    self_attention: bool = option(True, "let relevance pass between image positions; without it, far less memory")
    text_attention: bool = option(False, "let relevance also pass between tokens in the text encoder")
    loss_scale: float = option(256.0, "factor on y while float16 gradients are taken, divided out again")
    name: str = option("relevance", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError if the loss scale is not positive."""
        super().__post_init__()
        check_loss_scale(self.loss_scale)

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward a step; without gradients of weights a backward costs what a forward does."""
        return 2 * num_steps

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The prompt's tokens. Raises ValueError if the model's attention or its gradients are not accessible."""
        denoiser.require_gradients("relevance")
        attentive = require(denoiser, HasAttention, "relevance")
        attentive.require_attention()
        if self.text_attention:
            attentive.with_text_attention_hook([""], lambda probabilities, _: probabilities)
        return OutputSpec(tokens=attentive.tokens(job.prompt))

    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        prompts = Condition.cat([path.prompt for path in trajectories])
        attentive = require(denoiser, HasAttention, "relevance")
        tokens = [attentive.tokens(path.job.prompt) for path in trajectories]

        def compute(steps: Steps) -> dict[str, Tensor]:
            items = steps.items.tolist()
            relevance, grid = self._relevance(denoiser, steps, prompts, [trajectories[i].job.prompt for i in items])
            is_own = relevance.new_zeros(len(items), relevance.shape[2])
            for row, item in enumerate(items):
                is_own[row, tokens[item].own] = 1
            saliency = torch.einsum("nsq,nq->ns", relevance, is_own).unflatten(1, grid)[:, None]
            saliency = F.interpolate(saliency, denoiser.latent_shape[1:], mode="bilinear", align_corners=False)[:, 0]
            return {"relevance": relevance.sum(1), "saliency": saliency}

        for item, step, tensors in by_steps(denoiser, trajectories, done, compute):
            relevance = by_token(tensors["relevance"], tokens[item])
            if not relevance.isfinite().all():
                warnings.warn(f"the relevance of step {step} is not finite: its gradients overflow", stacklevel=2)
            yield StepMap(item, step, self.name, tensors["saliency"], relevance=relevance)

    def _relevance(
        self, denoiser: Denoiser, steps: Steps, conditions: Condition, prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "n s q"], tuple[int, int]]:
        """R_sq after the last layer, and the grid of its image positions; `conditions` has a row for each item."""

        attentive = require(denoiser, HasAttention, "relevance")

        def attentions(scale: float) -> AttentionTrace:
            trace = AttentionTrace(scale)
            # A caller may be in inference mode, whose tensors cannot be differentiated: copies can.
            with denoiser.frozen(), torch.inference_mode(False), torch.enable_grad():
                x = steps.latents.clone().requires_grad_()
                condition = Condition({name: value[steps.items].clone() for name, value in conditions.tensors.items()})
                if self.text_attention:
                    condition = attentive.with_text_attention_hook(prompts, trace.hook("text"))
                image = trace.hook("image") if self.self_attention else None
                network = attentive.with_attention_hook(condition, trace.hook("cross"), image)
                output = network(x, steps.timesteps, torch.arange(len(x), device=x.device))
                target = denoiser.schedule.epsilon(output, x, steps.timesteps).sum()
                torch.autograd.grad(scale * target, [x, *trace.leaves])
            return trace

        trace = with_loss_scaling(
            denoiser.dtype, self.loss_scale, attentions, lambda trace: [layer.weights for layer in trace.layers]
        )
        with torch.no_grad():
            layers = [layer for layer in trace.layers if layer.kind != "text"]
            finest = max((layer.grid for layer in layers), key=lambda grid: grid[0] * grid[1])
            in_text = [layer.weights for layer in trace.layers if layer.kind == "text"]
            num_tokens = next(layer.weights.shape[2] for layer in layers if layer.kind == "cross")
            identity = torch.zeros(len(prompts), num_tokens, num_tokens, device=denoiser.device)
            rules = RelevanceRules(finest, self_relevance(in_text) if in_text else identity)
            for layer in layers:
                update = rules.cross_attention if layer.kind == "cross" else rules.self_attention
                update(layer.weights, layer.grid)
        return rules.text_to_image, finest


@dataclass
class _Layer:
    """One attention of a forward."""

    kind: str
    """text, cross or image"""
    grid: tuple[int, int]
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Ā, filled in by the backward pass"""


@dataclass
class AttentionTrace:
    """Every attention of a forward, in its order."""

    loss_scale: float
    layers: list[_Layer] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    """probabilities that nothing before them asks a gradient of: a text's first ones"""

    def hook(self, kind: str) -> AttentionHook:
        """A hook that adds the attentions of one kind to the trace."""

        def record(probabilities: Tensor, grid: tuple[int, int]) -> Tensor:
            if not probabilities.requires_grad:
                probabilities = probabilities.detach().requires_grad_()
                self.leaves.append(probabilities)
            layer = _Layer(kind, grid)
            self.layers.append(layer)
            return GradientTap.apply(probabilities, self._fill(layer))

        return record

    def _fill(self, layer: _Layer) -> Callable[[Tensor, Tensor], None]:
        def fill(probabilities: Tensor, gradient: Tensor) -> None:
            layer.weights = relevance_weights(probabilities, gradient) / self.loss_scale

        return fill


def by_token(values: Float[Tensor, " positions *rest"], tokens: Tokens) -> Float[Tensor, " tokens *rest"]:
    """Values of positions as values of tokens: all padding positions summed into one."""
    if tokens.texts[-1] != PADDING:
        return values
    last = len(tokens) - 1
    return torch.cat([values[:last], values[last:].sum(0, keepdim=True)])
