"""Figures of explanations, in the forms of the paper."""

from dfengine.figures.animation import animate
from dfengine.figures.concepts import concepts
from dfengine.figures.drawing import Drawing, draw_all
from dfengine.figures.forms import attention, check_name, draw, layers, relevance, save, save_both, strip
from dfengine.figures.games import ablation, comparison, curves
from dfengine.figures.panels import Figure as Figure
from dfengine.figures.panels import overlay
from dfengine.figures.recovery import recovery
from dfengine.figures.samples import samples, save_images
from dfengine.figures.selection import concept_lines

__all__ = [
    "Drawing",
    "ablation",
    "animate",
    "attention",
    "check_name",
    "comparison",
    "concept_lines",
    "concepts",
    "curves",
    "draw",
    "draw_all",
    "layers",
    "overlay",
    "recovery",
    "relevance",
    "samples",
    "save",
    "save_both",
    "save_images",
    "strip",
]
