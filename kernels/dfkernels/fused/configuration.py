"""What a kernel is compiled for ahead of time, with no GPU at hand: each module beside this lists its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """One way to compile a kernel, as a launch would.

    `types` gives each runtime argument its Triton type, as in triton's own `tools/compile.py`: "*fp16:16" is a pointer
    that is a multiple of 16 bytes (as torch's are), "i32" any integer, "i32:16" a multiple of 16. `constants` gives the
    `tl.constexpr` arguments; `maxnreg` is the most registers a thread, where a launch says so. The first configuration
    of a kernel that a module lists is the one that `make test` compiles.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    maxnreg: int | None = None
