"""Which adapter brings a diffusers pipeline to the `Denoiser` convention. A model family is one file and one decorator.

    @adapter("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
    class StableDiffusion(Denoiser):
        def __init__(self, pipeline, *, name, batch_size=None, image_size=None, attention_backend="auto"): ...

All modules below `dfengine.models` are imported when an adapter is first requested, so that adding a file is enough. A
class outside dfengine is decorated in the same way, and takes precedence over the built-in adapter of its pipeline.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from dfengine.diffusion.denoiser import Denoiser

Adapter = TypeVar("Adapter", bound=type[Denoiser])

_ROOT, _NAME = Path(__file__).parent, "dfengine.models"

_adapters: dict[str, Callable[..., Denoiser]] = {}


def adapter(*pipeline_classes: str) -> Callable[[Adapter], Adapter]:
    """Register the decorated class for pipelines of these classes, named as in `_class_name` of model_index.json.

    It is called with the pipeline and, by name, `name` (recorded with results), `batch_size` and `image_size` ((height,
    width) in pixels), both None for the model's own, and `attention_backend`; it raises ValueError for what it cannot
    do. A class method `check_configurations` may do so before weights are read: it is called with the configurations
    (mappings) of the parts by name, and the scheduler.
    """

    def register(cls: Adapter) -> Adapter:
        is_builtin = cls.__module__.startswith(f"{_NAME}.")
        for pipeline_class in pipeline_classes:
            if not (is_builtin and pipeline_class in _adapters):
                _adapters[pipeline_class] = cls
        return cls

    return register


def adapter_of(pipeline: Any) -> Callable[..., Denoiser]:
    """The adapter of a pipeline, or of a pipeline class by its name: that of the class itself or its nearest base.

    Raises ValueError, naming all supported classes, if there is none.
    """
    _import_adapters()
    names = [pipeline] if isinstance(pipeline, str) else [base.__name__ for base in type(pipeline).__mro__]
    for name in names:
        if name in _adapters:
            return _adapters[name]
    given = names[0] if isinstance(pipeline, str) or hasattr(pipeline, "config") else repr(pipeline)
    raise ValueError(
        f"{given} is not supported: expected one of {', '.join(sorted(_adapters))}, or a class registered with "
        "dfengine.models.registry.adapter"
    )


@cache
def _import_adapters() -> None:
    """Import every module below `dfengine.models`, which registers their adapters."""
    for module in pkgutil.walk_packages([str(_ROOT)], f"{_NAME}."):
        import_module(module.name)
