"""Explainers: each is its settings, and turns finished trajectories into a stream of maps."""

from dfengine.explain.base import Explainer, StepMap
from dfengine.explain.rise import Rise

__all__ = ["Explainer", "Rise", "StepMap"]
