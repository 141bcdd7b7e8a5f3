"""Device code of attention in Triton: forward, backward, and the gradient of a bias.

    S[i, j] = cap(scale * q_i . k_j) - slope * |i + diagonal - j| + mask[i, j],  cap(x) = softcap * tanh(x / softcap)
    hidden unless  -left <= j - (i + diagonal) <= right; a bound that is absent hides nothing
    P = exp(S - lse),  out_i = sum_j M_ij P_ij v_j,  M_ij = dropout's 0 or 1 / keep
    dS = P * (M dO V^T - delta),  delta_i = dO_i . out_i - dlse_i
    dX = scale * dS * cap',  dQ = dX K,  dK = dX^T Q,  dV = (M P)^T dO,  dmask = dS

Layout: every operand is [batch, heads, length, dim] through its strides, or [tokens, heads, dim] with cu_seqlens
(VARLEN), where the batch stride is 0 and a sequence begins at cu_seqlens[b]. Query head h reads key head h // group.

Tiling: a program of the forward owns BLOCK_M rows of one head and walks the key blocks that the band lets it see, with
the online softmax in registers. The backward recomputes P from lse twice: a program of `backward_dq` owns rows, one of
`backward_dkdv` owns keys and walks the rows of all query heads of its group. Nothing is added atomically, so every run
gives the same bits. Products take 16-bit operands as they are and accumulate in float32; float64 stays float64
throughout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import LN2, LOG2E, load_tile, number, tanh, widened, zeros

# What MASK may be beside the number of rows, and of keys, that an element of a boolean mask stands for.
NO_MASK = tl.constexpr(0)
FLOAT_MASK = tl.constexpr(-1)


@triton.jit
def _sequence(CU_Q, CU_K, b, len_q, len_k, VARLEN: tl.constexpr):
    """First row and length of a sequence, of the queries and of the keys."""
    if VARLEN:
        begin_q = tl.load(CU_Q + b).to(tl.int64)
        begin_k = tl.load(CU_K + b).to(tl.int64)
        len_q = (tl.load(CU_Q + b + 1) - begin_q).to(tl.int32)
        len_k = (tl.load(CU_K + b + 1) - begin_k).to(tl.int32)
    else:
        begin_q = tl.full((), 0, tl.int64)
        begin_k = tl.full((), 0, tl.int64)
    return begin_q, begin_k, len_q, len_k


@triton.jit
def _rows_of(pointer, b, h, first, stride_b, stride_h, stride_m):
    """Where row `first` of one head begins."""
    return pointer + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + first.to(tl.int64) * stride_m


@triton.jit
def _tile(pointer, rows, dims, stride_m, stride_d):
    return pointer + rows.to(tl.int64) * stride_m + dims.to(tl.int64) * stride_d


@triton.jit
def _logits(
    qk, rows, cols, mask, stride_mm, stride_mn, slope, len_q, len_k, diagonal, left, right, scale, softcap,
    MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOUNDS: tl.constexpr,
):  # fmt: skip
    """Scores with -inf where hidden, and tanh of the softcap; rows and cols broadcast to the shape of qk."""
    s = qk * scale
    capped = s
    if SOFTCAP:
        capped = tanh(s / softcap)
        s = softcap * capped
    if ALIBI:
        s -= slope * tl.abs(rows + diagonal - cols).to(s.dtype)
    inside = (rows < len_q) & (cols < len_k)
    if MASK == FLOAT_MASK:
        s += widened(tl.load(_tile(mask, rows, cols, stride_mm, stride_mn), mask=inside, other=0))
    elif MASK != NO_MASK:
        given = tl.load(_tile(mask, rows // MASK, cols // MASK, stride_mm, stride_mn), mask=inside, other=0)
        s = tl.where(given != 0, s, float("-inf"))
    if BOUNDS:
        if RIGHT:
            inside &= cols <= rows + diagonal + right
        if LEFT:
            inside &= cols >= rows + diagonal - left
        s = tl.where(inside, s, float("-inf"))
    return s, capped


@triton.jit
def _weights(s, shift, MASK: tl.constexpr):
    """exp(s - shift). A bias may be so large that s * log2(e) overflows: then the difference is taken first."""
    if MASK == FLOAT_MASK:
        return tl.exp2((s - shift) * LOG2E)
    else:
        return tl.exp2(s * LOG2E - shift * LOG2E)


@triton.jit
def _halves(word):
    return tl.join(word & 0xFFFF, word >> 16)


@triton.jit
def _kept(SEED, b, batch_per_seed, h, row0, col0, keep_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of a tile survive dropout: sixteen bits each of Philox at (key, row // 8, head, batch)."""
    seed = tl.load(SEED + b // batch_per_seed)
    cols = (col0 + tl.arange(0, BLOCK_N))[None, :]
    eighths = (row0 // 8 + tl.arange(0, BLOCK_M // 8))[:, None]
    zero = tl.zeros((BLOCK_M // 8, BLOCK_N), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, zero + cols, zero + eighths, zero + h, zero + b % batch_per_seed)
    first = tl.join(_halves(w0), _halves(w1))
    second = tl.join(_halves(w2), _halves(w3))
    bits = tl.permute(tl.join(first, second), (0, 4, 3, 2, 1))
    return tl.reshape(bits, (BLOCK_M, BLOCK_N)).to(tl.int32) < keep_below


@triton.jit
def _visible_keys(
    row0, rows, len_k, diagonal, left, right, BLOCK_N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Key blocks that rows [row0, row0 + rows) see: [lo, hi), of which [lo, full) need no bounds."""
    lo = 0
    hi = len_k
    full = len_k // BLOCK_N * BLOCK_N
    if LEFT:
        lo = tl.minimum(tl.maximum(row0 + diagonal - left, 0), len_k) // BLOCK_N * BLOCK_N
        full = lo
    if RIGHT:
        hi = tl.maximum(tl.minimum(hi, row0 + rows + diagonal + right), lo)
        full = tl.maximum(tl.minimum(full, (row0 + 1 + diagonal + right) // BLOCK_N * BLOCK_N), lo)
    return lo, full, hi


@triton.jit
def _attend(
    acc, m, l, q, K, V, mask, slope, SEED, keep_below, dropout_scale, batch_per_seed, b, h, row0, lo, hi,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
    len_q, len_k, diagonal, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Fold key blocks [lo, hi) into the running softmax of BLOCK_M rows."""
    rows = row0 + tl.arange(0, BLOCK_M)[:, None]
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            _tile(K, cols[None, :], dims[:, None], stride_kn, stride_kd),
            cols[None, :], dims[:, None], len_k, D, BOUNDS, D != BLOCK_D,
        )  # fmt: skip
        qk = tl.dot(q, k, input_precision=PRECISION)
        s, capped = _logits(
            qk, rows, cols[None, :], mask, stride_mm, stride_mn, slope, len_q, len_k, diagonal, left, right, scale,
            softcap, MASK, ALIBI, SOFTCAP, LEFT, RIGHT, BOUNDS,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = _weights(s, shift[:, None], MASK)
        rescale = tl.exp2((m - shift) * LOG2E)
        l = l * rescale + tl.sum(p, 1)
        m = m_new
        if DROPOUT:
            kept = _kept(SEED, b, batch_per_seed, h, row0, start, keep_below, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p * dropout_scale, 0.0)
        v = load_tile(
            _tile(V, cols[:, None], dims_v[None, :], stride_vn, stride_vd),
            cols[:, None], dims_v[None, :], len_k, DV, BOUNDS, DV != BLOCK_DV,
        )  # fmt: skip
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)
    return acc, m, l


@triton.jit
def forward(
    Q, K, V, MASKS, SLOPES, SINKS, SEED, CU_Q, CU_K, OUT, LSE,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ab, stride_ah, stride_sb, stride_sh, stride_lb, stride_lh,
    heads, group, len_q, len_k, diagonal, left, right, scale, softcap, keep_below, dropout_scale, batch_per_seed,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    scale, softcap, dropout_scale = number(scale, Q), number(softcap, Q), number(dropout_scale, Q)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    begin_q, begin_k, len_q, len_k = _sequence(CU_Q, CU_K, b, len_q, len_k, VARLEN)
    if VARLEN and BOTTOM_RIGHT:
        diagonal = len_k - len_q
    # The last rows see the most under a causal band: started first, they do not trail behind everything else.
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if row0 >= len_q:
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    Q = _rows_of(Q, b, h, begin_q, stride_qb, stride_qh, stride_qm)
    K = _rows_of(K, b, h // group, begin_k, stride_kb, stride_kh, stride_kn)
    V = _rows_of(V, b, h // group, begin_k, stride_vb, stride_vh, stride_vn)
    mask = MASKS + b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    slope = tl.load(SLOPES + b * stride_ab + h * stride_ah) if ALIBI else 0.0
    q = load_tile(
        _tile(Q, rows[:, None], dims[None, :], stride_qm, stride_qd),
        rows[:, None], dims[None, :], len_q, D, True, D != BLOCK_D,
    )  # fmt: skip

    acc = zeros((BLOCK_M, BLOCK_DV), Q)
    if SINK:
        m = zeros((BLOCK_M,), Q) + tl.load(SINKS + b * stride_sb + h * stride_sh)
        l = tl.where(m == float("-inf"), 0.0, 1.0).to(m.dtype)
    else:
        m = zeros((BLOCK_M,), Q) - float("inf")
        l = zeros((BLOCK_M,), Q)
    lo, full, hi = _visible_keys(row0, BLOCK_M, len_k, diagonal, left, right, BLOCK_N, LEFT, RIGHT)
    if not LEFT:
        acc, m, l = _attend(
            acc, m, l, q, K, V, mask, slope, SEED, keep_below, dropout_scale, batch_per_seed, b, h, row0, lo, full,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
            len_q, len_k, diagonal, left, right, scale, softcap,
            D, DV, MASK, ALIBI, SOFTCAP, LEFT, RIGHT, DROPOUT, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, q, K, V, mask, slope, SEED, keep_below, dropout_scale, batch_per_seed, b, h, row0, full, hi,
        stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
        len_q, len_k, diagonal, left, right, scale, softcap,
        D, DV, MASK, ALIBI, SOFTCAP, LEFT, RIGHT, DROPOUT, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l) * LN2)
    OUT = _rows_of(OUT, b, h, begin_q, stride_ob, stride_oh, stride_om)
    tl.store(
        _tile(OUT, rows[:, None], dims_v[None, :], stride_om, stride_od),
        acc.to(OUT.dtype.element_ty),
        mask=(rows[:, None] < len_q) & (dims_v[None, :] < DV),
    )
    tl.store(LSE + b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + begin_q + rows, lse, mask=rows < len_q)


@triton.jit
def backward_delta(
    DO, OUT, LSE, DLSE, DELTA, CU_Q,
    stride_gb, stride_gh, stride_gm, stride_gd, stride_ob, stride_oh, stride_om, stride_od, stride_lb, stride_lh,
    stride_eb, stride_eh, stride_em, heads, len_q,
    DV: tl.constexpr, HAS_DLSE: tl.constexpr, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = dO . out - dlse, the same for every score of a row; 0 in a row that has none."""
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    begin_q, _, len_q, _ = _sequence(CU_Q, CU_Q, b, len_q, len_q, VARLEN)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_DV)
    valid = (rows[:, None] < len_q) & (dims[None, :] < DV)
    DO = _rows_of(DO, b, h, begin_q, stride_gb, stride_gh, stride_gm)
    OUT = _rows_of(OUT, b, h, begin_q, stride_ob, stride_oh, stride_om)
    grad = tl.load(_tile(DO, rows[:, None], dims[None, :], stride_gm, stride_gd), mask=valid, other=0.0)
    out = tl.load(_tile(OUT, rows[:, None], dims[None, :], stride_om, stride_od), mask=valid, other=0.0)
    delta = tl.sum(widened(grad) * widened(out), 1)
    first = b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + begin_q
    if HAS_DLSE:
        DLSE = _rows_of(DLSE, b, h, begin_q, stride_eb, stride_eh, stride_em)
        delta -= tl.load(DLSE + rows.to(tl.int64) * stride_em, mask=rows < len_q, other=0.0)
    lse = tl.load(LSE + first + rows, mask=rows < len_q, other=0.0)
    tl.store(DELTA + first + rows, tl.where(lse == float("-inf"), 0.0, delta), mask=rows < len_q)


@triton.jit
def _row_statistics(LSE, DELTA, FACTOR, rows, len_q, MASK: tl.constexpr):
    """lse, delta and factor of rows; where a row has no weights, lse is such that they come out as 0."""
    lse = tl.load(LSE + rows, mask=rows < len_q, other=float("inf"))
    delta = tl.load(DELTA + rows, mask=rows < len_q, other=0.0)
    factor = tl.full(lse.shape, 1.0, lse.dtype)
    if MASK == FLOAT_MASK:
        factor = tl.load(FACTOR + rows, mask=rows < len_q, other=1.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta, factor


@triton.jit
def backward_factor(
    Q, K, MASKS, SLOPES, SINKS, LSE, FACTOR,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ab, stride_ah, stride_sb, stride_sh, stride_lb, stride_lh,
    heads, group, len_q, len_k, diagonal, left, right, scale, softcap,
    D: tl.constexpr, SINK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What makes the weights of a row sum to 1 again where a bias has driven lse far from 0.

    An lse of -1e9, of a row that a bias blocks with a large number, has no digit left for the logarithm of the sum:
    exp(S - lse) is then 1 for every key. Such rows are summed again; the others have nothing to correct.
    """
    scale, softcap = number(scale, Q), number(softcap, Q)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    first = b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh
    lse = tl.load(LSE + first + rows, mask=rows < len_q, other=0.0)
    rounded = (tl.abs(lse) > 64.0) & (lse != float("-inf"))
    total = zeros((BLOCK_M,), Q)
    if SINK:
        total += tl.exp2((tl.load(SINKS + b * stride_sb + h * stride_sh) - lse) * LOG2E)
    lo, full, hi = _visible_keys(row0, BLOCK_M, len_k, diagonal, left, right, BLOCK_N, LEFT, RIGHT)
    hi = tl.where(tl.sum(rounded.to(tl.int32), 0) > 0, hi, lo)
    Q = _rows_of(Q, b, h, b, stride_qb, stride_qh, 0)
    K = _rows_of(K, b, h // group, b, stride_kb, stride_kh, 0)
    mask = MASKS + b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    slope = tl.load(SLOPES + b * stride_ab + h * stride_ah) if ALIBI else 0.0
    q = load_tile(
        _tile(Q, rows[:, None], dims[None, :], stride_qm, stride_qd),
        rows[:, None], dims[None, :], len_q, D, True, D != BLOCK_D,
    )  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            _tile(K, cols[None, :], dims[:, None], stride_kn, stride_kd),
            cols[None, :], dims[:, None], len_k, D, True, D != BLOCK_D,
        )  # fmt: skip
        s, capped = _logits(
            tl.dot(q, k, input_precision=PRECISION), rows[:, None], cols[None, :], mask, stride_mm, stride_mn, slope,
            len_q, len_k, diagonal, left, right, scale, softcap, FLOAT_MASK, ALIBI, SOFTCAP, LEFT, RIGHT, True,
        )  # fmt: skip
        total += tl.sum(_weights(s, lse[:, None], FLOAT_MASK), 1)
    tl.store(FACTOR + first + rows, tl.where(rounded, 1.0 / total, 1.0), mask=rows < len_q)


@triton.jit
def backward_dq(
    Q, K, V, MASKS, SLOPES, SEED, CU_Q, CU_K, DO, LSE, DELTA, FACTOR, DQ, DSLOPE,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_ob, stride_oh, stride_om, stride_od,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ab, stride_ah, stride_lb, stride_lh,
    heads, group, len_q, len_k, diagonal, left, right, scale, softcap, keep_below, dropout_scale, batch_per_seed,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr, WRITE_DSLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows, and what each row adds to the gradient of its head's slope."""
    scale, softcap, dropout_scale = number(scale, Q), number(softcap, Q), number(dropout_scale, Q)
    b, h = tl.program_id(1) // heads, tl.program_id(1) % heads
    begin_q, begin_k, len_q, len_k = _sequence(CU_Q, CU_K, b, len_q, len_k, VARLEN)
    if VARLEN and BOTTOM_RIGHT:
        diagonal = len_k - len_q
    row0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if row0 >= len_q:
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    Q = _rows_of(Q, b, h, begin_q, stride_qb, stride_qh, stride_qm)
    K = _rows_of(K, b, h // group, begin_k, stride_kb, stride_kh, stride_kn)
    V = _rows_of(V, b, h // group, begin_k, stride_vb, stride_vh, stride_vn)
    DO = _rows_of(DO, b, h, begin_q, stride_gb, stride_gh, stride_gm)
    mask = MASKS + b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
    slope = tl.load(SLOPES + b * stride_ab + h * stride_ah) if ALIBI else 0.0
    first = b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + begin_q
    q = load_tile(
        _tile(Q, rows[:, None], dims[None, :], stride_qm, stride_qd),
        rows[:, None], dims[None, :], len_q, D, True, D != BLOCK_D,
    )  # fmt: skip
    grad = load_tile(
        _tile(DO, rows[:, None], dims_v[None, :], stride_gm, stride_gd),
        rows[:, None], dims_v[None, :], len_q, DV, True, DV != BLOCK_DV,
    )  # fmt: skip
    lse, delta, factor = _row_statistics(LSE + first, DELTA + first, FACTOR + first, rows, len_q, MASK)

    dq = zeros((BLOCK_M, BLOCK_D), Q)
    dslope = zeros((BLOCK_M,), Q)
    lo, full, hi = _visible_keys(row0, BLOCK_M, len_k, diagonal, left, right, BLOCK_N, LEFT, RIGHT)
    for start in range(lo, hi, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = load_tile(
            _tile(K, cols[None, :], dims[:, None], stride_kn, stride_kd),
            cols[None, :], dims[:, None], len_k, D, True, D != BLOCK_D,
        )  # fmt: skip
        v = load_tile(
            _tile(V, cols[None, :], dims_v[:, None], stride_vn, stride_vd),
            cols[None, :], dims_v[:, None], len_k, DV, True, DV != BLOCK_DV,
        )  # fmt: skip
        qk = tl.dot(q, k, input_precision=PRECISION)
        s, capped = _logits(
            qk, rows[:, None], cols[None, :], mask, stride_mm, stride_mn, slope, len_q, len_k, diagonal, left, right,
            scale, softcap, MASK, ALIBI, SOFTCAP, LEFT, RIGHT, True,
        )  # fmt: skip
        p = _weights(s, lse[:, None], MASK) * factor[:, None]
        dp = tl.dot(grad, v, input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(SEED, b, batch_per_seed, h, row0, start, keep_below, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp * dropout_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if WRITE_DSLOPE:
            dslope -= tl.sum(ds * tl.abs(rows[:, None] + diagonal - cols[None, :]).to(ds.dtype), 1)
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision=PRECISION, out_dtype=dq.dtype)

    DQ = _rows_of(DQ, b, h, begin_q, stride_ob, stride_oh, stride_om)
    tl.store(
        _tile(DQ, rows[:, None], dims[None, :], stride_om, stride_od),
        (dq * scale).to(DQ.dtype.element_ty),
        mask=(rows[:, None] < len_q) & (dims[None, :] < D),
    )
    if WRITE_DSLOPE:
        tl.store(DSLOPE + first + rows, dslope, mask=rows < len_q)


@triton.jit
def _seeing_rows(
    col0, cols, len_q, diagonal, left, right, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Row blocks that see any of the keys [col0, col0 + cols)."""
    lo = 0
    hi = len_q
    if RIGHT:
        lo = tl.minimum(tl.maximum(col0 - diagonal - right, 0), len_q) // BLOCK_M * BLOCK_M
    if LEFT:
        hi = tl.maximum(tl.minimum(hi, col0 + cols - diagonal + left), lo)
    return lo, hi


@triton.jit
def backward_dkdv(
    Q, K, V, MASKS, SLOPES, SEED, CU_Q, CU_K, DO, LSE, DELTA, FACTOR, DK, DV_OUT,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_ob, stride_oh, stride_on, stride_od, stride_pb, stride_ph, stride_pn, stride_pd,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ab, stride_ah, stride_lb, stride_lh,
    heads_kv, group, len_q, len_k, diagonal, left, right, scale, softcap, keep_below, dropout_scale, batch_per_seed,
    D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, VARLEN: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys. Scores are kept transposed, as the products of dK and dV take them."""
    scale, softcap, dropout_scale = number(scale, Q), number(softcap, Q), number(dropout_scale, Q)
    b, kv = tl.program_id(1) // heads_kv, tl.program_id(1) % heads_kv
    begin_q, begin_k, len_q, len_k = _sequence(CU_Q, CU_K, b, len_q, len_k, VARLEN)
    if VARLEN and BOTTOM_RIGHT:
        diagonal = len_k - len_q
    col0 = tl.program_id(0) * BLOCK_N
    if col0 >= len_k:
        return
    cols = col0 + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    K = _rows_of(K, b, kv, begin_k, stride_kb, stride_kh, stride_kn)
    V = _rows_of(V, b, kv, begin_k, stride_vb, stride_vh, stride_vn)
    k = load_tile(
        _tile(K, cols[:, None], dims[None, :], stride_kn, stride_kd),
        cols[:, None], dims[None, :], len_k, D, True, D != BLOCK_D,
    )  # fmt: skip
    v = load_tile(
        _tile(V, cols[:, None], dims_v[None, :], stride_vn, stride_vd),
        cols[:, None], dims_v[None, :], len_k, DV, True, DV != BLOCK_DV,
    )  # fmt: skip

    dk = zeros((BLOCK_N, BLOCK_D), K)
    dv = zeros((BLOCK_N, BLOCK_DV), K)
    lo, hi = _seeing_rows(col0, BLOCK_N, len_q, diagonal, left, right, BLOCK_M, LEFT, RIGHT)
    for member in range(0, group):
        h = kv * group + member
        q_head = _rows_of(Q, b, h, begin_q, stride_qb, stride_qh, stride_qm)
        grad_head = _rows_of(DO, b, h, begin_q, stride_gb, stride_gh, stride_gm)
        mask = MASKS + b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh
        slope = tl.load(SLOPES + b * stride_ab + h * stride_ah) if ALIBI else 0.0
        first = b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh + begin_q
        for row0 in range(lo, hi, BLOCK_M):
            rows = row0 + tl.arange(0, BLOCK_M)
            q = load_tile(
                _tile(q_head, rows[:, None], dims[None, :], stride_qm, stride_qd),
                rows[:, None], dims[None, :], len_q, D, True, D != BLOCK_D,
            )  # fmt: skip
            grad = load_tile(
                _tile(grad_head, rows[:, None], dims_v[None, :], stride_gm, stride_gd),
                rows[:, None], dims_v[None, :], len_q, DV, True, DV != BLOCK_DV,
            )  # fmt: skip
            lse, delta, factor = _row_statistics(LSE + first, DELTA + first, FACTOR + first, rows, len_q, MASK)
            qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            s, capped = _logits(
                qk, rows[None, :], cols[:, None], mask, stride_mm, stride_mn, slope, len_q, len_k, diagonal, left,
                right, scale, softcap, MASK, ALIBI, SOFTCAP, LEFT, RIGHT, True,
            )  # fmt: skip
            p = _weights(s, lse[None, :], MASK) * factor[None, :]
            dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            dropped = p
            if DROPOUT:
                kept = tl.trans(_kept(SEED, b, batch_per_seed, h, row0, col0, keep_below, BLOCK_M, BLOCK_N))
                dropped = tl.where(kept, p * dropout_scale, 0.0)
                dp = tl.where(kept, dp * dropout_scale, 0.0)
            dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION, out_dtype=dv.dtype)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds *= 1.0 - capped * capped
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION, out_dtype=dk.dtype)

    DK = _rows_of(DK, b, kv, begin_k, stride_ob, stride_oh, stride_on)
    tl.store(
        _tile(DK, cols[:, None], dims[None, :], stride_on, stride_od),
        (dk * scale).to(DK.dtype.element_ty),
        mask=(cols[:, None] < len_k) & (dims[None, :] < D),
    )
    DV_OUT = _rows_of(DV_OUT, b, kv, begin_k, stride_pb, stride_ph, stride_pn)
    tl.store(
        _tile(DV_OUT, cols[:, None], dims_v[None, :], stride_pn, stride_pd),
        dv.to(DV_OUT.dtype.element_ty),
        mask=(cols[:, None] < len_k) & (dims_v[None, :] < DV),
    )


@triton.jit
def backward_dbias(
    Q, K, V, MASKS, SLOPES, SEED, DO, LSE, DELTA, FACTOR, PARTIAL,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_gb, stride_gh, stride_gm, stride_gd,
    stride_pb, stride_ph, stride_pm,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_ab, stride_ah, stride_lb, stride_lh,
    heads_out, batch_sum, heads_sum, group,
    len_q, len_k, diagonal, left, right, scale, softcap, keep_below, dropout_scale, batch_per_seed,
    D: tl.constexpr, DV: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SUM_ROWS: tl.constexpr, SUM_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a bias, summed over the batch entries and heads that the bias is shared by.

    A bias that is shared by all rows, or keys, gets one partial sum per tile in that dimension, to be added up after.
    """
    scale, softcap, dropout_scale = number(scale, Q), number(softcap, Q), number(dropout_scale, Q)
    tiles_n = tl.cdiv(len_k, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    b_out, h_out = tl.program_id(1) // heads_out, tl.program_id(1) % heads_out
    row0 = tile_m * BLOCK_M
    col0 = tile_n * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    total = zeros((BLOCK_M, BLOCK_N), Q)
    lo, full, hi = _visible_keys(row0, BLOCK_M, len_k, diagonal, left, right, BLOCK_N, LEFT, RIGHT)
    shared = batch_sum * heads_sum if (col0 >= lo) & (col0 < hi) else 0
    for index in range(0, shared):
        b = b_out + index // heads_sum
        h = h_out + index % heads_sum
        q = load_tile(
            _tile(_rows_of(Q, b, h, b, stride_qb, stride_qh, 0), rows[:, None], dims[None, :], stride_qm, stride_qd),
            rows[:, None], dims[None, :], len_q, D, True, D != BLOCK_D,
        )  # fmt: skip
        k = load_tile(
            _tile(_rows_of(K, b, h // group, b, stride_kb, stride_kh, 0), cols[None, :], dims[:, None], stride_kn,
                  stride_kd),
            cols[None, :], dims[:, None], len_k, D, True, D != BLOCK_D,
        )  # fmt: skip
        v = load_tile(
            _tile(_rows_of(V, b, h // group, b, stride_vb, stride_vh, 0), cols[None, :], dims_v[:, None], stride_vn,
                  stride_vd),
            cols[None, :], dims_v[:, None], len_k, DV, True, DV != BLOCK_DV,
        )  # fmt: skip
        grad = load_tile(
            _tile(_rows_of(DO, b, h, b, stride_gb, stride_gh, 0), rows[:, None], dims_v[None, :], stride_gm, stride_gd),
            rows[:, None], dims_v[None, :], len_q, DV, True, DV != BLOCK_DV,
        )  # fmt: skip
        first = b.to(tl.int64) * stride_lb + h.to(tl.int64) * stride_lh
        lse, delta, factor = _row_statistics(LSE + first, DELTA + first, FACTOR + first, rows, len_q, FLOAT_MASK)
        slope = tl.load(SLOPES + b * stride_ab + h * stride_ah) if ALIBI else 0.0
        s, capped = _logits(
            tl.dot(q, k, input_precision=PRECISION), rows[:, None], cols[None, :],
            MASKS + b.to(tl.int64) * stride_mb + h.to(tl.int64) * stride_mh, stride_mm, stride_mn, slope, len_q, len_k,
            diagonal, left, right, scale, softcap, FLOAT_MASK, ALIBI, SOFTCAP, LEFT, RIGHT, True,
        )  # fmt: skip
        dp = tl.dot(grad, v, input_precision=PRECISION)
        if DROPOUT:
            kept = _kept(SEED, b, batch_per_seed, h, row0, col0, keep_below, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp * dropout_scale, 0.0)
        total += _weights(s, lse[:, None], FLOAT_MASK) * factor[:, None] * (dp - delta[:, None])

    PARTIAL += b_out.to(tl.int64) * stride_pb + h_out.to(tl.int64) * stride_ph
    if SUM_ROWS and SUM_KEYS:
        tl.store(PARTIAL + tile_m.to(tl.int64) * stride_pm + tile_n, tl.sum(tl.sum(total, 1), 0))
    elif SUM_ROWS:
        tl.store(PARTIAL + tile_m.to(tl.int64) * stride_pm + cols, tl.sum(total, 0), mask=cols < len_k)
    elif SUM_KEYS:
        tl.store(PARTIAL + rows.to(tl.int64) * stride_pm + tile_n, tl.sum(total, 1), mask=rows < len_q)
    else:
        pointers = PARTIAL + rows.to(tl.int64)[:, None] * stride_pm + cols[None, :]
        tl.store(pointers, total, mask=(rows[:, None] < len_q) & (cols[None, :] < len_k))
