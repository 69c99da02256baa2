"""The paper's Tables 1 to 3 with their figures, ground truth, words, sanity and recovery: a function each, for a study.

    study = studies.games(engine, evaluate.captions(50), table=1)
    print(study.table())
    study.save("games")

Methods are explainers, or names: of registered explainers and of `evaluate.VARIATIONS` of DF-RISE. Named ones have the
settings of `preset`; `num_masks` (DF-RISE) and `num_samples` (LIME) replace the preset's. Only `sanity` has smaller
defaults, since it explains the same images again for each stage whose weights it randomises.
"""

from dfengine.studies.base import Study
from dfengine.studies.checks import (
    RecoveryStudy,
    SanityStudy,
    TruthStudy,
    WordsStudy,
    recovery,
    sanity,
    truth,
    words,
)
from dfengine.studies.faithfulness import GamesStudy, games
from dfengine.studies.relevance import SCHEDULES, ConceptsStudy, concepts

__all__ = [
    "SCHEDULES",
    "ConceptsStudy",
    "GamesStudy",
    "RecoveryStudy",
    "SanityStudy",
    "Study",
    "TruthStudy",
    "WordsStudy",
    "concepts",
    "games",
    "recovery",
    "sanity",
    "truth",
    "words",
]
