"""The diffusion process: the path (a, b), the denoiser's convention, guidance, and sampled trajectories."""
