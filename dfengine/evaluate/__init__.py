"""Whether explanations can be trusted, and what they say of many prompts."""

from dfengine.evaluate.checks import STEPS, Sanity, captions, lines, sanity
from dfengine.evaluate.concepts import Concepts, Measured, embedded_prompts, measure, summarise, table, with_concepts

__all__ = [
    "STEPS",
    "Concepts",
    "Measured",
    "Sanity",
    "captions",
    "embedded_prompts",
    "lines",
    "measure",
    "sanity",
    "summarise",
    "table",
    "with_concepts",
]
