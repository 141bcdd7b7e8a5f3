"""Linear layers on quantized weights, split among the processes of a group (Shoeybi et al., *Megatron-LM*, 2019).

    column   every process has some rows of W (outputs):   y_r = x W_r^T          x whole, y split
    row      every process has some columns of W (inputs): y = sum_r x_r W_r^T    x split, y whole, one all-reduce

A column-parallel layer followed by a row-parallel one needs no communication between them. Codes are split where they
are stored, so every process multiplies exactly the codes of the whole layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ptkernels.nn import QuantizedLinear
from ptkernels.ops.quantized_matmul import QuantizedWeight

__all__ = ["ColumnParallelQuantizedLinear", "RowParallelQuantizedLinear"]


class _CopyToAll(torch.autograd.Function):
    """The same input everywhere; its gradient is the sum of what every process made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _SumOfAll(torch.autograd.Function):
    """The sum of every process's share; every share has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _part(size: int, group: dist.ProcessGroup | None, op: str, name: str, unit: int = 1) -> slice:
    """This process's range of ``size``, whole units of which go to each."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if size % (world * unit):
        raise ValueError(f"{op}: {name}: got {size}, expected a multiple of {world * unit} ({world} processes)")
    step = size // world
    return slice(rank * step, (rank + 1) * step)


class ColumnParallelQuantizedLinear(nn.Module):
    """This process's outputs of a quantized layer: ``[..., K]`` to ``[..., N / W]``.

    Args:
        layer: the whole layer, the same on every process; it is not needed afterwards.
        group: the processes. Default: all.

    Raises:
        ValueError: ``N`` is not a multiple of the number of processes, or the layer has an activation over all of it.
    """

    def __init__(self, layer: QuantizedLinear, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        if layer.activation == "swiglu":
            raise ValueError(f"{name}: layer: got activation 'swiglu', expected one that takes each output by itself")
        rows = _part(layer.out_features, group, name, "out_features")
        weight = layer.weight
        zeros = None if weight.zeros is None else weight.zeros[rows].clone()
        meaning = (weight.input_scale, weight.scheme, weight.group_size, weight.in_features)
        part = QuantizedWeight(weight.codes[rows].clone(), weight.scales[rows].clone(), zeros, *meaning)
        bias = None if layer.bias is None else layer.bias[rows]
        self.group = group
        self.part = QuantizedLinear.from_weight(part, bias, layer.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(_CopyToAll.apply(x, self.group))  # type: ignore[no-any-return, no-untyped-call]


class RowParallelQuantizedLinear(nn.Module):
    """A quantized layer on this process's inputs: ``[..., K / W]`` to the whole ``[..., N]``, on every process.

    Args:
        layer: the whole layer, the same on every process; it is not needed afterwards.
        group: the processes. Default: all.

    Raises:
        ValueError: ``K / W`` is not a whole number of groups and bytes, the scheme quantizes the input (whose scale is
            that of the whole row), or the layer has an activation, which cannot come before the sum.
    """

    def __init__(self, layer: QuantizedLinear, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        name = type(self).__name__
        weight = layer.weight
        if layer.activation is not None:
            raise ValueError(f"{name}: layer: got activation {layer.activation!r}, expected none")
        if weight.spec.quantizes_input:
            raise ValueError(f"{name}: layer: got scheme {weight.scheme}, expected one that takes the input as it is")
        per_byte = 8 // weight.spec.code.bits
        unit = per_byte if weight.group_size == -1 else weight.group_size
        columns = _part(weight.in_features, group, name, "in_features", unit)
        taken = slice(columns.start // per_byte, columns.stop // per_byte)
        by_groups = slice(columns.start // unit, columns.stop // unit)
        groups = slice(None) if weight.group_size == -1 else by_groups
        zeros = None if weight.zeros is None else weight.zeros[:, groups].clone()
        part = QuantizedWeight(
            weight.codes[:, taken].clone(), weight.scales[:, groups].clone(), zeros, None, weight.scheme,
            weight.group_size, columns.stop - columns.start,
        )  # fmt: skip
        self.group = group
        self.part = QuantizedLinear.from_weight(part)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SumOfAll.apply(self.part(x), self.group)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias
