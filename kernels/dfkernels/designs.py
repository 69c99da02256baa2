"""Random masks, as each is drawn by counter: the specification in plain PyTorch.

Symbols: n masks in a batch, r rows (one row per item and step), c channels, λ a pixel of the h × w latent, M a mask.
`rows[i]` is the row of batch entry i; −1 marks padding.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dfkernels.counters import (
    FILL_STREAM,
    GAUSSIAN_STREAM,
    PERMUTATION_STREAM,
    RISE_GRID_STREAM,
    RISE_SHIFT_STREAM,
    SIGN_STREAM,
    random_uint32,
)
from dfkernels.distribution import NUM_SHIFTS, PIXELS, MaskDistribution


def draw_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    distribution: MaskDistribution = PIXELS,
) -> Bool[Tensor, "n h w"] | Float[Tensor, "n h w"]:
    """One mask per entry, a function of (seed, step, mask index, pixel) only: bool, of rise masks float32.

    `seeds` hold 64 bits each (negative values represent seeds from 2⁶³); `steps` and `indices` lie in [0, 2³²).
    Raises ValueError if the shape is not possible.
    """
    check_shape(shape)
    threshold = distribution.threshold
    if distribution.kind == "rise":
        return _rise_masks(seeds, steps, indices, shape, threshold, distribution.grid)
    if distribution.cells == (1,) and distribution.design == "iid":
        pixels = random_uint32(seeds, steps, indices, shape[0] * shape[1], GAUSSIAN_STREAM)
        return (pixels < threshold).unflatten(1, shape)
    return _cell_masks(seeds, steps, indices, shape, distribution)


def _cell_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    distribution: MaskDistribution,
) -> Bool[Tensor, "n h w"]:
    """Masks of cells: pixel (y, x) has the value of cell ⌊(y + d)/cell⌋ · columns + ⌊(x + d)/cell⌋.

    Masks (of an orthogonal design: blocks of them) take the sizes of cells in turn. If cells are shifted, the b-th of a
    size has d = (b mod 2) · ⌊cell/2⌋, otherwise d = 0. What is moved beyond the last cells belongs to the first.
    """
    levels = len(distribution.cells)
    blocks = indices // distribution.block if distribution.design == "orthogonal" else indices
    cell = (torch.full_like(blocks, distribution.packed_cells) >> 8 * (blocks % levels)) & 255
    rows, columns = ((size + cell - 1) // cell for size in shape)
    shift = blocks // levels % NUM_SHIFTS * (cell // 2) * int(distribution.shifted)
    y, x = (
        (torch.arange(size, device=seeds.device) + shift[:, None]) // cell[:, None] % count[:, None]
        for size, count in zip(shape, (rows, columns), strict=True)
    )
    number = (y * columns[:, None])[:, :, None] + x[:, None, :]
    if distribution.design == "orthogonal":
        kept = _orthogonal(seeds, steps, blocks, indices % distribution.block, (rows, columns), shape, distribution)
    else:
        count = max(math.prod(distribution.num_cells(shape, one)) for one in distribution.cells)
        kept = random_uint32(seeds, steps, blocks, count, GAUSSIAN_STREAM) < distribution.threshold
    return kept.gather(1, number.flatten(1)).unflatten(1, shape)


def _orthogonal(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    blocks: Int[Tensor, " n"],
    places: Int[Tensor, " n"],
    cells: tuple[Int[Tensor, " n"], Int[Tensor, " n"]],
    shape: tuple[int, int],
    distribution: MaskDistribution,
) -> Bool[Tensor, "n cells"]:
    """Which cells the mask at each place in [0, block) of its block keeps.

    A Sylvester–Hadamard array of order D = 2ᵏ = block/2 has the entries (−1)^parity(i AND j), so nothing is stored.
    Place 2i has row i, place 2i + 1 its complement (fold-over); column j belongs to a cell. Rows and columns are
    permuted, and the signs of columns drawn, at random by block. More than D cells are divided into tiles of
    2^⌈k/2⌉ × 2^⌊k/2⌋, each of which is such a design by itself, permuted independently.
    """
    order, k = distribution.block // 2, (distribution.block // 2).bit_length() - 1
    rows, columns = (size[:, None] for size in cells)
    fits = rows * columns <= order
    tile_rows, tile_columns = torch.where(fits, rows, 1 << (k + 1) // 2), torch.where(fits, columns, 1 << k // 2)
    grids = [distribution.num_cells(shape, cell) for cell in distribution.cells]
    num_tiles = max(1 if r * c <= order else -(-r >> (k + 1) // 2) * -(-c >> k // 2) for r, c in grids)
    cell = torch.arange(max(r * c for r, c in grids), device=seeds.device)
    y, x = cell // columns, cell % columns
    tile = y // tile_rows * ((columns + tile_columns - 1) // tile_columns) + x // tile_columns
    column = y % tile_rows * tile_columns + x % tile_columns

    words = random_uint32(seeds, steps, blocks, 4 * num_tiles, PERMUTATION_STREAM).unflatten(1, (num_tiles, 4))
    # A grid of fewer cells has numbers that no pixel reads.
    words = words.take_along_dim(tile.clamp(max=num_tiles - 1)[:, :, None], 1)
    column = permuted(column, words[..., 0], words[..., 1], order)
    row = permuted((places // 2)[:, None].expand_as(column), words[..., 2], words[..., 3], order)
    sign = random_uint32(seeds, steps, blocks, len(cell), SIGN_STREAM) >> 31
    return (_parity(row & column) ^ sign ^ places[:, None] & 1).bool()


def permuted(
    number: Int[Tensor, "*n"], first: Int[Tensor, "*n"], second: Int[Tensor, "*n"], order: int
) -> Int[Tensor, "*n"]:
    """A random permutation of [0, order), order = 2ᵏ ≤ 2¹⁰, drawn by two 32-bit words.

    Three rounds of x ← a·x + b modulo 2ᵏ, x ← x ⊕ ⌊x / 2^⌈k/2⌉⌋ with a odd, each a bijection; round r has ten bits of
    each word, from bit 10·r on.
    """
    half = max(1, order.bit_length() // 2)
    for shift in (0, 10, 20):
        number = ((first >> shift & 1023 | 1) * number + (second >> shift & 1023)) % order
        number = number ^ number >> half
    return number


def _parity(number: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Whether the number of ones among the lowest 16 bits is odd."""
    for shift in (8, 4, 2, 1):
        number = number ^ number >> shift
    return number & 1


