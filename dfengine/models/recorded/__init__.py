"""Any network of any pipeline, replayed from the arguments that a call was seen to give it."""

from dfengine.models.recorded.denoiser import Recorded, kept_steps
from dfengine.models.recorded.recording import Call, from_plain, networks_of, recorded, to_plain

__all__ = ["Call", "Recorded", "from_plain", "kept_steps", "networks_of", "recorded", "to_plain"]
