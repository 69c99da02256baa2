"""The one convention that every model is brought to, and what a model may offer beyond it.

Four methods make a model explainable by masks: `condition`, `predict`, `decode` and `encode`. Explainers that need more
ask for a capability (`require(denoiser, HasLayers, "DF-CAM")`). Guidance is a wrapper (`diffusion.guidance`), so that
neither the sampler nor the explainers ask what kind of model they have.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Lock, RLock
from types import MappingProxyType
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dfengine.diffusion.fingerprint import fingerprint
from dfengine.diffusion.job import Job
from dfengine.diffusion.path import NoiseSchedule
from dfengine.tokens import Tokens

#: Images [n, 3, H, W] in [0, 1] → features [n, d].
Features = Callable[[Tensor], Tensor]

#: Called with the probabilities [n, heads, s, t] of an attention, whose rows sum to 1, and the (height, width) of the
#: grid of its s positions, (1, s) for a text; returns the probabilities to continue with.
AttentionHook = Callable[[Tensor, tuple[int, int]], Tensor]

C = TypeVar("C")

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_creation = Lock()


@dataclass(frozen=True)
class Condition:
    """What the network is told about n jobs besides latent and time-step: named tensors with the jobs along axis 0."""

    tensors: dict[str, Tensor]
    num_jobs: int = 0
    """n of a model that is told nothing; otherwise the tensors' own length counts"""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values()))) if self.tensors else self.num_jobs

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        if not self.tensors:
            return Condition({}, len(torch.arange(self.num_jobs)[rows if isinstance(rows, slice) else rows.cpu()]))
        return Condition({name: value[rows] for name, value in self.tensors.items()})

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """The jobs of several conditions in one."""
        tensors = {name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors}
        return cls(tensors, sum(map(len, conditions)))


class Denoiser(ABC):
    """A denoising network with its path, its conditioning and its image codec.

    Networks are not trained here: they run in evaluation mode (`exclusive`), without gradients of weights (`frozen`).
    """

    name: str
    """the folder or hub id it was loaded from"""
    schedule: NoiseSchedule
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of R_t"""
    image_shape: tuple[int, int]
    """(height, width) of decoded images in pixels"""
    device: torch.device
    dtype: torch.dtype
    """of the network; ε, x0 and latents are float32"""
    batch_size: int
    """latents in one forward, at most; halved if they do not fit into memory"""
    attention_backend: str = "its own"
    """the name of what computes attention"""
    compiled: bool = False
    """whether `compile` has been called; shapes it was not compiled for run uncompiled"""
    features: Features | None = None
    """image features for comparisons of decoded images, if the model comes with them"""
    alternatives: Mapping[str, Sequence[str]] = MappingProxyType({})
    """for a word or phrase of prompts others of the same kind, the first ones first, where the model comes with them"""

    def condition(self, jobs: Sequence[Job], *, negative: bool = False) -> Condition:
        """What the network is told about each job, or about its negative (the unconditional half of guidance).

        By default the job's prompt, or its negative prompt, by `encode_prompts`; a model that is told anything else
        (a class label, a control image, nothing) overrides this. Raises ValueError for what the model cannot be told.
        """
        return self.encode_prompts([job.negative_prompt if negative else job.prompt for job in jobs])

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The condition of plain prompts. Raises ValueError for one that the model does not take in full."""
        raise ValueError(f"{self.name} takes no prompts")

    @abstractmethod
    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output in latent layout, whatever its parametrisation."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images in [0, 1]."""

    @abstractmethod
    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Latents of images in [0, 1]."""

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The predicted noise ε, float32."""
        return self.schedule.epsilon(self.predict(x_t, timesteps, condition), x_t, timesteps)

    def with_prompts(self, condition: Condition) -> PromptedDenoiser:
        """The network with its conditions fixed, which many latents are going to share."""
        return PromptedDenoiser(self, condition)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that results depend on, by name; by default those among its own attributes.

        A denoiser that keeps its networks elsewhere (in a list, in a denoiser it wraps) overrides this.
        """
        return {name: value for name, value in vars(self).items() if isinstance(value, nn.Module)}

    def fingerprint(self) -> str:
        """Identifies the weights and the path as they are now: another LoRA or scheduler changes it."""
        with self.exclusive():
            return self._fingerprint()

    def _fingerprint(self) -> str:
        return hashlib.sha256(f"{fingerprint(self.networks)} {self.schedule.fingerprint()}".encode()).hexdigest()[:16]

    def exclusive(self) -> AbstractContextManager[None]:
        """While inside, no other thread uses the network, which is evaluated in torch's default settings.

        Explainers hook modules, so that threads have to take turns, also those of denoisers that share a network. The
        caller's training mode, autocast and default dtype are what they were on leaving.
        """
        return self.turns()()

    def turns(self) -> Callable[[], AbstractContextManager[None]]:
        """`exclusive`, to be entered many times: the network's modules, which are thousands, are listed only once."""
        networks = list(self.networks.values())
        with _creation:
            locks = [_locks.setdefault(network, RLock()) for network in networks]
            locks = locks or [vars(self).setdefault("_lock", RLock())]
        modules = [module for network in networks for module in network.modules()]
        return partial(_turn, sorted(locks, key=id), modules, {"cpu", self.device.type})

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While inside, weights have no gradients, for which a forward would keep its activations."""
        trained = [one for network in self.networks.values() for one in network.parameters() if one.requires_grad]
        try:
            for weight in trained:
                weight.requires_grad_(False)
            yield
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    def differentiable(self) -> AbstractContextManager[None]:
        """While inside, `torch.func` can differentiate `predict`."""
        return nullcontext()

    def require_gradients(self, purpose: str) -> None:  # noqa: B027  # most networks have them
        """Raises ValueError, which names the purpose, if the network cannot be differentiated as it is at present."""

    def use_attention(self, backend: str) -> None:
        """Compute attention by a backend. Raises ValueError if there is no choice, or not this one."""
        raise ValueError(f"{self.name} has no choice of attention: leave it out")

    def performance_warnings(self) -> list[str]:
        """Fast paths that this network does not take and why, a line each."""
        return []


@contextmanager
def _turn(
    locks: Sequence[AbstractContextManager[Any]], modules: Sequence[nn.Module], devices: Iterable[str]
) -> Iterator[None]:
    """While inside: the locks, evaluation mode, no gradients, no autocast, float32 by default."""
    with ExitStack() as state:
        for lock in locks:  # in one order everywhere, so that no two threads wait for each other
            state.enter_context(lock)
        state.enter_context(torch.no_grad())
        if torch.get_default_dtype() != torch.float32:
            state.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        for device in devices:
            if torch.is_autocast_enabled(device):
                state.enter_context(torch.autocast(device, enabled=False))
        for module in modules:
            if module.training:
                state.callback(setattr, module, "training", True)
                module.training = False
        yield


class PromptedDenoiser:
    """A network with its conditions fixed, so that what depends on neither latent nor time-step is computed once."""

    def __init__(self, denoiser: Denoiser, condition: Condition) -> None:
        self.denoiser, self.condition = denoiser, condition

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        """The network's own output for each latent under the condition of its row, or of one row for all of them."""
        rows = torch.full((len(x_t),), rows, device=x_t.device) if isinstance(rows, int) else rows
        return self.denoiser.predict(x_t, timesteps, self.condition[rows])

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The outputs for each latent under two conditions: of its two rows, or of one pair of rows for all of them."""
        if isinstance(rows, tuple) or 2 * len(x_t) > self.denoiser.batch_size:  # two batches of the one size
            first, second = rows
            return self(x_t, timesteps, first), self(x_t, timesteps, second)
        outputs = self(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), rows.flatten())
        return outputs[: len(x_t)], outputs[len(x_t) :]


@dataclass(frozen=True)
class Layer:
    """A module of a network, and the (channels, height, width) of the feature map that it outputs."""

    module: nn.Module
    shape: tuple[int, int, int]


@runtime_checkable
class HasLayers(Protocol):
    """Feature maps by layer."""

    def layers(self) -> dict[str, Layer]:
        """The layers by their name in the module tree, in the forward's order."""
        ...


