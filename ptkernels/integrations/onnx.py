"""ONNX export: models of ours as standard operators, which ONNX Runtime and others run without this package.

    from ptkernels.integrations import onnx

    onnx.export(model, (x,), "model.onnx", dynamic_shapes=({0: torch.export.Dim("batch")},))

Every operator is decomposed into torch's own by its reference, for ``torch.onnx`` to translate, but for recurrent
layers, which become ONNX's LSTM, GRU and RNN. Needs onnx and onnxscript.

``torch.onnx.export`` itself takes both tables::

    program = torch.export.export(model, (x,)).run_decompositions(onnx.decompositions())
    torch.onnx.export(program, f="model.onnx", dynamo=True, custom_translation_table=onnx.translation_table())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptkernels.ops.attention import reference as attention_reference
from ptkernels.ops.attention.library import attention_op
from ptkernels.ops.attention.options import Options
from ptkernels.ops.attention_kv_cache.library import append_op, attend_op
from ptkernels.ops.attention_varlen.library import varlen_op
from ptkernels.ops.conv_bn_relu import reference as conv_reference
from ptkernels.ops.conv_bn_relu.library import conv_op
from ptkernels.ops.conv_bn_relu.variant import Variant, complete_forward
from ptkernels.ops.packed_rnn import reference as rnn_reference
from ptkernels.ops.packed_rnn.library import rnn_op
from ptkernels.ops.quantized_matmul import reference as quantized_reference
from ptkernels.ops.quantized_matmul.formats import dequantize
from ptkernels.ops.quantized_matmul.library import LinearArguments, embedding_op, linear_op
from ptkernels.ops.rotary_embedding.library import rotary_op
from ptkernels.ops.rotary_embedding.register import complete, compose

__all__ = ["decompositions", "export", "translation_table"]


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    **options: Any,
) -> Any:
    """``torch.onnx.export`` of a model that may contain our operators.

    Args:
        model: in evaluation mode; or what ``torch.export.export`` made of it.
        args, kwargs: example inputs.
        f: the file to write. Default: none; the program returned has ``save``.
        dynamic_shapes: as for ``torch.export.export``.
        options: others of ``torch.onnx.export``.

    Returns:
        The ``torch.onnx.ONNXProgram``.

    Raises:
        NotImplementedError: there is something that ONNX has no operators for: recurrent layers on packed sequences
            (pad them and pass ``lengths``), attention on packed sequences or with a cache.

    Note:
        Results are those of the references, in the order of sums that the runtime has. Quantized weights stay codes in
        the file where they are large; the runtime decodes them when it loads it. Recurrent layers run at any length and
        batch; those with projections, which ONNX has not, are unrolled for the length of the example.

    Example:
        >>> import torch, ptkernels as ptk
        >>> from ptkernels.integrations import onnx
        >>> program = onnx.export(ptk.nn.LSTM(8, 16).eval(), (torch.randn(5, 3, 8),), verbose=False)
        >>> "LSTM" in {node.op_type for node in program.model.graph}
        True
    """
    if isinstance(model, torch.export.ExportedProgram):
        program = model
    else:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions(decompositions())
    return torch.onnx.export(program, f=f, dynamo=True, custom_translation_table=translation_table(), **options)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Our operators as torch's, for ``ExportedProgram.run_decompositions``; recurrent layers stay if ONNX has them."""
    return {
        attention_op: _attention,
        conv_op: _conv_bn_relu,
        linear_op: _quantized_linear,
        embedding_op: _quantized_embedding,
        rotary_op: lambda *args: compose(*complete(args)),
        rnn_op: _unrolled_rnn,
        varlen_op: _refuse("attention on packed sequences"),
        attend_op: _refuse("attention with a cache"),
        append_op: _refuse("attention with a cache"),
        # ONNX shifts unsigned integers only, and has no views in another dtype.
        torch.ops.aten.__lshift__.Tensor: lambda x, by: x * torch.pow(2, by),
        torch.ops.aten.__rshift__.Tensor: lambda x, by: torch.div(x, torch.pow(2, by), rounding_mode="floor"),
        torch.ops.aten.view.dtype: _float8,
    }


def translation_table() -> dict[Any, Callable[..., Any]]:
    """What ``decompositions`` leaves, for ``torch.onnx.export(custom_translation_table=...)``."""
    return {rnn_op: _recurrent}


def _refuse(what: str) -> Callable[..., Any]:
    def decomposition(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"onnx.export: {what} has no ONNX operators; pad the sequences and pass a mask")

    return decomposition


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any
) -> tuple[Tensor, Tensor]:
    return attention_reference.attention_with(query, key, value, attn_mask, Options(*options), enable_gqa=True)


def _conv_bn_relu(*args: Any) -> tuple[Tensor, ...]:
    args = complete_forward(args)
    variant = Variant(*args[17:])
    out, z, mean, var = conv_reference.forward(*args[:16], *variant)
    nothing = z.new_empty(0)
    measures = args[8] or variant.num_groups
    return out, nothing, *((mean, var) if measures and mean is not None and var is not None else (nothing, nothing))


def _quantized_linear(*args: Any) -> Tensor:
    given = LinearArguments(*args)
    if given.counts is not None:
        raise NotImplementedError("onnx.export: a quantized layer of experts has no ONNX operators")
    return quantized_reference.product(*given)


