"""The embedded world, its tokenizer and judge, and the parts of training."""

import json
import math
import re
from collections import Counter
from functools import cache
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from dfengine.shapes import train
from dfengine.shapes.judge import ABSENT, ATTRIBUTES, Judge, attribute_indices, attribute_loss
from dfengine.shapes.optimise import TrainingRun
from dfengine.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    RELATIONS,
    SIZE,
    Caption,
    Scenes,
    render,
    sample_scenes,
    vocabulary,
)

PALETTE = torch.tensor(list(COLOURS.values()))
GROUNDS = torch.tensor(list(BACKGROUNDS.values()))


def scenes_of(seed: int, count: int = 400, *, held_out: bool = False) -> Scenes:
    return sample_scenes(count, torch.Generator().manual_seed(seed), held_out=held_out)


@pytest.fixture(scope="module")
def world() -> tuple[Scenes, Tensor, Tensor]:
    scenes = scenes_of(0)
    return scenes, *render(scenes)


# --- renderer --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_are_coloured_masks(world: tuple[Scenes, Tensor, Tensor]) -> None:
    scenes, images, masks = world
    assert images.shape == (400, 3, SIZE, SIZE)
    assert masks.shape == (400, 2, SIZE, SIZE)
    subject, other = masks[:, 0, None], masks[:, 1, None]
    colours = PALETTE[scenes.colour][..., None, None]
    ground = GROUNDS[scenes.background][..., None, None]
    painted = (1 - subject - other) * ground + subject * colours[:, 0] + other * colours[:, 1]
    assert_close(images, painted, rtol=0, atol=1e-6)


def test_shapes_do_not_overlap(world: tuple[Scenes, Tensor, Tensor]) -> None:
    _, _, masks = world
    assert masks.min() == 0
    assert masks.max() == 1
    assert (masks[:, 0] * masks[:, 1]).max() == 0


def test_only_relations_have_an_object(world: tuple[Scenes, Tensor, Tensor]) -> None:
    scenes, _, masks = world
    assert torch.equal(masks[:, 1].amax((1, 2)) > 0, scenes.relation >= 0)
    assert (masks[:, 0].amax((1, 2)) == 1).all()
    assert 0.2 < (scenes.relation < 0).float().mean() < 0.3


@pytest.mark.slow
def test_shapes_are_not_cut_off(world: tuple[Scenes, Tensor, Tensor]) -> None:
    """Moved by an integer number of pixels to the centre, each shape keeps its area: no border cuts it off."""
    scenes, _, masks = world
    middle = scenes.centre + (SIZE / 2 - scenes.centre).round()
    moved = render(Scenes(**{**{name: vars(scenes)[name] for name in Scenes.__dataclass_fields__}, "centre": middle}))[
        1
    ]
    assert_close(masks.sum((2, 3)), moved.sum((2, 3)), rtol=0, atol=0.01)


def test_edges_are_smooth(world: tuple[Scenes, Tensor, Tensor]) -> None:
    """A pixel is partly covered along the complete outline and nowhere else."""
    scenes, _, masks = world
    fractional = ((masks[:, 0] > 0) & (masks[:, 0] < 1)).sum((1, 2))
    assert (fractional > 2 * math.pi * scenes.radius[:, 0] / 2).all()
    assert (fractional < 12 * scenes.radius[:, 0]).all()


