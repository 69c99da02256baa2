"""Explainers: each is its settings, and turns finished trajectories into a stream of maps."""

from dfengine.explain.base import Explainer, StepMap
from dfengine.explain.rise import Rise
from dfengine.explain.settings import describe, rebuild, told_whole

__all__ = ["Explainer", "Rise", "StepMap", "describe", "rebuild", "told_whole"]
