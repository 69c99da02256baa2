"""The masks of `designs.draw_masks` inside kernels: Philox on 32-bit counters, evaluated for any pixels of a mask.

Device functions, and their arguments. A mask is a function of (seed, step, mask index, pixel), so a kernel can draw
whatever part of a mask it needs, and no mask is stored.
"""

from typing import Any

import triton
import triton.language as tl

from dfkernels.distribution import MaskDistribution

#: The runtime arguments of `weights`, which kernels are not specialised on.
NOT_SPECIALISED = ["threshold", "cells", "bits"]

# The streams of `counters`, repeated because kernels can only read constexpr globals.
GAUSSIAN_STREAM = tl.constexpr(0)
RISE_GRID_STREAM = tl.constexpr(1)
RISE_SHIFT_STREAM = tl.constexpr(2)
PERMUTATION_STREAM = tl.constexpr(5)
SIGN_STREAM = tl.constexpr(6)
FILL_STREAM = tl.constexpr(7)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011): four words per counter and key, which broadcast; all uint32.

    Written out because the meaning of a 64-bit counter to `tl.philox` has changed between Triton releases.
    """
    for _ in tl.static_range(10):
        # A 32 × 32 → 64 bit product is one instruction; separate high and low halves are two.
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def load_entry(seeds, steps, rows, indices, n):
    """The row of batch entry n (int64, −1 for padding) and its mask's key, step and index (uint32)."""
    row = tl.load(rows + n).to(tl.int64)
    index = tl.load(indices + n).to(tl.uint32)
    seed = tl.load(seeds + tl.maximum(row, 0)).to(tl.int64)
    step = tl.load(steps + tl.maximum(row, 0)).to(tl.uint32)
    return row, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step, index


