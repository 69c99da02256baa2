"""Break the code in small ways and expect a test to fail: `make mutants`.

Every *.toml here lists mutants: `old` occurs once in `file` and is replaced by `new`, in a copy of the tree, and
the named `test` must then fail. Survivors are printed, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What the tests need of the tree.
COPIED = ("dfengine", "kernels", "tests", "bench", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")


@dataclass(frozen=True)
class Mutant:
    """One change and the test that must notice it."""

    file: str
    old: str
    new: str
    test: str


def read_mutants(selected: list[str]) -> list[Mutant]:
    """The mutants of all lists. Exits if the text of one does not occur exactly once."""
    lists = sorted(Path(__file__).parent.glob("*.toml"))
    mutants = [Mutant(**one) for path in lists for one in tomllib.loads(path.read_text())["mutant"]]
    for mutant in mutants:
        if (count := (ROOT / mutant.file).read_text().count(mutant.old)) != 1:
            sys.exit(f"{mutant.file} has {mutant.old!r} {count} times, expected once: update the list of mutants")
    return [one for one in mutants if not selected or any(part in one.file for part in selected)]


def run(mutant: Mutant, tree: Path) -> tuple[int, str, float]:
    """The exit status, the output and the seconds of the mutant's test."""
    path, started = tree / mutant.file, time.monotonic()
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status, output = run_tests([mutant.test], tree)
    finally:
        path.write_text(source)
    return status, output, time.monotonic() - started


def run_tests(tests: list[str], tree: Path) -> tuple[int, str]:
    """The exit status and output of some tests of a tree, run in a fork of this process, which has torch."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.chdir(tree)
            sys.path[:0] = [str(tree / "tests"), str(tree), str(tree / "kernels")]
            os.environ["PYTHONPATH"] = f"{tree}:{tree / 'kernels'}"
            import pytest

            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", *tests])
            sys.stdout.flush()
            os._exit(int(status))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return status, output.read()


def main() -> None:
    """Run the mutants, and print and count the survivors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", help="only mutants of files whose name has this part")
    parser.add_argument("-n", "--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    mutants = read_mutants(options.files)
    os.environ["OMP_NUM_THREADS"], os.environ["JAXTYPING_DISABLE"], sys.dont_write_bytecode = "1", "1", True
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(worker) for worker in range(options.workers)]
        for tree in trees:
            tree.mkdir()
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, tree / name)
        status, output = run_tests(sorted({mutant.test for mutant in mutants}), trees[0])
        if status:
            sys.exit(f"the tests fail without any mutant:\n{output[-4000:]}")
        free = list(trees)

        def try_one(mutant: Mutant) -> tuple[Mutant, int, str, float]:
            tree = free.pop()
            try:
                return mutant, *run(mutant, tree)
            finally:
                free.append(tree)

        with ThreadPoolExecutor(options.workers) as pool:
            for mutant, status, output, seconds in pool.map(try_one, mutants):
                is_caught = status == 1 and "FAILED" in output  # not an error before the test
                print(
                    f"{'caught  ' if is_caught else 'SURVIVED'} {seconds:5.1f} s  {mutant.file}: {mutant.new.strip()!r}"
                )
                if not is_caught:
                    survivors.append((mutant, output))
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} mutants caught")
    for mutant, output in survivors:
        print(f"\n{mutant.file}: {mutant.old!r} → {mutant.new!r} passes {mutant.test}\n{output[-2000:]}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
