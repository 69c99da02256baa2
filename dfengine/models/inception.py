"""Inception-v3 up to its last average pool, for the two sets of weights that Fréchet distances are made with.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, under torchvision's names. The "fid"
weights, which pytorch-fid ported from the network of Heusel et al., 2017, go with other pools: see `POOLS`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

#: The variant of the weights, by the rows of their classifier.
VARIANTS = {1000: "torchvision", 1008: "fid"}

#: torchvision's averages count the padding's zeros. Those of "fid" do not, and its last block takes the maximum.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "padded average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1),
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "halve": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, channels: int, width: int, kernel: tuple[int, int], *, stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else 0
        self.conv = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d u v"]:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side on the same input, their channels one after the other.

    A branch reads "48 1x1, 64 5x5": convolutions in a row, each with its output channels and its kernel; "|" parts two
    that have the same input. "branch_pool" begins with the pool. With the pool "halve" the last convolution of each
    branch has stride 2 and no padding; all others keep the size.
    """

    def __init__(self, channels: int, pool: str, **branches: str) -> None:
        super().__init__()
        self.pool = POOLS[pool]
        self.branches: dict[str, list[list[str]]] = {}
        for branch, text in branches.items():
            steps = [[part.split() for part in step.split("|")] for step in text.split(",") if step]
            width, self.branches[branch] = channels, []
            for place, parts in enumerate(steps, 1):
                step = branch if len(steps) == 1 else f"{branch}_{place}"
                names = [step] if len(parts) == 1 else [f"{step}{letter}" for letter in "ab"]
                halves = pool == "halve" and place == len(steps)
                for name, (out, kernel) in zip(names, parts, strict=True):
                    height, _, across = kernel.partition("x")
                    size = (int(height), int(across))
                    made = Convolution(width, int(out), size, stride=2 if halves else 1, padded=not halves)
                    self.add_module(name, made)
                self.branches[branch].append(names)
                width = sum(int(out) for out, _ in parts)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d u v"]:
        return torch.cat([self._branch(x, name) for name in self.branches], dim=1)

    def _branch(self, x: Tensor, branch: str) -> Tensor:
        y = self.pool(x) if branch == "branch_pool" else x
        for names in self.branches[branch]:
            parts = [self.get_submodule(name)(y) for name in names]
            y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y


def _wide(channels: int, pool: str, pooled: int) -> Mixed:
    """Kernels of 5×5 and twice 3×3."""
    return Mixed(
        channels,
        pool,
        branch1x1="64 1x1",
        branch5x5="48 1x1, 64 5x5",
        branch3x3dbl="64 1x1, 96 3x3, 96 3x3",
        branch_pool=f"{pooled} 1x1",
    )


def _long(pool: str, c7: int) -> Mixed:
    """Kernels of 7×7, in two factors."""
    return Mixed(
        768,
        pool,
        branch1x1="192 1x1",
        branch7x7=f"{c7} 1x1, {c7} 1x7, 192 7x1",
        branch7x7dbl=f"{c7} 1x1, {c7} 7x1, {c7} 1x7, {c7} 7x1, 192 1x7",
        branch_pool="192 1x1",
    )


def _forked(channels: int, pool: str) -> Mixed:
    """Kernels of 1×3 and 3×1 side by side."""
    return Mixed(
        channels,
        pool,
        branch1x1="320 1x1",
        branch3x3="384 1x1, 384 1x3 | 384 3x1",
        branch3x3dbl="448 1x1, 384 3x3, 384 1x3 | 384 3x1",
        branch_pool="192 1x1",
    )


class Inception(nn.Module):
    """Inception-v3 without its classifiers. Raises ValueError for a variant that is not in `VARIANTS`."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        if variant not in VARIANTS.values():
            raise ValueError(f"variant {variant!r} is not known: expected one of {', '.join(VARIANTS.values())}")
        self.variant = variant
        pool, last = ("average", "maximum") if variant == "fid" else ("padded average", "padded average")
        self.Conv2d_1a_3x3 = Convolution(3, 32, (3, 3), stride=2, padded=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Convolution(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Convolution(80, 192, (3, 3), padded=False)
        self.Mixed_5b = _wide(192, pool, 32)
        self.Mixed_5c = _wide(256, pool, 64)
        self.Mixed_5d = _wide(288, pool, 64)
        self.Mixed_6a = Mixed(288, "halve", branch3x3="384 3x3", branch3x3dbl="64 1x1, 96 3x3, 96 3x3", branch_pool="")
        self.Mixed_6b = _long(pool, 128)
        self.Mixed_6c = _long(pool, 160)
        self.Mixed_6d = _long(pool, 160)
        self.Mixed_6e = _long(pool, 192)
        self.Mixed_7a = Mixed(
            768,
            "halve",
            branch3x3="192 1x1, 320 3x3",
            branch7x7x3="192 1x1, 192 1x7, 192 7x1, 192 3x3",
            branch_pool="",
        )
        self.Mixed_7b = _forked(1280, pool)
        self.Mixed_7c = _forked(2048, last)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """The last average pool; x in [−1, 1], at 299×299 as trained and at least 75×75."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["halve"](x)))
        x = POOLS["halve"](x)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


def load(path: Path) -> Inception:
    """The network of a weights file, in evaluation mode without parameter gradients.

    A file is torchvision's (1000 classes) or that of the Fréchet Inception distance (1008). Raises ValueError for any
    other, with what it holds.
    """
    weights = _read(path)
    rows = next(iter(weights["fc.weight"].shape), 0) if "fc.weight" in weights else None
    if rows not in VARIANTS:
        found = (
            f"a classifier of {rows} classes"
            if rows is not None
            else f"{len(weights)} tensors ({_few(weights)}) and no fc.weight"
        )
        raise ValueError(
            f"{str(path)!r} has {found}: expected the weights of Inception-v3 under torchvision's names, with a "
            "classifier of 1000 classes (torchvision's inception_v3_google) or 1008 (pt_inception-2015-12-05)"
        )
    with torch.device("meta"):
        network = Inception(VARIANTS[rows])
    weights = {name: value for name, value in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r} has {rows} classes and is not Inception-v3 under torchvision's names: {_first(error)}"
        ) from error
    return network.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises ValueError where it holds anything else, or is no such file."""
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{str(path)!r} is not a weights file: expected one that ends in .pth, .pt or .safetensors")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")  # which is refused next
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of each format and each way to be broken its own
        raise ValueError(
            f"{str(path)!r} could not be read as a file of weights alone, as torch.save(model.state_dict(), …) makes "
            f"it: {_first(error)}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        holds = f"a dict of {_few(found)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ValueError(f"{str(path)!r} holds {holds}: expected a state dict, of tensors by name")
    return dict(found)


def _few(names: Iterable[object]) -> str:
    """The first names, and a sign that there are more."""
    words = [str(name) for name in names]
    return ", ".join(words[:4]) + (", …" if len(words) > 4 else "")


def _first(error: Exception) -> str:
    """The first sentence of what a library says, which may be a page."""
    return " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__
