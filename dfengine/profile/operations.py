"""A network's FLOPs and time by kind of operation: convolution, linear, attention and other."""

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
    """The kind of an operation or kernel, inferred from its name."""
    name = operation.lower()
    # A compiled kernel is named after all operations that it fuses; only a template (tem) computes the product itself.
    if name.startswith(("triton_", "cpp_fused")) and "_tem_" not in name:
        return "other"
    # Batched matrix products occur only in attention, over heads or prompts.
    if any(part in name for part in ("attention", "flash", "fmha", "softmax", "bmm")):
        return "attention"
    if "conv" in name:
        return "convolution"
    if any(part in name for part in ("mm", "linear", "matmul")):
        return "linear"
    return "other"


def flops_by_kind(forward: Callable[[], object]) -> dict[str, int]:
    """FLOPs (2 × multiply–adds) of one call by kind; element-wise operations are not counted."""
    cpu_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={cpu_attention: count}) as counter:
        forward()
    counted: Mapping[Any, int] = counter.get_flop_counts().get("Global", {})
    flops = dict.fromkeys(KINDS, 0)
    for operation, number in counted.items():
        flops[kind_of(str(operation))] += number
    return flops


@contextmanager
def profiled(device: torch.device) -> Iterator[torch.profiler.profile]:
    """torch's profiler on the CPU and the device, with the messages of its library to stderr suppressed."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        with torch.profiler.profile(activities=activities) as profiler:
            yield profiler
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def time_by_kind(forward: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Each kind of operation's share of the time of one call, measured on the GPU if `device` is one."""
    on_cuda = device.type == "cuda"
    with profiled(device) as profiler:
        forward()
    seconds = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            seconds[kind_of(event.key)] += event.self_device_time_total if on_cuda else event.self_cpu_time_total
    total = sum(seconds.values()) or 1.0
    return {kind: part / total for kind, part in seconds.items()}
