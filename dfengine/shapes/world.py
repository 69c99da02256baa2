"""The embedded world: scenes of one or two coloured shapes, their captions and ground-truth masks.

Scenes are rendered from signed distances, so edges are anti-aliased and the mask of every concept is known exactly. All
functions are vectorised over scenes and depend on nothing but a seeded generator.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIZE = 64

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.65, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.98, 0.90, 0.10),
    "purple": (0.55, 0.10, 0.70),
    "orange": (1.00, 0.50, 0.00),
    "cyan": (0.10, 0.85, 0.90),
    "pink": (1.00, 0.55, 0.75),
}
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
    "gray": (0.5, 0.5, 0.5),
    "brown": (0.40, 0.26, 0.13),
}
RELATIONS = ("above", "below", "left of", "right of")

#: Offset (x, y) of the subject from the image's centre, in units of half the distance between the shapes.
_DIRECTIONS = torch.tensor([(0.0, -1.0), (0.0, 1.0), (-1.0, 0.0), (1.0, 0.0)])

#: One caption in this many is held out of training, to evaluate images of unseen combinations.
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Caption:
    """A subject, optionally its relation to an object, and a background."""

    subject: tuple[str, str]
    """(colour, kind)"""
    background: str
    relation: str | None = None
    object: tuple[str, str] | None = None

    def __str__(self) -> str:
        subject, background = _noun_phrase(self.subject), f"on a {self.background} background"
        if self.relation is None or self.object is None:
            return f"{subject} {background}"
        return f"{subject} {self.relation} {_noun_phrase(self.object)} {background}"

    @property
    def concepts(self) -> dict[str, str]:
        """The phrase in the caption for each of subject, background and, if present, relation and object."""
        phrases = {"subject": " ".join(self.subject), "background": f"{self.background} background"}
        if self.relation is not None and self.object is not None:
            phrases |= {"relation": self.relation, "object": " ".join(self.object)}
        return phrases

    @property
    def is_held_out(self) -> bool:
        """Whether the caption is held out of training, which a checksum of its text decides for one in twenty."""
        return zlib.crc32(str(self).encode()) % _HELD_OUT_ONE_IN == 0

    @classmethod
    def parse(cls, text: str) -> Caption:
        """The caption with this text. Raises ValueError if the text is not a caption of the embedded world."""
        match = _CAPTION.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(
                f"{text!r} is not a caption of the embedded world: expected the form "
                "'a red circle above a blue square on a gray background' or 'a red circle on a gray background'"
            )
        colour, kind, relation, object_colour, object_kind, background = match.groups()
        other = (object_colour, object_kind) if relation else None
        return cls((colour, kind), background, relation, other)


def _noun_phrase(shape: tuple[str, str]) -> str:
    colour, kind = shape
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


_SHAPE = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
_CAPTION = re.compile(rf"{_SHAPE}(?: ({'|'.join(RELATIONS)}) {_SHAPE})? on an? ({'|'.join(BACKGROUNDS)}) background")


def vocabulary() -> list[str]:
    """All words that captions use, in alphabetical order."""
    words = {"a", "an", "on", "background", *KINDS, *COLOURS, *BACKGROUNDS}
    return sorted(words.union(*(relation.split() for relation in RELATIONS)))


def alternatives() -> dict[str, tuple[str, ...]]:
    """For every colour, kind, relation and background the others, in their order from it on."""
    groups = (KINDS, tuple(COLOURS), tuple(BACKGROUNDS), RELATIONS, ("left", "right"))
    return {one: group[at + 1 :] + group[:at] for group in groups for at, one in enumerate(group)}


@dataclass(frozen=True)
class Scenes:
    """n scenes as index tensors; slot 0 is the subject, slot 1 the object (absent if the relation is −1)."""

    kind: Int[Tensor, "n 2"]
    colour: Int[Tensor, "n 2"]
    relation: Int[Tensor, " n"]
    background: Int[Tensor, " n"]
    centre: Float[Tensor, "n 2 2"]
    """(x, y) in pixels"""
    radius: Float[Tensor, "n 2"]
    """pixels"""

    def __len__(self) -> int:
        return len(self.relation)

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(**{name: value[rows] for name, value in vars(self).items() if name != "captions"})

    @cached_property
    def captions(self) -> list[Caption]:
        """The caption of each scene."""
        colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
        captions = []
        for kind, colour, relation, background in zip(
            self.kind.tolist(), self.colour.tolist(), self.relation.tolist(), self.background.tolist(), strict=True
        ):
            shapes = [(colours[c], KINDS[k]) for c, k in zip(colour, kind, strict=True)]
            if relation < 0:
                captions.append(Caption(shapes[0], backgrounds[background]))
            else:
                captions.append(Caption(shapes[0], backgrounds[background], RELATIONS[relation], shapes[1]))
        return captions


def sample_scenes(count: int, generator: torch.Generator, *, held_out: bool = False) -> Scenes:
    """`count` random scenes whose captions are in the training set, or held out of it.

    A quarter have a single subject. Two shapes never have both the same colour and the same kind.
    """
    parts: list[Scenes] = []
    missing = count
    while missing > 0:
        scenes = _sample_any(2 * missing * (_HELD_OUT_ONE_IN if held_out else 1), generator)
        same_shape = (scenes.kind[:, 0] == scenes.kind[:, 1]) & (scenes.colour[:, 0] == scenes.colour[:, 1])
        in_split = torch.tensor([caption.is_held_out == held_out for caption in scenes.captions])
        scenes = scenes[(in_split & ~(same_shape & (scenes.relation >= 0))).nonzero()[:missing, 0]]
        parts.append(scenes)
        missing -= len(scenes)
    return Scenes(**{name: torch.cat([vars(part)[name] for part in parts]) for name in Scenes.__dataclass_fields__})


def _sample_any(count: int, generator: torch.Generator) -> Scenes:
    def choose(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator)

    relation = torch.where(choose(4, count) == 0, -1, choose(len(RELATIONS), count))
    centre, radius = _layout(relation, generator)
    return Scenes(
        kind=choose(len(KINDS), count, 2),
        colour=choose(len(COLOURS), count, 2),
        relation=relation,
        background=choose(len(BACKGROUNDS), count),
        centre=centre,
        radius=radius,
    )


def _layout(relation: Int[Tensor, " n"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Centres [n, 2, 2] and radii [n, 2] in pixels, such that shapes are inside the image and do not touch."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    count = len(relation)
    single = (relation < 0)[:, None]
    radius = torch.where(single, uniform(14, 20, count, 2), uniform(11, 13.5, count, 2))
    half_distance = uniform(14.5, 17, count, 1)
    direction = _DIRECTIONS[relation.clamp(min=0)]
    offset = torch.where(single, 0.0, direction * half_distance)
    drift = torch.where(single, uniform(-8, 8, count, 2), uniform(-2, 2, count, 2))
    sideways = uniform(-6, 6, count, 2, 1) * direction.flip(-1).abs()[:, None]
    centre = SIZE / 2 + torch.stack([offset, -offset], dim=1) + drift[:, None]
    centre = centre + torch.where(single[..., None], 0.0, sideways)
    margin = radius[..., None] + 1
    return torch.minimum(torch.maximum(centre, margin), SIZE - margin), radius


def render(scenes: Scenes) -> tuple[Float[Tensor, "n 3 64 64"], Float[Tensor, "n 2 64 64"]]:
    """Images and the masks of subject and object, both in [0, 1]; the mask of an absent object is zero."""
    axis = torch.arange(SIZE, dtype=torch.float32) + 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    local = grid - scenes.centre[:, :, None, None]
    coverage = (0.5 - _signed_distance(local, scenes.kind, scenes.radius)).clamp(0, 1)
    coverage[:, 1] *= (scenes.relation >= 0)[:, None, None]

    palette = torch.tensor(list(COLOURS.values()))
    image = torch.tensor(list(BACKGROUNDS.values()))[scenes.background][:, :, None, None].expand(-1, 3, SIZE, SIZE)
    for slot in (1, 0):
        paint = palette[scenes.colour[:, slot]][:, :, None, None]
        image = torch.lerp(image, paint.expand_as(image), coverage[:, slot, None])
    return image, coverage


def _signed_distance(
    local: Float[Tensor, "n s h w 2"], kind: Int[Tensor, "n s"], radius: Float[Tensor, "n s"]
) -> Float[Tensor, "n s h w"]:
    """Distance in pixels to each shape's outline, negative inside; `local` are coordinates relative to its centre."""
    r = radius[..., None, None]
    x, y = local.unbind(-1)
    distance = local.norm(dim=-1)

    def box(half_width: Tensor, half_height: Tensor) -> Tensor:
        return torch.maximum(x.abs() - half_width, y.abs() - half_height)

    def star(points: int, inner: float) -> Tensor:
        # Fold the plane onto half a point of the star, where the outline is a line from the tip to the inner corner.
        wedge = torch.pi / points
        angle = torch.atan2(x, -y)
        folded = (torch.remainder(angle + wedge, 2 * wedge) - wedge).abs()
        corner = inner * torch.tensor([torch.pi / points]).cos(), inner * torch.tensor([torch.pi / points]).sin()
        normal_x, normal_y = corner[1], 1 - corner[0]
        length = (normal_x**2 + normal_y**2).sqrt()
        return ((distance * folded.cos() - r) * normal_x + distance * folded.sin() * normal_y) / length

    shapes = {
        "circle": distance - r,
        "square": box(0.85 * r, 0.85 * r),
        # A triangle is a star whose inner corners lie on its edges.
        "triangle": star(3, 0.5),
        "star": star(5, 0.42),
        "cross": torch.minimum(box(r, 0.34 * r), box(0.34 * r, r)),
        "ring": (distance - 0.74 * r).abs() - 0.26 * r,
    }
    stacked = torch.stack([shapes[name] for name in KINDS])
    return stacked.gather(0, kind[None, ..., None, None].expand(1, *stacked.shape[1:]))[0]
