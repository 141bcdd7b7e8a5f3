"""Device code of convolution with batch normalisation, residual and activation in Triton: forward.

    z = conv(pre(x), w) + bias,  out = act((z - mean) / sqrt(var + eps) * bn_weight + bn_bias + residual)

Layout: images through their strides, fastest in channels last, where a tile of pixels by channels is rows of memory. z
is always in channels last: [pixels, channels]. Lines and planes are volumes of one layer.

Tiling: an implicit matrix product. Rows are the output's pixels over the whole batch, columns its channels in one
group, the sum runs over the taps of the filter and, within each, over blocks of the input's channels (FLAT: over both
at once, where channels are few). Nothing is unfolded: a tap's tile is read where it lies, with zeros where it falls on
padding. Depthwise convolutions have nothing to multiply as matrices: their taps are added up tile by tile. With running
statistics the normalisation, residual and activation are the product's epilogue. With those of the batch it leaves z
and, of every tile, the mean (in two parts) and the centred sum of squares of each channel; `merge_statistics` merges
them (Chan, Golub and LeVeque, 1983) in a fixed order, and `normalize` reads z once more. z is rounded to its dtype
before it is normalised, so that both ways give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import activate, number, widened, zeros


@triton.jit
def pixels_of(block, pixels, BLOCK: tl.constexpr):
    """Numbers of the pixels of a block, as wide as their count needs: 64-bit divisions are calls of functions."""
    number = block.to(pixels.dtype) * BLOCK + tl.arange(0, BLOCK)
    return tl.where(number < 0, pixels, number)  # the last block may end beyond 2^31


@triton.jit
def coordinates(pixel, depth, height, width):
    """Image, layer, row and column of pixels."""
    x = (pixel % width).to(tl.int32)
    rest = pixel // width
    y = (rest % height).to(tl.int32)
    rest = rest // height
    return (rest // depth).to(tl.int64), (rest % depth).to(tl.int32), y, x


@triton.jit
def offset_of(image, z, y, x, stride_n, stride_d, stride_h, stride_w):
    return image * stride_n + z.to(tl.int64) * stride_d + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


@triton.jit
def per_channel(pointer, f, real, absent: tl.constexpr, GIVEN: tl.constexpr):
    """A vector of channels in the dtype of sums; `absent` where there is none."""
    if GIVEN:
        return widened(tl.load(pointer + f, mask=real, other=absent))
    else:
        return zeros(f.shape, pointer) + absent


@triton.jit
def normalization(
    MEAN, VAR, BN_WEIGHT, BN_BIAS, f, real, eps,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """mean, 1 / sqrt(var + eps), factor and summand of each channel."""
    mean = per_channel(MEAN, f, real, 0.0, HAS_NORM)
    invstd = zeros(f.shape, VAR) + 1.0
    if HAS_NORM:
        var = widened(tl.load(VAR + f, mask=real, other=1.0)) + eps
        # The square root of float64 is rounded as it should be, and has no other name.
        invstd = 1.0 / (tl.sqrt(var) if var.dtype == tl.float64 else tl.sqrt_rn(var))
    weight = per_channel(BN_WEIGHT, f, real, 1.0, HAS_WEIGHT)
    return mean, invstd, weight, per_channel(BN_BIAS, f, real, 0.0, HAS_SHIFT)


@triton.jit
def load_input(pointers, inside, negative_slope, PRE: tl.constexpr):
    """What is convolved, in the dtype of the input: the activation PRE of it, and 0 where it falls on padding."""
    x = tl.load(pointers, mask=inside, other=0.0)
    if PRE != 0:
        x = tl.where(inside, activate(widened(x), negative_slope, PRE), 0.0).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["pixels"])
def conv(
    X, W, BIAS, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, OUT, Z, PARTIAL,
    pixels, filters, depth, height, width, out_depth, out_height, out_width,
    stride_xn, stride_xc, stride_xd, stride_xh, stride_xw, stride_wf, stride_wc, stride_wq, stride_wr, stride_ws,
    stride_rn, stride_rc, stride_rd, stride_rh, stride_rw, stride_on, stride_oc, stride_od, stride_oh, stride_ow,
    stride_d, stride_h, stride_w, padding_d, padding_h, padding_w, dilation_d, dilation_h, dilation_w,
    eps, negative_slope,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, TAPS_D: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, WRITE_OUT: tl.constexpr, WRITE_Z: tl.constexpr,
    STATISTICS: tl.constexpr, FLAT: tl.constexpr, MULTIPLIER: tl.constexpr, PRE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """CHANNELS and FILTERS are those of one group, of which the second dimension of the grid counts.

    MULTIPLIER is 0, or that of a depthwise convolution, whose filters are all in one group here.
    """
    eps, negative_slope = number(eps, W), number(negative_slope, W)
    tiles_n = tl.cdiv(FILTERS, BLOCK_N)
    group = tl.program_id(1)
    tile_m = tl.program_id(0) // tiles_n
    pixel = pixels_of(tile_m, pixels, BLOCK_M)
    within = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = (group * FILTERS + within).to(tl.int64)
    image, z, y, x = coordinates(pixel, out_depth, out_height, out_width)
    X += image * stride_xn + (group * CHANNELS).to(tl.int64) * stride_xc
    W += f * stride_wf

    acc = zeros((BLOCK_M, BLOCK_N), W)
    TAPS: tl.constexpr = TAPS_D * TAPS_H * TAPS_W
    STEPS: tl.constexpr = (TAPS * CHANNELS + BLOCK_K - 1) // BLOCK_K
    PER_TAP: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    BLOCKS: tl.constexpr = STEPS if FLAT else TAPS * PER_TAP
    for step in range(0, TAPS if MULTIPLIER > 0 else BLOCKS):
        if FLAT:
            flat = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap, channel = (flat // CHANNELS)[None, :], flat % CHANNELS
            inside_k = flat < TAPS * CHANNELS
        elif MULTIPLIER > 0:
            tap, channel = step, f // MULTIPLIER
            inside_k = within < FILTERS
        else:
            tap = step // PER_TAP
            channel = step % PER_TAP * BLOCK_K + tl.arange(0, BLOCK_K)
            inside_k = channel < CHANNELS
        q, r, s = tap // (TAPS_H * TAPS_W), tap // TAPS_W % TAPS_H, tap % TAPS_W
        layer = z[:, None] * stride_d + (q * dilation_d - padding_d)
        row = y[:, None] * stride_h + (r * dilation_h - padding_h)
        column = x[:, None] * stride_w + (s * dilation_w - padding_w)
        inside = (pixel < pixels)[:, None] & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside &= (layer >= 0) & (layer < depth)
        offset = offset_of(0, layer, row, column, 0, stride_xd, stride_xh, stride_xw)
        of_channel = channel.to(tl.int64)[None, :] * stride_xc
        a = load_input(X[:, None] + offset + of_channel, inside & inside_k[None, :], negative_slope, PRE)
        if FLAT:
            of_tap = tl.trans(q * stride_wq + r * stride_wr + s * stride_ws)
        else:
            of_tap = q * stride_wq + r * stride_wr + s * stride_ws
        if MULTIPLIER > 0:
            acc += widened(a) * widened(tl.load(W + of_tap, mask=inside_k, other=0.0))[None, :]
        else:
            b = tl.load(
                W[None, :] + of_tap + channel[:, None] * stride_wc,
                mask=inside_k[:, None] & (within[None, :] < FILTERS),
                other=0.0,
            )
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)

    real = within < FILTERS
    stored = (pixel[:, None] < pixels) & real[None, :]
    acc += per_channel(BIAS, f, real, 0.0, HAS_BIAS)[None, :]
    rounded = acc.to(X.dtype.element_ty)
    acc = widened(rounded)
    if WRITE_Z:
        tl.store(Z + pixel.to(tl.int64)[:, None] * filters + f[None, :], rounded, mask=stored)
    if STATISTICS:
        count = tl.minimum(pixels - tile_m * BLOCK_M, BLOCK_M).to(acc.dtype)
        mean = tl.sum(tl.where(stored, acc, 0.0), 0) / count
        centred = tl.where(stored, acc - mean[None, :], 0.0)
        # What the sum's rounding left in the mean of large numbers, which float32 has no room for beside them.
        rest = tl.sum(centred, 0) / count
        centred = tl.where(stored, centred - rest[None, :], 0.0)
        there = PARTIAL + tile_m.to(tl.int64) * 3 * filters + f
        tl.store(there, mean, mask=real)
        tl.store(there + filters, rest, mask=real)
        tl.store(there + 2 * filters, tl.sum(centred * centred, 0), mask=real)
    if WRITE_OUT:
        mean, invstd, scale, shift = normalization(
            MEAN, VAR, BN_WEIGHT, BN_BIAS, f, real, eps, HAS_NORM, HAS_WEIGHT, HAS_SHIFT
        )
        acc = (acc - mean[None, :]) * (invstd * scale)[None, :] + shift[None, :]
        if HAS_RESIDUAL:
            there = offset_of(image, z, y, x, stride_rn, stride_rd, stride_rh, stride_rw)
            acc += widened(tl.load(RESIDUAL + there[:, None] + f[None, :] * stride_rc, mask=stored, other=0.0))
        there = offset_of(image, z, y, x, stride_on, stride_od, stride_oh, stride_ow)
        result = activate(acc, negative_slope, ACTIVATION).to(OUT.dtype.element_ty)
        tl.store(OUT + there[:, None] + f[None, :] * stride_oc, result, mask=stored)


@triton.jit
def merge_statistics(
    PARTIAL, MEAN, VAR, tiles, pixels, filters, ROWS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mean and biased variance of channels from those of tiles of ROWS pixels, the last of which may be shorter.

    Means are taken relative to the first tile's, so that a large one costs no digits of the variance.
    """
    f = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = f < filters
    origin = tl.load(PARTIAL + f, mask=real, other=0.0)
    mean = zeros((BLOCK_C,), PARTIAL)
    squares = zeros((BLOCK_C,), PARTIAL)
    seen = tl.full((), 0.0, mean.dtype)
    for first in range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        there = PARTIAL + tile.to(tl.int64)[:, None] * 3 * filters + f[None, :]
        inside = (tile[:, None] < tiles) & real[None, :]
        size = tl.maximum(tl.minimum(pixels - tile.to(tl.int64) * ROWS, ROWS), 0).to(mean.dtype)
        relative = tl.where(inside, tl.load(there, mask=inside, other=0.0) - origin[None, :], 0.0)
        relative += tl.load(there + filters, mask=inside, other=0.0)
        total = tl.sum(size, 0)
        of_block = tl.sum(relative * size[:, None], 0) / total
        spread = tl.where(inside, relative - of_block[None, :], 0.0)
        within = tl.sum(tl.load(there + 2 * filters, mask=inside, other=0.0) + spread * spread * size[:, None], 0)
        delta = of_block - mean
        both = seen + total
        mean += delta * (total / both)
        squares += within + delta * delta * (seen * total / both)
        seen = both
    tl.store(MEAN + f, origin + mean, mask=real)
    tl.store(VAR + f, squares / seen, mask=real)


