"""The batch size that fits, and the decision to compile."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from analytic import Analytic

from dfengine import Engine, Rise
from dfengine.diffusion.denoiser import Denoiser
from dfengine.events import Generated
from dfengine.explain import StepMap
from dfengine.runtime import tuning
from dfengine.runtime.tuning import COMPILE_COSTS, MIN_COMPILE_PAYOFF, ForwardCost, format_duration, maybe_compile, tune

COST = ForwardCost(elements=10, bytes=None, seconds=0.01)


def test_the_largest_tensor_limits_the_batch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # The largest tensor is twice as large as the latents: 2 · 2 · 6 · 5 elements per latent.
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.cat([x_t, x_t], 1)[:, :2]

    monkeypatch.setattr(tuning, "MAX_TENSOR_ELEMENTS", 1000)
    for keep_batch_size in (False, True):
        denoiser = Analytic(answer, batch_size=4096)
        with caplog.at_level(logging.INFO):
            cost = tune(denoiser, keep_batch_size=keep_batch_size)
        assert cost.elements == 120
        assert denoiser.batch_size == 8
        assert "batches of 8 instead of 4096: a tensor of a forward may have at most 1000 elements" in caplog.text
        assert max(denoiser.batches) <= 8


def test_memory_limits_the_batch_unless_its_size_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_bytes_per_latent", lambda denoiser, forward: 1000)
    monkeypatch.setattr(tuning, "_free_memory", lambda device: 10_000)
    monkeypatch.setattr(tuning, "synchronize", lambda device: None)
    monkeypatch.setattr(tuning, "is_on_gpu", lambda denoiser: True)
    denoiser = Analytic(lambda x_t, _: x_t, batch_size=64)
    cost = tune(denoiser)
    assert cost.bytes == 1000
    assert denoiser.batch_size == 8
    fixed = Analytic(lambda x_t, _: x_t, batch_size=64)
    tune(fixed, keep_batch_size=True)
    assert fixed.batch_size == 64
    # A given size that does not fit is halved while it is measured.
    fixed.answer = lambda x_t, _: x_t if len(x_t) <= 20 else _no_memory()
    tune(fixed, keep_batch_size=True)
    assert fixed.batch_size == 16


def _no_memory() -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Compilable(Analytic):
    """Records that it was compiled, or raises an error."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(lambda x_t, _: x_t)
        self.error = error

    def compile(self) -> None:
        self.compiled = True
        if self.error:
            raise self.error


def test_a_job_is_compiled_if_it_saves_twice_the_compile_time() -> None:
    seconds, speedup = COMPILE_COSTS["cpu"]
    break_even = MIN_COMPILE_PAYOFF * seconds / (1 - 1 / speedup) / COST.seconds
    for forwards, compiled in ((round(break_even * 0.99), False), (round(break_even * 1.01), True)):
        maybe_compile(denoiser := Compilable(), forwards, COST)
        assert denoiser.compiled is compiled
        # What is compiled is a full batch with one prompt, the shape of the job's forwards.
        assert denoiser.batches == [16] * compiled
    # With guidance this network runs a full batch per prompt.
    maybe_compile(denoiser := Compilable(), forwards, COST, targets={"guided"})
    assert denoiser.batches == [16, 16]
    maybe_compile(denoiser := Compilable(), forwards, COST, targets={"unconditional", "guided", "conditional"})
    assert denoiser.batches == [16, 16, 16]


def test_an_explicit_flag_overrides_the_estimate() -> None:
    maybe_compile(never := Compilable(), 10**9, COST, enabled=False)
    maybe_compile(always := Compilable(), 1, COST, enabled=True)
    assert (never.compiled, always.compiled) == (False, True)
    maybe_compile(always, 1, COST, enabled=True)
    assert always.batches == [16]


def test_a_missing_compiler_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    broken = Compilable(RuntimeError("no C++ compiler found\nand much more"))
    with caplog.at_level(logging.INFO):
        maybe_compile(broken, 10**9, COST)
    assert not broken.compiled
    assert caplog.messages[-1] == "continuing without compiling: no C++ compiler found"
    with pytest.raises(ValueError, match=r"could not be compiled: no C\+\+ compiler found; leave compile out"):
        maybe_compile(broken, 1, COST, enabled=True)
    with pytest.raises(ValueError, match="analytic cannot be compiled"):
        maybe_compile(Analytic(lambda x_t, _: x_t), 1, COST, enabled=True)


