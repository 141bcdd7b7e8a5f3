"""Launching quantized linear layers' Triton kernels: what is summed how, and tile sizes.

The device code, with its equation, layout and tiling, is in ``triton_kernels``. Weights come as they are stored: int8
codes ``[N, K]``, or 4-bit codes packed two in a byte, low one first, ``[N, ceil(K / 2)]``; scales and zeros float32
``[N, groups]`` (or ``[N]`` for one scale a row). Where the input is quantized too, a kernel of its own reads it once
and writes a half or a quarter of it: the product then reads that as often as it has columns of tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton.math import ACTIVATIONS
from ptkernels.ops.quantized_matmul import triton_kernels as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {"s8": kernels.S8.value, "u4": kernels.U4.value, "book4": kernels.BOOK4.value, "book8": kernels.BOOK8.value}
Launcher = Callable[[Any], Any]


class Weight(NamedTuple):
    """A quantized ``[N, K]``."""

    codes: Tensor
    scales: Tensor
    in_features: int
    code: str = "s8"
    """``s8``, ``u4``, or ``book4`` and ``book8``: codes that index ``book``."""
    group_size: int = -1
    zeros: Tensor | None = None
    book: Tensor | None = None
    """The 16 or 256 float32 values of the codes: those of nf4, e2m1 or e4m3."""

    @property
    def group(self) -> int:
        return max(self.in_features, 1) if self.group_size == -1 else self.group_size


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, rows: int, group: int) -> list[Tile]:
    """The tile sizes worth trying for a number of rows, best guess first.

    They depend on whether rows are few, where a product only streams the weight, and on no other size, so that a new
    number of tokens compiles nothing.
    """
    if dtype == torch.float32:
        candidates = [Tile(32, 32, 32, 4, 1)] if rows > 16 else [Tile(16, 32, 32, 4, 1)]
    elif rows <= 16:
        candidates = [Tile(16, 32, 128, 4, 4), Tile(16, 64, 64, 4, 4)]
    elif rows <= 64:
        candidates = [Tile(64, 64, 64, 4, 4), Tile(64, 32, 128, 4, 3)]
    else:
        candidates = [Tile(128, 128 if dtype == torch.int8 else 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)]
    # A step of K that stays in one group needs one scale.
    return [tile._replace(k=max(min(tile.k, group & -group), 16 if dtype != torch.int8 else 32)) for tile in candidates]


def _scaling(weight: Weight, tile: Tile) -> int:
    scaling = kernels.SCALE_PER_CODE
    if weight.group >= weight.in_features and weight.zeros is None:
        scaling = kernels.SCALE_AT_END
    elif weight.group % tile.k == 0 or weight.group >= weight.in_features:
        scaling = kernels.SCALE_PER_STEP
    return int(scaling.value)


def _identity(kernel: Any) -> Any:
    return kernel


def quantize_rows(x: Tensor, wrap: Launcher = _identity) -> tuple[Tensor, Tensor]:
    """8-bit codes ``[M, K]`` and float32 scales ``[M]`` of the rows of ``[M, K]``."""
    rows, columns = x.shape
    codes = x.new_empty(rows, columns, dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    if rows > 0:
        wrap(kernels.quantize_rows)[(triton.cdiv(rows, 4),)](
            x, codes, scales, rows, columns, *x.stride(), BLOCK_M=4, BLOCK_K=512, num_warps=4
        )
    return codes, scales


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    quantize_input: bool = False,
    out_dtype: torch.dtype | None = None,
    wrap: Launcher = _identity,
) -> Tensor:
    """``act(x @ W^T + bias + residual)`` of ``[M, K]``, in ``out_dtype`` or that of ``x``.

    Raises:
        ValueError: the input is to be quantized and the weight has zeros, or codes that are no integers.
    """
    if quantize_input and (weight.zeros is not None or weight.code not in ("s8", "u4")):
        raise ValueError(
            f"quantized_matmul: weight: got {weight.code} with zeros={weight.zeros is not None}, expected symmetric "
            "integer codes for a quantized input"
        )
    rows, columns = x.shape
    features = weight.codes.size(0)
    out = x.new_empty(rows, features, dtype=out_dtype or x.dtype)
    if out.numel() == 0:
        return out
    precision = _triton.dot_precision(x.dtype)
    x_scales = x
    if quantize_input:
        x, x_scales = quantize_rows(x, wrap)
    tile = tiles(x.dtype, rows, weight.group)[0]
    scales = weight.scales.view(features, -1)
    wrap(kernels.linear)[(triton.cdiv(rows, tile.m) * triton.cdiv(features, tile.n),)](
        x, x_scales, weight.codes, scales, _or(weight.zeros, x), _or(weight.book, x), _or(bias, x), _or(residual, x),
        out, rows, features, columns, weight.group, scales.size(1), *x.stride(), weight.codes.stride(0),
        *(residual.stride() if residual is not None else (0, 0)), out.stride(0),
        CODE=CODES[weight.code], SCALING=_scaling(weight, tile), HAS_ZEROS=weight.zeros is not None,
        INTEGER=quantize_input, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS[activation or "none"], PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def linear_dx(grad: Tensor, weight: Weight, wrap: Launcher = _identity) -> Tensor:
    """``grad @ W`` of ``[M, N]``: the gradient of the input, with the weight dequantized tile by tile."""
    rows, features = grad.shape
    dx = grad.new_empty(rows, weight.in_features)
    if dx.numel() == 0:
        return dx
    if features == 0:
        return dx.zero_()
    wide = Tile(32, 32, 32, 4, 1) if grad.dtype == torch.float32 else Tile(64, 64, 64, 4, 3)
    scales = weight.scales.view(features, -1)
    wrap(kernels.linear_dx)[(triton.cdiv(rows, wide.m) * triton.cdiv(weight.in_features, wide.k),)](
        grad, weight.codes, scales, _or(weight.zeros, grad), _or(weight.book, grad), dx,
        rows, features, weight.in_features, weight.group, scales.size(1), *grad.stride(), weight.codes.stride(0),
        dx.stride(0), CODE=CODES[weight.code], HAS_ZEROS=weight.zeros is not None,
        PRECISION=_triton.dot_precision(grad.dtype),
        BLOCK_M=wide.m, BLOCK_N=wide.n, BLOCK_K=wide.k, num_warps=wide.warps, num_stages=wide.stages,
    )  # fmt: skip
    return dx


def _or(tensor: Tensor | None, dummy: Tensor) -> Tensor:
    return dummy if tensor is None else tensor
