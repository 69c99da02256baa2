"""Deletion and insertion: how far the next step's image moves as a map's most salient pixels are removed or restored.

Both games act on R_t of one step. Deletion sets pixels to 0; insertion starts from a blurred R_t and restores pixels.
Each perturbed latent takes the trajectory's own guided step and is decoded, and the features of its image are compared
with those of the unperturbed one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import dfkernels
import torch
import torch.nn.functional as F
from dfkernels.designs import normal
from jaxtyping import Float
from torch import Tensor

from dfengine.checks import one_of
from dfengine.diffusion.denoiser import Condition, Denoiser, Features
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.path import END
from dfengine.diffusion.trajectory import Trajectory
from dfengine.runtime.batching import in_batches

GAMES = ("deletion", "insertion")
#: What deletion puts in a pixel's place, and insertion begins with: zero and a blur, or noise without content.
REFILLS = ("zero", "noise")
#: The mask index of the games' fresh noise, which no mask of an explainer has.
_BLANK = 2**32 - 1

#: The blur of the released code: pixels a side, and standard deviation.
_WINDOW, _SIGMA = 11, 5.0


@dataclass(frozen=True)
class GameCurves:
    """Both games of one map of one item; at point k, k/h of the pixels are deleted or inserted."""

    features: Float[Tensor, "games points d"]
    """of the decoded images; deletion's first and insertion's last are those of the unperturbed image"""
    mse: Float[Tensor, "games points"]
    """between the decoded images, in [0, 1], and the unperturbed one"""


def ranks_pixels(saliency: Float[Tensor, "h w"], *, positive: bool = False) -> bool:
    """Whether a map is finite and not constant, after a ReLU if `positive`."""
    ranked = saliency.relu() if positive else saliency
    return bool(saliency.isfinite().all() and ranked.min() < ranked.max())


def to_latent_size(
    saliency: Float[Tensor, "*n a b"], denoiser: Denoiser, name: str = "the map", *, positive: bool = False
) -> Float[Tensor, "*n h w"]:
    """Maps of the latent's size, or of the image's averaged down to it.

    Raises ValueError if they have another size, values that are not finite, or do not rank their pixels.
    """
    latent, image, size = denoiser.latent_shape[1:], denoiser.image_shape, tuple(saliency.shape[-2:])
    if size not in (latent, image):
        raise ValueError(
            f"{name} has {size[0]}×{size[1]} pixels: expected the latent's {latent[0]}×{latent[1]} or the image's "
            f"{image[0]}×{image[1]}"
        )
    maps = saliency.float().reshape(-1, *size)
    resized = F.adaptive_avg_pool2d(maps[:, None], latent)[:, 0]
    for number, (one, small) in enumerate(zip(maps, resized, strict=True)):
        which = f"{name} (number {number})" if len(maps) > 1 else name
        if not one.isfinite().all():
            raise ValueError(f"{which} has values that are not finite: its pixels cannot be ranked")
        if not ranks_pixels(small, positive=positive):
            clipped = " after the released code's ReLU" if positive else ""
            raise ValueError(f"{which} is constant{clipped}: its pixels cannot be ranked")
    return resized.reshape(*saliency.shape[:-2], *latent)


@torch.no_grad()
def play(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    maps: Mapping[str, Float[Tensor, "items h w"]],
    extract: Features,
    *,
    xdiffusion: bool = False,
    refill: str = "zero",
) -> dict[str, list[GameCurves]]:
    """Both games of every map of every trajectory, at the one step that each trajectory explains.

    Curves of all maps and items share batches; what all maps of an item have in common (nothing, all deleted, all
    blurred) is computed once. `xdiffusion` plays as the authors' released code does: only positive saliency counts, and
    insertion's blur is `xdiffusion_blur`. With `refill="noise"` both games stay in the data's distribution: deletion
    puts `noisy_blanks` in the place of 0, insertion begins with them. Raises ValueError if a map does not rank its
    pixels, or for an unknown refill.
    """
    one_of("refill", refill, REFILLS)
    saliency = torch.stack([to_latent_size(maps[name], denoiser, name, positive=xdiffusion) for name in maps])
    saliency = (saliency.relu() if xdiffusion else saliency).to(denoiser.device)
    blur = xdiffusion_blur if xdiffusion else dfkernels.blur
    latents = torch.stack([trajectory.latents[trajectory.steps[0]] for trajectory in trajectories])
    if refill == "noise":
        nothing = begin = noisy_blanks(trajectories)
    else:
        nothing, begin = torch.zeros_like(latents), blur(latents)
    features, mse = _GameBatch(denoiser, trajectories, latents, nothing, begin, saliency, extract).play()
    return {name: [GameCurves(*item) for item in zip(features[m], mse[m], strict=True)] for m, name in enumerate(maps)}


def noisy_blanks(trajectories: Sequence[Trajectory]) -> Float[Tensor, "items c h w"]:
    """a·c + b·n' of each trajectory's step, n' fresh noise by counter and c the mean colour: noise without content."""
    blanks = []
    for one in trajectories:
        step, shape = one.steps[0], one.latents.shape[1:]
        seed, at, index = (torch.tensor([x], device=one.latents.device) for x in (one.job.mask_seed, step, _BLANK))
        fresh = normal(seed, at, index, shape[0], shape[1] * shape[2])[0].view(shape)
        blanks.append(one.signal[step] * one.mean_colour[:, None, None] + one.noise[step] * fresh)
    return torch.stack(blanks)


