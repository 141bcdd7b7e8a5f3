"""Recurrent layers in plain torch, one step at a time: the oracle, and what runs where no kernel can.

    lstm    i, f, g, o = W x + b + U h + b'      c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')
    lstmp   the same with h' = W_r (sigmoid(o) tanh(c'))
    gru     r, z, n = W x + b;  r', z', n' = U h + b'      n = tanh(n + sigmoid(r + r') n')      h' = (1 - z) n + z h
    rnn     h' = tanh(W x + b + U h + b'), or relu

A sequence ends at its own length: the state it leaves is that of its last token, and for the reverse direction that of
its first. Sequences of length 0 leave the state they came with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor, Tensor]
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and cells: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Order:
    """Sequences by slot, longest first: how many run at each step, which they are, and the row of every token."""

    batch_sizes: list[int]
    slots: Tensor
    rows: Tensor
    """Of the tokens, step after step, in the data as a matrix."""


def order_of(input: Tensor, sizes: Tensor | None, sorted_indices: Tensor | None, batch: int, layout: str) -> Order:
    """Read how the sequences of a call lie in its input."""
    device = input.device
    if layout == "packed":
        assert sizes is not None
        slots = torch.arange(batch) if sorted_indices is None else sorted_indices
        return Order(sizes.tolist(), slots.to(device), torch.arange(input.size(0), device=device))
    if layout == "varlen":
        assert sizes is not None
        starts, lengths = sizes[:-1].cpu(), sizes.diff().cpu()
        stride_step = 1
    else:
        steps = input.size(1 if layout == "batch_first" else 0)
        lengths = torch.full((batch,), steps) if sizes is None else sizes.cpu()
        starts = torch.arange(batch) * (steps if layout == "batch_first" else 1)
        stride_step = 1 if layout == "batch_first" else batch
    slots = lengths.argsort(descending=True, stable=True)
    running = [int((lengths > step).sum()) for step in range(int(lengths.max()) if batch else 0)]
    rows = [starts[slots[:count]] + step * stride_step for step, count in enumerate(running)]
    empty = torch.zeros(0, dtype=torch.int64)
    return Order(running, slots.to(device), torch.cat([empty, *rows]).to(device))


def _cell(mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    assert weight_ih is not None and weight_hh is not None
    of_input = torch.nn.functional.linear(x, weight_ih, bias_ih)
    of_hidden = torch.nn.functional.linear(h, weight_hh, bias_hh)
    if mode == "lstm":
        i, f, g, o = (of_input + of_hidden).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (h if weight_hr is None else h @ weight_hr.mT), c
    if mode == "gru":
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
        z = (z + hz).sigmoid()
        return (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h, c
    return (of_input + of_hidden).tanh() if mode == "tanh" else (of_input + of_hidden).relu(), c


def _run(mode: str, x: list[Tensor], h: Tensor, c: Tensor, weights: Sequence[Tensor | None], reverse: bool) -> Results:
    """One direction over steps whose rows are the first so many sequences; states are those of all, by slot."""
    outputs: list[Tensor] = []
    for rows in reversed(x) if reverse else x:
        running = rows.size(0)
        new_h, new_c = _cell(mode, rows, h[:running], c[:running], weights)
        outputs.append(new_h)
        h, c = torch.cat([new_h, h[running:]]), torch.cat([new_c, c[running:]])
    return torch.cat(list(reversed(outputs)) if reverse else outputs), h, c


def split_weights(params: Sequence[Tensor], directions: int) -> list[list[Tensor | None]]:
    """Per direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, None where there is none."""
    each = len(params) // directions
    found: list[list[Tensor | None]] = []
    for first in range(0, len(params), each):
        own: list[Tensor | None] = list(params[first : first + each])
        projection = own.pop() if each % 2 else None
        found.append([*own, *([None] * (4 - len(own))), projection])
    return found


def layer(
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool = False,
) -> Results:
    """What ``torch.ops.ptkernels.packed_rnn`` computes: output, h_n, and c_n (empty where there are no cells)."""
    dtype, wide = input.dtype, compute_dtype(input.dtype)
    order = order_of(input, sizes, sorted_indices, batch_size, layout)
    directions = 2 if bidirectional else 1
    weights = split_weights([param.to(wide) for param in params], directions)
    data = input.to(wide).reshape(-1, input.size(-1)).index_select(0, order.rows)
    x = list(data.split(order.batch_sizes)) if order.batch_sizes else []
    hidden = params[0].size(0) // GATES[mode]
    outputs = hidden if weights[0][4] is None else weights[0][4].size(0)
    h0 = data.new_zeros(directions, batch_size, outputs) if not state else state[0].to(wide)
    c0 = data.new_zeros(directions, batch_size, hidden) if len(state) < 2 else state[1].to(wide)
    if not x:
        # No token: nothing is computed, and every derivative is there and 0.
        nothing = sum(tensor.flatten()[:0].sum() for tensor in (data, *params)).to(wide)
        x, h0, c0 = [data + nothing], h0 + nothing, c0 + nothing
    found = []
    for d in range(directions):
        h, c = h0[d].index_select(0, order.slots), c0[d].index_select(0, order.slots)
        found.append(_run(mode, x, h, c, weights[d], reverse=d == 1))
    unsorted = order.slots.argsort()
    rows = torch.cat([output for output, _, _ in found], -1)
    output = rows.new_zeros(input.shape[:-1].numel(), rows.size(1)).index_copy(0, order.rows, rows)
    h_n = torch.stack([h.index_select(0, unsorted) for _, h, _ in found]).to(dtype)
    c_n = torch.stack([c.index_select(0, unsorted) for _, _, c in found]).to(dtype)
    if mode != "lstm":
        c_n = input.new_empty(0)
    return output.to(dtype).reshape(*input.shape[:-1], rows.size(1)), h_n, c_n


def packed_rnn(
    input: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    cx: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    mode: str = "lstm",
    sizes: Tensor | None = None,
    layout: str = "packed",
    batch_size: int | None = None,
    sorted_indices: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Plain torch :func:`ptkernels.packed_rnn`: same arguments and results, one step at a time.

    Computes in float64 for float64 and in float32 otherwise, rounding at the end. Differentiable any number of times in
    forward and reverse mode.
    """
    from ptkernels.ops.packed_rnn.layer import as_op_arguments

    args = as_op_arguments(
        input,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        hx,
        cx,
        weight_hr,
        mode,
        sizes,
        layout,
        batch_size,
        sorted_indices,
    )
    output, h_n, c_n = layer(*args)
    return (output, h_n, c_n) if mode == "lstm" else (output, h_n)


def gradients(
    grads: Sequence[Tensor | None],
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    *options: object,
) -> list[Tensor]:
    """First derivatives with respect to input, states and parameters, which can be differentiated further.

    ``grads`` are those of output, h_n and c_n, None where one is zero; ``options`` are sizes, sorted_indices,
    batch_size, layout, mode and bidirectional.
    """
    sizes, sorted_indices, *others = options
    given = [index for index, grad in enumerate(grads) if grad is not None]

    def run(input: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states, weights = tensors[: len(state)], tensors[len(state) :]
        results = layer(input, sizes, sorted_indices, states, weights, *others)  # type: ignore[arg-type]
        return tuple(results[index] for index in given)

    _, pullback = torch.func.vjp(run, input, *state, *params)
    return list(pullback(tuple(grad for grad in grads if grad is not None)))
