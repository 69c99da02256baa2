"""The one convention every model is brought to: `denoiser(x_t, t, condition) → ε`.

An adapter implements `Denoiser` for a family of models. What is explained, and how a trajectory is guided, are
wrappers around it, so neither the sampler nor the explainers ask what kind of model they have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dfengine.diffusion.path import NoiseSchedule, Prediction
from dfengine.tokens import Tokens

#: Images [n, 3, H, W] in [0, 1] → features [n, d].
Features = Callable[[Tensor], Tensor]

#: Shown the probabilities [n, heads, s, t] of an attention, each row of which sums to 1, and the (height, width) of the
#: grid that its s positions lie on, (1, s) for a text; returns the probabilities to go on with.
AttentionHook = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Layer:
    """A part of a network, and the (channels, height, width) of the feature map that it makes of a latent."""

    module: nn.Module
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Condition:
    """What the network is told of n prompts: named tensors, each with the prompts along its first axis."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        return Condition({name: value[rows] for name, value in self.tensors.items()})

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """The prompts of several conditions in one."""
        return cls({name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors})


class Denoiser(ABC):
    """A denoising network with its noise schedule, text conditioning and image codec.

    Networks are not trained here: adapters hold them in evaluation mode without parameter gradients.
    """

    name: str
    """the folder or hub id it was loaded from"""
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of R_t"""
    image_shape: tuple[int, int]
    """(height, width) of decoded images, in pixels"""
    device: torch.device
    dtype: torch.dtype
    """of the network; ε, x0 and latents are float32"""
    batch_size: int
    """latents in one forward, at most; halved where they do not fit"""
    attention_backend: str = "its own"
    """what computes attention, by name"""
    compiled: bool = False
    """whether `compile` has been called; what it has no shape for runs as it is"""
    features: Features | None = None
    """image features for comparisons on decoded images, if the model comes with them"""

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output, whatever its parametrisation."""

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Condition:
        """Encode prompts. Raises ValueError for one that the model cannot be told whole."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images in [0, 1]."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Latents of images in [0, 1]."""

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The noise prediction ε, float32."""
        return self.read(x_t, timesteps, condition).epsilon

    def with_prompts(self, condition: Condition) -> PromptedDenoiser:
        """The network bound to prompts, which many latents are going to share."""
        return PromptedDenoiser(self, condition)

    def use_attention(self, backend: str) -> None:
        """Compute attention by one of several backends. Raises ValueError where there is no choice, or not this one."""
        raise ValueError(f"{self.name} has no choice of attention: leave it out")

    def layers(self) -> dict[str, Layer]:
        """The parts whose feature maps can be looked at, by their name in the module tree, in the forward's order.

        Raises ValueError where there are none.
        """
        raise ValueError(f"{self.name} does not tell its layers: DF-CAM is not possible with it")

    def differentiable(self) -> AbstractContextManager[None]:
        """While inside, `torch.func` can differentiate `predict`."""
        return nullcontext()

    def tokens(self, prompt: str) -> Tokens:
        """What the positions of a prompt's encoding stand for. Raises ValueError as `condition` does."""
        raise ValueError(f"{self.name} does not tell its tokens: relevance and attention are not possible with it")

    def require_attention(self) -> None:
        """Raise ValueError where attention is not to be seen."""
        raise ValueError(f"{self.name} does not show its attention: relevance and attention are not possible with it")

    def with_attention_hook(
        self, condition: Condition, text: AttentionHook, image: AttentionHook | None = None
    ) -> PromptedDenoiser:
        """The network bound to prompts, `text` being shown every cross-attention as it is computed, and `image` every
        self-attention. Differentiable. Raises ValueError as `require_attention` does.
        """
        raise NotImplementedError

    def with_text_attention_hook(self, prompts: Sequence[str], watch: AttentionHook) -> Condition:
        """`condition`, `watch` being shown every self-attention of the text encoders. Differentiable.

        Raises ValueError where attention is not to be seen.
        """
        raise ValueError(f"{self.name} does not show its text encoder's attention: leave text_attention out")

    def zero_tokens(self, condition: Condition, places: Sequence[int]) -> Condition:
        """Prompts whose encoding is zero at some positions. Raises ValueError where it has none."""
        raise ValueError(f"{self.name} does not tell its tokens: none can be left out")

    def performance_warnings(self) -> list[str]:
        """Fast paths that this network does not take, and why, a line each."""
        return []

    def compile(self) -> None:
        """Compile the network, for batches of exactly `batch_size` latents that share a prompt.

        Raises ValueError where it cannot be compiled.
        """
        raise ValueError(f"{self.name} cannot be compiled: leave compile out")

    def read(self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition) -> Prediction:
        """x0 and ε, each straight from the network's output."""
        return self.schedule.to_x0_and_eps(self.predict(x_t, timesteps, condition), x_t, timesteps)


class PromptedDenoiser:
    """A network bound to some prompts: what depends on neither latent nor time-step can be made once, here."""

    def __init__(self, denoiser: Denoiser, condition: Condition) -> None:
        self.denoiser, self.condition = denoiser, condition

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output for each latent under the prompt of its row, or of one row for all of them."""
        rows = torch.full_like(timesteps, rows) if isinstance(rows, int) else rows
        return self.denoiser.predict(x_t, timesteps, self.condition[rows])

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The outputs for each latent under two prompts: those of its two rows, or of one pair for all of them."""
        if isinstance(rows, tuple) or 2 * len(x_t) > self.denoiser.batch_size:  # two batches of the one size
            first, second = rows
            return self(x_t, timesteps, first), self(x_t, timesteps, second)
        outputs = self(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), rows.flatten())
        return outputs[: len(x_t)], outputs[len(x_t) :]
