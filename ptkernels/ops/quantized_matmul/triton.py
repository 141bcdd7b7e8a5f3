"""Launching quantized linear layers' Triton kernels: what is summed how, and tile sizes.

The device code, with its equations, layout and tiling, is in ``triton_kernels``. :func:`linear` and
:func:`linear_backward` are ``ptkernels::quantized_linear`` and ``ptkernels::_quantized_linear_backward`` on a GPU, from
weights as they are stored. Where the input is quantized too, a kernel of its own reads it once and writes a half or a
quarter of it: the product then reads that as often as it has columns of tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels._triton.math import ACTIVATIONS
from ptkernels.ops.quantized_matmul import formats, reference
from ptkernels.ops.quantized_matmul import triton_kernels as kernels

CODES = {name: getattr(kernels, name.upper()).value for name in formats.CODE_FORMATS}

_books: dict[torch.device, Tensor] = {}


def _book(like: Tensor, code: str) -> Tensor:
    """The 16 numbers of nf4 on a device, made there once: a captured graph copies nothing from the host."""
    if code != "nf4":
        return like
    if type(like) is not Tensor:  # under tracing, where a tensor must not outlive the trace
        return torch.tensor(formats.NF4, device=like.device)
    if like.device not in _books:
        _books[like.device] = torch.tensor(formats.NF4, device=like.device)
    return _books[like.device]


class _Weight:
    """A stored weight as the kernels take it."""

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, code: str, group_size: int, in_features: int
    ) -> None:
        self.codes = codes.contiguous()
        self.in_features, self.out_features = in_features, codes.size(0)
        self.group = max(in_features, 1) if group_size == -1 else group_size
        self.scales = scales.contiguous() if in_features > 0 else scales.new_zeros(self.out_features, 1)
        self.zeros = None if zeros is None or in_features == 0 else zeros.contiguous()
        self.operands = (self.codes, self.scales, self.scales if self.zeros is None else self.zeros)
        self.book = _book(self.scales, code)
        self.constants = {"CODE": CODES[code], "HAS_ZEROS": self.zeros is not None}

    @property
    def numbers(self) -> tuple[int, int]:
        return self.group, self.scales.size(1)


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, rows: int, group: int, in_groups: bool) -> list[Tile]:
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
        # Integer sums that are scaled step by step are held twice.
        wide = 128 if dtype == torch.int8 and not in_groups else 64
        candidates = [Tile(128, wide, 64, 8, 3), Tile(64, 64, 64, 4, 3)]
    # A step of K that stays in one group needs one scale.
    return [tile._replace(k=max(min(tile.k, group & -group), 16 if dtype != torch.int8 else 32)) for tile in candidates]


def dx_tiles(dtype: torch.dtype) -> list[Tile]:
    """The same for the gradient of the input, best guess first."""
    if dtype == torch.float32:
        return [Tile(32, 32, 32, 4, 1)]
    return [Tile(64, 64, 64, 4, 3)]


def _scaling(weight: _Weight, tile: Tile) -> int:
    whole = weight.group >= weight.in_features
    scaling = kernels.SCALE_PER_CODE
    if whole and weight.zeros is None:
        scaling = kernels.SCALE_AT_END
    elif weight.group % tile.k == 0 or whole:
        scaling = kernels.SCALE_PER_STEP
    return int(scaling.value)


def quantize_rows(x: Tensor, step: Tensor | None = None, wrap: Launcher = identity) -> tuple[Tensor, Tensor]:
    """8-bit codes ``[M, K]`` and float32 scales ``[M]`` of the rows of ``[M, K]``; ``step`` is a scale for all."""
    rows, columns = x.shape
    codes = x.new_empty(rows, columns, dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    if rows > 0:
        wrap(kernels.quantize_rows)[(triton.cdiv(rows, 4),)](
            x, x if step is None else step, codes, scales, rows, columns, *x.stride(), GIVEN=step is not None,
            BLOCK_M=4, BLOCK_K=512, num_warps=4,
        )  # fmt: skip
    return codes, scales


def linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    code_format: str = "s8",
    group_size: int = -1,
    quantize_input: bool = False,
    input_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    counts: Tensor | None = None,
    *,
    wrap: Launcher = identity,
) -> Tensor:
    """``act(input @ W^T + bias + residual)`` of ``[M, K]``, of checked arguments.

    With ``counts``, which are on the host, every expert that has rows is a launch of its own.
    """
    if counts is not None:
        options: Any = (code_format, group_size, quantize_input, input_scale, activation, out_dtype)
        rows_of = counts.tolist()
        parts: Any = zip(*(reference.expert_parts(t, len(rows_of)) for t in (codes, scales, zeros, bias)), strict=True)
        residuals: Any = (None,) * len(rows_of) if residual is None else residual.split(rows_of)
        each = zip(input.split(rows_of), parts, residuals, strict=True)
        return torch.cat([linear(*(x, *part, rest, *options), wrap=wrap) for x, part, rest in each])
    if activation == "swiglu":
        # The gate and what it multiplies are columns of different programs.
        args = (codes, scales, zeros, bias, residual, code_format, group_size, quantize_input, input_scale)
        sums = linear(input, *args, "none", torch.float32, wrap=wrap)
        return reference.activate(sums, activation).to(out_dtype or input.dtype)
    rows, columns = input.shape
    weight = _Weight(codes, scales, zeros, code_format, group_size, columns)
    out = input.new_empty(rows, weight.out_features, dtype=out_dtype or input.dtype)
    if out.numel() == 0:
        return out
    precision = _triton.dot_precision(input.dtype)
    x, x_scales = quantize_rows(input, input_scale, wrap) if quantize_input else (input, input)
    candidates = tiles(x.dtype, rows, weight.group, weight.group < columns or zeros is not None)
    # The rows count only by the bucket that their candidates stand for.
    key = (code_format, x.dtype, group_size, weight.out_features, columns, candidates[0].m)
    tile = tuning.pick("linear", key, candidates, input.device)
    grid = (triton.cdiv(rows, tile.m) * triton.cdiv(weight.out_features, tile.n),)
    wrap(kernels.linear)[grid](
        x, x_scales, *weight.operands, weight.book, x if bias is None else bias.contiguous(),
        x if residual is None else residual, out, rows, weight.out_features, columns, *weight.numbers, *x.stride(),
        weight.codes.stride(0), *(residual.stride() if residual is not None else (0, 0)), out.stride(0),
        **weight.constants, SCALING=_scaling(weight, tile), INTEGER=quantize_input, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS[activation], PRECISION=precision,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def linear_backward(
    grad_out: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    counts: Tensor | None = None,
    *,
    wrap: Launcher = identity,
) -> Tensor:
    """``grad_out @ W`` of ``[M, N]``: the gradient of the input, with the weight dequantized tile by tile."""
    if counts is not None:
        rows_of = counts.tolist()
        parts: Any = zip(*(reference.expert_parts(t, len(rows_of)) for t in (codes, scales, zeros)), strict=True)
        each = zip(grad_out.split(rows_of), parts, strict=True)
        options: Any = (code_format, group_size, in_features)
        return torch.cat([linear_backward(grad, *part, *options, wrap=wrap) for grad, part in each])
    rows, features = grad_out.shape
    dx = grad_out.new_empty(rows, in_features)
    if dx.numel() == 0 or features == 0:
        return dx.zero_()
    weight = _Weight(codes, scales, zeros, code_format, group_size, in_features)
    key = (code_format, grad_out.dtype, features, in_features)
    tile = tuning.pick("linear_dx", key, dx_tiles(grad_out.dtype), grad_out.device)
    wrap(kernels.linear_dx)[(triton.cdiv(rows, tile.m) * triton.cdiv(in_features, tile.k),)](
        grad_out, *weight.operands, weight.book, dx, rows, features, in_features, *weight.numbers, *grad_out.stride(),
        weight.codes.stride(0), dx.stride(0), **weight.constants, PRECISION=_triton.dot_precision(grad_out.dtype),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx


def sees_through(*args: Any, **kwargs: Any) -> bool:
    """Whether a call can be traced: the rows of experts, which are on the host, decide what is launched."""
    return all(arg.is_cuda for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
