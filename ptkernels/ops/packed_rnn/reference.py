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
Run = tuple[Tensor, Tensor, Tensor, Tensor]
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
    if sizes is None:
        steps = input.size(1 if layout == "batch_first" else 0)
        rows = torch.arange(steps * batch, device=device).reshape(
            (batch, steps) if layout == "batch_first" else (steps, batch)
        )
        rows = rows.mT if layout == "batch_first" else rows
        return Order([batch] * steps if batch else [], torch.arange(batch, device=device), rows.flatten())
    if layout == "varlen":
        starts, lengths = sizes[:-1].cpu(), sizes.diff().cpu()
        stride_step = 1
    else:
        steps = input.size(1 if layout == "batch_first" else 0)
        lengths = sizes.cpu()
        starts = torch.arange(batch) * (steps if layout == "batch_first" else 1)
        stride_step = 1 if layout == "batch_first" else batch
    slots = lengths.argsort(descending=True, stable=True)
    running = [int((lengths > step).sum()) for step in range(int(lengths.max()) if batch else 0)]
    by_step = [starts[slots[:count]] + step * stride_step for step, count in enumerate(running)]
    empty = torch.zeros(0, dtype=torch.int64)
    return Order(running, slots.to(device), torch.cat([empty, *by_step]).to(device))


def _cell(mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    assert weight_ih is not None
    assert weight_hh is not None
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


def _run(mode: str, x: list[Tensor], h: Tensor, c: Tensor, weights: Sequence[Tensor | None], reverse: bool) -> Run:
    """One direction over steps whose rows are the first so many sequences; states are those of all, by slot.

    Returns h of every token, h and c after the last ones, and c of every token.
    """
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    for rows in reversed(x) if reverse else x:
        running = rows.size(0)
        new_h, new_c = _cell(mode, rows, h[:running], c[:running], weights)
        outputs.append(new_h)
        cells.append(new_c)
        h, c = torch.cat([new_h, h[running:]]), torch.cat([new_c, c[running:]])
    of_tokens = [torch.cat(list(reversed(found)) if reverse else found) for found in (outputs, cells)]
    return of_tokens[0], h, c, of_tokens[1]


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
    all_cells: bool = False,
) -> Results:
    """What ``torch.ops.ptkernels.packed_rnn`` computes: output, h_n, and c_n (empty where there are no cells).

    With ``all_cells`` the rows of output go on with the cells of their token.
    """
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
        nothing = torch.stack([tensor.flatten()[:0].sum().to(wide) for tensor in (data, *params)]).sum()
        x, h0, c0 = [data + nothing], h0 + nothing, c0 + nothing
    found = []
    for d in range(directions):
        h, c = h0[d].index_select(0, order.slots), c0[d].index_select(0, order.slots)
        found.append(_run(mode, x, h, c, weights[d], reverse=d == 1))
    unsorted = order.slots.argsort()
    rows = torch.cat([output for output, *_ in found] + [cells for *_, cells in found] * all_cells, -1)
    output = rows.new_zeros(input.shape[:-1].numel(), rows.size(1)).index_copy(0, order.rows, rows)
    h_n = torch.stack([h.index_select(0, unsorted) for _, h, *_ in found]).to(dtype)
    c_n = torch.stack([c.index_select(0, unsorted) for _, _, c, _ in found]).to(dtype)
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
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, ...]:
    """Plain torch :func:`ptkernels.packed_rnn`: same arguments and results, one step at a time.

    Computes in float64 for float64 and in float32 otherwise, rounding at the end. Differentiable any number of times in
    forward and reverse mode; ``recompute`` makes no difference.
    """
    from ptkernels.ops.packed_rnn.layer import as_op_arguments, as_results

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
    return as_results(layer(*args, return_cells), mode, return_cells)