def area(kind: str, r: float) -> float:
    """The area of a shape in square pixels, by elementary geometry."""
    return {
        "circle": math.pi * r**2,
        "square": (2 * 0.85 * r) ** 2,
        # inscribed in the circle
        "triangle": 3 * math.sqrt(3) / 4 * r**2,
        # ten triangles between a tip, the centre and an inner corner
        "star": 5 * r * 0.42 * r * math.sin(math.pi / 5),
        # two bars minus their intersection
        "cross": 2 * (2 * r * 0.68 * r) - (0.68 * r) ** 2,
        "ring": math.pi * (r**2 - (0.48 * r) ** 2),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_areas_match_elementary_geometry(kind: str, world: tuple[Scenes, Tensor, Tensor]) -> None:
    scenes, _, masks = world
    chosen = (scenes.kind[:, 0] == KINDS.index(kind)).nonzero()[:, 0]
    assert len(chosen) > 30
    for i in chosen.tolist():
        want = area(kind, scenes.radius[i, 0].item())
        # Anti-aliasing makes corners slightly blunt or long.
        assert masks[i, 0].sum().item() == pytest.approx(want, rel=0.03)


def test_relations_hold_for_the_masks(world: tuple[Scenes, Tensor, Tensor]) -> None:
    scenes, _, masks = world
    axis = torch.arange(SIZE, dtype=torch.float32)
    for caption, mask in zip(scenes.captions, masks, strict=True):
        if caption.relation is None:
            continue
        (y1, x1), (y2, x2) = (
            ((part.sum(1) @ axis / part.sum()).item(), (part.sum(0) @ axis / part.sum()).item()) for part in mask
        )
        ahead = {"above": y2 - y1, "below": y1 - y2, "left of": x2 - x1, "right of": x1 - x2}[caption.relation]
        aside = abs(x1 - x2) if caption.relation in ("above", "below") else abs(y1 - y2)
        assert ahead > 20
        assert ahead > aside


def test_a_seed_determines_the_scenes() -> None:
    first, again, other = scenes_of(3, 50), scenes_of(3, 50), scenes_of(4, 50)
    assert torch.equal(render(first)[0], render(again)[0])
    assert first.captions == again.captions
    assert not torch.equal(render(first)[0], render(other)[0])


def test_scenes_can_be_indexed() -> None:
    scenes = scenes_of(3, 20)
    part = scenes[torch.tensor([7, 2])]
    assert len(part) == 2
    assert part.captions == [scenes.captions[7], scenes.captions[2]]
    assert torch.equal(render(part)[0], render(scenes)[0][[7, 2]])


# --- captions --------------------------------------------------------------------------------------------------------


@cache
def many_captions() -> list[Caption]:
    """All captions with a single subject, and one in seven of the others."""
    shapes = list(product(COLOURS, KINDS))
    singles = [Caption(shape, background) for shape in shapes for background in BACKGROUNDS]
    others = list(product(permutations(shapes, 2), RELATIONS, BACKGROUNDS))[::7]
    return singles + [Caption(a, background, relation, b) for (a, b), relation, background in others]


def test_captions_can_be_parsed() -> None:
    for caption in many_captions()[::5]:
        text = str(caption)
        assert Caption.parse(text) == Caption.parse(f" {text.upper()}\n") == caption
        assert set(text.split()) <= set(vocabulary())
        for phrase in caption.concepts.values():
            assert re.search(rf"\b{phrase}\b", text)


def test_caption_text_and_concepts() -> None:
    text = "an orange circle left of a blue square on a gray background"
    caption = Caption(("orange", "circle"), "gray", "left of", ("blue", "square"))
    assert str(caption) == text
    assert caption.concepts == {
        "subject": "orange circle",
        "relation": "left of",
        "object": "blue square",
        "background": "gray background",
    }
    assert str(Caption(("red", "star"), "black")) == "a red star on a black background"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a teal circle on a gray background",
        "a red circle above on a gray background",
        "a red circle on a red background",
        "a red circle beside a blue square on a gray background",
        "two red circles on a gray background",
    ],
)
def test_other_texts_are_not_captions(text: str) -> None:
    with pytest.raises(ValueError, match="is not a caption of the embedded world: expected the form"):
        Caption.parse(text)


@pytest.mark.slow
def test_a_twentieth_is_held_out_and_never_trained_on() -> None:
    captions = many_captions()
    assert 0.045 < sum(caption.is_held_out for caption in captions) / len(captions) < 0.055
    # If the checksum changed, held-out captions would have been trained on.
    assert [str(caption) for caption in captions if caption.is_held_out][:2] == [
        "a red ring on a black background",
        "a green circle on a brown background",
    ]
    trained, judged = scenes_of(5, 1000).captions, scenes_of(5, 60, held_out=True).captions
    assert (len(trained), len(judged)) == (1000, 60)
    assert not any(caption.is_held_out for caption in trained)
    assert all(caption.is_held_out for caption in judged)


