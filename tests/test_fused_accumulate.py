"""The fused sums against the estimators' own: rows in any order, any split, padding, both masks; and their plan."""

from itertools import chain, pairwise
from unittest.mock import patch

import dfkernels
import pytest
import torch
from dfkernels import MaskDistribution, estimators, reference
from dfkernels.fused import accumulate as fused
from dfkernels.fused.similarity import prepare
from distributions import MOST, NAMES, distribution
from fused import DEVICE, poisoned
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import soak
from tolerance import tolerance
from torch.testing import assert_close

pytestmark = pytest.mark.grid

#: The interpreter is slow.
PROPERTY = settings(max_examples=max(1, settings.default.max_examples // 5))

# Four rows, one with no entry, one with several segments; padding between and at the end.
SEEDS, STEPS = torch.tensor([4, -9, 0, 7], device=DEVICE), torch.tensor([0, 2**32 - 1, 6, 6], device=DEVICE)
ROWS = torch.tensor([2, 0, -1, 0, 3, 3, 0, 0, 0, 0, -1, 2], device=DEVICE)
INDICES = torch.tensor([9, 0, 2, 1, 0, 2**32 - 1, 2, 3, 4, 5, 0, 1], device=DEVICE)
COUNTERS = (SEEDS, STEPS, ROWS, INDICES)


def random_outputs(c: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """f(R⊙M) of every entry, NaN for padding, and f(R) of every row."""
    g = torch.Generator().manual_seed(0)
    references = torch.randn(4, c, h, w, generator=g)
    outputs = 0.6 * references[ROWS.cpu()] + 0.5 * torch.randn(len(ROWS), c, h, w, generator=g)
    outputs[ROWS.cpu() < 0] = torch.nan
    return outputs.to(DEVICE, dtype), references.to(DEVICE, dtype)


def random_scores(score: str, h: int, w: int) -> torch.Tensor:
    scores = torch.rand((len(ROWS), h, w)[: 3 if score == "local" else 1], generator=torch.Generator().manual_seed(0))
    scores[ROWS.cpu() < 0] = torch.nan
    return (2 * scores - 1).to(DEVICE)


def random_sums(h: int, w: int) -> estimators.Sums:
    """Sums that are not empty, to show that what they contain is kept."""
    moments = torch.rand(4, 3, 3, h, w, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return estimators.Sums(moments.to(DEVICE))


def per_mask(sums: estimators.Sums) -> torch.Tensor:
    """Sums divided by the number of masks, the scale that the tolerance refers to."""
    return sums.moments / sums.count.clamp(min=1)[:, None, None, None, None]


# Against the estimators ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize(
    ("similarity", "kind"),
    [
        ("structure", "gaussian"),
        ("ssim", "rise"),
        *(soak(s, "gaussian") for s in reference.SIMILARITIES if s != "structure"),
        soak("mse", "pyramid"),
        soak("structure", "rise"),
        *(soak("structure", kind) for kind in ("cells", "orthogonal", "pyramid")),
    ],
)
def test_accumulate_equals_the_estimators(score: str, similarity: str, kind: str) -> None:
    outputs, references = random_outputs(2, 5, 3)
    options = {
        "similarity": similarity,
        "score": score,
        "window": 3,
        "sigma": 1.1,
        "data_range": 2.0,
    }
    ours, theirs = random_sums(5, 3), random_sums(5, 3)
    with poisoned():
        means = fused.accumulate(outputs, references, ours, *COUNTERS, distribution(kind, 0.4, 3), **options)
    expected = estimators.accumulate(outputs, references, theirs, *COUNTERS, distribution(kind, 0.4, 3), **options)
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("accumulate_fused"))
    assert means.dtype == torch.float32
    assert_close(means, expected, **tolerance("similarity_fused"), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize(
    ("similarity", "dtype", "layout"),
    [
        ("structure", torch.float16, torch.channels_last),
        soak("mse", torch.float32, torch.contiguous_format),
        soak("cosine", torch.float16, torch.channels_last),
        soak("ssim", torch.bfloat16, torch.contiguous_format),
    ],
)
def test_a_reading_is_taken_in_the_same_pass(
    score: str, similarity: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    outputs, references = random_outputs(2, 5, 3, dtype)
    inputs = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)
    reading = torch.tensor([[-0.4, 1.3], [1.0, 0.0], [0.7, 0.0], [-1.5, 2.0]], device=DEVICE)
    given = {"similarity": similarity, "score": score, "reading": reading}
    ours, theirs = random_sums(5, 3), random_sums(5, 3)
    with poisoned():
        means = fused.accumulate(
            outputs.contiguous(memory_format=layout), references, ours, *COUNTERS, **given,
            inputs=inputs.contiguous(memory_format=torch.channels_last),
        )  # fmt: skip
    expected = estimators.accumulate(outputs, references, theirs, *COUNTERS, **given, inputs=inputs)
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("accumulate_fused"))
    assert_close(means, expected, **tolerance("similarity_fused"), equal_nan=True)


@pytest.mark.slow
def test_randomisations_are_kept_apart() -> None:
    law = MaskDistribution(cells=(2, 1), design="orthogonal", block=2)
    scores, indices = random_scores("local", 5, 3), torch.arange(len(ROWS), device=DEVICE)
    ours, theirs = (estimators.Sums.zeros(4, (5, 3), DEVICE, randomisations=3) for _ in range(2))
    with poisoned():
        fused.add(ours, scores, SEEDS, STEPS, ROWS, indices, law)
    estimators.add(theirs, scores, SEEDS, STEPS, ROWS, indices, law)
    assert_close(ours.moments, theirs.moments, **tolerance("add"))
    assert torch.count_nonzero(theirs.moments[:, 0, 0, 0, 0]) > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("score", reference.SCORES)
@pytest.mark.parametrize(("h", "w"), [(7, 5), (1, 1), (5, 34)])
def test_add_equals_the_estimators(kind: str, score: str, h: int, w: int) -> None:
    scores, ours, theirs = random_scores(score, h, w), random_sums(h, w), random_sums(h, w)
    with poisoned():
        fused.add(ours, scores, *COUNTERS, distribution(kind, 0.4, 3))
    estimators.add(theirs, scores, *COUNTERS, distribution(kind, 0.4, 3))
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("add_rise_fused" if kind == "rise" else "add"))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("dtype", "layout", "c", "h", "w"),
    [
        (torch.float32, torch.contiguous_format, 1, 5, 3),
        (torch.float32, torch.channels_last, 4, 3, 2),
        (torch.float16, torch.channels_last, 2, 1, 34),
        (torch.float16, torch.contiguous_format, 2, 3, 2),
        (torch.bfloat16, torch.channels_last, 16, 1, 3),
    ],
)
def test_dtypes_layouts_and_channels(dtype: torch.dtype, layout: torch.memory_format, c: int, h: int, w: int) -> None:
    outputs, references = random_outputs(c, h, w, dtype)
    ours, theirs = random_sums(h, w), random_sums(h, w)
    with poisoned():
        fused.accumulate(outputs.contiguous(memory_format=layout), references, ours, *COUNTERS)
    estimators.accumulate(outputs, references, theirs, *COUNTERS)
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("accumulate_fused"))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("score", reference.SCORES)
def test_scores_of_any_dtype(dtype: torch.dtype, score: str) -> None:
    scores, ours, theirs = random_scores(score, 5, 3).to(dtype), random_sums(5, 3), random_sums(5, 3)
    fused.add(ours, scores, *COUNTERS)
    estimators.add(theirs, scores, *COUNTERS)
    assert_close(ours.moments, theirs.moments, **tolerance("add"))


