"""Adapters that bring families of diffusion models to the `Denoiser` convention, and their loading."""

from dfengine.models.loading import adapt, load
from dfengine.models.vision import load_features

__all__ = ["adapt", "load", "load_features"]
