"""Image features for comparing images, from the weights of a vision network that the user has.

Either a transformers vision model in its folder, or a weights file of Inception-v3. Nothing is downloaded.
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

#: The image processors of transformers that do what `Preprocessing` does and no more.
PLAIN_PROCESSORS = (
    "BitImageProcessor",
    "CLIPImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
)
#: The resampling filters by PIL's numbers.
FILTERS = {2: "bilinear", 3: "bicubic"}
#: Model outputs that serve as features, in order of preference.
OUTPUTS = ("image_embeds", "pooler_output", "last_hidden_state")


@dataclass(frozen=True)
class Preprocessing:
    """Resizing, centre crop and normalisation (x − mean) / std of images before a network, in this order.

    Computed in float32 without rounding to 8 bits. Values that a bicubic filter takes outside [0, 1] are clamped, as
    8 bits would.
    """

    size: tuple[int, int] | int | None
    """(height, width), or the shorter side with the aspect ratio kept, in pixels; None for no resizing"""
    mode: str
    """the filter, as in `torch.nn.functional.interpolate`: bilinear or bicubic"""
    antialias: bool
    """whether the filter widens when it reduces the size, as PIL's do"""
    crop: tuple[int, int] | None
    """(height, width) in pixels; None for no crop"""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1], preprocessed. Raises ValueError for images that are smaller than the crop."""
        images = self._resize(images.float())
        if self.crop is not None:
            images = self._crop(images, *self.crop)
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

    def _crop(self, images: Tensor, height: int, width: int) -> Tensor:
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        if top < 0 or left < 0:
            raise ValueError(
                f"images of {images.shape[2]}×{images.shape[3]} pixels are smaller than the {height}×{width} "
                "centre crop: enlarge them, or set do_resize and size in the model's preprocessor_config.json"
            )
        return images[:, :, top : top + height, left : left + width]


@dataclass(frozen=True, eq=False)
class Extractor:
    """Image features of a network, as `dfengine.diffusion.denoiser.Features`."""

    name: str
    """kind of network, output used, and name of the file or folder; recorded with results"""
    preprocess: Preprocessing
    network: Callable[[Tensor], Tensor]
    """preprocessed images [n, 3, h, w] → features [n, d]"""
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n d"]:
        """Features in float32 on the extractor's device, of images in [0, 1] on any device, in one batch.

        Raises ValueError for anything but a float tensor of RGB images.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images are {images.dtype} {[*images.shape]}: expected floats in [0, 1] of shape [n, 3, height, width]"
            )
        return self.network(self.preprocess(images.to(self.device)).to(self.dtype)).float()


def load_features(
    path: str | Path, device: str | torch.device | None = "cpu", dtype: torch.dtype = torch.float32
) -> Extractor:
    """The feature extractor of a folder or file.

    A folder holds a transformers vision model and its preprocessor_config.json. Of CLIP, the vision tower is used. The
    features are the image embeddings (not normalised) if there is a projection, otherwise `pooler_output` if the folder
    has the pooler's weights, otherwise the mean of `last_hidden_state` over its positions.

    A file (.pth, .pt, .safetensors) holds Inception-v3, torchvision's or that of the Fréchet Inception distance. The
    features are the 2048 outputs of its last average pool. Images are scaled to [−1, 1] and resized to 299×299,
    bilinear, with antialiasing for torchvision's weights and without for "fid", as in pytorch-fid.

    Raises ValueError if nothing is found, or it is not a vision model, lacks weights, or needs more preprocessing than
    `Preprocessing`.
    """
    location = Path(path).expanduser()
    device = pick_device(device)
    if location.is_dir():
        return _from_folder(location, device, dtype)
    if not location.is_file():
        raise ValueError(
            f"there is no feature extractor at {str(path)!r}: expected the folder of a transformers vision model or a "
            "weights file of Inception-v3 (.pth, .pt, .safetensors); nothing is downloaded"
        )
    network = inception.load(location)
    is_fid = network.variant == "fid"
    preprocess = Preprocessing((299, 299), "bilinear", not is_fid, None, mean=(0.5,) * 3, std=(0.5,) * 3)
    name = f"inception-v3 ({'FID' if is_fid else network.variant}) {location.name}"
    return Extractor(name, preprocess, network.to(device, dtype), device, dtype)


def _from_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> Extractor:
    """The extractor of a transformers vision model. Raises ValueError for anything wrong with the folder."""
    source = str(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{source!r} is a folder without config.json: expected a transformers vision model, as save_pretrained "
            "writes it"
        )
    with quiet():
        model_class, config = _model_class(source)
        preprocess = _preprocessing(folder)
        with in_one_line(f"the vision model in {source!r} could not be loaded"):
            network, loading = model_class.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with their names
            )
        missing = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
        pooler = {key for key in missing if "pooler" in key.split(".")}
        if missing - pooler:
            raise ValueError(
                f"{source!r} has no fitting weights for {', '.join(sorted(missing - pooler)[:3])} of "
                f"{type(network).__name__}: expected a folder to which save_pretrained wrote the complete vision model"
            )
        network = network.to(device).eval().requires_grad_(False)
        with in_one_line(f"the vision model in {source!r} could not be run"):
            output = _choose_output(network, preprocess, has_pooler=not pooler)
    name = f"{network.config.model_type} ({output}) {folder.resolve().name}"
    return Extractor(name, preprocess, partial(_features, network, output), device, dtype)


