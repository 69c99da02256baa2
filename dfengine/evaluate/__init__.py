"""Sanity checks, faithfulness games and ground truth: the parts that `dfengine.studies` makes tables of."""

from dfengine.evaluate.cache import GameCache, GameResult
from dfengine.evaluate.concepts import ConceptRecord, ConceptSummary, measure_concepts, summarise_concepts
from dfengine.evaluate.distances import DISTANCES, MIN_SET_SIZE, NoFeatures
from dfengine.evaluate.faithfulness import (
    Faithfulness,
    GameScore,
    check_distance,
    item_curves,
    min_max,
    summarise_games,
)
from dfengine.evaluate.games import GAMES, REFILLS, GameCurves
from dfengine.evaluate.intervals import Interval
from dfengine.evaluate.localisation import Localisation, Scene, measure_localisation, scenes
from dfengine.evaluate.methods import TABLES, VARIATIONS, make_methods
from dfengine.evaluate.playing import GamesRun, default_step, play_games, resolve_features
from dfengine.evaluate.prompts import captions, check_has_truth, embedded_prompts, with_concepts
from dfengine.evaluate.recovery import Recovery, measure_recovery
from dfengine.evaluate.sanity import Sanity, run_sanity_checks
from dfengine.evaluate.truth import ConceptJudge
from dfengine.evaluate.words import STANDARD, WordAgreement, measure_words, with_phrases

__all__ = [
    "DISTANCES",
    "GAMES",
    "MIN_SET_SIZE",
    "REFILLS",
    "STANDARD",
    "TABLES",
    "VARIATIONS",
    "ConceptJudge",
    "ConceptRecord",
    "ConceptSummary",
    "Faithfulness",
    "GameCache",
    "GameCurves",
    "GameResult",
    "GameScore",
    "GamesRun",
    "Interval",
    "Localisation",
    "NoFeatures",
    "Recovery",
    "Sanity",
    "Scene",
    "WordAgreement",
    "captions",
    "check_distance",
    "check_has_truth",
    "default_step",
    "embedded_prompts",
    "item_curves",
    "make_methods",
    "measure_concepts",
    "measure_localisation",
    "measure_recovery",
    "measure_words",
    "min_max",
    "play_games",
    "resolve_features",
    "run_sanity_checks",
    "scenes",
    "summarise_concepts",
    "summarise_games",
    "with_concepts",
    "with_phrases",
]
