"""Whether explanations can be trusted, and what they say of many prompts."""

from dfengine.evaluate.checks import STEPS, Sanity, captions, lines, sanity
from dfengine.evaluate.concepts import Concepts, Measured, embedded_prompts, measure, summarise, table, with_concepts
from dfengine.evaluate.recovery import Recovery, check_world, recovery, recovery_table

__all__ = [
    "STEPS",
    "Concepts",
    "Measured",
    "Recovery",
    "Sanity",
    "captions",
    "check_world",
    "embedded_prompts",
    "lines",
    "measure",
    "recovery",
    "recovery_table",
    "sanity",
    "summarise",
    "table",
    "with_concepts",
]
