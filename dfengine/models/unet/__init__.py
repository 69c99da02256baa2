"""Adapters for U-Nets, and a forward pass that is faster than diffusers' own."""
