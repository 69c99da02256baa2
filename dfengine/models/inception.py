"""Inception-v3 up to its last average pool, for the two published sets of weights that Fréchet distances use.

Szegedy et al. (2016), with torchvision's module names. The "fid" weights, which pytorch-fid converted from the network
of Heusel et al. (2017), need other pools: see `POOLS`.
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

#: The variant of a set of weights, by the number of classes of its classifier.
VARIANTS = {1000: "torchvision", 1008: "fid"}

#: torchvision's averages include the zeros of the padding; those of "fid" do not, and its last block takes the maximum.
POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "average with padding": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1),
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "maximum": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "reduction": partial(F.max_pool2d, kernel_size=3, stride=2),
}


class BasicConv2d(nn.Module):
    """Convolution without bias, batch normalisation, ReLU. Keeps the size unless it is `valid` or has a stride."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], *, stride: int = 1, valid: bool = False
    ) -> None:
        super().__init__()
        padding = 0 if valid or stride > 1 else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d u v"]:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class InceptionA(nn.Module):
    """1×1, 5×5 and double 3×3 convolutions."""

    def __init__(self, in_channels: int, pool_channels: int, pool: str) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 64, (1, 1))
        self.branch5x5_1 = BasicConv2d(in_channels, 48, (1, 1))
        self.branch5x5_2 = BasicConv2d(48, 64, (5, 5))
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, (1, 1))
        self.branch3x3dbl_2 = BasicConv2d(64, 96, (3, 3))
        self.branch3x3dbl_3 = BasicConv2d(96, 96, (3, 3))
        self.branch_pool = BasicConv2d(in_channels, pool_channels, (1, 1))
        self.pool = POOLS[pool]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        branch5x5 = self.branch5x5_2(self.branch5x5_1(x))
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), branch5x5, branch3x3dbl, self.branch_pool(self.pool(x))], dim=1)


class InceptionB(nn.Module):
    """Reduction from 35×35 to 17×17."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = BasicConv2d(in_channels, 384, (3, 3), stride=2)
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 64, (1, 1))
        self.branch3x3dbl_2 = BasicConv2d(64, 96, (3, 3))
        self.branch3x3dbl_3 = BasicConv2d(96, 96, (3, 3), stride=2)
        self.pool = POOLS["reduction"]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d u v"]:
        branch3x3dbl = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), branch3x3dbl, self.pool(x)], dim=1)


class InceptionC(nn.Module):
    """7×7 convolutions factored into 1×7 and 7×1."""

    def __init__(self, in_channels: int, width: int, pool: str) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 192, (1, 1))
        self.branch7x7_1 = BasicConv2d(in_channels, width, (1, 1))
        self.branch7x7_2 = BasicConv2d(width, width, (1, 7))
        self.branch7x7_3 = BasicConv2d(width, 192, (7, 1))
        self.branch7x7dbl_1 = BasicConv2d(in_channels, width, (1, 1))
        self.branch7x7dbl_2 = BasicConv2d(width, width, (7, 1))
        self.branch7x7dbl_3 = BasicConv2d(width, width, (1, 7))
        self.branch7x7dbl_4 = BasicConv2d(width, width, (7, 1))
        self.branch7x7dbl_5 = BasicConv2d(width, 192, (1, 7))
        self.branch_pool = BasicConv2d(in_channels, 192, (1, 1))
        self.pool = POOLS[pool]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch7x7dbl = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branch7x7dbl = self.branch7x7dbl_5(self.branch7x7dbl_4(branch7x7dbl))
        return torch.cat([self.branch1x1(x), branch7x7, branch7x7dbl, self.branch_pool(self.pool(x))], dim=1)


class InceptionD(nn.Module):
    """Reduction from 17×17 to 8×8."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = BasicConv2d(in_channels, 192, (1, 1))
        self.branch3x3_2 = BasicConv2d(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1 = BasicConv2d(in_channels, 192, (1, 1))
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1))
        self.branch7x7x3_4 = BasicConv2d(192, 192, (3, 3), stride=2)
        self.pool = POOLS["reduction"]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d u v"]:
        branch7x7x3 = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(branch7x7x3), self.pool(x)], dim=1)