def _cell_gradients(
    mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor | None], grad_h: Tensor, grad_c: Tensor
) -> tuple[list[Tensor | None], Tensor, Tensor]:
    """Gradients of a step: of x and the weights, of h, of c."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    assert weight_ih is not None
    assert weight_hh is not None
    of_input = torch.nn.functional.linear(x, weight_ih, bias_ih)
    of_hidden = torch.nn.functional.linear(h, weight_hh, bias_hh)
    through_h: Tensor | None = None
    grad_hr: Tensor | None = None
    if mode == "lstm":
        i, f, g, o = (of_input + of_hidden).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        squashed = (f * c + i * g).tanh()
        if weight_hr is not None:
            grad_hr = grad_h.mT @ (o * squashed)
            grad_h = grad_h @ weight_hr
        grad_c = grad_c + grad_h * o * (1 - squashed * squashed)
        parts = [grad_c * g * i * (1 - i), grad_c * c * f * (1 - f), grad_c * i * (1 - g * g)]
        of_x = of_h = torch.cat([*parts, grad_h * squashed * o * (1 - o)], -1)
        grad_c = grad_c * f
    elif mode == "gru":
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        grad_n = grad_h * (1 - z) * (1 - n * n)
        shared = [grad_n * hn * r * (1 - r), grad_h * (h - n) * z * (1 - z)]
        of_x, of_h = torch.cat([*shared, grad_n], -1), torch.cat([*shared, grad_n * r], -1)
        through_h = grad_h * z
    else:
        total = of_input + of_hidden
        slope = 1 - total.tanh() ** 2 if mode == "tanh" else (total > 0).to(total.dtype)
        of_x = of_h = grad_h * slope
    grads: list[Tensor | None] = [
        of_x @ weight_ih,
        of_x.mT @ x,
        of_h.mT @ h,
        None if bias_ih is None else of_x.sum(0),
        None if bias_hh is None else of_h.sum(0),
        grad_hr,
    ]
    grad_before = of_h @ weight_hh
    return grads, grad_before if through_h is None else grad_before + through_h, grad_c


def _run_gradients(
    mode: str,
    x: list[Tensor],
    states: tuple[Tensor, Tensor],
    weights: Sequence[Tensor | None],
    grads: tuple[list[Tensor], list[Tensor] | None, Tensor, Tensor],
    reverse: bool,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of one direction: of x in packed order, the weights, h and c before the first step."""
    h, c = states
    grad_outputs, grad_cells, grad_h, grad_c = grads
    steps = list(range(len(x)))[:: -1 if reverse else 1]
    before = []
    for step in steps:
        running = x[step].size(0)
        before.append((h[:running], c[:running]))
        new_h, new_c = _cell(mode, x[step], h[:running], c[:running], weights)
        h, c = torch.cat([new_h, h[running:]]), torch.cat([new_c, c[running:]])
    grad_x: dict[int, Tensor] = {}
    sums: list[Tensor] = []
    for step, (h, c) in zip(reversed(steps), reversed(before), strict=True):
        running = x[step].size(0)
        incoming = grad_h[:running] + grad_outputs[step]
        of_cells = grad_c[:running] if grad_cells is None else grad_c[:running] + grad_cells[step]
        found, new_h, new_c = _cell_gradients(mode, x[step], h, c, weights, incoming, of_cells)
        grad_h, grad_c = torch.cat([new_h, grad_h[running:]]), torch.cat([new_c, grad_c[running:]])
        grad_x[step], *own = [grad for grad in found if grad is not None]
        sums = [total + grad for total, grad in zip(sums, own, strict=True)] if sums else own
    return torch.cat([grad_x[step] for step in range(len(x))]), sums, grad_h, grad_c


def gradients(
    grads: Sequence[Tensor | None],
    input: Tensor,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool,
    all_cells: bool = False,
) -> list[Tensor]:
    """First derivatives by input, states and parameters, written so that they can be differentiated further.

    ``grads`` are those of output, h_n and c_n, None where one is zero.
    """
    wide = compute_dtype(input.dtype)
    order = order_of(input, sizes, sorted_indices, batch_size, layout)
    directions = 2 if bidirectional else 1
    weights = split_weights([param.to(wide) for param in params], directions)
    flat = input.to(wide).reshape(-1, input.size(-1))
    x = list(flat.index_select(0, order.rows).split(order.batch_sizes)) if order.batch_sizes else []
    hidden = params[0].size(0) // GATES[mode]
    outputs = hidden if weights[0][4] is None else weights[0][4].size(0)

    def by_slot(tensor: Tensor | None, features: int) -> Tensor:
        if tensor is None:
            return flat.new_zeros(directions, batch_size, features)
        return tensor.to(wide).index_select(1, order.slots)

    h0 = by_slot(state[0] if state else None, outputs)
    c0 = by_slot(state[1] if len(state) > 1 else None, hidden)
    grad_h, grad_c = by_slot(grads[1], outputs), by_slot(grads[2] if mode == "lstm" else None, hidden)
    features = directions * (outputs + hidden * all_cells)
    of_output = flat.new_zeros(flat.size(0), features) if grads[0] is None else grads[0].to(wide)
    of_output = of_output.reshape(flat.size(0), features).index_select(0, order.rows)
    if not x:
        unsorted = order.slots.argsort()
        of_states = [grad.index_select(1, unsorted) for grad in (grad_h, grad_c)[: len(state)]]
        return [torch.zeros_like(input), *of_states, *(torch.zeros_like(param) for param in params)]
    found = []
    for d in range(directions):
        rows = of_output[:, d * outputs : (d + 1) * outputs].split(order.batch_sizes)
        of_cells = None
        if all_cells:
            first = directions * outputs + d * hidden
            of_cells = list(of_output[:, first : first + hidden].split(order.batch_sizes))
        flowing = (list(rows), of_cells, grad_h[d], grad_c[d])
        found.append(_run_gradients(mode, x, (h0[d], c0[d]), weights[d], flowing, reverse=d == 1))
    unsorted = order.slots.argsort()
    grad_rows = found[0][0] if directions == 1 else found[0][0] + found[1][0]
    grad_input = flat.new_zeros(flat.shape).index_copy(0, order.rows, grad_rows).reshape(input.shape)
    by_state = ([own[2] for own in found], [own[3] for own in found])[: len(state)]
    of_states = [torch.stack(of_state).index_select(1, unsorted) for of_state in by_state]
    of_params = [grad for own in found for grad in own[1]]
    tensors = (input, *state, *params)
    return [grad.to(tensor.dtype) for grad, tensor in zip((grad_input, *of_states, *of_params), tensors, strict=True)]
