"""Device code of rotary embedding in Triton, with the RMS normalisation before it: rows are read once, written once.

    n   = x * rsqrt(mean(x^2) + eps) * weight          (n = x without a weight)
    out = (n[a] cos - n[b] sin, n[b] cos + n[a] sin)   for the pairs (a, b); n beyond them

    backward, with g the gradient of out rotated back and r the inverse root:
    dx  = r (g w - x r^2 mean(g w x)),  dw = sum over rows of g x r          (dx = g without a weight)

Layout: query, key and what comes in for them [batch, heads, length, dim] with any strides; what is written lies as
[batch, length, heads, dim]. A tile of rows is three: the first values of all pairs, the second ones, and the rest,
which is in no pair. So no value is fetched twice.

Tiling: a program owns BLOCK_T tokens and HEADS heads of query or of key. It reads the angles of its tokens once, and
leaves the sums of its rows for the gradient of the weight, which are added up outside in a fixed order: every run gives
the same bits. Positions are on the GPU, where nothing checks them: one without a row in the tables gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import number, widened, zeros


@triton.jit
def _load_part(pointer, rows, first, valid, stride, size, BLOCK: tl.constexpr):
    """Values first, first + 1, .. of rows in the dtype of sums; 0 from the size on and where a row is not valid."""
    dims = tl.arange(0, BLOCK)
    there = pointer + rows[:, None] + (first + dims)[None, :] * stride
    return widened(tl.load(there, mask=valid[:, None] & (dims < size)[None, :], other=0.0))


@triton.jit
def _store_part(pointer, rows, first, valid, values, size, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    there = pointer + rows[:, None] + (first + dims)[None, :]
    tl.store(there, values.to(pointer.dtype.element_ty), mask=valid[:, None] & (dims < size)[None, :])


@triton.jit
def _load_rows(
    pointer, rows, valid, stride,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The first and the second values of pairs, and the rest."""
    if INTERLEAVED:
        # Side by side in memory: read as they lie, parted in registers.
        pairs = _load_part(pointer, rows, 0, valid, stride, 2 * PAIRS, 2 * BLOCK_P)
        a, b = tl.split(tl.reshape(pairs, (rows.shape[0], BLOCK_P, 2)))
    else:
        a = _load_part(pointer, rows, 0, valid, stride, PAIRS, BLOCK_P)
        b = _load_part(pointer, rows, PAIRS, valid, stride, PAIRS, BLOCK_P)
    return a, b, _load_part(pointer, rows, 2 * PAIRS, valid, stride, D - 2 * PAIRS, BLOCK_R)


