"""`reference.similarity` in Triton: f(R⊙M) is read from memory once, f(R)'s statistics are computed once per row."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int
from torch import Tensor

from dfkernels import reference
from dfkernels.fused.configuration import Configuration
from dfkernels.fused.statistics import TILE_H, TILE_W, clamped, cosine, local_score, read, term, tile_pixels

#: Elements (pixels × channels) and most channels of a block of the global score: 8 elements per thread.
BLOCK_ELEMENTS, MAX_CHANNELS, GLOBAL_WARPS = 1024, 16, 4
#: Registers per thread, of 255; without a limit the compiler spills some for the sake of occupancy.
LOCAL_REGISTERS = 168


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _local_score(
    a, stride_n, stride_c, stride_p, b, mean, variance, offset, rows, out, h, w, C, rate, c1, c2,
    KIND: tl.constexpr, RADIUS: tl.constexpr,
):  # fmt: skip
    """out[n, λ] = s(λ) for one tile of one entry."""
    tiles = tl.cdiv(h, TILE_H) * tl.cdiv(w, TILE_W)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    y, x = tile_pixels(tl.program_id(0) % tiles, h, w)
    row = tl.load(rows + n)
    at = row * C * h * w
    a += n * stride_n
    score = local_score(
        a, stride_c, stride_p, a, stride_c, stride_p, 1.0, 0.0, b + at, mean + at, variance + at, offset + row * C,
        y, x, h, w, C, rate, c1, c2, KIND, RADIUS, False,
    )  # fmt: skip
    inside = (y < h)[:, None] & (x < w)[None, :]
    tl.store(out + n * h * w + y[:, None] * w + x[None, :], score, mask=inside)


@triton.jit
def _read(
    a, stride_c, stride_p, input, input_c, input_p, of_output, of_input, channel, pixel, C, pixels,
    READS: tl.constexpr,
):  # fmt: skip
    """A block of an entry, float32 [BLOCK, CHANNELS], zero outside the image; see `reference.read`."""
    inside = (pixel < pixels) & (channel < C)
    at, at_input = channel.to(tl.int64) * stride_c + pixel * stride_p, channel.to(tl.int64) * input_c + pixel * input_p
    return read(a, input, at, at_input, of_output, of_input, inside, READS)


@triton.jit
def _global_score(
    a, stride_n, stride_c, stride_p, input, input_n, input_c, input_p, reading,
    b, mean, variance, offset, rows, out, pixels, C, c1, c2,
    KIND: tl.constexpr, READS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] = s of one entry, with statistics over all pixels of a channel; NaN for padding (row −1)."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + n)
    a += n * stride_n
    input += n * input_n
    b += tl.maximum(row, 0) * C * pixels
    of_output = 1.0
    of_input = 0.0
    if READS:
        of_output = tl.load(reading + 2 * n)
        of_input = tl.load(reading + 2 * n + 1)
    score = 0.0
    aa = 0.0
    bb = 0.0
    for start in range(0, C, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)[None, :]
        sum_a = tl.zeros((BLOCK, CHANNELS), tl.float32)
        sum_aa = tl.zeros((BLOCK, CHANNELS), tl.float32)
        sum_ab = tl.zeros((BLOCK, CHANNELS), tl.float32)
        sum_bb = tl.zeros((BLOCK, CHANNELS), tl.float32)
        if KIND != "cosine" and KIND != "mse":
            for first in range(0, pixels, BLOCK):
                pixel = first + tl.arange(0, BLOCK)[:, None]
                sum_a += _read(
                    a, stride_c, stride_p, input, input_c, input_p, of_output, of_input, channel, pixel, C, pixels,
                    READS,
                )  # fmt: skip
        # The second pass reads the entry from the caches.
        offset_a = tl.sum(sum_a, 0)[None, :] / pixels
        sum_a = tl.zeros((BLOCK, CHANNELS), tl.float32)
        for first in range(0, pixels, BLOCK):
            pixel = first + tl.arange(0, BLOCK)[:, None]
            value = _read(
                a, stride_c, stride_p, input, input_c, input_p, of_output, of_input, channel, pixel, C, pixels, READS
            )
            value = tl.where(pixel < pixels, value - offset_a, 0.0)
            inside = (pixel < pixels) & (channel < C)
            other = tl.load(b + channel.to(tl.int64) * pixels + pixel, mask=inside, other=0.0)
            if KIND == "mse":
                sum_aa += (value - other) * (value - other)
            else:
                sum_a += value
                sum_aa += value * value
                sum_ab += value * other
                sum_bb += other * other
        if KIND == "cosine":
            score += tl.sum(sum_ab)
            aa += tl.sum(sum_aa)
            bb += tl.sum(sum_bb)
        elif KIND == "mse":
            score -= tl.sum(sum_aa) / pixels
        else:
            at = tl.maximum(row, 0) * C + channel
            mean_b = tl.load(mean + at, mask=channel < C, other=0.0)
            var_b = tl.load(variance + at, mask=channel < C, other=0.0)
            offset_b = tl.load(offset + at, mask=channel < C, other=0.0)
            mean_a = tl.sum(sum_a, 0)[None, :] / pixels
            var_a = clamped(tl.sum(sum_aa, 0)[None, :] / pixels - mean_a * mean_a)
            cov = tl.sum(sum_ab, 0)[None, :] / pixels - mean_a * mean_b
            channel_scores = term(KIND, mean_a + offset_a, mean_b + offset_b, var_a, var_b, cov, c1, c2)
            score += tl.sum(tl.where(channel < C, channel_scores, 0.0))
    score = cosine(score, aa, bb) if KIND == "cosine" else score / C
    tl.store(out + n, tl.where(row < 0, float("nan"), score))


# Host ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceStatistics:
    """The statistics of b = f(R) of each row, computed once and used by every mask of the row.

    `offset` is the mean of a channel and `pixels` is b minus it; `mean` and `variance` are those of `pixels` over the
    window around each pixel (`local`) or over the channel (`global`). For cosine and MSE `offset` is 0.
    """

    kind: str
    score: str
    window: int
    sigma: float
    data_range: float
    pixels: Float32[Tensor, "r c h w"]
    offset: Float32[Tensor, "r c"]
    mean: Float32[Tensor, "r c h w"] | Float32[Tensor, "r c"]
    variance: Float32[Tensor, "r c h w"] | Float32[Tensor, "r c"]

    @property
    def constants(self) -> tuple[float, float]:
        """C₁ = (0.01 L)² and C₂ = (0.03 L)²."""
        return (0.01 * self.data_range) ** 2, (0.03 * self.data_range) ** 2

    @property
    def radius(self) -> int:
        """The window's radius in pixels, at most the distance across the image."""
        return min(self.window // 2, max(self.pixels.shape[-2:]) - 1)

    @property
    def rate(self) -> float:
        """The exponent of the window's weights g_k = exp(−|k|² / 2σ²) = 2^(rate·|k|²)."""
        return -0.5 / self.sigma**2 / math.log(2)

    def check(self, kind: str, score: str, *, window: int, sigma: float, data_range: float) -> None:
        """Raise ValueError if the statistics were computed with other settings than these."""
        prepared = (self.kind, self.score, self.window, self.sigma, self.data_range)
        expected = (kind, score, window, sigma, data_range)
        if prepared != expected:
            raise ValueError(
                f"got references prepared for {prepared}, expected {expected}: prepare them with the latter"
            )


def prepare(
    references: Float[Tensor, "r c h w"],
    kind: str = "structure",
    score: str = "local",
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> ReferenceStatistics:
    """The statistics of f(R) of each row, which `accumulate` accepts; computed in float64, stored in float32."""
    h, w = references.shape[-2:]
    exact = references.double()
    offset = exact.mean((2, 3)) * (kind not in ("cosine", "mse"))
    centred = exact - offset[..., None, None]

    def average(x: Tensor) -> Tensor:
        if score == "global":
            return x.mean((2, 3))
        return _window_matrix(h, window // 2, sigma, x) @ x @ _window_matrix(w, window // 2, sigma, x).T

    mean = average(centred)
    variance = (average(centred.square()) - mean.square()).clamp(min=0)
    rounded = (x.float().contiguous() for x in (centred, offset, mean, variance))
    return ReferenceStatistics(kind, score, window, sigma, data_range, *rounded)


def _window_matrix(size: int, radius: int, sigma: float, like: Tensor) -> Float[Tensor, "size size"]:
    """G[i, j] = g_{j−i} / Σ_k g_{k−i} over the k inside the image and within the radius; G x averages x's columns."""
    position = torch.arange(size, device=like.device)
    distance = position - position[:, None]
    g = torch.exp(-0.5 * (distance.to(like.dtype) / sigma).square()) * (distance.abs() <= radius)
    return g / g.sum(1, keepdim=True)


def similarity(
    a: Float[Tensor, "n c h w"],
    b: Float[Tensor, "..."],
    kind: str = "structure",
    score: str = "local",
    *,
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
) -> Float[Tensor, "n h w"] | Float[Tensor, " n"]:
    """`reference.similarity` to float32 precision; float64 inputs are left to the reference."""
    settings: dict[str, Any] = {"window": window, "sigma": sigma, "data_range": data_range}
    if torch.float64 in (a.dtype, b.dtype):
        return reference.similarity(a, b, kind, score, **settings)
    reference.check_similarity(a, b, kind, score, window, sigma, data_range)
    is_shared = b.ndim == 3
    rows = torch.arange(len(a), device=a.device) * (not is_shared)
    statistics = prepare(b[None] if is_shared else b, kind, score, **settings)
    return score_maps(a, statistics, rows) if score == "local" else score_numbers(a, statistics, rows)


def score_maps(
    a: Float[Tensor, "n c h w"], b: ReferenceStatistics, rows: Int[Tensor, " n"]
) -> Float32[Tensor, "n h w"]:
    """s_n(λ) of each entry against its row; `rows` must not contain padding."""
    n, c, h, w = a.shape
    out = torch.empty((n, h, w), dtype=torch.float32, device=a.device)
    grid = (n * tiles(h, w),)
    _local_score[grid](
        *strided(a), b.pixels, b.mean, b.variance, b.offset, rows, out, h, w, c, b.rate, *b.constants,
        KIND=b.kind, RADIUS=b.radius, num_warps=1, maxnreg=LOCAL_REGISTERS,
    )  # fmt: skip
    return out


def score_numbers(
    a: Float[Tensor, "n c h w"],
    b: ReferenceStatistics,
    rows: Int[Tensor, " n"],
    inputs: Float[Tensor, "n c h w"] | None = None,
    reading: Float[Tensor, "n 2"] | None = None,
) -> Float32[Tensor, " n"]:
    """s_n of each entry against its row; NaN for padding (row −1)."""
    n, c, h, w = a.shape
    out = torch.empty(n, dtype=torch.float32, device=a.device)
    _global_score[(n,)](
        *strided(a), *read_arguments(a, inputs, reading), b.pixels, b.mean, b.variance, b.offset, rows, out, h * w, c,
        *b.constants, KIND=b.kind, READS=reading is not None, **_blocks(c), num_warps=GLOBAL_WARPS,
    )  # fmt: skip
    return out


def read_arguments(
    a: Float[Tensor, "n c h w"], inputs: Float[Tensor, "n c h w"] | None, reading: Float[Tensor, "n 2"] | None
) -> tuple[Any, ...]:
    """The network's inputs, their strides and each entry's factors; something that is not read if there are none."""
    return *strided(a if inputs is None else inputs), (a if reading is None else reading.float().contiguous())


def tiles(h: int, w: int) -> int:
    """The number of tiles of a local score."""
    return triton.cdiv(h, TILE_H.value) * triton.cdiv(w, TILE_W.value)


def strided(a: Float[Tensor, "n c h w"]) -> tuple[Tensor, int, int, int]:
    """`a` and its strides over entries, channels and pixels; copied first if its pixels have no common stride."""
    h, w = a.shape[2:]
    has_pixel_stride = h == 1 or w == 1 or a.stride(2) == w * a.stride(3)
    if not has_pixel_stride or max(a.stride(2) * h, a.stride(3) * w) >= 2**31:
        a = a.contiguous()
    return a, a.stride(0), a.stride(1), a.stride(3 if w > 1 else 2)


def _blocks(channels: int) -> dict[str, int]:
    per_block = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    return {"CHANNELS": per_block, "BLOCK": BLOCK_ELEMENTS // per_block}


# Ahead of time -------------------------------------------------------------------------------------------------------


#: The layouts and dtypes of f(R⊙M) at launch; Triton makes a stride of one a constant.
CHANNELS_LAST = ({"stride_n": "i32:16", "stride_p": "i32"}, {"stride_c": 1})
CHANNELS_FIRST = ({"stride_n": "i32:16", "stride_c": "i32:16"}, {"stride_p": 1})
ANY_STRIDES: tuple[dict[str, str], dict[str, int]] = ({"stride_n": "i64", "stride_c": "i32", "stride_p": "i32"}, {})
#: The network's inputs, which `apply_masks` makes channels-last.
INPUT_TYPES = {"input": "*fp16:16", "input_n": "i32:16", "input_p": "i32"}
LAYOUTS = (("fp16", CHANNELS_LAST), ("bf16", CHANNELS_LAST), ("fp32", CHANNELS_FIRST), ("fp32", ANY_STRIDES))


def configurations() -> list[Configuration]:
    """Every similarity at Stable Diffusion's size, windows and channels beyond one load, and sides of one pixel."""
    statistics = dict.fromkeys(("b", "mean", "variance", "offset", "out"), "*fp32:16") | {"rows": "*i64:16"}
    shared = statistics | {"C": "i32", "c1": "fp32", "c2": "fp32"}

    def local_config(kind: str, a: str, strides: Any, radius: int = 5, **sides: int) -> Configuration:
        types = shared | strides[0] | {"a": f"*{a}:16", "h": "i32:16", "w": "i32:16", "rate": "fp32"}
        runtime = {name: type_ for name, type_ in types.items() if name not in sides}
        constants = {"KIND": kind, "RADIUS": radius, **strides[1], **sides}
        return Configuration(_local_score, runtime, constants, 1, LOCAL_REGISTERS)

    def global_config(kind: str, a: str, strides: Any, c: int = 4, reads: bool = False) -> Configuration:
        types = shared | strides[0] | {"a": f"*{a}:16", "pixels": "i32:16"} | INPUT_TYPES | {"reading": "*fp32:16"}
        settings = {"KIND": kind, "READS": reads, **_blocks(c), **strides[1], "input_c": 1}
        return Configuration(_global_score, types, settings, num_warps=GLOBAL_WARPS)

    return [
        *(
            config(kind, *layout)
            for kind in reference.SIMILARITIES
            for layout in LAYOUTS
            for config in (local_config, global_config)
        ),
        *(local_config("ssim", a, strides, radius) for a, strides in LAYOUTS for radius in (0, 20)),
        *(global_config("ssim", a, strides, c) for a, strides in LAYOUTS for c in (1, 16)),
        *(global_config(kind, *LAYOUTS[0], reads=True) for kind in ("structure", "mse")),
        local_config("ssim", "fp32", ANY_STRIDES, h=1, w=1),
    ]
