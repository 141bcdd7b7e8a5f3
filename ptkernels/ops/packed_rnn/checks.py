"""Validation of the recurrent layers' arguments: every rule once, for the functions, the modules and the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.packed_rnn.reference import (
    GATES,
    NORMALISED,
    Options,
    compute_dtype,
    has_cells,
    param_names,
    param_orders,
)

OP = "packed_rnn"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("packed", "varlen", "time_first", "batch_first")
MEANING = {
    "packed": "batch_sizes",
    "varlen": "cu_seqlens",
    "time_first": "lengths",
    "batch_first": "lengths",
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, value: Any) -> None:
    """A dense floating tensor of a dtype that kernels have."""
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{op}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_nested or value.layout is not torch.strided or value.is_quantized:
        raise TypeError(f"{op}: {name}: got a nested, sparse or quantized tensor, expected a dense one")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name}: got dtype {_name(value.dtype)}, expected one of {', '.join(map(_name, DTYPES))}"
        )


def _check_like(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    check_tensor(op, name, tensor)
    if tensor.dtype != input.dtype:
        raise TypeError(f"{op}: {name}: got dtype {_name(tensor.dtype)}, expected {_name(input.dtype)} like input")
    if tensor.device != input.device:
        raise ValueError(f"{op}: {name}: got device {tensor.device}, expected {input.device} like input")


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[Any]) -> None:
    """Exactly that shape."""
    sizes = zip(tensor.shape, expected, strict=False)
    if tensor.dim() != len(expected) or not all(holds(size == wanted) for size, wanted in sizes):
        raise ValueError(f"{op}: {name}: got shape {list(tensor.shape)}, expected {list(expected)}")


def check_integers(op: str, name: str, value: Any) -> None:
    """A vector of integers, as lengths and the like are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: got {type(value).__name__}, expected torch.Tensor")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name}: got dtype {_name(value.dtype)}, expected int64 or int32")
    if value.dim() != 1:
        raise ValueError(f"{op}: {name}: got shape {list(value.shape)}, expected one dimension")


def _check_params(op: str, input: Tensor, params: Sequence[Any], mode: str, directions: int) -> tuple[Any, Any]:
    """Returns the sizes of cells and outputs."""
    each, rest = divmod(len(params), directions)
    names = () if rest else param_names(mode, each)
    if not names:
        orders = "; or ".join(", ".join(order) for order in param_orders(mode))
        raise ValueError(
            f"{op}: params: got {len(params)} tensors for {directions} directions, expected for each {orders}"
        )
    for index, param in enumerate(params):
        _check_like(op, f"params[{index}]", param, input)
    gates = GATES[mode]
    rows = params[0].shape[0] if params[0].dim() == 2 else 0
    hidden = rows // gates
    if not (holds(hidden >= 1) and holds(hidden * gates == rows)):
        raise ValueError(f"{op}: params[0]: got shape {list(params[0].shape)}, expected [{gates} * hidden, ..]")
    outputs = hidden
    if names[-1] == "weight_hr":
        outputs = params[each - 1].size(0) if params[each - 1].dim() == 2 else 0
        if not holds(outputs >= 1):
            raise ValueError(
                f"{op}: params[{each - 1}]: got shape {list(params[each - 1].shape)}, expected [proj_size, hidden]"
            )
    if mode in NORMALISED and not holds(input.size(-1) == directions * rows):
        raise ValueError(
            f"{op}: input: got {input.size(-1)} features, expected the products of every gate: {directions * rows}"
        )
    shapes: dict[str, tuple[Any, ...]] = {
        "weight_ih": (rows, input.size(-1)),
        "weight_hh": (rows, outputs),
        "bias_ih": (rows,),
        "bias_hh": (rows,),
        "weight_hr": (outputs, hidden),
        "weight_peephole": (3, hidden),
        "norm_hidden": (2, rows),
        "norm_cell": (2, hidden),
    }
    for index, param in enumerate(params):
        check_shape(op, f"params[{index}]", param, shapes[names[index % each]])
    return hidden, outputs


def check_options(op: str, mode: str, projected: bool, options: Options) -> None:
    """Raise for an epsilon or probabilities that mean nothing, and for zoneout where there is none."""
    eps, *shares = options[:3]
    for name, value, most in (("eps", eps, math.inf), ("zoneout", shares[0], 1.0), ("zoneout", shares[1], 1.0)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= most:
            expected = "a number of 0 or more" if name == "eps" else "a probability from 0 to 1"
            raise ValueError(f"{op}: {name}: got {value!r}, expected {expected}")
    if any(shares) and (GATES[mode] == 1 or projected):
        raise ValueError(
            f"{op}: zoneout: got {tuple(shares)} for {mode}{' with a projection' * projected}, expected 0.0"
        )
    seed = options.seed
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"{op}: seed: got {seed.dtype} of shape {list(seed.shape)}, expected one int64")


