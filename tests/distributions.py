"""A distribution of every form of masks."""

from dfkernels import MaskDistribution
from marks import soak

#: Pixels; smooth grids; overlapping cells of two sizes; a balanced design in tiles; one over all cells of two sizes.
NAMES = ("gaussian", "rise", "cells", "orthogonal", "pyramid")
#: Where the form of masks matters little, the newer ones are for `make soak`.
MOST = ("gaussian", "rise", *(soak(name) for name in NAMES[2:]))


def distribution(name: str, keep_probability: float = 0.5, grid: int = 8) -> MaskDistribution:
    """The distribution of a name; orthogonal designs keep half of the cells whatever the probability."""
    match name:
        case "gaussian" | "rise":
            return MaskDistribution(keep_probability, name, grid)
        case "cells":
            return MaskDistribution(keep_probability, cells=(3, 2), shifted=True)
        case "orthogonal":
            return MaskDistribution(design="orthogonal", block=16)
    return MaskDistribution(cells=(2, 4), shifted=True, design="orthogonal", block=128)
