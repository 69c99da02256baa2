"""Which implementation a public operation runs: Triton on a GPU, the reference elsewhere and where no kernel serves."""

import contextlib
import inspect

import dfkernels
import pytest
import torch
from dfkernels import dispatch, estimators, games, reference
from torch.testing import assert_close

OPERATIONS = {
    "blend": reference.blend,
    "draw": reference.draw,
    "masks": reference.masks,
    "erase": games.erase,
    "similarity": reference.similarity,
    "add": estimators.add,
    "accumulate": estimators.accumulate,
    "ridge": estimators.ridge,
}
LATENTS, ONE = torch.ones(1, 2, 3, 5), torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were a GPU: the kernels are interpreted."""
    monkeypatch.setattr(dispatch, "serves", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_has_a_kernel_and_the_references_face(
    monkeypatch: pytest.MonkeyPatch, gpu: None, name: str
) -> None:
    public, load = getattr(dfkernels, name), dispatch.load
    assert public.__doc__ == OPERATIONS[name].__doc__
    assert inspect.signature(public) == inspect.signature(OPERATIONS[name])
    asked = []
    monkeypatch.setattr(dispatch, "load", lambda module: asked.append(module))
    with contextlib.suppress(TypeError):  # the reference, which is left to run, is given too little
        public(LATENTS)
    (module,) = asked
    assert callable(getattr(load(module), name))


def test_on_a_gpu_the_kernel_runs(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    ran = []
    fused = dispatch.load("blend").blend
    monkeypatch.setattr(
        dispatch.load("blend"), "blend", lambda *args, **kwargs: ran.append(1) or fused(*args, **kwargs)
    )
    ours = dfkernels.blend(LATENTS, ONE, ONE, ONE, indices=ONE, keep_probability=0.3)
    assert ran == [1]
    assert_close(ours, reference.blend(LATENTS, ONE, ONE, ONE, ONE, keep_probability=0.3))


@pytest.mark.parametrize(
    "call",
    [
        lambda: dfkernels.blend(LATENTS, ONE, ONE, ONE, ONE, kind="rise", grid=33),
        lambda: dfkernels.masks(0, 0, 0, 1, (3, 5), kind="rise", grid=33, device="cpu"),
        lambda: dfkernels.similarity(LATENTS.clone().requires_grad_(), LATENTS[0]).sum().backward(),
    ],
    ids=["large grid", "large grid without tensors", "gradient"],
)
def test_what_no_kernel_serves_is_the_references(monkeypatch: pytest.MonkeyPatch, gpu: None, call) -> None:
    monkeypatch.setattr(dispatch, "load", lambda module: pytest.fail("a kernel was asked for"))
    call()


def test_no_kernel_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "load", lambda module: pytest.fail("a kernel was asked for"))
    dfkernels.blend(LATENTS, ONE, ONE, ONE, ONE)
    dfkernels.masks(0, 0, 0, 1, (3, 5), device=torch.device("cpu"))


def test_without_triton_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for function in (dispatch.load, dispatch.warn_once):
        function.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"triton is not installed.*pip install triton") as warnings:
        _ = dfkernels.draw(ONE, ONE, ONE, (3, 5)), dfkernels.similarity(LATENTS, LATENTS)
    assert len(warnings) == 1
    for function in (dispatch.load, dispatch.warn_once):
        function.cache_clear()


def test_gpus_that_triton_does_not_support_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.serves(torch.device("cpu"))
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        dispatch.serves.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert dispatch.serves(torch.device("cuda", 0)) is expected
    dispatch.serves.cache_clear()


@pytest.mark.gpu
def test_on_a_real_gpu_every_operation_is_the_references() -> None:
    masked = dfkernels.blend(*(x.cuda() for x in (LATENTS, ONE, ONE, ONE, ONE)))
    assert_close(masked.cpu(), reference.blend(LATENTS, ONE, ONE, ONE, ONE))
    drawn = dfkernels.masks(3, 1, 4, 2, (7, 13), device="cuda")
    assert torch.equal(drawn.cpu(), reference.masks(3, 1, 4, 2, (7, 13)))
