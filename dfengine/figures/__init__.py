"""Pictures of explanations in the paper's forms."""

from dfengine.figures.animation import animate
from dfengine.figures.choosing import chosen_steps, concept_lines, telling_steps
from dfengine.figures.concepts import concepts
from dfengine.figures.every import Drawing, drawings, every
from dfengine.figures.forms import attention, check_name, draw, layers, relevance, save, save_both, strip
from dfengine.figures.games import ablation, comparison, curves
from dfengine.figures.parts import Figure as Figure
from dfengine.figures.parts import overlay
from dfengine.figures.recovery import recovery
from dfengine.figures.samples import samples, save_images

__all__ = [
    "Drawing",
    "ablation",
    "animate",
    "attention",
    "check_name",
    "chosen_steps",
    "comparison",
    "concept_lines",
    "concepts",
    "curves",
    "draw",
    "drawings",
    "every",
    "layers",
    "overlay",
    "recovery",
    "relevance",
    "samples",
    "save",
    "save_both",
    "save_images",
    "strip",
    "telling_steps",
]
