"""Layers split among the processes of a group (Shoeybi et al., *Megatron-LM*, 2019).

    column   every process has some rows of W (outputs):   y_r = x W_r^T          x whole, y split
    row      every process has some columns of W (inputs): y = sum_r x_r W_r^T    x split, y whole, one all-reduce
    heads    every process has some heads: column-parallel projections, attention, a row-parallel one

A column-parallel layer followed by a row-parallel one needs no communication between them. Codes are split where they
are stored, so every process multiplies exactly the codes of the whole layer.

The styles are what ``torch.distributed.tensor.parallel`` has for ``nn.Linear`` (``ColwiseParallel``,
``RowwiseParallel``), for our modules, and go into the same plan::

    plan = {"self_attn": HeadwiseParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    parallelize_module(ptk.nn.TransformerEncoderLayer(512, 8), mesh, plan)

The modules ``ColumnParallelQuantizedLinear`` and ``RowParallelQuantizedLinear`` need a process group and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ptkernels.nn import MultiheadAttention, QuantizedLinear
from ptkernels.ops.quantized_matmul import QuantizedWeight

__all__ = [
    "ColumnParallelQuantizedLinear",
    "HeadwiseParallel",
    "QuantizedColwiseParallel",
    "QuantizedRowwiseParallel",
    "RowParallelQuantizedLinear",
]


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


def _check_size(op: str, name: str, size: int, world: int, unit: int = 1) -> None:
    if size % (world * unit):
        raise ValueError(f"{op}: {name}: got {size}, expected a multiple of {world * unit} ({world} processes)")


def _part(size: int, group: dist.ProcessGroup | None, op: str, name: str, unit: int = 1) -> slice:
    """This process's range of ``size``, whole units of which go to each."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    _check_size(op, name, size, world, unit)
    step = size // world
    return slice(rank * step, (rank + 1) * step)


def _check_columns(op: str, layer: QuantizedLinear) -> None:
    if layer.activation == "swiglu":
        raise ValueError(f"{op}: layer: got activation 'swiglu', expected one that takes each output by itself")


def _check_rows(op: str, layer: QuantizedLinear) -> None:
    if layer.activation is not None:
        raise ValueError(f"{op}: layer: got activation {layer.activation!r}, expected none")
    if layer.weight.spec.quantizes_input:
        raise ValueError(f"{op}: layer: got scheme {layer.scheme}, expected one that takes the input as it is")


