"""The methods of the paper's Tables 1 and 2, and the variations of DF-RISE beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import dfkernels

from dfengine.checks import mistake
from dfengine.explain import Explainer, registry

#: Areas under the deletion and the insertion curve, as printed in Tables 1 and 2.
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

#: What each variation of DF-RISE changes; identity and frozen are what maps are held against.
VARIATIONS: dict[str, dict[str, Any]] = {
    "rise-global": {"score": "global"},
    "rise-grid": {"mask_kind": "rise"},
    "rise-identity": {"baseline": "identity"},
    "rise-frozen": {"baseline": "frozen"},
    "rise-frechet": {"similarity": "frechet", "score": "global"},
    **{f"rise-{kind}": {"similarity": kind} for kind in dfkernels.SIMILARITIES if kind != "structure"},
}


def make_methods(
    methods: Iterable[str | Explainer],
    *,
    preset: str = "default",
    num_masks: int | None = None,
    num_samples: int | None = None,
) -> list[Explainer]:
    """Explainers by their names, each name once: registered ones and `VARIATIONS`; an explainer stands for itself.

    `num_masks` (DF-RISE) and `num_samples` (LIME) replace those of the preset. Raises ValueError for an unknown name.
    """
    counts = {"num_masks": num_masks, "num_samples": num_samples}
    given = {name: count for name, count in counts.items() if count is not None}
    explainers: list[Explainer] = []
    if isinstance(methods, Mapping) or not isinstance(methods, Iterable):
        raise mistake("methods", methods, "a list of names and explainers")
    for method in [methods] if isinstance(methods, str) else dict.fromkeys(methods):
        if isinstance(method, Explainer):
            explainers.append(method)
            continue
        entry = registry.entries().get("rise" if method in VARIATIONS else str(method))
        if entry is None or not isinstance(method, str):
            known = [*registry.entries(), *VARIATIONS]
            hint = registry.suggestion(method, known)
            raise ValueError(f"method {method!r} is not known: expected one of {', '.join(known)}{hint}")
        options = {option.name for option in entry.options}
        settings = {name: count for name, count in given.items() if name in options} | VARIATIONS.get(method, {})
        explainer: Any = registry.make(entry.name, preset=preset, **settings)
        explainers.append(dataclasses.replace(explainer, name=method))
    return explainers
