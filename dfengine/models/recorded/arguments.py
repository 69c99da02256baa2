"""The arguments of a recorded forward, for another batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfengine.models.recorded.call import Forward

#: Arguments that all rows share though their first axis may be as long as the batch, unless they have three axes.
_SHARED = ("img_ids", "txt_ids", "image_rotary_emb", "rope", "position_ids")


def with_rows(forward: Forward, rows: Sequence[int]) -> dict[str, Any]:
    """The arguments for some of the rows, in this order and as often as they are named.

    Every tensor as long as the batch has a row each, in lists and dicts likewise; a list of tensors is a list of rows
    where the latents are one. Lists and dicts are new: networks take out what they have read.
    """
    _, latents = forward.inputs
    count, has_lists = len(latents), isinstance(latents, list)
    return {name: _select(value, rows, count, has_lists, name) for name, value in forward.arguments.items()}


def _select(value: Any, rows: Sequence[int], count: int, has_lists: bool, name: str) -> Any:
    if isinstance(value, Tensor):
        has_rows = value.ndim > 0 and len(value) == count and not (name in _SHARED and value.ndim < 3)
        return value[torch.tensor(rows, device=value.device)] if has_rows else value
    if isinstance(value, Mapping):
        return {key: _select(one, rows, count, has_lists, key) for key, one in value.items()}
    if isinstance(value, list):
        is_of_tensors = any(isinstance(one, Tensor) for one in value)
        if len(value) == count and (has_lists or not is_of_tensors):
            return [value[row] for row in rows]
    if isinstance(value, list | tuple):
        return type(value)(_select(one, rows, count, has_lists, name) for one in value)
    return value


def call(network: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """The network with arguments by name; *args and **kwargs of its forward are given as such."""
    named = dict(arguments)
    kinds = {one.kind: one.name for one in inspect.signature(network.forward).parameters.values()}
    positional = named.pop(kinds.get(inspect.Parameter.VAR_POSITIONAL, ""), ())
    named |= named.pop(kinds.get(inspect.Parameter.VAR_KEYWORD, ""), {})
    # Not as compiled in place, hooks included, which the measurements of an engine do not go together with.
    run = network if network._compiled_call_impl is None else network._call_impl
    return run(*positional, **named)