@runtime_checkable
class HasTokens(Protocol):
    """Known positions of the prompt's tokens in its encoding."""

    def tokens(self, prompt: str) -> Tokens:
        """What each position of a prompt's encoding stands for. Raises ValueError as `Denoiser.condition` does."""
        ...

    def zero_tokens(self, condition: Condition, places: Sequence[int]) -> Condition:
        """A condition whose encoding is zero at some positions."""
        ...


@runtime_checkable
class HasAttention(HasTokens, Protocol):
    """Accessible attention probabilities and their gradients."""

    def require_attention(self) -> None:
        """Raises ValueError if the attention is not accessible as the network is at present."""
        ...

    def with_attention_hook(
        self, condition: Condition, text: AttentionHook, image: AttentionHook | None = None
    ) -> PromptedDenoiser:
        """`with_prompts`, `text` being called in every cross-attention and `image` in every self-attention.

        Differentiable. Raises ValueError as `require_attention` does.
        """
        ...

    def with_text_attention_hook(self, prompts: Sequence[str], hook: AttentionHook) -> Condition:
        """`encode_prompts`, the hook being called in every self-attention of the text encoder. Differentiable.

        Raises ValueError if that attention is not accessible.
        """
        ...


@runtime_checkable
class Compiles(Protocol):
    """A network that `torch.compile` can speed up."""

    def compile(self) -> None:
        """Compile the network for batches of exactly `batch_size` latents that share a condition.

        Raises ValueError if it cannot be compiled.
        """
        ...


_EXPOSED = {HasLayers: "layers", HasTokens: "tokens", HasAttention: "attention"}


def require(denoiser: Denoiser, capability: type[C], purpose: str) -> C:
    """The denoiser, seen as one with a capability. Raises ValueError, which names the purpose, if it lacks it."""
    if not isinstance(denoiser, capability):
        raise ValueError(
            f"{denoiser.name} does not expose its {_EXPOSED[capability]}: {purpose} is not possible with it; "
            "use an explainer that only needs predictions, such as rise"
        )
    return denoiser
