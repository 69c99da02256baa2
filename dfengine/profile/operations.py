"""A network's work by kind of operation: convolution, linear, attention, and the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

KINDS = ("convolution", "linear", "attention", "other")


def kind_of(operation: str) -> str:
    """The kind of an operation or kernel, by its name."""
    name = operation.lower()
    # Compiled code is named after all that it fuses; only a template (tem) is the product itself.
    if name.startswith(("triton_", "cpp_fused")) and "_tem_" not in name:
        return "other"
    # Products of batches of matrices are keys or values of many prompts, or of many heads.
    if any(part in name for part in ("attention", "flash", "fmha", "softmax", "bmm")):
        return "attention"
    if "conv" in name:
        return "convolution"
    if any(part in name for part in ("mm", "linear", "matmul")):
        return "linear"
    return "other"


def flops_by_kind(forward: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations (2 × multiply–adds) of one call; additions and activations are not counted."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={cpu_attention: count}) as counter:
        forward()
    counted: Mapping[Any, int] = counter.get_flop_counts().get("Global", {})
    found = dict.fromkeys(KINDS, 0)
    for operation, number in counted.items():
        found[kind_of(str(operation))] += number
    return found


@contextmanager
def profiled(device: torch.device) -> Iterator[torch.profiler.profile]:
    """torch's profiler, of the device too, without what its library prints on stderr."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    sys.stderr.flush()
    screen = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            yield profiler
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def time_by_kind(forward: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of one call's time that each kind of operation takes, of the device's time where there is one."""
    on_gpu = device.type == "cuda"
    with profiled(device) as profiler:
        forward()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            seconds[kind_of(event.key)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(seconds.values()) or 1.0
    return {kind: part / total for kind, part in seconds.items()}
