"""A profile as a table of text."""

from __future__ import annotations

from collections.abc import Iterator

from dfengine.profile.measure import Profile
from dfengine.runtime.tuning import format_duration

#: Row labels of the stages.
_STAGES = {
    "network": "network",
    "masks": "masks",
    "scores": "scores and sums",
    "maps": "maps and their copies",
    "rest": "rest of the loop",
    "file": "file (separate thread)",
}


def format_profile(profile: Profile) -> Iterator[str]:
    """The lines of the table that `dfengine profile` prints."""
    compiled = "compiled" if profile.compiled else "not compiled"
    ceiling = f"{profile.share_of_ceiling:.0%} of the {_number(profile.ceiling_tflop_s)} of a matrix product"
    versions = f"torch {profile.versions['torch']}"
    yield f"{profile.model} on {profile.device}"
    yield f"  {profile.dtype}, batch size {profile.batch_size}, {compiled}, {profile.attention} attention, {versions}"
    yield ""
    yield f"  masks per second     {_number(profile.masks_per_second)}"
    yield f"  TFLOP/s              {_number(profile.tflop_s)}, {ceiling}"
    yield f"  outside the network  {profile.outside_network:.1%} of the loop's time"
    yield f"  peak memory          {profile.peak_gib:.2f} GiB; copies at {profile.copy_gb_s:.0f} GB/s"
    yield ""
    loop = 1 / profile.masks_per_second
    yield "  time per mask                  µs     share of the loop"
    for stage, seconds in profile.seconds_per_mask.items():
        yield f"    {_STAGES[stage]:<22} {seconds * 1e6:>10.1f}   {seconds / loop:>8.1%}"
    yield ""
    yield "  network            GFLOP per mask   share of its time"
    for kind, share in profile.network_shares.items():
        yield f"    {kind:<18} {profile.gflop_per_mask[kind]:>10.3f}   {share:>14.1%}"
    yield ""
    has_memory = any(point["peak_gib"] is not None for point in profile.curve)
    yield f"  latents per forward  masks per second{'   peak memory' * has_memory}"
    for point in profile.curve:
        memory = "" if point["peak_gib"] is None else f"   {point['peak_gib']:>7.2f} GiB"
        yield f"    {point['batch']:<18.0f} {_number(point['masks_per_second'] or 0):>14}{memory}"
    yield ""
    job = profile.job
    size = (
        f"{job['images']:.0f} image{'s' * (job['images'] != 1)} × {job['steps']:.0f} steps × {job['masks']:.0f} masks"
    )
    yield f"  {size}: about {format_duration(job['seconds'])}, a file of about {job['bytes'] / 1e6:,.1f} MB"
    for suggestion in profile.suggestions:
        yield f"  could be faster: {suggestion}"


def _number(value: float) -> str:
    """A number with three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