@triton.jit
def _store_rows(
    pointer, rows, valid, a, b, rest,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    if INTERLEAVED:
        pairs = tl.reshape(tl.join(a, b), (rows.shape[0], 2 * BLOCK_P))
        _store_part(pointer, rows, 0, valid, pairs, 2 * PAIRS, 2 * BLOCK_P)
    else:
        _store_part(pointer, rows, 0, valid, a, PAIRS, BLOCK_P)
        _store_part(pointer, rows, PAIRS, valid, b, PAIRS, BLOCK_P)
    _store_part(pointer, rows, 2 * PAIRS, valid, rest, D - 2 * PAIRS, BLOCK_R)


@triton.jit
def _sum_of_products(a, b, rest, a2, b2, rest2):
    """Of every row, [rows, 1]."""
    return (tl.sum(a * a2, 1) + tl.sum(b * b2, 1) + tl.sum(rest * rest2, 1))[:, None]


@triton.jit
def _inverse_norm(a, b, rest, eps, D: tl.constexpr):
    return tl.rsqrt(_sum_of_products(a, b, rest, a, b, rest) / D + eps)


@triton.jit
def _tokens(tokens, length, BLOCK_T: tl.constexpr):
    """Numbers of a program's tokens, which are real, their sequences and places there, all in int64."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return token, token < tokens, token // length, token % length


@triton.jit
def _angles(
    COS, SIN, POSITIONS, b, i, real, table_rows, stride_cp, stride_cd, stride_sp, stride_sd, stride_pb, stride_pi,
    HAS_POSITIONS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of tokens, [tokens, pairs]."""
    position = i
    if HAS_POSITIONS:
        position = tl.load(POSITIONS + b * stride_pb + i * stride_pi, mask=real, other=0)
    known = real & (position >= 0) & (position < table_rows)
    cos = _load_part(COS, position * stride_cp, 0, known, stride_cd, PAIRS, BLOCK_P)
    sin = _load_part(SIN, position * stride_sp, 0, known, stride_sd, PAIRS, BLOCK_P)
    return tl.where((real & (known == 0))[:, None], float("nan"), cos), sin


@triton.jit
def _embed(
    X, WEIGHT, OUT, rows, token, real, cos, sin, first, heads, stride_h, stride_d, eps,
    HAS_WEIGHT: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """HEADS heads of tokens, from the first on."""
    if HAS_WEIGHT:
        one = tl.zeros((1,), tl.int64)
        w_a, w_b, w_rest = _load_rows(WEIGHT, one, one == 0, 1, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R)
    for h in range(first, tl.minimum(first + HEADS, heads)):
        head = tl.zeros((1,), tl.int64) + h
        a, b, rest = _load_rows(X, rows + head * stride_h, real, stride_d, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R)
        if HAS_WEIGHT:
            r = _inverse_norm(a, b, rest, eps, D)
            a, b, rest = a * r * w_a, b * r * w_b, rest * r * w_rest
        _store_rows(
            OUT, (token * heads + head) * D, real, a * cos - b * sin, b * cos + a * sin, rest,
            D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "length", "table_rows", "heads_q", "heads_k"])
def forward(
    Q, K, WEIGHT_Q, WEIGHT_K, OUT_Q, OUT_K, COS, SIN, POSITIONS, tokens, length, table_rows, heads_q, heads_k, eps,
    stride_qb, stride_qh, stride_qi, stride_qd, stride_kb, stride_kh, stride_ki, stride_kd,
    stride_cp, stride_cd, stride_sp, stride_sd, stride_pb, stride_pi,
    HAS_WEIGHT_Q: tl.constexpr, HAS_WEIGHT_K: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Axis 1 of the grid: the slices of query's heads, then those of key's."""
    eps = number(eps, Q)
    token, real, b, i = _tokens(tokens, length, BLOCK_T)
    cos, sin = _angles(
        COS, SIN, POSITIONS, b, i, real, table_rows, stride_cp, stride_cd, stride_sp, stride_sd, stride_pb, stride_pi,
        HAS_POSITIONS, PAIRS, BLOCK_P,
    )  # fmt: skip
    slices_q = tl.cdiv(heads_q, HEADS)
    if tl.program_id(1) < slices_q:
        _embed(
            Q, WEIGHT_Q, OUT_Q, b * stride_qb + i * stride_qi, token, real, cos, sin, tl.program_id(1) * HEADS, heads_q,
            stride_qh, stride_qd, eps, HAS_WEIGHT_Q, D, PAIRS, INTERLEAVED, HEADS, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    else:
        _embed(
            K, WEIGHT_K, OUT_K, b * stride_kb + i * stride_ki, token, real, cos, sin,
            (tl.program_id(1) - slices_q) * HEADS, heads_k, stride_kh, stride_kd, eps, HAS_WEIGHT_K, D, PAIRS,
            INTERLEAVED, HEADS, BLOCK_P, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _embed_backward(
    GRAD, X, WEIGHT, DX, SUMS, rows, rows_x, token, real, cos, sin, slice, heads, stride_h, stride_d, stride_xh,
    stride_xd, eps,
    HAS_WEIGHT: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One slice of heads; the sums of its rows go to row [block of tokens, slice] of SUMS."""
    one = tl.zeros((1,), tl.int64)
    if HAS_WEIGHT:
        w_a, w_b, w_rest = _load_rows(WEIGHT, one, one == 0, 1, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R)
    dw_a = zeros(cos.shape, GRAD)
    dw_b = dw_a
    dw_rest = zeros((cos.shape[0], BLOCK_R), GRAD)
    for h in range(slice * HEADS, tl.minimum((slice + 1) * HEADS, heads)):
        head = one + h
        a, b, rest = _load_rows(GRAD, rows + head * stride_h, real, stride_d, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R)
        a, b = a * cos + b * sin, b * cos - a * sin
        if HAS_WEIGHT:
            x_a, x_b, x_rest = _load_rows(
                X, rows_x + head * stride_xh, real, stride_xd, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R
            )
            r = _inverse_norm(x_a, x_b, x_rest, eps, D)
            if WANT_DW:
                # Without a row there is no norm either: with an eps of 0 its inverse is infinite.
                there = tl.where(real[:, None], r, 0.0)
                dw_a += a * x_a * there
                dw_b += b * x_b * there
                dw_rest += rest * x_rest * there
            a, b, rest = a * w_a, b * w_b, rest * w_rest
            factor = _sum_of_products(a, b, rest, x_a, x_b, x_rest) / D * r * r
            a, b, rest = (a - x_a * factor) * r, (b - x_b * factor) * r, (rest - x_rest * factor) * r
        if WANT_DX:
            _store_rows(
                DX, (token * heads + head) * D, real, a, b, rest, D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R
            )  # fmt: skip
    if WANT_DW:
        row = (one + tl.program_id(0)) * tl.cdiv(heads, HEADS) + slice
        _store_rows(
            SUMS, row * D, one == 0, tl.sum(dw_a, 0)[None, :], tl.sum(dw_b, 0)[None, :], tl.sum(dw_rest, 0)[None, :],
            D, PAIRS, INTERLEAVED, BLOCK_P, BLOCK_R,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "length", "table_rows", "heads_q", "heads_k"])
def backward(
    GRAD_Q, GRAD_K, Q, K, WEIGHT_Q, WEIGHT_K, DQ, DK, SUMS_Q, SUMS_K, COS, SIN, POSITIONS, tokens, length, table_rows,
    heads_q, heads_k, eps,
    stride_gqb, stride_gqh, stride_gqi, stride_gqd, stride_gkb, stride_gkh, stride_gki, stride_gkd,
    stride_qb, stride_qh, stride_qi, stride_qd, stride_kb, stride_kh, stride_ki, stride_kd,
    stride_cp, stride_cd, stride_sp, stride_sd, stride_pb, stride_pi,
    HAS_WEIGHT_Q: tl.constexpr, HAS_WEIGHT_K: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    WANT_DQ: tl.constexpr, WANT_DK: tl.constexpr, WANT_DW_Q: tl.constexpr, WANT_DW_K: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The grid of `forward`; an operand without a wanted gradient comes with no heads."""
    eps = number(eps, Q)
    token, real, b, i = _tokens(tokens, length, BLOCK_T)
    cos, sin = _angles(
        COS, SIN, POSITIONS, b, i, real, table_rows, stride_cp, stride_cd, stride_sp, stride_sd, stride_pb, stride_pi,
        HAS_POSITIONS, PAIRS, BLOCK_P,
    )  # fmt: skip
    slices_q = tl.cdiv(heads_q, HEADS)
    if tl.program_id(1) < slices_q:
        _embed_backward(
            GRAD_Q, Q, WEIGHT_Q, DQ, SUMS_Q, b * stride_gqb + i * stride_gqi, b * stride_qb + i * stride_qi, token,
            real, cos, sin, tl.program_id(1), heads_q, stride_gqh, stride_gqd, stride_qh, stride_qd, eps,
            HAS_WEIGHT_Q, WANT_DQ, WANT_DW_Q, D, PAIRS, INTERLEAVED, HEADS, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    else:
        _embed_backward(
            GRAD_K, K, WEIGHT_K, DK, SUMS_K, b * stride_gkb + i * stride_gki, b * stride_kb + i * stride_ki, token,
            real, cos, sin, tl.program_id(1) - slices_q, heads_k, stride_gkh, stride_gkd, stride_kh, stride_kd, eps,
            HAS_WEIGHT_K, WANT_DK, WANT_DW_K, D, PAIRS, INTERLEAVED, HEADS, BLOCK_P, BLOCK_R,
        )  # fmt: skip
