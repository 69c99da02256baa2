"""The methods of the paper's Tables 1 and 2, and those beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dfengine.explain import Attention, Cam, Explainer, Lime, Random, Relevance, Rise

#: AUC of deletion and of insertion: Tables 1 and 2.
PAPER = {
    "random": (0.6553, 0.6411),
    "lime": (0.5947, 0.6925),
    "rise": (0.8042, 0.5933),
    "cam": (0.7012, 0.5532),
    "rise-frechet": (0.6247, 0.6250),
    "rise-cosine": (0.6166, 0.5850),
    "rise-contrast": (0.6051, 0.7563),
    "rise-grid": (0.6553, 0.6397),
}
TABLES = {
    1: ("random", "lime", "rise", "cam"),
    2: ("rise", "rise-frechet", "rise-cosine", "rise-contrast", "rise-grid"),
}

#: What each of DF-RISE's methods changes.
_VARIATIONS: dict[str, dict[str, Any]] = {
    "rise": {},
    "rise-global": {"score": "global"},
    "rise-grid": {"masks": "rise"},
    "rise-frechet": {"similarity": "frechet", "score": "global"},
    **{
        f"rise-{kind}": {"similarity": kind}
        for kind in ("cosine", "contrast", "luminance", "contrast_structure", "ssim")
    },
}
_OTHERS: dict[str, Callable[[], Any]] = {
    "random": Random,
    "cam": Cam,
    "relevance": Relevance,
    "attention": Attention,
}
METHODS = ("lime", *_OTHERS, *_VARIATIONS)


def methods(names: Sequence[str], *, num_masks: int = 500, num_samples: int = 1000) -> list[Explainer]:
    """Explainers by their names here, each once. Raises ValueError for one that is not known."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"method {unknown[0]!r} is not known: expected one of {', '.join(METHODS)}")
    found: list[Explainer] = []
    for name in dict.fromkeys(names):
        if name in _VARIATIONS:
            found.append(Rise(num_masks, name=name, **_VARIATIONS[name]))
        else:
            found.append(Lime(num_samples) if name == "lime" else _OTHERS[name]())
    return found
