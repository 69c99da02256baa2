"""What random masks are drawn from: kinds, cells, shifts and designs."""

import math
from dataclasses import dataclass, replace

from jaxtyping import Shaped
from torch import Tensor

#: "gaussian" is the paper's word for masks that threshold Gaussian noise. Their cells are independent Bernoulli(p).
MASK_KINDS = ("gaussian", "rise")
DESIGNS = ("iid", "orthogonal")
#: What a dropped pixel becomes.
FILLS = ("zero", "noise")

#: Sizes of cells that masks may have at once, and the largest: four of them fit into 32 bits.
MAX_LEVELS, MAX_CELL = 4, 127
#: Grids of shifted cells of one size.
NUM_SHIFTS = 2
#: Masks of one block of an orthogonal design, at most.
MAX_BLOCK = 2048
#: Errors under an orthogonal design come from the spread of so many randomisations, at least.
MIN_RANDOMISATIONS = 4


@dataclass(frozen=True)
class MaskDistribution:
    """What masks are drawn from. Raises ValueError if a setting is out of range, or settings exclude each other.

    `gaussian`: every cell is kept with probability p: M = 1[z > τ], z ~ N(0, 1), p = 1 − Φ(τ). A cell is a square of
    `cells` latent pixels a side; of several sizes (a pyramid), masks take turns. `shifted` grids are moved by half a
    cell along both axes every other time, so that cells of different masks overlap.

    `rise`: a grid × grid field of Bernoulli(p), upsampled and shifted (see `designs`); values in [0, 1], mean p.

    `iid`: masks are independent. `orthogonal`: in each block of `block` masks every cell is kept by exactly half of
    them, and every pair of cells of a tile of block/2 cells by exactly a quarter (see `designs`); gaussian, p = ½.
    """

    keep_probability: float = 0.5
    kind: str = "gaussian"
    grid: int = 8
    """cells a side of a rise mask"""
    cells: tuple[int, ...] = (1,)
    shifted: bool = False
    design: str = "iid"
    block: int = 2
    """masks in one randomisation of an orthogonal design: a power of two"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", (self.cells,) if isinstance(self.cells, int) else tuple(self.cells))
        if self.kind not in MASK_KINDS:
            raise ValueError(f"unknown mask kind {self.kind!r}: choose one of {', '.join(MASK_KINDS)}")
        if not 0 < self.keep_probability < 1:
            raise ValueError(f"keep_probability {self.keep_probability} is outside (0, 1): 0.5 keeps half")
        if self.grid < 1:
            raise ValueError(f"grid {self.grid} is not positive: give the cells per side, 1 or more (RISE uses 8)")
        if not 1 <= len(self.cells) <= MAX_LEVELS or not all(1 <= cell <= MAX_CELL for cell in self.cells):
            raise ValueError(
                f"cells {self.cells} are not possible: give 1 to {MAX_LEVELS} sizes of 1 to {MAX_CELL} latent pixels"
            )
        if self.design not in DESIGNS:
            raise ValueError(f"unknown design {self.design!r}: choose one of {', '.join(DESIGNS)}")
        if self.kind == "rise" and (self.design != "iid" or self.cells != (1,) or self.shifted):
            raise ValueError("rise masks have a grid of their own: cells and orthogonal designs are for gaussian ones")
        if self.design == "orthogonal":
            if self.keep_probability != 0.5:
                raise ValueError(f"an orthogonal design keeps half of the cells, not {self.keep_probability}: use iid")
            if not 2 <= self.block <= MAX_BLOCK or self.block & (self.block - 1):
                raise ValueError(f"block {self.block} is not a power of two from 2 to {MAX_BLOCK}")

    @property
    def threshold(self) -> int:
        """A random 32-bit integer below it keeps its cell; up to 2³² inclusive."""
        return round(self.keep_probability * 2**32)

    @property
    def packed_cells(self) -> int:
        """The sizes of cells in one number, 8 bits each."""
        return sum(cell << 8 * level for level, cell in enumerate(self.cells))

    @property
    def is_binary(self) -> bool:
        """Whether masks are 0 or 1 everywhere."""
        return self.kind == "gaussian"

    @property
    def randomisation(self) -> int:
        """Masks after which an orthogonal design begins anew, all sizes and shifts included; 0 without a design."""
        return self.block * self.num_grids if self.design == "orthogonal" else 0

    @property
    def num_grids(self) -> int:
        """Grids of cells, which masks (of an orthogonal design: blocks of them) have in turn."""
        return len(self.cells) * (NUM_SHIFTS if self.shifted and max(self.cells) > 1 else 1)

    def num_cells(self, shape: tuple[int, int], cell: int) -> tuple[int, int]:
        """Rows and columns of cells of one size."""
        return -(-shape[0] // cell), -(-shape[1] // cell)

    def field(self, shape: tuple[int, int]) -> tuple["MaskDistribution", tuple[int, int]]:
        """The distribution and the shape of the smallest fields that masks of a shape are made of by `to_pixels`.

        The cells' values where cells have one size and place, otherwise the masks themselves.
        """
        if len(self.cells) > 1 or self.shifted:
            return self, shape
        return replace(self, cells=(1,)), self.num_cells(shape, self.cells[0])

    def to_pixels(self, field: Shaped[Tensor, "*n a b"], shape: tuple[int, int]) -> Shaped[Tensor, "*n h w"]:
        """Each pixel's value of a field."""
        if field.shape[-2:] == shape:
            return field
        cell = self.cells[0]
        return field.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[..., : shape[0], : shape[1]]


PIXELS = MaskDistribution()


def orthogonal_block(num_masks: int, shape: tuple[int, int], distribution: MaskDistribution) -> int:
    """The `block` for so many masks: enough to tell all cells apart, or less, so that there are four randomisations."""
    most = 2 * max(math.prod(distribution.num_cells(shape, cell)) for cell in distribution.cells)
    affordable = max(2, min(MAX_BLOCK, num_masks // (MIN_RANDOMISATIONS * distribution.num_grids)))
    return min(1 << (most - 1).bit_length(), 1 << (affordable.bit_length() - 1))
