"""Recurrent layers in plain torch, one step at a time: the oracle, and what runs where no kernel can.

    lstm    i, f, g, o = W x + b + U h + b'      c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')
    lstmp   the same with h' = W_r (sigmoid(o) tanh(c'))
    gru     r, z, n = W x + b;  r', z', n' = U h + b'      n = tanh(n + sigmoid(r + r') n')      h' = (1 - z) n + z h
    rnn     h' = tanh(W x + b + U h + b'), or relu

  peephole_lstm     lstm with i and f of p c as well, and o of p c'
  reset_before_gru  gru with n = tanh(W_n x + b_n + U_n (r h))
  layer_norm_lstm   lstm of v + LN(U h), where v stands for W x + b + b', with h' = o tanh(LN(c'))
  layer_norm_gru    gru of the same, LN over r and z together and over n

A sequence ends at its own length: the state it leaves is that of its last token, and for the reverse direction that of
its first. Sequences of length 0 leave the state they came with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from ptkernels._philox import philox

Results = tuple[Tensor, Tensor, Tensor]
Run = tuple[Tensor, Tensor, Tensor, Tensor]
Weights = Mapping[str, Tensor]
GATES = {
    "lstm": 4,
    "gru": 3,
    "tanh": 1,
    "relu": 1,
    "peephole_lstm": 4,
    "reset_before_gru": 3,
    "layer_norm_lstm": 4,
    "layer_norm_gru": 3,
}
NORMALISED = ("layer_norm_lstm", "layer_norm_gru")
"""Cells whose input is products already: what normalises those of the input needs no recurrence."""

_WEIGHTS = ("weight_ih", "weight_hh")
_BIASES = ("bias_ih", "bias_hh")
_PARAMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lstm": (_WEIGHTS, (*_WEIGHTS, "weight_hr"), (*_WEIGHTS, *_BIASES), (*_WEIGHTS, *_BIASES, "weight_hr")),
    "peephole_lstm": ((*_WEIGHTS, "weight_peephole"), (*_WEIGHTS, "bias_ih", "weight_peephole")),
    "reset_before_gru": (_WEIGHTS, (*_WEIGHTS, "bias_ih")),
    "layer_norm_lstm": (("weight_hh", "norm_hidden", "norm_cell"),),
    "layer_norm_gru": (("weight_hh", "norm_hidden"),),
}


def has_cells(mode: str) -> bool:
    """Whether the states of a layer are h and c, or h alone."""
    return GATES[mode] == 4


def param_orders(mode: str) -> tuple[tuple[str, ...], ...]:
    """The lists of parameters that a direction may have, of different lengths."""
    return _PARAMS.get(mode, (_WEIGHTS, (*_WEIGHTS, *_BIASES)))


def param_names(mode: str, count: int) -> tuple[str, ...]:
    """The one of that many; empty where there is none."""
    return next((names for names in param_orders(mode) if len(names) == count), ())


class Options(NamedTuple):
    """What goes with some cells only: the epsilon of normalisation, and shares of h and c that zoneout keeps.

    With a seed they are shares of the units, drawn; without, of every unit's value.
    """

    eps: float = 1e-5
    zoneout: float = 0.0
    zoneout_cell: float = 0.0
    seed: Tensor | None = None


PLAIN = Options()


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


def _normalised(x: Tensor, weight_and_bias: Tensor, eps: float) -> Tensor:
    # Not torch's layer_norm, whose third derivatives are wrong (2.13). It sums in float32 too.
    normal, _ = _deviations(x.to(compute_dtype(x.dtype)), eps)
    return (normal * weight_and_bias[0] + weight_and_bias[1]).to(x.dtype)


def _deviations(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of a row from its mean, in standard deviations; and the inverse of one."""
    off = x - x.mean(-1, keepdim=True)
    scale = ((off * off).mean(-1, keepdim=True) + eps).rsqrt()
    return off * scale, scale