class InceptionE(nn.Module):
    """3×3 convolutions factored into 1×3 and 3×1 in parallel."""

    def __init__(self, in_channels: int, pool: str) -> None:
        super().__init__()
        self.branch1x1 = BasicConv2d(in_channels, 320, (1, 1))
        self.branch3x3_1 = BasicConv2d(in_channels, 384, (1, 1))
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1))
        self.branch3x3dbl_1 = BasicConv2d(in_channels, 448, (1, 1))
        self.branch3x3dbl_2 = BasicConv2d(448, 384, (3, 3))
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1))
        self.branch_pool = BasicConv2d(in_channels, 192, (1, 1))
        self.pool = POOLS[pool]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        y, z = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branch3x3 = [self.branch3x3_2a(y), self.branch3x3_2b(y)]
        branch3x3dbl = [self.branch3x3dbl_3a(z), self.branch3x3dbl_3b(z)]
        return torch.cat([self.branch1x1(x), *branch3x3, *branch3x3dbl, self.branch_pool(self.pool(x))], dim=1)


class InceptionV3(nn.Module):
    """Inception-v3 without its classifiers. Raises ValueError for a variant that is not in `VARIANTS`."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        if variant not in VARIANTS.values():
            raise ValueError(f"variant {variant!r} is not known: expected one of {', '.join(VARIANTS.values())}")
        self.variant = variant
        pool = "average" if variant == "fid" else "average with padding"
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), valid=True)
        self.Mixed_5b = InceptionA(192, 32, pool)
        self.Mixed_5c = InceptionA(256, 64, pool)
        self.Mixed_5d = InceptionA(288, 64, pool)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128, pool)
        self.Mixed_6c = InceptionC(768, 160, pool)
        self.Mixed_6d = InceptionC(768, 160, pool)
        self.Mixed_6e = InceptionC(768, 192, pool)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, pool)
        self.Mixed_7c = InceptionE(2048, "maximum" if variant == "fid" else pool)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 2048"]:
        """The output of the last average pool, for x in [−1, 1] of 299×299 pixels as in training, or at least 75×75."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(POOLS["reduction"](x)))
        x = POOLS["reduction"](x)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


def load(path: Path) -> InceptionV3:
    """The network of a weights file, in evaluation mode without parameter gradients.

    The file is torchvision's (1000 classes) or that of the Fréchet Inception distance (1008). Raises ValueError for any
    other, saying what it contains.
    """
    weights = _read(path)
    num_classes = next(iter(weights["fc.weight"].shape), 0) if "fc.weight" in weights else None
    if num_classes not in VARIANTS:
        contents = (
            f"a classifier of {num_classes} classes"
            if num_classes is not None
            else f"{len(weights)} tensors ({_first_names(weights)}) and no fc.weight"
        )
        raise ValueError(
            f"{str(path)!r} has {contents}: expected the weights of Inception-v3 with torchvision's names and a "
            "classifier of 1000 classes (torchvision's inception_v3_google) or 1008 (pt_inception-2015-12-05)"
        )
    with torch.device("meta"):
        network = InceptionV3(VARIANTS[num_classes])
    weights = {name: value for name, value in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{str(path)!r} has {num_classes} classes and is not Inception-v3 with torchvision's names: "
            f"{_first_sentence(error)}"
        ) from error
    return network.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name. Raises ValueError for any other kind or content of a file."""
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{str(path)!r} is not a weights file: expected one that ends in .pth, .pt or .safetensors")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")  # torch.load raises next
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # the formats raise a different one for each kind of damage
        raise ValueError(
            f"{str(path)!r} could not be read as a file of weights alone, as written by torch.save(model.state_dict(), "
            f"…): {_first_sentence(error)}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        contents = f"a dict of {_first_names(weights)}" if isinstance(weights, dict) else f"a {type(weights).__name__}"
        raise ValueError(f"{str(path)!r} holds {contents}: expected a state dict of tensors by name")
    return dict(weights)


def _first_names(names: Iterable[object]) -> str:
    """The first four names, and an ellipsis if there are more."""
    words = [str(name) for name in names]
    return ", ".join(words[:4]) + (", …" if len(words) > 4 else "")


def _first_sentence(error: Exception) -> str:
    """The first sentence of a message that may fill a page."""
    return " ".join(str(error).split()).partition(". ")[0][:300] or type(error).__name__
