"""Ground truth in the embedded world: where the shapes of an image are, and how well a map finds them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from scipy import ndimage, stats
from torch import Tensor

from dfengine.shapes.judge import ATTRIBUTES, Judge, attribute_indices
from dfengine.shapes.world import BACKGROUNDS, COLOURS, SIZE, Caption

#: The true area of each target ("subject", "object" and "both") in an image.
Areas = Mapping[str, Bool[ndarray, "H W"]]

_PALETTE = COLOURS | BACKGROUNDS


def has_distinct_colours(caption: Caption) -> bool:
    """Whether subject and object can be distinguished by colour; True if there is no object."""
    return caption.object is None or caption.object[0] != caption.subject[0]


def largest_region(image: UInt8[ndarray, "H W 3"], colour: str) -> Bool[ndarray, "H W"]:
    """The largest connected region of the pixels whose nearest palette colour is the given one, possibly empty."""
    palette = np.array(list(_PALETTE.values()))
    distances = ((image[:, :, None] / 255 - palette) ** 2).sum(-1)
    regions, count = ndimage.label(distances.argmin(-1) == list(_PALETTE).index(colour))
    if not count:
        return np.zeros(image.shape[:2], dtype=bool)
    sizes = np.bincount(regions.ravel())[1:]
    return regions == sizes.argmax() + 1


class ConceptJudge:
    """Says which concepts of an embedded-world caption an image shows. Raises ValueError for another image size."""

    def __init__(self) -> None:
        self._judge = Judge.load()

    @staticmethod
    def _to_input(image: UInt8[ndarray, "H W 3"]) -> Float[Tensor, "1 3 H W"]:
        if image.shape != (SIZE, SIZE, 3):
            raise ValueError(f"an image of shape {image.shape} is not of the embedded world: use ({SIZE}, {SIZE}, 3)")
        return torch.from_numpy(image).permute(2, 0, 1)[None] / 255

    def agrees(self, image: UInt8[ndarray, "H W 3"], caption: Caption) -> bool:
        """Whether an image matches its caption in every attribute."""
        return bool(self._judge.agrees(self._to_input(image), [caption]).all())

    def areas(self, image: UInt8[ndarray, "H W 3"], caption: Caption) -> Areas | None:
        """The true areas of an image's shapes, found by their colours.

        None if the image does not match its caption, or the colours do not distinguish the shapes.
        """
        if not has_distinct_colours(caption) or not self.agrees(image, caption):
            return None
        shapes = [shape for shape in (caption.subject, caption.object) if shape is not None]
        masks = [largest_region(image, colour) for colour, _ in shapes]
        return to_areas(masks) if all(mask.any() for mask in masks) else None

    @torch.no_grad()
    def __call__(self, image: UInt8[ndarray, "H W 3"], caption: Caption) -> dict[str, bool]:
        """Whether subject and object appear, in colour and kind, and whether they stand in the caption's relation.

        The judge reads an image as an arrangement of a first (upper or left) and a second shape.
        """
        logits = self._judge(self._to_input(image))
        shown = dict(zip(ATTRIBUTES, (int(one.argmax()) for one in logits.values()), strict=True))
        expected = dict(zip(ATTRIBUTES, attribute_indices([caption])[0].tolist(), strict=True))
        places = ("first", "second") if caption.relation not in ("below", "right of") else ("second", "first")

        def shape(values: Mapping[str, int], place: str) -> tuple[int, int]:
            return values[f"{place} colour"], values[f"{place} kind"]

        # In an image of a single shape, the judge's heads for a second one are meaningless.
        is_single = ATTRIBUTES["arrangement"][shown["arrangement"]] == "single"
        shapes = [shape(shown, place) for place in (("first",) if is_single else ("first", "second"))]
        if caption.object is None:
            return {"subject": shapes[0] == shape(expected, "first")}
        subject, other = (shape(expected, place) for place in places)
        is_in_place = shape(shown, places[0]) == subject or shape(shown, places[1]) == other
        return {
            "subject": subject in shapes,
            "relation": shown["arrangement"] == expected["arrangement"] and is_in_place,
            "object": other in shapes,
        }


def to_areas(masks: list[Bool[ndarray, "H W"]]) -> Areas:
    """The areas of the subject's mask and, if there is one, the object's."""
    named = dict(zip(("subject", "object"), masks, strict=False))
    return named | {"both": np.any(masks, axis=0)}


# How well a map finds an area ----------------------------------------------------------------------------------------


def auroc(heat: Float[ndarray, "H W"], area: Bool[ndarray, "H W"]) -> float:
    """The probability that a pixel inside the area is hotter than one outside, ties counting half.

    NaN if the area is empty or covers the image.
    """
    inside, outside = heat[area], heat[~area]
    if not len(inside) or not len(outside):
        return float("nan")
    return float(stats.mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))


def top_k_iou(heat: Float[ndarray, "H W"], area: Bool[ndarray, "H W"]) -> float:
    """IoU of the area and the k hottest pixels, k the area's size; ties in pixel order. NaN if the area is empty."""
    if not area.any():
        return float("nan")
    hottest = np.zeros_like(area)
    hottest.flat[np.argsort(-heat, axis=None, kind="stable")[: int(area.sum())]] = True
    return float((hottest & area).sum() / (hottest | area).sum())


def pointing_hit(heat: Float[ndarray, "H W"], area: Bool[ndarray, "H W"]) -> bool:
    """The pointing game (Zhang et al. 2018): whether the hottest pixel, the first of equals, is in the area."""
    return bool(area.flat[int(heat.argmax())])