@pytest.mark.slow
def test_every_value_occurs_and_shapes_differ() -> None:
    captions = scenes_of(6, 3000).captions
    assert all(caption.subject != caption.object for caption in captions)
    for counts, values in (
        (Counter(caption.subject[0] for caption in captions), COLOURS),
        (Counter(caption.subject[1] for caption in captions), KINDS),
        (Counter(caption.background for caption in captions), BACKGROUNDS),
        (Counter(caption.relation for caption in captions if caption.relation), RELATIONS),
    ):
        assert counts.keys() == set(values)
        # Uniform up to chance and the held-out captions.
        assert max(counts.values()) < 1.35 * min(counts.values())


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token_with_its_offsets(tiny_folder: Path, tmp_path: Path) -> None:
    built = train.build_tokenizer(tmp_path)
    exported = StableDiffusionPipeline.from_pretrained(tiny_folder).tokenizer
    text = " ".join(vocabulary())
    for tokenizer in (built, exported):
        assert tokenizer.init_kwargs["words"] == vocabulary()
        assert tokenizer.model_max_length == train.MAX_TOKENS
        tokens = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        begin, *ids, end = tokens.input_ids
        assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(set(ids)) == len(ids) == len(vocabulary())
        assert [text[a:b].strip() for a, b in tokens.offset_mapping[1:-1]] == vocabulary()
        assert tokenizer.unk_token_id not in ids
    assert built(text).input_ids == exported(text).input_ids


def test_every_caption_fits_into_the_tokens(tmp_path: Path) -> None:
    tokenizer = train.build_tokenizer(tmp_path)
    longest = "an orange circle left of an orange square on a gray background"
    ids = train.tokenize(tokenizer, [longest, "", "a red circle"])
    assert ids.shape == (3, train.MAX_TOKENS)
    assert (ids[0] != tokenizer.eos_token_id).sum() == 1 + len(longest.split())
    assert ids[1].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * (train.MAX_TOKENS - 1)


# --- judge -----------------------------------------------------------------------------------------------------------


def test_two_captions_of_one_image_have_the_same_attributes() -> None:
    a, b = ("red", "circle"), ("blue", "square")
    above, below = Caption(a, "gray", "above", b), Caption(b, "gray", "below", a)
    left, right = Caption(a, "gray", "left of", b), Caption(b, "gray", "right of", a)
    indices = attribute_indices(
        [above, below, left, right, Caption(b, "gray", "above", a), Caption(b, "black")]
    ).tolist()
    assert indices[0] == indices[1]
    assert indices[2] == indices[3]
    assert indices[0] != indices[2]
    assert indices[0] != indices[4]
    names = [values[i] for i, values in zip(indices[1], ATTRIBUTES.values(), strict=True)]
    assert names == ["vertical", "red", "circle", "blue", "square", "gray"]
    assert indices[5] == [0, 2, 1, ABSENT, ABSENT, 1]


class Oracle(Judge):
    """Predicts given attributes."""

    def __init__(self, attributes: Tensor) -> None:
        super().__init__()
        self.attributes = attributes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {
            name: nn.functional.one_hot(self.attributes[:, i].clamp(min=0), len(values)).float()
            for i, (name, values) in enumerate(ATTRIBUTES.items())
        }


def test_agreement_is_reported_per_attribute() -> None:
    scenes = scenes_of(8, 12)
    attributes = attribute_indices(scenes.captions)
    images = render(scenes)[0]
    assert Oracle(attributes).agrees(images, scenes.captions).all()
    two = next(i for i, caption in enumerate(scenes.captions) if caption.object)
    attributes[two, 3] = (attributes[two, 3] + 1) % len(COLOURS)
    wrong = ~Oracle(attributes).agrees(images, scenes.captions)
    assert wrong.nonzero().tolist() == [[two, 3]]


def test_the_judges_loss_sums_the_cross_entropies() -> None:
    """For uniform logits the logarithm of the number of values, summed over the attributes that a caption has."""
    captions = scenes_of(8, 12).captions
    single = [caption for caption in captions if caption.object is None]
    assert 0 < len(single) < 12
    for chosen, names in ((captions, set(ATTRIBUTES)), (single, set(ATTRIBUTES) - {"second colour", "second kind"})):
        even = {name: torch.zeros(len(chosen), len(values)) for name, values in ATTRIBUTES.items()}
        want = sum(math.log(len(ATTRIBUTES[name])) for name in names)
        assert attribute_loss(even, attribute_indices(chosen)).item() == pytest.approx(want, rel=1e-5)


# --- training --------------------------------------------------------------------------------------------------------


def tiny_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )


def test_whitening_changes_latents_and_not_images() -> None:
    torch.manual_seed(0)
    model = tiny_autoencoder().requires_grad_(False)
    images = 2 * render(scenes_of(9, 24))[0] - 1
    latents = model.encode(images).latent_dist.mean
    before = model.decode(latents).sample
    flat = latents.transpose(0, 1).flatten(1)
    assert (torch.cov(flat) - torch.eye(4)).abs().max() > 0.1
    train.whiten(model, latents)
    encoded = model.encode(images).latent_dist
    flat = encoded.mean.transpose(0, 1).flatten(1)
    assert_close(flat.mean(1), torch.zeros(4), rtol=0, atol=1e-3)
    assert_close(torch.cov(flat), torch.eye(4), rtol=0, atol=1e-3)
    assert_close(encoded.std, torch.full_like(encoded.std, train.LATENT_NOISE), rtol=1e-4, atol=0)
    assert_close(model.decode(encoded.mean).sample, before, rtol=0, atol=1e-3)


def optimise(run: TrainingRun, *, stop_at: int | None = None) -> tuple[nn.Module, list[int]]:
    """A small network after 150 steps, or up to an interruption, and the steps taken."""
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4, 2))
    taken: list[int] = []

    def loss_fn(model: nn.Module, generator: torch.Generator) -> Tensor:
        if len(taken) == stop_at:
            raise KeyboardInterrupt
        taken.append(len(taken))
        x = torch.randn(8, 3, 3, 3, generator=generator)
        return ((model(x) - x.mean((2, 3))[:, :2]) ** 2).mean()

    return run.optimise("small", model, loss_fn, steps=150, learning_rate=1e-2, ema_decay=0.9), taken


def make_run(folder: Path, seed: int = 0) -> TrainingRun:
    folder.mkdir()
    return TrainingRun(folder, seed, torch.device("cpu"))


@pytest.mark.slow
def test_interrupted_training_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uninterrupted, _ = optimise(make_run(tmp_path / "uninterrupted"))
    run = make_run(tmp_path / "interrupted")
    with pytest.raises(KeyboardInterrupt):
        optimise(run, stop_at=120)
    resumed, taken = optimise(run)
    assert len(taken) == 50  # from the checkpoint at 100
    finished, taken = optimise(run)
    assert len(taken) == 0
    other, _ = optimise(make_run(tmp_path / "other", seed=1))
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
        assert torch.equal(value, finished.state_dict()[name])
        assert not torch.equal(value, other.state_dict()[name])
    log = [json.loads(line) for line in (run.state / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [100, 150]
    assert log[-1]["loss"] < log[0]["loss"]
    assert capsys.readouterr().out.count("\n") == 6
    assert not list(run.state.glob("*.new"))


def test_batches_are_a_function_of_seed_stage_and_step(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, 0, torch.device("cpu"))
    draws = [
        torch.rand(1, generator=run.generator(stage, step)).item() for stage in ("a", "b") for step in (0, 1, 10)
    ] + [torch.rand(1, generator=TrainingRun(tmp_path, 1, run.device).generator("a", 0)).item()]
    assert len(set(draws)) == len(draws)
    assert torch.rand(1, generator=run.generator("a", 0)).item() == draws[0]


@pytest.mark.slow
def test_the_exported_pipeline_is_complete_and_small(tmp_path: Path) -> None:
    """The networks are channels-last, as training leaves them."""
    torch.manual_seed(0)
    tokenizer = train.build_tokenizer(tmp_path / "words")
    model, judge = train.TextToLatent(tokenizer).to(memory_format=torch.channels_last), Judge()
    train.export(
        model, tokenizer, tiny_autoencoder().to(memory_format=torch.channels_last), judge, tmp_path / "pipeline"
    )
    assert sum(file.stat().st_size for file in (tmp_path / "pipeline").rglob("*") if file.is_file()) < 20 * 2**20
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    latents, tokens = torch.randn(1, 4, 16, 16), train.tokenize(tokenizer, ["a red circle on a gray background"])
    with torch.no_grad():
        ours, _ = model(latents, torch.tensor([500]), tokens)
        text = loaded.text_encoder(tokens).last_hidden_state
        theirs = loaded.unet(latents, torch.tensor([500]), encoder_hidden_states=text).sample
    assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert loaded.scheduler.config.clip_sample is False
    again = load_file(tmp_path / "pipeline" / "judge.safetensors")
    assert again.keys() == judge.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in judge.state_dict().items())