def _cell(
    mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Weights, options: Options = PLAIN
) -> tuple[Tensor, Tensor]:
    weight_hh = weights["weight_hh"]
    of_input = linear(x, weights["weight_ih"], weights.get("bias_ih")) if "weight_ih" in weights else x
    if mode == "reset_before_gru":
        shared, candidate = weight_hh.split([2 * h.size(-1), h.size(-1)])
        (r, z, n), (hr, hz) = of_input.chunk(3, -1), linear(h, shared).chunk(2, -1)
        z = (z + hz).sigmoid()
        return (1 - z) * (n + linear((r + hr).sigmoid() * h, candidate)).tanh() + z * h, c
    of_hidden = linear(h, weight_hh, weights.get("bias_hh"))
    if mode == "layer_norm_lstm":
        of_hidden = _normalised(of_hidden, weights["norm_hidden"], options.eps)
    elif mode == "layer_norm_gru":
        sizes = [2 * h.size(-1), h.size(-1)]
        parts = zip(of_hidden.split(sizes, -1), weights["norm_hidden"].split(sizes, -1), strict=True)
        of_hidden = torch.cat([_normalised(part, own, options.eps) for part, own in parts], -1)
    if has_cells(mode):
        i, f, g, o = (of_input + of_hidden).chunk(4, -1)
        if mode == "peephole_lstm":
            of_i, of_f, of_o = weights["weight_peephole"]
            i, f = i + of_i * c, f + of_f * c
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if mode == "peephole_lstm":
            o = o + of_o * c
        seen = _normalised(c, weights["norm_cell"], options.eps) if "norm_cell" in weights else c
        h = o.sigmoid() * seen.tanh()
        return (h @ weights["weight_hr"].mT if "weight_hr" in weights else h), c
    if GATES[mode] == 3:
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
        z = (z + hz).sigmoid()
        return (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h, c
    return (of_input + of_hidden).tanh() if mode == "tanh" else (of_input + of_hidden).relu(), c


Kept = tuple[Tensor | float, Tensor | float]


def kept_units(options: Options, step: int, sequences: Tensor, direction: int, hidden: int) -> Kept | None:
    """What zoneout keeps of h and c at a step of these sequences: masks where it is drawn, shares where it is not.

    24 bits of Philox decide for one unit, those on top of word 0 (h) or 1 (c) of counter ``(unit, step, sequence,
    direction)``: the layout makes no difference.
    """
    shares = (options.zoneout, options.zoneout_cell)
    if not any(shares):
        return None
    seed = options.seed
    if seed is None:
        return shares
    unit = torch.arange(hidden, device=seed.device)
    place = (unit, torch.full_like(unit, step), sequences.to(seed.device)[:, None], torch.full_like(unit, direction))
    words = philox(torch.broadcast_tensors(*place), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    h, c = ((word >> 8 < round(share * 2**24)).to(sequences.device) for word, share in zip(words, shares, strict=False))
    return h, c


def _step(
    mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Weights, options: Options = PLAIN, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """States after a step."""
    fresh = _cell(mode, x, h, c, weights, options)
    if kept is None:
        return fresh
    new_h, new_c = (
        torch.where(keep, old, new) if isinstance(keep, Tensor) else torch.lerp(new, old, keep)
        for keep, old, new in zip(kept, (h, c), fresh, strict=True)
    )
    return new_h, new_c


def _run(
    mode: str,
    x: list[Tensor],
    h: Tensor,
    c: Tensor,
    weights: Weights,
    reverse: bool,
    options: Options = PLAIN,
    slots: Tensor | None = None,
) -> Run:
    """One direction over steps whose rows are the first so many sequences; states are those of all, by slot.

    Returns h of every token, h and c after the last ones, and c of every token. ``slots`` says which sequences they
    are.
    """
    outputs: list[Tensor] = []
    cells: list[Tensor] = []
    steps = list(enumerate(x))
    for step, rows in reversed(steps) if reverse else steps:
        running = rows.size(0)
        kept = None if slots is None else kept_units(options, step, slots[:running], int(reverse), c.size(-1))
        new_h, new_c = _step(mode, rows, h[:running], c[:running], weights, options, kept)
        outputs.append(new_h)
        cells.append(new_c)
        h, c = torch.cat([new_h, h[running:]]), torch.cat([new_c, c[running:]])
    of_tokens = [torch.cat(list(reversed(found)) if reverse else found) for found in (outputs, cells)]
    return of_tokens[0], h, c, of_tokens[1]


def split_weights(params: Sequence[Tensor], directions: int, mode: str) -> list[Weights]:
    """The parameters of each direction by name."""
    each = len(params) // directions
    names = param_names(mode, each)
    return [dict(zip(names, params[first : first + each], strict=True)) for first in range(0, len(params), each)]


def own_products(mode: str, data: Tensor, direction: int, hidden: int) -> Tensor:
    """What a direction reads: the input, or its own products in its place."""
    if mode not in NORMALISED:
        return data
    rows = GATES[mode] * hidden
    return data[..., direction * rows : (direction + 1) * rows]


def _rows_of(mode: str, data: Tensor, direction: int, hidden: int, batch_sizes: list[int]) -> list[Tensor]:
    """The same, step by step."""
    data = own_products(mode, data, direction, hidden)
    return list(data.split(batch_sizes)) if batch_sizes else []


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
    options: Options = PLAIN,
    wide: torch.dtype | None = None,
) -> Results:
    """What ``torch.ops.ptkernels.packed_rnn`` computes: output, h_n, and c_n (empty where there are no cells).

    With ``all_cells`` the rows of output go on with the cells of their token. Computes in ``wide``, by default
    :func:`compute_dtype`.
    """
    dtype, wide = input.dtype, wide or compute_dtype(input.dtype)
    order = order_of(input, sizes, sorted_indices, batch_size, layout)
    directions = 2 if bidirectional else 1
    weights = split_weights([param.to(wide) for param in params], directions, mode)
    data = input.to(wide).reshape(-1, input.size(-1)).index_select(0, order.rows)
    hidden = params[0].size(0) // GATES[mode]
    outputs = weights[0]["weight_hr"].size(0) if "weight_hr" in weights[0] else hidden
    h0 = data.new_zeros(directions, batch_size, outputs) if not state else state[0].to(wide)
    c0 = data.new_zeros(directions, batch_size, hidden) if len(state) < 2 else state[1].to(wide)
    x = [_rows_of(mode, data, d, hidden, order.batch_sizes) for d in range(directions)]
    if not order.batch_sizes:
        # No token: nothing is computed, and every derivative is there and 0.
        nothing = torch.stack([tensor.flatten()[:0].sum().to(wide) for tensor in (data, *params)]).sum()
        h0, c0 = h0 + nothing, c0 + nothing
        x = [_rows_of(mode, data + nothing, d, hidden, [0]) for d in range(directions)]
    found = []
    for d in range(directions):
        h, c = h0[d].index_select(0, order.slots), c0[d].index_select(0, order.slots)
        found.append(_run(mode, x[d], h, c, weights[d], d == 1, options, order.slots))
    unsorted = order.slots.argsort()
    rows = torch.cat([output for output, *_ in found] + [cells for *_, cells in found] * all_cells, -1)
    output = rows.new_zeros(input.shape[:-1].numel(), rows.size(1)).index_copy(0, order.rows, rows)
    h_n = torch.stack([h.index_select(0, unsorted) for _, h, *_ in found]).to(dtype)
    c_n = torch.stack([c.index_select(0, unsorted) for _, _, c, _ in found]).to(dtype)
    if not has_cells(mode):
        c_n = input.new_empty(0)
    return output.to(dtype).reshape(*input.shape[:-1], rows.size(1)), h_n, c_n


def packed_rnn(
    input: Tensor,
    weight_ih: Tensor | None,
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
    weight_peephole: Tensor | None = None,
    norm_hidden: Tensor | None = None,
    norm_cell: Tensor | None = None,
    eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0.0,
    train: bool = False,
) -> tuple[Tensor, ...]:
    """Plain torch :func:`ptkernels.packed_rnn`: same arguments and results, one step at a time.

    Computes in float64 for float64 and in float32 otherwise, rounding at the end. Differentiable any number of times in
    forward and reverse mode; ``recompute`` makes no difference.
    """
    from ptkernels.ops.packed_rnn.layer import as_op_arguments, as_options, as_results

    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, norm_hidden, norm_cell)
    args = as_op_arguments(input, weights, hx, cx, mode, sizes, layout, batch_size, sorted_indices)
    return as_results(layer(*args, return_cells, as_options(eps, zoneout, train)), mode, return_cells)


def _normal_gradients(x: Tensor, weight_and_bias: Tensor, eps: float, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`_normalised`: of x, of weight and bias."""
    normal, scale = _deviations(x, eps)
    scaled = grad * weight_and_bias[0]
    of_x = scale * (scaled - scaled.mean(-1, keepdim=True) - normal * (scaled * normal).mean(-1, keepdim=True))
    return of_x, torch.stack([(grad * normal).sum(0), grad.sum(0)])


def _lstm_gradients(
    gates: Tensor, c: Tensor, weights: Weights, eps: float, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Gradients of the gates before activation but for peepholes, of c, and of the weights behind the products."""
    of: dict[str, Tensor] = {}
    i, f, g, o = gates.chunk(4, -1)
    peephole = weights.get("weight_peephole")
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[1] * c
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    fresh = f * c + i * g
    o = (o if peephole is None else o + peephole[2] * fresh).sigmoid()
    squashed = (_normalised(fresh, weights["norm_cell"], eps) if "norm_cell" in weights else fresh).tanh()
    if "weight_hr" in weights:
        of["weight_hr"] = grad_h.mT @ (o * squashed)
        grad_h = grad_h @ weights["weight_hr"]
    grad_o, grad_seen = grad_h * squashed * o * (1 - o), grad_h * o * (1 - squashed * squashed)
    if "norm_cell" in weights:
        grad_seen, of["norm_cell"] = _normal_gradients(fresh, weights["norm_cell"], eps, grad_seen)
    grad_c = grad_c + grad_seen
    if peephole is not None:
        grad_c = grad_c + grad_o * peephole[2]
    grad_i, grad_f, grad_g = grad_c * g * i * (1 - i), grad_c * c * f * (1 - f), grad_c * i * (1 - g * g)
    grad_c = grad_c * f
    if peephole is not None:
        grad_c = grad_c + grad_i * peephole[0] + grad_f * peephole[1]
        of["weight_peephole"] = torch.stack([(grad_i * c).sum(0), (grad_f * c).sum(0), (grad_o * fresh).sum(0)])
    return torch.cat([grad_i, grad_f, grad_g, grad_o], -1), grad_c, of


def _cell_gradients(
    mode: str, x: Tensor, h: Tensor, c: Tensor, weights: Weights, options: Options, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of a step before zoneout: of x, h, c and the weights."""
    weight_hh, eps = weights["weight_hh"], options.eps
    groups = [weight_hh.size(0)] if has_cells(mode) else [2 * h.size(-1), h.size(-1)]
    of_input = linear(x, weights["weight_ih"], weights.get("bias_ih")) if "weight_ih" in weights else x
    of_hidden = product = linear(h, weight_hh, weights.get("bias_hh"))
    if "norm_hidden" in weights:
        parts = zip(product.split(groups, -1), weights["norm_hidden"].split(groups, -1), strict=True)
        of_hidden = torch.cat([_normalised(part, own, eps) for part, own in parts], -1)
    of: dict[str, Tensor] = {}
    through_h: Tensor | None = None
    if has_cells(mode):
        of_x, grad_c, of = _lstm_gradients(of_input + of_hidden, c, weights, eps, grad_h, grad_c)
        of_h = of_x
    elif GATES[mode] == 3:
        (r, z, n), (hr, hz, hn) = of_input.chunk(3, -1), of_hidden.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        resets_before = mode == "reset_before_gru"
        candidate = weight_hh[groups[0] :]
        n = (n + (linear(r * h, candidate) if resets_before else r * hn)).tanh()
        grad_n = grad_h * (1 - z) * (1 - n * n)
        grad_reset = grad_n @ candidate if resets_before else grad_n
        grad_r = grad_reset * (h if resets_before else hn) * r * (1 - r)
        shared = [grad_r, grad_h * (h - n) * z * (1 - z)]
        of_x = torch.cat([*shared, grad_n], -1)
        of_h = torch.cat([*shared, torch.zeros_like(grad_n) if resets_before else grad_n * r], -1)
        through_h = grad_h * z
        if resets_before:
            through_h = through_h + grad_reset * r
            of["weight_hh"] = torch.cat([torch.cat(shared, -1).mT @ h, grad_n.mT @ (r * h)])
    else:
        total = of_input + of_hidden
        slope = 1 - total.tanh() ** 2 if mode == "tanh" else (total > 0).to(total.dtype)
        of_x = of_h = grad_h * slope
    if "norm_hidden" in weights:
        split = (tensor.split(groups, -1) for tensor in (product, weights["norm_hidden"], of_h))
        found = [_normal_gradients(part, own, eps, grad) for part, own, grad in zip(*split, strict=True)]
        of_h, of["norm_hidden"] = (torch.cat(grads, -1) for grads in zip(*found, strict=True))
    of.setdefault("weight_hh", of_h.mT @ h)
    of |= {"bias_hh": of_h.sum(0), "bias_ih": of_x.sum(0)}
    if "weight_ih" in weights:
        of["weight_ih"] = of_x.mT @ x
        of_x = of_x @ weights["weight_ih"]
    grad_before = of_h @ weight_hh
    grad_before = grad_before if through_h is None else grad_before + through_h
    return of_x, grad_before, grad_c, *(of[name] for name in weights)


def _step_gradients(
    mode: str,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    kept: Kept | None,
    grad_h: Tensor,
    grad_c: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of a step: of x, h, c and the weights."""
    if kept is None:
        return _cell_gradients(mode, x, h, c, weights, options, grad_h, grad_c)
    past_h, past_c = grad_h * kept[0], grad_c * kept[1]
    fresh = (grad_h - past_h, grad_c - past_c)
    of_x, of_h, of_c, *of_weights = _cell_gradients(mode, x, h, c, weights, options, *fresh)
    return of_x, of_h + past_h, of_c + past_c, *of_weights


def _run_gradients(
    mode: str,
    x: list[Tensor],
    states: tuple[Tensor, Tensor],
    weights: Weights,
    grads: tuple[list[Tensor], list[Tensor] | None, Tensor, Tensor],
    reverse: bool,
    options: Options,
    slots: Tensor,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Gradients of one direction: of x in packed order, the weights, h and c before the first step."""
    h, c = states
    grad_outputs, grad_cells, grad_h, grad_c = grads
    steps = list(range(len(x)))[:: -1 if reverse else 1]
    before = []
    for step in steps:
        running = x[step].size(0)
        kept = kept_units(options, step, slots[:running], int(reverse), c.size(-1))
        before.append((h[:running], c[:running], kept))
        new_h, new_c = _step(mode, x[step], h[:running], c[:running], weights, options, kept)
        h, c = torch.cat([new_h, h[running:]]), torch.cat([new_c, c[running:]])
    grad_x: dict[int, Tensor] = {}
    sums: list[Tensor] = []
    for step, (h, c, kept) in zip(reversed(steps), reversed(before), strict=True):
        running = x[step].size(0)
        incoming = grad_h[:running] + grad_outputs[step]
        of_cells = grad_c[:running] if grad_cells is None else grad_c[:running] + grad_cells[step]
        found = _step_gradients(mode, x[step], h, c, weights, options, kept, incoming, of_cells)
        grad_x[step], new_h, new_c, *own = found
        grad_h, grad_c = torch.cat([new_h, grad_h[running:]]), torch.cat([new_c, grad_c[running:]])
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
    options: Options = PLAIN,
) -> list[Tensor]:
    """First derivatives by input, states and parameters, written so that they can be differentiated further.

    ``grads`` are those of output, h_n and c_n, None where one is zero.
    """
    wide = compute_dtype(input.dtype)
    order = order_of(input, sizes, sorted_indices, batch_size, layout)
    directions = 2 if bidirectional else 1
    weights = split_weights([param.to(wide) for param in params], directions, mode)
    flat = input.to(wide).reshape(-1, input.size(-1))
    data = flat.index_select(0, order.rows)
    hidden = params[0].size(0) // GATES[mode]
    outputs = weights[0]["weight_hr"].size(0) if "weight_hr" in weights[0] else hidden

    def by_slot(tensor: Tensor | None, features: int) -> Tensor:
        if tensor is None:
            return flat.new_zeros(directions, batch_size, features)
        return tensor.to(wide).index_select(1, order.slots)

    h0 = by_slot(state[0] if state else None, outputs)
    c0 = by_slot(state[1] if len(state) > 1 else None, hidden)
    grad_h, grad_c = by_slot(grads[1], outputs), by_slot(grads[2] if has_cells(mode) else None, hidden)
    features = directions * (outputs + hidden * all_cells)
    of_output = flat.new_zeros(flat.size(0), features) if grads[0] is None else grads[0].to(wide)
    of_output = of_output.reshape(flat.size(0), features).index_select(0, order.rows)
    if not order.batch_sizes:
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
        x = _rows_of(mode, data, d, hidden, order.batch_sizes)
        found.append(_run_gradients(mode, x, (h0[d], c0[d]), weights[d], flowing, d == 1, options, order.slots))
    unsorted = order.slots.argsort()
    own_rows = [own[0] for own in found]
    grad_rows = (
        torch.cat(own_rows, -1) if mode in NORMALISED else own_rows[0] if directions == 1 else own_rows[0] + own_rows[1]
    )
    grad_input = flat.new_zeros(flat.shape).index_copy(0, order.rows, grad_rows).reshape(input.shape)
    by_state = ([own[2] for own in found], [own[3] for own in found])[: len(state)]
    of_states = [torch.stack(of_state).index_select(1, unsorted) for of_state in by_state]
    of_params = [grad for own in found for grad in own[1]]
    tensors = (input, *state, *params)
    return [grad.to(tensor.dtype) for grad, tensor in zip((grad_input, *of_states, *of_params), tensors, strict=True)]
