"""For workers' processes in tests, which have this folder on their path: prompts that do harm when they are explained.

POISON is JSON: {"prompt": "raise" | "kill" | "hang" | "value" | "once:kill:FILE" ...}. An action after "once:" is done
the first time only, in whatever process, which leaves FILE behind.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

PLACE = "dfengine.explain.random"


def act(action: str) -> None:
    if action.startswith("once:"):
        _, action, file = action.split(":", 2)
        try:
            Path(file).touch(exist_ok=False)
        except FileExistsError:
            return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "hang":
        time.sleep(3600)
    if action == "value":
        raise ValueError("poisoned on purpose")
    if action == "raise":
        raise RuntimeError("poisoned on purpose")


def poison(module) -> None:
    """Have `Random.explain` look at prompts first."""
    actions, explain = json.loads(os.environ["POISON"]), module.Random.explain

    def poisoned(self, denoiser, trajectories, done=()):
        for trajectory in trajectories:
            act(actions.get(trajectory.job.prompt, ""))
        return explain(self, denoiser, trajectories, done)

    module.Random.explain = poisoned


class Poisoned(importlib.abc.MetaPathFinder):
    """Finds the module as others do, and poisons it."""

    def find_spec(self, name, path=None, target=None):
        if name != PLACE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            poison(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("POISON"):
    sys.meta_path.insert(0, Poisoned())
