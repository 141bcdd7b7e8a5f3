"""Device code of recurrent cells in Triton that need more of a step than its product: a launch for each part of it.

    peephole_lstm     lstm with i, f = sigmoid(v + hU + p c),  o = sigmoid(v + hU + p c')
    layer_norm_lstm   lstm of v + LN(hU),  h' = o tanh(LN(c'))
    layer_norm_gru    gru of v + LN(hU), LN over r and z together and over n
    reset_before_gru  gru with n = tanh(v_n + (r h) U_n)
    zoneout           of these and of lstm and gru:  s' = s for units drawn with probability p,  or new + p (s - new)

    backward of y = n w + b,  n = (x - mean) s:   dx = s (g - mean(g) - n mean(g n)),  g = w dy

Layout: that of `triton_kernels`; v = xW + b in packed order. By slot, [directions, batch, ..]: the states H, C, DH and
DC, the products S of a step in the dtype of sums, and DS, the gradients of the recurrent terms, which U takes to h.

Tiling: `product` is a product of all running sequences with U or a part of it. The other kernels take all units of
BLOCK_B sequences, so what is summed over the units of a row needs nobody else. Gradients of peepholes and of the
weights of normalisation are added up by block of sequences, in OWN: no two programs write to the same place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import number, sigmoid, tanh, widened, zeros
from ptkernels.ops.packed_rnn.triton_kernels import GRU, _load_units, _rows_of, _store_units

PEEPHOLE_LSTM = tl.constexpr(4)
RESET_BEFORE_GRU = tl.constexpr(5)
LAYER_NORM_LSTM = tl.constexpr(6)
LAYER_NORM_GRU = tl.constexpr(7)

# What zoneout keeps: nothing, a share of every unit's value, or units that are drawn.
NOTHING = tl.constexpr(0)
SHARES = tl.constexpr(1)
DRAWN = tl.constexpr(2)


@triton.jit(do_not_specialize=["t0", "t1"])
def product(
    A, W, OUT, LENGTHS, batch, columns, depth, stride_ad, stride_ab, stride_wd, stride_wn, stride_wk, stride_od,
    stride_ob, t0, t1,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT[d, b, n] = sum_k A[d, b, k] W[d, n, k], or that added to it, for the sequences that run at the step."""
    d = tl.program_id(2)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.where(d == 0, t0, t1)
    active = t < tl.load(LENGTHS + slot, mask=slot < batch, other=0)
    # The first sequence of a block is its longest.
    if t < tl.load(LENGTHS + tl.program_id(0) * BLOCK_B):
        sums = zeros((BLOCK_B, BLOCK_N), A)
        rows = A + d.to(tl.int64) * stride_ad + slot.to(tl.int64)[:, None] * stride_ab
        weights = W + d.to(tl.int64) * stride_wd + column.to(tl.int64)[None, :] * stride_wn
        for first in range(0, depth, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            a = tl.load(rows + k[None, :], mask=active[:, None] & (k[None, :] < depth), other=0.0)
            inside = (k[:, None] < depth) & (column[None, :] < columns)
            w = tl.load(weights + k.to(tl.int64)[:, None] * stride_wk, mask=inside, other=0.0)
            sums = tl.dot(a, w, sums, input_precision=PRECISION, out_dtype=sums.dtype)
        out = OUT + d.to(tl.int64) * stride_od
        if ADD:
            sums += _load_units(out, slot, column, active, stride_ob, columns)
        _store_units(out, slot, column, active, stride_ob, sums, columns)


@triton.jit
def _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of a program: its direction, slots and step, which sequences run, their tokens, rows and places in the states."""
    d = tl.program_id(1)
    slot = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    t = tl.where(d == 0, t0, t1)
    length = tl.load(LENGTHS + slot, mask=slot < batch, other=0)
    active = t < length
    token = tl.load(FIRST + t) + slot
    return d, slot, t, length, active, token, _rows_of(ROWS, token, active, HAS_ROWS), d * batch + slot


@triton.jit
def _vector(POINTER, index, unit, HIDDEN: tl.constexpr):
    """One of the vectors of units at POINTER, as a row in the dtype of sums."""
    return widened(tl.load(POINTER + index * HIDDEN + unit, mask=unit < HIDDEN, other=0.0))[None, :]


@triton.jit
def _gate(
    XG, S, BIAS, q: tl.constexpr, token, state, unit, active, d, width, GATES: tl.constexpr, HIDDEN: tl.constexpr
):
    """Gate q before activation: its input term, bias, and recurrent term."""
    x = _load_units(XG + (d * GATES + q) * HIDDEN, token, unit, active, width, HIDDEN)
    x += _vector(BIAS, d * GATES + q, unit, HIDDEN)
    return x, _load_units(S + q * HIDDEN, state, unit, active, GATES * HIDDEN, HIDDEN)


@triton.jit
def _kept(
    SEED, SLOTS, slot, active, t, d, unit, share_h, share_c, below_h, below_c,
    ZONEOUT: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    """Shares of h and of c that stay as they were: where they are drawn, 24 bits of Philox decide for one unit."""
    zero = tl.zeros((slot.shape[0], unit.shape[0]), tl.int32)
    if ZONEOUT == DRAWN:
        sequence = slot
        if HAS_SLOTS:
            sequence = tl.load(SLOTS + slot, mask=active, other=0).to(tl.int32)
        bits_h, bits_c, _, _ = tl.philox(
            tl.load(SEED), zero + unit[None, :], zero + t, zero + sequence[:, None], zero + d
        )  # fmt: skip
        h = ((bits_h >> 8).to(tl.int32) < below_h).to(tl.float32)
        c = ((bits_c >> 8).to(tl.int32) < below_c).to(tl.float32)
    else:
        h, c = zero + share_h, zero + share_c
    return h, c


@triton.jit
def _mixed(fresh, before, kept, ZONEOUT: tl.constexpr):
    """A state after zoneout. A unit that is kept has the bits it had."""
    if ZONEOUT == DRAWN:
        return tl.where(kept > 0.0, before, fresh)
    else:
        return fresh + kept * (before - fresh)


@triton.jit
def _off_mean(x, mean, inside):
    return tl.where(inside, x - mean[:, None], 0.0)


@triton.jit
def _normal(x, inside, eps, HIDDEN: tl.constexpr):
    """Units in standard deviations from their row's mean; the mean, and the inverse of a deviation."""
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / HIDDEN
    off = _off_mean(x, mean, inside)
    scale = 1.0 / tl.sqrt(tl.sum(off * off, 1) / HIDDEN + eps)
    return off * scale[:, None], mean, scale


@triton.jit
def _normal_pair(x, y, inside, eps, HIDDEN: tl.constexpr):
    """The same of two gates that are one row."""
    mean = tl.sum(tl.where(inside, x + y, 0.0), 1) / (2 * HIDDEN)
    x, y = _off_mean(x, mean, inside), _off_mean(y, mean, inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x + y * y, 1) / (2 * HIDDEN) + eps)
    return x * scale[:, None], y * scale[:, None], scale


