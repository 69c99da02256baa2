"""Compile every kernel ahead of time, without a GPU: registers, shared memory, spills (none), width of accesses.

    python bench/kernels_compiled.py            # everything; writes the rows and the table in kernels/README.md
    python bench/kernels_compiled.py --first --arch 80 90 120        # one configuration of each kernel, nothing written

Exits with status 1 and prints the rows if a configuration spills or truncates instead of rounding to bfloat16.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
os.environ.pop("TRITON_INTERPRET", None)  # it would turn the kernels into Python functions

import record  # noqa: E402
import triton  # noqa: E402
from dfkernels.fused import MODULES  # noqa: E402
from dfkernels.fused.configuration import Configuration  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 120)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def configurations(module: str) -> list[Configuration]:
    return importlib.import_module(f"dfkernels.fused.{module}").configurations()


def compile_row(work: tuple[str, int], arch: int) -> dict[str, Any]:
    """The row of configuration work[1] of module work[0], compiled for an architecture."""
    module, number = work
    configuration = configurations(module)[number]
    kernel, types, constants = configuration.kernel, configuration.types, dict(configuration.constants)
    signature = {name: "constexpr" if name in constants else types[name].split(":")[0] for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types.get(name, "").endswith(":16")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": configuration.num_warps, "maxnreg": configuration.maxnreg}
    binary = triton.compile(source, GPUTarget("cuda", arch, 32), options)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump(binary, "--dump-resource-usage"))
    if usage is None:
        raise RuntimeError(f"cuobjdump reported no resource usage of {kernel.__name__} for sm_{arch}")
    accesses = Counter(re.findall(r"\b((?:LDG|STG|LDL|STL)\b[.\w]*)", cuobjdump(binary, "--dump-sass")))
    return {
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
        "shared": binary.metadata.shared,
        "loads": {name: count for name, count in sorted(accesses.items()) if name.startswith("LDG")},
        "stores": {name: count for name, count in sorted(accesses.items()) if name.startswith("STG")},
        "bf16_truncated": bool(re.search(r"cvt\.rz\.bf16", binary.asm["ptx"])),
    }


def cuobjdump(binary: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(rows: list[dict[str, Any]]) -> str:
    """One line per kernel: its number of configurations and the range of registers on each architecture."""
    archs = sorted({row["arch"] for row in rows})
    lines = [
        "| kernel | configurations | "
        + " | ".join(f"sm_{arch}" for arch in archs)
        + " | shared memory | spills, stack |",
        "|---" * (len(archs) + 4) + "|",
    ]
    for name in dict.fromkeys((row["module"], row["kernel"]) for row in rows):
        of_kernel = [row for row in rows if (row["module"], row["kernel"]) == name]
        cells = []
        for arch in archs:
            registers = [row["registers"] for row in of_kernel if row["arch"] == arch]
            cells.append(f"{min(registers)}–{max(registers)}" if min(registers) < max(registers) else f"{registers[0]}")
        shared = max(row["shared"] for row in of_kernel)
        spilled = sum(row["spills"] + row["stack"] for row in of_kernel)
        count = len(of_kernel) // len(archs)
        lines.append(f"| `{name[1]}` | {count} | {' | '.join(cells)} | {shared} B | {spilled or 'none'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", action="store_true", help="compile only the first configuration of each kernel")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--module", nargs="+", default=MODULES, choices=MODULES)
    arguments = parser.parse_args()

    work, seen = [], set()
    for module in arguments.module:
        for number, configuration in enumerate(configurations(module)):
            if not arguments.first or (module, configuration.kernel.__name__) not in seen:
                work.append((module, number))
            seen.add((module, configuration.kernel.__name__))
    rows = []
    with ProcessPoolExecutor() as pool:
        for arch in arguments.arch:
            rows += pool.map(partial(compile_row, arch=arch), work)
    print(table(rows), end="")
    bad = [row for row in rows if row["spills"] or row["stack"] or row["bf16_truncated"]]
    for row in bad:
        print(json.dumps(row, ensure_ascii=False))
    if not arguments.first and arguments.module == MODULES and not bad:
        record.write("kernels_compiled", ({"triton": triton.__version__, **row} for row in rows))
        record.place(table(rows), "kernels/README.md", "kernels_compiled")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
