"""Device code of the backward of convolution, batch normalisation, residual and activation in Triton.

    u = xhat * bn_weight + bn_bias + residual,  xhat = (z - mean) * invstd,  du = grad_out * act'(u)
    dz = bn_weight * invstd * (du - (sum(du) + xhat * sum(du * xhat)) / pixels)     statistics of the batch
    dz = bn_weight * invstd * du                                                    running statistics
    dresidual = du,  dx = pre'(x) conv^T(dz, w),  dw = sum over pixels of dz pre(x)

Nothing was saved but z: xhat, u and the mask of the activation are computed again from it, once for the sums and once
for dz. z and dz are in channels last, [pixels, channels]; everything else is read and written through its strides.

Tiling: `input_gradient` is an implicit product over taps and filters. Input pixels whose coordinates leave the same
remainder by the stride meet the same taps, so each such class is a product of its own and no zero is multiplied.
`weight_gradient` sums over pixels: a program owns a tile of filters by channels of one tap (FLAT: of all taps, where
channels are few) for one share of the pixels, and shares are added up after, in order. Depthwise convolutions are
summed without matrix products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import activation_derivative, number, widened, zeros
from ptkernels.ops.conv_bn_relu.triton_kernels import coordinates, load_input, normalization, offset_of, pixels_of


@triton.jit
def _gradient_of_u(
    G, Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, pixel, f, pixels, filters, depth, height, width,
    stride_gn, stride_gc, stride_gd, stride_gh, stride_gw, stride_rn, stride_rc, stride_rd, stride_rh, stride_rw,
    eps, negative_slope,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """du and xhat of a tile, and the channels' factor of dz; 0 beyond the bounds."""
    eps, negative_slope = number(eps, Z), number(negative_slope, Z)
    real = f < filters
    inside = (pixel[:, None] < pixels) & real[None, :]
    mean, invstd, weight, shift = normalization(
        MEAN, VAR, BN_WEIGHT, BN_BIAS, f, real, eps, HAS_NORM, HAS_WEIGHT, HAS_SHIFT
    )
    xhat = widened(tl.load(Z + pixel.to(tl.int64)[:, None] * filters + f[None, :], mask=inside, other=0.0))
    if HAS_NORM:
        xhat = (xhat - mean[None, :]) * invstd[None, :]
    u = xhat * weight[None, :] + shift[None, :]
    image, z, y, x = coordinates(pixel, depth, height, width)
    channel = f.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        there = offset_of(image, z, y, x, stride_rn, stride_rd, stride_rh, stride_rw)
        u += widened(tl.load(RESIDUAL + there[:, None] + channel * stride_rc, mask=inside, other=0.0))
    there = offset_of(image, z, y, x, stride_gn, stride_gd, stride_gh, stride_gw)
    du = widened(tl.load(G + there[:, None] + channel * stride_gc, mask=inside, other=0.0))
    du = tl.where(inside, du * activation_derivative(u, negative_slope, ACTIVATION), 0.0)
    return du, tl.where(inside, xhat, 0.0), weight * invstd


