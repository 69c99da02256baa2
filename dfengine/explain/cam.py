"""DF-CAM: what each layer of the network attends to, as a gradient-weighted map of its features (Eqs. 10, 11).

One forward and one backward serve all layers of a batch of steps: a zero δ is added to every feature map, and the
gradient is taken with respect to all δ at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dfengine.diffusion.denoiser import Condition, Denoiser, HasLayers, Layer, require
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.registry import checked, register, suggestion
from dfengine.explain.steps import Steps, by_steps, check_loss_scale, with_loss_scaling
from dfengine.result import COMBINED


@register(
    "cam",
    label="DF-CAM",
    form="layers",
    hot="the layers' features here raise the sum of the predicted noise.",
)
@dataclass(frozen=True)
class Cam(Explainer):
    """What each layer's features add to the prediction, all layers from one backward pass (Eqs. 10, 11).

        α_k = mean_ij ∂y/∂A^k_ij,  L = ReLU(Σ_k α_k A^k),  y = Σ f(R_t)

    The saliency, "combined", is the sum over the layers of their maps, each resized to the latent (bilinear) and scaled
    to [0, 1] (min–max, Eq. 9); a constant layer contributes zero.
    """

    layers: Sequence[str] = option(("*",), "layers, or patterns such as up_blocks.* (`dfengine layers` lists them)")
    target: str = option("conditional", "prediction to explain: conditional or unconditional")
    loss_scale: float = option(256.0, "factor on y while float16 gradients are taken, divided out again")
    name: str = option("cam", "name that the maps are stored under")

    def __post_init__(self) -> None:
        """Raises ValueError for an empty list of layers, an unknown target, or a loss scale that is not positive."""
        super().__post_init__()
        if not self.layers:
            raise ValueError("DF-CAM needs at least one layer: name some, or leave layers out for all")
        if self.target not in ("conditional", "unconditional"):
            raise ValueError(
                f"target {self.target!r} is not possible with DF-CAM: expected conditional or unconditional, since a "
                "guided prediction has two feature maps a layer"
            )
        check_loss_scale(self.loss_scale)

    @classmethod
    def paper(cls, **settings: Any) -> Cam:
        """The equations as printed, of all layers."""
        return cls(**checked(cls, settings))

    @classmethod
    def xdiffusion(cls, **settings: Any) -> Explainer:
        """What the authors' released code computes. Raises ValueError for a setting that it does not have."""
        from dfengine.explain.xdiffusion import XDiffusionCam

        return XDiffusionCam(**checked(XDiffusionCam, settings))

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward a step; without gradients of weights a backward costs what a forward does."""
        return 2 * num_steps

    def output_spec(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The selected layers. Raises ValueError for a pattern that matches none, or a network without gradients."""
        denoiser.require_gradients("DF-CAM")
        return OutputSpec(layers={name: layer.shape[1:] for name, layer in self.select_layers(denoiser).items()})

    def select_layers(self, denoiser: Denoiser) -> dict[str, Layer]:
        """The layers that the patterns match. Raises ValueError for a pattern that matches none."""
        layers = require(denoiser, HasLayers, "DF-CAM").layers()
        if not layers or COMBINED in layers:
            raise ValueError(
                f"{denoiser.name} has no layers, or one called {COMBINED!r}, the name of all of them together"
            )
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"no layer is called {pattern!r}: {denoiser.name} has {len(layers)}, from {next(iter(layers))} to "
                    f"{next(reversed(layers))}, which `dfengine layers` lists{suggestion(pattern, layers)}"
                )
        return {name: layer for name, layer in layers.items() if any(fnmatchcase(name, p) for p in self.layers)}

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        layers = self.select_layers(denoiser)
        negatives = Condition.cat([path.negative for path in trajectories])

        def maps(steps: Steps) -> dict[str, Tensor]:
            condition = steps.condition if self.target == "conditional" else negatives[steps.items]
            return self._maps(denoiser, layers, steps, condition)

        yield from by_layer(self.name, denoiser, trajectories, done, maps)

    def _maps(
        self, denoiser: Denoiser, layers: Mapping[str, Layer], steps: Steps, condition: Condition
    ) -> dict[str, Float[Tensor, "n _ _"]]:
        """L of every layer, at its own resolution."""

        def maps(scale: float) -> dict[str, Tensor]:
            gradients, features = feature_gradients(
                denoiser, layers, steps.latents, steps.timesteps, condition, loss_scale=scale
            )
            alphas = {name: gradients.pop(name).float().mean((2, 3)) / scale for name in layers}
            return {name: weighted_map(alphas[name], features[name].float()) for name in layers}

        return with_loss_scaling(denoiser.dtype, self.loss_scale, maps, lambda result: result.values())