def _rise_masks(
    seeds: Int[Tensor, " n"],
    steps: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    shape: tuple[int, int],
    threshold: int,
    grid: int,
) -> Float[Tensor, "n h w"]:
    """RISE (Petsiuk et al. 2018): an s × s field, bilinear to (s+1)·⌈h/s⌉ × (s+1)·⌈w/s⌉, shifted, cropped to h × w.

    Half-pixel centres, edges replicated: pixel i of an upsampled side of `span` pixels reads the field at
    (i + ½)·s/span − ½. The vertical shift is number 0 of the shift stream modulo ⌈h/s⌉, the horizontal shift number 1
    modulo ⌈w/s⌉.
    """
    field = random_uint32(seeds, steps, indices, grid * grid, RISE_GRID_STREAM) < threshold
    field = field.to(torch.float32).unflatten(1, (grid, grid))
    shifts = random_uint32(seeds, steps, indices, 2, RISE_SHIFT_STREAM)
    for axis, size in enumerate(shape):
        cell = -(-size // grid)
        span = (grid + 1) * cell
        pixel = torch.arange(size, device=seeds.device) + shifts[:, axis, None] % cell
        # In units of 1/(2·span) the position is an integer, so its floor and fraction are the same on every device.
        position = ((2 * pixel + 1) * grid - span).clamp(min=0).unsqueeze(2 - axis)
        low = position // (2 * span)
        fraction = (position % (2 * span)).to(torch.float32) / (2 * span)
        below, above = (field.take_along_dim(i, axis + 1) for i in (low, (low + 1).clamp(max=grid - 1)))
        field = below + fraction * (above - below)
    return field


def masks(
    seed: int,
    step: int,
    first: int,
    count: int,
    shape: tuple[int, int],
    distribution: MaskDistribution = PIXELS,
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "count h w"] | Float[Tensor, "count h w"]:
    """Masks `first` to `first + count − 1` of a 64-bit seed and a step index; see `draw_masks`.

    The same on every device and for every batch size. Raises ValueError if an argument is out of range.
    """
    return draw_masks(*mask_counters(seed, step, first, count, device), shape, distribution)


def mask_counters(
    seed: int, step: int, first: int, count: int, device: torch.device | str | None
) -> tuple[Int[Tensor, " count"], Int[Tensor, " count"], Int[Tensor, " count"]]:
    """The arguments of `masks` as the seeds, steps and indices that `draw_masks` takes."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed {seed} does not fit in 64 bits: reduce it modulo 2**64")
    if not 0 <= step < 2**32:
        raise ValueError(f"step {step} is outside [0, 2**32): give the index of the step in the list, from 0")
    if count < 0:
        raise ValueError(f"count {count} is negative: ask for 0 masks or more")
    if not 0 <= first <= 2**32 - count:
        raise ValueError(f"masks {first} to {first + count - 1} are outside [0, 2**32): for more, use another seed")
    signed = (seed + 2**63) % 2**64 - 2**63
    seeds, steps = (torch.full((count,), value, dtype=torch.int64, device=device) for value in (signed, step))
    return seeds, steps, torch.arange(first, first + count, device=device)


def check_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"mask shape {tuple(shape)} is not (h, w), both at least 1: give the latent's size")


# Masking -------------------------------------------------------------------------------------------------------------


def apply_masks(
    latents: Float[Tensor, "r c h w"],
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    distribution: MaskDistribution = PIXELS,
    *,
    fill: Float[Tensor, "r c_and_one"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n c h w"]:
    """Masked latents x_i = R[row_i] ⊙ M_i + F_i ⊙ (1 − M_i), channels-last; zeros for padding.

    All channels share the mask M_i = M(seed[row_i], step[row_i], index_i). F is 0, or with `fill` fresh noise around a
    constant: F_i(k, λ) = fill[row_i, k] + fill[row_i, c] · n', n' ~ N(0, 1) by counter (`normal`). `dtype` defaults to
    the latents' own; the result is rounded to it once.
    """
    c, h, w = latents.shape[1:]
    row = rows.clamp(min=0)
    mask = draw_masks(seeds[row], steps[row], indices, (h, w), distribution)[:, None]
    masked = latents[row] * mask
    if fill is not None:
        noise = normal(seeds[row], steps[row], indices, c, h * w).unflatten(2, (h, w))
        mean, scale = fill[row, :c, None, None], fill[row, c, None, None, None]
        filled = mean + scale * noise
        masked = torch.where(mask, latents[row], filled) if distribution.is_binary else masked + filled * (1 - mask)
    masked = torch.where((rows >= 0)[:, None, None, None], masked, 0.0)
    return masked.to(dtype or latents.dtype).contiguous(memory_format=torch.channels_last)


def normal(
    seeds: Int[Tensor, " n"], steps: Int[Tensor, " n"], indices: Int[Tensor, " n"], channels: int, pixels: int
) -> Float[Tensor, "n channels pixels"]:
    """Standard normal numbers for every mask, channel and pixel, float32, by Box and Muller.

    Channel k of pixel λ has place k mod 4 of Philox at counter (λ·⌈c/4⌉ + ⌊k/4⌋, mask index, step, stream). Places 0
    and 1 are √(−2 ln u₀) times cos 2πu₁ and sin 2πu₁, places 2 and 3 the same of u₂ and u₃; u = (⌊word/2⁹⌋ + ½)/2²³.
    """
    groups = -(-channels // 4)
    words = random_uint32(seeds, steps, indices, 4 * groups * pixels, FILL_STREAM)
    u = ((words >> 9).float() + 0.5) / 2**23
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    numbers = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)
    return numbers.view(len(words), pixels, 4 * groups)[:, :, :channels].transpose(1, 2)
