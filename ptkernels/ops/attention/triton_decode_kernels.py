"""Device code of decoding in Triton: few queries against a long cache, contiguous or in pages.

    out_i = sum_j softmax_j(cap(scale * q_i . k_j)) v_j,  i + length - len_q - left <= j <= i + length - len_q

Layout: queries [batch, heads, len_q, dim]; caches [batch, kv heads, room, dim], or [pages, kv heads, page size, dim]
with block_table[b, j // page size] naming the page of key j. Only the first lengths[b] keys of a sequence exist.

Tiling: the len_q * group queries that share a key head are the rows of one product, so that a key is read once for all
of them. The keys of a sequence are cut into splits, which run at the same time: each leaves a normalised output and a
log-sum-exp, and `combine` adds them up in a fixed order, so every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import LN2, LOG2E, tanh


@triton.jit
def decode(
    Q, K, V, TABLE, LENGTHS, PARTIAL, LSE,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_tb,
    heads, group, len_q, page_size, left, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, PAGED: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    split, kv, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    length = tl.load(LENGTHS + b).to(tl.int32)
    keys_per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    lo = split * keys_per_split
    hi = tl.minimum(lo + keys_per_split, length)

    r = tl.arange(0, BLOCK_M)
    i, h = r // group, kv * group + r % group
    last = i + length - len_q
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_DV)
    real = i < len_q
    q_rows = b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh + i.to(tl.int64) * stride_qm
    q = tl.load(Q + q_rows[:, None] + dims[None, :] * stride_qd, mask=real[:, None] & (dims[None, :] < D), other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(lo, hi, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        if PAGED:
            entry = tl.load(TABLE + b.to(tl.int64) * stride_tb + j // page_size, mask=j < hi, other=0).to(tl.int64)
            slot = (j % page_size).to(tl.int64)
        else:
            entry = tl.zeros((BLOCK_N,), tl.int64) + b
            slot = j.to(tl.int64)
        k_rows = K + entry * stride_kb + kv.to(tl.int64) * stride_kh + slot * stride_kn
        k = tl.load(
            k_rows[None, :] + dims[:, None] * stride_kd, mask=(j[None, :] < hi) & (dims[:, None] < D), other=0.0
        )
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        visible = (j[None, :] < hi) & (j[None, :] <= last[:, None])
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
        v = tl.load(
            v_rows[:, None] + dims_v[None, :] * stride_vd, mask=(j[:, None] < hi) & (dims_v[None, :] < DV), other=0.0
        )
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

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
    tl.store(OUT + row * DV + dims, out.to(OUT.dtype.element_ty), mask=dims < DV)
    tl.store(LSE + row, tl.where(total == 0.0, float("-inf"), shift + tl.log2(total) * LN2))