@triton.jit
def _normal_four(a, b, c, d, inside, eps, HIDDEN: tl.constexpr):
    """The same of four."""
    mean = tl.sum(tl.where(inside, a + b + c + d, 0.0), 1) / (4 * HIDDEN)
    a, b = _off_mean(a, mean, inside), _off_mean(b, mean, inside)
    c, d = _off_mean(c, mean, inside), _off_mean(d, mean, inside)
    scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b + c * c + d * d, 1) / (4 * HIDDEN) + eps)
    return a * scale[:, None], b * scale[:, None], c * scale[:, None], d * scale[:, None], scale


@triton.jit
def _store_four(pointer, row, unit, active, a, b, c, d, HIDDEN: tl.constexpr):
    """Rows from ``row`` on."""
    _store_units(pointer, row, unit, active, HIDDEN, a, HIDDEN)
    _store_units(pointer, row + 1, unit, active, HIDDEN, b, HIDDEN)
    _store_units(pointer, row + 2, unit, active, HIDDEN, c, HIDDEN)
    _store_units(pointer, row + 3, unit, active, HIDDEN, d, HIDDEN)


@triton.jit
def _store_one(pointer, row, valid, width, value):
    """A number for each row."""
    tl.store(pointer + row.to(tl.int64) * width, value, mask=valid)


