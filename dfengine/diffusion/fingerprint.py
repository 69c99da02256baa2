"""A fingerprint of a network's weights, by which results of different weights are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Values of each tensor that are looked at one by one, besides the sums.
_NUM_SAMPLES = 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What changes a module's output without changing a weight: PEFT's choice of adapters and their scales, and FreeU's.
_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "s1", "s2", "b1", "b2")


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """16 hexadecimal digits that another parameter, stored buffer, adapter or scale of one changes.

    Of every tensor two sums of its bits, read as integers, and a few single values are hashed. The change of any one
    value changes them. Integers add up exactly in any order, so that every device and memory layout has the same
    fingerprint. All weights are read once, on their own device; of tensors without data there (offloaded ones) only
    name, type and shape count.
    """
    digest, values = hashlib.sha256(), list[Tensor]()
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if settings := {key: vars(part)[key] for key in _SETTINGS if key in vars(part)}:
                digest.update(f"{prefix}.{name} {settings}\n".encode())
            for path, tensor in _tensors(f"{prefix}.{name}", part):
                digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                if tensor.numel() and not tensor.is_meta:
                    values.append(_summary(tensor))
    for value in _to_host(values):
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and stored buffers; others, such as positions, are made anew when it is built."""
    own = {**module._parameters, **module._buffers}
    for key, value in own.items():
        if value is not None and key not in module._non_persistent_buffers_set:
            yield from _plain_tensors(f"{name}.{key}", value.detach())


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a tensor is made of: itself, unless it is a subclass such as those of quantisation."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _summary(tensor: Tensor) -> Tensor:
    """Sums of the bits as integers, modulo 2³², and some values, int64.

    The sum over all, and one weighted by the place along the first axis, which rows that are swapped change.
    """
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = real.view(_BITS[real.itemsize])
    places = torch.linspace(0, bits.numel() - 1, _NUM_SAMPLES, dtype=torch.float64, device=bits.device).long()
    rows = bits.reshape(1) if bits.ndim == 0 else bits
    if rows.ndim > 1:
        # A wider type than the bits' own is five times slower.
        rows = rows.sum(dim=list(range(1, rows.ndim)), dtype=torch.int64 if bits.itemsize == 8 else torch.int32)
    rows = rows.long()
    weighted = rows * torch.arange(1, len(rows) + 1, device=rows.device)
    return torch.cat([rows.sum()[None], weighted.sum()[None], bits.take(places).long()])


def _to_host(values: list[Tensor]) -> list[Tensor]:
    """The summaries on the CPU, in their order, by one copy from each device, since each waits for it."""
    copied: dict[int, Tensor] = {}
    for device in dict.fromkeys(value.device for value in values):
        places = [place for place, value in enumerate(values) if value.device == device]
        copied.update(zip(places, torch.stack([values[place] for place in places]).cpu(), strict=True))
    return [copied[place] for place in range(len(values))]
