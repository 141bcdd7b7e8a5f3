"""Device code of recurrent layers in Triton: the recurrence, forward and backward, over ragged sequences.

    lstm   i, f, o = sigmoid(xW + hU + b),  g = tanh(..),  c' = f c + i g,  h' = o tanh(c')   [h' = (o tanh(c')) W_r]
    gru    r, z = sigmoid(xW + hU + b),  n = tanh(xW_n + b_n + r (hU_n + b'_n)),  h' = (1 - z) n + z h
    rnn    h' = tanh(xW + hU + b), or relu

Layout: sequences are slots, longest first, so that those which run at step t are the first of them; their tokens are
rows FIRST[t] + slot of XG = xW, GATES, CELLS and DG (packed order). OUT and its gradient are in the caller's order,
ROWS naming the row of each token. The second direction runs the steps backwards: before step t comes t - 1 or t + 1.

Tiling: the product of the inputs is taken for all tokens ahead. Where all of U fits beside a block of sequences, a
program owns BLOCK_B sequences of one direction for all steps (`forward`, `backward`): U, h, and c stay on the chip, and
nothing waits for another program. Larger layers launch once per step (`forward_step`, `backward_step`), a program
owning BLOCK_B sequences and BLOCK_N units, whose cells it alone reads and writes. A projection sums over all units, so
it is a second launch of every step (`project_step`, `output_gradient_step`), whose programs own BLOCK_N of the OUTPUTS
that h then has; elsewhere OUTPUTS is HIDDEN. Gates are saved after activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import sigmoid, tanh, widened, zeros

LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
TANH = tl.constexpr(2)
RELU = tl.constexpr(3)


@triton.jit
def _runs(step, length):
    """Which sequences have a token at a step, which may be one beyond either end."""
    at = tl.zeros(length.shape, length.dtype) + step
    return (at >= 0) & (at < length)


@triton.jit
def _offset(d, WIDE: tl.constexpr):
    """A direction as a factor of offsets: in 64 bits where one direction is too large for 32, which costs registers."""
    return d.to(tl.int64) if WIDE else d


@triton.jit
def _recurrent_gate(gate: tl.constexpr, MODE: tl.constexpr):
    """Where the forward saves the gradient of a gate's recurrent term: n of a gru has one of its own, the fourth."""
    return 3 if MODE == GRU and gate == 2 else gate


