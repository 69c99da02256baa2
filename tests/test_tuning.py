"""The batch that fits and the decision to compile, from what is measured."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from analytic import Analytic

from dfengine import Engine, Rise
from dfengine.diffusion.denoiser import Denoiser
from dfengine.events import Generated
from dfengine.explain import StepMap
from dfengine.runtime import tuning
from dfengine.runtime.tuning import COMPILING, MARGIN, ForwardCost, duration, maybe_compile, tune

PACE = ForwardCost(elements=10, bytes=None, seconds=0.01)


def test_batches_stay_below_the_largest_tensor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The largest tensor is the answer's, twice the latent's: 2 · 2 · 6 · 5 elements a latent.
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_t, x_t], 1)[:, :2]

    monkeypatch.setattr(tuning, "MOST_ELEMENTS", 1000)
    for is_given in (False, True):
        denoiser = Analytic(answer, batch_size=4096)
        with caplog.at_level(logging.INFO):
            pace = tune(denoiser, is_given=is_given)
        assert pace.elements == 120
        assert denoiser.batch_size == 8
        assert "batches of 8 instead of 4096: no tensor of a forward may have more than 1000 elements" in caplog.text
        assert max(denoiser.batches) <= 8


def test_memory_bounds_a_batch_that_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_bytes_a_latent", lambda denoiser, forward: 1000)
    monkeypatch.setattr(tuning, "_free_memory", lambda device: 10_000)
    monkeypatch.setattr(tuning, "synchronize", lambda device: None)
    monkeypatch.setattr(tuning, "on_gpu", lambda denoiser: True)
    denoiser = Analytic(lambda x_t, _: x_t, batch_size=64)
    pace = tune(denoiser)
    assert pace.bytes == 1000
    assert denoiser.batch_size == 8
    given = Analytic(lambda x_t, _: x_t, batch_size=64)
    tune(given, is_given=True)
    assert given.batch_size == 64
    # What does not fit in spite of it is halved while it is measured.
    given.answer = lambda x_t, _: x_t if len(x_t) <= 20 else _no_memory()
    tune(given, is_given=True)
    assert given.batch_size == 16


def _no_memory() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Compilable(Analytic):
    """Notes that it was compiled, or fails to be."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(lambda x_t, _: x_t)
        self.error = error

    def compile(self) -> None:
        self.compiled = True
        if self.error:
            raise self.error


def test_a_job_is_compiled_if_that_repays_itself_twice() -> None:
    cost, speedup = COMPILING["cpu"]
    enough = MARGIN * cost / (1 - 1 / speedup) / PACE.seconds
    for forwards, compiled in ((round(enough * 0.99), False), (round(enough * 1.01), True)):
        maybe_compile(denoiser := Compilable(), forwards, PACE)
        assert denoiser.compiled is compiled
        # A whole batch of one prompt, the shape that the job will have, is what is compiled.
        assert denoiser.batches == [16] * compiled
    # Under two prompts, this network's batches are whole ones of each.
    maybe_compile(denoiser := Compilable(), forwards, PACE, targets={"guided"})
    assert denoiser.batches == [16, 16]
    maybe_compile(denoiser := Compilable(), forwards, PACE, targets={"unconditional", "guided", "conditional"})
    assert denoiser.batches == [16, 16, 16]


def test_either_flag_decides_alone() -> None:
    maybe_compile(never := Compilable(), 10**9, PACE, wanted=False)
    maybe_compile(always := Compilable(), 1, PACE, wanted=True)
    assert (never.compiled, always.compiled) == (False, True)
    maybe_compile(always, 1, PACE, wanted=True)
    assert always.batches == [16]


def test_a_compiler_that_is_missing_is_told(caplog: pytest.LogCaptureFixture) -> None:
    broken = Compilable(RuntimeError("no C++ compiler found\nand much more"))
    with caplog.at_level(logging.INFO):
        maybe_compile(broken, 10**9, PACE)
    assert not broken.compiled
    assert caplog.messages[-1] == "going on without compiling: no C++ compiler found"
    with pytest.raises(ValueError, match=r"could not be compiled: no C\+\+ compiler found; leave compile out"):
        maybe_compile(broken, 1, PACE, wanted=True)
    with pytest.raises(ValueError, match="analytic cannot be compiled"):
        maybe_compile(Analytic(lambda x_t, _: x_t), 1, PACE, wanted=True)


