"""Train the embedded model from scratch: autoencoder, text encoder with denoiser, and the judge of its images.

    python -m dfengine.shapes.train --state build/shapes

runs all stages in order and exports a diffusers pipeline folder. Each stage saves checkpoints in the state folder and
resumes from them; batches are a function of (seed, step), so an interrupted run sees the same data.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dfengine.shapes.judge import ABSENT, ATTRIBUTES, WEIGHTS, Judge, attribute_indices, attribute_loss, split_logits
from dfengine.shapes.optimise import TrainingRun
from dfengine.shapes.world import SIZE, Caption, Scenes, render, sample_scenes, vocabulary

MAX_TOKENS = 16
TEXT_WIDTH = 96
#: Noise added to the latents in autoencoder training, in standard deviations, to make the decoder robust to errors.
LATENT_NOISE = 0.05
#: Share of prompts replaced by the empty prompt, for classifier-free guidance.
EMPTY_PROMPT_SHARE = 0.1
#: Weight of the text encoder's auxiliary loss (see `TextToLatent.attribute_head`).
ATTRIBUTE_LOSS_WEIGHT = 0.1


# --- autoencoder -----------------------------------------------------------------------------------------------------


def train_autoencoder(run: TrainingRun, steps: int) -> AutoencoderKL:
    """An autoencoder of 64×64 images to 4×16×16 latents: MSE + 0.2 L1 with slight latent noise, then whitened."""
    torch.manual_seed(run.seed)
    model = AutoencoderKL(
        block_out_channels=(24, 48, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=SIZE,
        scaling_factor=1.0,
    )

    def loss_fn(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        images = 2 * render(sample_scenes(16, generator))[0].to(run.device, memory_format=torch.channels_last) - 1
        latents = model.encode(images).latent_dist.mean
        spread = latents.std((0, 2, 3), keepdim=True).detach()
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        decoded = model.decode(latents + LATENT_NOISE * spread * noise).sample
        return F.mse_loss(decoded, images) + 0.2 * F.l1_loss(decoded, images)

    model = run.optimise("autoencoder", model, loss_fn, steps=steps, learning_rate=2e-3, ema_decay=0.99)
    images = 2 * render(sample_scenes(512, run.generator("whiten", 0)))[0].to(run.device) - 1
    with torch.no_grad():
        whiten(model, model.encode(images).latent_dist.mean)
        decoded = model.decode(model.encode(images).latent_dist.mean).sample
    run.log("autoencoder", mse_in_unit_range=F.mse_loss(decoded, images).item() / 4)
    return model


def whiten(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold the affine map that gives the latents zero mean and identity covariance into the 1×1 convolutions."""
    flat = latents.transpose(0, 1).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    whitening = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T
    encoder, decoder, channels = model.quant_conv, model.post_quant_conv, len(mean)
    weight, bias = encoder.weight[:channels, :, 0, 0].double(), encoder.bias[:channels].double()
    encoder.weight.zero_()
    encoder.weight[:channels, :, 0, 0] = (whitening @ weight).float()
    encoder.bias[:channels] = (whitening @ (bias - mean)).float()
    encoder.bias[channels:] = 2 * math.log(LATENT_NOISE)
    weight = decoder.weight[:, :, 0, 0].double()
    decoder.bias += (weight @ mean).float()
    decoder.weight[:, :, 0, 0] = (weight @ inverse).float()


# --- text and denoiser -----------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer with one token per word of the world; `init_kwargs["words"]` lists the words."""
    merges: list[tuple[str, str]] = []
    words = vocabulary()
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    symbols = {letter for word in words for letter in (*word[:-1], word[-1] + "</w>")}
    tokens = sorted(symbols | {a + b for a, b in merges}, key=lambda token: (len(token), token))
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    tokenizer.init_kwargs["words"] = words
    return tokenizer


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


class TextToLatent(nn.Module):
    """The denoiser and the text encoder, trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            block_out_channels=(48, 96, 96),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModel(config)
        self.attribute_head = nn.Linear(TEXT_WIDTH, sum(map(len, ATTRIBUTES.values())))
        """Predicts the caption's attributes, ordered by position, from its last token. Which shape is on the left
        depends on subject and relation together, which the noise prediction alone learns very late."""

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The noise prediction, and the logits of the caption's attributes."""
        text = self.text_encoder(tokens).last_hidden_state
        epsilon = self.unet(latents, timesteps, encoder_hidden_states=text).sample
        return epsilon, split_logits(self.attribute_head(text[:, -1]))


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def train_denoiser(
    run: TrainingRun, autoencoder: AutoencoderKL, steps: int, num_scenes: int
) -> tuple[TextToLatent, CLIPTokenizer]:
    """The denoiser and text encoder, trained by noise prediction on cached latents and the auxiliary loss."""
    torch.manual_seed(run.seed)
    tokenizer = build_tokenizer(run.state / "tokenizer")
    latents, tokens, attributes = cached_latents(run, autoencoder, tokenizer, num_scenes)
    empty = tokenize(tokenizer, [""])[0].to(run.device)
    alpha_bar = build_scheduler().alphas_cumprod.to(run.device)

    def loss_fn(model: TextToLatent, generator: torch.Generator) -> Tensor:
        rows = torch.randint(num_scenes, (32,), generator=generator)
        t = torch.randint(1000, (32,), generator=generator).to(run.device)
        noise = torch.randn((32, *latents.shape[1:]), generator=generator).to(run.device)
        is_empty = (torch.rand(32, 1, generator=generator) < EMPTY_PROMPT_SHARE).to(run.device)
        a = alpha_bar[t][:, None, None, None]
        noisy = a.sqrt() * latents[rows].to(run.device) + (1 - a).sqrt() * noise
        text = torch.where(is_empty, empty, tokens[rows].to(run.device))
        epsilon, logits = model(noisy.contiguous(memory_format=torch.channels_last), t, text)
        target = torch.where(is_empty, ABSENT, attributes[rows].to(run.device))
        denoising = (loss_weight(a) * (epsilon - noise) ** 2).mean()
        return denoising + ATTRIBUTE_LOSS_WEIGHT * attribute_loss(logits, target)

    model = TextToLatent(tokenizer)
    model = run.optimise("denoiser", model, loss_fn, steps=steps, learning_rate=2e-3, ema_decay=0.999)
    return model, tokenizer