@pytest.mark.slow
@pytest.mark.parametrize("score", ["global", soak("local")])
def test_prepared_references_give_identical_bits(score: str) -> None:
    outputs, references = random_outputs(2, 5, 3)
    once, each = random_sums(5, 3), random_sums(5, 3)
    prepared = prepare(references, "ssim", score, window=3)
    means = fused.accumulate(outputs, prepared, once, *COUNTERS, similarity="ssim", score=score, window=3)
    again = fused.accumulate(outputs, references, each, *COUNTERS, similarity="ssim", score=score, window=3)
    assert torch.equal(once.moments, each.moments)
    assert torch.equal(means.nan_to_num(), again.nan_to_num())
    with pytest.raises(ValueError, match=r"prepared for \('ssim', .*, expected \('structure'.*: prepare them"):
        fused.accumulate(outputs, prepared, once, *COUNTERS, score=score, window=3)


@pytest.mark.parametrize("score", reference.SCORES)
def test_more_rows_than_entries(score: str) -> None:
    outputs, references = random_outputs(2, 3, 5)
    batch = torch.tensor([2, 3, 5], device=DEVICE)  # padding, row 0, row 3
    place = (SEEDS, STEPS, ROWS[batch], INDICES[batch])
    ours, theirs = random_sums(3, 5), random_sums(3, 5)
    means = fused.accumulate(outputs[batch], references, ours, *place, score=score, window=3)
    expected = estimators.accumulate(outputs[batch], references, theirs, *place, score=score, window=3)
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("accumulate_fused"))
    assert_close(means, expected, **tolerance("similarity_fused"), equal_nan=True)


