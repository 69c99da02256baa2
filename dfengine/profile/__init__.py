"""Where the time goes, against what the device could do."""

from dfengine.profile.measure import Profile, profile, trace
from dfengine.profile.table import lines

__all__ = ["Profile", "lines", "profile", "trace"]
