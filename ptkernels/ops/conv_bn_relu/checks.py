"""Validation of the arguments of conv_bn_relu: every rule once, for the public function and for shape propagation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.conv_bn_relu.reference import ACTIVATIONS, compute_dtype

OP = "conv_bn_relu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(name: str, value: Any, device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{OP}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_quantized:
        raise TypeError(f"{OP}: {name}: got a quantized tensor, expected {name}.dequantize()")
    if value.is_nested:
        raise TypeError(f"{OP}: {name}: got a nested tensor, expected a padded one")
    if value.layout is not torch.strided:
        raise TypeError(f"{OP}: {name}: got layout {value.layout}, expected torch.strided (a dense tensor)")
    if device is not None and value.device != device:
        raise ValueError(f"{OP}: {name}: got device {value.device}, expected {device} like input")


def _check_operands(input: Any, weight: Any) -> None:
    _check_tensor("input", input)
    _check_tensor("weight", weight, input.device)
    if input.dtype not in DTYPES:
        expected = ", ".join(map(_dtype_name, DTYPES))
        raise TypeError(f"{OP}: input: got dtype {_dtype_name(input.dtype)}, expected one of {expected}")
    if weight.dtype != input.dtype:
        got, expected = _dtype_name(weight.dtype), _dtype_name(input.dtype)
        raise TypeError(f"{OP}: weight: got dtype {got}, expected {expected} like input")
    if input.dim() not in (3, 4, 5):
        raise ValueError(
            f"{OP}: input: got shape {list(input.shape)}, expected 3 to 5 dimensions: [batch, channels, space...]"
        )
    if weight.dim() != input.dim():
        raise ValueError(f"{OP}: weight: got {weight.dim()} dimensions, expected {input.dim()} like input")
    if isinstance(input.size(1), int) and input.size(1) == 0:
        raise ValueError(f"{OP}: input: got shape {list(input.shape)}, expected at least one channel")
    if not all(holds(size >= 1) for size in weight.shape[2:]):
        raise ValueError(f"{OP}: weight: got shape {list(weight.shape)}, expected a kernel of at least 1")


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def spatial(name: str, value: Any, count: int, least: int) -> list[int]:
    """An int for every dimension of space, or one each."""
    if _is_integer(value):
        value = (value,) * count
    if not isinstance(value, (tuple, list)) or not all(map(_is_integer, value)):
        raise TypeError(f"{OP}: {name}: got {value!r}, expected an int or {count} ints")
    if len(value) == 1:
        value = tuple(value) * count
    if len(value) != count:
        raise ValueError(f"{OP}: {name}: got {len(value)} numbers, expected 1 or {count}")
    if not all(holds(number >= least) for number in value):
        raise ValueError(f"{OP}: {name}: got {list(value)}, expected numbers of at least {least}")
    return list(value)


def _check_groups(input: Tensor, weight: Tensor, groups: Any) -> None:
    if not _is_integer(groups):
        raise TypeError(f"{OP}: groups: got {groups!r}, expected an int")
    if groups < 1:
        raise ValueError(f"{OP}: groups: got {groups}, expected at least 1")
    if not holds(input.size(1) % groups == 0):
        raise ValueError(f"{OP}: groups: got {groups}, expected a divisor of input's {input.size(1)} channels")
    if not holds(weight.size(1) == input.size(1) // groups):
        raise ValueError(
            f"{OP}: weight: got {weight.size(1)} input channels per group, "
            f"expected {input.size(1) // groups}, input's {input.size(1)} in {groups} groups"
        )
    if not holds(weight.size(0) % groups == 0):
        raise ValueError(f"{OP}: groups: got {groups}, expected a divisor of weight's {weight.size(0)} channels")


def out_shape(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Shape of the result."""
    space = []
    for size, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (kernel - 1) - 1
        if not holds(room >= 0):
            raise ValueError(
                f"{OP}: input: got shape {list(input.shape)}, which with padding {list(padding)} is smaller than the "
                f"dilated kernel of weight {list(weight.shape)}"
            )
        space.append(room // s + 1)
    return [input.size(0), weight.size(0), *space]


def _check_channels(name: str, vector: Any, input: Tensor, weight: Tensor) -> None:
    if vector is None:
        return
    _check_tensor(name, vector, input.device)
    allowed = dict.fromkeys((input.dtype, compute_dtype(input.dtype)))
    if vector.dtype not in allowed:
        expected = " or ".join(map(_dtype_name, allowed))
        raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(vector.dtype)}, expected {expected}")
    if vector.dim() != 1 or not holds(vector.size(0) == weight.size(0)):
        raise ValueError(f"{OP}: {name}: got shape {list(vector.shape)}, expected [{weight.size(0)}], one per channel")