# Order, splits and padding -------------------------------------------------------------------------------------------


@pytest.mark.soak
@PROPERTY
@given(
    st.permutations(range(len(ROWS))),
    st.sets(st.integers(1, len(ROWS) - 1)),
    st.sampled_from(NAMES),
    st.sampled_from(reference.SCORES),
)
def test_any_split_in_any_order_gives_the_same_sums(order: list[int], cuts: set[int], kind: str, score: str) -> None:
    outputs, references = random_outputs(2, 5, 3)
    # test_fused_similarity covers the other local scores; a local cosine is quick to interpret.
    options = {"similarity": "cosine" if score == "local" else "ssim", "score": score}
    complete, parts = random_sums(5, 3), random_sums(5, 3)
    law = distribution(kind, 0.4, 3)
    means = fused.accumulate(outputs, references, complete, *COUNTERS, law, **options)
    for start, stop in pairwise([0, *sorted(cuts), len(ROWS)]):
        batch = torch.tensor(order[start:stop], device=DEVICE)
        place = (SEEDS, STEPS, ROWS[batch], INDICES[batch])
        part = fused.accumulate(outputs[batch], references, parts, *place, law, **options)
        # A mask's score has identical bits in any batch; sums agree to float64 rounding.
        assert torch.equal(part.nan_to_num(), means[batch].nan_to_num())
    assert_close(parts.moments, complete.moments, **tolerance("add"))


@pytest.mark.slow
@pytest.mark.parametrize("score", ["global", soak("local")])
def test_padding_adds_nothing_and_repeats_give_identical_bits(score: str) -> None:
    outputs, references = random_outputs(1, 5, 3)
    real = ROWS >= 0
    alone, padded, again = random_sums(5, 3), random_sums(5, 3), random_sums(5, 3)
    means = fused.accumulate(
        outputs[real], references, alone, SEEDS, STEPS, ROWS[real], INDICES[real], score=score, window=3
    )
    with_padding = fused.accumulate(outputs, references, padded, *COUNTERS, score=score, window=3)
    fused.accumulate(outputs, references, again, *COUNTERS, score=score, window=3)
    assert torch.equal(alone.moments, padded.moments)
    assert torch.equal(again.moments, padded.moments)
    assert torch.equal(with_padding[real], means)
    assert with_padding[~real].isnan().all()


@pytest.mark.slow
def test_only_padding_and_no_entries_change_nothing() -> None:
    outputs, references = random_outputs(1, 5, 3)
    untouched, sums = random_sums(5, 3), random_sums(5, 3)
    for score in reference.SCORES:
        means = fused.accumulate(outputs, references, sums, SEEDS, STEPS, 0 * ROWS - 1, INDICES, score=score)
        assert means.isnan().all()
        nothing = fused.accumulate(outputs[:0], references, sums, SEEDS, STEPS, ROWS[:0], INDICES[:0], score=score)
        assert nothing.shape == (0,)
    assert torch.equal(sums.moments, untouched.moments)


@pytest.mark.slow
@pytest.mark.parametrize("score", reference.SCORES)
def test_nan_scores_stay_in_their_row(score: str) -> None:
    scores, sums = random_scores(score, 5, 3), estimators.Sums.zeros(4, (5, 3), DEVICE)
    scores[3] = torch.nan  # of row 0
    fused.add(sums, scores, *COUNTERS)
    assert sums.moments[1:].isfinite().all()
    assert sums.moments[0, 0, 1].isnan().all()
    assert sums.count.tolist() == [6, 0, 2, 2]


@pytest.mark.soak
def test_non_contiguous_sums_and_strided_or_int32_vectors() -> None:
    scores, theirs = random_scores("local", 5, 3), random_sums(5, 3)
    estimators.add(theirs, scores, *COUNTERS)
    inside = torch.zeros(8, 3, 3, 3, 5, dtype=torch.float64, device=DEVICE)[::2].transpose(3, 4)
    inside.copy_(random_sums(5, 3).moments)
    seeds, steps, rows, indices = (torch.stack((vector, vector + 1), 1)[:, 0] for vector in COUNTERS)
    transposed = scores.transpose(1, 2).contiguous().transpose(1, 2)
    fused.add(estimators.Sums(inside), transposed, seeds, steps, rows.int(), indices)
    assert_close(inside, theirs.moments, **tolerance("add"))
    outputs, references = random_outputs(1, 5, 3)
    wide, narrow = random_sums(5, 3), random_sums(5, 3)
    for sums, place in ((wide, ROWS), (narrow, ROWS.int())):
        fused.accumulate(outputs, references, sums, SEEDS, STEPS, place, INDICES, similarity="cosine")
    assert torch.equal(wide.moments, narrow.moments)


