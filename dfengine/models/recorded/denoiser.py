"""A recorded call as a `Denoiser`: the network with the arguments that it was given, and latents of our choice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dfengine.diffusion.denoiser import Condition, Denoiser
from dfengine.diffusion.job import Job
from dfengine.diffusion.trajectory import Trajectory
from dfengine.models.recorded.arguments import call as call_network
from dfengine.models.recorded.arguments import with_rows
from dfengine.models.recorded.call import Call, Forward, first_of, kept_steps
from dfengine.models.recorded.layout import Decoding, Layout
from dfengine.models.recorded.recording import networks_of, processors_of, unwrapped
from dfengine.models.recorded.roles import Row, roles_of

#: Latent pixels of one forward, at most: 64 latents of 64×64.
_MAX_PIXELS = 64 * 64 * 64
#: The largest difference of a replay from the recording, as a share of its range, by the bytes of a number.
_REPLAY = {2: 2e-2, 4: 1e-4, 8: 1e-8}


class Recorded(Denoiser):
    """One image of a recorded call.

    Every latent is predicted with the arguments of the step whose time-step it has, and of the row that is conditional
    (or unconditional), so that nothing about the pipeline is known but what it did. Latents are the part of the
    network's input that the scheduler steps with: [c, h, w], or a channel vector a token.
    """

    def __init__(
        self,
        pipeline: Any,
        call: Call,
        image: int = 0,
        *,
        steps: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """`steps` are those to keep, all by default. Raises ValueError where it cannot be inferred what they did."""
        self._networks = networks_of(pipeline)
        self._codec = pipeline.components.get(call.codec) if call.codec else None
        self.name = call.pipeline
        kept = kept_steps(call)
        assert call.schedule is not None  # a step has one
        self.schedule = call.schedule
        self.steps = kept if steps is None else [kept[step] for step in steps]
        self.roles = [roles_of(step) for step in self.steps]
        self.num_images = 1 + max(row.image for row in self.roles[0].rows)
        if not 0 <= image < self.num_images:
            raise ValueError(f"image {image} is not there: the call made {self.num_images}, counted from 0")
        if len(call.images) != self.num_images:
            raise ValueError(
                f"the call returned {len(call.images)} images and its steps are of {self.num_images}: leave "
                "output_type 'latent' out, so that images are seen"
            )
        self.image, self.picture = image, call.images[image]
        self.image_shape = self.picture.shape[0], self.picture.shape[1]
        first = self.steps[0]
        self.layout = Layout.of(first.sample.shape[1:], self.image_shape)
        self.latent_shape = self.layout.latent
        self.device, self.dtype = first.sample.device, first.model_output.dtype
        self.batch_size = batch_size or max(1, min(128, _MAX_PIXELS // math.prod(self.latent_shape[1:])))
        self._timesteps = torch.tensor([step.timestep for step in self.steps], dtype=torch.float64)
        self._decoding = self._find_decoding(call)
        self._has_unconditional = True
        self.job = self._job(call)

    def _job(self, call: Call) -> Job:
        """This image as a job; each of several prompts has equally many images."""

        def own(texts: Sequence[str]) -> str:
            return texts[self.image * len(texts) // self.num_images] if texts else ""

        return Job(
            prompt=own(call.prompts) or f"image {self.image} of {self.name}",
            negative_prompt=own(call.negative_prompts),
            seed=call.seeds[self.image % len(call.seeds)] if call.seeds else 0,
            timesteps=tuple(step.timestep for step in self.steps),
            guidance=self.roles[0].guidance(self.image),
        )

    # Conditions ------------------------------------------------------------------------------------------------------

    def row(self, step: int, role: int) -> Row:
        """The conditional (0) or unconditional (1) row of a step; the conditional one where there is but one."""
        roles = self.roles[step]
        return (roles.unconditional(self.image) if role else None) or roles.conditional(self.image)

    def check_target(self, target: str) -> None:
        """Raises ValueError for a prediction that a step of the call does not have."""
        for step, roles in zip(self.steps, self.roles, strict=True):
            rows, where = roles.of(self.image), f"at t = {step.timestep:g}"
            if target == "unconditional" and (not self._has_unconditional or roles.unconditional(self.image) is None):
                raise ValueError(f"the call has no unconditional prediction {where}: explain the conditional one")
            is_alike = abs(roles.guidance(self.image) - self.job.guidance) < 1e-3 * self.job.guidance
            is_plain = len(rows) == 1 and abs(abs(rows[0].weight) - 1) < 1e-3
            if target == "guided" and not (is_alike and (is_plain or self.job.guidance != 1)):
                raise ValueError(
                    f"{where} the call does not step with u + w (c − u), w = {self.job.guidance:.3g} ({len(rows)} "
                    f"predictions, weights {', '.join(f'{row.weight:.3g}' for row in rows)}): explain the conditional "
                    "one, or steps that are alike"
                )

    def condition(self, jobs: Sequence[Job], *, negative: bool = False) -> Condition:
        """The recorded rows, of the call's own prompt. Raises ValueError for another one."""
        if any(job.prompt != self.job.prompt for job in jobs):
            raise ValueError(
                "a recorded call has one prompt, so that what others change is not known: load the model "
                "with Engine, or record a call with each prompt"
            )
        return self._role(len(jobs), int(negative))

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        return self._role(len(prompts), 0)

    def _role(self, count: int, role: int) -> Condition:
        return Condition({"role": torch.full((count,), role, device=self.device)})

    # What it predicts -------------------------------------------------------------------------------------------------

    def predict(
        self, x_t: Float[Tensor, "n c h w"], timesteps: Shaped[Tensor, " n"], condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The network's output, with the sign that the pipeline gives it; one call for each recorded forward."""
        steps = (timesteps[:, None].cpu().double() - self._timesteps).abs().argmin(1).tolist()
        rows = [self.row(*place) for place in zip(steps, condition.tensors["role"].tolist(), strict=True)]
        forwards = [(step, row.forward) for step, row in zip(steps, rows, strict=True)]
        result = torch.empty(x_t.shape, dtype=torch.float32, device=x_t.device)
        for forward in dict.fromkeys(forwards):
            mine = [i for i, one in enumerate(forwards) if one == forward]
            result[mine] = self._forward(*forward, [rows[i].index for i in mine], x_t[mine])
        return result

    def _forward(
        self, step: int, number: int, indices: Sequence[int], x: Float[Tensor, "n c h w"]
    ) -> Float[Tensor, "n c h w"]:
        """One recorded forward with other latents, each in a copy of the row of its index."""
        forward, roles = self.steps[step].forwards[number], self.roles[step]
        arguments, (name, _) = with_rows(forward, indices), forward.inputs
        arguments[name] = roles.latent.put(arguments[name], self.layout.to_own(x))
        output = first_of(call_network(self._networks[forward.network], arguments))
        return roles.sign * self.layout.to_latents(roles.output.of(output)).float()

    def decode(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images in [0, 1], by what the codec was seen to be given; pixels themselves where there is no codec.

        Resized to the call's image, if the pipeline has done so.
        """
        if self._decoding is None or self._codec is None:
            if self._is_pixels:
                return (latents / 2 + 0.5).clamp(0, 1)
            raise ValueError(f"{self.name} was not seen decoding its latents: there are no previews of its steps")
        given, codec = self._decoding(latents.float()), self._codec
        with _in_dtype(codec, given.dtype):
            images = torch.cat([first_of(codec.decode(one[None], return_dict=False)) for one in given]).float()
        images = images.reshape(len(latents), -1, *images.shape[-2:])[:, :3]
        if images.shape[-2:] != self.image_shape:
            images = F.interpolate(images, self.image_shape, mode="bilinear", antialias=True)
        return (images / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        raise ValueError("a recorded call has its own image: record the call with another one")

    @property
    def networks(self) -> dict[str, nn.Module]:
        used = {forward.network for step in self.steps for forward in step.forwards}
        return {name: network for name, network in self._networks.items() if name in used}

    def _find_decoding(self, call: Call) -> Decoding | None:
        if call.decoded is None or call.last_sample is None or len(call.decoded) <= self.image:
            return None
        last = self.layout.to_latents(call.last_sample[self.image : self.image + 1])[0]
        return Decoding.between(last, call.decoded[self.image])

    @property
    def has_previews(self) -> bool:
        """Whether latents can be decoded."""
        return (self._decoding is not None and self._codec is not None) or self._is_pixels

    @property
    def _is_pixels(self) -> bool:
        return self._codec is None and self.latent_shape == (3, *self.image_shape)

    # The trajectory ---------------------------------------------------------------------------------------------------

    def trajectory(self) -> Trajectory:
        """The recorded generation of this image."""
        timesteps = torch.tensor(self.job.timesteps, device=self.device)
        latents = torch.stack([self._latent(step) for step in range(len(self.steps))])
        outputs = torch.stack(
            [
                self.layout.to_latents(_first_channels(step.model_output, step.sample)[self.image :][:1])[0].float()
                for step in self.steps
            ]
        )
        prediction = self.schedule.to_x0_and_eps(outputs, latents, timesteps)
        a, b = self.schedule.coefficients(timesteps)
        return Trajectory(
            job=self.job,
            latents=latents,
            epsilon=prediction.epsilon,
            x0=prediction.x0,
            signal=a.flatten(),
            noise=b.flatten(),
            image=self.picture,
            prompt=self._role(1, 0),
            negative=self._role(1, 1),
        )

    def _latent(self, step: int) -> Float[Tensor, "c h w"]:
        """The latent as the network was given it."""
        row = self.row(step, 0)
        _, given = self.steps[step].forwards[row.forward].inputs
        return self.layout.to_latents(self.roles[step].latent.of(given[row.index : row.index + 1]))[0].float()

    # The self-check ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self) -> None:
        """Raise ValueError unless the network returns for the recorded arguments what it returned.

        Of every step both rows, two in a batch, so that a batch of masks changes nothing but the latent. Where only
        unconditional rows differ, which a pipeline may compute with other attention, the call has none.
        """
        for step in range(len(self.steps)):
            self._check_row(step, 0)
        try:
            for step in range(len(self.steps)):
                self._check_row(step, 1)
        except ValueError:
            self._has_unconditional = False

    def _check_row(self, step: int, role: int) -> None:
        roles, row, timestep = self.roles[step], self.row(step, role), self.steps[step].timestep
        forward = self.steps[step].forwards[row.forward]
        latents = self._latent(step)[None].expand(2, -1, -1, -1)
        try:
            replayed = self.predict(latents, torch.full((2,), timestep, dtype=torch.float64), self._role(2, role))
        except RuntimeError as error:
            raise ValueError(
                f"{forward.network} cannot be called with a batch of recorded arguments "
                f"({str(error).splitlines()[0]}): one of them has its rows elsewhere, which is not supported"
            ) from error
        output = roles.output.of(forward.output[row.index : row.index + 1])
        recorded = roles.sign * self.layout.to_latents(output).float()
        spread = (recorded.max() - recorded.min()).clamp(min=1e-30)
        difference = float((replayed - recorded).abs().max() / spread)
        if not difference <= _REPLAY[output.element_size()]:
            raise ValueError(
                f"the network does not return what it returned: at t = {timestep:g} its prediction differs by "
                f"{difference:.1g} of its range; {self._cause(forward)}"
            )

    def _cause(self, forward: Forward) -> str:
        """Why a replay may differ, and what to do."""
        network = unwrapped(self._networks[forward.network])
        if forward.state.processors != processors_of(network):
            return "its attention processors are not those of the call, which the pipeline replaced for its duration"
        if getattr(network, "is_cache_enabled", False) or forward.arguments.get("kv_cache") is not None:
            return f"it keeps a cache between steps: call {forward.network}.disable_cache() and record the call again"
        if forward.state.has_autocast:
            return "it was called under autocast: record the call without"
        if forward.state.is_training:
            return f"{forward.network} was in training mode: call {forward.network}.eval() before recording"
        return (
            "either something that is no argument of it has changed since, such as the scale of a LoRA or a hook, or "
            "its output depends on the rest of the batch"
        )


@contextmanager
def _in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While inside, a module has a dtype: a codec may be one that its pipeline casts for its use."""
    own = next(module.parameters()).dtype
    if own != dtype:
        nn.Module.to(module, dtype)
    try:
        yield
    finally:
        if own != dtype:
            nn.Module.to(module, own)


def _first_channels(output: Tensor, sample: Tensor) -> Tensor:
    """A prediction without the channels of a learned variance."""
    return output if output.ndim != sample.ndim or output.shape[1] <= sample.shape[1] else output[:, : sample.shape[1]]
