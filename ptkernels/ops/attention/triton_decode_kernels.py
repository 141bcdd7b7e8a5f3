"""Device code of attention to a cache in Triton: few queries against many keys, contiguous or in pages.

    p_i = length - len_q + i,  S[i, j] = cap(scale * q_i . (k_j * k_scale)) - slope * |p_i - j|
    out_i = sum_j softmax_j(S[i, :]) v_j * v_scale,  over  pad <= j < length,  p_i - left <= j <= p_i + right

Layout: queries [batch, heads, len_q, dim]; caches [entries, kv heads, room, dim]: an entry for each sequence (INDEX
names it where there is one), or pages, of which block_table[b, j // page size] holds key j. Caches of int8 and of e4m3
codes have a scale for each head or each slot.

Tiling: the len_q * group queries that share a key head are the rows of products, BLOCK_M at a time, so that a key is
read once for all of them where they are few. The keys of a sequence are cut into splits, which run at the same time:
each leaves a normalised output and a log-sum-exp, and `combine` adds them up in a fixed order, so every run gives the
same bits. Lengths and pages that are out of range are cut off at the cache's bounds: they are on the GPU, where nothing
checks them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import LN2, LOG2E, e4m3_codes, e4m3_values, number, tanh, widened, zeros

NO_SCALE = tl.constexpr(0)
SCALE_PER_HEAD = tl.constexpr(1)
SCALE_PER_SLOT = tl.constexpr(2)

# How stored numbers are coded, where they have a scale.
INT8 = tl.constexpr(0)
E4M3 = tl.constexpr(1)
NATIVE_E4M3 = tl.constexpr(2)


@triton.jit
def _place(TABLE, INDEX, b, j, inside, stride_tb, page_size, entries, PAGED: tl.constexpr, HAS_INDEX: tl.constexpr):
    """Entry of the cache and place in it of slots j of a sequence."""
    if PAGED:
        entry = tl.load(TABLE + b.to(tl.int64) * stride_tb + j // page_size, mask=inside, other=0).to(tl.int64)
        slot = (j % page_size).to(tl.int64)
    else:
        entry = tl.zeros(j.shape, tl.int64) + (tl.load(INDEX + b) if HAS_INDEX else b)
        slot = j.to(tl.int64)
    return tl.minimum(tl.maximum(entry, 0), entries - 1), slot


@triton.jit
def _scales(SCALE, entry, kv, slot, inside, stride_e, stride_h, stride_s, KIND: tl.constexpr):
    """Scales of slots of one head."""
    if KIND == SCALE_PER_SLOT:
        there = SCALE + entry * stride_e + kv * stride_h + slot * stride_s
        return tl.load(there, mask=inside, other=0.0)
    else:
        return tl.zeros(slot.shape, tl.float32) + tl.load(SCALE + kv * stride_h)


@triton.jit
def _rotated(x, row, dims, stride, inside, COS, SIN, angles, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first 2 * PAIRS values of rows, rotated; `row` is read again for what each is paired with.

    `row` and `angles` are of one row, or broadcast to x; so is `inside`, which rows exist.
    """
    if INTERLEAVED:
        partner, angle, is_first = dims ^ 1, dims // 2, dims % 2 == 0
    else:
        is_first = dims < PAIRS
        partner, angle = tl.where(is_first, dims + PAIRS, dims - PAIRS), dims % PAIRS
    turned = inside & (dims < 2 * PAIRS)
    other = widened(tl.load(row + partner * stride, mask=turned, other=0.0))
    cos = widened(tl.load(COS + angles + angle, mask=turned, other=1.0))
    sin = widened(tl.load(SIN + angles + angle, mask=turned, other=0.0))
    return tl.where(turned, x * cos + tl.where(is_first, -other * sin, other * sin), x)


@triton.jit
def _stored(codes, CODE: tl.constexpr):
    """Codes of a cache as float32, without their scale."""
    if CODE == INT8:
        return codes.to(tl.float32)
    else:
        return e4m3_values(codes, CODE == NATIVE_E4M3)


