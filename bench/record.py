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
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        from dfengine.profile.clock import cpu_description  # not at the top: the kernels are measured without dfengine

        name = cpu_description()
    return {"commit": commit, "device": name, "torch": torch.__version__, "python": platform.python_version()}


def write(result: str, rows: Iterable[dict[str, Any]]) -> None:
    """Record rows as bench/results/<result>.json."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (ROOT / "bench/results" / f"{result}.json").write_text(f"[\n{lines}\n]\n")


def replace(result: str, rows: list[dict[str, Any]], key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Record rows beside those of bench/results/<result>.json whose key is another's; returns them all."""
    path = ROOT / "bench/results" / f"{result}.json"
    mine = {tuple(row[name] for name in key) for row in rows}
    others = json.loads(path.read_text()) if path.exists() else []
    every = [row for row in others if tuple(row[name] for name in key) not in mine] + rows
    write(result, every)
    return every


def place(table: str, readme: str, name: str) -> None:
    """Put a table between the markers of its name in a README, in place of what was there."""
    path, begin, end = ROOT / readme, f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = path.read_text().partition(begin)
    path.write_text(f"{before}{begin}{table}{end}{rest.partition(end)[2]}")
