"""What a recorded step means, inferred from its tensors alone: where the latent is, whose each row is, and its weight.

The scheduler's `sample` x is what the step started from, and `model_output` o what the pipeline made of the networks'
outputs. A row of a network's input is therefore image j's if a part of it is α·x_j, and the weights of the outputs are
those of the least squares o_j = Σ_i w_i y_i over the rows of image j.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dfengine.models.recorded.call import Forward, Step

#: Largest residual of weights that are those of guidance.
_LINEAR = 2e-2
#: Largest relative residual of a relation that holds, by the bytes of a number.
_TOLERANCE = {2: 3e-2, 4: 1e-3, 8: 1e-6}


@dataclass(frozen=True)
class Part:
    """A part of every row: `size` entries of one of its axes from `start` on, or all of the row."""

    axis: int | None = None
    start: int = 0
    size: int = 0

    def of(self, rows: Tensor | Sequence[Tensor]) -> Tensor:
        """The part of a batch: a tensor or a list of rows."""
        batch = rows if isinstance(rows, Tensor) else torch.stack(list(rows))
        return batch if self.axis is None else batch.narrow(self.axis + 1, self.start, self.size)

    def put(self, rows: Tensor | Sequence[Tensor], values: Tensor) -> Tensor | list[Tensor]:
        """A copy of a batch with other values in this part, in the form that the batch has."""
        batch = (rows if isinstance(rows, Tensor) else torch.stack(list(rows))).clone()
        part = self.of(batch)
        part.copy_(values.reshape(part.shape))
        return batch if isinstance(rows, Tensor) else list(batch)


@dataclass(frozen=True)
class Row:
    """One row of one forward of a step."""

    forward: int
    index: int
    image: int
    weight: float
    """of its output in what the scheduler steps with"""


@dataclass(frozen=True)
class Roles:
    """What the forwards of one step are."""

    latent: Part
    """of a row of the input"""
    scale: float
    """α: the latent in the input is α times the scheduler's sample"""
    output: Part
    """of a row of the output"""
    rows: tuple[Row, ...]
    residual: float
    """of the weights: what part of o is no linear combination of the outputs"""

    def conditional(self, image: int) -> Row:
        """The row with the largest weight of the sign of their sum."""
        return max(self.of(image), key=lambda row: row.weight * self.sign)

    def unconditional(self, image: int) -> Row | None:
        """The row with the most negative weight, if there is one."""
        row = min(self.of(image), key=lambda row: row.weight * self.sign)
        others = [one for one in self.of(image) if one is not self.conditional(image)]
        return row if others and (row.weight * self.sign < 0 or len(others) == 1) else None

    @property
    def sign(self) -> int:
        """−1 if the pipeline negates what the network returns."""
        return 1 if sum(row.weight for row in self.rows) >= 0 else -1

    def guidance(self, image: int) -> float:
        """w of u + w (c − u), if that is what the pipeline makes of two rows; otherwise 1."""
        weights = [row.weight for row in self.of(image)]
        is_guided = len(weights) == 2 and self.residual < _LINEAR and abs(abs(sum(weights)) - 1) < _LINEAR
        return abs(self.conditional(image).weight) if is_guided else 1.0

    def of(self, image: int) -> list[Row]:
        """The rows of an image."""
        return [row for row in self.rows if row.image == image]


def roles_of(step: Step) -> Roles:
    """What a step's forwards are. Raises ValueError, which says why, where the numbers do not tell."""
    if not step.forwards:
        raise ValueError(f"no network was called at t = {step.timestep:g}")
    samples = list(step.sample)
    found = [(number, forward, *_find_latent(forward, samples)) for number, forward in enumerate(step.forwards)]
    latent, scale = found[0][2], found[0][3]
    if any((part, round(factor, 4)) != (latent, round(scale, 4)) for _, _, part, factor, _ in found):
        raise ValueError(f"the networks called at t = {step.timestep:g} are given different latents")
    rows = [(number, index, image) for number, _, _, _, images in found for index, image in enumerate(images)]
    output, weights, residual = _find_weights(step, rows)
    return Roles(
        latent, scale, output, tuple(Row(*row, weight) for row, weight in zip(rows, weights, strict=True)), residual
    )


