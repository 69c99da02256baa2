"""DF-CAM: what each layer of the denoiser attends to, as a gradient-weighted map of its features [10][11].

One forward and one backward tell all layers of a batch of steps: a zero δ is added to every feature map, and the
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

from dfengine.diffusion.denoiser import Condition, Denoiser, Layer
from dfengine.diffusion.trajectory import Job, Trajectory
from dfengine.explain.base import OutputSpec, StepMap
from dfengine.explain.steps import Steps, by_steps, check_scale, in_range
from dfengine.result import COMBINED


@dataclass(frozen=True)
class Cam:
    """DF-CAM of every layer [10][11].

    α_k = mean_ij ∂y/∂A^k_ij,  L = ReLU(Σ_k α_k A^k),  y = Σ f(R_t)

    The saliency, "combined", is the sum over the layers of their maps, each brought to the latent's size (bilinear) and
    to [0, 1] (min–max); a layer that is the same everywhere adds nothing.
    """

    layers: Sequence[str] = ("*",)
    """names of layers, or patterns of them as in "up_blocks.*.resnets.*" (`dfengine layers` lists them)"""
    target: str = "conditional"
    """which prediction is explained: "conditional" or "unconditional" """
    scale: float = 256.0
    """what y is multiplied by while gradients are taken in float16, which loses small ones; divided out again"""
    name: str = "cam"

    def __post_init__(self) -> None:
        """Raises ValueError for what is not possible."""
        patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        object.__setattr__(self, "layers", patterns)
        if not patterns:
            raise ValueError("DF-CAM of no layer is not possible: name some, or leave layers out for all")
        if self.target not in ("conditional", "unconditional"):
            raise ValueError(
                f"target {self.target!r} is not possible with DF-CAM: expected conditional or unconditional, since a "
                "guided prediction comes of two feature maps a layer"
            )
        check_scale(self.scale)

    def num_forwards(self, num_steps: int) -> int:
        """A forward and a backward a step; without gradients of weights that costs what a forward does."""
        return 2 * num_steps

    def contents(self, denoiser: Denoiser, job: Job) -> OutputSpec:
        """The layers that are looked at. Raises ValueError for a pattern that no layer has."""
        return OutputSpec(layers={name: layer.shape[1:] for name, layer in self.chosen(denoiser).items()})

    def chosen(self, denoiser: Denoiser) -> dict[str, Layer]:
        """The layers of a network that the patterns name. Raises ValueError for a pattern that no layer has."""
        layers = denoiser.layers()
        if not layers or COMBINED in layers:
            raise ValueError(
                f"{denoiser.name} has no layers, or one called {COMBINED!r}, which is all of them together"
            )
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ValueError(
                    f"no layer is called {pattern!r}: {denoiser.name} has {len(layers)}, from {next(iter(layers))} to "
                    f"{next(reversed(layers))}, which `dfengine layers` lists"
                )
        return {name: layer for name, layer in layers.items() if any(fnmatchcase(name, p) for p in self.layers)}

    @torch.no_grad()
    def explain(
        self, denoiser: Denoiser, trajectories: Sequence[Trajectory], done: Collection[tuple[int, int]] = ()
    ) -> Iterator[StepMap]:
        """Stream the maps of every step of every trajectory.

        Raises ValueError where the network has no such layers.
        """
        layers = self.chosen(denoiser)
        told = [path.prompt if self.target == "conditional" else path.negative for path in trajectories]
        conditions = Condition.cat(told)

        def work(steps: Steps) -> dict[str, Tensor]:
            return self._maps(denoiser, layers, steps, conditions[steps.items])

        yield from by_layer(self.name, denoiser, trajectories, done, work)

    def _maps(
        self, denoiser: Denoiser, layers: Mapping[str, Layer], steps: Steps, condition: Condition
    ) -> dict[str, Float[Tensor, "n _ _"]]:
        """L of every layer, at its own resolution."""

        def target(deltas: dict[str, Tensor], scale: float) -> tuple[Tensor, dict[str, Tensor]]:
            with tapped(layers, deltas) as features:
                output = denoiser.predict(steps.latents, steps.timesteps, condition)
            return scale * denoiser.schedule.epsilon(output, steps.latents, steps.timesteps).sum(), features

        def maps(scale: float) -> dict[str, Tensor]:
            gradients, features = torch.func.grad(target, has_aux=True)(zeros, scale)
            alphas = {name: gradients.pop(name).float().mean((2, 3)) / scale for name in layers}
            return {name: F.relu(torch.einsum("nk,nkuv->nuv", alphas[name], features[name].float())) for name in layers}

        zeros = {
            name: torch.zeros(len(steps.latents), *layer.shape, dtype=denoiser.dtype, device=denoiser.device)
            for name, layer in layers.items()
        }
        with denoiser.differentiable():
            return in_range(denoiser.dtype, self.scale, maps, lambda found: found.values())


def by_layer(
    name: str,
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    done: Collection[tuple[int, int]],
    maps: Callable[[Steps], dict[str, Tensor]],
) -> Iterator[StepMap]:
    """Step maps of what `maps` makes of some steps, layer by layer, with all of them combined."""

    def work(steps: Steps) -> dict[str, Tensor]:
        found = maps(steps)
        return {COMBINED: combine(found, denoiser.latent_shape[1:])} | found

    for item, step, made in by_steps(denoiser, trajectories, done, work):
        combined = made.pop(COMBINED)
        if not all(part.isfinite().all() for part in made.values()):
            warnings.warn(f"a DF-CAM map of step {step} is not finite: its features overflow", stacklevel=3)
        yield StepMap(item, step, name, combined, layers=made)


@contextmanager
def tapped(layers: Mapping[str, Layer], deltas: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """While inside, each layer's δ is added to its feature map, and the sum kept."""
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
    """The sum of all layers' maps, each brought to one size and to [0, 1]."""
    scaled = []
    for part in maps.values():
        resized = F.interpolate(part[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        low, high = resized.amin((1, 2), keepdim=True), resized.amax((1, 2), keepdim=True)
        scaled.append(torch.where(high > low, (resized - low) / (high - low), 0))
    return torch.stack(scaled).sum(0)
