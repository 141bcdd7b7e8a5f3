"""Device code of the backward of the cells in `triton_cell_kernels`: a step's gates, from the gradients of its states.

    dh, dc    those of the states after the step; zoneout passes a share of them on to the states before it
    DG        gradients of the gates' input terms, then of the recurrent terms that differ from them, in packed order
    DS        those of the recurrent terms of the step at hand, which `product` takes to DH

Layout and tiling are those of the forward. OWN[d, block, ..] holds the gradients of peepholes, or of the weights and
biases of normalisation: vectors in the order of the parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import number, tanh
from ptkernels.ops.packed_rnn.triton_cell_kernels import (
    LAYER_NORM_GRU,
    LAYER_NORM_LSTM,
    NOTHING,
    PEEPHOLE_LSTM,
    RESET_BEFORE_GRU,
    _kept,
    _off_mean,
    _place,
    _store_four,
    _vector,
)
from ptkernels.ops.packed_rnn.triton_kernels import _load_units, _runs, _store_units


@triton.jit
def _add_own(OWN, index, unit, values, HIDDEN: tl.constexpr):
    """To one of a program's own vectors, the sum over its rows, which are 0 where no sequence runs."""
    there = OWN + index * HIDDEN + unit
    known = tl.load(there, mask=unit < HIDDEN, other=0.0)
    tl.store(there, known + tl.sum(values, 0), mask=unit < HIDDEN)


@triton.jit
def _scaled(OWN, NORM, q: tl.constexpr, gates: tl.constexpr, d, unit, grad, normal, HIDDEN: tl.constexpr):
    """Gradient of a normalised gate before weight and bias, whose gradients are added up; weight q, bias gates + q."""
    _add_own(OWN, q, unit, grad * normal, HIDDEN)
    _add_own(OWN, gates + q, unit, grad, HIDDEN)
    return grad * _vector(NORM, d * 2 * gates + q, unit, HIDDEN)


@triton.jit
def _load_one(pointer, row, valid, width):
    return tl.load(pointer + row.to(tl.int64) * width, mask=valid, other=0.0)


@triton.jit
def _unnormalised(grad, normal, mean, mean_of_product, scale):
    return scale[:, None] * (grad - mean[:, None] - normal * mean_of_product[:, None])


@triton.jit
def _back(grad, normal, scale, inside, HIDDEN: tl.constexpr):
    """Through the normalisation of one row."""
    grad = tl.where(inside, grad, 0.0)
    return _unnormalised(grad, normal, tl.sum(grad, 1) / HIDDEN, tl.sum(grad * normal, 1) / HIDDEN, scale)


@triton.jit
def _back_four(GATES, row, OWN, NORM, d, unit, active, d0, d1, d2, d3, scale, HIDDEN: tl.constexpr):
    """From the gradients of an LSTM's normalised recurrent terms, which are rows of GATES: those of the terms."""
    n0 = _load_units(GATES, row, unit, active, HIDDEN, HIDDEN)
    n1 = _load_units(GATES, row + 1, unit, active, HIDDEN, HIDDEN)
    n2 = _load_units(GATES, row + 2, unit, active, HIDDEN, HIDDEN)
    n3 = _load_units(GATES, row + 3, unit, active, HIDDEN, HIDDEN)
    d0 = _scaled(OWN, NORM, 0, 4, d, unit, d0, n0, HIDDEN)
    d1 = _scaled(OWN, NORM, 1, 4, d, unit, d1, n1, HIDDEN)
    d2 = _scaled(OWN, NORM, 2, 4, d, unit, d2, n2, HIDDEN)
    d3 = _scaled(OWN, NORM, 3, 4, d, unit, d3, n3, HIDDEN)
    mean = tl.sum(d0 + d1 + d2 + d3, 1) / (4 * HIDDEN)
    product = tl.sum(d0 * n0 + d1 * n1 + d2 * n2 + d3 * n3, 1) / (4 * HIDDEN)
    d0, d1 = _unnormalised(d0, n0, mean, product, scale), _unnormalised(d1, n1, mean, product, scale)
    return d0, d1, _unnormalised(d2, n2, mean, product, scale), _unnormalised(d3, n3, mean, product, scale)


