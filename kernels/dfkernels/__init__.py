"""The operations DF-RISE runs on: counter-based masks, similarity scores, running sums and the estimators of a map."""

from dfkernels.estimators import ESTIMATORS, Sums, accumulate, add, estimate, ridge
from dfkernels.reference import MASK_KINDS, SCORES, SIMILARITIES, blend, draw, masks, philox, similarity, words

__all__ = [
    "ESTIMATORS",
    "MASK_KINDS",
    "SCORES",
    "SIMILARITIES",
    "Sums",
    "accumulate",
    "add",
    "blend",
    "draw",
    "estimate",
    "masks",
    "philox",
    "ridge",
    "similarity",
    "words",
]
