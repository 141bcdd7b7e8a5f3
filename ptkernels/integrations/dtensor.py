"""Operators on ``torch.distributed.tensor.DTensor``: which cuts of its operands each takes as it is.

Nothing has to be registered or imported: an operator whose first tensor is a DTensor comes here, and plain tensors
beside it count as the same on every process. For every dimension of the mesh the cut is taken that moves the fewest
bytes; what does not fit it is moved, every process computes its own part, and the parts are put together as a DTensor
again. The gradients follow from that: an operand that was whole while others were cut has a gradient that is a sum over
the processes.

    operator              cut along                                   what happens to the rest
    attention             batch, heads (groups of them)
    attention_varlen      heads (groups of them)
    rotary_embedding      batch, heads, tokens (with ``positions``)
    conv_bn_relu          batch, output channels                      statistics of a batch are those of all processes
    quantized_linear      rows of the input, outputs, inputs          cut inputs: a sum, in whole groups of scales
    quantized_embedding   indices
    packed_rnn            batch, where it is padded

Where a size is not a multiple of the number of processes, along other dimensions, and where attention has dropout
(which depends on where a weight is), every process computes the whole.

``torch.distributed.tensor.experimental.register_sharding`` says less: its rules are remembered without regard to the
flags of a call (``training``), and cannot change the sizes among its arguments (``batch_size``, ``in_features``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Operands = Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """One way to divide a call among processes."""

    operands: Mapping[str, int]
    """Dimension that each operand is cut along; the others are whole."""
    results: tuple[Placement, ...]
    units: int
    """How many equal parts there may be: a divisor of it."""


def _sizes_of(tensors: Operands, dims: Mapping[str, int]) -> int:
    """The greatest number that divides all the sizes that are cut."""
    return math.gcd(*[tensors[name].size(dim) for name, dim in dims.items()])


@dataclass
class Plan:
    """What was decided for a call: the cut of every dimension of the mesh, None where every process does the same."""

    mesh: DeviceMesh
    cuts: list[Cut | None]

    @classmethod
    def of(cls, op: str, operands: Operands, cuts: Sequence[Cut], kept: Sequence[str] = ()) -> Plan:
        """The cheapest; operands named in ``kept`` are written to, and have to stay as they are."""
        sharded = {name: tensor for name, tensor in operands.items() if isinstance(tensor, DTensor)}
        mesh = next(iter(sharded.values())).device_mesh
        for name, tensor in sharded.items():
            if tensor.device_mesh != mesh:
                raise ValueError(
                    f"{op}: {name}: got a DTensor on {tensor.device_mesh}, expected {mesh} like the others"
                )
        for name, tensor in operands.items():
            if isinstance(tensor, Tensor) and name not in sharded and tensor.requires_grad:
                raise ValueError(
                    f"{op}: {name}: got a plain tensor that requires grad among DTensors, expected a DTensor, by which "
                    "its gradient can be summed over the processes"
                )
        plan = cls(mesh, [])
        for mesh_dim in range(mesh.ndim):
            best: tuple[tuple[int, int], Cut | None] | None = None
            for cut in (None, *cuts):
                if cut is not None and cut.units % (mesh.size(mesh_dim) * plan.parts(cut)):
                    continue
                moves = plan._moves(cut, mesh_dim, operands, sharded, kept)
                if moves is not None and (best is None or moves < best[0]):
                    best = moves, cut
            if best is None:
                names = ", ".join(kept)
                raise ValueError(f"{op}: {names}: got placements that fit no other operand's, and they are written to")
            plan.cuts.append(best[1])
        return plan

    def _moves(
        self, cut: Cut | None, mesh_dim: int, operands: Operands, sharded: Mapping[str, DTensor], kept: Sequence[str]
    ) -> tuple[int, int] | None:
        """Bytes to be sent, and operands to be cut from whole ones; None where that is not allowed."""
        sent = divided = 0
        for name, tensor in operands.items():
            if not isinstance(tensor, Tensor):
                continue
            held = sharded[name].placements[mesh_dim] if name in sharded else Replicate()
            wanted = Replicate() if cut is None or name not in cut.operands else Shard(cut.operands[name])
            if held == wanted:
                continue
            if name in kept:
                return None
            if held.is_replicate():
                divided += 1
            else:
                sent += tensor.numel() * tensor.element_size()
        return sent, divided

    def local(self, name: str, tensor: Any) -> Any:
        """This process's part of an operand."""
        if not isinstance(tensor, Tensor):
            return tensor
        placements: list[Placement] = []
        of_gradient: list[Placement] = []
        for mesh_dim, cut in enumerate(self.cuts):
            dim = None if cut is None else cut.operands.get(name)
            if dim is not None and not isinstance(tensor, DTensor):
                tensor = tensor.chunk(self.mesh.size(mesh_dim), dim)[self.mesh.get_local_rank(mesh_dim)]
            placements.append(Replicate() if dim is None else Shard(dim))
            of_gradient.append(Partial() if cut is not None and dim is None else placements[-1])
        if not isinstance(tensor, DTensor):
            return tensor
        part = tensor.redistribute(placements=placements).to_local(grad_placements=of_gradient)
        return part.wait() if hasattr(part, "wait") else part  # communication that may still be under way

    def whole(self, index: int, part: Tensor) -> DTensor:
        """The result of that number, of which every process has a part."""
        placements = [Replicate() if cut is None else cut.results[index] for cut in self.cuts]
        return DTensor.from_local(part, self.mesh, placements, run_check=False)

    def parts(self, cut: Cut) -> int:
        """How many there are along a cut."""
        return math.prod([self.mesh.size(dim) for dim, other in enumerate(self.cuts) if other is cut])

    def is_first(self, cut: Cut) -> bool:
        """Whether this process has the first part along a cut."""
        return all(self.mesh.get_local_rank(dim) == 0 for dim, other in enumerate(self.cuts) if other is cut)


