"""A UNet with fixed prompts: keys, values and time-step embeddings computed once, and work that two prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, PromptedDenoiser
from dfengine.models.unet.forward import (
    TextInput,
    embed_added,
    embed_times,
    fold_attentions,
    keys_values,
    upsampling_kernels,
)


class CachedUNet(PromptedDenoiser):
    """Computes what depends only on the prompt or the time-step once, so that each call computes only the rest."""

    def __init__(self, denoiser: Any, condition: Condition, forward: Any = None) -> None:
        """`forward` is `unet.forward.forward` with hooked attention, by default the denoiser's `run`."""
        super().__init__(denoiser, condition)
        added = {name: value for name, value in condition.tensors.items() if name != "text"}
        steps = torch.arange(denoiser.schedule.num_train_timesteps, device=denoiser.device)
        self._unet, self._dtype = denoiser.unet, denoiser.dtype
        self._run = denoiser.run if forward is None else partial(forward, denoiser.unet)
        self._times = embed_times(denoiser.unet, steps)
        self._added = embed_added(denoiser.unet, added)
        self._texts = keys_values(denoiser.unet, condition.tensors["text"])
        is_cpu = denoiser.device.type == "cpu"
        # Folded attention stores its scores, which half precision would round.
        self._can_fold = forward is None and is_cpu and denoiser.dtype == torch.float32
        self._kernels = upsampling_kernels(denoiser.unet) if is_cpu else []
        self._last: tuple[tuple[int, ...], list[TextInput]] | None = None

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        return self._outputs(x_t, timesteps, rows if isinstance(rows, Tensor) else (rows,))

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """The outputs under two prompts, which share the layers before the first cross-attention.

        Not for SDXL, whose added condition enters at the first layer, nor if `batch_size` is odd.
        """
        if self._added is not None or self.denoiser.batch_size % 2:
            return super().both(x_t, timesteps, rows)
        outputs, half = [], self.denoiser.batch_size // 2
        for start in range(0, len(x_t), half):
            part = slice(start, start + half)
            part_rows = rows if isinstance(rows, tuple) else rows[:, part].flatten()
            output = self._outputs(x_t[part], timesteps[part].repeat(2), part_rows)
            outputs.append(output.unflatten(0, (2, -1)))
        first, second = torch.cat(outputs, dim=1)
        return first, second

    def _outputs(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " m"], rows: Int[Tensor, " m"] | tuple[int, ...]
    ) -> Float[Tensor, "m c h w"]:
        """The outputs for all latents under the first prompt, then for all under the next.

        `rows` has a prompt for each output, or is a tuple of prompts that all latents share.
        """
        x_t = x_t.to(self._dtype, memory_format=torch.channels_last)
        is_integer = not timesteps.is_floating_point()
        embedding = self._times[timesteps] if is_integer else embed_times(self._unet, timesteps)
        texts: Sequence[TextInput]
        if isinstance(rows, Tensor):
            texts = [(key[rows], value[rows]) for key, value in self._texts]
        else:
            texts = self._shared_texts(rows)
        if self._added is not None:
            embedding = embedding + self._added[rows[0] if isinstance(rows, tuple) else rows]
        return self._run(x_t, embedding, texts, kernels=self._kernels)

    def _shared_texts(self, rows: tuple[int, ...]) -> Sequence[TextInput]:
        """The input of every cross-attention for a few prompts; the last is cached unless gradients are recorded."""
        if self._last is not None and self._last[0] == rows and not torch.is_grad_enabled():
            return self._last[1]
        pairs = [(_stack_rows(key, rows), _stack_rows(value, rows)) for key, value in self._texts]
        if torch.is_grad_enabled():
            return pairs
        folded = fold_attentions(self._unet, pairs) if self._can_fold else [None] * len(pairs)
        self._last = rows, [fold or pair for fold, pair in zip(folded, pairs, strict=True)]
        return self._last[1]


def _stack_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """`tensor[rows]` without an index tensor, whose copy to the device would wait for it."""
    return torch.stack([tensor[row] for row in rows])
