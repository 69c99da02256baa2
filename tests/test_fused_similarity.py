"""The fused similarity against the reference in float64: every similarity, window, layout and dtype."""

import pytest
import torch
from dfkernels import reference
from dfkernels.fused import similarity as fused
from fused import DEVICE, ODD_SHAPES, poisoned
from marks import soak
from tolerance import tolerance
from torch.testing import assert_close

pytestmark = pytest.mark.grid

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def images(
    n: int, c: int, h: int, w: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random b [c, h, w] and n noisy neighbours of it, of different means and scales."""
    g = torch.Generator().manual_seed(0)
    b = 0.2 + torch.randn(c, h, w, generator=g)
    a = 0.7 * b + 0.6 * torch.randn(n, c, h, w, generator=g) - 0.1
    return (scale * a).to(DEVICE, dtype), (scale * b).to(DEVICE, dtype)


def assert_equals_reference(a: torch.Tensor, b: torch.Tensor, kind: str, score: str, **settings: float) -> None:
    with poisoned():
        ours = fused.similarity(a, b, kind, score, **settings)
    assert ours.dtype == torch.float32
    expected = reference.similarity(a.double(), b.double(), kind, score, **settings)
    assert_close(ours.double(), expected, **tolerance("similarity_fused"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", reference.SIMILARITIES)
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("scale", [1.0, 0.03])  # a faint signal, where the constants matter
def test_every_similarity(kind: str, score: str, scale: float) -> None:
    assert_equals_reference(*images(1, 2, 7, 13, scale), kind, score, data_range=0.7)


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize(("h", "w"), ODD_SHAPES)
def test_odd_shapes(score: str, h: int, w: int) -> None:
    assert_equals_reference(*images(1, 1, h, w), "ssim", score, window=5)


@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("c", [1, 4, 16, 19])
def test_any_number_of_channels(score: str, c: int) -> None:
    assert_equals_reference(*images(1, c, 3, 5), "structure", score, window=3)


@pytest.mark.parametrize("score", ["global", soak("local")])
def test_a_large_image(score: str) -> None:
    assert_equals_reference(*images(1, 1, 128, 128), "luminance", score, window=1)


@pytest.mark.parametrize(
    ("window", "sigma"),
    [(1, 1.5), (3, 0.8), (7, 2.0), (9, 0.5), (17, 4.0), (19, 30.0), (101, 2.0), (2**31 - 1, 3.0)],
)
def test_any_window(window: int, sigma: float) -> None:
    assert_equals_reference(*images(1, 1, 6, 11), "ssim", "local", window=min(window, 2**12 - 1), sigma=sigma)
    if window > 2 * 11:  # the window is cut to the image, so wider ones give identical bits
        a, b = images(1, 1, 6, 11)
        widest = fused.similarity(a, b, window=window, sigma=sigma)
        assert torch.equal(widest, fused.similarity(a, b, window=21, sigma=sigma))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["structure", "cosine"])
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts(kind: str, score: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    a, b = images(2, 3, 5, 7, dtype=dtype)
    assert_equals_reference(a.contiguous(memory_format=layout), b, kind, score, window=5)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["global", soak("local")])
def test_strided_inputs(score: str) -> None:
    a, b = images(2, 4, 4, 10)
    views = {
        "channels and entries apart": (a[::2, ::2], b[::2]),
        "pixels apart": (a[..., ::2], b[..., ::2]),
        "rows apart": (a[..., 1::2, :], b[..., 1::2, :]),
        "transposed": (a.transpose(2, 3), b.transpose(1, 2)),
        "one row": (a[:, :, 2:3], b[:, 2:3]),
        "one column": (a[..., 3:4], b[..., 3:4]),
        "one entry for all": (a[:1].expand(2, -1, -1, -1), b),
    }
    for name, (x, y) in views.items():
        ours = fused.similarity(x, y, score=score, window=3)
        expected = reference.similarity(x.double(), y.double(), score=score, window=3)
        assert_close(ours.double(), expected, **tolerance("similarity_fused"), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ssim", "cosine"])
@pytest.mark.parametrize("score", reference.SCORES)
def test_one_reference_per_entry_and_independence_of_the_batch(kind: str, score: str) -> None:
    a, b = images(3, 2, 5, 7)
    of_each = torch.stack((b, b.flip(-1), 2 * b))
    assert_equals_reference(a, of_each, kind, score, window=5)
    together = fused.similarity(a, b, kind, score, window=5)
    alone = torch.cat([fused.similarity(a[i : i + 1].clone(), b, kind, score, window=5) for i in range(3)])
    assert torch.equal(alone, together)


@pytest.mark.slow
@pytest.mark.parametrize("score", reference.SCORES)
def test_an_offset_costs_structure_no_precision(score: str) -> None:
    a, b = images(1, 2, 7, 13, scale=0.02)
    # Offsets that are exact in float32 with these inputs: multiples of 2⁻¹⁵ below 2⁹.
    a, b = ((x * 2**15).round() / 2**15 for x in (a, b))
    exact = reference.similarity(a.double(), b.double(), score=score)
    shifted = fused.similarity(a + 100, b - 50, score=score)
    assert_close(shifted.double(), exact, **tolerance("similarity_offset"))


@pytest.mark.slow
def test_structure_stays_in_its_range_where_a_variance_is_lost_to_rounding() -> None:
    b = 8 * images(1, 2, 8, 35)[1]
    a = torch.where(torch.arange(35, device=b.device) < 17, 100.0, 3e-4 * b)
    assert fused.similarity(a[None], b, window=5).abs().max() <= 1 + 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("kind", reference.SIMILARITIES)
@pytest.mark.parametrize("score", reference.SCORES)
def test_identical_and_zero_inputs(kind: str, score: str) -> None:
    a = images(2, 2, 5, 7)[0]
    ours = fused.similarity(a, a, kind, score)
    assert_close(ours, torch.full_like(ours, kind != "mse"), **tolerance("similarity_fused"))
    zeros = fused.similarity(0 * a, 0 * a, kind, score)
    assert_close(zeros, torch.full_like(zeros, kind not in ("cosine", "mse")), **tolerance("similarity_fused"))


@pytest.mark.slow
@pytest.mark.parametrize("score", ["global", soak("local")])
def test_flat_regions_have_no_negative_variance(score: str) -> None:
    # Constant in places and far from the subtracted mean, so that E[a²] − E[a]² rounds to either side of zero.
    steps = torch.linspace(0.1, 0.9, 5).repeat_interleave(7)[None, None, None].repeat(1, 1, 8, 1).to(DEVICE)
    flat, b = torch.full_like(steps, 0.1), images(1, 1, 8, 35)[1]
    for a in (steps, flat):
        for x, y in ((a, b), (b[None], a[0])):
            for kind in ("structure", "contrast"):
                assert fused.similarity(x, y, kind, score, window=5).isfinite().all()


@pytest.mark.soak
@pytest.mark.parametrize("kind", reference.SIMILARITIES)
@pytest.mark.parametrize("score", reference.SCORES)
def test_nan_stays_in_its_entry(kind: str, score: str) -> None:
    a, b = images(3, 2, 5, 7)
    clean = fused.similarity(a, b, kind, score, window=3)
    a[1, 1, 2, 3] = torch.nan
    ours = fused.similarity(a, b, kind, score, window=3)
    assert torch.equal(ours[[0, 2]], clean[[0, 2]])
    assert (ours[1, 2, 3] if score == "local" else ours[1]).isnan()


@pytest.mark.parametrize("score", reference.SCORES)
def test_float64_uses_the_reference_and_empty_batches_are_empty(score: str) -> None:
    a, b = images(2, 2, 5, 7)
    for x, y in ((a.double(), b), (a, b.double())):
        assert torch.equal(fused.similarity(x, y, score=score), reference.similarity(x, y, score=score))
    assert fused.similarity(a[:0], b, score=score).shape == reference.similarity(a[:0], b, score=score).shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 10}, "window 10 is not a positive odd number"),
        ({"kind": "frechet"}, "unknown similarity 'frechet': choose one of structure, luminance"),
        ({"score": "map"}, "unknown score 'map'"),
        ({"sigma": 0.0}, "sigma 0.0 is not positive"),
        ({"data_range": -1.0}, "data_range -1.0 is not positive"),
        ({"b": torch.zeros(2, 7, 13)}, r"a \(2, 3, 7, 13\), b \(2, 7, 13\)"),
    ],
)
def test_errors_match_the_reference(change: dict, message: str) -> None:
    a, b = images(2, 3, 7, 13)
    with pytest.raises(ValueError, match=message):
        fused.similarity(**({"a": a, "b": b} | change))


# Full size -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", reference.SIMILARITIES)
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stable_diffusion_size(kind: str, score: str, layout: torch.memory_format) -> None:
    a, b = images(4096, 4, 64, 64, dtype=torch.float16)
    a = a.contiguous(memory_format=layout)
    with poisoned():
        ours = fused.similarity(a, b, kind, score)
    assert torch.equal(fused.similarity(a, b, kind, score), ours)
    for start in range(0, len(a), 256):
        expected = reference.similarity(a[start : start + 256].double(), b.double(), kind, score)
        assert_close(ours[start : start + 256].double(), expected, **tolerance("similarity_fused"))


@pytest.mark.gpu
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_two_to_the_31_elements(score: str, layout: torch.memory_format) -> None:
    c, side = 16, 128
    n = 2**31 // (c * side * side) + 3
    one, b = images(3, c, side, side, dtype=torch.float16)
    a = torch.zeros((n, c, side, side), dtype=torch.float16, device=DEVICE).contiguous(memory_format=layout)
    ends = torch.tensor([0, n // 2, n - 1], device=DEVICE)
    a[ends] = one
    ours = fused.similarity(a, b, "ssim", score)
    assert a.numel() > 2**31
    expected = reference.similarity(one.double(), b.double(), "ssim", score)
    assert_close(ours[ends].double(), expected, **tolerance("similarity_fused"))


@pytest.mark.gpu
@pytest.mark.parametrize("score", reference.SCORES)
def test_nothing_waits_for_the_device(score: str) -> None:
    a, b = images(8, 4, 16, 16, dtype=torch.float16)
    fused.similarity(a, b, score=score)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.similarity(a, b, score=score)
    finally:
        torch.cuda.set_sync_debug_mode("default")
