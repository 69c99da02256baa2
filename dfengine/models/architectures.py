"""The published architectures with random weights: how fast a model is does not depend on what it has learned.

`configs/` holds the configuration files that each model was published with, in the layout of a diffusers folder; any
other folder of such files is built in the same way. Nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import string
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CONFIGS = Path(__file__).parent / "configs"
#: Stable Diffusion 1.5, 2.1 (768 pixels, v-prediction) and XL base 1.0.
ARCHITECTURES = ("sd15", "sd21", "sdxl")
#: How many normal numbers all weights are cut from; a prime, so that the rows of a matrix begin at different ones.
_POOL = 1_000_003


def configuration(name: str) -> Path:
    """The folder of configuration files of one of `ARCHITECTURES`."""
    return _CONFIGS / name


def build(folder: Path, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A diffusers pipeline from a folder of its configuration files, its random weights made on the device.

    A weight is N(0, 1/fan-in), a norm's gain 1, a bias 0: activations stay within float16. The same seed is the same
    weights on every device, to the dtype's rounding. On the meta device nothing is allocated.
    Raises ValueError where the text encoder's vocabulary has no room for the tokenizer.
    """
    import diffusers

    index = _read(folder / "model_index.json")
    generator = torch.Generator("cpu").manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).to(device).repeat(2)
    settings: dict[str, Any] = {}
    for name, value in index.items():
        if not isinstance(value, list):
            settings |= {} if name.startswith("_") else {name: value}
        elif name in ("unet", "vae"):
            network = getattr(diffusers, value[1])
            settings[name] = _random(network.from_config, _read(folder / name / "config.json"), pool, dtype)
        elif name.startswith("text_encoder"):
            settings[name] = _text_encoder(value[1], folder / name, pool, dtype)
        elif name.startswith("tokenizer"):
            encoder = name.replace("tokenizer", "text_encoder")
            settings[name] = _tokenizer(folder / name, _read(folder / encoder / "config.json")["vocab_size"])
        elif name == "scheduler":
            settings[name] = getattr(diffusers, value[1]).from_config(_read(folder / name / "scheduler_config.json"))
        else:  # what judges or sees images is no part of the denoiser
            settings[name] = None
    return getattr(diffusers, index["_class_name"])(**settings)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _text_encoder(class_name: str, folder: Path, pool: Tensor, dtype: torch.dtype) -> nn.Module:
    import transformers

    network = getattr(transformers, class_name)
    return _random(network, network.config_class.from_dict(_read(folder / "config.json")), pool, dtype)


def _random(build_network: Any, config: Any, pool: Tensor, dtype: torch.dtype) -> nn.Module:
    """A network whose parameters are cut from the pool one after the other; they never exist elsewhere."""
    from accelerate import init_empty_weights

    with init_empty_weights():  # of parameters: buffers keep their values
        network = build_network(config)
    weights: dict[str, Tensor] = {}
    start = 0
    for name, parameter in network.named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=pool.device)
        if weight.ndim == 1:
            weight.fill_(name.endswith("weight"))
        else:
            scale = math.sqrt(len(weight) / weight.numel())
            for piece in weight.view(-1).split(_POOL):
                piece.copy_(pool[start : start + len(piece)] * scale)
            start = (start + weight.numel()) % _POOL
        weights[name] = weight
    network.load_state_dict(weights, assign=True)
    return network.to(pool.device).eval()


def _tokenizer(folder: Path, vocab_size: int) -> Any:
    """A CLIP tokenizer of the encoder's vocabulary size that knows every byte and merges pairs of letters.

    As in CLIP's own, "!" is 0 and the begin and end of a text have the two highest numbers. Its tokens are shorter than
    CLIP's (about two letters), so that fewer words fit in a prompt.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    room = vocab_size - len(tokens) - 2
    if room < 0:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too small for random weights: expected at least {len(tokens) + 2}"
        )
    letters = string.ascii_lowercase
    merges = [(a, b + end) for end in ("", "</w>") for a, b in product(letters, letters)][:room]
    tokens += [a + b for a, b in merges]
    tokens += [f"<|unused{i}|>" for i in range(room - len(merges))] + ["<|startoftext|>", "<|endoftext|>"]
    settings = _read(folder / "tokenizer_config.json")
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token=settings["pad_token"],
        model_max_length=settings["model_max_length"],
    )
