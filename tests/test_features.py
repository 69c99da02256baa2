"""Feature extractors against transformers' own image processors and models."""

import inspect
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from dfengine import Engine, Random, evaluate
from dfengine.models import features as vision
from dfengine.models.loading import quiet

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
#: PIL rounds to 8 bits after each of its two passes, the second of which can make the first's half a level larger.
LEVELS = 1.2 / 255
#: The same network twice, in float32 and in another order.
NETWORK = {"rtol": 1e-5, "atol": 1e-5}

PROCESSORS = {
    # A side as one number: CLIP's class takes it for the shorter, ViT's for both.
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": 24, "crop_size": 20, "resample": 3},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": 20, "resample": 2},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 23},
        "crop_size": {"height": 20, "width": 18},
        "resample": 3,
    },
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 28}, "resample": 2},
    "not resized": {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "crop_size": 20},
    "not cropped": {"image_processor_type": "CLIPImageProcessor", "size": 24, "do_center_crop": False, "resample": 2},
    "not normalised": {"image_processor_type": "ViTImageProcessor", "size": 20, "do_normalize": False},
    "not rescaled": {"image_processor_type": "ViTImageProcessor", "size": 20, "do_rescale": False},
}

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SEES = {**TINY, "image_size": 20, "patch_size": 10}