def check_a_compiled_network(folder: Path) -> None:
    """Full batches with one prompt run compiled, all others uncompiled, and the maps are the same."""
    engine = Engine.from_pretrained(folder, device="cpu", batch_size=6)
    jobs = [engine.job("a pink star on a black background", num_steps=2, seed=seed) for seed in range(2)]

    def maps() -> torch.Tensor:
        explainers = [Rise(10), Rise(12, target="guided")]
        events = [event for explainer in explainers for event in engine.stream(jobs, explainer)]
        return torch.stack([event.saliency for event in events if isinstance(event, StepMap)])

    plain, shapes = maps(), []
    engine.denoiser.compile()
    compiled = engine.denoiser._compiled

    def note(unet: Any, x: Any, embedding: Any, texts: Any, attend: Any, kernels: Any) -> Any:
        shapes.append((len(x), len(embedding), len(texts[0][0])))
        return compiled(unet, x, embedding, texts, attend, kernels=kernels)

    engine.denoiser._compiled = note
    torch.testing.assert_close(maps(), plain, rtol=1e-3, atol=1e-4)
    # 2 items × 2 steps × 10 masks in batches of 6; the batch that contains both items is not compiled. With guidance
    # 2 × 2 × 12 masks, three latents at a time with two prompts each.
    assert shapes == [(6, 6, 1)] * 6 + [(3, 6, 2)] * 16, shapes


@pytest.mark.slow
def test_full_batches_with_one_prompt_run_compiled(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is replaced by a stand-in."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: calls.append(options) or function)
    check_a_compiled_network(tiny_folder)
    assert [(options["dynamic"], options["fullgraph"]) for options in calls] == [(False, True)]


@pytest.mark.soak
def test_a_compiled_network_gives_the_same_maps(tiny_folder: Path) -> None:
    """In a new process, because the annotation checks that the tests add to every function cannot be compiled."""
    script = "import sys, test_tuning; test_tuning.check_a_compiled_network(sys.argv[1]); print('the same')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script, tiny_folder], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "the same\n", run.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_batch_fits_and_maps_match_those_of_a_cpu() -> None:
    """The embedded model in half precision, against float32 on the CPU."""
    caption = "a red circle above a blue square on a gray background"
    ours, exact = (Engine.from_pretrained("shapes", device=device) for device in ("cuda", "cpu"))
    assert ours.denoiser.dtype == torch.float16
    jobs = [ours.job(caption, num_steps=3, seed=seed) for seed in range(2)]
    ours_maps, exact_maps = (
        [e for e in engine.stream(jobs, Rise(600)) if isinstance(e, StepMap)] for engine in (ours, exact)
    )
    assert ours._forward_cost is not None
    assert ours._forward_cost.bytes is not None
    for one, other in zip(ours_maps, exact_maps, strict=True):
        ranks = torch.stack([one.saliency.flatten(), other.saliency.flatten()]).argsort(1).argsort(1).double()
        assert torch.corrcoef(ranks)[0, 1] > 0.97


def test_sampling_out_of_memory_continues_with_smaller_groups() -> None:
    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return x_t if len(x_t) <= 5 else _no_memory()

    engine = Engine(Analytic(answer, batch_size=16))
    engine._forward_cost = COST  # skips tuning
    jobs = [engine.job(str(number), num_steps=2) for number in range(1, 8)]
    events = list(engine.stream(jobs, Rise(3)))
    assert [event.item for event in events if isinstance(event, Generated)] == list(range(7))
    assert sum(isinstance(event, StepMap) for event in events) == 14
    # Neither seven images with their guidance pairs fit, nor three; the batch size of masks stays the same.
    assert engine.denoiser.batches[:3] == [14, 6, 2]
    one = Engine(Analytic(lambda x_t, _: _no_memory(), batch_size=16))
    one._forward_cost = COST
    with pytest.raises(torch.OutOfMemoryError):
        list(one.stream(jobs[:1], Rise(3)))
    assert len(one.denoiser.batches) == 1


def test_masks_of_a_repeated_batch_are_counted_once() -> None:
    """No mask is added twice, whether memory runs out in the network or after it."""
    forwards = [0]

    def answer(x_t: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        forwards[0] += 1
        return x_t if len(x_t) <= 16 or forwards[0] % 3 else _no_memory()

    ones = torch.ones(1, 2, 6, 5)
    rise = Rise(200, similarity=lambda a, b: a.sum((1, 2, 3)), score="global", estimator="sum")
    (exact,) = rise.explain(roomy := Analytic(lambda x_t, _: x_t, batch_size=64), [roomy.trajectory(ones)])
    (repeated,) = rise.explain(tight := Analytic(answer, batch_size=64), [tight.trajectory(ones)])
    assert tight.batch_size < 64
    torch.testing.assert_close(repeated.saliency, exact.saliency)
    torch.testing.assert_close(repeated.scores, exact.scores)


def test_completed_maps_and_given_settings_enter_the_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool | None, list[str]]] = []

    def record(
        denoiser: Denoiser, num_forwards: int, cost: ForwardCost, *, enabled: bool | None, targets: set[str]
    ) -> None:
        calls.append((num_forwards, enabled, sorted(targets)))

    monkeypatch.setattr(tuning, "maybe_compile", record)
    tuned: list[bool] = []
    monkeypatch.setattr(tuning, "tune", lambda denoiser, *, keep_batch_size: tuned.append(keep_batch_size) or COST)
    for batch_size in (None, 8):
        engine = Engine(Analytic(lambda x_t, _: x_t), batch_size=batch_size, compile=False)
        jobs = [engine.job("1", num_steps=steps) for steps in (3, 5)]
        engine.prepare(
            engine.plan(jobs, [Rise(9), Rise(4, name="other", target="guided")]), done=[(1, "rise", 0), (1, "other", 4)]
        )
        engine.prepare(engine.plan(jobs, Rise(9)))
    assert tuned == [False, True]
    both = (10 * (3 + 4) + 2 * 5 * (3 + 4), False, ["conditional", "guided"])
    assert calls == [both, (10 * 8, False, ["conditional"])] * 2


