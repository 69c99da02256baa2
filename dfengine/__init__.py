"""dfengine explains how diffusion models make images.

from dfengine import Engine, Rise

engine = Engine.from_pretrained("shapes")
result = engine.explain("a red circle above a blue square on a gray background", Rise(num_masks=256))
"""

from dfengine.engine import Engine
from dfengine.explain import Rise, StepMap
from dfengine.result import Result
from dfengine.schedule import exponential_timesteps
from dfengine.store import open
from dfengine.trajectory import Job

__all__ = ["Engine", "Job", "Result", "Rise", "StepMap", "exponential_timesteps", "open"]
