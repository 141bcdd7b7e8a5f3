"""Launching quantized linear layers' Triton kernels: what is summed how, and tile sizes.

The device code, with its equations, layout and tiling, is in ``triton_kernels``. :func:`linear` and
:func:`linear_backward` are ``ptkernels::quantized_linear`` and ``ptkernels::_quantized_linear_backward`` on a GPU, from
weights as they are stored. Where the input is quantized too, a kernel of its own reads it once and writes a half or a
quarter of it: the product then reads that as often as it has columns of tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity, to_device
from ptkernels._triton.math import ACTIVATIONS
from ptkernels.ops.quantized_matmul import formats, reference
from ptkernels.ops.quantized_matmul import triton_kernels as kernels
from ptkernels.ops.quantized_matmul.weight import OP

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
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        code: str,
        group_size: int,
        in_features: int,
        experts: _Experts,
    ) -> None:
        self.codes = codes.contiguous()
        self.in_features, self.out_features = in_features, codes.size(0) // max(experts.number, 1)
        self.group = max(in_features, 1) if group_size == -1 else group_size
        self.scales = scales.contiguous() if in_features > 0 else scales.new_zeros(codes.size(0), 1)
        self.zeros = None if zeros is None or in_features == 0 else zeros.contiguous()
        self.operands = (self.codes, self.scales, self.scales if self.zeros is None else self.zeros)
        self.book = _book(self.scales, code)
        self.constants = {"CODE": CODES[code], "HAS_ZEROS": self.zeros is not None}

    @property
    def numbers(self) -> tuple[int, int]:
        return self.group, self.scales.size(1)


class _Experts:
    """How many rows go to each of the weights stacked in one, on the device; a single weight gets all of them."""

    def __init__(self, counts: Tensor | None, rows: int, dummy: Tensor) -> None:
        self.number = 0 if counts is None else counts.size(0)
        self.counts = dummy
        if counts is not None:
            _check_counts(counts, rows)
            self.counts = to_device(counts, dummy.device)
        # Rows of an expert, as far as their number may decide about a tile.
        self.rows = rows // max(self.number, 1)
        self.constants = {"EXPERTS": self.number, "BLOCK_E": _triton.power_of_2(self.number, 1)}

    def tiles(self, rows: int, size: int) -> int:
        """Tiles of rows: no expert leaves more than one that is not full."""
        return int(triton.cdiv(rows, size)) + self.number


def _check_counts(counts: Tensor, rows: int) -> None:
    """They are on the host, so looking at them waits for nothing; a traced call has none to look at."""
    if type(counts) is not Tensor or counts.device.type == "meta":
        return
    if (least := int(counts.min())) < 0:
        raise ValueError(f"{OP}: counts: got {least}, expected at least 0")
    if (total := int(counts.sum())) != rows:
        raise ValueError(f"{OP}: counts: got a sum of {total}, expected {rows} like the rows of input")


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
    if dtype in (torch.float32, torch.float64):
        warps = 4 if dtype == torch.float32 else 8
        candidates = [Tile(32, 32, 32, warps, 1)] if rows > 16 else [Tile(16, 32, 32, 4, 1)]
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
    if dtype in (torch.float32, torch.float64):
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
    """``act(input @ W^T + bias + residual)`` of ``[M, K]``, of checked arguments; ``counts`` are on the host."""
    if activation == "swiglu":
        # The gate and what it multiplies are columns of different programs.
        args = (codes, scales, zeros, bias, residual, code_format, group_size, quantize_input, input_scale)
        sums = linear(input, *args, "none", _triton.sum_dtype(input.dtype), counts, wrap=wrap)
        return reference.activate(sums, activation).to(out_dtype or input.dtype)
    rows, columns = input.shape
    experts = _Experts(counts, rows, input)
    weight = _Weight(codes, scales, zeros, code_format, group_size, columns, experts)
    out = input.new_empty(rows, weight.out_features, dtype=out_dtype or input.dtype)
    if out.numel() == 0:
        return out
    precision = _triton.dot_precision(input.dtype)
    x, x_scales = quantize_rows(input, input_scale, wrap) if quantize_input else (input, input)
    candidates = tiles(x.dtype, experts.rows, weight.group, weight.group < columns or zeros is not None)
    # The rows count only by the bucket that their candidates stand for.
    key = (code_format, x.dtype, group_size, weight.out_features, columns, candidates[0].m)
    tile = tuning.pick("linear", key, candidates, input.device)
    grid = (experts.tiles(rows, tile.m) * triton.cdiv(weight.out_features, tile.n),)
    wrap(kernels.linear)[grid](
        x, x_scales, *weight.operands, weight.book, x if bias is None else bias.contiguous(),
        x if residual is None else residual, out, experts.counts, rows, weight.out_features, columns, *weight.numbers,
        *x.stride(), weight.codes.stride(0), *(residual.stride() if residual is not None else (0, 0)), out.stride(0),
        **weight.constants, **experts.constants, SCALING=_scaling(weight, tile), INTEGER=quantize_input,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS[activation],
        PRECISION=precision, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=8,
        num_warps=tile.warps, num_stages=tile.stages,
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
    rows, features = grad_out.shape
    dx = grad_out.new_empty(rows, in_features)
    if dx.numel() == 0 or features == 0:
        return dx.zero_()
    experts = _Experts(counts, rows, grad_out)
    weight = _Weight(codes, scales, zeros, code_format, group_size, in_features, experts)
    key = (code_format, grad_out.dtype, features, in_features)
    tile = tuning.pick("linear_dx", key, dx_tiles(grad_out.dtype), grad_out.device)
    wrap(kernels.linear_dx)[(experts.tiles(rows, tile.m) * triton.cdiv(in_features, tile.k),)](
        grad_out, *weight.operands, weight.book, dx, experts.counts, rows, features, in_features, *weight.numbers,
        *grad_out.stride(), weight.codes.stride(0), dx.stride(0), **weight.constants, **experts.constants,
        PRECISION=_triton.dot_precision(grad_out.dtype),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dx
