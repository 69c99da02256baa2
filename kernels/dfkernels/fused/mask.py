"""The masks of `reference.draw` inside a kernel: Philox on 32-bit counters, and a block of pixels of one mask.

Device functions only, called by the kernels beside this file. A mask is a function of (seed, step, mask index, pixel),
so that any kernel can draw any part of any mask: none is ever stored.
"""

import triton
import triton.language as tl

# The same as in `reference`, as the kernels' own constants.
GAUSSIAN_STREAM = tl.constexpr(0)
RISE_GRID_STREAM = tl.constexpr(1)
RISE_SHIFT_STREAM = tl.constexpr(2)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011), four words of a counter and a key that broadcast, all uint32.

    Written out, not `tl.philox`: what a 64-bit counter means to that one has changed between releases.
    """
    for _ in tl.static_range(10):
        # 32 × 32 → 64 bits is one instruction, where the high and the low half apart are two.
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
    """Entry n of a batch: its row (int64, −1 for padding), and the key and counter of its mask (uint32)."""
    row = tl.load(rows + n).to(tl.int64)
    index = tl.load(indices + n).to(tl.uint32)
    seed = tl.load(seeds + tl.maximum(row, 0)).to(tl.int64)
    step = tl.load(steps + tl.maximum(row, 0)).to(tl.uint32)
    return row, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), step, index


@triton.jit
def words(first, k0, k1, step, index, STREAM: tl.constexpr, COUNT: tl.constexpr):
    """Words first … first + COUNT − 1 of a stream, in order; `first` and COUNT are multiples of four.

    One Philox call makes the words of four neighbours, which stay in one thread.
    """
    block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = philox(block, zero + index, zero + step, zero + STREAM, k0, k1)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words_at(position, k0, k1, step, index, STREAM: tl.constexpr):
    """The words at any positions of a stream (int32, not negative): one Philox call each."""
    zero = (position * 0).to(tl.uint32)
    w0, w1, w2, w3 = philox((position // 4).to(tl.uint32), zero + index, zero + step, zero + STREAM, k0, k1)
    lane = position % 4
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def keeps(word, threshold):
    """1[word < threshold], in 64 bits: the threshold round(p·2³²) can be 2³² itself."""
    return word.to(tl.int64) < threshold


@triton.jit
def weights(first, k0, k1, step, index, h, w, threshold, GRID: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """M at pixels first … first + BLOCK − 1 of one mask, float32 in [0, 1]; `first` and BLOCK are multiples of four.

    Pixels past the end of the image (h·w) get a weight too, for the caller to leave out.
    """
    if KIND == "rise":
        weight = _rise(first + tl.arange(0, BLOCK), k0, k1, step, index, h, w, threshold, GRID)
    else:
        weight = keeps(words(first, k0, k1, step, index, GAUSSIAN_STREAM, BLOCK), threshold).to(tl.float32)
    return weight


@triton.jit
def weights_at(pixel, k0, k1, step, index, h, w, threshold, GRID: tl.constexpr, KIND: tl.constexpr):
    """M at any pixels (int32, y·w + x, not negative) of one mask, float32 in [0, 1]: for tiles that are not a run."""
    if KIND == "rise":
        weight = _rise(pixel, k0, k1, step, index, h, w, threshold, GRID)
    else:
        weight = keeps(words_at(pixel, k0, k1, step, index, GAUSSIAN_STREAM), threshold).to(tl.float32)
    return weight


@triton.jit
def _rise(pixel, k0, k1, step, index, h, w, threshold, GRID: tl.constexpr):
    """RISE's mask: the four cells of the field around each pixel, rows interpolated first, as in `reference._rise`.

    The whole field is drawn and looked up in shared memory: 16 Philox calls for 8 × 8 cells, not four a pixel.
    """
    CELLS: tl.constexpr = 64 if GRID <= 8 else 1024
    tl.static_assert(GRID <= 32, "a field of more than 32 x 32 cells is left to the reference")
    field = keeps(words(0, k0, k1, step, index, RISE_GRID_STREAM, CELLS), threshold).to(tl.float32)
    zero = index * 0
    shift_y, shift_x, _, _ = philox(zero, index, step, zero + RISE_SHIFT_STREAM, k0, k1)
    top, bottom, v = _between(pixel // w, shift_y, h, GRID)
    left, right, u = _between(pixel % w, shift_x, w, GRID)
    near = _mix(_look_up(field, top * GRID + left), _look_up(field, bottom * GRID + left), v)
    far = _mix(_look_up(field, top * GRID + right), _look_up(field, bottom * GRID + right), v)
    return _mix(near, far, u)


@triton.jit
def _between(i, shift, size, GRID: tl.constexpr):
    """The two cells that pixel i of a side lies between, and how far it is on the way from the one to the other.

    (i + shift + ½)·grid/span − ½ in units of 1/(2·span), so that its whole part is exact; span = (grid + 1)·⌈size/grid⌉
    """
    cell = (size + GRID - 1) // GRID
    span = (GRID + 1) * cell
    moved = i + (shift % tl.cast(cell, tl.uint32)).to(tl.int32)
    position = tl.maximum((2 * moved + 1) * GRID - span, 0)
    low = position // (2 * span)
    fraction = tl.div_rn((position % (2 * span)).to(tl.float32), tl.cast(2 * span, tl.float32))
    return tl.minimum(low, GRID - 1), tl.minimum(low + 1, GRID - 1), fraction


@triton.jit
def _look_up(field, cell):
    return tl.reshape(tl.gather(field, tl.ravel(cell), 0), cell.shape)


@triton.jit
def _mix(below, above, fraction):
    return below + fraction * (above - below)