@triton.jit
def _incoming(
    GRAD_OUT, STATE_GRAD, d, state, row, unit, active, directions, HAS_GRAD: tl.constexpr, HIDDEN: tl.constexpr
):
    """Gradient of a state after the step: from the steps after it and from the result."""
    grad = _load_units(STATE_GRAD, state, unit, active, HIDDEN, HIDDEN)
    if HAS_GRAD:
        grad += _load_units(GRAD_OUT + d * HIDDEN, row, unit, active, directions * HIDDEN, HIDDEN)
    return grad


@triton.jit(do_not_specialize=["t0", "t1"])
def lstm_cells_backward(
    GATES, CELLS, C_START, PEEPHOLE, NORM_HIDDEN, NORM_CELL, SEED, SLOTS, FIRST, LENGTHS, ROWS, GRAD_OUT, GRAD_CELLS,
    DH, DC, DG, DS, OWN, batch, tokens, tokens_saved, directions, share_h, share_c, below_h, below_c, t0, t1,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, SAVED: tl.constexpr, STORED: tl.constexpr, VECTORS: tl.constexpr,
    HAS_GRAD: tl.constexpr, ALL_CELLS: tl.constexpr, ZONEOUT: tl.constexpr, HAS_SLOTS: tl.constexpr,
    HAS_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One step of an LSTM: DH becomes what does not go through U, DC the gradient of c before the step."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    share_h, share_c = number(share_h, GATES), number(share_c, GATES)
    inside = active[:, None] & (unit < HIDDEN)[None, :]
    SUMS: tl.constexpr = HIDDEN + 3 if MODE == LAYER_NORM_LSTM else HIDDEN
    GATES += d.to(tl.int64) * tokens_saved * SAVED * HIDDEN
    CELLS += d.to(tl.int64) * tokens_saved * SUMS
    DG += d.to(tl.int64) * tokens * STORED * HIDDEN
    OWN += (d.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * VECTORS * HIDDEN
    i = _load_units(GATES, token * SAVED, unit, active, HIDDEN, HIDDEN)
    f = _load_units(GATES, token * SAVED + 1, unit, active, HIDDEN, HIDDEN)
    g = _load_units(GATES, token * SAVED + 2, unit, active, HIDDEN, HIDDEN)
    o = _load_units(GATES, token * SAVED + 3, unit, active, HIDDEN, HIDDEN)
    before = t - 1 + 2 * d
    continued = active & _runs(before, length)
    begun = active & (continued == 0)
    token_before = tl.load(FIRST + tl.maximum(before, 0)) + slot
    c_before = _load_units(CELLS, token_before, unit, continued, SUMS, HIDDEN)
    c_before = tl.where(begun[:, None], _load_units(C_START, state, unit, begun, HIDDEN, HIDDEN), c_before)

    dh = _incoming(GRAD_OUT, DH, d, state, row, unit, active, directions, HAS_GRAD, HIDDEN)
    dc = _incoming(GRAD_CELLS, DC, d, state, row, unit, active, directions, ALL_CELLS, HIDDEN)
    past_h = tl.zeros(dh.shape, dh.dtype)
    past_c = past_h
    if ZONEOUT != NOTHING:
        kept_h, kept_c = _kept(
            SEED, SLOTS, slot, active, t, d, unit, share_h, share_c, below_h, below_c, ZONEOUT, HAS_SLOTS
        )  # fmt: skip
        past_h, past_c = dh * kept_h, dc * kept_c
        dh, dc = dh - past_h, dc - past_c
        c = f * c_before + i * g  # before it was mixed
    else:
        c = _load_units(CELLS, token, unit, active, SUMS, HIDDEN)

    if MODE == LAYER_NORM_LSTM:
        mean = _load_one(CELLS + HIDDEN + 1, token, active, SUMS)
        scale = _load_one(CELLS + HIDDEN + 2, token, active, SUMS)
        normal = _off_mean(c, mean, inside) * scale[:, None]
        weight = _vector(NORM_CELL, d * 2, unit, HIDDEN)
        squashed = tanh(normal * weight + _vector(NORM_CELL, d * 2 + 1, unit, HIDDEN))
        seen = dh * o * (1.0 - squashed * squashed)
        _add_own(OWN, 8, unit, seen * normal, HIDDEN)
        _add_own(OWN, 9, unit, seen, HIDDEN)
        dc += _back(seen * weight, normal, scale, inside, HIDDEN)
    else:
        squashed = tanh(c)
        dc += dh * o * (1.0 - squashed * squashed)
    d3 = dh * squashed * o * (1.0 - o)
    if MODE == PEEPHOLE_LSTM:
        dc += d3 * _vector(PEEPHOLE, d * 3 + 2, unit, HIDDEN)
    d0, d1, d2 = dc * g * i * (1.0 - i), dc * c_before * f * (1.0 - f), dc * i * (1.0 - g * g)
    dc = dc * f + past_c
    if MODE == PEEPHOLE_LSTM:
        dc += d0 * _vector(PEEPHOLE, d * 3, unit, HIDDEN) + d1 * _vector(PEEPHOLE, d * 3 + 1, unit, HIDDEN)
        _add_own(OWN, 0, unit, d0 * c_before, HIDDEN)
        _add_own(OWN, 1, unit, d1 * c_before, HIDDEN)
        _add_own(OWN, 2, unit, d3 * c, HIDDEN)
    _store_units(DH, state, unit, active, HIDDEN, past_h, HIDDEN)
    _store_units(DC, state, unit, active, HIDDEN, dc, HIDDEN)
    _store_four(DG, token * STORED, unit, active, d0, d1, d2, d3, HIDDEN)
    if MODE == LAYER_NORM_LSTM:
        scale = _load_one(CELLS + HIDDEN, token, active, SUMS)
        d0, d1, d2, d3 = _back_four(
            GATES, token * SAVED + 4, OWN, NORM_HIDDEN, d, unit, active, d0, d1, d2, d3, scale, HIDDEN
        )  # fmt: skip
        _store_four(DG, token * STORED + 4, unit, active, d0, d1, d2, d3, HIDDEN)
    _store_four(DS, state * 4, unit, active, d0, d1, d2, d3, HIDDEN)


@triton.jit(do_not_specialize=["t0", "t1"])
def gru_cells_backward(
    GATES, CELLS, PREVIOUS, NORM_HIDDEN, SEED, SLOTS, FIRST, LENGTHS, ROWS, GRAD_OUT, DH, DG, DS, OWN,
    batch, tokens, tokens_saved, directions, share_h, share_c, below_h, below_c, t0, t1,
    MODE: tl.constexpr, HIDDEN: tl.constexpr, SAVED: tl.constexpr, STORED: tl.constexpr, VECTORS: tl.constexpr,
    HAS_GRAD: tl.constexpr, ZONEOUT: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_ROWS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One step of a GRU: DH becomes what does not go through U. A reset before the product has a kernel of its own."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    share_h, share_c = number(share_h, GATES), number(share_c, GATES)
    GATES += d.to(tl.int64) * tokens_saved * SAVED * HIDDEN
    DG += d.to(tl.int64) * tokens * STORED * HIDDEN
    OWN += (d.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * VECTORS * HIDDEN
    r = _load_units(GATES, token * SAVED, unit, active, HIDDEN, HIDDEN)
    z = _load_units(GATES, token * SAVED + 1, unit, active, HIDDEN, HIDDEN)
    n = _load_units(GATES, token * SAVED + 2, unit, active, HIDDEN, HIDDEN)
    h_before = _load_units(PREVIOUS + d.to(tl.int64) * tokens * HIDDEN, token, unit, active, HIDDEN, HIDDEN)
    dh = _incoming(GRAD_OUT, DH, d, state, row, unit, active, directions, HAS_GRAD, HIDDEN)
    past = tl.zeros(dh.shape, dh.dtype)
    if ZONEOUT != NOTHING:
        kept, _ = _kept(
            SEED, SLOTS, slot, active, t, d, unit, share_h, share_c, below_h, below_c, ZONEOUT, HAS_SLOTS
        )  # fmt: skip
        past = dh * kept
        dh = dh - past
    d1 = dh * (h_before - n) * z * (1.0 - z)
    d2 = dh * (1.0 - z) * (1.0 - n * n)
    _store_units(DH, state, unit, active, HIDDEN, past + dh * z, HIDDEN)
    _store_units(DG, token * STORED + 1, unit, active, HIDDEN, d1, HIDDEN)
    _store_units(DG, token * STORED + 2, unit, active, HIDDEN, d2, HIDDEN)
    if MODE != RESET_BEFORE_GRU:
        term = _load_units(GATES, token * SAVED + SAVED - 1, unit, active, HIDDEN, HIDDEN)
        normal = term
        if MODE == LAYER_NORM_GRU:
            term = term * _vector(NORM_HIDDEN, d * 6 + 2, unit, HIDDEN) + _vector(NORM_HIDDEN, d * 6 + 5, unit, HIDDEN)
        d0 = d2 * term * r * (1.0 - r)
        d2 = d2 * r
        _store_units(DG, token * STORED, unit, active, HIDDEN, d0, HIDDEN)
        if MODE == LAYER_NORM_GRU:
            inside = active[:, None] & (unit < HIDDEN)[None, :]
            CELLS += d.to(tl.int64) * tokens_saved * 2
            n0 = _load_units(GATES, token * SAVED + 3, unit, active, HIDDEN, HIDDEN)
            n1 = _load_units(GATES, token * SAVED + 4, unit, active, HIDDEN, HIDDEN)
            d0 = _scaled(OWN, NORM_HIDDEN, 0, 3, d, unit, d0, n0, HIDDEN)
            d1 = _scaled(OWN, NORM_HIDDEN, 1, 3, d, unit, d1, n1, HIDDEN)
            d2 = _scaled(OWN, NORM_HIDDEN, 2, 3, d, unit, d2, normal, HIDDEN)
            scale = _load_one(CELLS, token, active, 2)
            mean, product = tl.sum(d0 + d1, 1) / (2 * HIDDEN), tl.sum(d0 * n0 + d1 * n1, 1) / (2 * HIDDEN)
            d0, d1 = _unnormalised(d0, n0, mean, product, scale), _unnormalised(d1, n1, mean, product, scale)
            d2 = _back(d2, normal, _load_one(CELLS + 1, token, active, 2), inside, HIDDEN)
            _store_units(DG, token * STORED + 3, unit, active, HIDDEN, d0, HIDDEN)
            _store_units(DG, token * STORED + 4, unit, active, HIDDEN, d1, HIDDEN)
        _store_units(DG, token * STORED + STORED - 1, unit, active, HIDDEN, d2, HIDDEN)
        _store_units(DS, state * 3, unit, active, HIDDEN, d0, HIDDEN)
    _store_units(DS, state * 3 + 1, unit, active, HIDDEN, d1, HIDDEN)
    _store_units(DS, state * 3 + 2, unit, active, HIDDEN, d2, HIDDEN)


@triton.jit(do_not_specialize=["t0", "t1"])
def reset_backward(
    GATES, PREVIOUS, D_RESET_H, FIRST, LENGTHS, ROWS, DH, DG, DS, batch, tokens, tokens_saved, directions, t0, t1,
    HIDDEN: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """From the gradient of r h: that of the gate r, and what it adds to h's."""
    d, slot, t, length, active, token, row, state = _place(FIRST, LENGTHS, ROWS, batch, t0, t1, HAS_ROWS, BLOCK_B)
    unit = tl.arange(0, BLOCK_H)
    GATES += d.to(tl.int64) * tokens_saved * 3 * HIDDEN
    DG += d.to(tl.int64) * tokens * 3 * HIDDEN
    r = _load_units(GATES, token * 3, unit, active, HIDDEN, HIDDEN)
    h_before = _load_units(PREVIOUS + d.to(tl.int64) * tokens * HIDDEN, token, unit, active, HIDDEN, HIDDEN)
    grad = _load_units(D_RESET_H, state, unit, active, HIDDEN, HIDDEN)
    dh = _load_units(DH, state, unit, active, HIDDEN, HIDDEN)
    d0 = grad * h_before * r * (1.0 - r)
    _store_units(DH, state, unit, active, HIDDEN, dh + grad * r, HIDDEN)
    _store_units(DG, token * 3, unit, active, HIDDEN, d0, HIDDEN)
    _store_units(DS, state * 3, unit, active, HIDDEN, d0, HIDDEN)