def _float8(codes: Tensor, dtype: torch.dtype) -> Any:
    """What bytes stand for as e4m3: sign, four bits of exponent, three of mantissa; the largest is NaN."""
    if dtype != torch.float8_e4m3fn:
        return NotImplemented
    number = codes.to(torch.int32)
    exponent, mantissa = torch.div(number, 8, rounding_mode="floor") % 16, (number % 8).to(torch.float32) / 8
    normal = (1 + mantissa) * torch.pow(2.0, (exponent - 7).to(torch.float32))
    value = torch.where(exponent == 0, mantissa * 2.0**-6, normal)
    value = torch.where(number % 128 == 127, torch.full_like(value, torch.nan), value)
    return torch.where(number >= 128, -value, value)


def _quantized_embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Rows are looked up as they are stored, and only those are decoded."""
    picked = (codes[indices], scales[indices], None if zeros is None else zeros[indices])
    return dequantize(*picked, code_format, group_size, in_features, out_dtype)


def _unrolled_rnn(
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    batch_size: Any,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    save: bool = False,
    recompute: bool = False,
    all_cells: bool = False,
    *options: Any,
) -> Any:
    """What ONNX's layers lack: projections, the cells of every token, and the cells that torch lacks."""
    if layout not in ("time_first", "batch_first"):
        raise NotImplementedError(
            f"onnx.export: a recurrent layer on {layout} sequences has no ONNX operator; pad them and pass lengths"
        )
    directions = 2 if bidirectional else 1
    weights = rnn_reference.split_weights(params, directions, mode)
    projected = "weight_hr" in weights[0]
    of_cells = rnn_reference.Options(*options)
    if mode in _GATES and not (projected or all_cells or of_cells.zoneout or of_cells.zoneout_cell):
        return NotImplemented
    if sizes is not None:
        what = "an LSTM that returns all cells" if all_cells else "a projected LSTM" if projected else mode
        raise NotImplementedError(f"onnx.export: {what} has no ONNX operator with lengths")
    # One step after the other, as many as the example has; any batch.
    x = list(input.unbind(1 if layout == "batch_first" else 0))
    hidden = params[0].size(0) // rnn_reference.GATES[mode]
    features = (weights[0]["weight_hh"].size(1), hidden)
    zeros = (input.new_zeros(directions, x[0].size(0), size) for size in features)
    h0, c0 = state if len(state) == 2 else (*state, *list(zeros)[len(state) :])
    slots = torch.arange(x[0].size(0))
    runs = [
        rnn_reference._run(
            mode,
            [rnn_reference.own_products(mode, rows, d, hidden) for rows in x],
            h0[d],
            c0[d],
            own,
            d == 1,
            of_cells,
            slots,
        )
        for d, own in enumerate(weights)
    ]
    output = torch.cat([run[0] for run in runs] + [run[3] for run in runs] * all_cells, -1).unflatten(0, (len(x), -1))
    output = output.transpose(0, 1) if layout == "batch_first" else output
    nothing = input.new_empty(0)
    h_n, c_n = (torch.stack([run[index] for run in runs]) for index in (1, 2))
    return output, h_n, c_n if rnn_reference.has_cells(mode) else nothing, nothing, nothing


# ONNX's order of the gates, each by its place in torch's.
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "tanh": (0,), "relu": (0,)}


def _recurrent(
    input: Any,
    sizes: Any,
    sorted_indices: Any,
    state: Sequence[Any],
    params: Sequence[Any],
    batch_size: Any,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    *others: Any,
) -> tuple[Any, ...]:
    import onnxscript

    op: Any = onnxscript.opset18
    directions, gates = (2 if bidirectional else 1), _GATES[mode]
    each = len(params) // directions
    hidden = int(params[1].shape[1])

    def reordered(param: Any) -> Any:
        if len(gates) == 1:
            return param
        parts = op.Split(param, num_outputs=len(gates), axis=0)
        return op.Concat(*(parts[gate] for gate in gates), axis=0)

    def stacked(tensors: list[Any]) -> Any:
        rows = [op.Unsqueeze(tensor, op.Constant(value_ints=[0])) for tensor in tensors]
        return rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)

    by_direction = [[reordered(p) for p in params[d * each : (d + 1) * each]] for d in range(directions)]
    weight, recurrence = (stacked([own[index] for own in by_direction]) for index in (0, 1))
    bias = stacked([op.Concat(own[2], own[3], axis=0) for own in by_direction]) if each == 4 else None
    steps = op.Transpose(input, perm=[1, 0, 2]) if layout == "batch_first" else input
    lengths = None if sizes is None else op.Cast(sizes, to=6)  # int32
    states = [*state, None, None][:2]
    options = {"hidden_size": hidden, "direction": "bidirectional" if bidirectional else "forward"}
    operands = (steps, weight, recurrence, bias, lengths, states[0])
    if mode == "lstm":
        found = op.LSTM(*operands, states[1], **options)
    elif mode == "gru":
        found = op.GRU(*operands, linear_before_reset=1, **options)
    else:
        found = op.RNN(*operands, activations=[mode.title()] * directions, **options)
    # [steps, directions, batch, hidden]: directions go into the features.
    order = [2, 0, 1, 3] if layout == "batch_first" else [0, 2, 1, 3]
    output = op.Reshape(op.Transpose(found[0], perm=order), op.Constant(value_ints=[0, 0, -1]))
    nothing = op.Constant(value_floats=[0.0])
    return output, found[1], found[2] if mode == "lstm" else nothing, nothing, nothing
