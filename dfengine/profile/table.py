"""A profile in lines for a person."""

from __future__ import annotations

from collections.abc import Iterator

from dfengine.profile.measure import Profile
from dfengine.runtime.tuning import format_duration

#: Stages, as a person would name them.
_STAGES = {
    "network": "U-Net",
    "masks": "masks",
    "scores": "scores and sums",
    "maps": "maps, to the CPU",
    "rest": "the rest of the loop",
    "file": "file (another thread)",
}


def lines(found: Profile) -> Iterator[str]:
    """The table that `dfengine profile` prints."""
    how = "compiled" if found.compiled else "not compiled"
    ceiling = f"{found.share_of_ceiling:.0%} of a matrix product's {_number(found.ceiling_tflop_s)}"
    torch = found.versions["torch"]
    yield f"{found.model} on {found.device}"
    yield f"  {found.dtype}, batches of {found.batch_size}, {how}, attention {found.attention}, torch {torch}"
    yield ""
    yield f"  masks a second       {_number(found.masks_a_second)}"
    yield f"  TFLOP/s              {_number(found.tflop_s)}, {ceiling} here"
    yield f"  outside the U-Net    {found.outside_network:.1%} of the loop's time"
    yield f"  memory, at most      {found.peak_gib:.2f} GiB; a copy makes {found.copy_gb_s:.0f} GB/s"
    yield ""
    loop = 1 / found.masks_a_second
    yield "  where a mask's time goes       µs     share of the loop"
    for stage, seconds in found.seconds_a_mask.items():
        yield f"    {_STAGES[stage]:<22} {seconds * 1e6:>10.1f}   {seconds / loop:>8.1%}"
    yield ""
    yield "  the U-Net            GFLOP a mask   share of its time"
    for kind, share in found.network.items():
        yield f"    {kind:<18} {found.gflop_a_mask[kind]:>10.3f}   {share:>14.1%}"
    yield ""
    by_batch = any(point["peak_gib"] is not None for point in found.curve)
    yield f"  latents a forward    masks a second{'   memory, at most' * by_batch}"
    for point in found.curve:
        most = "" if point["peak_gib"] is None else f"   {point['peak_gib']:>12.2f} GiB"
        yield f"    {point['batch']:<18.0f} {_number(point['masks_a_second'] or 0):>10}{most}"
    yield ""
    job = found.job
    what = (
        f"{job['images']:.0f} image{'s' * (job['images'] != 1)} × {job['steps']:.0f} steps × {job['masks']:.0f} masks"
    )
    yield f"  {what}: about {format_duration(job['seconds'])}, a file of about {job['bytes'] / 1e6:,.1f} MB"
    for reason in found.missed:
        yield f"  could be faster: {reason}"


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
