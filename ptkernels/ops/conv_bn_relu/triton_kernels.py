"""Device code of convolution with batch normalisation and activation in Triton, for inference.

    out[n, f, y, x] = act(scale[f] * sum_{c, r, s} in[n, c, y * stride + r * dilation - padding, ...] w[f, c, r, s]
                          + shift[f] + residual[n, f, y, x])

Layout: images through their strides, fastest in channels_last, where a tile of pixels by channels is rows of memory.

Tiling: an implicit matrix product. Rows are the output's pixels over the whole batch, columns its channels in one
group, the sum runs over the taps of the filter and, within each, over blocks of the input's channels. Nothing is
unfolded: the input's tile of a tap is read where it lies, with zeros where the tap falls on padding.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ptkernels._triton.math import activate


@triton.jit
def conv(
    X, W, SCALE, SHIFT, RESIDUAL, OUT, pixels, height, width, out_height, out_width,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_wf, stride_wc, stride_wr, stride_ws,
    stride_rn, stride_rc, stride_rh, stride_rw, stride_on, stride_oc, stride_oh, stride_ow,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, negative_slope,
    CHANNELS: tl.constexpr, FILTERS: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """CHANNELS and FILTERS are those of one group, of which the second dimension of the grid counts."""
    tiles_n = tl.cdiv(FILTERS, BLOCK_N)
    group = tl.program_id(1)
    pixel = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = (group * FILTERS + within).to(tl.int64)
    image = pixel // (out_height * out_width)
    y = (pixel // out_width % out_height).to(tl.int32)
    x = (pixel % out_width).to(tl.int32)
    c = tl.arange(0, BLOCK_K)
    X += image * stride_xn + (group * CHANNELS).to(tl.int64) * stride_xc
    W += f * stride_wf

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, TAPS_H * TAPS_W * tl.cdiv(CHANNELS, BLOCK_K)):
        tap = step // tl.cdiv(CHANNELS, BLOCK_K)
        channel = step % tl.cdiv(CHANNELS, BLOCK_K) * BLOCK_K + c
        r, s = tap // TAPS_W, tap % TAPS_W
        row = y * stride_h + r * dilation_h - padding_h
        column = x * stride_w + s * dilation_w - padding_w
        inside = (pixel < pixels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offset = row.to(tl.int64) * stride_xh + column.to(tl.int64) * stride_xw
        a = tl.load(
            X[:, None] + offset[:, None] + channel.to(tl.int64)[None, :] * stride_xc,
            mask=inside[:, None] & (channel[None, :] < CHANNELS),
            other=0.0,
        )
        b = tl.load(
            W[None, :] + r * stride_wr + s * stride_ws + channel[:, None] * stride_wc,
            mask=(channel[:, None] < CHANNELS) & (within[None, :] < FILTERS),
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    real = within < FILTERS
    if HAS_SCALE:
        acc *= tl.load(SCALE + f, mask=real, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        acc += tl.load(SHIFT + f, mask=real, other=0.0).to(tl.float32)[None, :]
    stored = (pixel[:, None] < pixels) & real[None, :]
    if HAS_RESIDUAL:
        there = image * stride_rn + y.to(tl.int64) * stride_rh + x.to(tl.int64) * stride_rw
        pointers = RESIDUAL + there[:, None] + f[None, :] * stride_rc
        acc += tl.load(pointers, mask=stored, other=0.0).to(tl.float32)
    there = image * stride_on + y.to(tl.int64) * stride_oh + x.to(tl.int64) * stride_ow
    result = activate(acc, negative_slope, ACTIVATION).to(OUT.dtype.element_ty)
    tl.store(OUT + there[:, None] + f[None, :] * stride_oc, result, mask=stored)
