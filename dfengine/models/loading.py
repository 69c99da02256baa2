"""From a name to a denoiser: a diffusers folder, a hub id, or a pipeline that the caller already has."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dfengine.diffusion.denoiser import Denoiser
from dfengine.models import architectures
from dfengine.models.unet.stable_diffusion import StableDiffusion
from dfengine.models.unet.stable_diffusion_xl import StableDiffusionXL

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    model: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    image_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    attention: str = "auto",
) -> Denoiser:
    """Load a diffusers pipeline by folder or hub id through its own `from_pretrained`.

    With `random_weights`, build "sd15", "sd21" or "sdxl", or what a folder's configuration files describe, instead.
    The device is the GPU where there is one; the dtype float16 on a GPU and float32 elsewhere. A hub id is looked for
    among the files already here before the network is asked. `image_size` is (height, width) in pixels, by default the
    model's own. `attention` is one of "auto", "sdpa", "cudnn" and "xformers". Raises ValueError where there is no such
    model, or something of it is not to be had here.
    """
    for package in ("diffusers", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed, and models are loaded by it: pip install {package}")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    with quiet():
        if random_weights:
            if variant or revision:
                raise ValueError(f"random weights have no variant or revision: leave {variant or revision!r} out")
            pipeline, name = _build(model, device, dtype), f"{model} (random weights)"
        else:
            pipeline = _read(locate(model), dtype=dtype, variant=variant, revision=revision).to(device)
            name = f"{model}{f'@{revision}' if revision else ''}{f' ({variant})' if variant else ''}"
        return adapt(pipeline, name=name, batch_size=batch_size, image_size=image_size, attention=attention)


def _build(model: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of an architecture's name or a folder of configuration files, with random weights.

    Raises ValueError for any other name, for a kind that has no adapter, and for whatever is wrong with the files.
    """
    known = str(model) in architectures.ARCHITECTURES
    folder = architectures.configuration(str(model)) if known else Path(model).expanduser()
    index = folder / "model_index.json"
    if not index.is_file():
        names = ", ".join(architectures.ARCHITECTURES)
        raise ValueError(
            f"{str(model)!r} cannot have random weights: expected {names} or a diffusers folder, of which the "
            "configuration files are read"
        )
    with in_one_line(f"model {str(model)!r} could not be built"):
        kind = json.loads(index.read_text())["_class_name"]
    _family([kind])
    with in_one_line(f"model {str(model)!r} could not be built"):
        return architectures.build(folder, device=device, dtype=dtype)


def _read(source: str, **options: Any) -> Any:
    """The pipeline of a folder or hub id. Raises ValueError for whatever goes wrong."""
    from diffusers import DiffusionPipeline

    with in_one_line(f"model {source!r} could not be loaded"):
        if Path(source).is_dir():
            return DiffusionPipeline.from_pretrained(source, **options)
        try:
            return DiffusionPipeline.from_pretrained(source, local_files_only=True, **options)
        except Exception as error:  # not here, or not whole
            log.debug("the hub is asked for %s: %s", source, error)
            return DiffusionPipeline.from_pretrained(source, **options)


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Raise ValueError for whatever goes wrong inside.

    The libraries have an exception of its own for each file that is missing, cut short or of another version, and for
    each way that a network can fail.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error.__cause__ or error) or type(error).__name__, 300, placeholder=" …")
        raise ValueError(f"{what}: {reason}") from error


def locate(model: str | Path) -> str:
    """The folder of a model, or its hub id. Raises ValueError for a folder that is not a pipeline's."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"{str(model)!r} is a folder without model_index.json: expected a diffusers pipeline folder, as "
                "save_pretrained writes it"
            )
        return str(folder)
    parts = str(model).split("/")
    if folder.exists() or len(parts) > 2 or str(model).startswith((".", "/", "~")) or not all(parts):
        raise ValueError(
            f"there is no model at {str(model)!r}: expected a diffusers pipeline folder or a hub id as in 'owner/name'"
        )
    if str(model) in architectures.ARCHITECTURES:
        raise ValueError(
            f"{str(model)!r} is an architecture and has no weights of its own: name a diffusers folder or a hub id, or "
            "add --random-weights (random_weights=True) to measure it without"
        )
    if len(parts) == 1:
        raise ValueError(
            f"model {str(model)!r} is not known: expected 'shapes' (the embedded model), a diffusers folder, a hub id "
            f"as in 'owner/name', or one of {', '.join(architectures.ARCHITECTURES)} with random weights"
        )
    return str(model)


def adapt(
    pipeline: Any,
    *,
    name: str | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
    attention: str = "auto",
) -> Denoiser:
    """Wrap a diffusers pipeline; its Img2Img and Inpaint kinds are the same model.

    Raises ValueError for a kind that has no adapter, an image size that it cannot make, or an attention backend that
    cannot run here.
    """
    family = _family([kind.__name__ for kind in type(pipeline).__mro__])
    name = name or str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
    return family(pipeline, name=name, batch_size=batch_size, image_size=image_size, backend=attention)


def _family(kinds: Sequence[str]) -> type[StableDiffusion]:
    """The adapter for a pipeline, by the names of its class and of what that inherits. Raises ValueError for none."""
    for family in (StableDiffusion, StableDiffusionXL):
        if not {f"{family.__name__}{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint")}.isdisjoint(kinds):
            return family
    raise ValueError(
        f"{kinds[0]} is not supported: expected a StableDiffusionPipeline (Stable Diffusion 1.x, 2.x), a "
        "StableDiffusionXLPipeline, or the Img2Img or Inpaint pipeline of either"
    )


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else a GPU where there is one. Raises ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error
    return chosen


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, else float16 on a GPU and float32 elsewhere."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notes and progress bars off the user's screen while a model loads."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    levels = [(library, library.get_verbosity()) for library in (diffusers_logging, transformers_logging)]
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    try:
        for library, _ in levels:
            library.set_verbosity_error()
            library.disable_progress_bar()
        with warnings.catch_warnings():
            # Of configurations that diffusers corrects by itself.
            warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
            yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()
