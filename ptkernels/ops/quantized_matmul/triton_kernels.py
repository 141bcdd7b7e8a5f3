"""Device code of quantized linear layers in Triton: the product, its gradient of the input, and rounding of the input.

    out = act(x W^T + bias + residual),  dx = g W
    W[n, k] = scales[n, k // group] * (value(codes[n, k]) - zeros[n, k // group])

Layout: codes [N, bytes of a row] as they are stored, those of fewer than 8 bits from the low bits of a byte on; scales
and zeros float32 [N, groups]. value(code) is the code itself (S8), the code minus 8 (U4), 4 (U3) or 2 (U2), a small
float (FP8, e4m3; FP4, e2m1) whose bits are moved to where float32 has them, or a look-up (NF4).

Tiling: a program owns BLOCK_M x BLOCK_N of the result and walks K. Codes are exact in 16 bits (those of nf4 are rounded
once), so where a step of K stays inside one group the product is taken of the codes and the scale multiplies what it
adds in float32, or in float64 for float64; with one scale a row it multiplies once, at the end, and 8-bit products add
up in int32. Zero points of a quantized input's product come off as multiples of the sums of its codes.

Experts: weights are stacked along N and the rows of the input ordered by expert, COUNTS[e] of them for each. Every
expert's rows are cut into tiles of their own, all of them in one launch of as many programs as there can be tiles; a
program finds its expert by the running sum of COUNTS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import activate, e4m3_values, load_tile, widened, zeros

S8 = tl.constexpr(0)
U4 = tl.constexpr(1)
U2 = tl.constexpr(2)
NF4 = tl.constexpr(3)
FP4 = tl.constexpr(4)
FP8 = tl.constexpr(5)
U3 = tl.constexpr(6)

SCALE_AT_END = tl.constexpr(0)
SCALE_PER_STEP = tl.constexpr(1)
SCALE_PER_CODE = tl.constexpr(2)


@triton.jit
def _spread(packed, CODE: tl.constexpr):
    """The codes of each byte, the lowest first, in a last dimension of their own; of 8 bits, the bytes."""
    if CODE == U2:
        # join makes the new dimension the last: the second one decides between low and high pairs.
        low = tl.join(packed & 3, packed >> 4 & 3)
        high = tl.join(packed >> 2 & 3, packed >> 6)
        return tl.join(low, high)
    else:
        return tl.join(packed & 15, packed >> 4)


@triton.jit
def _values(BOOK, codes, CODE: tl.constexpr):
    """Codes as float32 numbers, or as int8 where they are integers."""
    if CODE == S8:
        return codes
    elif CODE == U4:
        return codes.to(tl.int8) - 8
    elif CODE == U2:
        return codes.to(tl.int8) - 2
    elif CODE == U3:
        return codes.to(tl.int8) - 4
    elif CODE == FP8:
        return e4m3_values(codes, False)
    elif CODE == FP4:
        bits = codes.to(tl.int32)
        return ((bits & 7) << 22 | (bits & 8) << 28).to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return tl.load(BOOK + codes.to(tl.int32))


@triton.jit
def _weights(CODES, BOOK, n, N, first, K, stride_c, CODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Values of columns [first, first + BLOCK_K) of rows n, as [BLOCK_N, BLOCK_K]."""
    rows = CODES + n.to(tl.int64)[:, None] * stride_c
    if CODE == S8 or CODE == FP8:
        k = first + tl.arange(0, BLOCK_K)
        codes = tl.load(rows + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
    elif CODE == U3:
        # Eight codes in three bytes: each is read with the byte behind it.
        bit = (first + tl.arange(0, BLOCK_K)) * 3
        bytes_of_row = tl.cdiv(3 * K, 8)
        inside = (n[:, None] < N) & (bit // 8 < bytes_of_row)[None, :]
        low = tl.load(rows + (bit // 8)[None, :], mask=inside, other=0).to(tl.int32)
        behind = inside & (bit // 8 + 1 < bytes_of_row)[None, :]
        high = tl.load(rows + (bit // 8 + 1)[None, :], mask=behind, other=0).to(tl.int32)
        codes = (low | high << 8) >> (bit % 8)[None, :] & 7
    else:
        PER_BYTE: tl.constexpr = 4 if CODE == U2 else 2
        byte = first // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
        inside = (n[:, None] < N) & (byte[None, :] < tl.cdiv(K, PER_BYTE))
        codes = tl.reshape(_spread(tl.load(rows + byte[None, :], mask=inside, other=0), CODE), (BLOCK_N, BLOCK_K))
    return _values(BOOK, codes, CODE)


@triton.jit
def _expert_tile(COUNTS, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of a tile of rows, EXPERTS where there is none; its first row, and the end of the expert's rows."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(COUNTS + e, mask=e < EXPERTS, other=0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum(((tl.cumsum(tiles, 0) <= tile) & (e < EXPERTS)).to(tl.int32), 0)
    begin = tl.sum(tl.where(e < expert, count, 0), 0)
    end = begin + tl.sum(tl.where(e == expert, count, 0), 0)
    first = begin + (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * BLOCK_M
    return expert, first, end


@triton.jit
def _operand(w, x, INTEGER: tl.constexpr):
    """Weights in the dtype of x, by way of float32: the interpreter cannot go from int8 to bfloat16 at once."""
    return w if INTEGER else widened(w).to(x.dtype)


@triton.jit
def quantize_rows(
    X, STEP, CODES, SCALES, M, K, stride_xm, stride_xk,
    GIVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """8-bit codes and scales of rows: the scale is the largest magnitude / 127, or GIVEN; rounding is to nearest even.

    Rows below 2^-100 have scale 0 and codes 0; a row with a NaN, or without a given scale an infinity, has scale NaN.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    X += m.to(tl.int64)[:, None] * stride_xm
    top = tl.zeros((BLOCK_M,), tl.float32)
    broken = tl.zeros((BLOCK_M,), tl.int32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_tile(X + k.to(tl.int64)[None, :] * stride_xk, m[:, None], k[None, :], M, K, True, True).to(tl.float32)
        finite = tl.abs(x) < float("inf")
        usual = x == x if GIVEN else finite
        top = tl.maximum(top, tl.max(tl.where(finite, tl.abs(x), 0.0), 1))
        broken = tl.maximum(broken, tl.where(usual, 0, 1).max(1))
    tiny = top < 7.888609052210118e-31
    usable = ~tiny & (broken == 0)
    safe = tl.where(usable, top, 1.0)
    factor = tl.where(usable, tl.div_rn(tl.full(safe.shape, 127.0, tl.float32), safe), 0.0)
    scale = tl.where(tiny, 0.0, tl.div_rn(top, tl.full(top.shape, 127.0, tl.float32)))
    if GIVEN:
        scale = tl.zeros((BLOCK_M,), tl.float32) + tl.load(STEP)
        factor = tl.where(broken > 0, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale))
    tl.store(SCALES + m, tl.where(broken > 0, float("nan"), scale), mask=m < M)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_tile(X + k.to(tl.int64)[None, :] * stride_xk, m[:, None], k[None, :], M, K, True, True).to(tl.float32)
        scaled = tl.where(broken[:, None] > 0, 0.0, x) * factor[:, None]
        scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        # Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to the nearest even integer.
        rounded = (scaled + 12582912.0) - 12582912.0
        pointers = CODES + m.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(pointers, rounded.to(tl.int8), mask=(m[:, None] < M) & (k[None, :] < K))


@triton.jit
def linear(
    X, X_SCALES, CODES, SCALES, ZEROS, BOOK, BIAS, RESIDUAL, OUT, COUNTS, M, N, K, group, groups,
    stride_xm, stride_xk, stride_c, stride_rm, stride_rn, stride_om,
    CODE: tl.constexpr, SCALING: tl.constexpr, HAS_ZEROS: tl.constexpr, INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Blocks that run at the same time share rows of the input and of the weight in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M) + EXPERTS, tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    tile = band * GROUP_M + within % height
    first_row = tile * BLOCK_M
    n = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    if EXPERTS > 0:
        expert, first_row, M = _expert_tile(COUNTS, tile, EXPERTS, BLOCK_E, BLOCK_M)
        if expert >= EXPERTS:
            return
        CODES += expert.to(tl.int64) * N * stride_c
        SCALES += expert.to(tl.int64) * N * groups
        ZEROS += expert.to(tl.int64) * N * groups
        BIAS += expert.to(tl.int64) * N
    m = first_row + tl.arange(0, BLOCK_M)

    X += m.to(tl.int64)[:, None] * stride_xm
    row = n.to(tl.int64) * groups
    if INTEGER and SCALING == SCALE_AT_END:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        acc = zeros((BLOCK_M, BLOCK_N), OUT)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_tile(X + k.to(tl.int64)[None, :] * stride_xk, m[:, None], k[None, :], M, K, True, True)
        w = tl.trans(_weights(CODES, BOOK, n, N, first, K, stride_c, CODE, BLOCK_N, BLOCK_K))
        if SCALING == SCALE_PER_CODE:
            entry = row[None, :] + (k // group)[:, None]
            inside = (n[None, :] < N) & (k[:, None] < K)
            w = w.to(acc.dtype)
            if HAS_ZEROS:
                w -= tl.load(ZEROS + entry, mask=inside, other=0.0)
            w *= tl.load(SCALES + entry, mask=inside, other=0.0)
            if INTEGER:
                x = x.to(acc.dtype)
            acc = tl.dot(x, _operand(w, x, False), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        elif SCALING == SCALE_AT_END:
            if INTEGER:
                acc = tl.dot(x, w, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(x, _operand(w, x, False), acc, input_precision=PRECISION, out_dtype=acc.dtype)
        else:
            if HAS_ZEROS:
                zero = tl.load(ZEROS + row + first // group, mask=n < N, other=0.0)
                if not INTEGER:
                    w = w.to(acc.dtype) - zero[None, :]
            if INTEGER:
                part = tl.dot(x, w, out_dtype=tl.int32).to(acc.dtype)
                if HAS_ZEROS:
                    part -= tl.sum(x.to(tl.int32), 1).to(acc.dtype)[:, None] * zero[None, :]
            else:
                part = tl.dot(x, _operand(w, x, False), input_precision=PRECISION)
            acc += part * tl.load(SCALES + row + first // group, mask=n < N, other=0.0)[None, :]

    result = acc.to(tl.float64 if OUT.dtype.element_ty == tl.float64 else tl.float32)
    if SCALING == SCALE_AT_END:
        result *= tl.load(SCALES + row, mask=n < N, other=0.0)[None, :]
    if INTEGER:
        result *= tl.load(X_SCALES + m, mask=m < M, other=0.0)[:, None]
    if HAS_BIAS:
        result += widened(tl.load(BIAS + n, mask=n < N, other=0.0))[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if HAS_RESIDUAL:
        pointers = RESIDUAL + m.to(tl.int64)[:, None] * stride_rm + n.to(tl.int64)[None, :] * stride_rn
        result += widened(tl.load(pointers, mask=inside, other=0.0))
    result = activate(result, 0.0, ACTIVATION)
    tl.store(OUT + m.to(tl.int64)[:, None] * stride_om + n[None, :], result.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def linear_dx(
    G, CODES, SCALES, ZEROS, BOOK, DX, COUNTS, M, N, K, group, groups, stride_gm, stride_gn, stride_c, stride_dm,
    CODE: tl.constexpr, HAS_ZEROS: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M x BLOCK_K of the input's gradient. Scales vary along the sum here, so weights are scaled tile by tile."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) // tiles_k
    first_row = tile * BLOCK_M
    if EXPERTS > 0:
        expert, first_row, M = _expert_tile(COUNTS, tile, EXPERTS, BLOCK_E, BLOCK_M)
        if expert >= EXPERTS:
            return
        CODES += expert.to(tl.int64) * N * stride_c
        SCALES += expert.to(tl.int64) * N * groups
        ZEROS += expert.to(tl.int64) * N * groups
    m = first_row + tl.arange(0, BLOCK_M)
    first = (tl.program_id(0) % tiles_k) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    G += m.to(tl.int64)[:, None] * stride_gm
    acc = zeros((BLOCK_M, BLOCK_K), G)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        g = load_tile(G + n.to(tl.int64)[None, :] * stride_gn, m[:, None], n[None, :], M, N, True, True)
        inside = (n[:, None] < N) & (k[None, :] < K)
        w = _weights(CODES, BOOK, n, N, first, K, stride_c, CODE, BLOCK_N, BLOCK_K).to(acc.dtype)
        entry = n.to(tl.int64)[:, None] * groups + (k // group)[None, :]
        if HAS_ZEROS:
            w -= tl.load(ZEROS + entry, mask=inside, other=0.0)
        w *= tl.load(SCALES + entry, mask=inside, other=0.0)
        acc = tl.dot(g, w.to(g.dtype), acc, input_precision=PRECISION, out_dtype=acc.dtype)
    pointers = DX + m.to(tl.int64)[:, None] * stride_dm + k[None, :]
    tl.store(pointers, acc.to(DX.dtype.element_ty), mask=(m[:, None] < M) & (k[None, :] < K))
