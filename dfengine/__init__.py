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
    from dfengine.diffusion.job import Job
    from dfengine.diffusion.path import exponential_timesteps
    from dfengine.display import Result, open
    from dfengine.engine import Engine
    from dfengine.events import Finished, Generated
    from dfengine.explain import (
        Attention,
        Cam,
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
    "Relevance",
    "Result",
    "Rise",
    "StepMap",
    "XDiffusionCam",
    "XDiffusionLime",
    "XDiffusionRise",
    "__version__",
    "exponential_timesteps",
    "open",
]

_HOMES = {
    "Attention": "explain",
    "Cam": "explain",
    "Engine": "engine",
    "ExponentialDDIMScheduler": "models.scheduler",
    "Finished": "events",
    "Generated": "events",
    "Job": "diffusion.trajectory",
    "Lime": "explain",
    "Random": "explain",
    "XDiffusionCam": "explain",
    "XDiffusionLime": "explain",
    "XDiffusionRise": "explain",
    "Relevance": "explain",
    "Result": "display",
    "Rise": "explain",
    "StepMap": "explain",
    "exponential_timesteps": "diffusion.path",
    "open": "display",
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
