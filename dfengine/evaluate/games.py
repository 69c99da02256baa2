"""Deletion and insertion: how far the next step's image moves as the pixels that a map ranks highest go, or come back.

Both act on R_t of one step. Deletion sets pixels to 0; insertion starts from R_t blurred and puts them back. Each
perturbed latent takes the trajectory's own guided step and is decoded; its features are held against those of the
unperturbed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dfkernels
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dfengine.diffusion.denoiser import Condition, Denoiser, Features
from dfengine.diffusion.guidance import GuidedDenoiser
from dfengine.diffusion.trajectory import Trajectory
from dfengine.explain import check_behaviour
from dfengine.runtime.batching import in_batches

GAMES = ("deletion", "insertion")

#: Of the released code's blur: pixels a side, and its width.
_WINDOW, _SIGMA = 11, 5.0


@dataclass(frozen=True)
class Played:
    """Both games of one map of one item; point k has k/h of the pixels deleted or inserted."""

    features: Float[Tensor, "games points d"]
    """of the decoded images; those of the unperturbed one are deletion's first and insertion's last"""
    mse: Float[Tensor, "games points"]
    """between the decoded images, in [0, 1], and the unperturbed one"""


def usable(saliency: Float[Tensor, "h w"], behaviour: str = "paper") -> bool:
    """Whether a map ranks its pixels: it is finite, and not the same everywhere (in `xdiffusion`, after a ReLU)."""
    ranked = saliency.relu() if behaviour == "xdiffusion" else saliency
    return bool(saliency.isfinite().all() and ranked.min() < ranked.max())


def fitted(
    saliency: Float[Tensor, "*n a b"], denoiser: Denoiser, name: str = "the map", behaviour: str = "paper"
) -> Float[Tensor, "*n h w"]:
    """Maps at the latent's size: those of another tool may have the image's, and are averaged.

    Raises ValueError for another size, values that are not finite, and a map that is not `usable`.
    """
    latent, image, given = denoiser.latent_shape[1:], denoiser.image_shape, tuple(saliency.shape[-2:])
    if given not in (latent, image):
        raise ValueError(
            f"{name} has {given[0]}×{given[1]} pixels: expected the latent's {latent[0]}×{latent[1]} or the image's "
            f"{image[0]}×{image[1]}"
        )
    flat = saliency.float().reshape(-1, *given)
    for number, one in enumerate(flat):
        which = f"{name} (number {number})" if len(flat) > 1 else name
        if not one.isfinite().all():
            raise ValueError(f"{which} has values that are not finite: its pixels cannot be ranked")
    resized = F.adaptive_avg_pool2d(flat[:, None], latent)[:, 0]
    for number, one in enumerate(resized):
        which = f"{name} (number {number})" if len(flat) > 1 else name
        if not usable(one, behaviour):
            zeroed = ", what is negative being 0 in xdiffusion" if behaviour == "xdiffusion" else ""
            raise ValueError(f"{which} is the same everywhere{zeroed}: its pixels cannot be ranked")
    return resized.reshape(*saliency.shape[:-2], *latent)


@torch.no_grad()
def play(
    denoiser: Denoiser,
    paths: Sequence[Trajectory],
    maps: Mapping[str, Float[Tensor, "items h w"]],
    extract: Features,
    *,
    behaviour: str = "paper",
) -> dict[str, list[Played]]:
    """Both games of every map of every trajectory, at the one step that each trajectory is to be explained at.

    Whole curves of all maps and items fill batches together; what is the same for all maps of an item (nothing, all
    deleted, all blurred) is computed once. Raises ValueError for a map that does not rank its pixels.
    """
    check_behaviour(behaviour)
    saliency = torch.stack([fitted(maps[name], denoiser, name, behaviour) for name in maps]).to(denoiser.device)
    if behaviour == "xdiffusion":
        saliency = saliency.relu()
    board = _Board(denoiser, paths, saliency, extract, behaviour)
    features, mse = board.play()
    return {name: [Played(*item) for item in zip(features[m], mse[m], strict=True)] for m, name in enumerate(maps)}


class _Board:
    """The rows of both games: row (m, i, g) is game g of map m of item i."""

    def __init__(
        self,
        denoiser: Denoiser,
        paths: Sequence[Trajectory],
        saliency: Float[Tensor, "maps items h w"],
        extract: Features,
        behaviour: str,
    ) -> None:
        device, num_maps = denoiser.device, len(saliency)
        self.denoiser, self.extract, self.num_items = denoiser, extract, len(paths)
        self.shape = (num_maps, len(paths), len(GAMES))
        steps = [path.steps[0] for path in paths]
        jobs = [path.job for path in paths]
        following = [(*job.timesteps, -1)[step + 1] for job, step in zip(jobs, steps, strict=True)]
        self.latents = torch.stack([path.latents[step] for path, step in zip(paths, steps, strict=True)])
        self.timesteps = torch.tensor([job.timesteps[step] for job, step in zip(jobs, steps, strict=True)]).to(device)
        self.following = torch.tensor(following).to(device)
        self.guided = GuidedDenoiser(
            denoiser,
            Condition.cat([path.prompt for path in paths]),
            Condition.cat([path.negative for path in paths]),
            "guided",
            torch.tensor([job.guidance for job in jobs], device=device),
        )
        blurred = released_blur(self.latents) if behaviour == "xdiffusion" else dfkernels.blur(self.latents)
        ends = torch.stack(
            [torch.stack([self.latents, blurred], 1), torch.stack([torch.zeros_like(blurred), self.latents], 1)]
        )
        self.start, self.fill = (end.repeat(num_maps, 1, 1, 1, 1).flatten(0, 1) for end in ends)
        ranks = dfkernels.ranks(saliency.flatten(0, 1))
        self.ranks = ranks.repeat_interleave(len(GAMES), 0)

    def play(self) -> tuple[Float[Tensor, "maps items games points d"], Float[Tensor, "maps items games points"]]:
        """Features and squared errors of every point, on the CPU."""
        whole = [part for _, part in in_batches(self.num_items, self.denoiser, self._unperturbed) if part is not None]
        self.images, references = (torch.cat(parts) for parts in zip(*whole, strict=True))
        height = self.latents.shape[-2]
        entries = self._entries(height)
        rows, points, items = (column.to(self.denoiser.device) for column in entries.T)
        told = entries[:, 2].tolist()

        def work(numbers: Tensor, known: range) -> tuple[Tensor, Tensor]:
            real = numbers.clamp(min=0)
            row = torch.where(numbers < 0, numbers, rows[real])
            x = dfkernels.perturb(self.start, self.ranks, row, points[real], fill=self.fill)
            among = set(told[known.start : known.stop])
            images = self._next_image(x, items[real], among.pop() if len(among) == 1 else None)
            error = (images - self.images[items[real]]).square().flatten(1).mean(1)
            return self.extract(images).float()[: len(known)], error[: len(known)]

        made = [part for _, part in in_batches(len(entries), self.denoiser, work) if part is not None]
        # Fetched once: each copy would hold up the next batch.
        features, mse = (torch.cat(parts).cpu() for parts in zip(*made, strict=True))
        of_errors = self._curves(entries, mse, mse.new_zeros(self.num_items))
        return self._curves(entries, features, references.cpu()), of_errors

    def _entries(self, height: int) -> Tensor:
        """(row, point, item) of what is computed, an item's together: a curve's inner points, and each item's two ends
        that are not the unperturbed one, in its first map's rows.
        """
        num_maps, num_items, num_games = self.shape
        found = []
        for item in range(num_items):
            rows = [(m * num_items + item) * num_games + game for m in range(num_maps) for game in range(num_games)]
            found += [(row, point, item) for row in rows for point in range(1, height)]
            found += [(rows[0], height, item), (rows[1], 0, item)]
        return torch.tensor(found)

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
        """What the trajectory's step makes of latents, decoded; `item` if all are of one item."""
        prediction = self.guided(x, self.timesteps[items], items if item is None else item)
        return self.denoiser.decode(self.denoiser.schedule.step(prediction, self.following[items]))


def released_blur(latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The released code's: borders of zeros, and for weights a Gaussian reflected into its 11 × 11 window."""
    from scipy.ndimage import gaussian_filter1d

    impulse = [float(place == _WINDOW // 2) for place in range(_WINDOW)]
    taps = torch.from_numpy(gaussian_filter1d(impulse, _SIGMA, mode="reflect")).to(latents)
    channels = latents.shape[1]
    kernel = (taps[:, None] * taps).expand(channels, 1, _WINDOW, _WINDOW)
    return F.conv2d(latents, kernel, padding=_WINDOW // 2, groups=channels)
