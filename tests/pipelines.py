"""Tiny random pipelines of many families, and a call of each, whose prompts are embeddings: there is no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: By name, what builds a pipeline and a call of it.
PIPELINES: dict[str, Callable[[], Example]] = {}


class Example(NamedTuple):
    """A pipeline and the arguments of a call, without its generator."""

    pipeline: Any
    arguments: dict[str, Any]

    def call(self, **changes: Any) -> Any:
        """The call's images, as tensors."""
        arguments = {"output_type": "pt", **self.arguments, **changes}
        return self.pipeline(generator=torch.Generator().manual_seed(3), **arguments).images


def example(build: Callable[[], Example]) -> Callable[[], Example]:
    """Register a builder, whose weights are random and always the same."""

    @cache
    def built() -> Example:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            one = build()
        for part in one.pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        one.pipeline.set_progress_bar_config(disable=True)
        return one

    PIPELINES[build.__name__] = built
    return built


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def image(size: int = 16) -> Image.Image:
    values = np.random.default_rng(7).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask(size: int = 16) -> Image.Image:
    values = np.zeros((size, size), np.uint8)
    values[:, size // 2 :] = 255
    return Image.fromarray(values)


# U-Nets --------------------------------------------------------------------------------------------------------------


def unet(in_channels: int = 4, **settings: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **settings,
    )


def codec(latent_channels: int = 4, factor: int = 2, **settings: Any) -> diffusers.AutoencoderKL:
    blocks = factor.bit_length()
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=8 * factor,
        **{"scaling_factor": 0.5, **settings},
    )


def betas(cls: Any = diffusers.DDIMScheduler, **settings: Any) -> Any:
    ends = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    own = {"clip_sample": False, "set_alpha_to_one": False} if cls is diffusers.DDIMScheduler else {}
    return cls(**{**ends, **own, **settings})


def sd(cls: Any, scheduler: Any = None, *, in_channels: int = 4, network: Any = None, **more: Any) -> Any:
    return cls(
        vae=codec(),
        text_encoder=None,
        tokenizer=None,
        unet=network or unet(in_channels),
        scheduler=scheduler or betas(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


PROMPT = {"prompt_embeds": normal(1, 7, 16), "negative_prompt_embeds": -normal(1, 7, 16), "num_inference_steps": 4}
SIZE = {"height": 16, "width": 16}


@example
def stable_diffusion() -> Example:
    return Example(sd(diffusers.StableDiffusionPipeline), PROMPT | SIZE)


@example
def stable_diffusion_euler() -> Example:
    return Example(sd(diffusers.StableDiffusionPipeline, betas(diffusers.EulerDiscreteScheduler)), PROMPT | SIZE)


@example
def stable_diffusion_euler_a() -> Example:
    scheduler = betas(diffusers.EulerAncestralDiscreteScheduler)
    return Example(sd(diffusers.StableDiffusionPipeline, scheduler), PROMPT | SIZE)


@example
def stable_diffusion_heun() -> Example:
    scheduler = betas(diffusers.HeunDiscreteScheduler)
    return Example(sd(diffusers.StableDiffusionPipeline, scheduler), PROMPT | SIZE)


@example
def stable_diffusion_dpm() -> Example:
    scheduler = betas(diffusers.DPMSolverMultistepScheduler)
    return Example(sd(diffusers.StableDiffusionPipeline, scheduler), PROMPT | SIZE)


@example
def stable_diffusion_turbo() -> Example:
    """Guidance 0: the network is called once a step."""
    scheduler = betas(diffusers.EulerAncestralDiscreteScheduler, timestep_spacing="trailing")
    return Example(sd(diffusers.StableDiffusionPipeline, scheduler), PROMPT | SIZE | {"guidance_scale": 0.0})


@example
def latent_consistency() -> Example:
    network = unet(time_cond_proj_dim=8)
    pipeline = sd(diffusers.LatentConsistencyModelPipeline, betas(diffusers.LCMScheduler), network=network)
    return Example(pipeline, SIZE | {"prompt_embeds": PROMPT["prompt_embeds"], "num_inference_steps": 4})


@example
def img2img() -> Example:
    return Example(sd(diffusers.StableDiffusionImg2ImgPipeline), PROMPT | {"image": image(), "strength": 0.8})


@example
def inpaint() -> Example:
    arguments = PROMPT | SIZE | {"image": image(), "mask_image": mask(), "strength": 1.0}
    return Example(sd(diffusers.StableDiffusionInpaintPipeline), arguments)


@example
def inpaint_9_channels() -> Example:
    arguments = PROMPT | SIZE | {"image": image(), "mask_image": mask()}
    return Example(sd(diffusers.StableDiffusionInpaintPipeline, in_channels=9), arguments)


@example
def instruct_pix2pix() -> Example:
    arguments = PROMPT | {"image": image(), "image_guidance_scale": 1.5}
    return Example(sd(diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=8), arguments)


def controlnet() -> diffusers.ControlNetModel:
    network = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        in_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    for part in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(part.weight)  # a new ControlNet adds nothing
    return network


@example
def controlnet_one() -> Example:
    pipeline = sd(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet())
    return Example(pipeline, PROMPT | SIZE | {"image": image()})


@example
def controlnet_two() -> Example:
    pipeline = sd(diffusers.StableDiffusionControlNetPipeline, controlnet=[controlnet(), controlnet()])
    return Example(pipeline, PROMPT | SIZE | {"image": [image(), image()]})


@example
def perturbed_attention() -> Example:
    return Example(sd(diffusers.StableDiffusionPAGPipeline), PROMPT | SIZE | {"pag_scale": 3.0})


@example
def ddpm() -> Example:
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    return Example(pipeline, {"num_inference_steps": 4, "output_type": "np"})


# Transformers --------------------------------------------------------------------------------------------------------


@example
def stable_diffusion_3() -> Example:
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=16,
            pooled_projection_dim=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=codec(shift_factor=0.06),
        **dict.fromkeys(
            ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        ),
    )
    pooled = {"pooled_prompt_embeds": normal(1, 8), "negative_pooled_prompt_embeds": -normal(1, 8)}
    return Example(pipeline, PROMPT | SIZE | pooled | {"guidance_scale": 5.0})


def flux_network(**settings: Any) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        **settings,
    )