def test_tuning_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tune(Analytic(lambda x_t, _: x_t))
    assert torch.rand(1) == expected


def test_compiling_out_of_memory_halves_the_batch() -> None:
    denoiser = Compilable()
    denoiser.answer = lambda x_t, _: x_t if len(x_t) <= 5 else _no_memory()
    maybe_compile(denoiser, 1, COST, enabled=True)
    assert (denoiser.compiled, denoiser.batch_size) == (True, 4)
    assert denoiser.batches == [16, 8, 4]


def test_a_custom_denoiser_has_no_choice_of_attention() -> None:
    with pytest.raises(ValueError, match="analytic has no choice of attention"):
        Engine(Analytic(lambda x_t, _: x_t), attention="xformers")


@pytest.mark.slow
def test_thousands_of_masks_in_one_forward() -> None:
    engine = Engine(Analytic(lambda x_t, _: x_t * x_t.roll(1, 2)), batch_size=4096)
    few = Engine(Analytic(lambda x_t, _: x_t * x_t.roll(1, 2)), batch_size=50)
    (one,), (other,) = (e.explain("1", Rise(5000), num_steps=1).maps["rise"] for e in (engine, few))
    assert max(engine.denoiser.batches) == 4096
    assert engine.denoiser.batches[-2:] == [4096, 4096]
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-5, atol=1e-6)


def test_the_allocator_is_left_alone_if_configured_by_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(tuning.ctypes, "CDLL", called.append)
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    tuning.disable_malloc_trim()
    assert called == []
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    tuning.disable_malloc_trim()  # a C library without mallopt is not an error
    assert called == ["libc.so.6"]


@pytest.mark.soak
def test_freed_memory_is_kept() -> None:
    """In a separate process: large blocks come from the heap, which does not shrink."""
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
    ("seconds", "text"), [(0.04, "0.0 s"), (9.9, "9.9 s"), (30, "30 s"), (300, "5 min"), (7500, "2 h 05 min")]
)
def test_durations_as_text(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
