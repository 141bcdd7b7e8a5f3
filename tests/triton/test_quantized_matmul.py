"""Quantized linear layers' Triton kernels: every code, every way to scale, forward and gradient of the input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import assert_close
from torch import Tensor

from ptkernels.ops.quantized_matmul import triton as kernels

BOOK = torch.linspace(-1, 1, 16) ** 3


def make_weight(code: str, n: int, k: int, group: int, zeros: bool) -> tuple[kernels.Weight, Tensor]:
    """A stored weight and what it stands for, in float64."""
    generator = torch.Generator().manual_seed(n * k + group)
    groups = 1 if group == -1 else math.ceil(k / group)
    scales = torch.rand(n, groups, generator=generator) * 0.1 + 0.01
    offsets = torch.randint(-3, 4, (n, groups), generator=generator).float() if zeros else None
    if code == "s8":
        codes = values = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        raw = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
        values = BOOK[raw.long()] if code == "book4" else raw.short() - 8
        padded = F.pad(raw, (0, k % 2)).view(n, -1, 2)
        codes = padded[..., 0] | padded[..., 1] << 4
    index = torch.zeros(k, dtype=torch.long) if group == -1 else torch.arange(k) // group
    dense = values.double()
    if offsets is not None:
        dense = dense - offsets[:, index]
    return kernels.Weight(
        codes, scales if groups > 1 else scales[:, 0], k, code, group, offsets, BOOK if code == "book4" else None
    ), dense * scales[:, index].double()


def to(weight: kernels.Weight, device: str) -> kernels.Weight:
    return kernels.Weight(*(part.to(device) if isinstance(part, Tensor) else part for part in weight))


# m, n, k, code, group, zeros
CASES = [
    (1, 1, 1, "s8", -1, False),
    (37, 41, 67, "s8", -1, False),
    (3, 45, 130, "s8", 64, False),
    (5, 17, 96, "s8", 40, True),
    (17, 33, 129, "u4", 128, False),
    (70, 40, 64, "u4", 32, True),
    (5, 7, 33, "u4", -1, True),
    (19, 20, 50, "book4", 64, False),
]


def expected(x: Tensor, dense: Tensor, bias: Tensor, residual: Tensor, activation: Any, dtype: torch.dtype) -> Tensor:
    product = x.to(dtype) @ dense.to(dtype).T + bias.to(dtype) + residual.to(dtype)
    return activation(product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weight_only(case: tuple[Any, ...], dtype: torch.dtype, device: str) -> None:
    m, n, k, *how = case
    weight, dense = make_weight(how[0], n, k, how[1], how[2])
    x, bias, residual = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    got = kernels.linear(
        x.to(device), to(weight, device), bias.to(device), residual=residual.to(device), activation="relu"
    )
    want, peer = (expected(x, dense, bias, residual, F.relu, kind) for kind in (torch.float64, dtype))
    assert_close("out", got, peer, want, dtype)

    grad = torch.randn(m, n).to(dtype)
    dx = kernels.linear_dx(grad.to(device), to(weight, device))
    assert_close("dx", dx, grad @ dense.to(dtype), grad.double() @ dense, dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations(activation: str, device: str) -> None:
    weight, dense = make_weight("s8", 9, 20, -1, False)
    x, zero = torch.randn(5, 20), torch.zeros(9)
    function = {"gelu": F.gelu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"), "silu": F.silu}[activation]
    got = kernels.linear(x.to(device), to(weight, device), activation=activation)
    want, peer = (expected(x, dense, zero, zero, function, kind) for kind in (torch.float64, torch.float32))
    assert_close("out", got, peer, want, torch.float32)


def input_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    top = x.float().abs().amax(1)
    return (x.float() * (127.0 / top)[:, None]).round().to(torch.int8), top / 127.0


@pytest.mark.parametrize("case", [c for c in CASES if c[3] != "book4" and not c[5]], ids=str)
def test_quantized_input(case: tuple[Any, ...], device: str) -> None:
    m, n, k, *how = case
    weight, dense = make_weight(how[0], n, k, how[1], how[2])
    x = torch.randn(m, k)
    codes, scales = input_codes(x)
    ours = [t.cpu() for t in kernels.quantize_rows(x.to(device))]
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], scales)
    got = kernels.linear(x.to(device), to(weight, device), quantize_input=True)
    rounded = codes.double() * scales.double()[:, None]
    assert_close("out", got, rounded.float() @ dense.float().T, rounded @ dense.T, torch.float32)


def test_rows_without_a_scale(device: str) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [math.inf, 1.0, 2.0], [1e-38, 1e-40, 0.0]], device=device)
    codes, scales = (t.cpu() for t in kernels.quantize_rows(x))
    assert not codes.any()
    assert scales[[0, 3]].tolist() == [0.0, 0.0]
    assert scales[1:3].isnan().all()


def test_ties_round_to_even(device: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], device=device)
    assert kernels.quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, int, int], device: str) -> None:
    m, n, k = shape
    weight = kernels.Weight(torch.empty(n, k, dtype=torch.int8), torch.ones(n), k)
    x, bias = torch.randn(m, k, device=device), torch.arange(float(n), device=device)
    for quantize_input in (False, True):
        out = kernels.linear(x, to(weight, device), bias, quantize_input=quantize_input)
        assert torch.equal(out, bias.expand(m, n))
    assert not kernels.linear_dx(torch.randn(m, n, device=device), to(weight, device)).any()


def test_zeros_need_a_float_input(device: str) -> None:
    weight, _ = make_weight("u4", 4, 8, 4, True)
    with pytest.raises(ValueError, match="quantized_matmul: weight: got u4 with zeros=True"):
        kernels.linear(torch.randn(2, 8, device=device), to(weight, device), quantize_input=True)
