"""Attention backends: which one is selected, and batches larger than a kernel's grid."""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from dfengine import Engine
from dfengine.models.attention import AttentionBackend, attention_backend, split_heads

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.slow
@given(batch=st.integers(1, 9), heads=st.integers(1, 5), max_heads=st.integers(1, 12))
def test_a_kernel_is_called_on_at_most_max_heads(batch: int, heads: int, max_heads: int) -> None:
    called: list[tuple[int, ...]] = []

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """In xformers' layout, [b, tokens, heads, d]."""
        called.append(tuple(q.shape))
        return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)

    q = torch.randn(batch, heads, 3, 4)
    k, v = torch.randn(2, batch, heads, 5, 4)
    assert_close(split_heads(kernel, max_heads)(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert sum(shape[0] for shape in called) == batch
    assert all(shape[0] * heads <= max(max_heads, heads) and shape[1:] == (3, heads, 4) for shape in called)


def test_auto_is_sdpa_on_a_cpu() -> None:
    for backend in ("auto", "sdpa"):
        assert attention_backend(backend, CPU, torch.float32) == AttentionBackend("sdpa")


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [((9, 0), torch.float16, "cudnn"), ((9, 0), torch.float32, "sdpa"), ((8, 6), torch.bfloat16, "sdpa")],
)
def test_auto_is_cudnn_on_hopper_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    backend = attention_backend("auto", CUDA, dtype)
    assert backend.name == name
    # All kernels stay enabled as fallbacks, regardless of the first choice.
    assert [kernel.name for kernel in backend.priority[:1]] == ["CUDNN_ATTENTION"] * (name == "cudnn")
    with backend.activated():
        q = torch.randn(1, 2, 3, 8)
        assert_close(backend.attend(q, q, q), F.scaled_dot_product_attention(q, q, q))


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "message"),
    [
        ("flash", CPU, torch.float32, "'flash' is not known: expected one of auto, sdpa, cudnn, xformers"),
        ("cudnn", CPU, torch.float32, "'cudnn' needs a CUDA device, but the device is cpu"),
        ("xformers", CPU, torch.float32, "'xformers' needs a CUDA device, but the device is cpu"),
        ("cudnn", CUDA, torch.float32, "needs half precision, but the dtype is torch.float32"),
        ("xformers", CUDA, torch.float16, r"not installed: pip install 'dfengine\[xformers\]'"),
    ],
)
def test_unavailable_backends_are_refused(
    backend: str, device: torch.device, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ValueError, match=message):
        attention_backend(backend, device, dtype)


def test_an_engine_rejects_backends_its_device_does_not_have() -> None:
    with pytest.raises(ValueError, match="'cudnn' needs a CUDA device"):
        Engine.from_pretrained("shapes", device="cpu", attention="cudnn")
