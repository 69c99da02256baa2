"""Pictures of explanations in the paper's forms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dfengine.result import Explanation

#: Perceptually uniform, and readable without colour.
COLOUR_MAP = "inferno"
#: How much of the heat map covers the picture beneath it.
OPACITY = 0.6


def chosen_steps(num_steps: int, count: int = 6) -> list[int]:
    """Up to `count` steps, spread evenly from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, num_steps - 1, min(count, num_steps))})


def strip(result: Explanation, method: str = "rise", steps: Sequence[int] | None = None) -> Figure:
    """Figure 7: the image, and for a row of steps the predicted x0 and the heat map over it.

    Raises ValueError for a map or step that the result does not have, or has not finished.
    """
    steps = chosen_steps(len(result.timesteps)) if steps is None else list(steps)
    heat = [result.heatmap(method, step) for step in steps]
    columns = len(steps) + 1
    figure = Figure(figsize=(1.5 * columns + 0.4, 3.9), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)

    axes[0, 0].imshow(result.image)
    axes[0, 0].set_title("image", fontsize=9)
    axes[1, 0].imshow(overlay(result.image, np.nanmean(heat, axis=0)))
    axes[1, 0].set_title("mean of these maps", fontsize=9)
    for column, (step, values) in enumerate(zip(steps, heat, strict=True), start=1):
        beneath = result.image if result.previews is None else result.previews[step]
        axes[0, column].imshow(beneath)
        axes[0, column].set_title(f"step {step + 1}, t = {result.timesteps[step]}", fontsize=9)
        axes[1, column].imshow(overlay(beneath, values))
    axes[0, 1].set_ylabel("predicted $x_0$" if result.previews is not None else "image", fontsize=9)
    axes[1, 1].set_ylabel(_label(result, method), fontsize=9)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), COLOUR_MAP)
    bar = figure.colorbar(scale, ax=axes[1, :], fraction=0.03, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["least", "most"], fontsize=8)
    model = result.model if len(result.model) <= 40 else "…" + result.model[-39:]
    figure.suptitle(f"“{result.prompt}”  ·  {model}, seed {result.seed}", fontsize=10)
    return figure


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """The heat map in colour over a grey version of the image, float [H, W, 3] in [0, 1]."""
    grey = (image / 255) @ np.array([0.299, 0.587, 0.114])
    colour = matplotlib.colormaps[COLOUR_MAP](heat)[..., :3]
    return (1 - OPACITY) * grey[..., None] + OPACITY * colour


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG, by the name's ending. Raises ValueError where it cannot."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}: expected .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {str(path.parent)!r} does not exist: make it first")
    figure.savefig(path, dpi=200)
    return path


def _label(result: Explanation, method: str) -> str:
    return f"{method}, {result.scores[method].shape[-1]} masks" if method in result.scores else method