class _GameBatch:
    """The games of many maps and items; row (m, i, g) is game g of map m of item i."""

    def __init__(
        self,
        denoiser: Denoiser,
        trajectories: Sequence[Trajectory],
        latents: Float[Tensor, "items c h w"],
        nothing: Float[Tensor, "items c h w"],
        begin: Float[Tensor, "items c h w"],
        saliency: Float[Tensor, "maps items h w"],
        extract: Features,
    ) -> None:
        device, num_maps = denoiser.device, len(saliency)
        self.denoiser, self.latents, self.extract, self.num_items = denoiser, latents, extract, len(trajectories)
        self.shape = (num_maps, self.num_items, len(GAMES))
        jobs = [trajectory.job for trajectory in trajectories]
        steps = [trajectory.steps[0] for trajectory in trajectories]
        times = [(*job.timesteps, END)[step : step + 2] for job, step in zip(jobs, steps, strict=True)]
        self.timesteps, self.next_timesteps = torch.tensor(times).to(device).T
        self.guided = GuidedDenoiser(
            denoiser,
            Condition.cat([trajectory.prompt for trajectory in trajectories]),
            Condition.cat([trajectory.negative for trajectory in trajectories]),
            "guided",
            [job.guidance for job in jobs],
        )
        start, fill = torch.stack([latents, begin], 1), torch.stack([nothing, latents], 1)
        self.start, self.fill = (one.repeat(num_maps, 1, 1, 1, 1).flatten(0, 1) for one in (start, fill))
        self.ranks = dfkernels.ranks(saliency.flatten(0, 1)).repeat_interleave(len(GAMES), 0)

    def play(self) -> tuple[Float[Tensor, "maps items games points d"], Float[Tensor, "maps items games points"]]:
        """Features and squared errors of every point, on the CPU."""
        images, references = _concatenate(in_batches(self.num_items, self.denoiser, self._unperturbed))
        entries = self._entries(self.latents.shape[-2])
        rows, points, items = (column.to(self.denoiser.device) for column in entries.T)
        item_of = entries[:, 2].tolist()

        def work(numbers: Tensor, known: range) -> tuple[Tensor, Tensor]:
            real = numbers.clamp(min=0)
            row = torch.where(numbers < 0, numbers, rows[real])
            x = dfkernels.perturb(self.start, self.ranks, row, points[real], fill=self.fill)
            distinct = set(item_of[known.start : known.stop])
            perturbed = self._next_image(x, items[real], distinct.pop() if len(distinct) == 1 else None)
            error = (perturbed - images[items[real]]).square().flatten(1).mean(1)
            return self.extract(perturbed).float()[: len(known)], error[: len(known)]

        # Copied to the CPU once, at the end: each copy would delay the next batch.
        features, mse = (one.cpu() for one in _concatenate(in_batches(len(entries), self.denoiser, work)))
        return (
            self._curves(entries, features, references.cpu()),
            self._curves(entries, mse, mse.new_zeros(self.num_items)),
        )

    def _entries(self, height: int) -> Tensor:
        """(row, point, item) of everything that is computed, item by item.

        These are the inner points of every curve, and each item's two perturbed ends, in the rows of its first map.
        """
        num_maps, num_items, num_games = self.shape
        entries = []
        for item in range(num_items):
            rows = [(m * num_items + item) * num_games + game for m in range(num_maps) for game in range(num_games)]
            entries += [(row, point, item) for row in rows for point in range(1, height)]
            entries += [(rows[0], height, item), (rows[1], 0, item)]
        return torch.tensor(entries)

    def _curves(
        self, entries: Tensor, values: Float[Tensor, " entries *d"], unperturbed: Float[Tensor, " items *d"]
    ) -> Float[Tensor, "maps items games points *d"]:
        """Values of all points, from those that were computed."""
        points = self.latents.shape[-2] + 1
        curves = values.new_zeros(*self.shape, points, *values.shape[1:])
        curves.flatten(0, 2)[entries[:, 0], entries[:, 1]] = values
        deletion, insertion = curves[:, :, 0], curves[:, :, 1]
        deletion[:, :, -1], insertion[:, :, 0] = deletion[:1, :, -1].clone(), insertion[:1, :, 0].clone()
        deletion[:, :, 0] = insertion[:, :, -1] = unperturbed
        return curves

    def _unperturbed(self, numbers: Tensor, known: range) -> tuple[Float[Tensor, "n 3 H W"], Float[Tensor, "n d"]]:
        items = numbers.clamp(min=0)
        images = self._next_image(self.latents[items], items, None)
        return images[: len(known)], self.extract(images).float()[: len(known)]

    def _next_image(self, x: Float[Tensor, "n c h w"], items: Tensor, item: int | None) -> Float[Tensor, "n 3 H W"]:
        """The images decoded from latents after the trajectory's step; `item` is set if all are of one item."""
        prediction = self.guided(x, self.timesteps[items], items if item is None else item)
        return self.denoiser.decode(self.denoiser.schedule.step(prediction, self.next_timesteps[items]))


def _concatenate(batches: Iterator[tuple[range, tuple[Tensor, Tensor] | None]]) -> tuple[Tensor, Tensor]:
    first, second = zip(*(result for _, result in batches if result is not None), strict=True)
    return torch.cat(first), torch.cat(second)


def xdiffusion_blur(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The released code's blur: zero-padded borders, and a Gaussian kernel reflected into its 11×11 window."""
    from scipy.ndimage import gaussian_filter1d

    impulse = [float(place == _WINDOW // 2) for place in range(_WINDOW)]
    weights = torch.from_numpy(gaussian_filter1d(impulse, _SIGMA, mode="reflect")).to(latents)
    channels = latents.shape[1]
    kernel = (weights[:, None] * weights).expand(channels, 1, _WINDOW, _WINDOW)
    return F.conv2d(latents, kernel, padding=_WINDOW // 2, groups=channels)