def pictures(n: int, height: int, width: int) -> Tensor:
    """uint8 [n, 3, height, width] noise, so far from black and white that a bicubic filter stays between them."""
    return torch.randint(64, 192, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def write(folder: Path, model: Any, processor: str = "vit", **settings: Any) -> Path:
    """Write a folder like save_pretrained does, with a random model and an image processor."""
    with quiet():
        model.save_pretrained(folder)
    known = {"image_mean": MEAN, "image_std": STD, **PROCESSORS[processor], **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(known))
    return folder


def make(kind: str, config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, kind)(config).eval()
        for parameter in model.parameters():  # many biases and embeddings are zero by default
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny-vit", make("ViTModel", transformers.ViTConfig(**SEES)))


@pytest.mark.grid
@pytest.mark.parametrize("size", [(37, 53), (61, 21), (20, 20), (21, 30)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_preprocessing_equals_the_image_processor(name: str, size: tuple[int, int], vit: Path) -> None:
    folder = write(vit, make("ViTModel", transformers.ViTConfig(**SEES)), name)
    images = pictures(2, *size)
    with quiet():
        processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    expected = processor(list(images), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    std = torch.tensor([1.0]) if name == "not normalised" else torch.tensor(STD)
    unit = (1 / 255 if name == "not rescaled" else 1.0) * std.view(-1, 1, 1)
    assert_close(vision._preprocessing(folder)(images / 255) * unit, expected.float() * unit, atol=LEVELS, rtol=0.0)


def test_preprocessing_by_hand() -> None:
    image = torch.arange(48.0).view(1, 3, 4, 4) / 48
    preprocess = vision.Preprocessing(None, "bilinear", True, (2, 1), (0.25, 0.5, 0.5), (0.5, 0.25, 1.0))
    # Rows 1 and 2, column 1 of 0 to 3.
    by_hand = [[5, 9], [21, 25], [37, 41]]
    expected = [
        [(value / 48 - m) / s for value in row]
        for row, m, s in zip(by_hand, (0.25, 0.5, 0.5), (0.5, 0.25, 1.0), strict=True)
    ]
    assert_close(preprocess(image), torch.tensor(expected).view(1, 3, 2, 1))


def test_a_bicubic_overshoot_is_clamped() -> None:
    step = torch.zeros(1, 3, 8, 8)
    step[..., 4:] = 1
    preprocess = vision.Preprocessing(24, "bicubic", True, None, (0.0,) * 3, (1.0,) * 3)
    assert F.interpolate(step, 24, mode="bicubic", antialias=True).max() > 1.02
    assert preprocess(step).min() == 0
    assert preprocess(step).max() == 1


def test_an_image_smaller_than_the_crop_is_refused() -> None:
    preprocess = vision.Preprocessing(None, "bilinear", True, (8, 8), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=r"images of 9×7 pixels are smaller than the 8×8 centre crop"):
        preprocess(torch.zeros(1, 3, 9, 7))


def clip() -> Any:
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
    return make("CLIPModel", transformers.CLIPConfig(text_config=text, vision_config=SEES, projection_dim=12))


def clip_vision(**settings: Any) -> Any:
    return transformers.CLIPVisionConfig(**SEES, **settings)


MODELS = {
    "vit pooler_output": lambda: make("ViTModel", transformers.ViTConfig(**SEES)),
    "dinov2 pooler_output": lambda: make("Dinov2Model", transformers.Dinov2Config(**SEES)),
    "clip_vision_model image_embeds": lambda: make("CLIPVisionModelWithProjection", clip_vision(projection_dim=12)),
    "clip_vision_model pooler_output": lambda: make("CLIPVisionModel", clip_vision()),
    # [n, d, 1, 1]
    "resnet pooler_output": lambda: make(
        "ResNetModel", transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_equal_the_output_of_the_model(name: str, tmp_path: Path) -> None:
    kind, output = name.split()
    model = MODELS[name]()
    extractor = vision.load_features(write(tmp_path / "tiny", model))
    assert extractor.name == f"{kind} ({output}) tiny"
    images = pictures(3, 37, 53) / 255
    with torch.no_grad():
        expected = model(pixel_values=extractor.preprocess(images))[output].flatten(1)
    features = extractor(images)
    assert features.shape == (3, 12 if output == "image_embeds" else 16)
    assert_close(features, expected, **NETWORK)
    assert_close(extractor(images[1:2]), features[1:2], **NETWORK)


def test_a_complete_clip_model_gives_its_image_features(tmp_path: Path) -> None:
    model = clip()
    extractor = vision.load_features(write(tmp_path / "tiny", model, "clip"))
    images = pictures(2, 37, 53) / 255
    with torch.no_grad():
        tower = model.vision_model(pixel_values=extractor.preprocess(images)).pooler_output
    assert extractor.name == "clip_vision_model (image_embeds) tiny"
    assert_close(extractor(images), tower @ model.visual_projection.weight.detach().T, **NETWORK)


def test_a_pooler_without_weights_is_not_used(tmp_path: Path) -> None:
    model = make("ViTForImageClassification", transformers.ViTConfig(**SEES))
    extractor = vision.load_features(write(tmp_path / "tiny", model))
    images = pictures(2, 20, 20) / 255
    with torch.no_grad():
        hidden = model.vit(pixel_values=extractor.preprocess(images)).last_hidden_state
    assert extractor.name == "vit (last_hidden_state) tiny"
    assert_close(extractor(images), (hidden[:, 0] + hidden[:, 1:].sum(dim=1)) / 5, **NETWORK)  # 2×2 patches and a class


def test_hidden_states_on_a_grid_are_averaged_over_it(tmp_path: Path) -> None:
    config = transformers.PoolFormerConfig(hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1])
    model = make("PoolFormerModel", config)
    extractor = vision.load_features(write(tmp_path / "tiny", model, size={"height": 64, "width": 64}))
    images = pictures(2, 20, 20) / 255
    with torch.no_grad():
        hidden = model(pixel_values=extractor.preprocess(images)).last_hidden_state
    assert hidden.shape == (2, 16, 2, 2)
    by_hand = (hidden[..., 0, 0] + hidden[..., 0, 1] + hidden[..., 1, 0] + hidden[..., 1, 1]) / 4
    assert_close(extractor(images), by_hand, **NETWORK)


def test_features_are_float32_without_a_gradient_for_any_dtype(vit: Path) -> None:
    images = (pictures(2, 37, 53) / 255).requires_grad_()
    single, half = vision.load_features(vit), vision.load_features(str(vit), dtype=torch.bfloat16)
    assert next(half.network.args[0].parameters()).dtype == torch.bfloat16
    for features in (single(images), half(images), single(images.half())):
        assert features.dtype == torch.float32
        assert not features.requires_grad
    assert_close(half(images), single(images), atol=0.05, rtol=0.0)  # bfloat16 has 8 bits, of values below 1
    assert not torch.equal(half(images), single(images))


def test_loading_makes_no_network_request(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: requests.append(host))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: requests.append(address))
    vision.load_features(vit)
    assert requests == []


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), pictures(1, 8, 8)])
def test_invalid_image_batches_are_refused(images: Tensor, vit: Path) -> None:
    with pytest.raises(ValueError, match=r"expected floats in \[0, 1\] of shape \[n, 3, height, width\]"):
        inspect.unwrap(vision.Extractor.__call__)(vision.load_features(vit), images)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no feature extractor at '.*nowhere': expected the folder of a transformers"):
        vision.load_features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a folder without config\.json: expected a transformers vision model"):
        vision.load_features(tmp_path)
    config = transformers.BertConfig(**TINY, vocab_size=50)
    with pytest.raises(ValueError, match="model of type 'bert', which does not turn images alone into features"):
        vision.load_features(write(tmp_path / "text", make("BertModel", config)))
    config = transformers.ViTMAEConfig(**{**SEES, "patch_size": 2})
    with pytest.raises(ValueError, match=r"its last_hidden_state of the same image .* differs between two rows"):
        vision.load_features(write(tmp_path / "masked", make("ViTMAEModel", config)))


def test_a_folder_without_its_processor_is_refused(vit: Path) -> None:
    (vit / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json, which says how images are preprocessed"):
        vision.load_features(vit)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "is ConvNextImageProcessor, which may do more .* ViTImage",
        ),
        ({"do_pad": True}, "is ViTImageProcessor with do_pad, which may do more"),
        ({"resample": 1}, r"has resample .*1.*: expected 2 \(bilinear\) or 3 \(bicubic\)"),
        ({"resample": None}, "has resample None: expected 2"),
        ({"size": {"longest_edge": 20}}, r"has size {'longest_edge': 20}: expected height and width"),
        (
            {"do_center_crop": True, "crop_size": {"shortest_edge": 20}},
            r"has crop_size {'shortest_edge': 20}: expected",
        ),
        ({"image_processor_type": "NoSuchProcessor"}, "could not be read: "),
        ({"size": 30}, r"could not be run: .*size"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, r"could not be run: "),
    ],
)
def test_other_preprocessing_is_refused(settings: dict[str, Any], message: str, vit: Path) -> None:
    file = vit / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ValueError, match=message):
        vision.load_features(vit)


