"""How to compile a kernel ahead of time, without a GPU; each module with kernels lists its configurations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel, as a launch would compile it.

    `types` maps runtime arguments to Triton types, as in Triton's `tools/compile.py`: "*fp16:16" is a pointer aligned
    to 16 bytes (torch's tensors are), "i32" any integer, "i32:16" a multiple of 16. `constants` maps `tl.constexpr`
    arguments to values. `maxnreg` limits the registers per thread. `make test` compiles only the first configuration
    that a module lists for a kernel.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    maxnreg: int | None = None
