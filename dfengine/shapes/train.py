"""Train the embedded model from nothing: autoencoder, text encoder and denoiser, and the judge of its images.

    python -m dfengine.shapes.train --state build/shapes

runs every stage in order and exports a diffusers pipeline folder. Each stage checkpoints to the state folder and
goes on from there when run again; batches are drawn by (seed, step), so an interrupted run sees the same data.
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

from dfengine.shapes import judge as judging
from dfengine.shapes.optimise import Run
from dfengine.shapes.world import SIZE, Caption, Scenes, render, sample_scenes, vocabulary

MAX_TOKENS = 16
TEXT_WIDTH = 96
#: Noise on the latents while the autoencoder trains, in standard deviations: the decoder learns to forgive it.
LATENT_NOISE = 0.05
#: Share of prompts left empty, so that the model can be guided.
EMPTY_PROMPTS = 0.1
#: Weight of the text encoder's own task: the end-of-text token must tell what is where (see `Pair.tell`).
TELLING = 0.1


# --- autoencoder -----------------------------------------------------------------------------------------------------


def train_autoencoder(run: Run, steps: int) -> AutoencoderKL:
    """64×64 images ↔ 4×16×16 latents; MSE + 0.2 L1 under a little latent noise, then whitened."""
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

    def loss_of(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        images = 2 * render(sample_scenes(16, generator))[0].to(run.device, memory_format=torch.channels_last) - 1
        latents = model.encode(images).latent_dist.mean
        spread = latents.std((0, 2, 3), keepdim=True).detach()
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        decoded = model.decode(latents + LATENT_NOISE * spread * noise).sample
        return F.mse_loss(decoded, images) + 0.2 * F.l1_loss(decoded, images)

    model = run.optimise("autoencoder", model, loss_of, steps=steps, learning_rate=2e-3, ema_decay=0.99)
    images = 2 * render(sample_scenes(512, run.generator("whiten", 0)))[0].to(run.device) - 1
    with torch.no_grad():
        whiten(model, model.encode(images).latent_dist.mean)
        decoded = model.decode(model.encode(images).latent_dist.mean).sample
    run.log("autoencoder", mse_in_unit_range=F.mse_loss(decoded, images).item() / 4)
    return model


def whiten(model: AutoencoderKL, latents: Tensor) -> None:
    """Fold into the 1×1 convolutions the map that gives the latents zero mean and identity covariance."""
    flat = latents.transpose(0, 1).flatten(1).double()
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    forth = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    back = vectors @ torch.diag(values.sqrt()) @ vectors.T
    into, out_of, channels = model.quant_conv, model.post_quant_conv, len(mean)
    weight, bias = into.weight[:channels, :, 0, 0].double(), into.bias[:channels].double()
    into.weight.zero_()
    into.weight[:channels, :, 0, 0] = (forth @ weight).float()
    into.bias[:channels] = (forth @ (bias - mean)).float()
    into.bias[channels:] = 2 * math.log(LATENT_NOISE)
    weight = out_of.weight[:, :, 0, 0].double()
    out_of.bias += (weight @ mean).float()
    out_of.weight[:, :, 0, 0] = (weight @ back).float()


# --- text and denoiser -----------------------------------------------------------------------------------------------


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer that merges exactly the world's words; the words themselves are kept beside it."""
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