@triton.jit(do_not_specialize=["t0", "t1"])
def lstm_cells(
    XG, S, BIAS, H, C, PEEPHOLE, NORM_HIDDEN, NORM_CELL, SEED, SLOTS, FIRST, LENGTHS, ROWS, OUT, OUT_CELLS, GATES,
    CELLS, batch, tokens_saved, directions, eps, share_h, share_c, below_h, below_c, t0, t1,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, SAVE: tl.constexpr, SAVED: tl.constexpr, ALL_CELLS: tl.constexpr,
    ZONEOUT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """H and C after a step of an LSTM, from the products S."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    inside = active[:, None] & (unit < HIDDEN)[None, :]
    width = directions * 4 * HIDDEN
    eps, share_h, share_c = number(eps, XG), number(share_h, XG), number(share_c, XG)
    GATES += d.to(tl.int64) * tokens_saved * SAVED * HIDDEN
    SUMS: tl.constexpr = HIDDEN + 3 if MODE == LAYER_NORM_LSTM else HIDDEN
    CELLS += d.to(tl.int64) * tokens_saved * SUMS
    x0, s0 = _gate(XG, S, BIAS, 0, token, state, unit, active, d, width, 4, HIDDEN)
    x1, s1 = _gate(XG, S, BIAS, 1, token, state, unit, active, d, width, 4, HIDDEN)
    x2, s2 = _gate(XG, S, BIAS, 2, token, state, unit, active, d, width, 4, HIDDEN)
    x3, s3 = _gate(XG, S, BIAS, 3, token, state, unit, active, d, width, 4, HIDDEN)
    if MODE == LAYER_NORM_LSTM:
        s0, s1, s2, s3, scale = _normal_four(s0, s1, s2, s3, inside, eps, HIDDEN)
        if SAVE:
            _store_four(GATES, token * SAVED + 4, unit, active, s0, s1, s2, s3, HIDDEN)
            _store_one(CELLS + HIDDEN, token, active, SUMS, scale)
        s0 = s0 * _vector(NORM_HIDDEN, d * 8, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 8 + 4, unit, HIDDEN)
        s1 = s1 * _vector(NORM_HIDDEN, d * 8 + 1, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 8 + 5, unit, HIDDEN)
        s2 = s2 * _vector(NORM_HIDDEN, d * 8 + 2, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 8 + 6, unit, HIDDEN)
        s3 = s3 * _vector(NORM_HIDDEN, d * 8 + 3, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 8 + 7, unit, HIDDEN)
    i, f, g, o = x0 + s0, x1 + s1, tanh(x2 + s2), x3 + s3
    c_before = _load_units(C, state, unit, active, HIDDEN, HIDDEN)
    if MODE == PEEPHOLE_LSTM:
        i += _vector(PEEPHOLE, d * 3, unit, HIDDEN) * c_before
        f += _vector(PEEPHOLE, d * 3 + 1, unit, HIDDEN) * c_before
    i, f = sigmoid(i), sigmoid(f)
    c = f * c_before + i * g
    if MODE == PEEPHOLE_LSTM:
        o += _vector(PEEPHOLE, d * 3 + 2, unit, HIDDEN) * c
    o = sigmoid(o)
    seen = c
    if MODE == LAYER_NORM_LSTM:
        normal, mean, scale = _normal(c, inside, eps, HIDDEN)
        seen = normal * _vector(NORM_CELL, d * 2, unit, HIDDEN) + _vector(NORM_CELL, d * 2 + 1, unit, HIDDEN)
        if SAVE:
            _store_one(CELLS + HIDDEN + 1, token, active, SUMS, mean)
            _store_one(CELLS + HIDDEN + 2, token, active, SUMS, scale)
    h = o * tanh(seen)
    if ZONEOUT != NOTHING:
        kept_h, kept_c = _kept(
            SEED, SLOTS, slot, active, t, d, unit, share_h, share_c, below_h, below_c, ZONEOUT, HAS_SLOTS
        )  # fmt: skip
        h = _mixed(h, _load_units(H, state, unit, active, HIDDEN, HIDDEN), kept_h, ZONEOUT)
        c = _mixed(c, c_before, kept_c, ZONEOUT)
    if SAVE:
        _store_four(GATES, token * SAVED, unit, active, i, f, g, o, HIDDEN)
        _store_units(CELLS, token, unit, active, SUMS, c, HIDDEN)
    _store_units(H, state, unit, active, HIDDEN, h, HIDDEN)
    _store_units(C, state, unit, active, HIDDEN, c, HIDDEN)
    _store_units(OUT + d * HIDDEN, row, unit, active, directions * HIDDEN, h, HIDDEN)
    if ALL_CELLS:
        _store_units(OUT_CELLS + d * HIDDEN, row, unit, active, directions * HIDDEN, c, HIDDEN)


@triton.jit(do_not_specialize=["t0", "t1"])
def reset(
    XG, S, BIAS, H, RESET_H, FIRST, LENGTHS, ROWS, GATES, batch, tokens_saved, directions, t0, t1,
    HIDDEN: tl.constexpr, SAVE: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """r h of a step, for the product with U_n."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    x, s = _gate(XG, S, BIAS, 0, token, state, unit, active, d, directions * 3 * HIDDEN, 3, HIDDEN)
    r = sigmoid(x + s)
    h = _load_units(H, state, unit, active, HIDDEN, HIDDEN)
    _store_units(RESET_H, state, unit, active, HIDDEN, r * h, HIDDEN)
    if SAVE:
        _store_units(GATES + d.to(tl.int64) * tokens_saved * 3 * HIDDEN, token * 3, unit, active, HIDDEN, r, HIDDEN)


@triton.jit(do_not_specialize=["t0", "t1"])
def gru_cells(
    XG, S, BIAS, BIAS_N, H, NORM_HIDDEN, SEED, SLOTS, FIRST, LENGTHS, ROWS, OUT, GATES, CELLS,
    batch, tokens_saved, directions, eps, share_h, share_c, below_h, below_c, t0, t1,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, SAVE: tl.constexpr, SAVED: tl.constexpr,
    ZONEOUT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """H after a step of a GRU, from the products S, of which n's is that of r h where the reset comes before it."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    width = directions * 3 * HIDDEN
    eps, share_h, share_c = number(eps, XG), number(share_h, XG), number(share_c, XG)
    GATES += d.to(tl.int64) * tokens_saved * SAVED * HIDDEN
    x0, s0 = _gate(XG, S, BIAS, 0, token, state, unit, active, d, width, 3, HIDDEN)
    x1, s1 = _gate(XG, S, BIAS, 1, token, state, unit, active, d, width, 3, HIDDEN)
    x2, s2 = _gate(XG, S, BIAS, 2, token, state, unit, active, d, width, 3, HIDDEN)
    if MODE == LAYER_NORM_GRU:
        inside = active[:, None] & (unit < HIDDEN)[None, :]
        s0, s1, scale = _normal_pair(s0, s1, inside, eps, HIDDEN)
        s2, _, scale_n = _normal(s2, inside, eps, HIDDEN)
        if SAVE:
            _store_units(GATES, token * SAVED + 3, unit, active, HIDDEN, s0, HIDDEN)
            _store_units(GATES, token * SAVED + 4, unit, active, HIDDEN, s1, HIDDEN)
            _store_units(GATES, token * SAVED + 5, unit, active, HIDDEN, s2, HIDDEN)
            CELLS += d.to(tl.int64) * tokens_saved * 2
            _store_one(CELLS, token, active, 2, scale)
            _store_one(CELLS + 1, token, active, 2, scale_n)
        s0 = s0 * _vector(NORM_HIDDEN, d * 6, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 6 + 3, unit, HIDDEN)
        s1 = s1 * _vector(NORM_HIDDEN, d * 6 + 1, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 6 + 4, unit, HIDDEN)
        s2 = s2 * _vector(NORM_HIDDEN, d * 6 + 2, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 6 + 5, unit, HIDDEN)
    r, z = sigmoid(x0 + s0), sigmoid(x1 + s1)
    if MODE == GRU:
        s2 += _vector(BIAS_N, d, unit, HIDDEN)
    n = tanh(x2 + s2) if MODE == RESET_BEFORE_GRU else tanh(x2 + r * s2)
    h_before = _load_units(H, state, unit, active, HIDDEN, HIDDEN)
    h = (1.0 - z) * n + z * h_before
    if ZONEOUT != NOTHING:
        kept, _ = _kept(
            SEED, SLOTS, slot, active, t, d, unit, share_h, share_c, below_h, below_c, ZONEOUT, HAS_SLOTS
        )  # fmt: skip
        h = _mixed(h, h_before, kept, ZONEOUT)
    if SAVE:
        if MODE != RESET_BEFORE_GRU:
            _store_units(GATES, token * SAVED, unit, active, HIDDEN, r, HIDDEN)
        _store_units(GATES, token * SAVED + 1, unit, active, HIDDEN, z, HIDDEN)
        _store_units(GATES, token * SAVED + 2, unit, active, HIDDEN, n, HIDDEN)
        if MODE == GRU:
            _store_units(GATES, token * SAVED + 3, unit, active, HIDDEN, s2, HIDDEN)
    _store_units(H, state, unit, active, HIDDEN, h, HIDDEN)
    _store_units(OUT + d * HIDDEN, row, unit, active, directions * HIDDEN, h, HIDDEN)