def flux_pipeline(cls: Any = diffusers.FluxPipeline, **settings: Any) -> Any:
    return cls(
        transformer=flux_network(**settings),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=codec(shift_factor=0.1),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )


FLUX = {"prompt_embeds": normal(1, 7, 16), "pooled_prompt_embeds": normal(1, 8), "num_inference_steps": 4} | SIZE


@example
def flux() -> Example:
    return Example(flux_pipeline(guidance_embeds=True), FLUX | {"height": 16, "width": 32})


@example
def flux_true_cfg() -> Example:
    negative = {"negative_prompt_embeds": -normal(1, 7, 16), "negative_pooled_prompt_embeds": -normal(1, 8)}
    return Example(flux_pipeline(), FLUX | negative | {"true_cfg_scale": 2.0})


@example
def flux_kontext() -> Example:
    pipeline = flux_pipeline(diffusers.FluxKontextPipeline)
    return Example(pipeline, FLUX | {"image": image(), "_auto_resize": False, "max_area": 256})


@example
def pixart_sigma() -> Example:
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=codec(),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=16,
            out_channels=8,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    attention = {name: torch.ones(1, 7) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    more = {"negative_prompt": None, "use_resolution_binning": False}
    return Example(pipeline, PROMPT | SIZE | attention | more)


@example
def dit() -> Example:
    pipeline = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        vae=codec(),
        scheduler=diffusers.DDIMScheduler(),
    )
    return Example(pipeline, {"class_labels": [1], "num_inference_steps": 4, "output_type": "np"})


@example
def z_image() -> Example:
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # not initialised otherwise
        network.x_pad_token.fill_(1)
        network.cap_pad_token.fill_(1)
    pipeline = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=codec(shift_factor=0.1),
        text_encoder=None,
        tokenizer=None,
        transformer=network,
    )
    prompts = {"prompt_embeds": [normal(7, 16)], "negative_prompt_embeds": [-normal(7, 16)]}
    return Example(pipeline, prompts | SIZE | {"num_inference_steps": 4, "guidance_scale": 5.0})


@example
def qwen_image() -> Example:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 1.5, 1.0],
    )
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=network,
    )
    masks = {name: torch.ones(1, 7, dtype=torch.long) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    return Example(pipeline, PROMPT | SIZE | masks | {"true_cfg_scale": 4.0})


@example
def sana() -> Example:
    pipeline = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=[1, 1],
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        ),
        transformer=diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    attention = {name: torch.ones(1, 7) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    more = {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32}
    return Example(pipeline, PROMPT | attention | more)
