"""Quantized linear layers' Triton kernels, where the operator's samples do not reach."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comparing import assert_close

import ptkernels as ptk
from ptkernels.ops.quantized_matmul import reference
from ptkernels.ops.quantized_matmul import triton as launch
from ptkernels.ops.quantized_matmul.triton import quantize_rows

SCHEMES = ("int8_dynamic", "int4_int8", "int4_weight_only", "int2_weight_only", "nf4", "mxfp4", "fp8")


@pytest.mark.parametrize("shape", [(37, 67), (1, 1), (5, 600)], ids=str)
@pytest.mark.parametrize("step", [None, 0.02])
def test_input_codes_are_those_of_the_reference(shape: tuple[int, int], step: float | None, device: str) -> None:
    x = torch.randn(shape)
    given = None if step is None else torch.tensor([step])
    codes, scales = reference.input_codes(x, given)
    ours = [t.cpu() for t in quantize_rows(x.to(device), None if given is None else given.to(device))]
    assert torch.equal(ours[0], codes.to(torch.int8))
    assert torch.equal(ours[1], scales[:, 0])


def test_rows_without_a_scale(device: str) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, math.nan, 2.0], [math.inf, 1.0, 2.0], [1e-38, 1e-40, 0.0]], device=device)
    codes, scales = (t.cpu() for t in quantize_rows(x))
    assert not codes.any()
    assert scales[[0, 3]].tolist() == [0.0, 0.0]
    assert scales[1:3].isnan().all()


def test_ties_round_to_even(device: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], device=device)
    assert quantize_rows(x)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


# Groups that no block of the sum divides, groups of one block, zero points; odd sizes; more rows than a tile.
WEIGHTS = [
    ("int4_weight_only", 48, False, (5, 17, 97)),
    ("int4_weight_only", 32, False, (70, 40, 64)),
    ("int4_int8", 16, True, (5, 7, 33)),
    ("int4_int8", 48, True, (3, 9, 100)),
    ("int4_int8", 64, False, (17, 33, 129)),
    ("int2_weight_only", 16, False, (19, 20, 50)),
    ("int8_weight_only", 80, True, (2, 45, 130)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("scheme", "group", "symmetric", "shape"), WEIGHTS, ids=str)
def test_groups(
    scheme: str, group: int, symmetric: bool, shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> None:
    m, n, k = shape
    weight = ptk.quantize_weight(torch.randn(n, k), scheme, group, symmetric=symmetric)
    x, bias, residual = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype), torch.randn(m, n)
    on_device = [t.to(device) for t in (x, bias, residual)]
    with ptk.backend("triton"):
        leaf = on_device[0].requires_grad_()
        got = ptk.quantized_linear(leaf, weight.to(device), on_device[1], residual=on_device[2])
        (grad,) = torch.autograd.grad(got.float().sum(), leaf)
    results: list[Any] = []
    for kind in (torch.float64, dtype):
        value = x.to(kind)
        if weight.spec.quantizes_input:
            codes, scales = reference.input_codes(x)
            value = codes.to(kind) * scales.to(kind)
        dense = weight.dequantize(kind)
        out = value @ dense.T + bias.to(kind) + residual.to(kind)
        results.append((out, torch.ones(m, n, dtype=kind) @ dense))
    assert_close("out", got, results[1][0], results[0][0], dtype)
    assert_close("dx", grad, results[1][1], results[0][1], dtype)


COUNTS = {"uneven": [4, 0, 37], "none": [0, 0, 0], "last": [0, 0, 5], "more-than-a-tile": [70, 1, 65]}


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "int4_int8"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_experts(counts: list[int], scheme: str, device: str) -> None:
    rows, n, k = sum(counts), 24, 50
    options = {"group_size": 16, "symmetric": False} if "int4" in scheme else {}
    weight = ptk.quantize_weight(torch.randn(3, n, k), scheme, **options)
    x, bias, residual = torch.randn(rows, k), torch.randn(3, n), torch.randn(rows, n)
    given, results = torch.tensor(counts, dtype=torch.int64), []
    with ptk.backend("triton"):
        leaves = [t.to(device).requires_grad_() for t in (x, bias)]
        out = ptk.quantized_linear(
            leaves[0], weight.to(device), leaves[1], residual=residual.to(device), activation="silu", counts=given
        )
        ours = out, *torch.autograd.grad(out.sum(), leaves)
    for kind in (torch.float64, torch.float32):
        leaves = [t.to(kind).requires_grad_() for t in (x, bias)]
        want = ptk.reference.quantized_linear(
            leaves[0], weight, leaves[1], residual=residual.to(kind), activation="silu", counts=given
        )
        results.append((want, *torch.autograd.grad(want.sum(), leaves)))
    for name, got, expected, peer in zip(("out", "dx", "dbias"), ours, *results, strict=True):
        assert_close(name, got, peer, expected, torch.float32)


def test_experts_share_a_launch(device: str) -> None:
    launched = []

    def counting(kernel: Any) -> Any:
        launched.append(kernel)
        return kernel

    weight = ptk.quantize_weight(torch.randn(3, 8, 32), "int4_weight_only", 32).to(device)
    stored, counts = (weight.codes, weight.scales, None), torch.tensor([4, 0, 1])
    out = launch.linear(torch.randn(5, 32, device=device), *stored, None, None, "u4", 32, counts=counts, wrap=counting)
    launch.linear_backward(out, *stored, "u4", 32, 32, counts, wrap=counting)
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("counts", "message"), [([5, 0, 1], "got a sum of 6, expected 5"), ([6, -1, 0], "got -1, expected at least 0")]
)
def test_counts_that_are_wrong(counts: list[int], message: str, device: str) -> None:
    weight = ptk.quantize_weight(torch.randn(3, 8, 32), "int4_weight_only", 32).to(device)
    with ptk.backend("triton"), pytest.raises(ValueError, match=f"counts: {message}"):
        ptk.quantized_linear(torch.randn(5, 32, device=device), weight, counts=torch.tensor(counts))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(0, 3, 32), (3, 0, 32), (3, 4, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, int, int], scheme: str, device: str) -> None:
    m, n, k = shape
    weight = ptk.quantize_weight(torch.zeros(n, k, device=device), scheme)
    x, bias = torch.randn(m, k, device=device, requires_grad=True), torch.arange(float(n), device=device)
    with ptk.backend("triton"):
        out = ptk.quantized_linear(x, weight, bias)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(out.cpu(), bias.cpu().expand(m, n))
    assert not grad.any()
