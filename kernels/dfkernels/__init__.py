"""The operations DF-RISE runs on: counter-based masks, similarity scores, running sums and the estimators of a map."""

from dfkernels.estimators import Sums, accumulate, add, estimate, ridge
from dfkernels.reference import blend, draw, masks, philox, similarity, words

__all__ = [
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
