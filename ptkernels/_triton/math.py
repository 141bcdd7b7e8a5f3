"""Device functions that more than one operator's kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_ACTIVATIONS = (
    "none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "relu6", "leaky_relu", "hardswish", "tanh", "elu", "mish",
)  # fmt: skip
ACTIVATIONS = {name: index for index, name in enumerate(_ACTIVATIONS)}
"""Numbers under which :func:`activate` knows its functions."""


@triton.jit
def widened(x):
    """In the dtype of sums: float64 stays what it is, everything narrower becomes float32."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def zeros(shape, pointer):
    """Sums of what is at a pointer, before the first, in their dtype."""
    return widened(tl.zeros(shape, pointer.dtype.element_ty))


@triton.jit
def number(x, pointer):
    """What ``ptkernels._triton.number`` made of a number beside the tensor at a pointer."""
    return tl.load(x) if pointer.dtype.element_ty == tl.float64 else x


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def tanh(x):
    """Within 2 ULP: the polynomials of Cephes near 0, where 1 - exp(-2|x|) would cancel."""
    square = x * x
    if x.dtype == tl.float64:
        above = (-9.64399179425052238628e-1 * square - 9.92877231001918586564e1) * square - 1.61468768441708447952e3
        below = (square + 1.12811678491632931402e2) * square + 2.23548839060100448583e3
        near = x + x * square * (above / (below * square + 4.84406305325125486048e3))
    else:
        poly = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
        near = x + x * square * (poly * square - 3.33332819422e-1)
    decay = exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    """Of x <= 0, by tanh, which is exact where exp(x) - 1 would cancel."""
    half = tanh(0.5 * x)
    return 2.0 * half / (1.0 - half)


@triton.jit
def tanh_of_softplus(x):
    """tanh(log(1 + exp(x))), whose exponentials are taken where they are finite."""
    e = exp(tl.minimum(x, 20.0, propagate_nan=tl.PropagateNan.ALL))
    return e * (e + 2.0) / (e * (e + 2.0) + 2.0)


@triton.jit
def round_e4m3(x):
    """The nearest number of e4m3, ties to even, to float32 numbers of magnitude up to 448."""
    exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)  # below 2^-6 numbers are 2^-9 apart
    # A number 1.5 * 2^20 times as large leaves its sum with x three bits behind the leading one of x.
    large = (exponent + (20 << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (x + large) - large


@triton.jit
def e4m3_codes(x):
    """Codes of float32 numbers of magnitude up to 448, in uint8; 127 for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = tl.abs(round_e4m3(x))
    normal = (rounded.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    code = tl.where(rounded < 0.015625, (rounded * 512.0).to(tl.int32), normal)
    return (tl.where(x == x, code, 127) | (bits >> 24 & 128)).to(tl.uint8)


@triton.jit
def e4m3_values(codes, NATIVE: tl.constexpr):
    """What codes in uint8 stand for, in float32; NATIVE: by the GPU's own conversion, which it has from sm_89 on."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        bits = codes.to(tl.int32)
        value = ((bits & 127) << 20 | (bits & 128) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
        return tl.where((bits & 127) == 127, float("nan"), value)


@triton.jit
def load_tile(pointers, rows, columns, n_rows, n_columns, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Load a tile, with 0 beyond its bounds; a bound that is known to hold is not checked."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, mask=(rows < n_rows) & (columns < n_columns), other=0.0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=rows < n_rows, other=0.0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, mask=columns < n_columns, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def activate(x, negative_slope, ACTIVATION: tl.constexpr):
    """The activation of that number in ``ACTIVATIONS``; ``negative_slope`` is leaky_relu's."""
    if ACTIVATION == 1:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == 3:
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == 4:
        x = x * sigmoid(x)
    elif ACTIVATION == 5:
        x = sigmoid(x)
    elif ACTIVATION == 6:
        x = tl.minimum(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 7:
        x = tl.where(x < 0.0, negative_slope * x, x)
    elif ACTIVATION == 8:
        gate = tl.minimum(tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL), 6.0)
        x = x * gate / 6.0
    elif ACTIVATION == 9:
        x = tanh(x)
    elif ACTIVATION == 10:
        x = tl.where(x > 0.0, x, expm1(tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)))
    elif ACTIVATION == 11:
        x = x * tanh_of_softplus(x)
    return x


@triton.jit
def activation_derivative(x, negative_slope, ACTIVATION: tl.constexpr):
    """Its derivative at x, without gelu_tanh; at a corner that of the side towards 0, as torch has it."""
    if ACTIVATION == 1:
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == 2:
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * exp(-0.5 * x * x)
    elif ACTIVATION == 4:
        s = sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == 5:
        s = sigmoid(x)
        return s * (1.0 - s)
    elif ACTIVATION == 6:
        return tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif ACTIVATION == 7:
        return tl.where(x > 0.0, 1.0, negative_slope)
    elif ACTIVATION == 8:
        return tl.where(x > -3.0, tl.where(x < 3.0, x / 3.0 + 0.5, 1.0), 0.0)
    elif ACTIVATION == 9:
        t = tanh(x)
        return 1.0 - t * t
    elif ACTIVATION == 10:
        return tl.where(x > 0.0, 1.0, exp(tl.minimum(x, 0.0)))
    elif ACTIVATION == 11:
        t = tanh_of_softplus(x)
        return t + x * sigmoid(x) * (1.0 - t * t)
    else:
        return tl.full(x.shape, 1.0, x.dtype)
