"""Which implementation a public operation runs: Triton on a GPU, otherwise the reference."""

import contextlib
import inspect

import dfkernels
import pytest
import torch
from dfkernels import MaskDistribution, designs, dispatch, estimators, games, reference
from torch.testing import assert_close

OPERATIONS = {
    "apply_masks": designs.apply_masks,
    "draw_masks": designs.draw_masks,
    "masks": designs.masks,
    "perturb": games.perturb,
    "similarity": reference.similarity,
    "add": estimators.add,
    "accumulate": estimators.accumulate,
    "ridge": estimators.ridge,
}
LATENTS, ONE = torch.ones(1, 2, 3, 5), torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU: the kernels are interpreted."""
    monkeypatch.setattr(dispatch, "supports_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_has_a_kernel_and_the_reference_signature(
    monkeypatch: pytest.MonkeyPatch, gpu: None, name: str
) -> None:
    public, load = getattr(dfkernels, name), dispatch.load_fused
    assert public.__doc__ == OPERATIONS[name].__doc__
    assert inspect.signature(public) == inspect.signature(OPERATIONS[name])
    requested = []
    monkeypatch.setattr(dispatch, "load_fused", lambda module: requested.append(module))
    with contextlib.suppress(TypeError):  # the reference then runs and misses arguments
        public(LATENTS)
    (module,) = requested
    assert callable(getattr(load(module), name))


def test_on_a_gpu_the_kernel_runs(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    calls = []
    fused = dispatch.load_fused("apply_masks").apply_masks
    monkeypatch.setattr(
        dispatch.load_fused("apply_masks"),
        "apply_masks",
        lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs),
    )
    ours = dfkernels.apply_masks(LATENTS, ONE, ONE, ONE, indices=ONE, distribution=MaskDistribution(0.3))
    assert calls == [1]
    assert_close(ours, designs.apply_masks(LATENTS, ONE, ONE, ONE, ONE, MaskDistribution(0.3)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: dfkernels.apply_masks(LATENTS, ONE, ONE, ONE, ONE, MaskDistribution(kind="rise", grid=33)),
        lambda: dfkernels.masks(0, 0, 0, 1, (3, 5), MaskDistribution(kind="rise", grid=33), device="cpu"),
        lambda: dfkernels.similarity(LATENTS.clone().requires_grad_(), LATENTS[0]).sum().backward(),
    ],
    ids=["large grid", "large grid without tensors", "gradient"],
)
def test_the_reference_runs_what_no_kernel_supports(monkeypatch: pytest.MonkeyPatch, gpu: None, call) -> None:
    monkeypatch.setattr(dispatch, "load_fused", lambda module: pytest.fail("a kernel was requested"))
    call()


def test_no_kernel_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "load_fused", lambda module: pytest.fail("a kernel was requested"))
    dfkernels.apply_masks(LATENTS, ONE, ONE, ONE, ONE)
    dfkernels.masks(0, 0, 0, 1, (3, 5), device=torch.device("cpu"))


def test_without_triton_the_reference_runs_and_warns_once(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for function in (dispatch.load_fused, dispatch.warn_without_triton):
        function.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"triton is not installed.*pip install triton") as warnings:
        _ = dfkernels.draw_masks(ONE, ONE, ONE, (3, 5)), dfkernels.similarity(LATENTS, LATENTS)
    assert len(warnings) == 1
    for function in (dispatch.load_fused, dispatch.warn_without_triton):
        function.cache_clear()


def test_gpus_that_triton_does_not_support_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.supports_triton(torch.device("cpu"))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        dispatch.supports_triton.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert dispatch.supports_triton(torch.device("cuda", 0)) is expected
    dispatch.supports_triton.cache_clear()


@pytest.mark.gpu
def test_on_a_real_gpu_operations_equal_the_reference() -> None:
    masked = dfkernels.apply_masks(*(x.cuda() for x in (LATENTS, ONE, ONE, ONE, ONE)))
    assert_close(masked.cpu(), designs.apply_masks(LATENTS, ONE, ONE, ONE, ONE))
    drawn = dfkernels.masks(3, 1, 4, 2, (7, 13), device="cuda")
    assert torch.equal(drawn.cpu(), designs.masks(3, 1, 4, 2, (7, 13)))
