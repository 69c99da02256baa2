"""A tiny random Stable Diffusion in diffusers' own folder format."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dfengine.shapes import train
from dfengine.shapes.judge import Judge


class TinyTextToLatent(train.TextToLatent):
    """Denoiser and text encoder of the tiny model: 4×8×8 latents, text of width 16."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        nn.Module.__init__(self)
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=train.MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def export(folder: Path) -> Path:
    """Write the pipeline as the training script exports it: random weights, 4×8×8 latents, 16×16 images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = train.build_tokenizer(folder / "words")
        autoencoder = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=16,
            scaling_factor=0.5,
        )
        train.export(TinyTextToLatent(tokenizer), tokenizer, autoencoder, Judge(), folder / "pipeline")
    return folder / "pipeline"
