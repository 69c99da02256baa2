"""Any network of any pipeline, replayed from the arguments that a call was seen to give it."""

from dfengine.models.recorded.call import Call, from_plain, kept_steps, to_plain
from dfengine.models.recorded.denoiser import Recorded
from dfengine.models.recorded.recording import networks_of, recorded

__all__ = ["Call", "Recorded", "from_plain", "kept_steps", "networks_of", "recorded", "to_plain"]