def _check_result(name: str, tensor: Any, input: Tensor, shape: Sequence[int]) -> None:
    _check_tensor(name, tensor, input.device)
    if tensor.dtype != input.dtype:
        got, expected = _dtype_name(tensor.dtype), _dtype_name(input.dtype)
        raise TypeError(f"{OP}: {name}: got dtype {got}, expected {expected} like input")
    same = tensor.dim() == len(shape) and all(holds(a == b) for a, b in zip(tensor.shape, shape, strict=True))
    if not same:
        raise ValueError(f"{OP}: {name}: got shape {list(tensor.shape)}, expected {list(shape)} like the result")


def _check_norm(
    bn_weight: Any, bn_bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any
) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"{OP}: training: got {type(training).__name__}, expected bool")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymFloat)):
            raise TypeError(f"{OP}: {name}: got {type(number).__name__}, expected float")
        if isinstance(number, (int, float)) and not 0.0 <= number < math.inf:
            raise ValueError(f"{OP}: {name}: got {number}, expected a finite number of at least 0")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{OP}: {missing}: got None, expected a tensor, as the other running statistic is given")
    if running_mean is None and not training:
        for name, given in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
            if given is not None:
                raise ValueError(f"{OP}: {name}: got a tensor, expected None without running statistics or training")


def check_op_inputs(
    input: Any,
    weight: Any,
    bias: Any,
    bn_weight: Any,
    bn_bias: Any,
    running_mean: Any,
    running_var: Any,
    residual: Any,
    training: Any,
    eps: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    activation: Any = "relu",
    negative_slope: Any = 0.01,
    momentum: Any = 0.1,
) -> list[int]:
    """Raise the precise error for the first argument that is wrong; return the shape of the result.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that the operator does not take.
        ValueError: a shape, a device or a number is out of range.
    """
    _check_operands(input, weight)
    _check_groups(input, weight, groups)
    space = input.dim() - 2
    shape = out_shape(
        input,
        weight,
        spatial("stride", stride, space, 1),
        spatial("padding", padding, space, 0),
        spatial("dilation", dilation, space, 1),
    )
    vectors = {
        "bias": bias,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        _check_channels(name, vector, input, weight)
    _check_norm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    if residual is not None:
        _check_result("residual", residual, input, shape)
    if not isinstance(activation, str):
        raise TypeError(f"{OP}: activation: got {type(activation).__name__}, expected str")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{OP}: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"{OP}: negative_slope: got {type(negative_slope).__name__}, expected float")
    if training and shape[1] != 0:
        count = shape[0] * math.prod(shape[2:])
        if not holds(count > 1):
            raise ValueError(
                f"{OP}: input: got shape {list(input.shape)}, expected more than one value per channel when training"
            )
    return shape


def check_backward_inputs(grad_out: Any, conv: Any, shape: Sequence[int], input: Tensor) -> None:
    """The rest of what ``torch.ops.ptkernels._conv_bn_relu_backward`` takes."""
    for name, tensor in (("grad_out", grad_out), ("conv", conv)):
        if tensor is not None:
            _check_result(name, tensor, input, shape)