def _run(op: str, function: Callable[..., Any], operands: Operands, cuts: Sequence[Cut], **options: Any) -> Any:
    """A function of operands, one result or several, part by part."""
    plan = Plan.of(op, operands, cuts)
    found = function(**{name: plan.local(name, tensor) for name, tensor in operands.items()}, **options)
    if isinstance(found, Tensor):
        return plan.whole(0, found)
    return tuple(plan.whole(index, part) for index, part in enumerate(found))


def attention(operands: Operands, options: Mapping[str, Any]) -> Any:
    """:func:`ptkernels.attention`, whose tensors are ``operands``."""
    from ptkernels.ops.attention import attention as function

    # Leading dimensions are counted from the last, since operands that broadcast have fewer.
    behind = {"query": 0, "key": 0, "value": 0, "attn_mask": 0, "alibi_slopes": 2, "sinks": 2, "relative_bias": 1}
    rank = max(operands[name].dim() for name in ("query", "key", "value"))
    cuts = []
    for back in range(3, rank + 1) if not options["dropout_p"] else ():
        dims = {
            name: tensor.dim() - back + behind[name]
            for name, tensor in operands.items()
            if type(tensor).__name__ != "CausalBias"
            and isinstance(tensor, Tensor)
            and tensor.dim() + behind[name] >= back
            and tensor.size(tensor.dim() - back + behind[name]) != 1
        }
        if "query" in dims:
            place = Shard(rank - back)
            cuts.append(Cut(dims, (place, place), _sizes_of(operands, dims)))
    return _run("attention", function, operands, cuts, **options)


def attention_varlen(operands: Operands, options: Mapping[str, Any]) -> Any:
    """:func:`ptkernels.attention_varlen`."""
    from ptkernels.ops.attention_varlen import attention_varlen as function

    cuts = []
    if not options["dropout_p"]:
        dims = dict.fromkeys(("query", "key", "value"), 1)
        dims |= {n: operands[n].dim() - 1 for n in ("alibi_slopes", "sinks") if operands[n] is not None}
        if operands["relative_bias"] is not None:
            dims["relative_bias"] = operands["relative_bias"].dim() - 2
        cuts.append(Cut(dims, (Shard(1), Shard(0)), _sizes_of(operands, dims)))
    return _run("attention_varlen", function, operands, cuts, **options)