@triton.jit
def random_uint32(first, k0, k1, step, index, STREAM: tl.constexpr, COUNT: tl.constexpr):
    """Random numbers first … first + COUNT − 1 of a stream, in order; `first` and COUNT are multiples of four.

    One Philox call yields four consecutive numbers, which stay in one thread.
    """
    block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = philox(block, zero + index, zero + step, zero + STREAM, k0, k1)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def random_uint32_at(position, k0, k1, step, index, STREAM: tl.constexpr):
    """The random numbers at arbitrary positions of a stream (non-negative int32), one Philox call each."""
    zero = (position * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox((position // 4).to(tl.uint32), zero + index, zero + step, zero + STREAM, k0, k1)
    lane = position % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def keeps(word, threshold):
    """1[word < threshold], compared in 64 bits because the threshold round(p·2³²) can be 2³²."""
    return word.to(tl.int64) < threshold


@triton.jit
def weights(
    first, k0, k1, step, index, h, w, threshold, cells, bits,
    GRID: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """M at pixels first … first + BLOCK − 1 of one mask, float32 in [0, 1]; `first` and BLOCK are multiples of four.

    Values past the end of the image (h·w) are meaningless; the caller masks them out.
    """
    if KIND == "pixels":
        weight = keeps(random_uint32(first, k0, k1, step, index, GAUSSIAN_STREAM, BLOCK), threshold).to(tl.float32)
    else:
        pixel = first + tl.arange(0, BLOCK)
        weight = weights_at(
            pixel, k0, k1, step, index, h, w, threshold, cells, bits, GRID, KIND, LEVELS, SHIFTED
        )  # fmt: skip
    return weight


@triton.jit
def weights_at(
    pixel, k0, k1, step, index, h, w, threshold, cells, bits,
    GRID: tl.constexpr, KIND: tl.constexpr, LEVELS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """M at arbitrary pixels (non-negative int32, y·w + x) of one mask, float32 in [0, 1]; for two-dimensional tiles.

    KIND is "pixels", "cells", "orthogonal" or "rise"; see `form`. `cells` has the sides of the LEVELS sizes of cells, 8
    bits each; an orthogonal design has order 2^bits.
    """
    if KIND == "rise":
        weight = _rise(pixel, k0, k1, step, index, h, w, threshold, GRID)
    elif KIND == "pixels":
        weight = keeps(random_uint32_at(pixel, k0, k1, step, index, GAUSSIAN_STREAM), threshold).to(tl.float32)
    else:
        block = index
        if KIND == "orthogonal":
            block = index >> (bits + 1).to(tl.uint32)
        cell = cells
        if LEVELS > 1:
            cell = (cells >> (8 * (block % LEVELS).to(tl.int32))) & 255
        y, x = pixel // w, pixel % w
        rows, columns = tl.cdiv(h, cell), tl.cdiv(w, cell)
        if SHIFTED:
            shift = ((block // LEVELS) & 1).to(tl.int32) * (cell // 2)
            y += shift
            x += shift
        y, x = y // cell % rows, x // cell % columns
        if KIND == "orthogonal":
            place = (index & ((2 << bits) - 1).to(tl.uint32)).to(tl.int32)
            weight = _orthogonal(y, x, rows, columns, place, bits, k0, k1, step, block)
        else:
            word = random_uint32_at(y * columns + x, k0, k1, step, block, GAUSSIAN_STREAM)
            weight = keeps(word, threshold).to(tl.float32)
    return weight


@triton.jit
def _orthogonal(y, x, rows, columns, place, bits, k0, k1, step, block):
    """The cells in rows y and columns x of one mask of an orthogonal design; see `designs._orthogonal`."""
    fits = rows * columns <= (1 << bits)
    tile_rows = tl.where(fits, rows, 1 << ((bits + 1) // 2))
    tile_columns = tl.where(fits, columns, 1 << (bits // 2))
    tile = y // tile_rows * tl.cdiv(columns, tile_columns) + x // tile_columns
    column = y % tile_rows * tile_columns + x % tile_columns
    zero = (tile * 0).to(tl.uint32)
    counter = (tile.to(tl.uint32), zero + block, zero + step, zero + PERMUTATION_STREAM)
    first, second, third, fourth = philox(counter[0], counter[1], counter[2], counter[3], k0, k1)
    column = _permuted(column, first, second, bits)
    row = _permuted(place // 2 + column * 0, third, fourth, bits)
    sign = (random_uint32_at(y * columns + x, k0, k1, step, block, SIGN_STREAM) >> 31).to(tl.int32)
    parity = row & column
    parity ^= parity >> 8
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return ((parity ^ sign ^ place) & 1).to(tl.float32)


@triton.jit
def _permuted(number, first, second, bits):
    """A random permutation of [0, 2^bits); see `designs.permuted`."""
    half = tl.maximum(1, (bits + 1) // 2)
    for shift in tl.static_range(0, 30, 10):
        factor = ((first >> shift) & 1023).to(tl.int32) | 1
        number = (factor * number + ((second >> shift) & 1023).to(tl.int32)) & ((1 << bits) - 1)
        number ^= number >> half
    return number


@triton.jit
def normal(pixel, channel, C, k0, k1, step, index):
    """Standard normal numbers for pixels and channels, which broadcast; see `designs.normal`."""
    position = (pixel * ((C + 3) // 4) + channel // 4).to(tl.uint32)
    zero = position * 0
    w0, w1, w2, w3 = philox(position, zero + index, zero + step, zero + FILL_STREAM, k0, k1)
    lane = channel % 4
    radius = tl.sqrt_rn(-2.0 * tl.log(_unit(tl.where(lane < 2, w0, w2))))
    angle = 6.283185307179586 * _unit(tl.where(lane < 2, w1, w3))
    return radius * tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def _unit(word):
    """The number in (0, 1) of a random word's upper 23 bits."""
    return ((word >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)


@triton.jit
def _rise(pixel, k0, k1, step, index, h, w, threshold, GRID: tl.constexpr):
    """A RISE mask: bilinear between the four cells around each pixel, rows first as in `designs._rise_masks`.

    The complete field is drawn once and read from shared memory: 16 Philox calls for 8 × 8 cells, not four per pixel.
    """
    CELLS: tl.constexpr = 64 if GRID <= 8 else 1024
    tl.static_assert(GRID <= 32, "grids above 32 x 32 cells are left to the reference")
    field = keeps(random_uint32(0, k0, k1, step, index, RISE_GRID_STREAM, CELLS), threshold).to(tl.float32)
    zero = index * 0
    shift_y, shift_x, _, _ = philox(zero, index, step, zero + RISE_SHIFT_STREAM, k0, k1)
    top, bottom, v = _adjacent_cells(pixel // w, shift_y, h, GRID)
    left, right, u = _adjacent_cells(pixel % w, shift_x, w, GRID)
    left_value = _lerp(_gather(field, top * GRID + left), _gather(field, bottom * GRID + left), v)
    right_value = _lerp(_gather(field, top * GRID + right), _gather(field, bottom * GRID + right), v)
    return _lerp(left_value, right_value, u)


@triton.jit
def _adjacent_cells(i, shift, size, GRID: tl.constexpr):
    """The two cells on either side of pixel i along one axis, and the interpolation weight of the second.

    The position is (i + shift + ½)·grid/span − ½ with span = (grid + 1)·⌈size/grid⌉, in units of 1/(2·span) so that its
    floor is exact.
    """
    cell = (size + GRID - 1) // GRID
    span = (GRID + 1) * cell
    shifted = i + (shift % tl.cast(cell, tl.uint32)).to(tl.int32)
    position = tl.maximum((2 * shifted + 1) * GRID - span, 0)
    low = position // (2 * span)
    fraction = tl.div_rn((position % (2 * span)).to(tl.float32), tl.cast(2 * span, tl.float32))
    return tl.minimum(low, GRID - 1), tl.minimum(low + 1, GRID - 1), fraction


@triton.jit
def _gather(field, cell):
    return tl.reshape(tl.gather(field, tl.ravel(cell), 0), cell.shape)


@triton.jit
def _lerp(below, above, weight):
    return below + weight * (above - below)


# Host ----------------------------------------------------------------------------------------------------------------


def form(distribution: MaskDistribution) -> str:
    """The KIND of a distribution's masks inside kernels."""
    if distribution.kind == "rise" or distribution.design == "orthogonal":
        return "rise" if distribution.kind == "rise" else "orthogonal"
    return "pixels" if distribution.cells == (1,) else "cells"


def runtime_arguments(distribution: MaskDistribution) -> dict[str, int]:
    """The arguments of `weights` that a launch does not specialise on."""
    bits = (distribution.block // 2).bit_length() - 1
    return {"threshold": distribution.threshold, "cells": distribution.packed_cells, "bits": bits}


def constants(distribution: MaskDistribution) -> dict[str, Any]:
    """The `tl.constexpr` arguments of `weights`; a grid only where there is one, so that nothing compiles in vain."""
    kind = form(distribution)
    return {
        "GRID": distribution.grid if kind == "rise" else 8,
        "KIND": kind,
        "LEVELS": len(distribution.cells),
        "SHIFTED": distribution.shifted and max(distribution.cells) > 1,
    }
