"""Image features to compare images by, from a network of which the user has the weights.

A transformers vision model in its folder, or a file of Inception-v3. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dfengine.models import inception
from dfengine.models.loading import in_one_line, pick_device, quiet

#: The image processors of transformers that do what `Preparation` does and no more.
PLAIN = ("BitImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
#: PIL's numbers for the resampling filters.
MODES = {2: "bilinear", 3: "bicubic"}
#: The outputs that are taken for features, the first that a model has.
OUTPUTS = ("image_embeds", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Preparation:
    """What a network is shown of images: resized, the middle cut out, (x − mean) / std a channel.

    It computes in float32 and rounds nothing to 8 bits. Values that a bicubic filter takes outside [0, 1] are clamped,
    as 8 bits would.
    """

    size: tuple[int, int] | int | None
    """(height, width), or the shorter side with the longer in proportion, or as they are; in pixels"""
    mode: str
    """what `torch.nn.functional.interpolate` calls the filter: bilinear or bicubic"""
    antialias: bool
    """whether a filter widens with the reduction, as PIL's do"""
    crop: tuple[int, int] | None
    """(height, width) in pixels"""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1] as the network wants them. Raises ValueError for one that is smaller than the crop."""
        images = self._resize(images.float())
        if self.crop is not None:
            images = self._cut(images, *self.crop)
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if isinstance(self.size, int):
            short = min(height, width)
            size = (int(self.size * height / short), int(self.size * width / short))
        else:
            size = self.size or (height, width)
        if size == (height, width):
            return images
        resized = F.interpolate(images, size, mode=self.mode, align_corners=False, antialias=self.antialias)
        return resized.clamp(0, 1)

    def _cut(self, images: Tensor, height: int, width: int) -> Tensor:
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        if top < 0 or left < 0:
            raise ValueError(
                f"images of {images.shape[2]}×{images.shape[3]} pixels are smaller than the {height}×{width} that the "
                "model is shown the middle of: enlarge them, or set do_resize and size in its preprocessor_config.json"
            )
        return images[:, :, top : top + height, left : left + width]


@dataclass(frozen=True, eq=False)
class Extractor:
    """Image features by a network, as `dfengine.diffusion.denoiser.Features`."""

    name: str
    """the kind of the network, which of its outputs, and the file's or folder's name; recorded with results"""
    prepare: Preparation
    network: Callable[[Tensor], Tensor]
    """prepared images [n, 3, h, w] → features [n, d]"""
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d"]:
        """Features in float32 on the extractor's device; `images` in [0, 1], on any device.

        All of them are one batch. Raises ValueError for what is not a float tensor of RGB images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {[*images.shape]}: expected floats in [0, 1] of shape [n, 3, height, width]"
            )
        prepared = self.prepare(images.to(self.device))
        return self.network(prepared.to(self.dtype)).float()