def rotary_embedding(operands: Operands, options: Mapping[str, Any]) -> Any:
    """:func:`ptkernels.rotary_embedding`."""
    from ptkernels.ops.rotary_embedding import rotary_embedding as function

    positions = operands["positions"]
    cuts = []
    for dim in range(3):
        dims = {"query": dim, "key": dim}
        if positions is None and dim == 2:
            continue
        if positions is not None and (dim == 2 or (dim == 0 and positions.dim() == 2)):
            dims["positions"] = positions.dim() - 1 if dim == 2 else 0
        cuts.append(Cut(dims, (Shard(dim), Shard(dim)), _sizes_of(operands, dims)))
    return _run("rotary_embedding", function, operands, cuts, **options)


def conv_bn_relu(operands: Operands, options: Mapping[str, Any], transposed: bool = False) -> Tensor:
    """:func:`ptkernels.conv_bn_relu`, or :func:`ptkernels.conv_transpose_bn_relu`."""
    import ptkernels

    function: Callable[..., Tensor] = ptkernels.conv_transpose_bn_relu if transposed else ptkernels.conv_bn_relu
    # Statistics of images need nothing of other images; of groups, all the channels of one.
    training = options["training"] and options["norm"] == "batch"
    given = {name: tensor for name, tensor in operands.items() if tensor is not None}
    batch: dict[str, int] = {name: 0 for name in ("input", "residual") if name in given}
    channels: dict[str, int] = {name: 0 for name in given if name not in batch} | (
        {"residual": 1} if "residual" in given else {}
    )
    if transposed:
        channels["weight"] = 1
    by_batch = Cut(batch, (Shard(0),), _sizes_of(operands, batch))
    by_channel = Cut(channels, (Shard(1),), _sizes_of(operands, channels) if options["groups"] == 1 else 1)
    if training and isinstance(operands["input"], DTensor) and Shard(0) in operands["input"].placements:
        return _normalize_whole_batch(operands, options, transposed)
    written = [name for name in ("running_mean", "running_var") if training and name in given]
    cuts = [] if training else [by_batch]
    cuts += [] if options["norm"] == "group" else [by_channel]
    plan = Plan.of(function.__name__, operands, cuts, written)
    return plan.whole(0, function(**{name: plan.local(name, t) for name, t in operands.items()}, **options))


def _normalize_whole_batch(operands: Operands, options: Mapping[str, Any], transposed: bool) -> Tensor:
    """The convolution cut along the batch; the statistics, and what waits for them, are torch's own on DTensors."""
    from ptkernels.ops.conv_bn_relu import reference, replays_forward

    options = dict(options)
    activation, momentum, eps = options.pop("activation"), options.pop("momentum"), options.pop("eps")
    names = ("input", "weight", "bias")
    nothing = dict.fromkeys(set(operands) - set(names))
    plain = {**options, "training": False, "activation": "none", "momentum": momentum, "eps": eps}
    narrow = conv_bn_relu({**{name: operands[name] for name in names}, **nothing}, plain, transposed)
    z = narrow.to(reference.compute_dtype(narrow.dtype))
    mean, var = reference.batch_statistics(z)
    u = reference.normalize(z, operands["bn_weight"], operands["bn_bias"], mean, var, eps)
    running = (operands["running_mean"], operands["running_var"])
    if running[0] is not None and not replays_forward():
        count = reference.values_per_channel(z)
        if not isinstance(running[0], DTensor):
            mean, var = (statistic.detach().full_tensor() for statistic in (mean, var))  # type: ignore[attr-defined]
        reference.update_statistics(*running, mean, var, count, momentum)
    if operands["residual"] is not None:
        u = u + operands["residual"]
    return reference.ACTIVATIONS[activation](u, options["negative_slope"]).to(narrow.dtype)