@triton.jit(do_not_specialize=["pixels"])
def normalize(
    Z, BN_WEIGHT, BN_BIAS, MEAN, VAR, RESIDUAL, OUT, pixels, filters, depth, height, width,
    stride_rn, stride_rc, stride_rd, stride_rh, stride_rw, stride_on, stride_oc, stride_od, stride_oh, stride_ow,
    eps, negative_slope,
    HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out from z, in one pass."""
    eps, negative_slope = number(eps, Z), number(negative_slope, Z)
    pixel = pixels_of(tl.program_id(0), pixels, BLOCK_M)
    f = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = f < filters
    inside = (pixel[:, None] < pixels) & real[None, :]
    mean, invstd, scale, shift = normalization(MEAN, VAR, BN_WEIGHT, BN_BIAS, f, real, eps, True, HAS_WEIGHT, HAS_SHIFT)
    u = widened(tl.load(Z + pixel.to(tl.int64)[:, None] * filters + f[None, :], mask=inside, other=0.0))
    u = (u - mean[None, :]) * (invstd * scale)[None, :] + shift[None, :]
    image, z, y, x = coordinates(pixel, depth, height, width)
    channel = f.to(tl.int64)[None, :]
    if HAS_RESIDUAL:
        there = offset_of(image, z, y, x, stride_rn, stride_rd, stride_rh, stride_rw)
        u += widened(tl.load(RESIDUAL + there[:, None] + channel * stride_rc, mask=inside, other=0.0))
    there = offset_of(image, z, y, x, stride_on, stride_od, stride_oh, stride_ow)
    result = activate(u, negative_slope, ACTIVATION).to(OUT.dtype.element_ty)
    tl.store(OUT + there[:, None] + channel * stride_oc, result, mask=inside)
