"""Checks annotations, including shapes, while the tests run. An int is accepted as a float.

jaxtyping's decorator checks every argument twice and compiles its checks when a function is defined. It is therefore
applied only to functions with arrays, whose shapes must agree with each other. Other functions get the decorator of
beartype, which is far cheaper, and nested functions, which are defined again at each call, get neither.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
_with_shapes = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Callable[..., Any]) -> Callable[[Any], Any]:
    """Replaces jaxtyping's function of this name, with which its import hook decorates every definition."""

    def decorate(decorated: Any) -> Any:
        if not inspect.isfunction(decorated):  # a class, whose fields are checked; a method of another kind
            return _with_shapes(decorated, typechecker=typechecker)
        if "<locals>" in decorated.__qualname__:
            return decorated
        annotations = decorated.__annotations__.values()
        if any(isinstance(annotation, str) or _has_array(annotation) for annotation in annotations):
            return _with_shapes(decorated, typechecker=typechecker)
        return typecheck(decorated)

    return decorate


def _has_array(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, AbstractArray):
        return True
    return any(_has_array(part) for part in getattr(annotation, "__args__", ()))


jaxtyping.jaxtyped = jaxtyped
