"""Where things truly are in a picture of the embedded world, and how well a map finds them."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage, stats

from dfengine.shapes.world import BACKGROUNDS, COLOURS, Caption

_PALETTE = COLOURS | BACKGROUNDS


def has_distinct_colours(caption: Caption) -> bool:
    """Whether the colours of a caption tell its subject and object apart."""
    return caption.object is None or caption.object[0] != caption.subject[0]


def area(image: UInt8[np.ndarray, "H W 3"], colour: str) -> Bool[np.ndarray, "H W"]:
    """The largest connected region of pixels whose nearest colour of the palette this is; empty where there is none."""
    palette = np.array(list(_PALETTE.values()))
    distances = ((image[:, :, None] / 255 - palette) ** 2).sum(-1)
    regions, count = ndimage.label(distances.argmin(-1) == list(_PALETTE).index(colour))
    if not count:
        return np.zeros(image.shape[:2], dtype=bool)
    sizes = np.bincount(regions.ravel())[1:]
    return regions == sizes.argmax() + 1


def auroc(heat: Float[np.ndarray, "H W"], true: Bool[np.ndarray, "H W"]) -> float:
    """The probability that a pixel of the true area is hotter than one outside, ties half; NaN where one is empty."""
    inside, outside = heat[true], heat[~true]
    if not len(inside) or not len(outside):
        return float("nan")
    return float(stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))


def overlap(heat: Float[np.ndarray, "H W"], true: Bool[np.ndarray, "H W"]) -> float:
    """IoU of an area with the hottest pixels, as many as it has (of equals the first); NaN where it is empty."""
    if not true.any():
        return float("nan")
    hottest = np.zeros_like(true)
    hottest.flat[np.argsort(-heat, axis=None, kind="stable")[: int(true.sum())]] = True
    return float((hottest & true).sum() / (hottest | true).sum())


def pointed_at(heat: Float[np.ndarray, "H W"], true: Bool[np.ndarray, "H W"]) -> bool:
    """The pointing game: whether the hottest pixel (of equals the first) is in an area."""
    return bool(true.flat[int(heat.argmax())])
