"""Files of format version 1, presented in the terms of the current version.

Version 1 stored ᾱ as `schedule/alpha_bar` and whole time-steps, described methods without label and form, and had other
names for some settings. Such files are read, exported and merged, but not continued.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from dfengine.store.file.plan import Method, Plan

#: By current path: the path and type in a file of version 1, and the conversion of its values.
SCHEDULE: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "schedule/timestep": ("schedule/timestep", "i4", lambda timestep: timestep.astype(np.float64)),
    "schedule/signal": ("schedule/alpha_bar", "f8", lambda alpha_bar: np.sqrt(np.clip(alpha_bar, 0, 1))),
    "schedule/noise": ("schedule/alpha_bar", "f8", lambda alpha_bar: np.sqrt(1 - np.clip(alpha_bar, 0, 1))),
}

#: By the explainer's class: its current name, label and form.
_EXPLAINERS = {
    "Rise": ("Rise", "DF-RISE", "saliency"),
    "Cam": ("Cam", "DF-CAM", "layers"),
    "Relevance": ("Relevance", "relevance", "tokens"),
    "Attention": ("Attention", "attention", "words"),
    "Lime": ("Lime", "LIME", "saliency"),
    "Random": ("Random", "random", "saliency"),
    "ReleasedRise": ("XDiffusionRise", "DF-RISE (released code)", "saliency"),
    "ReleasedCam": ("XDiffusionCam", "DF-CAM (released code)", "layers"),
    "ReleasedLime": ("XDiffusionLime", "LIME (released code)", "saliency"),
}
#: By the explainer's class: settings that have a new name.
_SETTINGS = {
    "Rise": {"masks": "mask_kind"},
    "Cam": {"scale": "loss_scale"},
    "Relevance": {"scale": "loss_scale"},
    "ReleasedCam": {"scale": "loss_scale"},
}


def upgrade(plan: Plan) -> Plan:
    """The plan with the current names of explainers and settings, and with labels and forms."""
    return replace(plan, methods=tuple(_upgrade_method(method) for method in plan.methods))


def _upgrade_method(method: Method) -> Method:
    settings: dict[str, Any] = dict(method.settings)
    old_name = settings.get("explainer")
    if old_name not in _EXPLAINERS:
        return replace(method, form="layers" if method.has_layers else "")
    renamed = _SETTINGS.get(old_name, {})
    name, label, form = _EXPLAINERS[old_name]
    settings = {renamed.get(key, key): value for key, value in settings.items()} | {"explainer": name}
    return replace(method, settings=settings, label=label, form=form)
