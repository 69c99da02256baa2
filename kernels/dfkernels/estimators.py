"""Saliency maps from scores: running sums over masks, the estimators computed from them, and ridge regression.

Symbols as in `reference`: s_n(λ) is the score of mask n (a scalar score is the same at every λ), M_n(λ) in [0, 1] the
mask, p the keep probability.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dfkernels import reference
from dfkernels.reference import draw_masks, masks

#: "contrast" compares kept with dropped pixels, unrelated to SSIM's contrast term (`reference.SIMILARITIES`).
ESTIMATORS = ("sum", "coverage", "contrast")

#: Mask pixels that ridge draws at a time: drawing takes about 100 bytes per pixel.
CHUNK_PIXELS = 2**22
#: Mask pixels added at a time on a CPU, so that their nine float64 products stay in its cache.
CHUNK_SUMS = 2**15
#: X = M − p in chunks, each with the slice of masks it contains.
DesignMatrix = Iterator[tuple[slice, Float64[Tensor, "k hw"]]]


@dataclass(frozen=True)
class Sums:
    """Running sums over the masks of each row: moments[row, i, j, λ] = Σ_n M_n(λ)ⁱ s_n(λ)ʲ, float64.

    They suffice for every estimator of `estimate`, any mask kind and score. The sums of disjoint sets of masks add up.
    """

    moments: Float64[Tensor, "r 3 3 h w"]

    @classmethod
    def zeros(cls, rows: int, shape: tuple[int, int], device: torch.device | str | None = None) -> "Sums":
        return cls(torch.zeros(rows, 3, 3, *shape, dtype=torch.float64, device=device))

    @property
    def count(self) -> Float64[Tensor, " r"]:
        """The number N of masks in each row's sums."""
        return self.moments[:, 0, 0, 0, 0]


