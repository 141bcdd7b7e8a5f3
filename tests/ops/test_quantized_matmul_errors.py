"""Every way to call the quantized linear layer wrongly, and the message that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptkernels as ptk

N, K = 6, 32
LINEAR = torch.ops.ptkernels.quantized_linear
BACKWARD = torch.ops.ptkernels._quantized_linear_backward


def weight(made_as: str = "int8_weight_only", /, **changes: Any) -> ptk.QuantizedWeight:
    made = ptk.quantize_weight(torch.ones(N, K), made_as)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def call(**changes: Any) -> Callable[[], Any]:
    arguments: dict[str, Any] = {"x": torch.ones(3, K), "qweight": weight(), **changes}
    return lambda: ptk.quantized_linear(**arguments)


X = torch.ones(3, K)
CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (call(x=[1.0]), TypeError, "x: got builtins.list, expected torch.Tensor"),
    (call(x=X.int()), TypeError, "x: got dtype int32, expected one of float64"),
    (call(x=X.to_sparse()), TypeError, "x: got layout torch.sparse_coo"),
    (call(x=torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)), TypeError, "x: got a quantized tensor"),
    (call(x=torch.nested.nested_tensor([X, X])), TypeError, "x: got a nested tensor"),
    (call(x=torch.tensor(1.0)), ValueError, "x: got a scalar, expected at least one dimension"),
    (call(x=torch.ones(3, K - 1)), ValueError, f"x: got {K - 1} features, expected {K} like qweight"),
    (call(x=torch.ones(3, K + 1)), ValueError, f"x: got {K + 1} features, expected {K} like qweight"),
    (call(x=X.to("meta")), ValueError, "qweight: got device cpu, expected meta like x"),
    (call(qweight=torch.ones(N, K)), TypeError, "qweight: got Tensor, expected QuantizedWeight"),
    (call(qweight=weight(scheme="int7")), ValueError, "qweight.scheme: got 'int7'"),
    (call(qweight=weight(group_size=7)), ValueError, "group_size: got 7, expected -1 or a positive multiple of 16"),
    (call(qweight=weight(group_size=1.5)), TypeError, "group_size: got float, expected int"),
    (call(qweight=weight(group_size=16)), ValueError, "qweight.scales: got shape [6, 1], expected [6, 2]"),
    (call(qweight=weight(codes=torch.ones(N, K))), TypeError, "qweight.codes: got dtype float32, expected int8"),
    (call(qweight=weight(codes=torch.ones(N, 9).char())), ValueError, "qweight.codes: got shape [6, 9]"),
    (call(qweight=weight(codes=torch.ones(N).char())), ValueError, "qweight.codes: got 1 dimensions, expected 2"),
    (call(qweight=weight(scales=torch.ones(N, 1).half())), TypeError, "qweight.scales: got dtype float16"),
    (call(qweight=weight(scales=None)), TypeError, "qweight.scales: got NoneType, expected torch.Tensor"),
    (call(qweight=weight(zeros=torch.ones(N, 2))), ValueError, "qweight.zeros: got shape [6, 2], expected [6, 1]"),
    (call(qweight=weight("int8_dynamic", input_scale=torch.ones(1))), ValueError, "qweight.input_scale: got one"),
    (call(bias=torch.ones(N + 1)), ValueError, "bias: got shape [7], expected [6]"),
    (call(bias=torch.ones(1, N)), ValueError, "bias: got shape [1, 6], expected [6]"),
    (call(bias=torch.ones(N).long()), TypeError, "bias: got dtype int64"),
    (call(bias=torch.ones(N).double()), TypeError, "bias: got dtype float64, expected float32, bfloat16 or float16"),
    (call(bias=torch.ones(N).to("meta")), ValueError, "bias: got device meta, expected cpu like x"),
    (call(x=X.double(), bias=torch.ones(N)), TypeError, "bias: got dtype float32, expected float64 like x"),
    (call(residual=torch.ones(N)), ValueError, "residual: got shape [6], expected [3, 6]"),
    (call(residual=torch.ones(3, N).double()), TypeError, "residual: got dtype float64"),
    (call(residual=torch.ones(2, N)), ValueError, "residual: got shape [2, 6], expected [3, 6]"),
    (call(x=X.view(1, 3, K), residual=torch.ones(3, 1, N)), ValueError, "residual: got shape [3, 1, 6]"),
    (call(residual="r"), TypeError, "residual: got builtins.str, expected torch.Tensor"),
    (call(activation="tanh"), ValueError, "activation: got 'tanh', expected one of None, relu, gelu"),
    (call(activation=[]), ValueError, "activation: got []"),
    (
        call(qweight=ptk.quantize_weight(torch.ones(5, K), "nf4"), activation="swiglu"),
        ValueError,
        "activation: got swiglu with 5 output features, expected an even number",
    ),
    (call(out_dtype=torch.int8), TypeError, "out_dtype: got torch.int8, expected one of float64"),
    (call(out_dtype=torch.float64), TypeError, "out_dtype: got dtype float64, expected float32, bfloat16 or float16"),
]


@pytest.mark.parametrize(("make", "error", "message"), CASES, ids=[message for *_, message in CASES])
def test_calls(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"quantized_linear: {message}")):
        make()


W = torch.ones(N, K)
QUANTIZE_CASES: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (([1.0], "nf4"), {}, TypeError, "weight: got list, expected torch.Tensor"),
    ((W.int(), "nf4"), {}, TypeError, "weight: got torch.int32"),
    ((W.to_sparse(), "nf4"), {}, TypeError, "torch.sparse_coo, expected a dense floating tensor"),
    ((W[0], "nf4"), {}, ValueError, "weight: got shape [32], expected [out_features, in_features]"),
    ((W * float("nan"), "nf4"), {}, ValueError, "weight: got infinities or NaN"),
    ((W * float("inf"), "int8_dynamic"), {}, ValueError, "weight: got infinities or NaN"),
    ((W, "int9"), {}, ValueError, "scheme: got 'int9', expected one of int8_dynamic"),
    ((W, "nf4", 24), {}, ValueError, "group_size: got 24, expected -1 or a positive multiple of 16"),
    ((W, "nf4", 0), {}, ValueError, "group_size: got 0"),
    ((W, "nf4", True), {}, TypeError, "group_size: got bool, expected int"),
    ((W, "mxfp4", 64), {}, ValueError, "group_size: got 64, expected 32 for mxfp4"),
    ((W, "int8_dynamic"), {"symmetric": False}, ValueError, "symmetric: got False with int8_dynamic"),
    ((W, "int4_int8"), {"symmetric": 1}, TypeError, "symmetric: got int, expected bool"),
    ((W, "int8_static"), {}, ValueError, "input_scale: got None with int8_static"),
    ((W, "int8_static"), {"input_scale": -1.0}, ValueError, "input_scale: got -1.0, expected a positive number"),
    ((W, "int8_static"), {"input_scale": float("nan")}, ValueError, "input_scale: got nan"),
    ((W, "nf4"), {"input_scale": 1.0}, ValueError, "input_scale: got 1.0 with nf4, expected None"),
]


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"), QUANTIZE_CASES, ids=[message for *_, message in QUANTIZE_CASES]
)
def test_quantizing(args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as raised:
        ptk.quantize_weight(*args, **kwargs)
    assert str(raised.value).startswith(("quantize_weight: ", "quantized_linear: group_size"))


CODES, SCALES = weight().codes, weight().scales
OP_CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: LINEAR(X.int(), CODES, SCALES), "input: got another dtype"),
    (lambda: LINEAR(X[None], CODES, SCALES), "input: got 3 dimensions, expected 2"),
    (lambda: LINEAR(X[:, :5], CODES, SCALES), "codes: got shape [6, 32], expected [6, 5]"),
    (lambda: LINEAR(X, CODES.float(), SCALES), "codes: got another dtype, expected int8 for s8"),
    (lambda: LINEAR(X, CODES, SCALES.double()), "scales: got another dtype, expected float32"),
    (lambda: LINEAR(X, CODES, SCALES[:3]), "scales: got shape [3, 1], expected [6, 1]"),
    (lambda: LINEAR(X, CODES, SCALES, code_format="s9"), "code_format: got 's9'"),
    (lambda: LINEAR(X, CODES, SCALES, group_size=8), "group_size: got 8"),
    (lambda: LINEAR(X, CODES, SCALES, SCALES[:1]), "zeros: got shape [1, 1]"),
    (lambda: LINEAR(X, CODES, SCALES, bias=SCALES), "bias: got shape [6, 1]"),
    (lambda: LINEAR(X, CODES, SCALES, residual=X), "residual: got shape [3, 32], expected [3, 6]"),
    (lambda: LINEAR(X, CODES, SCALES, activation="elu"), "activation: got 'elu'"),
    (lambda: LINEAR(X, CODES, SCALES, input_scale=SCALES[0]), "input_scale: got one without quantize_input"),
    (lambda: LINEAR(X, CODES.byte(), SCALES, code_format="fp8", quantize_input=True), "quantize_input: got True"),
    (lambda: LINEAR(X, CODES, SCALES, out_dtype=torch.int32), "out_dtype: got another dtype"),
    (lambda: BACKWARD(X, CODES, SCALES, None, "s8", -1, K), "grad_out: got shape [3, 32], expected [3, 6]"),
    (lambda: BACKWARD(X[:, :N], CODES, SCALES, None, "s8", -1, -1), "in_features: got -1"),
]


@pytest.mark.parametrize(("make", "message"), OP_CASES, ids=[message for _, message in OP_CASES])
def test_direct_calls_of_the_operators(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"quantized_linear: {message}")):
        make()


def test_explain_raises_what_the_call_would() -> None:
    with pytest.raises(ValueError, match="x: got 5 features"):
        ptk.explain("quantized_matmul", torch.ones(2, 5), weight())
