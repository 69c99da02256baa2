"""Stable Diffusion XL: two text encoders, and a UNet conditioned on the image size as well as the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from dfengine.diffusion.denoiser import Condition
from dfengine.models.registry import adapter
from dfengine.models.unet.stable_diffusion import StableDiffusion


@adapter("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
class StableDiffusionXL(StableDiffusion):
    """Adapter of Stable Diffusion XL base pipelines.

    As in diffusers, the original and target sizes are the image's own, and the crop offset is 0. Raises ValueError for
    the refiner, which has a single text encoder and is conditioned on an aesthetic score.
    """

    text_encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2")
    upcasts: ClassVar[bool] = True

    def __init__(self, pipeline: Any, **options: Any) -> None:
        missing = [part for part in (*self.text_encoders, *self.tokenizers) if getattr(pipeline, part, None) is None]
        if missing or pipeline.config.get("requires_aesthetics_score"):
            raise ValueError(
                f"the pipeline has no {' and no '.join(missing) or 'plain size condition'}: expected the base model of "
                "Stable Diffusion XL with both text encoders; the refiner is not supported"
            )
        super().__init__(pipeline, **options)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """The encoding of each prompt, and the image size.

        The empty prompt, "", is encoded as zeros if the pipeline's configuration says `force_zeros_for_empty_prompt`.
        Raises ValueError for a prompt that is too long for a text encoder.
        """
        self.check_prompts(prompts)
        text, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
            text, pooled = text.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        sizes = torch.tensor([*self.image_shape, 0, 0, *self.image_shape], dtype=torch.float32, device=self.device)
        return Condition(
            {
                "text": text.to(self.dtype),
                "text_embeds": pooled.to(self.dtype),
                "time_ids": sizes.expand(len(prompts), -1),
            }
        )