def _row_unit(layer: QuantizedLinear) -> int:
    """Inputs that cannot be separated: those of a group of scales, or of the codes that fill whole bytes."""
    bits = layer.weight.spec.code.bits
    return 8 // math.gcd(8, bits) if layer.group_size == -1 else layer.group_size


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
        _check_columns(name, layer)
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
        _check_rows(name, layer)
        unit = _row_unit(layer)
        columns = _part(weight.in_features, group, name, "in_features", unit)
        taken = slice(*(edge * weight.spec.code.bits // 8 for edge in (columns.start, columns.stop)))
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


class _InOut(ParallelStyle):
    """A style of modules from one tensor to one tensor, in what layouts they come and go."""

    def __init__(self, input_layout: Placement, output_layout: Placement, use_local_output: bool) -> None:
        super().__init__()
        self.input_layout, self.output_layout = input_layout, output_layout
        self.use_local_output = use_local_output

    def _surround(self, module: nn.Module, mesh: DeviceMesh, wanted: Placement) -> nn.Module:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not isinstance(x, DTensor):
                x = DTensor.from_local(x, mesh, [self.input_layout], run_check=False)
            return (x.redistribute(placements=[wanted]), *args[1:])

        def leave(module: nn.Module, args: Any, out: Any) -> Any:
            out = out.redistribute(placements=[self.output_layout])
            return out.to_local() if self.use_local_output else out

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def _distribute(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Parameters and buffers of those names as DTensors."""
    for name, placement in placements.items():
        tensor = getattr(module, name)
        if tensor is None:
            continue
        spread = distribute_tensor(tensor.detach(), mesh, [placement])
        if name in module._parameters:
            setattr(module, name, nn.Parameter(spread, requires_grad=tensor.requires_grad))
        else:
            setattr(module, name, spread)


class QuantizedColwiseParallel(_InOut):
    """``ColwiseParallel`` for :class:`ptkernels.nn.QuantizedLinear`: every process has some of the outputs.

    Args:
        input_layout: of inputs that are no DTensors. Default: ``Replicate()``.
        output_layout: of the output. Default: ``Shard(-1)``.
        use_local_output: give this process's part as a plain tensor instead of a DTensor.

    Raises:
        TypeError: the module is another.
        ValueError: it cannot be split, as for :class:`ColumnParallelQuantizedLinear`.
    """

    def __init__(
        self, *, input_layout: Placement | None = None, output_layout: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(input_layout or Replicate(), output_layout or Shard(-1), use_local_output)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quantized("QuantizedColwiseParallel", module)
        _check_columns("QuantizedColwiseParallel", layer)
        _check_size("QuantizedColwiseParallel", "out_features", layer.out_features, device_mesh.size())
        spread: dict[str, Placement] = dict.fromkeys(("codes", "scales", "zeros", "bias"), Shard(0))
        _distribute(layer, device_mesh, spread | {"input_scale": Replicate()})
        return self._surround(layer, device_mesh, Replicate())


class QuantizedRowwiseParallel(_InOut):
    """``RowwiseParallel`` for :class:`ptkernels.nn.QuantizedLinear`: every process has some of the inputs.

    Args:
        input_layout: of inputs that are no DTensors. Default: ``Shard(-1)``.
        output_layout: of the output. Default: ``Replicate()``.
        use_local_output: give a plain tensor instead of a DTensor.

    Raises:
        TypeError: the module is another.
        ValueError: it cannot be split, as for :class:`RowParallelQuantizedLinear`.
    """

    def __init__(
        self, *, input_layout: Placement | None = None, output_layout: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(input_layout or Shard(-1), output_layout or Replicate(), use_local_output)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _quantized("QuantizedRowwiseParallel", module)
        _check_rows("QuantizedRowwiseParallel", layer)
        world, unit = device_mesh.size(), _row_unit(layer)
        _check_size("QuantizedRowwiseParallel", "in_features", layer.in_features, world, unit)
        by_groups = Replicate() if layer.group_size == -1 else Shard(1)
        spread: dict[str, Placement] = {"codes": Shard(1), "scales": by_groups, "zeros": by_groups, "bias": Replicate()}
        _distribute(layer, device_mesh, spread)
        return self._surround(layer, device_mesh, Shard(-1))


def _quantized(style: str, module: nn.Module) -> QuantizedLinear:
    if not isinstance(module, QuantizedLinear):
        raise TypeError(f"{style}: module: got {type(module).__name__}, expected ptkernels.nn.QuantizedLinear")
    return module


class HeadwiseParallel(ParallelStyle):
    """Every process has some heads of a :class:`ptkernels.nn.MultiheadAttention`, whole tokens in and out.

    The three input projections become separate parameters, ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight``,
    as in layers with unequal sizes; so the ``state_dict`` has these in place of ``in_proj_weight``.

    Raises:
        TypeError: the module is another.
        ValueError: the number of heads is not a multiple of the number of processes.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MultiheadAttention):
            kind = type(module).__name__
            raise TypeError(f"HeadwiseParallel: module: got {kind}, expected ptkernels.nn.MultiheadAttention")
        _check_size("HeadwiseParallel", "num_heads", module.num_heads, device_mesh.size())
        if module._qkv_same_embed_dim:
            packed = module.in_proj_weight
            for name, part in zip("qkv", packed.detach().chunk(3), strict=True):
                setattr(module, f"{name}_proj_weight", nn.Parameter(part.clone(), packed.requires_grad))
            module.in_proj_weight = None  # type: ignore[assignment]
            module._qkv_same_embed_dim = False
        spread: dict[str, Placement] = {f"{name}_proj_weight": Shard(0) for name in "qkv"}
        _distribute(module, device_mesh, spread | {n: Replicate() for n in ("in_proj_bias", "bias_k", "bias_v")})
        _distribute(module.out_proj, device_mesh, {"weight": Shard(1), "bias": Replicate()})

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            whole: dict[int, DTensor] = {}  # one tensor in several places stays one

            def as_whole(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                if not isinstance(value, DTensor):
                    value = whole.setdefault(
                        id(value), DTensor.from_local(value, device_mesh, [Replicate()], run_check=False)
                    )
                return value.redistribute(placements=[Replicate()])

            return tuple(map(as_whole, args)), {name: as_whole(value) for name, value in kwargs.items()}

        def leave(module: nn.Module, args: Any, results: Any) -> Any:
            return tuple(
                None if result is None else result.redistribute(placements=[Replicate()]).to_local()
                for result in results
            )

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
        return module
