"""Plain implementations of DF-CAM, relevance and attention maps, as in the authors' code: the baseline of comparisons.

DF-CAM: one generation for each layer, with a hook on that layer and a backward pass at every step. Relevance: one
generation for each step, with attention processors that keep probabilities and a backward pass at that step.
Attention maps: one generation with such processors. Guidance pairs, one image, diffusers' own scheduler; the
conditional half is explained. They use nothing from dfengine.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RecordingProcessor:
    """An attention processor that appends itself to `calls`, with its probabilities and, later, their gradient."""

    def __init__(self, calls: list["RecordingProcessor"]) -> None:
        self.calls = calls

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        self.is_text = encoder_hidden_states is not None
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attention.to_q(hidden_states), attention.to_k(text), attention.to_v(text)
        query, key, value = (attention.head_to_batch_dim(part) for part in (query, key, value))
        self.probabilities = attention.get_attention_scores(query, key)
        self.heads = attention.heads
        if self.probabilities.requires_grad:
            self.probabilities.retain_grad()
        self.calls.append(self)
        return attention.to_out[0](attention.batch_to_head_dim(self.probabilities @ value))

    def conditional(self) -> Tensor:
        """Probabilities of the conditional half, [heads, s, t]."""
        return self.probabilities.detach()[self.heads :].float()

    def gradient(self) -> Tensor:
        """Their gradient, [heads, s, t]."""
        return gradient_of(self.probabilities)[self.heads :].float()


def gradient_of(tensor: Tensor) -> Tensor:
    if tensor.grad is None:
        raise RuntimeError("the backward pass did not reach a recorded tensor")
    return tensor.grad


class Generation:
    """One prompt of a pipeline, which can be generated repeatedly."""

    @torch.no_grad()
    def __init__(self, pipeline: Any, prompt: str, noise: Tensor, guidance: float, num_steps: int) -> None:
        self.pipeline, self.unet, self.guidance = pipeline, pipeline.unet, guidance
        self.noise, self.num_steps = noise.to(self.unet.device, self.unet.dtype), num_steps
        conditional, unconditional, *pooled = pipeline.encode_prompt(
            prompt=prompt, device=self.unet.device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        self.text, self.added = torch.cat([unconditional, conditional]), None
        if pooled:  # SDXL
            size = self.unet.config.sample_size * pipeline.vae_scale_factor
            sizes = torch.tensor([[size, size, 0, 0, size, size]], device=self.unet.device)
            self.added = {"text_embeds": torch.cat(pooled[::-1]), "time_ids": sizes.repeat(2, 1)}

    def run(self, on_step: Callable[[int, Tensor], None], with_gradient: Callable[[int], bool]) -> None:
        """Generate the image. Calls `on_step(step, conditional ε)` at each step, with gradients where asked for."""
        scheduler, x = self.pipeline.scheduler, self.noise
        scheduler.set_timesteps(self.num_steps)
        for step, t in enumerate(scheduler.timesteps):
            needs_gradient = with_gradient(step)
            with torch.set_grad_enabled(needs_gradient):
                pair = torch.cat([x, x]).requires_grad_(needs_gradient)
                unconditional, conditional = self.unet(pair, t, self.text, added_cond_kwargs=self.added).sample.chunk(2)
                on_step(step, conditional)
            guided = (unconditional + self.guidance * (conditional - unconditional)).detach()
            x = scheduler.step(guided, t, x, eta=0.0).prev_sample
        with torch.no_grad():
            self.pipeline.vae.decode(x / self.pipeline.vae.config.scaling_factor)


def cam(generation: Generation, layers: list[str]) -> dict[str, list[Tensor]]:
    """L of every layer at every step; one generation for each layer."""
    modules = dict(generation.unet.named_modules())
    maps: dict[str, list[Tensor]] = {}
    for name in layers:
        outputs: list[Tensor] = []

        def keep_output(module: Any, args: Any, output: Any, outputs: list[Tensor] = outputs) -> None:
            outputs[:] = [output[0] if isinstance(output, tuple) else output]
            outputs[0].retain_grad()

        def explain(step: int, epsilon: Tensor, outputs: list[Tensor] = outputs, name: str = name) -> None:
            epsilon.sum().backward()
            feature, gradient = outputs[0].detach()[1:].float(), gradient_of(outputs[0])[1:].float()
            weights = gradient.mean((2, 3), keepdim=True)
            maps.setdefault(name, []).append(F.relu((weights * feature).sum(1))[0].cpu())

        hook = modules[name].register_forward_hook(keep_output)
        generation.run(explain, lambda step: True)
        hook.remove()
    return maps


def relevance(generation: Generation, num_positions: int) -> list[Tensor]:
    """The relevance of each position of the text at every step; one generation for each step."""
    values = []
    processors = generation.unet.attn_processors
    for explained in range(generation.num_steps):
        calls: list[RecordingProcessor] = []
        generation.unet.set_attn_processor({name: RecordingProcessor(calls) for name in processors})

        def explain(
            step: int, epsilon: Tensor, explained: int = explained, calls: list[RecordingProcessor] = calls
        ) -> None:
            if step == explained:
                epsilon.sum().backward()
                values.append(_relevance_of(calls, num_positions).cpu())
            calls.clear()

        generation.run(explain, lambda step, explained=explained: step == explained)
    generation.unet.set_attn_processor(processors)
    return values


def _relevance_of(calls: list[RecordingProcessor], num_positions: int) -> Tensor:
    """The published rules with complete matrices; square latents."""
    finest = max(call.probabilities.shape[1] for call in calls)
    side = round(finest**0.5)
    device = calls[0].probabilities.device
    identity = torch.eye(finest, device=device)
    image, text = identity.clone(), torch.zeros(finest, num_positions, device=device)
    for call in calls:
        attention = (call.gradient() * call.conditional()).clamp(min=0).mean(0)
        coarse = round(attention.shape[0] ** 0.5)
        up = torch.eye(coarse**2, device=device).reshape(coarse**2, coarse, coarse)
        up = up.repeat_interleave(side // coarse, 1).repeat_interleave(side // coarse, 2).reshape(coarse**2, finest).T
        if call.is_text:
            residual = image - identity
            norm = residual.sum(1, keepdim=True)
            normalised = torch.where(norm > 0, residual / norm, 0) + identity
            text = text + normalised.T @ (up @ attention)
        else:
            lifted = up @ attention @ (up.T / up.T.sum(1, keepdim=True))
            image, text = image + lifted @ image, text + lifted @ text
    return text.sum(0)


def attention(generation: Generation, size: tuple[int, int]) -> list[Tensor]:
    """[positions of the text, h, w] at every step; one generation."""
    calls: list[RecordingProcessor] = []
    maps = []
    processors = generation.unet.attn_processors
    generation.unet.set_attn_processor({name: RecordingProcessor(calls) for name in processors})

    def explain(step: int, epsilon: Tensor) -> None:
        resized = []
        for call in calls:
            if call.is_text:
                side = round(call.probabilities.shape[1] ** 0.5)
                grid = call.conditional().mean(0).T.reshape(1, -1, side, side)
                resized.append(F.interpolate(grid, size=size, mode="bilinear")[0])
        maps.append(torch.stack(resized).mean(0).cpu())
        calls.clear()

    generation.run(explain, lambda step: False)
    generation.unet.set_attn_processor(processors)
    return maps