class Pair(nn.Module):
    """Denoiser and text encoder, trained as one."""

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
        self.tell = nn.Linear(TEXT_WIDTH, sum(map(len, judging.ATTRIBUTES.values())))
        """Reads the caption's attributes by place off its last token. Which shape is at the left follows from subject
        and relation together; noise prediction alone finds that out very late."""

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The noise prediction, and the logits of what the text says."""
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(latents, timesteps, encoder_hidden_states=text).sample, judging.split(self.tell(text[:, -1]))


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


def train_denoiser(run: Run, autoencoder: AutoencoderKL, steps: int, num_scenes: int) -> tuple[Pair, CLIPTokenizer]:
    """Noise prediction on cached latents, and the text encoder's own task beside it."""
    torch.manual_seed(run.seed)
    tokenizer = build_tokenizer(run.state / "tokenizer")
    latents, tokens, attributes = cached_latents(run, autoencoder, tokenizer, num_scenes)
    empty = tokenize(tokenizer, [""])[0].to(run.device)
    alpha_bar = build_scheduler().alphas_cumprod.to(run.device)

    def loss_of(model: Pair, generator: torch.Generator) -> Tensor:
        rows = torch.randint(num_scenes, (32,), generator=generator)
        t = torch.randint(1000, (32,), generator=generator).to(run.device)
        noise = torch.randn((32, *latents.shape[1:]), generator=generator).to(run.device)
        dropped = (torch.rand(32, 1, generator=generator) < EMPTY_PROMPTS).to(run.device)
        a = alpha_bar[t][:, None, None, None]
        noisy = a.sqrt() * latents[rows].to(run.device) + (1 - a).sqrt() * noise
        text = torch.where(dropped, empty, tokens[rows].to(run.device))
        predicted, told = model(noisy.contiguous(memory_format=torch.channels_last), t, text)
        wanted = torch.where(dropped, judging.ABSENT, attributes[rows].to(run.device))
        return (weight(a) * (predicted - noise) ** 2).mean() + TELLING * judging.loss(told, wanted)

    pair = run.optimise("denoiser", Pair(tokenizer), loss_of, steps=steps, learning_rate=2e-3, ema_decay=0.999)
    return pair, tokenizer


def weight(alpha_bar: Tensor) -> Tensor:
    """The error in ε counts as the error in v would, 1/ᾱ, but at most 10; where there is hardly any noise, by min-SNR.

    What is where is decided at high noise, where an error in ε is small; plain weights learn it last (Salimans & Ho
    2022; Hang et al. 2023).
    """
    snr = alpha_bar / (1 - alpha_bar)
    return (1 / alpha_bar).clamp(max=10) * (5 / snr).clamp(max=1)


def cached_latents(
    run: Run, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [count, 4, 16, 16], token ids and attributes by place of `count` training scenes, encoded once."""
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
        torch.save((torch.cat(parts), tokens, judging.read(captions)), path)
    return torch.load(path)


# --- judge and export ------------------------------------------------------------------------------------------------


def train_judge(run: Run, steps: int) -> judging.Judge:
    """Cross-entropy on rendered scenes, blurred and noised a little so that decoded latents look the same to it."""
    torch.manual_seed(run.seed)

    def loss_of(model: judging.Judge, generator: torch.Generator) -> Tensor:
        scenes = sample_scenes(64, generator)
        images = render(scenes)[0]
        blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        images = torch.lerp(images, blurred, torch.rand(64, 1, 1, 1, generator=generator))
        images = images + 0.1 * torch.rand(64, 1, 1, 1, generator=generator) * torch.randn(
            images.shape, generator=generator
        )
        images = images + 0.05 * torch.randn(64, 3, 1, 1, generator=generator)
        return judging.loss(model(images.to(run.device)), judging.read(scenes.captions).to(run.device))

    model = run.optimise("judge", judging.Judge(), loss_of, steps=steps, learning_rate=1e-3, ema_decay=0.99)
    scenes = sample_scenes(1000, run.generator("judge-test", 0), held_out=True)
    right = model.cpu().agrees(render(scenes)[0], scenes.captions).all(1).float().mean()
    run.log("judge", right_on_held_out_scenes=right.item())
    return model


def export(
    pair: Pair, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, judge: judging.Judge, folder: Path
) -> None:
    """Write the pipeline folder that `StableDiffusionPipeline.from_pretrained` reads, and the judge beside it."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder.cpu(),
        text_encoder=pair.text_encoder.cpu(),
        tokenizer=tokenizer,
        unet=pair.unet.cpu(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    save_file(
        {name: value.contiguous() for name, value in judge.cpu().state_dict().items()}, folder / judging.WEIGHTS.name
    )
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors keeps its files to their owner; a package is for everyone


def main() -> None:
    """Run every stage in order, each going on from its last checkpoint."""
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

    run = Run(options.state, options.seed, options.device)
    run.state.mkdir(parents=True, exist_ok=True)
    autoencoder = train_autoencoder(run, options.autoencoder_steps)
    pair, tokenizer = train_denoiser(run, autoencoder, options.denoiser_steps, options.scenes)
    judge = train_judge(run, options.judge_steps)
    export(pair, tokenizer, autoencoder, judge, options.out or run.state / "pipeline")


if __name__ == "__main__":
    main()