def quantized_linear(operands: Operands, weight: Any, counts: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """:func:`ptkernels.quantized_linear`; ``operands`` are x, bias, residual and the tensors of ``weight``."""
    from ptkernels.ops.quantized_matmul import quantized_linear as function

    x = operands["x"]
    last = x.dim() - 1
    given = {name for name, tensor in operands.items() if tensor is not None}
    stored: dict[str, int] = {name: 0 for name in ("codes", "scales", "zeros") if name in given}
    dims: dict[str, int]
    cuts: list[Cut] = []
    by_inputs = None
    if counts is None:
        for dim in range(last):
            dims = {name: dim for name in ("x", "residual") if name in given}
            cuts.append(Cut(dims, (Shard(dim),), x.size(dim)))
        if options["activation"] != "swiglu":
            dims = stored | {n: d for n, d in (("bias", 0), ("residual", last)) if n in given}
            cuts.append(Cut(dims, (Shard(last),), weight.out_features))
        if options["activation"] is None and not weight.spec.quantizes_input:
            unit = codes_in_whole_bytes(weight) if weight.group_size == -1 else weight.group_size
            dims = {"x": last, "codes": 1}
            if weight.group_size != -1:
                dims |= {name: 1 for name in ("scales", "zeros") if name in given}
            units = weight.in_features // unit if weight.in_features % unit == 0 else 1
            by_inputs = Cut(dims, (Partial(),), units)
            cuts.append(by_inputs)
    plan = Plan.of("quantized_linear", operands, cuts)
    local = {name: plan.local(name, tensor) for name, tensor in operands.items()}
    in_features = weight.in_features
    if by_inputs is not None and by_inputs in plan.cuts:
        in_features //= plan.parts(by_inputs)
        if not plan.is_first(by_inputs):  # what is added is added once
            local |= {name: local[name] * 0 for name in ("bias", "residual") if name in given}
    names = ("codes", "scales", "zeros", "input_scale")
    part = replace(weight, **{name: local.pop(name) for name in names}, in_features=in_features)
    return plan.whole(0, function(local.pop("x"), part, **local, counts=counts, **options))


def codes_in_whole_bytes(weight: Any) -> int:
    """The least number of a quantized weight's codes that fill whole bytes."""
    bits = weight.spec.code.bits
    return 8 // math.gcd(8, bits)


def quantized_embedding(indices: Tensor, weight: Any, dtype: torch.dtype) -> Tensor:
    """:func:`ptkernels.quantized_embedding`."""
    from ptkernels.ops.quantized_matmul import quantized_embedding as function

    names = ("codes", "scales", "zeros")
    operands = {"input": indices, **{name: getattr(weight, name) for name in names}}
    cuts = [Cut({"input": dim}, (Shard(dim),), indices.size(dim)) for dim in range(indices.dim())]
    plan = Plan.of("quantized_embedding", operands, cuts)
    local = {name: plan.local(name, tensor) for name, tensor in operands.items()}
    table = replace(weight, **{name: local[name] for name in names})
    return plan.whole(0, function(local["input"], table, dtype=dtype))


def packed_rnn(
    op: str, args: Sequence[Any], recompute: bool, all_cells: bool, options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """One recurrent layer, with the arguments of the operator."""
    from ptkernels.ops.packed_rnn.layer import run_layer
    from ptkernels.ops.packed_rnn.reference import has_cells

    input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional = args
    states = {f"state {index}": tensor for index, tensor in enumerate(state)}
    weights = {f"parameter {index}": tensor for index, tensor in enumerate(params)}
    operands = {"input": input, "sizes": sizes, **states, **weights}
    cuts = []
    if layout in ("time_first", "batch_first"):
        dim = 0 if layout == "batch_first" else 1
        dims = {"input": dim, **dict.fromkeys(states, 1), **({} if sizes is None else {"sizes": 0})}
        # Without cells the third result is empty.
        cells = Shard(1) if has_cells(mode) else Replicate()
        cuts.append(Cut(dims, (Shard(dim), Shard(1), cells), batch_size))
    plan = Plan.of(op, operands, cuts)
    local = {name: plan.local(name, tensor) for name, tensor in operands.items()}
    for cut in cuts:
        batch_size //= plan.parts(cut)
    lists = [local[name] for name in states], [local[name] for name in weights]
    place = (batch_size, layout, mode, bidirectional)
    local_args = (local["input"], local["sizes"], sorted_indices, *lists, *place)
    results = run_layer(op, local_args, recompute, all_cells, options)
    output, h_n, c_n = (plan.whole(index, part) for index, part in enumerate(results))
    return output, h_n, c_n
