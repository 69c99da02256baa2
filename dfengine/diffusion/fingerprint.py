"""A fingerprint of a network's weights, by which results of different weights are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

#: Values of each tensor that are looked at one by one, besides the sum of all.
_NUM_SAMPLES = 16
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: What changes a module's output without changing a weight: PEFT's choice of adapters and their scales, and FreeU's.
_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling", "s1", "s2", "b1", "b2")


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """16 hexadecimal digits that any change of a parameter, a buffer, an adapter or its scale changes.

    Of every tensor the sum of its bits, read as integers, and a few single values are hashed. Integers add up exactly
    in any order, so that every device and memory layout has the same fingerprint. All weights are read once, on their
    own device; of tensors without data there (offloaded ones) only name, type and shape count.
    """
    digest, values = hashlib.sha256(), []
    for prefix, module in modules.items():
        for name, part in module.named_modules():
            if settings := {key: vars(part)[key] for key in _SETTINGS if key in vars(part)}:
                digest.update(f"{prefix}.{name} {settings}\n".encode())
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            for part_name, plain in _plain_tensors(f"{prefix}.{name}", tensor.detach()):
                digest.update(f"{part_name} {plain.dtype} {tuple(plain.shape)}\n".encode())
                if plain.numel() and not plain.is_meta:
                    values.append(_summary(plain))
    for device in dict.fromkeys(value.device for value in values):  # one copy from each, since each waits for it
        digest.update(torch.cat([value for value in values if value.device == device]).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a tensor is made of: itself, unless it is a subclass such as those of quantisation."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


def _summary(tensor: Tensor) -> Tensor:
    """The sum of all bits as integers (modulo 2³², which any change of one changes too), and some values, int64."""
    bits = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).view(_BITS[tensor.itemsize])
    places = torch.linspace(0, bits.numel() - 1, _NUM_SAMPLES, dtype=torch.float64, device=bits.device).long()
    total = bits.sum(dtype=torch.int64 if tensor.itemsize == 8 else torch.int32)  # a wider type is five times slower
    return torch.cat([total[None].long(), bits.take(places).long()])
