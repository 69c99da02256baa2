"""What every recorded row carries, and where its table goes."""

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def environment(device: torch.device) -> dict[str, str]:
    """The commit, device and versions that a row was measured with."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"commit": commit, "device": name, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The processor's name, and how many threads torch uses of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, threads: {torch.get_num_threads()}"


def write(result: str, rows: Iterable[dict[str, Any]]) -> None:
    """Record rows as bench/results/<result>.json."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (ROOT / "bench/results" / f"{result}.json").write_text(f"[\n{lines}\n]\n")


def place(table: str, readme: str, name: str) -> None:
    """Put a table between the markers of its name in a README, in place of what was there."""
    path, begin, end = ROOT / readme, f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = path.read_text().partition(begin)
    path.write_text(f"{before}{begin}{table}{end}{rest.partition(end)[2]}")