def test_a_model_without_all_its_weights_is_refused(vit: Path) -> None:
    file = vit / "model.safetensors"
    weights = load_file(file)
    gone = next(name for name in weights if name.endswith("layernorm_before.weight"))
    save_file({name: value for name, value in weights.items() if name != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no fitting weights for .*layernorm_before\.weight of ViTModel"):
        vision.load_features(vit)
    save_file({name: value[:-1] if name == gone else value for name, value in weights.items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has no fitting weights for .*layernorm_before\.weight of ViTModel"):
        vision.load_features(vit)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the vision model in '.*' could not be loaded"):
        vision.load_features(vit)


@pytest.mark.soak
def test_the_games_are_played_with_any_extractor(vit: Path) -> None:
    """The distances use the extractor's features, and its name is recorded."""
    engine, extract = Engine.from_pretrained("shapes", device="cpu"), vision.load_features(vit)
    jobs = [engine.job("a blue square on a gray background", num_steps=2, seed=seed) for seed in (0, 1)]
    outcome = evaluate.play_games(engine.denoiser, engine.sample, jobs, [Random()], features=extract)
    curves = outcome.results["random"][0].curves
    assert curves is not None
    assert curves.features.shape == (2, 17, 16)
    summary = evaluate.summarise_games(outcome, "features")
    assert summary.features == extract.name == "vit (pooler_output) tiny-vit"
