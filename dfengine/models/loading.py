"""Load a model by name, or wrap a pipeline that is already loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from dfengine.diffusion.denoiser import Denoiser
from dfengine.models import architectures
from dfengine.models.registry import adapter_of

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INDEX = "model_index.json"


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
    """Load a diffusers pipeline from a folder or by its hub id, with diffusers' own `from_pretrained`.

    With `random_weights`, `model` is "sd15", "sd21", "sdxl" or a folder of which only the configuration files are read.
    The default device is the GPU if there is one; the default dtype is float16 on a GPU and float32 elsewhere. A hub id
    is looked up in the local cache before the network is used. `image_size` is (height, width) in pixels, by default
    the model's own. `attention` is "auto", "sdpa", "cudnn" or "xformers".

    Raises ValueError if the model is not found or not supported, a required package is missing, or an option cannot be
    satisfied on this machine.
    """
    for package in ("diffusers", "transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed but needed to load models: pip install {package}")
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    if revision and Path(model).expanduser().is_dir():
        raise ValueError(f"a folder has no revision: leave {revision!r} out")
    with quiet():
        if random_weights:
            if variant or revision:
                raise ValueError(f"random weights have no variant or revision: leave {variant or revision!r} out")
            pipeline, name = _build(model, device, dtype), f"{model} (random weights)"
        else:
            pipeline = _from_pretrained(locate(model), dtype=dtype, variant=variant, revision=revision)
            _check_complete(pipeline, model)
            pipeline.to(device)
            name = f"{model}{f'@{revision}' if revision else ''}{f' ({variant})' if variant else ''}"
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        return adapt(pipeline, name=name, batch_size=batch_size, image_size=image_size, attention=attention)


def _check_complete(pipeline: Any, model: str | Path) -> None:
    """Raise ValueError if a file of weights lacks some: diffusers leaves them without data."""
    for part, network in pipeline.components.items():
        state = network.state_dict() if isinstance(network, torch.nn.Module) else {}
        if missing := [name for name, value in state.items() if isinstance(value, torch.Tensor) and value.is_meta]:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"model {str(model)!r} could not be loaded: its {part} lacks the weights {missing[0]}{others}"
            )


def _build(model: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline with random weights, of a named architecture or a folder of configuration files.

    Raises ValueError for another name, an unsupported pipeline class, or unreadable files.
    """
    is_named = str(model) in architectures.ARCHITECTURES
    folder = architectures.configuration(str(model)) if is_named else Path(model).expanduser()
    index = folder / _INDEX
    if not index.is_file():
        names = ", ".join(architectures.ARCHITECTURES)
        raise ValueError(
            f"{str(model)!r} cannot have random weights: expected {names} or a diffusers folder, whose configuration "
            "files are read"
        )
    with in_one_line(f"model {str(model)!r} could not be built"):
        class_name = _class_name(index)
    adapter_of(class_name)
    with in_one_line(f"model {str(model)!r} could not be built"):
        return architectures.build(folder, device=device, dtype=dtype)


def _from_pretrained(source: str, *, dtype: torch.dtype, variant: str | None, revision: str | None) -> Any:
    """The pipeline of a folder or hub id. Raises ValueError for whatever goes wrong.

    Its class, and what the adapter can tell from the parts' configurations, are checked before any weights are read or
    downloaded.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    failure = f"model {source!r} could not be loaded"
    with in_one_line(failure):
        is_folder = Path(source).is_dir()
        index = Path(source) / _INDEX if is_folder else _local_first(hf_hub_download, source, _INDEX, revision=revision)
        class_name = _class_name(Path(index))
    adapter = adapter_of(class_name)
    if hasattr(adapter, "check_configurations"):
        adapter.check_configurations(_configurations(source, Path(index), revision))
    with in_one_line(failure):
        return _local_first(DiffusionPipeline.from_pretrained, source, dtype=dtype, variant=variant, revision=revision)


def _configurations(source: str, index: Path, revision: str | None) -> dict[str, Any]:
    """The configurations of a pipeline's networks by part, and its scheduler: all that can be read without weights."""
    import diffusers
    from huggingface_hub import hf_hub_download

    def read(part: str, name: str) -> dict[str, Any]:
        file = index.parent / part / name
        if not (file.exists() or Path(source).is_dir()):
            file = Path(_local_first(hf_hub_download, source, name, subfolder=part, revision=revision))
        return dict(json.loads(file.read_text()))

    found: dict[str, Any] = {}
    for part, kind in json.loads(index.read_text()).items():
        is_network = isinstance(kind, list) and len(kind) == 2 and kind[0] == "diffusers"
        cls = getattr(diffusers, str(kind[1]), None) if is_network else None
        if cls is not None:
            with contextlib.suppress(Exception):  # what is missing or damaged is reported by loading it
                config = read(part, cls.config_name)
                found[part] = cls.from_config(config) if part == "scheduler" else config
    return found


