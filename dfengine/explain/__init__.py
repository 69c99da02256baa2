"""Explainers: frozen settings that turn sampled trajectories into a stream of maps."""

from dfengine.explain.attention import Attention
from dfengine.explain.base import Explainer, OutputSpec, StepMap, option
from dfengine.explain.cam import Cam
from dfengine.explain.counterfactual import Counterfactual
from dfengine.explain.lime import Lime
from dfengine.explain.random import Random
from dfengine.explain.registry import describe, entries, entry_of, hot, is_serializable, make, rebuild, register
from dfengine.explain.relevance import Relevance
from dfengine.explain.rise import Rise
from dfengine.explain.steps import Steps, by_steps
from dfengine.explain.xdiffusion import XDiffusionCam, XDiffusionLime, XDiffusionRise

__all__ = [
    "Attention",
    "Cam",
    "Counterfactual",
    "Explainer",
    "Lime",
    "OutputSpec",
    "Random",
    "Relevance",
    "Rise",
    "StepMap",
    "Steps",
    "XDiffusionCam",
    "XDiffusionLime",
    "XDiffusionRise",
    "by_steps",
    "describe",
    "entries",
    "entry_of",
    "hot",
    "is_serializable",
    "make",
    "option",
    "rebuild",
    "register",
]
