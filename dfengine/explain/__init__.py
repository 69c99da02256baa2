"""Explainers: each is its settings, and turns finished trajectories into a stream of maps."""

from dfengine.explain.attention import Attention
from dfengine.explain.base import BEHAVIOURS, Explainer, OutputSpec, StepMap, check_behaviour
from dfengine.explain.cam import Cam
from dfengine.explain.lime import Lime
from dfengine.explain.random import Random
from dfengine.explain.registry import EXPLAINERS, describe, is_serializable, rebuild
from dfengine.explain.relevance import Relevance
from dfengine.explain.rise import Rise
from dfengine.explain.xdiffusion import XDiffusionCam, XDiffusionLime, XDiffusionRise, to_xdiffusion

__all__ = [
    "BEHAVIOURS",
    "EXPLAINERS",
    "Attention",
    "Cam",
    "Explainer",
    "Lime",
    "OutputSpec",
    "Random",
    "Relevance",
    "Rise",
    "StepMap",
    "XDiffusionCam",
    "XDiffusionLime",
    "XDiffusionRise",
    "check_behaviour",
    "describe",
    "is_serializable",
    "rebuild",
    "to_xdiffusion",
]
