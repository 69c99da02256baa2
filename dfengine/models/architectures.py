"""Published architectures with random weights, to measure speed and memory, which do not depend on the weights.

`configs/` holds the configuration files that each model was published with, in the layout of a diffusers folder. Any
other folder of such files can be built, too. Nothing is downloaded.
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
#: Size of the pool of normal numbers from which all weights are taken; a prime, so that the rows of a matrix start at
#: different numbers.
_POOL = 1_000_003


def configuration(name: str) -> Path:
    """The folder of configuration files of one of `ARCHITECTURES`."""
    return _CONFIGS / name


def build(folder: Path, *, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A diffusers pipeline from a folder of its configuration files, with random weights created on the device.

    Weights are N(0, 1/fan-in), gains of norms 1, biases 0, so that activations stay within float16. A seed gives the
    same weights on every device, up to the dtype's rounding. On the meta device nothing is allocated.
    Raises ValueError if the text encoder's vocabulary is too small for the tokenizer.
    """
    import diffusers

    index = _read(folder / "model_index.json")
    generator = torch.Generator("cpu").manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator).to(device).repeat(2)
    components: dict[str, Any] = {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(value, list):
            components[name] = value  # a setting of the pipeline
        elif name.startswith("text_encoder"):
            components[name] = _text_encoder(value[1], folder / name, pool, dtype)
        elif name.startswith("tokenizer"):
            encoder = name.replace("tokenizer", "text_encoder")
            components[name] = _tokenizer(folder / name, _read(folder / encoder / "config.json")["vocab_size"])
        elif name == "scheduler":
            components[name] = getattr(diffusers, value[1]).from_config(_read(folder / name / "scheduler_config.json"))
        elif value[0] == "diffusers":
            network = getattr(diffusers, value[1])
            components[name] = _random(network.from_config, _read(folder / name / "config.json"), pool, dtype)
        else:  # safety checkers and image encoders are not part of the denoiser
            components[name] = None
    name = index["_class_name"]  # of a custom pipeline [module, class]
    return getattr(diffusers, name if isinstance(name, str) else name[-1])(**components)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _text_encoder(class_name: str, folder: Path, pool: Tensor, dtype: torch.dtype) -> nn.Module:
    import transformers

    network = getattr(transformers, class_name)
    return _random(network, network.config_class.from_dict(_read(folder / "config.json")), pool, dtype)


def _random(build_network: Any, config: Any, pool: Tensor, dtype: torch.dtype) -> nn.Module:
    """A network whose parameters are consecutive parts of the pool, allocated only once and in their final dtype."""
    from accelerate import init_empty_weights

    with init_empty_weights():  # buffers keep their values
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
    """A CLIP tokenizer with the encoder's vocabulary size, which covers every byte and merges pairs of letters.

    As in CLIP's own, "!" is 0 and the start and end tokens have the two highest numbers. Its tokens are shorter than
    CLIP's (about two letters), so that fewer words fit in a prompt.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    num_free = vocab_size - len(tokens) - 2
    if num_free < 0:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too small for random weights: expected at least {len(tokens) + 2}"
        )
    letters = string.ascii_lowercase
    merges = [(a, b + end) for end in ("", "</w>") for a, b in product(letters, letters)][:num_free]
    tokens += [a + b for a, b in merges]
    tokens += [f"<|unused{i}|>" for i in range(num_free - len(merges))] + ["<|startoftext|>", "<|endoftext|>"]
    config = _read(folder / "tokenizer_config.json")
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token=config["pad_token"],
        model_max_length=config["model_max_length"],
    )
