"""A UNet bound to prompts: what is made of them and of the time-steps once, and what two prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, PromptedDenoiser
from dfengine.models.unet import forward as fast
from dfengine.models.unet.cpu import Folded
from dfengine.models.unet.forward import KeysValues


class CachedUNet(PromptedDenoiser):
    """What is made of a prompt and of a time-step, made once; only the latents' own way is left."""

    def __init__(self, denoiser: Any, condition: Condition, forward: Any = None) -> None:
        """`forward` is `unet.forward` with attention of one's own, by default the denoiser's `run`."""
        super().__init__(denoiser, condition)
        added = {name: value for name, value in condition.tensors.items() if name != "text"}
        steps = torch.arange(denoiser.schedule.num_train_timesteps, device=denoiser.device)
        self._unet, self._dtype = denoiser.unet, denoiser.dtype
        self._run = denoiser.run if forward is None else partial(forward, denoiser.unet)
        self._times = fast.embed_times(denoiser.unet, steps)
        self._added = fast.embed_added(denoiser.unet, added)
        self._texts = fast.keys_values(denoiser.unet, condition.tensors["text"])
        on_cpu = denoiser.device.type == "cpu"
        # Scores are a product's results here: half precision would round them.
        self._folds = forward is None and on_cpu and denoiser.dtype == torch.float32
        self._kernels = fast.transposed(denoiser.unet) if on_cpu else []
        self._last: tuple[tuple[int, ...], list[fast.KeysValues | Folded]] | None = None

    def __call__(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], rows: Int[Tensor, " n"] | int
    ) -> Float[Tensor, "n c h w"]:
        return self._each(x_t, timesteps, rows if isinstance(rows, Tensor) else (rows,))

    def both(
        self,
        x_t: Float[Tensor, "n c h w"],
        timesteps: Shaped[Tensor, " n"],
        rows: Int[Tensor, "2 n"] | tuple[int, int],
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c h w"]]:
        """A latent is one until its prompts are read, in batches of half the size, if even. SDXL reads them at once."""
        if self._added is not None or self.denoiser.batch_size % 2:
            return super().both(x_t, timesteps, rows)
        outputs, half = [], self.denoiser.batch_size // 2
        for start in range(0, len(x_t), half):
            some = slice(start, start + half)
            whose = rows if isinstance(rows, tuple) else rows[:, some].flatten()
            outputs.append(self._each(x_t[some], timesteps[some].repeat(2), whose).unflatten(0, (2, -1)))
        first, second = torch.cat(outputs, dim=1)
        return first, second

    def _each(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " m"], rows: Int[Tensor, " m"] | tuple[int, ...]
    ) -> Float[Tensor, "m c h w"]:
        """All latents under the first prompt, then all of them under the next: one of each row, or a few for all."""
        x_t = x_t.to(self._dtype, memory_format=torch.channels_last)
        is_whole = not timesteps.is_floating_point()
        embedding = self._times[timesteps] if is_whole else fast.embed_times(self._unet, timesteps)
        texts: Sequence[KeysValues | Folded]
        if isinstance(rows, Tensor):
            texts = [(key[rows], value[rows]) for key, value in self._texts]
        else:
            texts = self._shared(rows)
        if self._added is not None:
            embedding = embedding + self._added[rows[0] if isinstance(rows, tuple) else rows]
        return self._run(x_t, embedding, texts, kernels=self._kernels)

    def _shared(self, rows: tuple[int, ...]) -> Sequence[KeysValues | Folded]:
        """What cross-attentions need of a few prompts, kept until others are asked for, but never for a gradient."""
        if self._last is not None and self._last[0] == rows and not torch.is_grad_enabled():
            return self._last[1]
        texts = [(_rows(key, rows), _rows(value, rows)) for key, value in self._texts]
        if torch.is_grad_enabled():
            return texts
        folded = fast.folded(self._unet, texts) if self._folds else [None] * len(texts)
        self._last = rows, [fold or pair for fold, pair in zip(folded, texts, strict=True)]
        return self._last[1]


def _rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows, of which the device needs not be told by a tensor."""
    return torch.stack([tensor[row] for row in rows])
