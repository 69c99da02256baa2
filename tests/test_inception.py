"""Inception-v3 against torchvision's, and the two variants of its weights."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from dfengine.models import features as vision
from dfengine.models import inception

#: The same network in float32, with sums in another order.
NETWORK = {"rtol": 1e-5, "atol": 1e-5}

#: The output of torchvision 0.29.1's inception_v3 for `scene` with the weights `numbers`, in float64: features 0, 1000,
#: 2047, mean and standard deviation. For "fid" its pools are exchanged, and the image resized, as pytorch-fid does it.
TORCHVISION = {
    "torchvision": [51.334700, 0.843064, 0.783174, 19.180301, 27.006818],
    "fid": [58.958020, 0.545564, 1.190522, 23.415952, 33.032525],
}
#: Channels and side of each block's map of 299×299 pixels, as torchvision's source notes them.
MAPS = {**dict.fromkeys(("5c", "5d"), (288, 35)), **dict.fromkeys(("6a", "6b", "6c", "6d", "6e"), (768, 17))}
MAPS |= {"5b": (256, 35), "7a": (1280, 8), "7b": (2048, 8), "7c": (2048, 8)}


def numbers() -> dict[str, Tensor]:
    """Weights of noise that is the same everywhere: squares modulo a prime; float16, an output's variance near 1."""
    with torch.device("meta"):
        shapes = inception.InceptionV3("fid").state_dict()
    weights = {}
    for place, (name, value) in enumerate(shapes.items()):
        count = torch.arange(value.numel())
        noise = (((count * count + place) * 7919 % 10007) / 10007 - 0.5).view(value.shape)  # of variance 1/12
        if value.ndim == 4:
            noise = noise * (24 / value[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            noise = noise + 1
        weights[name] = noise.half() if value.ndim else torch.tensor(0)
    return weights


def scene() -> Tensor:
    """An image of 420×360 pixels in [0, 1], fine enough that resizing with and without antialiasing differ."""
    y, x = torch.meshgrid(torch.arange(420), torch.arange(360), indexing="ij")
    return torch.stack([(x * x + k * y * y + x * y) % 97 / 96 for k in (1, 2, 3)])[None]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A weights file of each variant, with a classifier, and an auxiliary one in torchvision's."""
    weights = numbers()
    folder = tmp_path_factory.mktemp("inception")
    named = {"torchvision": folder / "inception_v3_google-0.pth", "fid": folder / "pt_inception.safetensors"}
    extra = {
        "fc.weight": torch.zeros(1000, 2048),
        "fc.bias": torch.zeros(1000),
        "AuxLogits.conv0.bn.bias": weights["Conv2d_1a_3x3.bn.bias"],
    }
    torch.save({**weights, **extra}, named["torchvision"])
    save_file({**weights, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, named["fid"])
    yield named
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["torchvision", "fid"])
def test_features_equal_those_of_torchvision(variant: str, files: dict[str, Path]) -> None:
    extractor = vision.load_features(files[variant])
    label = {"torchvision": "torchvision", "fid": "FID"}[variant]
    assert extractor.name == f"inception-v3 ({label}) {files[variant].name}"
    assert not any(parameter.requires_grad for parameter in extractor.network.parameters())
    features = extractor(scene())
    assert features.shape == (1, 2048)
    statistics = [*features[0, [0, 1000, 2047]], features.mean(), features.std()]
    assert_close(torch.stack(statistics), torch.tensor(TORCHVISION[variant]), **NETWORK)


def test_inception_has_the_parameter_count_published_by_torchvision() -> None:
    with torch.device("meta"):
        network = inception.InceptionV3("torchvision")
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 768 * 1000 + 1000
    classifier = 2048 * 1000 + 1000
    assert sum(p.numel() for p in network.parameters()) == 27_161_264 - auxiliary - classifier
    assert sum(isinstance(module, torch.nn.Conv2d) for module in network.modules()) == 94
    assert {module.eps for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.001}


@pytest.mark.slow
def test_inceptions_maps_have_the_published_sizes() -> None:
    shapes = {}
    with torch.device("meta"):
        network = inception.InceptionV3("torchvision")
        for name, block in network.named_children():
            block.register_forward_hook(lambda _, __, y, name=name: shapes.update({name: (*y.shape[1:],)}))
        assert network(torch.zeros(2, 3, 299, 299)).shape == (2, 2048)
    assert {name[-2:]: shape for name, shape in shapes.items() if name.startswith("Mixed")} == {
        name: (channels, side, side) for name, (channels, side) in MAPS.items()
    }
    assert shapes["Conv2d_2b_3x3"] == (64, 147, 147)
    assert shapes["Conv2d_4a_3x3"] == (192, 71, 71)


def test_the_pools_by_hand() -> None:
    corner = torch.tensor([[1.0, -2.0, 0.0], [-3.0, 8.0, 0.0], [0.0, 0.0, -4.0]])[None, None]
    alone = -torch.ones(1, 1, 1, 1)
    outputs = {
        name: (pool(corner)[0, 0, 0, 0], pool(alone)) for name, pool in inception.POOLS.items() if name != "reduction"
    }
    # 1 − 2 − 3 + 8 = 4 over 9 or 4 positions; a single position with zero padding, without padding, and its maximum.
    assert outputs == {"average with padding": (torch.tensor(4 / 9), -1 / 9), "average": (1, -1), "maximum": (8, -1)}
    assert inception.POOLS["reduction"](torch.arange(25.0).view(1, 1, 5, 5)).flatten().tolist() == [12, 14, 22, 24]


def test_the_fid_variant_differs_in_its_pools() -> None:
    with torch.device("meta"):
        networks = {variant: inception.InceptionV3(variant) for variant in ("torchvision", "fid")}
    names = {id(pool): name for name, pool in inception.POOLS.items()}
    pools = {
        variant: {key[-2:]: names[id(block.pool)] for key, block in network.named_children() if key[:5] == "Mixed"}
        for variant, network in networks.items()
    }
    halving = {"6a": "reduction", "7a": "reduction"}
    assert pools["torchvision"] == {**dict.fromkeys(MAPS, "average with padding"), **halving}
    assert pools["fid"] == {**dict.fromkeys(MAPS, "average"), **halving, "7c": "maximum"}
    with pytest.raises(ValueError, match="variant 'tf' is not known: expected one of torchvision, fid"):
        inception.InceptionV3("tf")


@pytest.mark.slow
def test_images_are_resized_and_scaled_for_each_variant(files: dict[str, Path]) -> None:
    # Four times 299: without antialiasing only the middle 2×2 of each 4×4 pixels count.
    images = torch.rand(1, 3, 1196, 1196, generator=torch.Generator().manual_seed(0))
    middle = (images[..., 1::4, 1::4] + images[..., 1::4, 2::4] + images[..., 2::4, 1::4] + images[..., 2::4, 2::4]) / 4
    assert_close(vision.load_features(files["fid"]).preprocess(images), 2 * middle - 1, rtol=0.0, atol=1e-6)
    # With it, a triangle eight pixels wide.
    ramp = torch.tensor([1.0, 3.0, 5.0, 7.0, 7.0, 5.0, 3.0, 1.0]) / 32
    rows = F.conv2d(images[..., 2:, 2:].transpose(0, 1), ramp.outer(ramp)[None, None], stride=4).transpose(0, 1)
    preprocessed = vision.load_features(files["torchvision"]).preprocess(images)
    assert_close(preprocessed[..., 1:-1, 1:-1], 2 * rows - 1, rtol=0.0, atol=1e-6)


def saved(folder: Path, contents: Any, name: str = "weights.pth") -> Path:
    torch.save(contents, folder / name)
    return folder / name


@pytest.mark.slow
def test_a_file_of_anything_else_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(files["fid"])
    few = {"fc.weight": torch.zeros(1000, 2048), "conv1.weight": torch.zeros(1)}
    cases = {
        "has a classifier of 10 classes: expected the weights of Inception-v3": {"fc.weight": torch.zeros(10, 2048)},
        r"has 6 tensors \(a, b, c, d, …\) and no fc\.weight: expected": dict.fromkeys("abcdef", torch.zeros(1)),
        "has 0 tensors": {},
        "has 1000 classes and is not Inception-v3 with torchvision's names: .*Missing key": few,
        "has 1008 classes and is not Inception-v3 .*Unexpected key.*extra": {**weights, "extra": torch.zeros(1)},
        "holds a dict of epoch, state_dict: expected a state dict": {"epoch": 1, "state_dict": few},
        "holds a list: expected a state dict": [torch.zeros(1)],
        "could not be read as a file of weights alone": torch.nn.Linear(1, 1),
    }
    for message, contents in cases.items():
        with pytest.raises(ValueError, match=message):
            vision.load_features(saved(tmp_path, contents))
    with pytest.raises(ValueError, match=r"is not a weights file: expected one that ends in \.pth, \.pt or \.safe"):
        vision.load_features(saved(tmp_path, {}, "weights.bin"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, in which such weights are still about
        torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match=r"could not be read as a file of weights alone.*TorchScript"):
        vision.load_features(tmp_path / "script.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="could not be read as a file of weights alone"):
        vision.load_features(tmp_path / "cut.safetensors")