@triton.jit
def _load_weight(U, gate, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """U[gate * ROWS + rows, columns], in the shape that rows and columns broadcast to, 0 beyond."""
    inside = (rows < ROWS) & (columns < COLUMNS)
    return tl.load(U + (gate * ROWS + rows).to(tl.int64) * COLUMNS + columns, mask=inside, other=0.0)


@triton.jit
def _load_units(pointer, row, unit, valid, width, HIDDEN: tl.constexpr):
    """A tile of [rows, units] in the dtype of sums, 0 where a row is not valid."""
    inside = valid[:, None] & (unit[None, :] < HIDDEN)
    return widened(tl.load(pointer + row.to(tl.int64)[:, None] * width + unit[None, :], mask=inside, other=0.0))


@triton.jit
def _store_units(pointer, row, unit, valid, width, values, HIDDEN: tl.constexpr):
    inside = valid[:, None] & (unit[None, :] < HIDDEN)
    there = pointer + row.to(tl.int64)[:, None] * width + unit[None, :]
    tl.store(there, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rows_of(ROWS, token, valid, HAS_ROWS: tl.constexpr):
    """Rows of tokens in the caller's order."""
    if HAS_ROWS:
        token = tl.load(ROWS + token, mask=valid, other=0)
    return token


@triton.jit
def _bias(B_IH, B_HH, gate, unit, HIDDEN: tl.constexpr):
    there = gate * HIDDEN + unit
    own = widened(tl.load(B_IH + there, mask=unit < HIDDEN, other=0.0))
    return own + widened(tl.load(B_HH + there, mask=unit < HIDDEN, other=0.0))


@triton.jit
def _with_input(
    sums, XG, B_IH, B_HH, gate: tl.constexpr, token, unit, active, width, HAS_BIAS: tl.constexpr, HIDDEN: tl.constexpr
):
    """The gate before activation, from its recurrent sum."""
    sums += _load_units(XG + gate * HIDDEN, token, unit, active, width, HIDDEN)
    if HAS_BIAS:
        sums += _bias(B_IH, B_HH, gate, unit, HIDDEN)[None, :]
    return sums


@triton.jit
def _cell(
    s0, s1, s2, s3, h, c, XG, B_IH, B_HH, GATES, CELLS, token, unit, active, width,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """New h and c of a tile from its recurrent sums; saves what the backward needs."""
    s0 = _with_input(s0, XG, B_IH, B_HH, 0, token, unit, active, width, HAS_BIAS, HIDDEN)
    row = token * 4
    if MODE == LSTM:
        s1 = _with_input(s1, XG, B_IH, B_HH, 1, token, unit, active, width, HAS_BIAS, HIDDEN)
        s2 = _with_input(s2, XG, B_IH, B_HH, 2, token, unit, active, width, HAS_BIAS, HIDDEN)
        s3 = _with_input(s3, XG, B_IH, B_HH, 3, token, unit, active, width, HAS_BIAS, HIDDEN)
        s0, s1, s2, s3 = sigmoid(s0), sigmoid(s1), tanh(s2), sigmoid(s3)
        c = s1 * c + s0 * s2
        h = s3 * tanh(c)
        if SAVE:
            _store_units(CELLS, token, unit, active, HIDDEN, c, HIDDEN)
    elif MODE == GRU:
        s1 = _with_input(s1, XG, B_IH, B_HH, 1, token, unit, active, width, HAS_BIAS, HIDDEN)
        s0, s1, s3 = sigmoid(s0), sigmoid(s1), s2
        s2 = _load_units(XG + 2 * HIDDEN, token, unit, active, width, HIDDEN)
        if HAS_BIAS:
            there = 2 * HIDDEN + unit
            s2 += widened(tl.load(B_IH + there, mask=unit < HIDDEN, other=0.0))[None, :]
            s3 += widened(tl.load(B_HH + there, mask=unit < HIDDEN, other=0.0))[None, :]
        s2 = tanh(s2 + s0 * s3)
        h = (1.0 - s1) * s2 + s1 * h
    elif MODE == TANH:
        h = tanh(s0)
    else:
        h = tl.maximum(s0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if SAVE and (MODE == LSTM or MODE == GRU):
        _store_units(GATES, row, unit, active, HIDDEN, s0, HIDDEN)
        _store_units(GATES, row + 1, unit, active, HIDDEN, s1, HIDDEN)
        _store_units(GATES, row + 2, unit, active, HIDDEN, s2, HIDDEN)
        _store_units(GATES, row + 3, unit, active, HIDDEN, s3, HIDDEN)
    return h, c


@triton.jit
def forward(
    XG, U, B_IH, B_HH, H_START, C, FIRST, LENGTHS, ROWS, OUT, H_N, GATES, CELLS, batch, tokens_saved, directions,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, GATE_COUNT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_B sequences."""
    d = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    real = slot < batch
    length = tl.load(LENGTHS + slot, mask=real, other=0)
    width = directions * GATE_COUNT * HIDDEN
    XG += d * GATE_COUNT * HIDDEN
    U += d.to(tl.int64) * GATE_COUNT * HIDDEN * HIDDEN
    B_IH += d * GATE_COUNT * HIDDEN
    B_HH += d * GATE_COUNT * HIDDEN
    GATES += _offset(d, WIDE) * tokens_saved * 4 * HIDDEN
    CELLS += _offset(d, WIDE) * tokens_saved * HIDDEN
    OUT += d * HIDDEN
    state = d * batch + slot

    u0 = _load_weight(U, 0, unit[None, :], unit[:, None], HIDDEN, HIDDEN)
    if GATE_COUNT > 1:
        u1 = _load_weight(U, 1, unit[None, :], unit[:, None], HIDDEN, HIDDEN)
        u2 = _load_weight(U, 2, unit[None, :], unit[:, None], HIDDEN, HIDDEN)
    if GATE_COUNT > 3:
        u3 = _load_weight(U, 3, unit[None, :], unit[:, None], HIDDEN, HIDDEN)
    h = _load_units(H_START, state, unit, real, HIDDEN, HIDDEN).to(U.dtype.element_ty)
    c = _load_units(C, state, unit, real, HIDDEN, HIDDEN)
    steps = tl.max(length, 0)
    for i in range(0, steps):
        t = tl.where(d == 0, i, steps - 1 - i)
        active = t < length
        token = tl.load(FIRST + t) + slot
        s0 = tl.dot(h, u0, input_precision=PRECISION)
        s1, s2, s3 = s0, s0, s0
        if GATE_COUNT > 1:
            s1 = tl.dot(h, u1, input_precision=PRECISION)
            s2 = tl.dot(h, u2, input_precision=PRECISION)
        if GATE_COUNT > 3:
            s3 = tl.dot(h, u3, input_precision=PRECISION)
        new_h, new_c = _cell(
            s0, s1, s2, s3, widened(h), c, XG, B_IH, B_HH, GATES, CELLS, token, unit, active, width,
            MODE, HIDDEN, HAS_BIAS, SAVE,
        )  # fmt: skip
        h = tl.where(active[:, None], new_h.to(h.dtype), h)
        c = tl.where(active[:, None], new_c, c)
        row = _rows_of(ROWS, token, active, HAS_ROWS)
        _store_units(OUT, row, unit, active, directions * HIDDEN, h, HIDDEN)
    _store_units(H_N, state, unit, real, HIDDEN, h, HIDDEN)
    _store_units(C, state, unit, real, HIDDEN, c, HIDDEN)


@triton.jit(do_not_specialize=["step"])
def forward_step(
    XG, U, B_IH, B_HH, H_START, C, FIRST, LENGTHS, ROWS, OUT, H_N, GATES, CELLS, batch, tokens_saved, directions,
    UNPROJECTED, OUT_CELLS, step, steps,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, PROJECTED: tl.constexpr, GATE_COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROWS: tl.constexpr, SAVE: tl.constexpr, ALL_CELLS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK_B sequences and BLOCK_N units. Cells stay in C, h is read where the step before wrote it.

    What a projection multiplies goes to UNPROJECTED, [directions, batch, HIDDEN], for `project_step`; ALL_CELLS: cells
    go to OUT_CELLS, in the caller's order, as well.
    """
    d = tl.program_id(2)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.where(d == 0, step, steps - 1 - step)
    length = tl.load(LENGTHS + slot, mask=slot < batch, other=0)
    active = t < length
    before = t - 1 + 2 * d
    continued = active & _runs(before, length)
    begun = active & (continued == 0)
    token = tl.load(FIRST + t) + slot
    token_before = tl.load(FIRST + tl.maximum(before, 0)) + slot
    width = directions * GATE_COUNT * HIDDEN
    XG += d * GATE_COUNT * HIDDEN
    U += d.to(tl.int64) * GATE_COUNT * HIDDEN * OUTPUTS
    B_IH += d * GATE_COUNT * HIDDEN
    B_HH += d * GATE_COUNT * HIDDEN
    GATES += _offset(d, WIDE) * tokens_saved * 4 * HIDDEN
    CELLS += _offset(d, WIDE) * tokens_saved * HIDDEN
    OUT += d * OUTPUTS
    state = d * batch + slot
    row_before = _rows_of(ROWS, token_before, continued, HAS_ROWS)

    s0 = zeros((BLOCK_B, BLOCK_N), U)
    s1, s2, s3 = s0, s0, s0
    for first in range(0, OUTPUTS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        h = _load_units(OUT, row_before, k, continued, directions * OUTPUTS, OUTPUTS)
        h = tl.where(begun[:, None], _load_units(H_START, state, k, begun, OUTPUTS, OUTPUTS), h).to(U.dtype.element_ty)
        u = _load_weight(U, 0, unit[None, :], k[:, None], HIDDEN, OUTPUTS)
        s0 = tl.dot(h, u, s0, input_precision=PRECISION, out_dtype=s0.dtype)
        if GATE_COUNT > 1:
            u = _load_weight(U, 1, unit[None, :], k[:, None], HIDDEN, OUTPUTS)
            s1 = tl.dot(h, u, s1, input_precision=PRECISION, out_dtype=s1.dtype)
            u = _load_weight(U, 2, unit[None, :], k[:, None], HIDDEN, OUTPUTS)
            s2 = tl.dot(h, u, s2, input_precision=PRECISION, out_dtype=s2.dtype)
        if GATE_COUNT > 3:
            u = _load_weight(U, 3, unit[None, :], k[:, None], HIDDEN, OUTPUTS)
            s3 = tl.dot(h, u, s3, input_precision=PRECISION, out_dtype=s3.dtype)

    own_h = s0
    if MODE == GRU:
        own_h = _load_units(OUT, row_before, unit, continued, directions * HIDDEN, HIDDEN)
        own_h = tl.where(begun[:, None], _load_units(H_START, state, unit, begun, HIDDEN, HIDDEN), own_h)
    c = _load_units(C, state, unit, active, HIDDEN, HIDDEN)
    h, c = _cell(
        s0, s1, s2, s3, own_h, c, XG, B_IH, B_HH, GATES, CELLS, token, unit, active, width,
        MODE, HIDDEN, HAS_BIAS, SAVE,
    )  # fmt: skip
    _store_units(C, state, unit, active, HIDDEN, c, HIDDEN)
    row = _rows_of(ROWS, token, active, HAS_ROWS)
    if ALL_CELLS:
        _store_units(OUT_CELLS + d * HIDDEN, row, unit, active, directions * HIDDEN, c, HIDDEN)
    if PROJECTED:
        _store_units(UNPROJECTED, state, unit, active, HIDDEN, h, HIDDEN)
    else:
        _store_units(OUT, row, unit, active, directions * HIDDEN, h, HIDDEN)
        _store_units(H_N, state, unit, active, HIDDEN, h, HIDDEN)


@triton.jit(do_not_specialize=["step"])
def project_step(
    UNPROJECTED, W_R, FIRST, LENGTHS, ROWS, OUT, H_N, batch, directions, step, steps,
    HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The h that a step of `forward_step` leaves, BLOCK_N outputs of it."""
    d = tl.program_id(2)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.where(d == 0, step, steps - 1 - step)
    active = t < tl.load(LENGTHS + slot, mask=slot < batch, other=0)
    W_R += d.to(tl.int64) * OUTPUTS * HIDDEN
    state = d * batch + slot
    h = zeros((BLOCK_B, BLOCK_N), W_R)
    for first in range(0, HIDDEN, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        unprojected = _load_units(UNPROJECTED, state, k, active, HIDDEN, HIDDEN).to(W_R.dtype.element_ty)
        w = _load_weight(W_R, 0, output[None, :], k[:, None], OUTPUTS, HIDDEN)
        h = tl.dot(unprojected, w, h, input_precision=PRECISION, out_dtype=h.dtype)
    row = _rows_of(ROWS, tl.load(FIRST + t) + slot, active, HAS_ROWS)
    _store_units(OUT + d * OUTPUTS, row, output, active, directions * OUTPUTS, h, OUTPUTS)
    _store_units(H_N, state, output, active, OUTPUTS, h, OUTPUTS)


@triton.jit
def previous_states(
    OUT, H_START, FIRST, LENGTHS, ROWS, PREVIOUS, batch, tokens, directions,
    OUTPUTS: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The h that each token's step started from, [directions, tokens, OUTPUTS]: the operand of U's gradient."""
    t, d = tl.program_id(0), tl.program_id(2)
    slot = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    length = tl.load(LENGTHS + slot, mask=slot < batch, other=0)
    active = t < length
    before = t - 1 + 2 * d
    continued = active & _runs(before, length)
    begun = active & (continued == 0)
    token = tl.load(FIRST + t) + slot
    row_before = _rows_of(ROWS, tl.load(FIRST + tl.maximum(before, 0)) + slot, continued, HAS_ROWS)
    for first in range(0, OUTPUTS, BLOCK_N):
        unit = first + tl.arange(0, BLOCK_N)
        h = _load_units(OUT + d * OUTPUTS, row_before, unit, continued, directions * OUTPUTS, OUTPUTS)
        h = tl.where(begun[:, None], _load_units(H_START, d * batch + slot, unit, begun, OUTPUTS, OUTPUTS), h)
        _store_units(PREVIOUS, d * tokens + token, unit, active, OUTPUTS, h, OUTPUTS)


@triton.jit
def _cell_gradient(
    dh, dc, GATES, CELLS, C_START, PREVIOUS, OUT, DG, token, token_before, row, unit, active, continued, state,
    directions,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Gradients of the gates before activation from those of h and c; returns them, and dc and dh of the step before.

    The dh returned is the part that does not go through U.
    """
    through = tl.zeros(dh.shape, dh.dtype)
    saved = token * 4
    g0 = through
    if MODE == LSTM or MODE == GRU:
        g0 = _load_units(GATES, saved, unit, active, HIDDEN, HIDDEN)
    if MODE == LSTM:
        g1 = _load_units(GATES, saved + 1, unit, active, HIDDEN, HIDDEN)
        g2 = _load_units(GATES, saved + 2, unit, active, HIDDEN, HIDDEN)
        g3 = _load_units(GATES, saved + 3, unit, active, HIDDEN, HIDDEN)
        squashed = tanh(_load_units(CELLS, token, unit, active, HIDDEN, HIDDEN))
        begun = active & (continued == 0)
        c_before = _load_units(CELLS, token_before, unit, continued, HIDDEN, HIDDEN)
        c_before = tl.where(begun[:, None], _load_units(C_START, state, unit, begun, HIDDEN, HIDDEN), c_before)
        dc += dh * g3 * (1.0 - squashed * squashed)
        d0 = dc * g2 * g0 * (1.0 - g0)
        d1 = dc * c_before * g1 * (1.0 - g1)
        d2 = dc * g0 * (1.0 - g2 * g2)
        d3 = dh * squashed * g3 * (1.0 - g3)
        dc = dc * g1
    elif MODE == GRU:
        g1 = _load_units(GATES, saved + 1, unit, active, HIDDEN, HIDDEN)
        g2 = _load_units(GATES, saved + 2, unit, active, HIDDEN, HIDDEN)
        g3 = _load_units(GATES, saved + 3, unit, active, HIDDEN, HIDDEN)
        h_before = _load_units(PREVIOUS, token, unit, active, HIDDEN, HIDDEN)
        d2 = dh * (1.0 - g1) * (1.0 - g2 * g2)
        d0 = d2 * g3 * g0 * (1.0 - g0)
        d1 = dh * (h_before - g2) * g1 * (1.0 - g1)
        d3 = d2 * g0
        through = dh * g1
    else:
        h = _load_units(OUT, row, unit, active, directions * HIDDEN, HIDDEN)
        if MODE == TANH:
            d0 = dh * (1.0 - h * h)
        else:
            d0 = tl.where(h > 0.0, dh, 0.0)
        d1, d2, d3 = d0, d0, d0
    kept = token * STORED
    _store_units(DG, kept, unit, active, HIDDEN, d0, HIDDEN)
    if STORED > 1:
        _store_units(DG, kept + 1, unit, active, HIDDEN, d1, HIDDEN)
        _store_units(DG, kept + 2, unit, active, HIDDEN, d2, HIDDEN)
        _store_units(DG, kept + 3, unit, active, HIDDEN, d3, HIDDEN)
    return d0, d1, d2, d3, dc, through


@triton.jit
def backward(
    U, GATES, CELLS, C_START, PREVIOUS, OUT, GRAD_OUT, FIRST, LENGTHS, ROWS, DH, DC, DG,
    batch, tokens, tokens_saved, directions,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, GATE_COUNT: tl.constexpr, STORED: tl.constexpr, HAS_GRAD: tl.constexpr,
    HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All steps of BLOCK_B sequences, last first.

    DH and DC come as the gradients of the last states, and leave as those of the first.
    """
    d = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    real = slot < batch
    length = tl.load(LENGTHS + slot, mask=real, other=0)
    U += d.to(tl.int64) * GATE_COUNT * HIDDEN * HIDDEN
    GATES += _offset(d, WIDE) * tokens_saved * 4 * HIDDEN
    CELLS += _offset(d, WIDE) * tokens_saved * HIDDEN
    PREVIOUS += _offset(d, WIDE) * tokens * HIDDEN
    DG += _offset(d, WIDE) * tokens * STORED * HIDDEN
    OUT += d * HIDDEN
    GRAD_OUT += d * HIDDEN
    state = d * batch + slot

    u0 = _load_weight(U, 0, unit[:, None], unit[None, :], HIDDEN, HIDDEN)
    if GATE_COUNT > 1:
        u1 = _load_weight(U, 1, unit[:, None], unit[None, :], HIDDEN, HIDDEN)
        u2 = _load_weight(U, 2, unit[:, None], unit[None, :], HIDDEN, HIDDEN)
    if GATE_COUNT > 3:
        u3 = _load_weight(U, 3, unit[:, None], unit[None, :], HIDDEN, HIDDEN)
    dh = _load_units(DH, state, unit, real, HIDDEN, HIDDEN)
    dc = _load_units(DC, state, unit, real, HIDDEN, HIDDEN)
    steps = tl.max(length, 0)
    for i in range(0, steps):
        t = tl.where(d == 0, steps - 1 - i, i)
        active = t < length
        before = t - 1 + 2 * d
        continued = active & _runs(before, length)
        token = tl.load(FIRST + t) + slot
        token_before = tl.load(FIRST + tl.maximum(before, 0)) + slot
        row = _rows_of(ROWS, token, active, HAS_ROWS)
        incoming = dh
        if HAS_GRAD:
            incoming += _load_units(GRAD_OUT, row, unit, active, directions * HIDDEN, HIDDEN)
        d0, d1, d2, d3, new_dc, new_dh = _cell_gradient(
            incoming, dc, GATES, CELLS, C_START, PREVIOUS, OUT, DG, token, token_before, row, unit, active, continued,
            state, directions, MODE, HIDDEN, STORED,
        )  # fmt: skip
        new_dh = tl.dot(d0.to(u0.dtype), u0, new_dh, input_precision=PRECISION)
        if MODE == LSTM:
            new_dh = tl.dot(d1.to(u0.dtype), u1, new_dh, input_precision=PRECISION)
            new_dh = tl.dot(d2.to(u0.dtype), u2, new_dh, input_precision=PRECISION)
            new_dh = tl.dot(d3.to(u0.dtype), u3, new_dh, input_precision=PRECISION)
        elif MODE == GRU:
            new_dh = tl.dot(d1.to(u0.dtype), u1, new_dh, input_precision=PRECISION)
            new_dh = tl.dot(d3.to(u0.dtype), u2, new_dh, input_precision=PRECISION)
        dh = tl.where(active[:, None], new_dh, dh)
        dc = tl.where(active[:, None], new_dc, dc)
    _store_units(DH, state, unit, real, HIDDEN, dh, HIDDEN)
    _store_units(DC, state, unit, real, HIDDEN, dc, HIDDEN)


@triton.jit
def _state_gradient(
    DH, DG, U, FIRST, state, slot, unit, length, real, active, d, step, steps, t,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, GATE_COUNT: tl.constexpr, STORED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient that a step's h gets from the step after: DH, and DG of that step times U.

    In round `steps`, behind the last: that of the states before the first tokens.
    """
    after = t + 1 - 2 * d
    sent = _runs(after, length)
    if step == steps:
        after_state = tl.where(d == 0, 0, length - 1)
        sent = length > 0
    else:
        after_state = tl.zeros(length.shape, length.dtype) + after
        sent = sent & active
    token_after = tl.load(FIRST + after_state, mask=sent, other=0) + slot
    dh = _load_units(DH, state, unit, real, OUTPUTS, OUTPUTS)
    for gate in tl.static_range(0, GATE_COUNT):
        from_gate = token_after * STORED + _recurrent_gate(gate, MODE)
        for first in range(0, HIDDEN, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            dg = _load_units(DG, from_gate, k, sent, HIDDEN, HIDDEN).to(U.dtype.element_ty)
            u = _load_weight(U, gate, k[:, None], unit[None, :], HIDDEN, OUTPUTS)
            dh = tl.dot(dg, u, dh, input_precision=PRECISION, out_dtype=dh.dtype)
    return dh


@triton.jit(do_not_specialize=["step"])
def output_gradient_step(
    U, GRAD_OUT, FIRST, LENGTHS, ROWS, DH, DG, D_OUT, batch, tokens, directions, step, steps,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, GATE_COUNT: tl.constexpr, STORED: tl.constexpr,
    HAS_GRAD: tl.constexpr, HAS_ROWS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where h is projected: its gradient at one step, BLOCK_N outputs of it, to D_OUT for `backward_step`.

    DH holds what is to be added at a sequence's last token; round `steps` leaves there what the first ones send.
    """
    d = tl.program_id(2)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.where(d == 0, steps - 1 - step, step)
    real = slot < batch
    length = tl.load(LENGTHS + slot, mask=real, other=0)
    active = _runs(t, length)
    U += d.to(tl.int64) * GATE_COUNT * HIDDEN * OUTPUTS
    DG += _offset(d, WIDE) * tokens * STORED * HIDDEN
    D_OUT += _offset(d, WIDE) * tokens * OUTPUTS
    state = d * batch + slot
    dh = _state_gradient(
        DH, DG, U, FIRST, state, slot, output, length, real, active, d, step, steps, t,
        MODE, HIDDEN, OUTPUTS, GATE_COUNT, STORED, PRECISION, BLOCK_K,
    )  # fmt: skip
    if step == steps:
        _store_units(DH, state, output, real, OUTPUTS, dh, OUTPUTS)
    else:
        token = tl.load(FIRST + t) + slot
        if HAS_GRAD:
            row = _rows_of(ROWS, token, active, HAS_ROWS)
            dh += _load_units(GRAD_OUT + d * OUTPUTS, row, output, active, directions * OUTPUTS, OUTPUTS)
        _store_units(D_OUT, token, output, active, OUTPUTS, dh, OUTPUTS)
        _store_units(DH, state, output, active, OUTPUTS, tl.zeros(dh.shape, dh.dtype), OUTPUTS)


@triton.jit
def _through_projection(
    D_OUT, W_R, token, unit, active, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of what a projection multiplied, from that of its result."""
    dh = zeros((token.shape[0], unit.shape[0]), W_R)
    for first in range(0, OUTPUTS, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        d_out = _load_units(D_OUT, token, k, active, OUTPUTS, OUTPUTS).to(W_R.dtype.element_ty)
        w = _load_weight(W_R, 0, k[:, None], unit[None, :], OUTPUTS, HIDDEN)
        dh = tl.dot(d_out, w, dh, input_precision=PRECISION, out_dtype=dh.dtype)
    return dh


@triton.jit(do_not_specialize=["step"])
def backward_step(
    U, GATES, CELLS, C_START, PREVIOUS, OUT, GRAD_OUT, FIRST, LENGTHS, ROWS, DH, DC, DG,
    batch, tokens, tokens_saved, directions, W_R, D_OUT, GRAD_CELLS, step, steps,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, OUTPUTS: tl.constexpr, PROJECTED: tl.constexpr, GATE_COUNT: tl.constexpr,
    STORED: tl.constexpr, HAS_GRAD: tl.constexpr, ALL_CELLS: tl.constexpr, HAS_ROWS: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of BLOCK_B sequences and BLOCK_N units: dh = DH + grad_out + DG of the step after times U.

    DH holds the part of dh that did not go through U. Round `steps` adds what the first tokens send to the states.
    Where h is projected, dh comes from D_OUT, and there is no such round.
    """
    d = tl.program_id(2)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.where(d == 0, steps - 1 - step, step)
    real = slot < batch
    length = tl.load(LENGTHS + slot, mask=real, other=0)
    active = _runs(t, length)
    before = t - 1 + 2 * d
    continued = active & _runs(before, length)
    token = tl.load(FIRST + tl.minimum(tl.maximum(t, 0), steps)) + slot
    token_before = tl.load(FIRST + tl.minimum(tl.maximum(before, 0), steps)) + slot
    U += d.to(tl.int64) * GATE_COUNT * HIDDEN * OUTPUTS
    GATES += _offset(d, WIDE) * tokens_saved * 4 * HIDDEN
    CELLS += _offset(d, WIDE) * tokens_saved * HIDDEN
    PREVIOUS += _offset(d, WIDE) * tokens * HIDDEN
    DG += _offset(d, WIDE) * tokens * STORED * HIDDEN
    OUT += d * HIDDEN
    GRAD_OUT += d * HIDDEN
    state = d * batch + slot
    row = _rows_of(ROWS, token, active, HAS_ROWS)

    if PROJECTED:
        W_R += d.to(tl.int64) * OUTPUTS * HIDDEN
        D_OUT += _offset(d, WIDE) * tokens * OUTPUTS
        dh = _through_projection(D_OUT, W_R, token, unit, active, HIDDEN, OUTPUTS, PRECISION, BLOCK_K)
    else:
        dh = _state_gradient(
            DH, DG, U, FIRST, state, slot, unit, length, real, active, d, step, steps, t,
            MODE, HIDDEN, OUTPUTS, GATE_COUNT, STORED, PRECISION, BLOCK_K,
        )  # fmt: skip
    if step == steps:
        _store_units(DH, state, unit, real, HIDDEN, dh, HIDDEN)
    else:
        if HAS_GRAD and not PROJECTED:
            dh += _load_units(GRAD_OUT, row, unit, active, directions * HIDDEN, HIDDEN)
        dc = _load_units(DC, state, unit, active, HIDDEN, HIDDEN)
        if ALL_CELLS:
            dc += _load_units(GRAD_CELLS + d * HIDDEN, row, unit, active, directions * HIDDEN, HIDDEN)
        d0, d1, d2, d3, dc, through = _cell_gradient(
            dh, dc, GATES, CELLS, C_START, PREVIOUS, OUT, DG, token, token_before, row, unit, active, continued, state,
            directions, MODE, HIDDEN, STORED,
        )  # fmt: skip
        if not PROJECTED:
            _store_units(DH, state, unit, active, HIDDEN, through, HIDDEN)
        _store_units(DC, state, unit, active, HIDDEN, dc, HIDDEN)
