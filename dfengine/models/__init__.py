"""Adapters that bring families of diffusion models to the `Denoiser` convention, and their loading."""

from dfengine.models.features import load_features
from dfengine.models.loading import adapt, load

__all__ = ["adapt", "load", "load_features"]
