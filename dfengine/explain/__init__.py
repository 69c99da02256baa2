"""Explainers: each is its settings, and turns finished trajectories into a stream of maps."""

from dfengine.explain.attention import Attention
from dfengine.explain.base import Contents, Explainer, StepMap
from dfengine.explain.cam import Cam
from dfengine.explain.lime import Lime
from dfengine.explain.random import Random
from dfengine.explain.relevance import Relevance
from dfengine.explain.rise import Rise
from dfengine.explain.settings import describe, rebuild, told_whole
from dfengine.explain.xdiffusion import ReleasedCam, ReleasedRise

__all__ = [
    "Attention",
    "Cam",
    "Contents",
    "Explainer",
    "Lime",
    "Random",
    "ReleasedCam",
    "ReleasedRise",
    "Relevance",
    "Rise",
    "StepMap",
    "describe",
    "rebuild",
    "told_whole",
]
