"""The attribute network: classifies what an image of the embedded world shows, to compare it with a caption.

"Red above blue" and "blue below red" describe the same image, so the network orders shapes by position, not by role:
the first shape is the upper or left one. `attribute_indices` converts captions to the same form.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dfengine.shapes.world import BACKGROUNDS, COLOURS, KINDS, Caption

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"

#: The values of each attribute, in the order of the network's outputs.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "arrangement": ("single", "vertical", "horizontal"),
    "first colour": tuple(COLOURS),
    "first kind": KINDS,
    "second colour": tuple(COLOURS),
    "second kind": KINDS,
    "background": tuple(BACKGROUNDS),
}
#: The index of an attribute that a caption does not have: the colour and kind of a second shape.
ABSENT = -1

_FEATURES = 96


class Judge(nn.Module):
    """A small convolutional classifier with one head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, _FEATURES)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*stages, nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1), nn.SiLU())
        self.mix = nn.Linear(_FEATURES * 16, _FEATURES)
        self.heads = nn.Linear(_FEATURES, sum(map(len, ATTRIBUTES.values())))

    def features(self, images: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "n 96"]:
        """A feature vector per image; `images` in [0, 1]."""
        return F.silu(self.mix(self.body(2 * images - 1).flatten(1)))

    def forward(self, images: Float[Tensor, "n 3 64 64"]) -> dict[str, Float[Tensor, "n _"]]:
        """Logits of every attribute; `images` in [0, 1]."""
        return split_logits(self.heads(self.features(images)))

    @classmethod
    def load(cls) -> Judge:
        """The trained network included in the package."""
        judge = cls()
        judge.load_state_dict(load_file(WEIGHTS))
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def agrees(self, images: Float[Tensor, "n 3 64 64"], captions: list[Caption]) -> Bool[Tensor, "n attributes"]:
        """Whether each image shows each attribute of its caption; absent attributes count as shown."""
        target = attribute_indices(captions)
        predicted = torch.stack([logits.argmax(1).cpu() for logits in self(images).values()], dim=1)
        return (predicted == target) | (target == ABSENT)


def attribute_indices(captions: Sequence[Caption]) -> Int[Tensor, "n attributes"]:
    """The index of each caption's value of each attribute, in the order of ATTRIBUTES; ABSENT if it has none."""
    rows = []
    for caption in captions:
        first, second, arrangement = caption.subject, caption.object, "single"
        if caption.relation is not None and second is not None:
            arrangement = "vertical" if caption.relation in ("above", "below") else "horizontal"
            if caption.relation in ("below", "right of"):
                first, second = second, first
        values = [arrangement, *first, *(second or (None, None)), caption.background]
        options = ATTRIBUTES.values()
        rows.append([ABSENT if value is None else of.index(value) for value, of in zip(values, options, strict=True)])
    return torch.tensor(rows)


def split_logits(logits: Float[Tensor, "n all"]) -> dict[str, Float[Tensor, "n _"]]:
    """The logits of all attributes, split by attribute."""
    return dict(zip(ATTRIBUTES, logits.split([len(values) for values in ATTRIBUTES.values()], dim=1), strict=True))


def attribute_loss(logits: dict[str, Tensor], target: Int[Tensor, "n attributes"]) -> Float[Tensor, ""]:
    """The sum over attributes of the mean cross-entropy, without absent attributes."""
    is_present = target != ABSENT
    terms = [
        F.cross_entropy(part, target[:, i], ignore_index=ABSENT, reduction="sum") / is_present[:, i].sum().clamp(min=1)
        for i, part in enumerate(logits.values())
    ]
    return torch.stack(terms).sum()
