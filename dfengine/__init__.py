"""dfengine explains how diffusion models make images.

from dfengine import Engine, Rise

engine = Engine.from_pretrained("shapes")
result = engine.explain("a red circle above a blue square on a gray background", Rise(num_masks=256))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from dfengine import evaluate as evaluate
    from dfengine import figures as figures
    from dfengine import prompts as prompts
    from dfengine import report as report
    from dfengine import store as store
    from dfengine import studies as studies
    from dfengine import sweep as sweep
    from dfengine.diffusion.job import Job
    from dfengine.diffusion.path import exponential_timesteps
    from dfengine.display import Result as Result
    from dfengine.display import open as open
    from dfengine.engine import Engine
    from dfengine.events import Finished, Generated
    from dfengine.explain import (
        Attention,
        Cam,
        Counterfactual,
        Lime,
        Random,
        Relevance,
        Rise,
        StepMap,
        XDiffusionCam,
        XDiffusionLime,
        XDiffusionRise,
    )
    from dfengine.models.scheduler import ExponentialDDIMScheduler
    from dfengine.tracing import Trace, replay, trace

__all__ = [
    "Attention",
    "Cam",
    "Counterfactual",
    "Engine",
    "ExponentialDDIMScheduler",
    "Finished",
    "Generated",
    "Job",
    "Lime",
    "Random",
    "Relevance",
    "Result",
    "Rise",
    "StepMap",
    "Trace",
    "XDiffusionCam",
    "XDiffusionLime",
    "XDiffusionRise",
    "__version__",
    "exponential_timesteps",
    "replay",
    "trace",
]

#: Where the public names are defined; explainers are found through their registry. `open` is not in `__all__`, so that
#: a star import leaves the builtin alone.
_MODULES = {
    "Engine": "engine",
    "ExponentialDDIMScheduler": "models.scheduler",
    "Finished": "events",
    "Generated": "events",
    "Job": "diffusion.job",
    "Result": "display",
    "StepMap": "explain",
    "Trace": "tracing",
    "exponential_timesteps": "diffusion.path",
    "open": "display",
    "replay": "tracing",
    "trace": "tracing",
}

#: Subpackages that are attributes of the package without an import.
_SUBPACKAGES = ("evaluate", "figures", "prompts", "report", "store", "studies", "sweep")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `dfengine --help` need not wait for torch."""
    if name in _SUBPACKAGES:
        return import_module(f"dfengine.{name}")
    if name in _MODULES:
        return getattr(import_module(f"dfengine.{_MODULES[name]}"), name)
    if not name.startswith("_"):
        for entry in import_module("dfengine.explain.registry").entries().values():
            if entry.explainer.__name__ == name:
                return entry.explainer
    raise AttributeError(f"module 'dfengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, *_SUBPACKAGES})