def _tolerance(*values: Tensor) -> float:
    return _TOLERANCE[min(value.element_size() for value in values)]


def _parts(shape: Sequence[int], part: Sequence[int]) -> Iterator[Part]:
    """The parts of a row that have as many entries as a smaller one."""
    if [size for size in shape if size > 1] == [size for size in part if size > 1]:
        yield Part()
    elif len(shape) == len(part):
        different = [axis for axis, (a, b) in enumerate(zip(shape, part, strict=True)) if a != b]
        if len(different) == 1 and shape[different[0]] > part[different[0]]:
            (axis,) = different
            yield Part(axis, 0, part[axis])
            yield Part(axis, shape[axis] - part[axis], part[axis])


def _find_latent(forward: Forward, samples: Sequence[Tensor]) -> tuple[Part, float, list[int]]:
    """Where the latent is in the rows of a forward's input, α, and the image of each row."""
    name, rows = forward.inputs
    best: tuple[float, Part, float, list[int]] | None = None
    for part in _parts(rows[0].shape, samples[0].shape):
        images, residuals, factors = [], [], []
        for number, row in enumerate(part.of(rows)):
            x = row.cpu().double().flatten()
            fits = []
            for image, sample in enumerate(samples):
                s = sample.cpu().double().flatten()
                factor = float(x @ s / (s @ s).clamp(min=1e-30))
                residual = float((x - factor * s).norm() / x.norm().clamp(min=1e-30))
                # Equal latents differ by their place: rows repeat the images in order.
                fits.append((round(residual, 7), (number - image) % len(samples) != 0, image, factor, residual))
            _, _, image, factor, residual = min(fits)
            images.append(image)
            residuals.append(residual)
            factors.append(factor)
        if best is None or max(residuals) < best[0]:
            best = (max(residuals), part, sum(factors) / len(factors), images)
    if best is None or best[0] > _tolerance(rows[0], samples[0]):
        shape, latent = tuple(rows[0].shape), tuple(samples[0].shape)
        raise ValueError(
            f"{name!r} of {forward.network}, {shape} a row, does not contain the latent {latent} that the scheduler "
            "steps from"
        )
    _, part, factor, images = best
    return part, 1.0 if abs(factor - 1) < 1e-6 else factor, images


def _find_weights(step: Step, rows: Sequence[tuple[int, int, int]]) -> tuple[Part, list[float], float]:
    """Where the prediction is in the rows of the outputs, the weight of each row, and the residual."""
    channels = step.sample.shape[1]
    expected = [
        o[:channels] if o.ndim == step.sample[0].ndim and o.shape[0] > channels else o for o in step.model_output
    ]
    outputs = [forward.output for forward in step.forwards]
    count = max(image for _, _, image in rows) + 1
    by_image = [[place for place, row in enumerate(rows) if row[2] == image] for image in range(count)]
    if len({len(places) for places in by_image}) > 1:
        raise ValueError(f"the images of the batch have different numbers of rows at t = {step.timestep:g}")
    best: tuple[float, Part, Tensor] | None = None
    for part in _parts(outputs[0][0].shape, expected[0].shape):
        system, target = [], []
        for image, places in enumerate(by_image):
            of_image = [outputs[number][index : index + 1] for number, index, _ in (rows[place] for place in places)]
            system.append(torch.stack([part.of(one).cpu().double().flatten() for one in of_image], 1))
            target.append(expected[image].cpu().double().flatten())
        a, o = torch.cat(system), torch.cat(target)
        # By the pseudo-inverse, which divides the weight of equal rows among them.
        weights = torch.linalg.pinv(a.T @ a, rtol=1e-12, hermitian=True) @ (a.T @ o)
        residual = float((a @ weights - o).norm() / o.norm().clamp(min=1e-30))
        if best is None or residual < best[0]:
            best = residual, part, weights
    if best is None:
        raise ValueError(
            f"the output {tuple(outputs[0][0].shape)} of {step.forwards[0].network} does not contain what the "
            f"scheduler steps with, {tuple(expected[0].shape)}"
        )
    residual, part, weights = best
    of_row = [0.0] * len(rows)
    for places in by_image:
        for place, weight in zip(places, weights.tolist(), strict=True):
            of_row[place] = weight
    return part, of_row, residual
