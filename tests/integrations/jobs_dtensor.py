"""Calls of operators whose tensors may be distributed: what test_dtensor.py compares with whole ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import ptkernels as ptk

WHOLE = Replicate()


class Operand(NamedTuple):
    shape: tuple[int, ...]
    placement: Placement | None = WHOLE
    """None for a plain tensor that needs no gradient."""


class Case(NamedTuple):
    call: Callable[..., Any]
    operands: dict[str, Operand]
    placements: tuple[Placement, ...]
    """Of the results."""


def positive(tensor: Tensor) -> Tensor:
    return tensor.abs() + 0.5


def attention(batch: int, heads: Placement, kv: Placement, result: Placement, **others: Operand) -> Case:
    options = {"is_causal": True, "enable_gqa": True, "softcap": 3.0, "return_lse": True}
    operands = {
        "query": Operand((batch, 8, 5, 6), heads),
        "key": Operand((batch, 4, 7, 6), kv),
        "value": Operand((batch, 4, 7, 3), kv),
    }
    return Case(partial(ptk.attention, **options), operands | others, (result, result))


def convolution(input: Placement, weight: Placement, result: Placement, training: bool = False) -> Case:
    def call(input: Tensor, running_mean: Tensor, running_var: Tensor, **tensors: Tensor) -> tuple[Tensor, ...]:
        running = (running_mean.detach(), positive(running_var.detach()))
        options = {"training": training, "padding": 1, "activation": "silu"}
        out = ptk.conv_bn_relu(input, running_mean=running[0], running_var=running[1], **tensors, **options)
        return out, *running

    vectors = {name: Operand((8,), weight) for name in ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")}
    operands = {"input": Operand((8, 3, 5, 6), input), "weight": Operand((8, 3, 3, 3), weight), **vectors}
    residual = Operand((8, 8, 5, 6), Shard(1) if weight == Shard(0) else input)
    return Case(call, operands | {"residual": residual}, (result, weight, weight))


def of_images(input: Placement, weight: Placement, result: Placement, transposed: bool = False, **norm: Any) -> Case:
    """With statistics of every image; the channels of a transposed convolution's result are its weight's second."""

    def call(**tensors: Tensor) -> Tensor:
        function = ptk.conv_transpose_bn_relu if transposed else ptk.conv_bn_relu
        return function(**tensors, **norm, activation="silu", pre_activation="tanh")

    rows = Shard(1) if transposed and weight == Shard(0) else weight
    vectors = {name: Operand((8,), weight) for name in ("bias", "bn_weight", "bn_bias")}
    operands = {"input": Operand((8, 3, 5, 6), input)}
    operands["weight"] = Operand((3, 8, 3, 3) if transposed else (8, 3, 3, 3), rows)
    return Case(call, operands | vectors, (result,))


def quantized(scheme: str, x: Placement, stored: Placement, result: Placement, activation: str | None = None) -> Case:
    def call(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        numbers = torch.randn(8, 128, generator=torch.Generator().manual_seed(3))
        weight = ptk.quantize_weight(numbers, scheme, 16, symmetric="int4" not in scheme)
        if isinstance(x, DTensor):
            for name in ("codes", "scales", "zeros"):
                if (tensor := getattr(weight, name)) is not None:
                    setattr(weight, name, distribute_tensor(tensor, x.device_mesh, [stored]))
        return ptk.quantized_linear(x, weight, bias, residual=residual, activation=activation)

    bias = Operand((8,), Shard(0) if stored == Shard(0) else WHOLE)
    residual = Operand((4, 3, 8), Shard(2) if stored == Shard(0) else x if result == x else WHOLE)
    return Case(call, {"x": Operand((4, 3, 128), x), "bias": bias, "residual": residual}, (result,))


def recurrent(kind: str, placement: Placement, layers: int = 2) -> Case:
    def call(x: Tensor, **params: Tensor) -> Any:
        torch.manual_seed(0)
        module = getattr(ptk.nn, kind)(6, 5, layers, batch_first=True, bidirectional=True).double()
        names = dict(module.named_parameters())
        weights = {name: params[name.rpartition("_l")[0]] if "_l0" in name else None for name in names}
        for name, weight in weights.items():
            own = weight if weight is not None else names[name].detach()
            if weight is None and isinstance(x, DTensor):
                own = distribute_tensor(own, x.device_mesh, [WHOLE])
            weights[name] = own
        options = {"lengths": torch.tensor([4, 1, 0, 3]), "return_all_states": True}
        out, state, states = torch.func.functional_call(module, weights, (x,), options)
        cells = [own[1] for own in states if isinstance(own, tuple)]
        return out, *(state if isinstance(state, tuple) else (state,)), *cells

    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * 5
    shapes = {"weight_ih": (gates, 6), "weight_hh": (gates, 5), "bias_ih": (gates,), "bias_hh": (gates,)}
    operands = {"x": Operand((4, 4, 6), placement)} | {name: Operand(shape) for name, shape in shapes.items()}
    state = Shard(1) if placement == Shard(0) else WHOLE
    return Case(call, operands, (placement, state, *((state, *[placement] * layers) if kind == "LSTM" else ())))


def rotary(cut: Placement, positions: bool) -> Case:
    def call(query: Tensor, key: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.3, 0.1])).double()
        places = torch.arange(8).flip(0).expand(4, -1) if positions else None
        norm = {"query_norm_weight": weight, "key_norm_weight": weight}
        return ptk.rotary_embedding(query, key, angles.cos(), angles.sin(), positions=places, **norm)

    operands = {"query": Operand((4, 8, 8, 6), cut), "key": Operand((4, 4, 8, 6), cut), "weight": Operand((6,))}
    return Case(call, operands, (cut, cut))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    cu_seqlens = torch.tensor([0, 3, 3, 9])
    return ptk.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, is_causal=True, sinks=sinks)


def embedding(x: Tensor) -> Tensor:
    """Rows that are looked up where ``x`` says, times ``x``, since an index has no gradient."""
    generator = torch.Generator().manual_seed(3)
    table = ptk.quantize_weight(torch.randn(16, 8, generator=generator), "int8_weight_only")
    return ptk.quantized_embedding((x.detach().abs() * 4).long(), table, dtype=torch.float64) * x.unsqueeze(-1)


MASK = Operand((1, 8, 5, 7), Shard(1))
CASES: dict[str, Case] = {
    "attention, heads": attention(2, Shard(1), Shard(1), Shard(1)),
    "attention, batch": attention(4, Shard(0), Shard(0), Shard(0)),
    "attention, batch, plain mask": attention(4, Shard(0), Shard(0), Shard(0), attn_mask=Operand((4, 1, 1, 7), None)),
    "attention, heads, bias": attention(2, Shard(1), Shard(1), Shard(1), attn_mask=MASK, sinks=Operand((8,), Shard(0))),
    "attention, heads of queries alone": attention(2, Shard(1), WHOLE, Shard(1), alibi_slopes=Operand((8,))),
    "attention, distances": attention(2, Shard(1), Shard(1), Shard(1), relative_bias=Operand((8, 11), Shard(0))),
    "attention, batch, one bias": attention(4, Shard(0), Shard(0), Shard(0), attn_mask=Operand((8, 5, 7))),
    "attention, whole": attention(2, WHOLE, WHOLE, WHOLE),
    "attention, tokens": attention(2, Shard(2), Shard(2), WHOLE),
    "attention, indivisible batch": attention(3, Shard(0), Shard(0), WHOLE),
    "attention_varlen": Case(
        packed_attention,
        {
            "query": Operand((9, 8, 6), Shard(1)),
            "key": Operand((9, 4, 6), Shard(1)),
            "value": Operand((9, 4, 3), Shard(1)),
            "sinks": Operand((8,), Shard(0)),
        },
        (Shard(1),),
    ),
    "rotary, batch": rotary(Shard(0), positions=True),
    "rotary, heads": rotary(Shard(1), positions=False),
    "rotary, tokens": rotary(Shard(2), positions=True),
    "convolution, batch": convolution(Shard(0), WHOLE, Shard(0)),
    "convolution, channels": convolution(WHOLE, Shard(0), Shard(1)),
    "convolution, training, batch": convolution(Shard(0), WHOLE, Shard(0), training=True),
    "convolution, training, channels": convolution(WHOLE, Shard(0), Shard(1), training=True),
    "convolution, training, whole": convolution(WHOLE, WHOLE, WHOLE, training=True),
    "group norm, batch": of_images(Shard(0), WHOLE, Shard(0), norm="group", num_groups=2),
    "group norm, whole": of_images(WHOLE, WHOLE, WHOLE, norm="group", num_groups=2),
    "instance norm, channels": of_images(WHOLE, Shard(0), Shard(1), norm="instance"),
    "transposed, batch": of_images(Shard(0), WHOLE, Shard(0), True, norm="instance"),
    "transposed, channels": of_images(WHOLE, Shard(0), Shard(1), True, norm="instance"),
    "quantized, rows": quantized("int4_weight_only", Shard(0), WHOLE, Shard(0), "gelu"),
    "quantized, outputs": quantized("int8_dynamic", WHOLE, Shard(0), Shard(2), "silu"),
    "quantized, inputs": quantized("int4_weight_only", Shard(2), Shard(1), Partial()),
    "quantized, inputs, 3 bits": quantized("int3_weight_only", Shard(2), Shard(1), Partial()),
    "quantized, swiglu": quantized("int8_weight_only", WHOLE, Shard(0), WHOLE, "swiglu"),
    "quantized_embedding": Case(embedding, {"x": Operand((4, 8), Shard(1))}, (Shard(1),)),
    "LSTM, batch": recurrent("LSTM", Shard(0)),
    "GRU, batch": recurrent("GRU", Shard(0)),
    "RNN, whole": recurrent("RNN", WHOLE),
}


def run(name: str) -> tuple[list[Tensor], list[Placement]]:
    """Results and gradients, in full, and how the results were placed; distributed where there is a group."""
    case = CASES[name]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if dist.is_initialized() else None
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given, leaves = {}, []
    for key, (shape, placement) in case.operands.items():
        tensor = draw(shape)
        if placement is None:
            given[key] = tensor > -1.0
            continue
        if mesh is not None:
            tensor = distribute_tensor(tensor, mesh, [placement])
        given[key] = tensor.requires_grad_()
        leaves.append(tensor)
    found = case.call(**given)
    found = found if isinstance(found, tuple) else (found,)
    full = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in found]
    sum((tensor * draw(tensor.shape)).sum() for tensor in full).backward()
    grads = [torch.zeros(leaf.shape) if leaf.grad is None else leaf.grad for leaf in leaves]
    full += [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in grads]
    return [tensor.detach() for tensor in full], [t.placements[0] for t in found if isinstance(t, DTensor)]


JOBS: dict[str, Callable[[], Any]] = {name: partial(run, name) for name in CASES}
