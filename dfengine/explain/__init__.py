"""Explainers: each is its settings, and turns finished trajectories into a stream of maps."""

from dfengine.explain.attention import Attention
from dfengine.explain.base import BEHAVIOURS, Contents, Explainer, StepMap, check_behaviour
from dfengine.explain.cam import Cam
from dfengine.explain.lime import Lime
from dfengine.explain.random import Random
from dfengine.explain.relevance import Relevance
from dfengine.explain.rise import Rise
from dfengine.explain.settings import EXPLAINERS, describe, rebuild, told_whole
from dfengine.explain.xdiffusion import ReleasedCam, ReleasedLime, ReleasedRise, as_released

__all__ = [
    "BEHAVIOURS",
    "EXPLAINERS",
    "Attention",
    "Cam",
    "Contents",
    "Explainer",
    "Lime",
    "Random",
    "ReleasedCam",
    "ReleasedLime",
    "ReleasedRise",
    "Relevance",
    "Rise",
    "StepMap",
    "as_released",
    "check_behaviour",
    "describe",
    "rebuild",
    "told_whole",
]
