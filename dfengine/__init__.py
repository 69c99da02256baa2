"""dfengine explains how diffusion models make images.

from dfengine import Engine, Rise

engine = Engine.from_pretrained("shapes")
result = engine.explain("a red circle above a blue square on a gray background", Rise(num_masks=256))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dfengine import evaluate as evaluate
    from dfengine import figures as figures
    from dfengine import prompts as prompts
    from dfengine import report as report
    from dfengine import store as store
    from dfengine import sweep as sweep
    from dfengine.engine import Engine, Finished, Generated
    from dfengine.explain import (
        Attention,
        Cam,
        Lime,
        Random,
        ReleasedCam,
        ReleasedLime,
        ReleasedRise,
        Relevance,
        Rise,
        StepMap,
    )
    from dfengine.models.scheduler import ExponentialDDIMScheduler
    from dfengine.schedule import exponential_timesteps
    from dfengine.shown import Result, open
    from dfengine.trajectory import Job

__all__ = [
    "Attention",
    "Cam",
    "Engine",
    "ExponentialDDIMScheduler",
    "Finished",
    "Generated",
    "Job",
    "Lime",
    "Random",
    "ReleasedCam",
    "ReleasedLime",
    "ReleasedRise",
    "Relevance",
    "Result",
    "Rise",
    "StepMap",
    "__version__",
    "exponential_timesteps",
    "open",
]

_HOMES = {
    "Attention": "explain",
    "Cam": "explain",
    "Engine": "engine",
    "ExponentialDDIMScheduler": "models.scheduler",
    "Finished": "engine",
    "Generated": "engine",
    "Job": "trajectory",
    "Lime": "explain",
    "Random": "explain",
    "ReleasedCam": "explain",
    "ReleasedLime": "explain",
    "ReleasedRise": "explain",
    "Relevance": "explain",
    "Result": "shown",
    "Rise": "explain",
    "StepMap": "explain",
    "exponential_timesteps": "schedule",
    "open": "shown",
}


#: Parts that the package has under its own name.
_ROOMS = ("evaluate", "figures", "prompts", "report", "store", "sweep")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `dfengine --help` need not wait for torch or matplotlib."""
    if name in _ROOMS:
        return import_module(f"dfengine.{name}")
    if name in _HOMES:
        return getattr(import_module(f"dfengine.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'dfengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
