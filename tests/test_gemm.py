"""The matrix-product engine behind every CPU operator, through the private op that drives it.

Floating point: the error against float64 stays within what summing in the accumulation type allows. Integers: equal to
the exact result, at every ISA level, over the full range of values.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ptkernels  # noqa: F401 - loads the library

gemm = torch.ops.ptkernels._gemm

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (reduce, m, n, k): ones, primes, micro-kernel tails on every side, more than one block of depth and of columns.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 17, 300),
    (1, 7, 5, 3),
    (2, 33, 65, 31),
    (3, 100, 130, 257),
    (1, 14, 32, 64),
    (1, 64, 64, 64),
    (1, 200, 530, 513),
    (1, 33, 40, 4200),
]


def operand(shape: tuple[int, int, int], transposed: bool, dtype: torch.dtype) -> torch.Tensor:
    r, rows, columns = shape
    if transposed:
        return torch.randn(r, columns, rows).to(dtype).mT
    return torch.randn(shape).to(dtype)


def check_float(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> None:
    got = gemm(a, b, bias, relu)
    exact = (a.double() @ b.double()).sum(0)
    # |a| @ |b| bounds every partial sum: k roundings of the accumulator, and one of the result, which has an absolute
    # step below the smallest normal number.
    magnitude = (a.double().abs() @ b.double().abs()).sum(0)
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    if relu:
        exact = exact.relu()
    accumulator = torch.float64 if a.dtype == torch.float64 else torch.float32
    terms = a.shape[0] * a.shape[2] + 2
    own = torch.finfo(a.dtype)
    bound = terms * torch.finfo(accumulator).eps * magnitude + own.eps * exact.abs().clamp(min=own.smallest_normal)
    assert got.dtype == a.dtype
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("a_transposed", "b_transposed"), list(itertools.product([False, True], repeat=2)))
def test_gemm_float(dtype: torch.dtype, shape: tuple[int, ...], a_transposed: bool, b_transposed: bool) -> None:
    r, m, n, k = shape
    check_float(operand((r, m, k), a_transposed, dtype), operand((r, k, n), b_transposed, dtype), None, False)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    """Every number of rows is cut into strips of its own."""
    a, b = operand((1, 48, 33), False, dtype), operand((1, 33, 37), False, dtype)
    whole = gemm(a, b)
    for rows in range(1, 48):
        assert torch.equal(gemm(a[:, :rows], b), whole[:rows]), rows


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_epilogue(dtype: torch.dtype) -> None:
    bias = torch.randn(67, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    check_float(operand((2, 45, 70), False, dtype), operand((2, 70, 67), False, dtype), bias, True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_propagates_nan_and_infinity(dtype: torch.dtype) -> None:
    a, b = operand((1, 20, 40), False, dtype), operand((1, 40, 36), False, dtype)
    a[0, 3, 5], a[0, 7, 9] = float("nan"), float("inf")
    got, exact = gemm(a, b), (a.double() @ b.double()).sum(0)
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.isinf(), exact.isinf())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("b_transposed", [False, True])
def test_gemm_8bit_is_exact(dtype: torch.dtype, shape: tuple[int, ...], b_transposed: bool) -> None:
    r, m, n, k = shape
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
    a = torch.randint(low, high, (r, m, k), dtype=dtype)
    b = torch.randint(-128, 128, (r, n, k) if b_transposed else (r, k, n), dtype=torch.int8)
    b = b.mT if b_transposed else b
    bias = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    assert torch.equal(gemm(a, b, bias).long(), (a.long() @ b.long()).sum(0) + bias)


@pytest.mark.parametrize(
    ("dtype", "a_value", "b_value"),
    [(torch.int8, -128, -128), (torch.int8, 127, -128), (torch.uint8, 255, -128), (torch.uint8, 255, 127)],
)
def test_gemm_8bit_does_not_saturate(dtype: torch.dtype, a_value: int, b_value: int) -> None:
    a = torch.full((1, 9, 128), a_value, dtype=dtype)
    b = torch.full((1, 128, 40), b_value, dtype=torch.int8)
    assert (gemm(a, b) == 128 * a_value * b_value).all()


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    r=st.integers(1, 3),
    m=st.integers(1, 70),
    n=st.integers(1, 90),
    k=st.integers(1, 300),
    relu=st.booleans(),
)
def test_gemm_any_shape(dtype: torch.dtype, r: int, m: int, n: int, k: int, relu: bool) -> None:
    torch.manual_seed(r + m + n + k)
    check_float(operand((r, m, k), False, dtype), operand((r, k, n), bool(n % 2), dtype), None, relu)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gemm_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    a, b = operand((1, 400, 300), False, dtype), operand((1, 300, 1100), False, dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gemm(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 3, 4), "3-D"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 4, 5), "b: got"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, 5).double(), "dtype"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 3, 5, dtype=torch.int64), "unsupported dtype"),
        (torch.zeros(1, 2, 0), torch.zeros(1, 0, 5), "at least one product"),
    ],
)
def test_gemm_rejects(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        gemm(a, b)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int8", "uint8"])
def test_rates_are_measured(dtype: str) -> None:
    assert torch.ops.ptkernels._peak_flops(dtype, 1) > 1e6
    assert torch.ops.ptkernels._gemm_rate(dtype, 64, 64, 64, 0.01) > 1e6