#: In a process of its own: the checks of annotations, which the tests add to every function, cannot be compiled.
COMPILED = """
import sys, torch
from dfengine import Engine, Rise, StepMap

engine = Engine.from_pretrained(sys.argv[1], device="cpu", batch_size=6)
jobs = [engine.job("a pink star on a black background", num_steps=2, seed=seed) for seed in range(2)]

def maps():
    return torch.stack([
        event.saliency
        for explainer in (Rise(10), Rise(12, target="guided"))
        for event in engine.stream(jobs, explainer)
        if isinstance(event, StepMap)
    ])

plain, shapes = maps(), []
engine.denoiser.compile()
compiled = engine.denoiser._compiled

def note(unet, x, embedding, texts, attend, kernels):
    shapes.append((len(x), len(embedding), len(texts[0][0])))
    return compiled(unet, x, embedding, texts, attend, kernels=kernels)

engine.denoiser._compiled = note
torch.testing.assert_close(maps(), plain, rtol=1e-3, atol=1e-4)
# 2 items × 2 steps × 10 masks in batches of 6; the one that two items share is not compiled. With guidance 2 × 2 × 12,
# three latents at a time under two prompts.
assert shapes == [(6, 6, 1)] * 6 + [(3, 6, 2)] * 16, shapes
print("the same")
"""


@pytest.mark.slow
def test_a_compiled_network_is_the_same_one(tiny_folder: Path) -> None:
    """Compiled for whole batches of one prompt; whatever else comes runs as it is."""
    run = subprocess.run([sys.executable, "-c", COMPILED, tiny_folder], capture_output=True, text=True)
    assert run.stdout == "the same\n", run.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_batch_that_is_found_fits_and_maps_are_those_of_a_cpu() -> None:
    """The embedded model in half precision: pinned downloads, fused kernels, a probed batch, against float32 here."""
    caption = "a red circle above a blue square on a gray background"
    ours, exact = (Engine.from_pretrained("shapes", device=device) for device in ("cuda", "cpu"))
    assert ours.denoiser.dtype == torch.float16
    jobs = [ours.job(caption, num_steps=3, seed=seed) for seed in range(2)]
    found, wanted = ([e for e in engine.stream(jobs, Rise(600)) if isinstance(e, StepMap)] for engine in (ours, exact))
    assert ours._pace is not None
    assert ours._pace.bytes is not None
    for one, other in zip(found, wanted, strict=True):
        ranks = torch.stack([one.saliency.flatten(), other.saliency.flatten()]).argsort(1).argsort(1).double()
        assert torch.corrcoef(ranks)[0, 1] > 0.97


def test_generating_out_of_memory_goes_on_with_smaller_groups() -> None:
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return x_t if len(x_t) <= 5 else _no_memory()

    engine = Engine(Analytic(answer, batch_size=16))
    engine._pace = PACE  # as if all had fitted
    jobs = [engine.job(str(number), num_steps=2) for number in range(1, 8)]
    events = list(engine.stream(jobs, Rise(3)))
    assert [event.item for event in events if isinstance(event, Generated)] == list(range(7))
    assert sum(isinstance(event, StepMap) for event in events) == 14
    # Seven images with their guidance pairs do not fit, nor do three; that says nothing of a batch of masks.
    assert engine.denoiser.batches[:3] == [14, 6, 2]
    one = Engine(Analytic(lambda x_t, _: _no_memory(), batch_size=16))
    one._pace = PACE
    with pytest.raises(torch.OutOfMemoryError):
        list(one.stream(jobs[:1], Rise(3)))
    assert len(one.denoiser.batches) == 1


