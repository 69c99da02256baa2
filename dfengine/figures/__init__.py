"""Pictures of explanations in the paper's forms."""

from dfengine.figures.choosing import chosen_steps, concept_lines, telling_steps
from dfengine.figures.forms import attention, draw, layers, relevance, save, strip
from dfengine.figures.parts import overlay

__all__ = [
    "attention",
    "chosen_steps",
    "concept_lines",
    "draw",
    "layers",
    "overlay",
    "relevance",
    "save",
    "strip",
    "telling_steps",
]
