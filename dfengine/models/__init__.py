"""Adapters that bring families of diffusion models to the `Denoiser` convention, and their loading."""

from dfengine.models.loading import adapt, load

__all__ = ["adapt", "load"]