def add(
    sums: Sums,
    scores: Float[Tensor, "n h w"] | Float[Tensor, " n"],
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
) -> None:
    """Add a batch to the sums in place: moments[row_n] += Mⁱ sʲ. The masks are drawn again from their counters.

    Padding (row −1) adds nothing, whatever its score. Sums from different batches agree to float64 rounding; the same
    batches in the same order give identical bits.
    """
    h, w = sums.moments.shape[-2:]
    on_cpu = rows.device.type == "cpu"
    chunk = max(1, CHUNK_SUMS // (h * w)) if on_cpu else max(1, len(rows))
    for part in range(0, len(rows), chunk):
        at = slice(part, part + chunk)
        row, is_entry = rows[at].clamp(min=0), (rows[at] >= 0)[:, None, None]
        m = draw_masks(
            seeds[row], steps[row], indices[at], (h, w), keep_probability=keep_probability, kind=kind, grid=grid
        )
        m = torch.where(is_entry, m, 0.0).double()
        s = torch.where(is_entry, scores[at] if scores.ndim == 3 else scores[at, None, None], 0.0).double().expand_as(m)
        one = is_entry.double().expand_as(m)
        batch = torch.stack((one, m, m * m), 1)[:, :, None] * torch.stack((one, s, s * s), 1)[:, None]
        # On a GPU index_add_ uses float atomics, whose order varies from run to run; on a CPU index_put_ is slow.
        if on_cpu:
            sums.moments.index_add_(0, row, batch)
        else:
            sums.moments.index_put_((row,), batch, accumulate=True)


def accumulate(
    outputs: Float[Tensor, "n c h w"],
    references: Float[Tensor, "r c h w"],
    sums: Sums,
    seeds: Int[Tensor, " r"],
    steps: Int[Tensor, " r"],
    rows: Int[Tensor, " n"],
    indices: Int[Tensor, " n"],
    *,
    similarity: str = "structure",
    score: str = "local",
    window: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    keep_probability: float = 0.5,
    mask_kind: str = "gaussian",
    grid: int = 8,
) -> Float[Tensor, " n"]:
    """The mean score of each mask, s_i = similarity(epsilon_i, references[row_i]); NaN for padding (row −1).

    Also adds the scores to the sums in place (see `add`). Raises ValueError if a setting is out of range.
    """
    reference.check_similarity(outputs, references[0], similarity, score, window, sigma, data_range)
    row = rows.clamp(min=0)
    scores = reference.similarity_by_row(
        outputs, references, row, similarity, score, window=window, sigma=sigma, data_range=data_range
    )
    add(sums, scores, seeds, steps, rows, indices, keep_probability=keep_probability, kind=mask_kind, grid=grid)
    return torch.where(rows >= 0, scores if score == "global" else scores.mean((1, 2)), torch.nan)


def estimate(sums: Sums, estimator: str) -> tuple[Float[Tensor, "r h w"], Float[Tensor, "r h w"]]:
    """The map S(λ) of each row and its standard error, float32, from the sums over N masks.

        sum        Σ M s                              error √(N · Var[M s])                  Eq. 8, Algorithm 1
        coverage   Σ M s / Σ M                        error of the weighted mean
        contrast   Σ M s / Σ M − Σ (1−M) s / Σ (1−M)  error √(Var₁/n₁ + Var₀/n₀) for M in {0, 1}

    With fractional masks (RISE) a score counts in both means of the contrast; their covariance is subtracted. A pixel
    that no mask keeps (for contrast, also one that none drops) takes the map's mean over the other pixels. Its error is
    ∞, as is the error of any pixel with fewer than two (effective) samples. Raises ValueError for an unknown estimator.
    """
    (n, s, s2), (m, ms, ms2), (m2, m2s, m2s2) = (powers.unbind(1) for powers in sums.moments.unbind(1))
    kept = _WeightedMean(m, m2, ms, m2s, m2s2)
    if estimator == "sum":
        value, variance, samples = ms, n / (n - 1) * (m2s2 - ms**2 / n), n
    elif estimator == "coverage":
        value, variance, samples = kept.mean, kept.variance, kept.samples
    elif estimator == "contrast":
        dropped = _WeightedMean(n - m, n - 2 * m + m2, s - ms, s - 2 * ms + m2s, s2 - 2 * ms2 + m2s2)
        shared = (ms2 - m2s2) - (kept.mean + dropped.mean) * (ms - m2s) + kept.mean * dropped.mean * (m - m2)
        value = kept.mean - dropped.mean
        variance = kept.variance + dropped.variance - 2 * shared / (kept.weight * dropped.weight)
        samples = torch.minimum(kept.samples, dropped.samples)
    else:
        names = ", ".join(ESTIMATORS)
        raise ValueError(f"unknown estimator {estimator!r}: choose one of {names}, or call ridge() with the scores")

    defined = (m > 0) & (m < n) if estimator == "contrast" else m > 0
    mean = torch.where(defined, value, 0).sum((1, 2), keepdim=True) / defined.sum((1, 2), keepdim=True).clamp(min=1)
    error = torch.where(defined & (samples >= 2), variance.clamp(min=0).sqrt(), torch.inf)
    return torch.where(defined, value, mean).float(), error.float()


@dataclass(frozen=True)
class _WeightedMean:
    """The weighted mean ŝ = Σ w s / Σ w and its variance, from Σ w, Σ w², Σ w s, Σ w² s and Σ w² s².

    Var ŝ = Σ w² (s − ŝ)² / (Σ w)² · k / (k − 1), with k = (Σ w)² / Σ w² effective samples. For w in {0, 1} this is the
    unbiased sample variance divided by k.
    """

    weight: Tensor
    w2: Tensor
    ws: Tensor
    w2s: Tensor
    w2s2: Tensor

    @property
    def mean(self) -> Tensor:
        return self.ws / self.weight

    @property
    def samples(self) -> Tensor:
        return self.weight**2 / self.w2

    @property
    def variance(self) -> Tensor:
        squares = (self.w2s2 - 2 * self.mean * self.w2s + self.mean**2 * self.w2).clamp(min=0)
        return squares / self.weight**2 * self.samples / (self.samples - 1)


def ridge(
    scores: Float[Tensor, " n"],
    seed: int,
    step: int,
    shape: tuple[int, int],
    *,
    keep_probability: float = 0.5,
    kind: str = "gaussian",
    grid: int = 8,
    penalty: float = 1.0,
    first: int = 0,
) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
    """The map β and its standard error, float32: ridge regression of scores on masks first, first + 1, ….

        β = (XᵀX + κ)⁻¹ Xᵀy,   X = M − p,   y = s − s̄,   κ the penalty
        error² = σ̂² diag[(XᵀX + κ)⁻¹ XᵀX (XᵀX + κ)⁻¹],   σ̂² = ‖y − Xβ‖² / tr (I − H)²,   H = X (XᵀX + κ)⁻¹ Xᵀ

    β(λ) estimates how much keeping λ adds to the score. Solved in float64: an h·w × h·w system for N ≥ h·w scores, else
    the equivalent N × N one, whose errors are ∞: with fewer masks than pixels the penalty, not the scores, decides how
    far β is from its mean over many masks. Raises ValueError without scores or for a penalty ≤ 0.
    """
    check_ridge(scores, penalty)
    y = scores.double() - scores.double().mean()

    sample = partial(
        masks, seed, step, shape=shape, keep_probability=keep_probability, kind=kind, grid=grid, device=y.device
    )

    def design_matrix() -> DesignMatrix:
        chunk = max(1, CHUNK_PIXELS // (shape[0] * shape[1]))
        for start in range(0, len(y), chunk):
            part = slice(start, min(start + chunk, len(y)))
            # A mask of either kind has mean p at every pixel.
            yield part, sample(first + start, part.stop - start).flatten(1).double() - keep_probability

    if len(y) < shape[0] * shape[1]:
        beta = _dual(design_matrix(), y, penalty)
        error = torch.full_like(beta, torch.inf)
    else:
        beta, error = _primal(design_matrix(), y, penalty)
    return beta.unflatten(0, shape).float(), error.unflatten(0, shape).float()


def check_ridge(scores: Tensor, penalty: float) -> None:
    if not penalty > 0:
        raise ValueError(f"penalty {penalty} is not positive: give a number above 0 (1 by default)")
    if len(scores) == 0:
        raise ValueError("got no scores: ridge needs the score of at least one mask (2·h·w for a good map)")


def _primal(
    design_matrix: DesignMatrix, y: Float64[Tensor, " n"], penalty: float
) -> tuple[Float64[Tensor, " hw"], Float64[Tensor, " hw"]]:
    gram = projected = y.new_zeros(())
    for part, x in design_matrix:
        gram, projected = gram + x.T @ x, projected + x.T @ y[part]
    return solve_normal_equations(gram, projected, y, penalty)


def solve_normal_equations(
    gram: Float64[Tensor, "hw hw"], projected: Float64[Tensor, " hw"], y: Float64[Tensor, " n"], penalty: float
) -> tuple[Float64[Tensor, " hw"], Float64[Tensor, " hw"]]:
    """β and its error from XᵀX (overwritten) and Xᵀy.

    With A = (XᵀX + κ)⁻¹: β = A Xᵀy, A XᵀX A = A − κA², ‖y − Xβ‖² = yᵀy − βᵀXᵀy − κβᵀβ,
    tr (I − H)² = N − h·w + κ² tr A².
    """
    inverse = _inverse(gram, penalty)
    beta = inverse @ projected
    variance_factor = inverse.diagonal() - penalty * inverse.square().sum(1)
    residual = y @ y - beta @ projected - penalty * beta @ beta
    degrees_of_freedom = len(y) - len(beta) + penalty**2 * inverse.square().sum()
    error = (residual.clamp(min=0) / degrees_of_freedom * variance_factor.clamp(min=0)).sqrt()
    return beta, error if len(y) > 1 else torch.full_like(error, torch.inf)


def _dual(design_matrix: DesignMatrix, y: Float64[Tensor, " n"], penalty: float) -> Float64[Tensor, " hw"]:
    """β = Xᵀ (XXᵀ + κ)⁻¹ y."""
    x = torch.cat([part for _, part in design_matrix])
    return x.T @ (_inverse(x @ x.T, penalty) @ y)


def _inverse(gram: Float64[Tensor, "k k"], penalty: float) -> Float64[Tensor, "k k"]:
    """(gram + κ)⁻¹; `gram` is overwritten."""
    gram.diagonal().add_(penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(gram))
