"""How fast an engine is on this device, where its time goes, and what the device could do."""

from dfengine.profile.measure import Profile, profile, write_trace
from dfengine.profile.table import format_profile

__all__ = ["Profile", "format_profile", "profile", "write_trace"]
