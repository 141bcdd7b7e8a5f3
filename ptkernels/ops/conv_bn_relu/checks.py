"""Validation of the arguments of conv_bn_relu: every rule once, for the public function and for shape propagation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.conv_bn_relu.reference import ACTIVATIONS, compute_dtype
from ptkernels.ops.conv_bn_relu.variant import OP, PLAIN, TRANSPOSED_OP, Variant, is_integer

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(op: str, name: str, value: Any, device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{op}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_quantized:
        raise TypeError(f"{op}: {name}: got a quantized tensor, expected {name}.dequantize()")
    if value.is_nested:
        raise TypeError(f"{op}: {name}: got a nested tensor, expected a padded one")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name}: got layout {value.layout}, expected torch.strided (a dense tensor)")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name}: got device {value.device}, expected {device} like input")


def _check_operands(op: str, input: Any, weight: Any) -> None:
    _check_tensor(op, "input", input)
    _check_tensor(op, "weight", weight, input.device)
    if input.dtype not in DTYPES:
        expected = ", ".join(map(_dtype_name, DTYPES))
        raise TypeError(f"{op}: input: got dtype {_dtype_name(input.dtype)}, expected one of {expected}")
    if weight.dtype != input.dtype:
        got, expected = _dtype_name(weight.dtype), _dtype_name(input.dtype)
        raise TypeError(f"{op}: weight: got dtype {got}, expected {expected} like input")
    if input.dim() not in (3, 4, 5):
        raise ValueError(
            f"{op}: input: got shape {list(input.shape)}, expected 3 to 5 dimensions: [batch, channels, space...]"
        )
    if weight.dim() != input.dim():
        raise ValueError(f"{op}: weight: got {weight.dim()} dimensions, expected {input.dim()} like input")
    if isinstance(input.size(1), int) and input.size(1) == 0:
        raise ValueError(f"{op}: input: got shape {list(input.shape)}, expected at least one channel")
    if not all(holds(size >= 1) for size in weight.shape[2:]):
        raise ValueError(f"{op}: weight: got shape {list(weight.shape)}, expected a kernel of at least 1")


def spatial(op: str, name: str, value: Any, count: int, least: int) -> list[int]:
    """An int for every dimension of space, or one each."""
    if is_integer(value):
        value = (value,) * count
    if not isinstance(value, (tuple, list)) or not all(map(is_integer, value)):
        raise TypeError(f"{op}: {name}: got {value!r}, expected an int or {count} ints")
    if len(value) == 1:
        value = tuple(value) * count
    if len(value) != count:
        raise ValueError(f"{op}: {name}: got {len(value)} numbers, expected 1 or {count}")
    if not all(holds(number >= least) for number in value):
        raise ValueError(f"{op}: {name}: got {list(value)}, expected numbers of at least {least}")
    return list(value)


def _check_groups(op: str, input: Tensor, weight: Tensor, groups: Any, transposed: bool) -> None:
    if not is_integer(groups):
        raise TypeError(f"{op}: groups: got {groups!r}, expected an int")
    if groups < 1:
        raise ValueError(f"{op}: groups: got {groups}, expected at least 1")
    if not holds(input.size(1) % groups == 0):
        raise ValueError(f"{op}: groups: got {groups}, expected a divisor of input's {input.size(1)} channels")
    if transposed:
        if not holds(weight.size(0) == input.size(1)):
            raise ValueError(f"{op}: weight: got {weight.size(0)} input channels, expected input's {input.size(1)}")
        return
    if not holds(weight.size(1) == input.size(1) // groups):
        raise ValueError(
            f"{op}: weight: got {weight.size(1)} input channels per group, "
            f"expected {input.size(1) // groups}, input's {input.size(1)} in {groups} groups"
        )
    if not holds(weight.size(0) % groups == 0):
        raise ValueError(f"{op}: groups: got {groups}, expected a divisor of weight's {weight.size(0)} channels")


def _out_space(
    input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    space = []
    for size, kernel, s, p, d in zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True):
        room = size + 2 * p - d * (kernel - 1) - 1
        if not holds(room >= 0):
            raise ValueError(
                f"{OP}: input: got shape {list(input.shape)}, which with padding {list(padding)} is smaller than the "
                f"dilated kernel of weight {list(weight.shape)}"
            )
        space.append(room // s + 1)
    return space


def _transposed_space(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> list[int]:
    if not all(holds(size >= 1) for size in input.shape[2:]):
        raise ValueError(f"{TRANSPOSED_OP}: input: got shape {list(input.shape)}, expected at least one position")
    space = []
    sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
    for size, kernel, s, p, d, more in sizes:
        if not holds(more < s) and not holds(more < d):
            raise ValueError(
                f"{TRANSPOSED_OP}: output_padding: got {list(output_padding)}, expected numbers below stride "
                f"{list(stride)} or dilation {list(dilation)}"
            )
        reached = (size - 1) * s + d * (kernel - 1) + 1 + more
        if not holds(reached - 2 * p >= 1):
            raise ValueError(
                f"{TRANSPOSED_OP}: padding: got {list(padding)}, which leaves nothing of a result of size {reached}"
            )
        space.append(reached - 2 * p)
    return space


def out_shape(
    input: Tensor, weight: Tensor, geometry: Sequence[Sequence[int]], groups: int, variant: Variant = PLAIN
) -> list[int]:
    """Shape of the result; geometry: stride, padding, dilation."""
    stride, padding, dilation = geometry
    if not variant.transposed:
        return [input.size(0), weight.size(0), *_out_space(input, weight, stride, padding, dilation)]
    more = spatial(variant.op, "output_padding", variant.output_padding, input.dim() - 2, 0)
    return [input.size(0), weight.size(1) * groups, *_transposed_space(input, weight, stride, padding, dilation, more)]


def _check_channels(op: str, name: str, vector: Any, input: Tensor, channels: int) -> None:
    if vector is None:
        return
    _check_tensor(op, name, vector, input.device)
    allowed = dict.fromkeys((input.dtype, compute_dtype(input.dtype)))
    if vector.dtype not in allowed:
        expected = " or ".join(map(_dtype_name, allowed))
        raise TypeError(f"{op}: {name}: got dtype {_dtype_name(vector.dtype)}, expected {expected}")
    if vector.dim() != 1 or not holds(vector.size(0) == channels):
        raise ValueError(f"{op}: {name}: got shape {list(vector.shape)}, expected [{channels}], one per channel")


def _check_result(op: str, name: str, tensor: Any, input: Tensor, shape: Sequence[int]) -> None:
    _check_tensor(op, name, tensor, input.device)
    if tensor.dtype != input.dtype:
        got, expected = _dtype_name(tensor.dtype), _dtype_name(input.dtype)
        raise TypeError(f"{op}: {name}: got dtype {got}, expected {expected} like input")
    same = tensor.dim() == len(shape) and all(holds(a == b) for a, b in zip(tensor.shape, shape, strict=True))
    if not same:
        raise ValueError(f"{op}: {name}: got shape {list(tensor.shape)}, expected {list(shape)} like the result")


def _check_groups_of_images(op: str, shape: Sequence[int], num_groups: int, running_mean: Any) -> None:
    if running_mean is not None:
        raise ValueError(f"{op}: running_mean: got a tensor, expected None where every image has its own statistics")
    if num_groups == -1:
        count = math.prod(shape[2:])
    elif num_groups < 0 or not holds(shape[1] % num_groups == 0):
        raise ValueError(f"{op}: num_groups: got {num_groups}, expected a divisor of the result's {shape[1]} channels")
    else:
        # As torch's group_norm, which minds a single value only where it is all that there is.
        count = shape[0] * (shape[1] // num_groups) * math.prod(shape[2:])
    if shape[1] != 0 and not holds(count > 1) and not holds(shape[0] == 0):
        raise ValueError(
            f"{op}: input: got shape {list(shape)} for the result, expected more than one value per mean and variance"
        )


def _check_norm(
    op: str,
    bn_weight: Any,
    bn_bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    num_groups: int,
) -> None:
    if not isinstance(training, bool):
        raise TypeError(f"{op}: training: got {type(training).__name__}, expected bool")
    for name, number in (("momentum", momentum), ("eps", eps)):
        if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymFloat)):
            raise TypeError(f"{op}: {name}: got {type(number).__name__}, expected float")
        if isinstance(number, (int, float)) and not 0.0 <= number < math.inf:
            raise ValueError(f"{op}: {name}: got {number}, expected a finite number of at least 0")
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        raise ValueError(f"{op}: {missing}: got None, expected a tensor, as the other running statistic is given")
    if running_mean is None and not training and num_groups == 0:
        for name, given in (("bn_weight", bn_weight), ("bn_bias", bn_bias)):
            if given is not None:
                raise ValueError(f"{op}: {name}: got a tensor, expected None without running statistics or training")


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
    variant: Variant = PLAIN,
    momentum: Any = 0.1,
) -> list[int]:
    """Raise the precise error for the first argument that is wrong; return the shape of the result.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that the operator does not take.
        ValueError: a shape, a device or a number is out of range.
    """
    op = variant.op
    _check_operands(op, input, weight)
    _check_groups(op, input, weight, groups, variant.transposed)
    space = input.dim() - 2
    geometry = (
        spatial(op, "stride", stride, space, 1),
        spatial(op, "padding", padding, space, 0),
        spatial(op, "dilation", dilation, space, 1),
    )
    shape = out_shape(input, weight, geometry, groups, variant)
    vectors = {
        "bias": bias,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        _check_channels(op, name, vector, input, shape[1])
    _check_norm(op, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps, variant.num_groups)
    if residual is not None:
        _check_result(op, "residual", residual, input, shape)
    for name, kind in (("activation", activation), ("pre_activation", variant.pre_activation)):
        if not isinstance(kind, str):
            raise TypeError(f"{op}: {name}: got {type(kind).__name__}, expected str")
        if kind not in ACTIVATIONS:
            raise ValueError(f"{op}: {name}: got {kind!r}, expected one of {', '.join(ACTIVATIONS)}")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, (int, float)):
        raise TypeError(f"{op}: negative_slope: got {type(negative_slope).__name__}, expected float")
    if variant.num_groups != 0:
        _check_groups_of_images(op, shape, variant.num_groups, running_mean)
    elif training and shape[1] != 0:
        count = shape[0] * math.prod(shape[2:])
        if not holds(count > 1):
            raise ValueError(
                f"{op}: input: got shape {list(input.shape)}, expected more than one value per channel when training"
            )
    return shape


def check_backward_inputs(op: str, grad_out: Any, conv: Any, shape: Sequence[int], input: Tensor) -> None:
    """The rest of what ``torch.ops.ptkernels._conv_bn_relu_backward`` takes."""
    for name, tensor in (("grad_out", grad_out), ("conv", conv)):
        if tensor is not None:
            _check_result(op, name, tensor, input, shape)