def loss_weight(alpha_bar: Tensor) -> Tensor:
    """Weights that make an error in ε count as the error in v, 1/ᾱ, up to 10, and by min-SNR at low noise.

    The layout is decided at high noise, where errors in ε are small, so uniform weights learn it last (Salimans & Ho
    2022; Hang et al. 2023).
    """
    snr = alpha_bar / (1 - alpha_bar)
    return (1 / alpha_bar).clamp(max=10) * (5 / snr).clamp(max=1)


def cached_latents(
    run: TrainingRun, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [count, 4, 16, 16], token ids and attribute indices of `count` training scenes, encoded once."""
    path = run.state / f"latents-{count}.pt"
    if not path.exists():
        parts: list[Tensor] = []
        captions: list[Caption] = []
        for first in range(0, count, 500):
            scenes: Scenes = sample_scenes(min(500, count - first), run.generator("latents", first))
            images = render(scenes)[0].to(run.device, memory_format=torch.channels_last)
            with torch.no_grad():
                parts.append(autoencoder.encode(2 * images - 1).latent_dist.mean.cpu())
            captions += scenes.captions
        tokens = tokenize(tokenizer, list(map(str, captions)))
        torch.save((torch.cat(parts), tokens, attribute_indices(captions)), path)
    return torch.load(path)


# --- judge and export ------------------------------------------------------------------------------------------------


def train_judge(run: TrainingRun, steps: int) -> Judge:
    """The judge, trained on rendered scenes with slight blur and noise, so that it generalises to decoded latents."""
    torch.manual_seed(run.seed)

    def loss_fn(model: Judge, generator: torch.Generator) -> Tensor:
        scenes = sample_scenes(64, generator)
        images = render(scenes)[0]
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.lerp(images, blurred, torch.rand(64, 1, 1, 1, generator=generator))
        images = images + 0.1 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(
            images.shape, generator=generator
        )
        images = images + 0.05 * torch.randn(64, 3, 1, 1, generator=generator)
        return attribute_loss(model(images.to(run.device)), attribute_indices(scenes.captions).to(run.device))

    model = run.optimise("judge", Judge(), loss_fn, steps=steps, learning_rate=1e-3, ema_decay=0.99)
    scenes = sample_scenes(1000, run.generator("judge-test", 0), held_out=True)
    accuracy = model.cpu().agrees(render(scenes)[0], scenes.captions).all(1).float().mean()
    run.log("judge", accuracy_on_held_out_scenes=accuracy.item())
    return model


def export(
    model: TextToLatent, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, judge: Judge, folder: Path
) -> None:
    """Write a pipeline folder that `StableDiffusionPipeline.from_pretrained` reads, with the judge in it."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.cpu(),
        text_encoder=model.text_encoder.cpu(),
        tokenizer=tokenizer,
        unet=model.unet.cpu(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    judge_state = {name: value.contiguous() for name, value in judge.cpu().state_dict().items()}
    save_file(judge_state, folder / WEIGHTS.name)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors creates files that only their owner can read


def main() -> None:
    """Run all stages in order, resuming from their checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="folder of checkpoints and logs, outside git")
    parser.add_argument("--out", type=Path, help="pipeline folder to write (default: STATE/pipeline)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--denoiser-steps", type=int, default=6000)
    parser.add_argument("--judge-steps", type=int, default=2500)
    parser.add_argument("--scenes", type=int, default=30_000, help="scenes whose latents are cached")
    options = parser.parse_args()

    run = TrainingRun(options.state, options.seed, options.device)
    run.state.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(run, options.autoencoder_steps)
    model, tokenizer = train_denoiser(run, autoencoder, options.denoiser_steps, options.scenes)
    judge = train_judge(run, options.judge_steps)
    export(model, tokenizer, autoencoder, judge, options.out or run.state / "pipeline")


if __name__ == "__main__":
    main()
