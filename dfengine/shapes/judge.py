"""The attribute network: says what a picture of the embedded world shows, and so whether it fits its caption.

"Red above blue" and "blue below red" are one picture, so the network reads places, not roles: the first shape
is the upper or left one. `read` turns a caption into the same form.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from dfengine.shapes.world import BACKGROUNDS, COLOURS, KINDS, Caption

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"

#: Each attribute with its values, in the order of the network's outputs.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "arrangement": ("single", "vertical", "horizontal"),
    "first colour": tuple(COLOURS),
    "first kind": KINDS,
    "second colour": tuple(COLOURS),
    "second kind": KINDS,
    "background": tuple(BACKGROUNDS),
}
#: Stands for "no such shape": the second shape of a single-subject caption has neither colour nor kind.
ABSENT = -1

_FEATURES = 96


class Judge(nn.Module):
    """A small convolutional classifier with one head an attribute."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, _FEATURES)
        stages = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.body = nn.Sequential(*stages, nn.Conv2d(_FEATURES, _FEATURES, 3, padding=1), nn.SiLU())
        self.mix = nn.Linear(_FEATURES * 16, _FEATURES)
        self.heads = nn.Linear(_FEATURES, sum(map(len, ATTRIBUTES.values())))

    def features(self, images: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "n 96"]:
        """A feature vector an image; `images` in [0, 1]."""
        return F.silu(self.mix(self.body(2 * images - 1).flatten(1)))

    def forward(self, images: Float[Tensor, "n 3 64 64"]) -> dict[str, Float[Tensor, "n values"]]:
        """Logits of every attribute; `images` in [0, 1]."""
        parts = self.heads(self.features(images)).split([len(values) for values in ATTRIBUTES.values()], dim=1)
        return dict(zip(ATTRIBUTES, parts, strict=True))

    @classmethod
    def load(cls) -> Judge:
        """The trained network that comes with the package."""
        judge = cls()
        judge.load_state_dict(load_file(WEIGHTS))
        return judge.eval().requires_grad_(False)

    @torch.no_grad()
    def agrees(self, images: Float[Tensor, "n 3 64 64"], captions: list[Caption]) -> Bool[Tensor, "n attributes"]:
        """Whether each image shows each attribute of its caption; an absent one counts as shown."""
        wanted = torch.tensor([read(caption) for caption in captions])
        shown = torch.stack([logits.argmax(1).cpu() for logits in self(images).values()], dim=1)
        return (shown == wanted) | (wanted == ABSENT)


def read(caption: Caption) -> list[int]:
    """The index of each attribute's value in a caption, in the order of ATTRIBUTES."""
    first, second, arrangement = caption.subject, caption.object, "single"
    if caption.relation is not None and second is not None:
        arrangement = "vertical" if caption.relation in ("above", "below") else "horizontal"
        if caption.relation in ("below", "right of"):
            first, second = second, first
    values = [arrangement, *first, *(second or (None, None)), caption.background]
    options = ATTRIBUTES.values()
    return [ABSENT if value is None else names.index(value) for value, names in zip(values, options, strict=True)]


def loss(logits: dict[str, Tensor], captions: list[Caption]) -> Float[Tensor, ""]:
    """Summed cross-entropy over the attributes that each caption has."""
    wanted: Int[Tensor, "n attributes"] = torch.tensor([read(caption) for caption in captions])
    terms = [
        F.cross_entropy(part, wanted[:, i].to(part.device), ignore_index=ABSENT)
        for i, part in enumerate(logits.values())
    ]
    return torch.stack(terms).sum()
