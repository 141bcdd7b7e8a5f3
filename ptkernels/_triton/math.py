"""Device functions that more than one operator's kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

_ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "relu6", "leaky_relu", "hardswish")
ACTIVATIONS = {name: index for index, name in enumerate(_ACTIVATIONS)}
"""Numbers under which :func:`activate` knows its functions."""


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def tanh(x):
    """Within 2 ULP in float32: the polynomial of Cephes near 0, where 1 - exp(-2|x|) would cancel."""
    square = x * x
    poly = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square + 1.33314422036e-1
    near = x + x * square * (poly * square - 3.33332819422e-1)
    decay = exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


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
    return x