def feature_gradients(
    denoiser: Denoiser,
    layers: Mapping[str, Layer],
    latents: Float[Tensor, "n c h w"],
    timesteps: Tensor,
    condition: Condition,
    *,
    loss_scale: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """∂(loss_scale·y)/∂A and A of every layer, y = Σ f(R_t), by one forward and one backward."""

    def loss(deltas: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with add_deltas(layers, deltas) as features:
            output = denoiser.predict(latents, timesteps, condition)
        return loss_scale * denoiser.schedule.epsilon(output, latents, timesteps).sum(), features

    deltas = {
        name: torch.zeros(len(latents), *layer.shape, dtype=denoiser.dtype, device=denoiser.device)
        for name, layer in layers.items()
    }
    with denoiser.differentiable(), denoiser.frozen():
        try:
            return torch.func.grad(loss, has_aux=True)(deltas)
        except RuntimeError as error:
            if "setup_context" not in str(error):  # quantised layers that torch.func cannot transform
                raise
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: delta.clone().requires_grad_() for name, delta in deltas.items()}
            target, features = loss(leaves)
            gradients = torch.autograd.grad(target, [*leaves.values()])
    detached = {name: feature.detach() for name, feature in features.items()}
    return dict(zip(leaves, gradients, strict=True)), detached


def weighted_map(alphas: Float[Tensor, "n k"], features: Float[Tensor, "n k u v"]) -> Float[Tensor, "n u v"]:
    """ReLU(Σ_k α_k A^k) (Eq. 11)."""
    return F.relu(torch.einsum("nk,nkuv->nuv", alphas, features))


def by_layer(
    name: str,
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    done: Collection[tuple[int, int]],
    maps: Callable[[Steps], dict[str, Tensor]],
) -> Iterator[StepMap]:
    """The step maps of layer-wise `maps`, with all layers combined as the saliency."""

    def compute(steps: Steps) -> dict[str, Tensor]:
        layers = maps(steps)
        return {COMBINED: combine(layers, denoiser.latent_shape[1:])} | layers

    for item, step, layers in by_steps(denoiser, trajectories, done, compute):
        combined = layers.pop(COMBINED)
        if not all(part.isfinite().all() for part in layers.values()):
            warnings.warn(f"a DF-CAM map of step {step} is not finite: its features overflow", stacklevel=3)
        yield StepMap(item, step, name, combined, layers=layers)


@contextmanager
def add_deltas(layers: Mapping[str, Layer], deltas: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """While inside, each layer's δ is added to its feature map; yields the sums, filled in by the forward."""
    features: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, _: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            features[name] = (output[0] if is_tuple else output) + deltas[name]
            return (features[name], *output[1:]) if is_tuple else features[name]

        return add

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.module.register_forward_hook(hook(name)))
        yield features


def combine(maps: Mapping[str, Float[Tensor, "n _ _"]], size: tuple[int, int]) -> Float[Tensor, "n h w"]:
    """The sum of all layers' maps, each resized to one size and scaled to [0, 1]."""
    scaled = []
    for part in maps.values():
        resized = F.interpolate(part[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
        scaled.append(torch.where(high > low, (resized - low) / (high - low), 0))
    return torch.stack(scaled).sum(0)