def load_features(
    path: str | Path, device: str | torch.device | None = "cpu", dtype: torch.dtype = torch.float32
) -> Extractor:
    """The feature extractor of a folder or file.

    A folder holds a transformers vision model and its preprocessor_config.json. Of CLIP it is the vision tower, and the
    features are the image embeddings (not normalised) where the projection is there. Else they are `pooler_output`
    where the model has one and the folder its weights, and `last_hidden_state` averaged over the positions where not.

    A file (.pth, .pt, .safetensors) holds Inception-v3, torchvision's or the one of the Fréchet Inception distance; the
    features are the 2048 of its last average pool. Images are resized to 299×299: for "fid" bilinear without
    antialiasing as pytorch-fid does, for torchvision's with, and both are shown in [−1, 1].

    Raises ValueError where there is nothing there, and for what is no vision model, lacks weights or has no plain
    preparation of images.
    """
    place = Path(path).expanduser()
    device = pick_device(device)
    if place.is_dir():
        return _from_folder(place, device, dtype)
    if not place.is_file():
        raise ValueError(
            f"there is no feature extractor at {str(path)!r}: expected the folder of a transformers vision model or a "
            "weights file of Inception-v3 (.pth, .pt, .safetensors); nothing is downloaded"
        )
    network = inception.load(place)
    label = "FID" if network.variant == "fid" else network.variant
    prepare = Preparation((299, 299), "bilinear", network.variant != "fid", None, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Extractor(f"inception-v3 ({label}) {place.name}", prepare, network.to(device, dtype), device, dtype)


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Extractor:
    """The extractor of a transformers vision model. Raises ValueError for whatever is wrong with the folder."""
    given = str(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{given!r} is a folder without config.json: expected a transformers vision model, as save_pretrained "
            "writes it"
        )
    with quiet():
        kind, config = _kind(given)
        prepare = _preparation(folder)
        with in_one_line(f"the vision model in {given!r} could not be loaded"):
            network, loading = kind.from_pretrained(
                given,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told of below, with their names
            )
        missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
        pooler = {key for key in missing if "pooler" in key.split(".")}
        if missing - pooler:
            raise ValueError(
                f"{given!r} has no fitting weights for {', '.join(sorted(missing - pooler)[:3])} of "
                f"{type(network).__name__}: expected a folder that save_pretrained wrote of the whole vision model"
            )
        network = network.to(device).eval().requires_grad_(False)
        with in_one_line(f"the vision model in {given!r} could not be run"):
            output = _output(network, prepare, pooled=not pooler)
    name = f"{network.config.model_type} ({output}) {folder.resolve().name}"
    return Extractor(name, prepare, partial(_features, network, output), device, dtype)


def _kind(folder: str) -> tuple[Any, Any]:
    """The class that loads a folder's vision model, and its settings. Raises ValueError for one that sees nothing."""
    import transformers

    with in_one_line(f"config.json in {folder!r} could not be read"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type == "clip":  # whose own width the two projections share
        config.vision_config.projection_dim = config.projection_dim
        return transformers.CLIPVisionModelWithProjection, config.vision_config
    if "CLIPVisionModelWithProjection" in (config.architectures or ()):
        return transformers.CLIPVisionModelWithProjection, config
    kinds = transformers.MODEL_MAPPING.get(type(config), ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if {kind.main_input_name for kind in kinds} != {"pixel_values"}:
        raise ValueError(
            f"{folder!r} holds a model of type {config.model_type!r}, which does not turn images alone into features: "
            "expected a vision model (ViT, DINOv2, CLIP, …); save the vision part of a larger model in its own folder"
        )
    return transformers.AutoModel, config


def _preparation(folder: Path) -> Preparation:
    """What a folder's preprocessor_config.json says, with its class's defaults. Raises ValueError for what is not."""
    from transformers import AutoImageProcessor

    if not any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"{str(folder)!r} has no preprocessor_config.json, which says how images are shown to the model: copy it "
            "from where the model was published, or save its image processor there"
        )
    given = f"the image processor in {str(folder)!r}"
    with in_one_line(f"{given} could not be read"):
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in PLAIN or getattr(processor, "do_pad", None):
        raise ValueError(
            f"{given} is {name}{' with do_pad' if name in PLAIN else ''}, which may do more than resize, crop and "
            f"normalise: expected one of {', '.join(PLAIN)}, without do_pad"
        )
    if processor.do_resize and processor.resample not in MODES:
        raise ValueError(f"{given} has resample {processor.resample!r}: expected 2 (bilinear) or 3 (bicubic)")
    # Its mean and std are of what it makes of pixels in [0, 255].
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    return Preparation(
        size=_pixels(processor.size, f"{given} has size") if processor.do_resize else None,
        mode=MODES.get(processor.resample, "bilinear"),
        antialias=True,
        crop=_height_width(processor.crop_size, f"{given} has crop_size") if processor.do_center_crop else None,
        mean=_channels(mean, scale),
        std=_channels(std, scale),
    )


def _pixels(size: Any, given: str) -> tuple[int, int] | int:
    """(height, width), or the shorter side. Raises ValueError for other ways to say a size."""
    known = {key: value for key, value in dict(size or {}).items() if value is not None}
    return known["shortest_edge"] if {*known} == {"shortest_edge"} else _height_width(known, given)


def _height_width(size: Any, given: str) -> tuple[int, int]:
    known = {key: value for key, value in dict(size or {}).items() if value is not None}
    if {*known} != {"height", "width"}:
        raise ValueError(f"{given} {known}: expected height and width, or for size shortest_edge alone")
    return known["height"], known["width"]


def _channels(values: Any, scale: float) -> tuple[float, ...]:
    """A mean or std a channel, of images in [0, 1]."""
    return tuple(value / scale for value in ([values] * 3 if isinstance(values, int | float) else values))


def _output(network: Any, prepare: Preparation, *, pooled: bool) -> str:
    """Which of `OUTPUTS` is a model's, tried on one picture twice.

    `pooled` is whether the pooler has weights. Raises ValueError where there is none, or where it is not a function of
    the image, as that of a model which masks at random.
    """
    side = getattr(network.config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    picture = torch.linspace(0, 1, 3 * height * width, device=network.device).view(1, 3, height, width)
    prepared = prepare(picture.expand(2, -1, -1, -1)).to(network.dtype)
    found = network(pixel_values=prepared)
    for name in OUTPUTS:
        if getattr(found, name, None) is not None and (pooled or name != "pooler_output"):
            features = _features(network, name, prepared).float()
            if not torch.allclose(features[0], features[1], rtol=1e-2, atol=1e-2 * float(features.std())):
                raise ValueError(f"its {name} of one picture is not finite, or differs from row to row")
            return name
    raise ValueError(f"it gives {', '.join(found.keys())}: expected one of {', '.join(OUTPUTS)}")


def _features(network: Any, output: str, prepared: Tensor) -> Tensor:
    """One vector an image of a model's output; hidden states [n, positions, d] or [n, d, h, w] are averaged."""
    found = network(pixel_values=prepared)[output]
    if output == "last_hidden_state":
        return found.mean(dim=1) if found.ndim == 3 else found.flatten(2).mean(dim=2)
    return found.flatten(1)
