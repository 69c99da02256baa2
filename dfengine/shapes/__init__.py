"""The embedded world and the small diffusion model trained on it; see `weights/README.md`."""

from pathlib import Path

#: The diffusers pipeline folder of the embedded model.
FOLDER = Path(__file__).parent / "weights"

#: The embedded model's default guidance scale, which gives its best images.
GUIDANCE = 2.0
