"""Every kernel compiled ahead of time, without a GPU: registers, shared memory, spills, width of memory accesses.

    python bench/kernels_compiled.py            # everything; records bench/results/kernels_compiled.json
    python bench/kernels_compiled.py --first --arch 80 90 120        # one configuration of each kernel; not recorded

Exits with status 1 and prints the configurations if one spills or truncates instead of rounding to bfloat16.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(record.ROOT / "kernels"))

ARCHITECTURES = (80, 86, 89, 90, 120)


def configurations(module: str) -> Sequence[Any]:
    return importlib.import_module(f"dfkernels.fused.{module}").configurations()


def compile_row(work: tuple[str, int], arch: int) -> record.Row:
    """The row of configuration work[1] of module work[0], compiled for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, number = work
    configuration = configurations(module)[number]
    kernel, types, constants = configuration.kernel, configuration.types, dict(configuration.constants)
    signature = {name: "constexpr" if name in constants else types[name].split(":")[0] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").endswith(":16")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": configuration.num_warps, "maxnreg": configuration.maxnreg}
    compiled = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump(compiled, "--dump-resource-usage"))
    if usage is None:
        raise RuntimeError(f"cuobjdump reported no resource usage of {kernel.__name__} for sm_{arch}")
    accesses = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\b[.\w]*)", cuobjdump(compiled, "--dump-sass")))
    return {
        "triton": triton.__version__,
        "module": module,
        "kernel": kernel.__name__.removeprefix("_"),
        "pointers": {
            name: type_.removeprefix("*").removesuffix(":16") for name, type_ in types.items() if type_.startswith("*")
        },
        "constants": constants,
        "arch": arch,
        "warps": configuration.num_warps,
        "registers": int(usage[1]),
        "stack": int(usage[2]),
        "spills": int(usage[3]) + accesses["LDL"] + accesses["STL"],
        "shared": compiled.metadata.shared,
        "loads": {name: count for name, count in sorted(accesses.items()) if name.startswith("LDG")},
        "stores": {name: count for name, count in sorted(accesses.items()) if name.startswith("STG")},
        "bf16_truncated": bool(re.search(r"cvt\.rz\.bf16", compiled.asm["ptx"])),
    }


def cuobjdump(compiled: Any, what: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def table(rows: Sequence[record.Row]) -> str:
    """One line for each kernel: its configurations, and the fewest and the most registers on each architecture."""
    archs = sorted({row["arch"] for row in rows})
    columns = ["kernel", "configurations", *(f"sm_{arch}" for arch in archs), "shared memory", "spills, stack"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for key in dict.fromkeys((row["module"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["module"], row["kernel"]) == key]
        cells = []
        for arch in archs:
            registers = [row["registers"] for row in mine if row["arch"] == arch]
            cells.append(f"{min(registers)}–{max(registers)}" if min(registers) < max(registers) else f"{registers[0]}")
        shared, lost = max(row["shared"] for row in mine), sum(row["spills"] + row["stack"] for row in mine)
        count = len(mine) // len(archs)
        lines.append(f"| `{key[1]}` | {count} | {' | '.join(cells)} | {shared} B | {lost or 'none'} |")
    return "\n".join(lines) + "\n"


def recorded_table(rows: Sequence[record.Row]) -> str:
    return f"{table(rows)}\nCompiled at commit `{rows[0]['commit']}` by Triton {rows[0]['triton']}.\n"


TABLES = {("kernels/README.md", "kernels_compiled"): recorded_table}


def main() -> None:
    """Compile, record and print."""
    os.environ.pop("TRITON_INTERPRET", None)  # it would turn the kernels into Python functions
    from dfkernels.fused import MODULES

    parser = record.parser(__doc__)
    parser.add_argument("--first", action="store_true", help="only the first configuration of each kernel")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--module", nargs="+", default=MODULES, choices=MODULES)
    options = parser.parse_args()
    is_complete = not options.first and tuple(options.arch) == ARCHITECTURES and options.module == MODULES
    recorder = record.Recorder("kernels_compiled", TABLES, record=is_complete and not options.no_record)

    work, seen = [], set()
    for module in options.module:
        for number, configuration in enumerate(configurations(module)):
            if not options.first or (module, configuration.kernel.__name__) not in seen:
                work.append((module, number))
            seen.add((module, configuration.kernel.__name__))
    rows = []
    with ProcessPoolExecutor() as pool:
        for arch in options.arch:
            compiled = pool.map(partial(compile_row, arch=arch), work)
            rows += [{"commit": recorder.commit} | row for row in compiled]
    print(table(rows), end="")
    bad = [row for row in rows if row["spills"] or row["stack"] or row["bf16_truncated"]]
    for row in bad:
        print(json.dumps(row, ensure_ascii=False))
    record.check(not bad, f"{len(bad)} configurations spill, use a stack or truncate to bfloat16")
    recorder.replace(rows)


if __name__ == "__main__":
    main()
