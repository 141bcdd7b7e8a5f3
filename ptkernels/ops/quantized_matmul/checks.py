"""Validation of the quantized linear layer's arguments: every rule once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.quantized_matmul.formats import CODE_FORMATS
from ptkernels.ops.quantized_matmul.weight import OP, QuantizedWeight, check_weight

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    None: "none",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swiglu": "swiglu",
}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_float(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{OP}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_quantized:
        raise TypeError(f"{OP}: {name}: got a quantized tensor, expected {name}.dequantize()")
    if value.is_nested:
        raise TypeError(f"{OP}: {name}: got a nested tensor, expected a dense one")
    if value.layout is not torch.strided:
        raise TypeError(f"{OP}: {name}: got layout {value.layout}, expected torch.strided (a dense tensor)")
    if value.dtype not in DTYPES:
        expected = ", ".join(map(_dtype_name, DTYPES))
        raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(value.dtype)}, expected one of {expected}")


def _check_goes_with(name: str, dtype: torch.dtype, x: torch.dtype) -> None:
    if (dtype == torch.float64) != (x == torch.float64):
        expected = "float64 like x" if x == torch.float64 else "float32, bfloat16 or float16"
        raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(dtype)}, expected {expected}")


def check_inputs(
    x: Any,
    qweight: Any,
    bias: Any = None,
    residual: Any = None,
    activation: Any = None,
    out_dtype: Any = None,
    counts: Any = None,
) -> None:
    """Raise the precise error for the first argument of :func:`ptkernels.quantized_linear` that is wrong.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that the operator does not take.
        ValueError: a shape, a device or a name is not one that fits.
    """
    _check_float("x", x)
    check_weight(qweight)
    if x.dim() < 1:
        raise ValueError(f"{OP}: x: got a scalar, expected at least one dimension: [..., in_features]")
    if not holds(x.size(-1) == qweight.in_features):
        raise ValueError(f"{OP}: x: got {x.size(-1)} features, expected {qweight.in_features} like qweight")
    if qweight.device != x.device:
        raise ValueError(f"{OP}: qweight: got device {qweight.device}, expected {x.device} like x")
    try:
        known = activation in ACTIVATIONS
    except TypeError:
        known = False
    if not known:
        expected = ", ".join(str(name) for name in ACTIVATIONS)
        raise ValueError(f"{OP}: activation: got {activation!r}, expected one of {expected}")
    if activation == "swiglu" and qweight.out_features % 2 != 0:
        raise ValueError(
            f"{OP}: activation: got swiglu with {qweight.out_features} output features, expected an even number"
        )
    if bias is not None:
        _check_float("bias", bias)
        _check_goes_with("bias", bias.dtype, x.dtype)
        expected_shape = list(qweight.shape[:-1])
        if list(bias.shape) != expected_shape:
            raise ValueError(f"{OP}: bias: got shape {list(bias.shape)}, expected {expected_shape}")
        if bias.device != x.device:
            raise ValueError(f"{OP}: bias: got device {bias.device}, expected {x.device} like x")
    if residual is not None:
        _check_residual(x, qweight, residual)
    _check_counts(x, qweight, counts)
    if out_dtype is not None:
        if out_dtype not in DTYPES:
            expected = ", ".join(map(_dtype_name, DTYPES))
            raise TypeError(f"{OP}: out_dtype: got {out_dtype}, expected one of {expected}")
        _check_goes_with("out_dtype", out_dtype, x.dtype)


def _check_counts(x: Tensor, qweight: QuantizedWeight, counts: Any) -> None:
    if qweight.experts is None:
        if counts is not None:
            raise ValueError(f"{OP}: counts: got one with a single weight, expected None")
        return
    if not isinstance(counts, Tensor) or counts.dtype != torch.int64 or counts.device.type != "cpu":
        got = f"{counts.dtype} on {counts.device}" if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"{OP}: counts: got {got}, expected an int64 tensor on the CPU with a stacked weight")
    if counts.shape != (qweight.experts,):
        raise ValueError(f"{OP}: counts: got shape {list(counts.shape)}, expected [{qweight.experts}]")
    if x.dim() != 2:
        raise ValueError(f"{OP}: x: got {x.dim()} dimensions with a stacked weight, expected 2")


def _check_residual(x: Tensor, qweight: QuantizedWeight, residual: Any) -> None:
    _check_float("residual", residual)
    _check_goes_with("residual", residual.dtype, x.dtype)
    expected = [*x.shape[:-1], qweight.out_features]
    if residual.dim() != len(expected) or not all(
        holds(size == wanted) for size, wanted in zip(residual.shape, expected, strict=True)
    ):
        raise ValueError(f"{OP}: residual: got shape {list(residual.shape)}, expected {expected}")
    if residual.device != x.device:
        raise ValueError(f"{OP}: residual: got device {residual.device}, expected {x.device} like x")


def check_embedding(input: Any, qweight: Any, dtype: Any) -> None:
    """Raise the precise error for the first argument of :func:`ptkernels.quantized_embedding` that is wrong."""
    op = "quantized_embedding"
    if not isinstance(input, Tensor) or input.dtype not in (torch.int64, torch.int32):
        got = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"{op}: input: got {got}, expected an int64 or int32 tensor")
    check_weight(qweight)
    if qweight.experts is not None:
        raise ValueError(f"{op}: qweight: got a stack of {qweight.experts} weights, expected a single one")
    if qweight.device != input.device:
        raise ValueError(f"{op}: qweight: got device {qweight.device}, expected {input.device} like input")
    if dtype not in DTYPES:
        raise TypeError(f"{op}: dtype: got {dtype}, expected one of {', '.join(map(_dtype_name, DTYPES))}")


def check_op_inputs(
    name: str, x: Tensor, codes: Tensor, scales: Tensor, code_format: str, group_size: int, in_features: Any
) -> None:
    """What shape propagation of the operators must refuse: the rest follows from these."""
    _check_float(name, x)
    if x.dim() != 2:
        raise ValueError(f"{OP}: {name}: got {x.dim()} dimensions, expected 2")
    if code_format not in CODE_FORMATS:
        raise ValueError(f"{OP}: code_format: got {code_format!r}, expected one of {', '.join(CODE_FORMATS)}")
    if codes.dim() != 2 or not holds(codes.size(1) == CODE_FORMATS[code_format].row_bytes(in_features)):
        raise ValueError(f"{OP}: codes: got shape {list(codes.shape)} for {in_features} features of {code_format}")
    if scales.dim() != 2 or not holds(scales.size(0) == codes.size(0)):
        raise ValueError(f"{OP}: scales: got shape {list(scales.shape)} for codes {list(codes.shape)}")