def test_masks_of_a_batch_that_is_done_again_are_counted_once() -> None:
    """Whenever memory runs out, in the network or after it, no mask is summed twice."""
    forwards = [0]

    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        forwards[0] += 1
        return x_t if len(x_t) <= 16 or forwards[0] % 3 else _no_memory()

    ones = torch.ones(1, 2, 6, 5)
    rise = Rise(200, similarity=lambda a, b: a.sum((1, 2, 3)), score="global", estimator="sum")
    (exact,) = rise.explain(calm := Analytic(lambda x_t, _: x_t, batch_size=64), [calm.trajectory(ones)])
    (found,) = rise.explain(tight := Analytic(answer, batch_size=64), [tight.trajectory(ones)])
    assert tight.batch_size < 64
    torch.testing.assert_close(found.saliency, exact.saliency)
    torch.testing.assert_close(found.scores, exact.scores)


def test_what_is_done_or_given_counts_in_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, bool | None, list[str]]] = []

    def decide(
        denoiser: Denoiser, num_forwards: int, pace: ForwardCost, *, wanted: bool | None, targets: set[str]
    ) -> None:
        told.append((num_forwards, wanted, sorted(targets)))

    monkeypatch.setattr(tuning, "decide", decide)
    tuned: list[bool] = []
    monkeypatch.setattr(tuning, "tune", lambda denoiser, *, is_given: tuned.append(is_given) or PACE)
    for batch_size in (None, 8):
        engine = Engine(Analytic(lambda x_t, _: x_t), batch_size=batch_size, compile=False)
        jobs = [engine.job("1", num_steps=steps) for steps in (3, 5)]
        engine.prepare(jobs, [Rise(9), Rise(4, name="other", target="guided")], done=[(1, "rise", 0), (1, "other", 4)])
        engine.prepare(jobs, [Rise(9)])
    assert tuned == [False, True]
    both = (10 * (3 + 4) + 2 * 5 * (3 + 4), False, ["conditional", "guided"])
    assert told == [both, (10 * 8, False, ["conditional"])] * 2


def test_a_callers_random_numbers_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(Analytic(lambda x_t, _: x_t))
    assert torch.rand(1) == expected


def test_compiling_out_of_memory_halves_the_batch() -> None:
    denoiser = Compilable()
    denoiser.answer = lambda x_t, _: x_t if len(x_t) <= 5 else _no_memory()
    maybe_compile(denoiser, 1, PACE, wanted=True)
    assert (denoiser.compiled, denoiser.batch_size) == (True, 4)
    assert denoiser.batches == [16, 8, 4]


def test_a_denoiser_of_ones_own_has_no_choice_of_attention() -> None:
    with pytest.raises(ValueError, match="analytic has no choice of attention"):
        Engine(Analytic(lambda x_t, _: x_t), attention="xformers")


def test_thousands_of_masks_in_one_forward() -> None:
    engine = Engine(Analytic(lambda x_t, _: x_t * x_t.roll(1, 2)), batch_size=4096)
    few = Engine(Analytic(lambda x_t, _: x_t * x_t.roll(1, 2)), batch_size=50)
    (one,), (other,) = (e.explain("1", Rise(5000), num_steps=1).maps["rise"] for e in (engine, few))
    assert max(engine.denoiser.batches) == 4096
    assert engine.denoiser.batches[-2:] == [4096, 4096]
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-5, atol=1e-6)


def test_the_allocator_is_left_alone_where_someone_has_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(tuning.ctypes, "CDLL", called.append)
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    tuning.disable_malloc_trim()
    assert called == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    tuning.disable_malloc_trim()  # a library without mallopt is no error
    assert called == ["libc.so.6"]


def test_a_freed_block_is_kept() -> None:
    """In a process of its own: large blocks come from the heap, which does not shrink."""
    script = """
import torch
from dfengine.runtime import tuning
tuning.disable_malloc_trim()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
block = torch.ones(2**26)
held = resident()
del block
print(held - resident() < 2**20)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean)
    assert run.stdout == "True\n", run.stderr


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (30, "30 s"), (300, "5 min"), (9000, "2.5 h")]
)
def test_durations_are_said_as_a_person_would(seconds: float, said: str) -> None:
    assert duration(seconds) == said
