"""The operations DF-RISE is built on: counter-based masks, similarity scores, running sums and map estimators."""

from dfkernels.counters import philox, random_uint32
from dfkernels.dispatch import (
    accumulate,
    add,
    apply_masks,
    draw_masks,
    masks,
    perturb,
    ridge,
    runs_fused,
    similarity,
)
from dfkernels.distribution import DESIGNS, FILLS, MASK_KINDS, MaskDistribution, orthogonal_block
from dfkernels.estimators import ESTIMATORS, Sums, estimate
from dfkernels.games import blur, ranks
from dfkernels.reference import SCORES, SIMILARITIES

__all__ = [
    "DESIGNS",
    "ESTIMATORS",
    "FILLS",
    "MASK_KINDS",
    "SCORES",
    "SIMILARITIES",
    "MaskDistribution",
    "Sums",
    "accumulate",
    "add",
    "apply_masks",
    "blur",
    "draw_masks",
    "estimate",
    "masks",
    "orthogonal_block",
    "perturb",
    "philox",
    "random_uint32",
    "ranks",
    "ridge",
    "runs_fused",
    "similarity",
]
