"""Diffusion models: loading, and the adapters that bring each family to the `Denoiser` convention."""

from dfengine.models.features import load_features
from dfengine.models.loading import adapt, load

__all__ = ["adapt", "load", "load_features"]