@triton.jit
def append(
    X, CACHE, SCALE, LENGTHS, TABLE, INDEX, COS, SIN, positions, room, page_size, entries,
    stride_xb, stride_xh, stride_xi, stride_xd, stride_cb, stride_ch, stride_cn, stride_cd,
    stride_se, stride_sh, stride_ss, stride_tb, stride_cos,
    D: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, HAS_INDEX: tl.constexpr,
    KIND: tl.constexpr, CODE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row i of a sequence and head into slot LENGTHS[b] + i of the cache, rotated and quantised where asked for."""
    i, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, BLOCK_D)
    row = X + b.to(tl.int64) * stride_xb + kv.to(tl.int64) * stride_xh + i.to(tl.int64) * stride_xi
    x = tl.load(row + dims * stride_xd, mask=dims < D, other=0.0)
    position = tl.zeros((1,), tl.int64) + tl.load(LENGTHS + b).to(tl.int64) + i
    exists = (position >= 0) & (position < room)
    j = tl.where(exists, position, 0)
    entry, slot = _place(TABLE, INDEX, b, j, j >= 0, stride_tb, page_size, entries, PAGED, HAS_INDEX)
    if PAIRS > 0:
        angles = tl.minimum(tl.maximum(position, 0), positions - 1) * stride_cos
        x = _rotated(widened(x), row, dims, stride_xd, exists, COS, SIN, angles, PAIRS, INTERLEAVED)
    if KIND != NO_SCALE:
        # What is rotated is rounded to the dtype of the queries only where it is stored in it.
        x = x.to(tl.float32)
        LARGEST: tl.constexpr = 127.0 if CODE == INT8 else 448.0
        if KIND == SCALE_PER_SLOT:
            top = tl.max(tl.where(x == x, tl.abs(x), 0.0), 0)
            broken = tl.max(tl.where(x == x, 0, 1), 0) > 0
            scale = tl.div_rn(top, tl.full(top.shape, LARGEST, tl.float32))
            scale = tl.where(broken, float("nan"), tl.where(scale == 0.0, 1.0, scale))
            at = SCALE + entry * stride_se + kv * stride_sh + slot * stride_ss
            tl.store(at, tl.zeros((1,), tl.float32) + scale, mask=exists)
        else:
            scale = tl.load(SCALE + kv * stride_sh)
        x = tl.div_rn(x, tl.zeros(x.shape, tl.float32) + scale)
        ALL: tl.constexpr = tl.PropagateNan.ALL
        x = tl.minimum(tl.maximum(x, -LARGEST, propagate_nan=ALL), LARGEST, propagate_nan=ALL)
        if CODE == INT8:
            # Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to the nearest even integer.
            x = ((tl.where(x == x, x, 0.0) + 12582912.0) - 12582912.0).to(tl.int8)
        else:
            x = e4m3_codes(x)
    there = CACHE + (entry * stride_cb + kv.to(tl.int64) * stride_ch + slot * stride_cn) + dims * stride_cd
    tl.store(there, x.to(CACHE.dtype.element_ty), mask=(dims < D) & exists)


@triton.jit
def decode(
    Q, K, V, TABLE, INDEX, LENGTHS, PAD, SLOPES, K_SCALE, V_SCALE, COS, SIN, PARTIAL, LSE,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_tb, stride_ab, stride_ah,
    stride_ke, stride_ks, stride_kt, stride_ve, stride_vs, stride_vt, stride_cos, positions,
    heads, group, len_q, added, room, page_size, entries, splits, left, right, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, PAGED: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_PAD: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KIND: tl.constexpr,
    CODE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one key head against one split of its keys.

    With PAIRS, queries are rotated by the angles of their slots first; FIXED: all by that of the first.
    """
    scale, softcap = number(scale, Q), number(softcap, Q)
    split, kv, b = tl.program_id(0) % splits, tl.program_id(1), tl.program_id(2)
    filled = tl.load(LENGTHS + b)
    length = tl.minimum(filled.to(tl.int32) + added, room)
    keys_per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    lo = split * keys_per_split
    hi = tl.minimum(lo + keys_per_split, length)
    pad = tl.load(PAD + b).to(tl.int32) if HAS_PAD else 0

    r = (tl.program_id(0) // splits) * BLOCK_M + tl.arange(0, BLOCK_M)
    i, h = r // group, kv * group + r % group
    last = i + length - len_q
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    real = i < len_q
    q_rows = b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + i.to(tl.int64) * stride_qm
    q = tl.load(Q + q_rows[:, None] + dims[None, :] * stride_qd, mask=real[:, None] & (dims[None, :] < D), other=0.0)
    if PAIRS > 0:
        position = filled.to(tl.int64) + (tl.zeros(i.shape, tl.int32) if FIXED else i)
        angles = tl.minimum(tl.maximum(position, 0), positions - 1) * stride_cos
        rotated = _rotated(
            widened(q), (Q + q_rows)[:, None], dims[None, :], stride_qd, real[:, None], COS, SIN,
            angles[:, None], PAIRS, INTERLEAVED,
        )  # fmt: skip
        q = rotated.to(q.dtype)
    if ALIBI:
        slope = tl.load(SLOPES + b * stride_ab + h * stride_ah, mask=real, other=0.0)

    acc = zeros((BLOCK_M, BLOCK_DV), Q)
    m = zeros((BLOCK_M,), Q) - float("inf")
    l = zeros((BLOCK_M,), Q)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        entry, slot = _place(TABLE, INDEX, b, j, j < hi, stride_tb, page_size, entries, PAGED, HAS_INDEX)
        k_rows = K + entry * stride_kb + kv.to(tl.int64) * stride_kh + slot * stride_kn
        seen = (j >= pad) & (j < hi)
        k = tl.load(k_rows[None, :] + dims[:, None] * stride_kd, mask=seen[None, :] & (dims[:, None] < D), other=0)
        if KIND != NO_SCALE:
            k = _stored(k, CODE).to(q.dtype)
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if KIND != NO_SCALE:
            s *= _scales(K_SCALE, entry, kv, slot, seen, stride_ke, stride_ks, stride_kt, KIND)[None, :]
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        if ALIBI:
            s -= slope[:, None] * tl.abs(last[:, None] - j[None, :]).to(s.dtype)
        visible = seen[None, :] & (last[:, None] == last[:, None])
        if RIGHT:
            visible &= j[None, :] <= last[:, None] + right
        if LEFT:
            visible &= j[None, :] >= last[:, None] - left
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * LOG2E - shift[:, None] * LOG2E)
        rescale = tl.exp2((m - shift) * LOG2E)
        l = l * rescale + tl.sum(p, 1)
        m = m_new
        v_rows = V + entry * stride_vb + kv.to(tl.int64) * stride_vh + slot * stride_vn
        v = tl.load(v_rows[:, None] + dims_v[None, :] * stride_vd, mask=seen[:, None] & (dims_v[None, :] < DV), other=0)
        if KIND != NO_SCALE:
            p *= _scales(V_SCALE, entry, kv, slot, seen, stride_ve, stride_vs, stride_vt, KIND)[None, :]
            v = _stored(v, CODE).to(q.dtype)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION, out_dtype=acc.dtype)

    row = ((b.to(tl.int64) * heads + h) * len_q + i) * splits + split
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l) * LN2)
    tl.store(LSE + row, lse, mask=real)
    acc = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(PARTIAL + row[:, None] * DV + dims_v[None, :], acc, mask=real[:, None] & (dims_v[None, :] < DV))


@triton.jit
def combine(
    PARTIAL, PARTIAL_LSE, SINKS, OUT, LSE, splits, heads, len_q,
    DV: tl.constexpr, SINK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One row from its splits, with the sink as one more, which has no value."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    dims = tl.arange(0, BLOCK_DV)
    lse = tl.load(PARTIAL_LSE + row * splits + split, mask=split < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    if SINK:
        sink = tl.load(SINKS + (tl.program_id(0) // len_q) % heads)
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((lse - shift) * LOG2E)
    total = tl.sum(weights, 0)
    if SINK:
        total += tl.exp2((sink - shift) * LOG2E)
    pointers = PARTIAL + (row * splits + split)[:, None] * DV + dims[None, :]
    partial = tl.load(pointers, mask=(split[:, None] < splits) & (dims[None, :] < DV), other=0.0)
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    # Rows are counted by head and query; the result has queries outside and heads inside.
    i, h, b = row % len_q, row // len_q % heads, row // (len_q * heads)
    there = ((b * len_q + i) * heads + h) * DV
    tl.store(OUT + there + dims, out.to(OUT.dtype.element_ty), mask=dims < DV)
    tl.store(LSE + row, tl.where(total == 0.0, float("-inf"), shift + tl.log2(total) * LN2))