def _local_first(read: Any, source: str, *args: Any, **options: Any) -> Any:
    """The result of `read` on local files if they are complete, otherwise with the network."""
    try:
        return read(source, *args, local_files_only=True, **options)
    except Exception as error:  # the libraries raise a different one for each way to be incomplete
        if Path(source).is_dir():
            raise
        log.debug("requesting %s from the hub: %s", source, error)
    try:
        return read(source, *args, **options)
    except LocalEntryNotFoundError as error:  # what a failed connection ends in
        raise ValueError(
            f"the hub cannot be reached: download the model where it can (hf download {source} --local-dir FOLDER), "
            f"and name that folder as the model; {error.__cause__ or error}"
        ) from None


def _class_name(index: Path) -> str:
    """The pipeline class that a model_index.json names; for a custom pipeline it holds [module, class].

    Raises ValueError if it names none.
    """
    contents = json.loads(index.read_text())
    name = contents.get("_class_name") if isinstance(contents, dict) else None
    if isinstance(name, list) and name:
        name = name[-1]
    if not isinstance(name, str):
        raise ValueError(f"its {index.name} names no pipeline class (_class_name)")
    return name


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Convert every exception inside to a ValueError of one line.

    The libraries raise different exceptions for each kind of missing, truncated or incompatible file, and for each way
    a network can fail.
    """
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(str(error.__cause__ or error) or type(error).__name__, 300, placeholder=" …")
        raise ValueError(f"{what}: {reason}") from error


def locate(model: str | Path) -> str:
    """The folder of a model, or its hub id. Raises ValueError for a name that can be neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / _INDEX).is_file():
            raise ValueError(
                f"{str(model)!r} is a folder without model_index.json: expected a diffusers pipeline folder, as "
                "save_pretrained writes it"
            )
        return str(folder)
    parts = str(model).split("/")
    if folder.exists() or len(parts) > 2 or str(model).startswith((".", "/", "~")) or not all(parts):
        raise ValueError(
            f"there is no model at {str(model)!r}: expected a diffusers pipeline folder or a hub id such as "
            "'owner/name'"
        )
    if str(model) in architectures.ARCHITECTURES:
        raise ValueError(
            f"{str(model)!r} is an architecture without weights: pass a diffusers folder or a hub id, or add "
            "--random-weights (random_weights=True) to measure speed and memory only"
        )
    if len(parts) == 1:
        raise ValueError(
            f"model {str(model)!r} is not known: expected 'shapes' (the embedded model), a diffusers folder, a hub id "
            f"such as 'owner/name', or one of {', '.join(architectures.ARCHITECTURES)} with random weights"
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
    """The denoiser of a diffusers pipeline, by the adapter registered for its class.

    Raises ValueError for a class without an adapter, an image size the model cannot produce, or an attention backend
    that cannot run here.
    """
    adapter = adapter_of(pipeline)
    name = name or str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)
    return adapter(pipeline, name=name, batch_size=batch_size, image_size=image_size, attention_backend=attention)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The requested device, by default the GPU if there is one. Raises ValueError if it cannot be used."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {str(device)!r} cannot be used: expected cpu, cuda, cuda:0 … or mps") from None
    try:
        torch.zeros(1, device=picked).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from error
    return picked


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype, by default float16 on a GPU and float32 elsewhere. Raises ValueError for an unknown name."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' log messages and progress bars while a model loads."""
    import diffusers.utils.logging as diffusers_logging
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging, hub_logging)  # the hub's repeats each failed attempt
    levels = [(library, library.get_verbosity()) for library in libraries]
    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    try:
        for library, _ in levels:
            library.set_verbosity_error()
        for library in bars:
            library.disable_progress_bar()
        with warnings.catch_warnings():
            # Raised for outdated configurations, which diffusers corrects itself.
            warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
            yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()
