"""What calls leave behind: no allocation that stays, and no heap that grows while nothing more is in use."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ptkernels as ptk
from ptkernels.models import resnet18


class _Heap(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def heap() -> _Heap:
    gc.collect()
    try:
        function = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("mallinfo2() is glibc's, from 2.33 on")
    function.restype = _Heap
    found: _Heap = function()
    return found


def bytes_per_call(call: Callable[[], object], calls: int) -> float:
    for _ in range(50):
        call()
    before = heap().uordblks
    for _ in range(calls):
        call()
    return float(heap().uordblks - before) / calls


def _linear(scheme: str) -> Callable[[], object]:
    weight = ptk.quantize_weight(torch.randn(32, 64), scheme)
    x = torch.randn(3, 64, requires_grad=True)
    return lambda: ptk.quantized_linear(x, weight, activation="relu").sum().backward()


def _module(module: nn.Module, *shape: int) -> Callable[[], object]:
    x = torch.randn(shape, requires_grad=True)

    def call() -> None:
        out = module(x)
        (out[0] if isinstance(out, tuple) else out).sum().backward()

    return call


def _attention() -> Callable[[], object]:
    query = torch.randn(1, 2, 7, 16, requires_grad=True)
    return lambda: ptk.attention(query, query, query, is_causal=True, window=(3, 0)).sum().backward()


def _cache() -> Callable[[], object]:
    query, cache, length = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 8, 16), torch.tensor([5], dtype=torch.int32)
    return lambda: ptk.attention_with_kv_cache(query, cache, cache, cache_seqlens=length)


def _varlen() -> Callable[[], object]:
    query, bounds = torch.randn(9, 2, 16, requires_grad=True), torch.tensor([0, 4, 9], dtype=torch.int32)
    return lambda: ptk.attention_varlen(query, query, query, bounds, bounds, 5, 5).sum().backward()


def _rotary() -> Callable[[], object]:
    query, angles = torch.randn(1, 2, 7, 16, requires_grad=True), torch.randn(7, 8)
    return lambda: ptk.rotary_embedding(query, query, angles, angles)[0].sum().backward()


CALLS: dict[str, Callable[[], Callable[[], object]]] = {
    "attention": _attention,
    "attention_varlen": _varlen,
    "attention_with_kv_cache": _cache,
    "rotary_embedding": _rotary,
    "conv_bn_relu": lambda: _module(ptk.nn.ConvBNReLU2d(4, 6, 3), 2, 4, 5, 5),
    "conv_transpose_bn_relu": lambda: _module(ptk.nn.ConvTransposeBNReLU2d(4, 6, 3), 2, 4, 5, 5),
    "quantized_linear, int8": lambda: _linear("int8_dynamic"),
    "quantized_linear, int4": lambda: _linear("int4_weight_only"),
    "lstm": lambda: _module(ptk.nn.LSTM(4, 6), 3, 2, 4),
    "gru": lambda: _module(ptk.nn.GRU(4, 6), 3, 2, 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_leave_nothing_behind(name: str) -> None:
    """Thousands of calls are a second of a service; what one leaves is at least the 32 bytes of an allocation."""
    assert bytes_per_call(CALLS[name](), 500) < 16


def test_training_does_not_grow_the_heap() -> None:
    """Blocks of ours between tensors of the same size kept glibc before 2.38 from finding either again."""
    torch.manual_seed(0)
    model = resnet18()
    x = torch.randn(2, 3, 128, 128)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    for _ in range(20):
        step()
    before = heap().arena
    for _ in range(40):
        step()
    assert heap().arena - before < 64 << 20
