"""The embedded world and the small diffusion model trained on it: see `weights/README.md`."""

from pathlib import Path

#: The diffusers pipeline folder of the embedded model.
FOLDER = Path(__file__).parent / "weights"

#: The guidance scale that its images look best at.
GUIDANCE = 2.0
