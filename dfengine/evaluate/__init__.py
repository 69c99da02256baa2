"""Whether explanations can be trusted, how faithful they are, and what they say of many prompts."""

from dfengine.evaluate.checks import STEPS, Sanity, captions, lines, sanity
from dfengine.evaluate.concepts import Concepts, Measured, embedded_prompts, measure, summarise, table, with_concepts
from dfengine.evaluate.distances import DISTANCES, FEWEST_IN_A_SET, NoFeatures
from dfengine.evaluate.faithfulness import (
    Faithfulness,
    faithfulness,
    faithfulness_table,
    item_curves,
    normalised,
)
from dfengine.evaluate.games import GAMES
from dfengine.evaluate.kept import Kept
from dfengine.evaluate.localisation import (
    GeneratedAreas,
    Localisation,
    Scene,
    best,
    localisation,
    localisation_table,
    scenes,
)
from dfengine.evaluate.methods import METHODS, TABLES, methods
from dfengine.evaluate.playing import Games, explained_step, features_of, games
from dfengine.evaluate.recovery import Recovery, check_world, recovery, recovery_table

__all__ = [
    "DISTANCES",
    "FEWEST_IN_A_SET",
    "GAMES",
    "METHODS",
    "STEPS",
    "TABLES",
    "Concepts",
    "Faithfulness",
    "Games",
    "GeneratedAreas",
    "Kept",
    "Localisation",
    "Measured",
    "NoFeatures",
    "Recovery",
    "Sanity",
    "Scene",
    "best",
    "captions",
    "check_world",
    "embedded_prompts",
    "explained_step",
    "faithfulness",
    "faithfulness_table",
    "features_of",
    "games",
    "item_curves",
    "lines",
    "localisation",
    "localisation_table",
    "measure",
    "methods",
    "normalised",
    "recovery",
    "recovery_table",
    "sanity",
    "scenes",
    "summarise",
    "table",
    "with_concepts",
]