@triton.jit(do_not_specialize=["pixels"])
def backward_sums(
    G, Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, PARTIAL, pixels, filters, depth, height, width,
    stride_gn, stride_gc, stride_gd, stride_gh, stride_gw, stride_rn, stride_rc, stride_rd, stride_rh, stride_rw,
    eps, negative_slope,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """Sums of du and of du * xhat over REPEATS * BLOCK_M pixels: [shares, 2, filters]."""
    f = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_du = zeros((BLOCK_M, BLOCK_C), Z)
    of_product = zeros((BLOCK_M, BLOCK_C), Z)
    for repeat in range(0, REPEATS):
        pixel = pixels_of(tl.program_id(0) * REPEATS + repeat, pixels, BLOCK_M)
        du, xhat, _ = _gradient_of_u(
            G, Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, pixel, f, pixels, filters, depth, height, width,
            stride_gn, stride_gc, stride_gd, stride_gh, stride_gw,
            stride_rn, stride_rc, stride_rd, stride_rh, stride_rw, eps, negative_slope,
            HAS_NORM, HAS_WEIGHT, HAS_SHIFT, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        of_du += du
        of_product += du * xhat
    there = PARTIAL + tl.program_id(0).to(tl.int64) * 2 * filters + f
    tl.store(there, tl.sum(of_du, 0), mask=f < filters)
    tl.store(there + filters, tl.sum(of_product, 0), mask=f < filters)


@triton.jit(do_not_specialize=["pixels"])
def backward_normalize(
    G, Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, SUMS, DZ, DR, pixels, filters, depth, height, width,
    stride_gn, stride_gc, stride_gd, stride_gh, stride_gw, stride_rn, stride_rc, stride_rd, stride_rh, stride_rw,
    stride_pn, stride_pc, stride_pd, stride_ph, stride_pw, eps, negative_slope,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, OF_BATCH: tl.constexpr, WRITE_DZ: tl.constexpr, WRITE_DR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz and the gradient of the residual, in one pass."""
    pixel = pixels_of(tl.program_id(0), pixels, BLOCK_M)
    f = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    du, xhat, factor = _gradient_of_u(
        G, Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, pixel, f, pixels, filters, depth, height, width,
        stride_gn, stride_gc, stride_gd, stride_gh, stride_gw, stride_rn, stride_rc, stride_rd, stride_rh, stride_rw,
        eps, negative_slope, HAS_NORM, HAS_WEIGHT, HAS_SHIFT, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip
    inside = (pixel[:, None] < pixels) & (f[None, :] < filters)
    if WRITE_DR:
        image, z, y, x = coordinates(pixel, depth, height, width)
        there = offset_of(image, z, y, x, stride_pn, stride_pd, stride_ph, stride_pw)
        pointers = DR + there[:, None] + f.to(tl.int64)[None, :] * stride_pc
        tl.store(pointers, du.to(DR.dtype.element_ty), mask=inside)
    if WRITE_DZ:
        if OF_BATCH:
            of_du = tl.load(SUMS + f, mask=f < filters, other=0.0) / pixels
            of_product = tl.load(SUMS + filters + f, mask=f < filters, other=0.0) / pixels
            du -= of_du[None, :] + xhat * of_product[None, :]
        dz = du * factor[None, :]
        tl.store(DZ + pixel.to(tl.int64)[:, None] * filters + f[None, :], dz.to(DZ.dtype.element_ty), mask=inside)


@triton.jit
def _taps_of_class(remainder, padding, STEP: tl.constexpr, TAPS: tl.constexpr):
    """First tap that inputs with this remainder by STEP meet, and how many there are, STEP apart."""
    first = (remainder + padding) % STEP
    return first, tl.maximum(TAPS - first + STEP - 1, 0) // STEP


@triton.jit
def _met(coordinate, tap, padding, stride, dilation, size):
    """Which output coordinate reads an input coordinate through a tap, and whether there is one."""
    distance = coordinate + padding - tap * dilation
    return distance // stride, (distance >= 0) & (distance % stride == 0) & (distance // stride < size)


@triton.jit(do_not_specialize=["pixels"])
def input_gradient(
    DZ, W, X, DX, pixels, batch, filters, depth, height, width, out_depth, out_height, out_width,
    stride_wf, stride_wc, stride_wq, stride_wr, stride_ws, stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_yn, stride_yc, stride_yd, stride_yh, stride_yw,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w, negative_slope,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr, MULTIPLIER: tl.constexpr, PRE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M pixels of one class, the largest of which has `pixels`, by BLOCK_N channels of one group."""
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    group, index = tl.program_id(1), tl.program_id(2)
    a_w, a_h, a_d = index % STEP_W, index // STEP_W % STEP_H, index // (STEP_W * STEP_H)
    class_d = (depth - a_d + STEP_D - 1) // STEP_D
    class_h = (height - a_h + STEP_H - 1) // STEP_H
    class_w = (width - a_w + STEP_W - 1) // STEP_W
    pixel = pixels_of(tl.program_id(0) // tiles_n, pixels, BLOCK_M)
    exists = pixel < class_d.to(tl.int64) * class_h * class_w * batch
    within = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, z, y, x = coordinates(pixel, tl.maximum(class_d, 1), tl.maximum(class_h, 1), tl.maximum(class_w, 1))
    z, y, x = z * STEP_D + a_d, y * STEP_H + a_h, x * STEP_W + a_w
    first_q, count_q = _taps_of_class(a_d, padding_d, STEP_D, TAPS_D)
    first_r, count_r = _taps_of_class(a_h, padding_h, STEP_H, TAPS_H)
    first_s, count_s = _taps_of_class(a_w, padding_w, STEP_W, TAPS_W)
    W += (group * FILTERS).to(tl.int64) * stride_wf
    DZ += group * FILTERS

    acc = zeros((BLOCK_M, BLOCK_N), DZ)
    PER_TAP: tl.constexpr = MULTIPLIER if MULTIPLIER > 0 else (FILTERS + BLOCK_K - 1) // BLOCK_K
    for step in range(0, count_q * count_r * count_s * PER_TAP):
        tap = step // PER_TAP
        if MULTIPLIER > 0:
            f = within * MULTIPLIER + step % PER_TAP
            inside_f = within < CHANNELS
        else:
            f = step % PER_TAP * BLOCK_K + tl.arange(0, BLOCK_K)
            inside_f = f < FILTERS
        q = first_q + tap // (count_r * count_s) * STEP_D
        r = first_r + tap // count_s % count_r * STEP_H
        s = first_s + tap % count_s * STEP_W
        layer, in_depth = _met(z, q, padding_d, stride_d, dilation_d, out_depth)
        row, in_height = _met(y, r, padding_h, stride_h, dilation_h, out_height)
        column, in_width = _met(x, s, padding_w, stride_w, dilation_w, out_width)
        there = ((image * out_depth + layer) * out_height + row) * out_width + column
        a = tl.load(
            DZ + there[:, None] * filters + f[None, :],
            mask=(exists & in_depth & in_height & in_width)[:, None] & inside_f[None, :],
            other=0.0,
        )
        of_tap = q * stride_wq + r * stride_wr + s * stride_ws
        if MULTIPLIER > 0:
            b = tl.load(W + f.to(tl.int64) * stride_wf + of_tap, mask=inside_f, other=0.0)
            acc += widened(a) * widened(b)[None, :]
        else:
            b = tl.load(
                W + f.to(tl.int64)[:, None] * stride_wf + within[None, :] * stride_wc + of_tap,
                mask=inside_f[:, None] & (within[None, :] < CHANNELS),
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    channel = (group * CHANNELS + within).to(tl.int64)
    inside = exists[:, None] & (within[None, :] < CHANNELS)
    if PRE != 0:
        there = offset_of(image, z, y, x, stride_xn, stride_xd, stride_xh, stride_xw)
        given = widened(tl.load(X + there[:, None] + channel[None, :] * stride_xc, mask=inside, other=0.0))
        acc *= activation_derivative(given, number(negative_slope, X), PRE)
    there = offset_of(image, z, y, x, stride_yn, stride_yd, stride_yh, stride_yw)
    tl.store(DX + there[:, None] + channel[None, :] * stride_yc, acc.to(DX.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels"])
def weight_gradient(
    DZ, X, PARTIAL, pixels, share, filters, depth, height, width, out_depth, out_height, out_width,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w, negative_slope,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    FLAT: tl.constexpr, PRE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Over `share` pixels: [shares, filters, taps * CHANNELS] in the dtype of sums."""
    TAPS: tl.constexpr = TAPS_D * TAPS_H * TAPS_W
    TILES_C: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    tiles_columns = tl.cdiv(TAPS * CHANNELS, BLOCK_N) if FLAT else TAPS * TILES_C
    group = tl.program_id(1)
    within = (tl.program_id(0) // tiles_columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(0) % tiles_columns
    if FLAT:
        flat = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tap, channel = (flat // CHANNELS)[None, :], flat % CHANNELS
        inside_n = flat < TAPS * CHANNELS
    else:
        tap = tile // TILES_C
        channel = tile % TILES_C * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = channel < CHANNELS
        flat = tap * CHANNELS + channel
    q, r, s = tap // (TAPS_H * TAPS_W), tap // TAPS_W % TAPS_H, tap % TAPS_W
    f = (group * FILTERS + within).to(tl.int64)
    X += (group * CHANNELS + channel).to(tl.int64)[None, :] * stride_xc
    begin = tl.program_id(2).to(pixels.dtype) * share
    end = tl.minimum(begin + share, pixels)

    slope = number(negative_slope, DZ)
    acc = zeros((BLOCK_M, BLOCK_N), DZ)
    for first in range(0, share, BLOCK_K):
        pixel = begin + first + tl.arange(0, BLOCK_K)
        image, z, y, x = coordinates(pixel, out_depth, out_height, out_width)
        layer = z[:, None] * stride_d + (q * dilation_d - padding_d)
        row = y[:, None] * stride_h + (r * dilation_h - padding_h)
        column = x[:, None] * stride_w + (s * dilation_w - padding_w)
        real = (pixel >= begin) & (pixel < end)
        inside = real[:, None] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside &= (layer >= 0) & (layer < depth)
        offset = offset_of(image[:, None], layer, row, column, stride_xn, stride_xd, stride_xh, stride_xw)
        b = load_input(X + offset, inside & inside_n[None, :], slope, PRE)
        a = tl.load(
            DZ + pixel.to(tl.int64)[None, :] * filters + f[:, None],
            mask=real[None, :] & (within[:, None] < FILTERS),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    there = (tl.program_id(2).to(tl.int64) * filters + f[:, None]) * (TAPS * CHANNELS) + flat[None, :]
    tl.store(PARTIAL + there, acc, mask=(within[:, None] < FILTERS) & inside_n[None, :])


@triton.jit(do_not_specialize=["pixels"])
def depthwise_weight_gradient(
    DZ, X, PARTIAL, pixels, share, filters, depth, height, width, out_depth, out_height, out_width,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w, negative_slope,
    TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, MULTIPLIER: tl.constexpr, PRE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tap of BLOCK_C filters over `share` pixels: [shares, filters, taps] in the dtype of sums."""
    TAPS: tl.constexpr = TAPS_D * TAPS_H * TAPS_W
    f = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.program_id(1)
    q, r, s = tap // (TAPS_H * TAPS_W), tap // TAPS_W % TAPS_H, tap % TAPS_W
    begin = tl.program_id(2).to(pixels.dtype) * share
    end = tl.minimum(begin + share, pixels)
    slope = number(negative_slope, DZ)
    acc = zeros((BLOCK_M, BLOCK_C), DZ)
    for first in range(0, share, BLOCK_M):
        pixel = begin + first + tl.arange(0, BLOCK_M)
        image, z, y, x = coordinates(pixel, out_depth, out_height, out_width)
        layer = z * stride_d + (q * dilation_d - padding_d)
        row = y * stride_h + (r * dilation_h - padding_h)
        column = x * stride_w + (s * dilation_w - padding_w)
        inside = (pixel >= begin) & (pixel < end) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside &= (layer >= 0) & (layer < depth)
        offset = offset_of(image, layer, row, column, stride_xn, stride_xd, stride_xh, stride_xw)
        valid = inside[:, None] & (f[None, :] < filters)
        of_input = X + offset[:, None] + (f // MULTIPLIER).to(tl.int64)[None, :] * stride_xc
        dz = tl.load(DZ + pixel.to(tl.int64)[:, None] * filters + f[None, :], mask=valid, other=0.0)
        acc += widened(load_input(of_input, valid, slope, PRE)) * widened(dz)
    there = (tl.program_id(2).to(tl.int64) * filters + f) * TAPS + tap
    tl.store(PARTIAL + there, tl.sum(acc, 0), mask=f < filters)