def _model_class(folder: str) -> tuple[Any, Any]:
    """The class that loads a folder's vision model, and its configuration. Raises ValueError for other models."""
    import transformers

    with in_one_line(f"config.json in {folder!r} could not be read"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type == "clip":  # text and vision share the width of the projections
        config.vision_config.projection_dim = config.projection_dim
        return transformers.CLIPVisionModelWithProjection, config.vision_config
    if "CLIPVisionModelWithProjection" in (config.architectures or ()):
        return transformers.CLIPVisionModelWithProjection, config
    classes = transformers.MODEL_MAPPING.get(type(config), ())
    classes = classes if isinstance(classes, tuple) else (classes,)
    if {model_class.main_input_name for model_class in classes} != {"pixel_values"}:
        raise ValueError(
            f"{folder!r} holds a model of type {config.model_type!r}, which does not turn images alone into features: "
            "expected a vision model (ViT, DINOv2, CLIP, …); save the vision part of a larger model in its own folder"
        )
    return transformers.AutoModel, config


def _preprocessing(folder: Path) -> Preprocessing:
    """The settings in a folder's preprocessor_config.json, or its class's defaults. Raises ValueError for others."""
    from transformers import AutoImageProcessor

    if not any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        raise ValueError(
            f"{str(folder)!r} has no preprocessor_config.json, which says how images are preprocessed: copy it from "
            "where the model was published, or save its image processor there"
        )
    subject = f"the image processor in {str(folder)!r}"
    with in_one_line(f"{subject} could not be read"):
        processor = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    name = type(processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if name not in PLAIN_PROCESSORS or getattr(processor, "do_pad", None):
        raise ValueError(
            f"{subject} is {name}{' with do_pad' if name in PLAIN_PROCESSORS else ''}, which may do more than resize, "
            f"crop and normalise: expected one of {', '.join(PLAIN_PROCESSORS)}, without do_pad"
        )
    if processor.do_resize and processor.resample not in FILTERS:
        raise ValueError(f"{subject} has resample {processor.resample!r}: expected 2 (bilinear) or 3 (bicubic)")
    # The processor's mean and std apply to its own rescaling of pixels in [0, 255].
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    return Preprocessing(
        size=_size(processor.size, f"{subject} has size") if processor.do_resize else None,
        mode=FILTERS.get(processor.resample, "bilinear"),
        antialias=True,
        crop=_height_width(processor.crop_size, f"{subject} has crop_size") if processor.do_center_crop else None,
        mean=_per_channel(mean, scale),
        std=_per_channel(std, scale),
    )


def _size(size: Any, subject: str) -> tuple[int, int] | int:
    """(height, width), or the shorter side. Raises ValueError for other specifications of a size."""
    entries = _entries(size)
    return entries["shortest_edge"] if {*entries} == {"shortest_edge"} else _height_width(size, subject)


def _height_width(size: Any, subject: str) -> tuple[int, int]:
    entries = _entries(size)
    if {*entries} != {"height", "width"}:
        raise ValueError(f"{subject} {entries}: expected height and width, or for size shortest_edge alone")
    return entries["height"], entries["width"]


def _entries(size: Any) -> dict[str, int]:
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _per_channel(values: Any, scale: float) -> tuple[float, ...]:
    """A mean or std for each channel of images in [0, 1]."""
    return tuple(value / scale for value in ([values] * 3 if isinstance(values, int | float) else values))


def _choose_output(network: Any, preprocess: Preprocessing, *, has_pooler: bool) -> str:
    """The first of `OUTPUTS` that a model returns, tested on two copies of an image.

    `has_pooler` says whether the pooler has weights. Raises ValueError if there is none, or it is not a function of the
    image, as in a model that masks at random.
    """
    side = getattr(network.config, "image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    image = torch.linspace(0, 1, 3 * height * width, device=network.device).view(1, 3, height, width)
    pixels = preprocess(image.expand(2, -1, -1, -1)).to(network.dtype)
    outputs = network(pixel_values=pixels)
    for name in OUTPUTS:
        if getattr(outputs, name, None) is not None and (has_pooler or name != "pooler_output"):
            features = _features(network, name, pixels).float()
            if not torch.allclose(features[0], features[1], rtol=1e-2, atol=1e-2 * float(features.std())):
                raise ValueError(f"its {name} of the same image is not finite, or differs between two rows of a batch")
            return name
    raise ValueError(f"it returns {', '.join(outputs.keys())}: expected one of {', '.join(OUTPUTS)}")


def _features(network: Any, output: str, pixels: Tensor) -> Tensor:
    """A vector for each image; hidden states [n, positions, d] or [n, d, h, w] are averaged over positions."""
    features = network(pixel_values=pixels)[output]
    if output == "last_hidden_state":
        return features.mean(dim=1) if features.ndim == 3 else features.flatten(2).mean(dim=2)
    return features.flatten(1)
