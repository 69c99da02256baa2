"""The published architectures at an eighth of their width: original depth and topology, small enough for a CPU."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from dfengine.diffusion.denoiser import Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import start_noise, trajectories
from dfengine.models.architectures import build, configuration
from dfengine.models.loading import quiet

PROMPT = "a photo of an astronaut riding a horse"
#: float32 through networks that sum in another order, times 1/√ᾱ ≤ 15 at the first step.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
#: Widths and sizes, in any file; the numbers of heads, blocks and layers are unchanged.
_WIDTHS = {
    "addition_time_embed_dim",
    "block_out_channels",
    "cross_attention_dim",
    "hidden_size",
    "intermediate_size",
    "norm_num_groups",
    "projection_class_embeddings_input_dim",
    "projection_dim",
    "sample_size",
    "vocab_size",
}


def reduced(name: str, folder: Path, changes: dict[str, dict[str, Any]] | None = None) -> Path:
    """Write an architecture's configuration files, reduced; `changes` are entries to set, by the files' folder."""
    source = configuration(name)
    for path in source.rglob("*.json"):
        config = json.loads(path.read_text())
        for key in _WIDTHS & set(config):
            config[key] = [width // 8 for width in config[key]] if isinstance(config[key], list) else config[key] // 8
        written = folder / path.relative_to(source)
        written.parent.mkdir(parents=True, exist_ok=True)
        part = "" if path.parent == source else path.parent.name
        written.write_text(json.dumps(config | (changes or {}).get(part, {})))
    return folder


def random_pipeline(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The pipeline of a folder of configuration files, on the CPU."""
    with quiet():
        return build(folder, device=torch.device("cpu"), dtype=dtype, seed=seed)


def pipeline_of(folder: Path) -> Any:
    """The diffusers pipeline of a folder, with DDIM sampling."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def engine_and_pipeline_latents(
    denoiser: Denoiser, pipeline: Any, prompt: str, job: dict[str, Any], call: dict[str, Any]
) -> list[Tensor]:
    """The latents after each of 4 steps: those of our trajectory, and those of a call of the pipeline."""
    seed, guidance, latents_after = 3, 3.0, []

    def record(_: Any, step: int, timestep: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents_after.append(values["latents"][0].clone())
        return {}

    noise = start_noise(seed, denoiser.latent_shape)[None]
    pipeline(
        prompt,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="latent",
        callback_on_step_end=record,
        **call,
    )
    timesteps = tuple(denoiser.schedule.timesteps("uniform", 4))
    assert timesteps == tuple(pipeline.scheduler.timesteps.tolist())
    (ours,) = trajectories(denoiser, [Job(prompt, timesteps, seed=seed, guidance=guidance, **job)])
    assert ours.x0 is not None
    final = denoiser.schedule.final_alpha_bar
    final_latent = final**0.5 * ours.x0[-1] + (1 - final) ** 0.5 * ours.epsilon[-1]
    return [torch.stack([*ours.latents[1:], final_latent]), torch.stack(latents_after)]
