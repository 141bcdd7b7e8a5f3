"""What the Triton kernels of every operator are launched with, for compiling them where there is no GPU.

Tensors are on the meta device: launches depend on shapes alone. Every tile of a table is launched once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ptkernels import _triton


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def with_every_tile(arch: int, module: Any, tables: tuple[str, ...], launch: Callable[[Any], None]) -> list[Any]:
    """The launches that ``launch(recorder)`` makes for an architecture, with each tile that the tables hold in turn."""
    from ptkernels._triton.compiling import Recorder

    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "arch_of", lambda tensor: arch)
        originals = {name: getattr(module, name) for name in tables}
        longest = 1

        def pick(table: Any, index: int, *args: Any) -> list[Any]:
            nonlocal longest
            found: list[Any] = table(*args)
            longest = max(longest, len(found))
            return found[index:] or found

        index = 0
        while index < longest:
            for name, table in originals.items():
                patch.setattr(module, name, lambda *args, table=table, index=index: pick(table, index, *args))
            launch(recorder)
            index += 1
    return recorder.launches


def packed_attention(arch: int, dim: int) -> list[Any]:
    from ptkernels.ops.attention import triton as module

    query, key = meta(4096, 16, dim), meta(4096, 4, dim)
    offsets = meta(9, dtype=torch.int32)
    bounds = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": 1024, "max_seqlen_k": 1024}
    call = module.Call(is_causal=True, bottom_right=True, **bounds)

    def launch(recorder: Any) -> None:
        out, lse = module.varlen_forward(query, key, key, call, recorder)
        module.varlen_backward(out, None, query, key, key, out, lse, call, wrap=recorder)

    return with_every_tile(arch, module, ("tiles",), launch)


def attention(arch: int, dim: int, dim_v: int, dtype: torch.dtype, options: str) -> list[Any]:
    from ptkernels.ops.attention import triton as module

    query = meta(2, 1024, 16, dim, dtype=dtype).transpose(1, 2)
    key = meta(2, 1024, 4, dim, dtype=dtype).transpose(1, 2)
    value = meta(2, 1024, 4, dim_v, dtype=dtype).transpose(1, 2)
    mask, call = None, module.Call(is_causal=True)
    if options == "all":
        mask = meta(1, 16, 1024, 1024, dtype=dtype)
        call = module.Call(
            is_causal=True,
            softcap=30.0,
            alibi_slopes=meta(16, dtype=torch.float32),
            sinks=meta(16, dtype=torch.float32),
            dropout_seed=meta(dtype=torch.int64),
            dropout_p=0.1,
            window_left=100,
            bottom_right=True,
        )

    elif options == "blocks":
        mask, call = meta(1, 1, 16, 16, dtype=torch.bool), module.Call(mask_block_size=64)

    def launch(recorder: Any) -> None:
        out, lse = module.forward(query, key, value, mask, call, recorder)
        module.backward(out, None, query, key, value, out, lse, mask, call, wrap=recorder)

    return with_every_tile(arch, module, ("tiles",), launch)


def decode(arch: int, dim: int, query_dtype: torch.dtype = torch.bfloat16) -> list[Any]:
    from ptkernels._triton.compiling import Recorder
    from ptkernels.ops.attention.triton_decode import Cache, Rotary, append
    from ptkernels.ops.attention.triton_decode import decode as run

    recorder = Recorder()
    ints, slopes, query = meta(8, 128, dtype=torch.int32), meta(32, dtype=torch.float32), meta(8, 32, 1, dim)
    query, new = query.to(query_dtype), meta(8, 8, 1, dim, dtype=query_dtype)
    rotary = Rotary(*(meta(8192, dim // 2, dtype=torch.float32) for _ in range(2)), interleaved=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "arch_of", lambda tensor: arch)
        codes = () if query_dtype == torch.float32 else (torch.int8, torch.float8_e4m3fn)
        for dtype in (query_dtype, *codes):
            keys = meta(1024, 64, 8, dim, dtype=dtype).transpose(1, 2)
            scale = None if dtype == query_dtype else meta(1024, 8, 64, dtype=torch.float32)
            cache = Cache(keys, keys, ints[:, 0], ints, None, None, scale, scale)
            append(new, keys, scale, cache, rotary, recorder)
            run(query, cache, added=1, window_right=0, rotary=rotary, wrap=recorder)
        every: Any = {"window_left": 99, "softcap": 5.0, "alibi_slopes": slopes, "sinks": slopes}
        run(query, cache, added=1, window_right=0, rotary=rotary, **every, wrap=recorder)
        run(query.expand(8, 32, 16, dim), cache, window_right=0, wrap=recorder)  # a chunk of a prefill
    return recorder.launches


def linear(
    arch: int, rows: int, scheme: str, group: int = -1, dtype: torch.dtype = torch.bfloat16, experts: int = 0
) -> list[Any]:
    from ptkernels.ops.quantized_matmul import formats
    from ptkernels.ops.quantized_matmul import triton as module

    spec, n, k = formats.SCHEMES[scheme], 4096, 4096
    stored = n * max(experts, 1)
    codes = meta(stored, spec.code.row_bytes(k), dtype=spec.code.dtype)
    scales = meta(stored, formats.group_count(k, group), dtype=torch.float32)
    zeros = scales if scheme == "int2_weight_only" else None
    counts = meta(experts, dtype=torch.int64) if experts else None

    def launch(recorder: Any) -> None:
        weight = (codes, scales, zeros)
        options = (spec.code.name, group, spec.quantizes_input, None, "silu", None, counts)
        module.linear(meta(rows, k, dtype=dtype), *weight, meta(stored), None, *options, wrap=recorder)
        if not spec.quantizes_input and rows > 16:
            options = (spec.code.name, group, k, counts)
            module.linear_backward(meta(rows, n, dtype=dtype), *weight, *options, wrap=recorder)

    return with_every_tile(arch, module, ("tiles", "dx_tiles"), launch)


def conv(
    arch: int,
    channels: int,
    filters: int,
    taps: int,
    stride: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "relu",
    pre_activation: str = "none",
) -> list[Any]:
    """Forward with statistics of the batch and with given ones, and backward."""
    from ptkernels.ops.conv_bn_relu import triton as module

    def image(*shape: int) -> Tensor:
        return meta(*shape, dtype=dtype).to(memory_format=torch.channels_last)

    x, weight = image(8, channels, 56, 56), image(filters, channels // groups, taps, taps)
    size = (56 - 1) // stride + 1
    residual, vector = image(8, filters, size, size), meta(filters, dtype=torch.float32)
    tensors = (x, weight, None, vector, vector)
    window = ([stride] * 2, [taps // 2] * 2, [1, 1], groups, activation, 0.0)
    variant: Any = (False, None, 0, pre_activation)

    def launch(recorder: Any) -> None:
        given = (*tensors, vector, vector, residual, False, 1e-5, *window, False, *variant)
        module.conv_bn_relu(*given, wrap=recorder)
        of_batch = (*tensors, None, None, residual, True, 1e-5, *window, True, *variant)
        out, z, mean, var = module.conv_bn_relu(*of_batch, wrap=recorder)
        saved: Any = (out, *tensors, mean, var, residual, z, True, 1e-5, *window, (True,) * 6, *variant)
        module.conv_bn_relu_backward(*saved, wrap=recorder)

    return with_every_tile(arch, module, ("tiles", "weight_tiles", "depthwise_tiles"), launch)


def rnn(
    arch: int,
    mode: str,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 32,
    projection: int = 0,
    all_cells: bool = False,
) -> list[Any]:
    from ptkernels.ops.packed_rnn import triton as module
    from ptkernels.ops.packed_rnn.reference import GATES

    rows = GATES[mode] * hidden
    shapes: Any = ((rows, 64), (rows, projection or hidden), (rows,), (rows,))
    if projection:
        shapes = (*shapes, (projection, hidden))
    x, params = meta(2, batch, 64, dtype=dtype), [meta(*shape, dtype=dtype) for shape in shapes * 2]
    layer = (x, None, None, [], params)

    def launch(recorder: Any) -> None:
        options: Any = (batch, "time_first", mode, True)
        out, _, _, gates, cells = module.rnn(*layer, *options, True, False, all_cells, wrap=recorder)
        saved, options = (out, gates, cells), (*options, [True] * (1 + len(params)), all_cells)
        module.rnn_backward(out, None, None, *layer, *saved, *options, wrap=recorder)

    return with_every_tile(arch, module, ("persistent_tiles", "step_tiles"), launch)


def cells(arch: int, mode: str, hidden: int, dtype: torch.dtype = torch.bfloat16, zoneout: bool = False) -> list[Any]:
    from ptkernels.ops.packed_rnn import triton as module
    from ptkernels.ops.packed_rnn.reference import GATES, NORMALISED, has_cells, param_orders

    rows, both = GATES[mode] * hidden, 2
    shapes: dict[str, Any] = {"weight_ih": (rows, 64), "weight_hh": (rows, hidden)}
    shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (rows,))
    shapes |= {"weight_peephole": (3, hidden), "norm_hidden": (2, rows), "norm_cell": (2, hidden)}
    params = [meta(*shapes[name], dtype=dtype) for name in max(param_orders(mode), key=len) if name != "weight_hr"]
    params = (params[:4] if mode == "lstm" else params) * both
    x = meta(2, 32, both * rows if mode in NORMALISED else 64, dtype=dtype)
    layer = (x, None, None, [], params, 32, "time_first", mode, True)
    options = (has_cells(mode), 1e-5, *((0.1, 0.2, meta(dtype=torch.int64)) if zoneout else (0.0, 0.0, None)))

    def launch(recorder: Any) -> None:
        out, _, _, gates, sums = module.rnn(*layer, True, False, *options, wrap=recorder)
        wanted = [True] * (1 + len(params))
        module.rnn_backward(out, None, None, *layer[:5], out, gates, sums, *layer[5:], wanted, *options, wrap=recorder)

    return with_every_tile(arch, module, ("step_tiles",), launch)


def rotary(arch: int, dim: int, pairs: int, dtype: torch.dtype, interleaved: bool, norm: bool) -> list[Any]:
    from ptkernels.ops.rotary_embedding import triton as module

    query, key = (meta(2, 1024, heads, dim, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    table, positions = meta(4096, pairs, dtype=torch.float32), meta(1024, dtype=torch.int64)
    weights = [meta(dim, dtype=dtype) if norm else None for _ in "qk"]
    call = (query, key, table, table, positions, *weights, interleaved, 1e-6)

    def launch(recorder: Any) -> None:
        module.rotary_embedding(*call, wrap=recorder)
        module.rotary_embedding_backward(query, key, *call, [True, True, norm, norm], wrap=recorder)

    return with_every_tile(arch, module, ("tiles",), launch)


def _attention_cases() -> Iterator[tuple[str, Callable[[int], list[Any]]]]:
    for dim, dim_v, dtype, options in (
        (64, 64, torch.bfloat16, "plain"),
        (64, 64, torch.bfloat16, "all"),
        (128, 128, torch.bfloat16, "plain"),
        (128, 128, torch.bfloat16, "blocks"),
        (128, 128, torch.float16, "all"),
        (192, 128, torch.bfloat16, "plain"),
        (256, 256, torch.bfloat16, "all"),
        (512, 512, torch.bfloat16, "plain"),
        (80, 80, torch.float32, "plain"),
        (64, 64, torch.float32, "all"),
        (512, 512, torch.float32, "plain"),
        (64, 64, torch.float64, "plain"),
        (128, 128, torch.float64, "all"),
    ):
        name = f"attention-{dim}-{dim_v}-{str(dtype)[6:]}-{options}"
        yield name, lambda arch, args=(dim, dim_v, dtype, options): attention(arch, *args)


CASES: dict[str, Callable[[int], list[Any]]] = {
    **dict(_attention_cases()),
    "attention-packed": lambda arch: packed_attention(arch, 128),
    "decode-64": lambda arch: decode(arch, 64),
    "decode-128": lambda arch: decode(arch, 128),
    "decode-256": lambda arch: decode(arch, 256),
    "decode-512": lambda arch: decode(arch, 512),
    "decode-float32": lambda arch: decode(arch, 128, torch.float32),
    "decode-512-float32": lambda arch: decode(arch, 512, torch.float32),
    "decode-128-float64": lambda arch: decode(arch, 128, torch.float64),
    "int8-dynamic": lambda arch: linear(arch, 4096, "int8_dynamic"),
    "int4-int8": lambda arch: linear(arch, 4096, "int4_int8", 128),
    "int4": lambda arch: linear(arch, 4096, "int4_weight_only", 128),
    "int4-few-rows": lambda arch: linear(arch, 8, "int4_weight_only", 128),
    "int8-groups": lambda arch: linear(arch, 64, "int8_weight_only", 128),
    "int2-zeros": lambda arch: linear(arch, 64, "int2_weight_only", 32),
    "int3": lambda arch: linear(arch, 64, "int3_weight_only", 64),
    "nf4": lambda arch: linear(arch, 64, "nf4", 64),
    "mxfp4": lambda arch: linear(arch, 64, "mxfp4", 32),
    "fp8": lambda arch: linear(arch, 4096, "fp8"),
    "int4-experts": lambda arch: linear(arch, 4096, "int4_weight_only", 128, experts=8),
    "int8-dynamic-experts": lambda arch: linear(arch, 4096, "int8_dynamic", experts=128),
    "int8-float32": lambda arch: linear(arch, 64, "int8_weight_only", dtype=torch.float32),
    "int4-groups-float64": lambda arch: linear(arch, 64, "int4_weight_only", 48, dtype=torch.float64),
    "int8-dynamic-float64": lambda arch: linear(arch, 64, "int8_dynamic", dtype=torch.float64),
    "conv": lambda arch: conv(arch, 64, 64, 3),
    "conv-stride": lambda arch: conv(arch, 256, 128, 3, stride=2),
    "conv-1x1": lambda arch: conv(arch, 64, 256, 1),
    "conv-stem": lambda arch: conv(arch, 3, 64, 7, stride=2),
    "conv-narrow": lambda arch: conv(arch, 24, 16, 3, activation="mish"),
    "conv-grouped": lambda arch: conv(arch, 128, 128, 3, groups=32, activation="hardswish"),
    "conv-depthwise": lambda arch: conv(arch, 96, 96, 3, groups=96),
    "conv-activated": lambda arch: conv(arch, 144, 36, 1, pre_activation="relu"),
    "conv-depthwise-activated": lambda arch: conv(arch, 96, 96, 3, groups=96, pre_activation="relu"),
    "conv-float32": lambda arch: conv(arch, 64, 64, 3, dtype=torch.float32),
    "conv-float64": lambda arch: conv(arch, 64, 64, 3, dtype=torch.float64, activation="mish"),
    "conv-depthwise-float64": lambda arch: conv(arch, 96, 96, 3, groups=96, dtype=torch.float64, activation="gelu"),
    "conv-activated-float64": lambda arch: conv(arch, 24, 16, 3, dtype=torch.float64, pre_activation="gelu"),
    "conv-stem-float64": lambda arch: conv(arch, 3, 64, 7, stride=2, dtype=torch.float64),
    "lstm-64": lambda arch: rnn(arch, "lstm", 64),
    "lstm-128": lambda arch: rnn(arch, "lstm", 128),
    "lstm-512": lambda arch: rnn(arch, "lstm", 512),
    "lstm-1024-few": lambda arch: rnn(arch, "lstm", 1024, batch=16),
    "lstm-1024-many": lambda arch: rnn(arch, "lstm", 1024, batch=64),
    "gru-128": lambda arch: rnn(arch, "gru", 128),
    "gru-512": lambda arch: rnn(arch, "gru", 512),
    "tanh-64": lambda arch: rnn(arch, "tanh", 64),
    "lstm-float32": lambda arch: rnn(arch, "lstm", 32, torch.float32),
    "gru-256-float32": lambda arch: rnn(arch, "gru", 256, torch.float32),
    "lstm-256-float32-few": lambda arch: rnn(arch, "lstm", 256, torch.float32, batch=16),
    "lstm-projected": lambda arch: rnn(arch, "lstm", 1024, projection=256),
    "lstm-projected-float32": lambda arch: rnn(arch, "lstm", 512, torch.float32, projection=128),
    "lstm-projected-cells": lambda arch: rnn(arch, "lstm", 1024, projection=256, all_cells=True),
    "lstm-projected-cells-float32": lambda arch: rnn(arch, "lstm", 512, torch.float32, projection=128, all_cells=True),
    "lstm-float64": lambda arch: rnn(arch, "lstm", 256, torch.float64),
    "gru-float64": lambda arch: rnn(arch, "gru", 64, torch.float64),
    "lstm-projected-float64": lambda arch: rnn(arch, "lstm", 512, torch.float64, projection=128, all_cells=True),
    "lstm-zoneout-128": lambda arch: cells(arch, "lstm", 128, zoneout=True),
    "gru-zoneout-float32": lambda arch: cells(arch, "gru", 200, torch.float32, zoneout=True),
    "peephole-lstm-512": lambda arch: cells(arch, "peephole_lstm", 512, zoneout=True),
    "reset-before-gru-512": lambda arch: cells(arch, "reset_before_gru", 512),
    "layer-norm-lstm-1024": lambda arch: cells(arch, "layer_norm_lstm", 1024, zoneout=True),
    "layer-norm-lstm-float32": lambda arch: cells(arch, "layer_norm_lstm", 96, torch.float32),
    "layer-norm-gru-2048": lambda arch: cells(arch, "layer_norm_gru", 2048),
    "layer-norm-lstm-float64": lambda arch: cells(arch, "layer_norm_lstm", 512, torch.float64, zoneout=True),
    "layer-norm-gru-float64": lambda arch: cells(arch, "layer_norm_gru", 96, torch.float64, zoneout=True),
    "rotary": lambda arch: rotary(arch, 128, 64, torch.bfloat16, False, False),
    "rotary-norm": lambda arch: rotary(arch, 128, 64, torch.bfloat16, False, True),
    "rotary-part-interleaved": lambda arch: rotary(arch, 80, 16, torch.float16, True, True),
    "rotary-512-float32": lambda arch: rotary(arch, 512, 256, torch.float32, False, True),
    "rotary-512-float64": lambda arch: rotary(arch, 512, 256, torch.float64, False, True),
    "rotary-interleaved-float64": lambda arch: rotary(arch, 80, 16, torch.float64, True, True),
}


FLOAT64_OF_CODES = ("decode-128-float64", "int4-groups-float64", "int8-dynamic-float64")


def uses_matrix_instructions(launch: Any) -> bool:
    """Whether a kernel's 16-bit products are as large as those of a warp group, which wgmma and tcgen05 need."""
    constants, name = launch.constants, launch.kernel.fn.__name__
    operands = {kind for kind in launch.signature.values() if kind.startswith("*")}
    if not operands & {"*bf16", "*fp16"} or constants.get("INTEGER") or constants.get("MULTIPLIER"):
        return False
    if name not in (
        "forward",
        "backward_dq",
        "backward_dkdv",
        "linear",
        "linear_dx",
        "conv",
        "input_gradient",
        "weight_gradient",
    ):
        return False
    if "BLOCK_M" not in constants:  # a recurrent layer's, whose rows are few
        return False
    return bool(constants["BLOCK_N" if name == "backward_dkdv" else "BLOCK_M"] >= 64)