@pytest.mark.slow
def test_long_segments_give_the_same_sums() -> None:
    scores, theirs = random_scores("local", 5, 3), random_sums(5, 3)
    estimators.add(theirs, scores, *COUNTERS)
    for programs in (1, 4):
        ours = random_sums(5, 3)
        with patch.object(fused, "PROGRAMS", programs):
            fused.add(ours, scores, *COUNTERS)
        assert_close(ours.moments, theirs.moments, **tolerance("add"))


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_plan_cuts_each_row_into_short_segments_in_order(rows: list[int], length: int) -> None:
    plan = fused._plan(torch.tensor(rows), 6, length)
    order, bounds = plan.order.tolist(), plan.bounds.tolist()
    segments = [order[begin:end] for begin, end in pairwise(bounds)]
    assert sorted(chain(*segments)) == [n for n, row in enumerate(rows) if row >= 0]
    for segment in segments:
        assert len(segment) <= length
        assert len({rows[n] for n in segment}) <= 1
    for row in range(6):
        mine = [n for n, other in enumerate(rows) if other == row]
        begin, end = plan.segment_of_row[row].item(), plan.segment_of_row[row + 1].item()
        assert list(chain(*segments[begin:end])) == mine
        assert plan.first[row + 1] - plan.first[row] == len(mine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": "frechet"}, "unknown similarity 'frechet'"),
        ({"score": "map"}, "unknown score 'map'"),
        ({"window": 4}, "window 4 is not a positive odd number"),
    ],
)
def test_errors_match_the_estimators(change: dict, message: str) -> None:
    outputs, references = random_outputs(1, 5, 3)
    for accumulate in (fused.accumulate, estimators.accumulate):
        sums = random_sums(5, 3)
        with pytest.raises(ValueError, match=message):
            accumulate(outputs, references, sums, *COUNTERS, **change)
        assert torch.equal(sums.moments, random_sums(5, 3).moments)


# Full size -----------------------------------------------------------------------------------------------------------


def full_size(score: str) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    g = torch.Generator(DEVICE).manual_seed(0)
    references = torch.randn(4, 4, 64, 64, generator=g, device=DEVICE)
    rows = torch.arange(4096, device=DEVICE) * 4 // 4000  # the last are padding
    rows = torch.where(rows < 4, rows, -1)
    outputs = 0.6 * references[rows] + 0.5 * torch.randn(4096, 4, 64, 64, generator=g, device=DEVICE)
    outputs[rows < 0] = torch.nan
    outputs = outputs.half().contiguous(memory_format=torch.channels_last)
    return outputs, references, (SEEDS, STEPS, rows, torch.arange(4096, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("score", reference.SCORES)
def test_stable_diffusion_size(kind: str, score: str) -> None:
    outputs, references, counters = full_size(score)
    ours, again, theirs = (estimators.Sums.zeros(4, (64, 64), DEVICE) for _ in range(3))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with poisoned():
        means = dfkernels.accumulate(outputs, references, ours, *counters, distribution(kind), score=score)
    used = torch.cuda.max_memory_allocated() - before
    assert used < 4 * len(outputs) * 64 * 64, "as much memory as a float32 map per mask"
    same = dfkernels.accumulate(outputs, references, again, *counters, distribution(kind), score=score)
    assert torch.equal(ours.moments, again.moments)
    assert torch.equal(means.nan_to_num(), same.nan_to_num())
    for start in range(0, 4096, 256):
        part = slice(start, start + 256)
        place = (*counters[:2], counters[2][part], counters[3][part])
        expected = estimators.accumulate(
            outputs[part].float(), references, theirs, *place, distribution(kind), score=score
        )
        assert_close(means[part], expected, **tolerance("similarity_fused"), equal_nan=True)
    assert_close(per_mask(ours), per_mask(theirs), **tolerance("accumulate_fused"))


@pytest.mark.gpu
@pytest.mark.parametrize("score", reference.SCORES)
def test_nothing_waits_for_the_device(score: str) -> None:
    outputs, references = random_outputs(2, 16, 16, torch.float16)
    sums = random_sums(16, 16)
    fused.accumulate(outputs, references, sums, *COUNTERS, score=score)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.accumulate(outputs, references, sums, *COUNTERS, score=score)
    finally:
        torch.cuda.set_sync_debug_mode("default")
