"""DF-CAM and relevance written the obvious way, as the authors' code has them: what an engine is compared with.

DF-CAM: a whole generation for each layer, with a hook on that layer and a backward pass at every step. Relevance: a
whole generation for each step, with attention processors that keep probabilities and a backward pass at that step.
Attention maps: one generation with such processors. Guidance pairs, one image, diffusers' own scheduler; what is
explained is the conditional half. Nothing of dfengine runs in it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Kept:
    """An attention processor that keeps the conditional half's probabilities, for its gradient if there is one."""

    def __init__(self, seen: list["Kept"]) -> None:
        self.seen = seen

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        self.is_text = encoder_hidden_states is not None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(text), attention.to_v(text)
        query, key, value = (attention.head_to_batch_dim(part) for part in (query, key, value))
        self.map = attention.get_attention_scores(query, key)
        self.heads = attention.heads
        if self.map.requires_grad:
            self.map.retain_grad()
        self.seen.append(self)
        return attention.to_out[0](attention.batch_to_head_dim(self.map @ value))

    def conditional(self) -> Tensor:
        """[heads, s, t]"""
        return self.map.detach()[self.heads :].float()

    def gradient(self) -> Tensor:
        """[heads, s, t]"""
        assert self.map.grad is not None
        return self.map.grad[self.heads :].float()


class Generation:
    """One prompt of a pipeline, generated as often as it takes."""

    @torch.no_grad()
    def __init__(self, pipeline: Any, prompt: str, noise: Tensor, guidance: float, num_steps: int) -> None:
        self.pipeline, self.unet, self.guidance = pipeline, pipeline.unet, guidance
        self.noise, self.num_steps = noise.to(self.unet.device, self.unet.dtype), num_steps
        given, without, *pooled = pipeline.encode_prompt(
            prompt=prompt, device=self.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        self.text, self.added = torch.cat([without, given]), None
        if pooled:  # SDXL
            size = self.unet.config.sample_size * pipeline.vae_scale_factor
            sizes = torch.tensor([[size, size, 0, 0, size, size]], device=self.unet.device)
            self.added = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": sizes.repeat(2, 1)}

    def run(self, look: Any, with_gradient: Any) -> None:
        """Generate the image, calling look(step, ε of the conditional half) at the steps `with_gradient` names."""
        scheduler, x = self.pipeline.scheduler, self.noise
        scheduler.set_timesteps(self.num_steps)
        for step, t in enumerate(scheduler.timesteps):
            wanted = with_gradient(step)
            with torch.set_grad_enabled(wanted):
                told = torch.cat([x, x]).requires_grad_(wanted)
                without, given = self.unet(told, t, self.text, added_cond_kwargs=self.added).sample.chunk(2)
                look(step, given)
            guided = (without + self.guidance * (given - without)).detach()
            x = scheduler.step(guided, t, x, eta=0.0).prev_sample
        with torch.no_grad():
            self.pipeline.vae.decode(x / self.pipeline.vae.config.scaling_factor)


def cam(generation: Generation, layers: list[str]) -> dict[str, list[Tensor]]:
    """L of every layer at every step, a generation a layer."""
    modules = dict(generation.unet.named_modules())
    found: dict[str, list[Tensor]] = {}
    for name in layers:
        kept: list[Tensor] = []

        def keep(module: Any, args: Any, output: Any, kept: list[Tensor] = kept) -> None:
            kept[:] = [output[0] if isinstance(output, tuple) else output]
            kept[0].retain_grad()

        def look(step: int, epsilon: Tensor, kept: list[Tensor] = kept, name: str = name) -> None:
            epsilon.sum().backward()
            assert kept[0].grad is not None
            feature, gradient = kept[0].detach()[1:].float(), kept[0].grad[1:].float()
            weights = gradient.mean((2, 3), keepdim=True)
            found.setdefault(name, []).append(F.relu((weights * feature).sum(1))[0].cpu())

        hook = modules[name].register_forward_hook(keep)
        generation.run(look, lambda step: True)
        hook.remove()
    return found


def relevance(generation: Generation, num_positions: int) -> list[Tensor]:
    """Each text position's relevance at every step, a generation a step."""
    found = []
    processors = generation.unet.attn_processors
    for explained in range(generation.num_steps):
        seen: list[Kept] = []
        generation.unet.set_attn_processor({name: Kept(seen) for name in processors})

        def look(step: int, epsilon: Tensor, explained: int = explained, seen: list[Kept] = seen) -> None:
            if step == explained:
                epsilon.sum().backward()
                found.append(_gathered(seen, num_positions).cpu())
            seen.clear()

        generation.run(look, lambda step, explained=explained: step == explained)
    generation.unet.set_attn_processor(processors)
    return found


def _gathered(seen: list[Kept], num_positions: int) -> Tensor:
    """The published rules with whole matrices; square latents."""
    finest = max(one.map.shape[1] for one in seen)
    side = round(finest**0.5)
    device = seen[0].map.device
    identity = torch.eye(finest, device=device)
    image, text = identity.clone(), torch.zeros(finest, num_positions, device=device)
    for one in seen:
        attention = (one.gradient() * one.conditional()).clamp(min=0).mean(0)
        coarse = round(attention.shape[0] ** 0.5)
        up = torch.eye(coarse**2, device=device).reshape(coarse**2, coarse, coarse)
        up = up.repeat_interleave(side // coarse, 1).repeat_interleave(side // coarse, 2).reshape(coarse**2, finest).T
        if one.is_text:
            gathered = image - identity
            norm = gathered.sum(1, keepdim=True)
            passed = torch.where(norm > 0, gathered / norm, 0) + identity
            text = text + passed.T @ (up @ attention)
        else:
            lifted = up @ attention @ (up.T / up.T.sum(1, keepdim=True))
            image, text = image + lifted @ image, text + lifted @ text
    return text.sum(0)


def attention(generation: Generation, size: tuple[int, int]) -> list[Tensor]:
    """[positions of the text, h, w] at every step, of one generation."""
    seen: list[Kept] = []
    found = []
    processors = generation.unet.attn_processors
    generation.unet.set_attn_processor({name: Kept(seen) for name in processors})

    def look(step: int, epsilon: Tensor) -> None:
        maps = []
        for one in seen:
            if one.is_text:
                side = round(one.map.shape[1] ** 0.5)
                grid = one.conditional().mean(0).T.reshape(1, -1, side, side)
                maps.append(F.interpolate(grid, size=size, mode="bilinear")[0])
        found.append(torch.stack(maps).mean(0).cpu())
        seen.clear()

    generation.run(look, lambda step: False)
    generation.unet.set_attn_processor(processors)
    return found