def _check_sizes(op: str, input: Tensor, sizes: Tensor | None, sorted_indices: Any, batch: Any, layout: str) -> None:
    meaning = MEANING[layout]
    padded = layout in ("time_first", "batch_first")
    if sizes is None and not padded:
        raise TypeError(f"{op}: {meaning}: got None, expected torch.Tensor")
    if sizes is not None:
        check_integers(op, meaning, sizes)
    if padded:
        found = input.size(0 if layout == "batch_first" else 1)
        if not holds(found == batch):
            raise ValueError(f"{op}: batch_size: got {batch}, expected {found} like input")
    if sizes is not None and layout != "packed":
        expected = batch if padded else batch + 1
        if not holds(sizes.size(0) == expected):
            raise ValueError(f"{op}: {meaning}: got {sizes.size(0)} entries, expected {expected}")
    if sorted_indices is not None:
        check_integers(op, "sorted_indices", sorted_indices)
        check_shape(op, "sorted_indices", sorted_indices, (batch,))


def check_layer(
    op: str,
    input: Any,
    sizes: Any,
    sorted_indices: Any,
    state: Sequence[Any],
    params: Sequence[Any],
    batch_size: Any,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    all_cells: bool = False,
    *options: Any,
) -> tuple[Any, Any]:
    """Raise the precise error for what is wrong with a layer's arguments; returns the sizes of cells and outputs.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a tensor of the right kind and dtype.
        ValueError: a name, a shape or a device is wrong.
    """
    if mode not in GATES:
        raise ValueError(f"{op}: mode: got {mode!r}, expected one of {', '.join(GATES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if all_cells and not has_cells(mode):
        raise ValueError(f"{op}: return_cells: got {all_cells} for {mode}, which has no cells, expected False")
    check_tensor(op, "input", input)
    rank = 3 if layout in ("time_first", "batch_first") else 2
    if input.dim() != rank:
        form = {"time_first": "[steps, batch, features]", "batch_first": "[batch, steps, features]"}
        expected = form.get(layout, "[tokens, features]")
        raise ValueError(f"{op}: input: got shape {list(input.shape)}, expected {rank} dimensions: {expected}")
    if not holds(input.size(-1) >= 1):
        raise ValueError(f"{op}: input: got {input.size(-1)} features, expected at least 1")
    directions = 2 if bidirectional else 1
    hidden, outputs = _check_params(op, input, params, mode, directions)
    _check_sizes(op, input, sizes, sorted_indices, batch_size, layout)
    wanted = 2 if has_cells(mode) else 1
    if len(state) not in (0, wanted):
        raise ValueError(f"{op}: hx: got {len(state)} states, expected none or {wanted}")
    for name, tensor, features in zip(("hx", "cx"), state, (outputs, hidden), strict=False):
        _check_like(op, name, tensor, input)
        check_shape(op, name, tensor, (directions, batch_size, features))
    projected = "weight_hr" in param_names(mode, len(params) // directions)
    check_options(op, mode, projected, Options(*options))
    return hidden, outputs


def check_values(
    op: str, input: Tensor, sizes: Tensor | None, sorted_indices: Tensor | None, batch: int, layout: str
) -> None:
    """The numbers themselves, which only an eager call can read.

    Raises:
        ValueError: lengths out of range, batch_sizes that grow, cu_seqlens that do not cover the data.
    """
    if sizes is not None:
        values: list[int] = sizes.tolist()
        if layout == "packed":
            _check_batch_sizes(op, values, input.size(0), batch)
        elif layout == "varlen":
            ascending = all(before <= after for before, after in pairwise(values))
            if not ascending or values[0] != 0 or values[-1] != input.size(0):
                raise ValueError(f"{op}: cu_seqlens: got {values}, expected ascending from 0 to {input.size(0)}")
        else:
            steps = input.size(1 if layout == "batch_first" else 0)
            for value in values:
                if not 0 <= value <= steps:
                    raise ValueError(f"{op}: lengths: got {value}, expected 0 to {steps}")
    if sorted_indices is not None and sorted(sorted_indices.tolist()) != list(range(batch)):
        raise ValueError(
            f"{op}: sorted_indices: got {sorted_indices.tolist()}, expected a permutation of 0 to {batch - 1}"
        )


def _check_batch_sizes(op: str, values: list[int], tokens: int, batch: int) -> None:
    if (values[0] if values else 0) != batch:
        raise ValueError(f"{op}: batch_sizes: got {values[:1]} sequences at the first step, expected {batch}")
    if any(before < after for before, after in pairwise(values)) or (values and values[-1] < 1):
        raise ValueError(f"{op}: batch_sizes: got {values}, expected positive numbers that never grow")
    if sum(values) != tokens:
        raise ValueError(f"{op}: batch_sizes: got a sum of {sum(values)}, expected the {tokens} rows of input")


def check_backward(
    grads: Sequence[Tensor | None],
    input: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    saved: tuple[Sequence[Any], Sequence[Any]],
    shapes: Sequence[Sequence[Any]],
) -> None:
    """Arguments of ``torch.ops.ptkernels._packed_rnn_backward`` beyond those of the forward."""
    for name, grad, shape in zip(("grad_output", "grad_h_n", "grad_c_n"), grads, shapes, strict=True):
        if grad is not None:
            _check_like(OP, name, grad, input)
            check_shape(OP, name, grad, shape)
    _check_like(OP, "output", output, input)
    check_shape(OP, "output", output, shapes[0])
    for name, tensor, shape, dtype in (
        ("gates", gates, saved[0], input.dtype),
        ("cells", cells, saved[1], compute_dtype(input.dtype)),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{OP}: {name}: got dtype {_name(tensor.dtype)}, expected {_name(dtype)}")
        check_shape(OP, name, tensor, shape)
