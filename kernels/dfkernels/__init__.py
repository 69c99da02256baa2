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
from dfkernels.estimators import ESTIMATORS, Sums, estimate
from dfkernels.games import blur, ranks
from dfkernels.reference import MASK_KINDS, SCORES, SIMILARITIES

__all__ = [
    "ESTIMATORS",
    "MASK_KINDS",
    "SCORES",
    "SIMILARITIES",
    "Sums",
    "accumulate",
    "add",
    "apply_masks",
    "blur",
    "draw_masks",
    "estimate",
    "masks",
    "perturb",
    "philox",
    "random_uint32",
    "ranks",
    "ridge",
    "runs_fused",
    "similarity",
]
