"""The operations DF-RISE runs on: counter-based masks, similarity scores, running sums and the estimators of a map."""

from dfkernels.counters import philox, words
from dfkernels.dispatch import accumulate, add, blend, draw, erase, masks, ridge, runs_fused, similarity
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
    "blend",
    "blur",
    "draw",
    "erase",
    "estimate",
    "masks",
    "philox",
    "ranks",
    "ridge",
    "runs_fused",
    "similarity",
    "words",
]
