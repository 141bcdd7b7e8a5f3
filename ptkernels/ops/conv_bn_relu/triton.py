"""Launching the Triton kernels of convolution, batch normalisation, residual and activation.

The device code, with its equations, layouts and tiling, is in ``triton_kernels`` and ``triton_backward_kernels``.
:func:`conv_bn_relu` and :func:`conv_bn_relu_backward` are ``ptkernels::conv_bn_relu`` and
``ptkernels::_conv_bn_relu_backward`` on a GPU. Tiles depend on channels and dtype, not on the images. Nothing is read
on the host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels._triton.math import ACTIVATIONS
from ptkernels.ops.conv_bn_relu import triton_backward_kernels as backward_kernels
from ptkernels.ops.conv_bn_relu import triton_kernels as kernels
from ptkernels.ops.conv_bn_relu.variant import Variant

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Programs that fill a GPU of 132 multiprocessors twice: into so many shares the pixels of a weight gradient are cut.
_PROGRAMS = 264


class Tile(NamedTuple):
    """Rows, columns, depth of the sum, warps, stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, columns: int, depth: int) -> list[Tile]:
    """Tiles worth trying for a product over pixels, best guess first.

    ``columns`` are the result's channels in a group, ``depth`` those that are summed over; no size of the images
    matters.
    """
    n = min(_triton.power_of_2(columns), 128)
    k = min(_triton.power_of_2(depth), 64)
    if dtype in (torch.float32, torch.float64):
        return [Tile(32, min(n, 32), min(k, 32), 4, 1)]
    return [Tile(128, n, k, 8, 3), Tile(64, n, k, 4, 4)]


def weight_tiles(dtype: torch.dtype, filters: int, columns: int) -> list[Tile]:
    """The same for the weight gradient, whose rows are filters and whose sum runs over pixels."""
    m, n = min(_triton.power_of_2(filters), 128), min(_triton.power_of_2(columns), 64)
    if dtype in (torch.float32, torch.float64):
        return [Tile(min(m, 32), min(n, 32), 32, 4 if dtype == torch.float32 else 8, 1)]
    return [Tile(max(m, 64), n, 64, 4, 3)] if m >= 64 else [Tile(m, n, 64, 4, 3)]


def depthwise_tiles(columns: int) -> list[Tile]:
    """Tiles of a depthwise convolution, which sums its taps without a matrix product."""
    n = min(_triton.power_of_2(columns), 64)
    return [Tile(max(2048 // n, 32), n, 16, 4, 2)]


def _pointwise_tile(dtype: torch.dtype, channels: int) -> tuple[int, int]:
    """Pixels and channels of a program that only reads and writes."""
    block_c = min(_triton.power_of_2(channels), 128)
    return max((1024 if dtype == torch.float64 else 4096) // block_c, 8), block_c


def _five(tensor: Tensor) -> Tensor:
    """``[N, C, *space]`` as ``[N, C, D, H, W]``."""
    for _ in range(5 - tensor.dim()):
        tensor = tensor.unsqueeze(2)
    return tensor


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tuple(_five(tensor).stride())


def _is_channels_last(tensor: Tensor) -> bool:
    """As shape propagation decides the layout of results."""
    from ptkernels.ops.conv_bn_relu.register import _is_channels_last

    return _is_channels_last(tensor)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    from ptkernels.ops.conv_bn_relu.register import _empty

    return _empty(like, tuple(shape), channels_last)


class _Conv:
    """A call's geometry, with what is absent filled in."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        pre_activation: str,
        slope: float,
    ) -> None:
        self.input, self.weight, self.groups = input, weight, groups
        self.wide, self.slope = _triton.sum_dtype(input.dtype), slope
        missing = 3 - len(stride)
        self.stride = (*(1,) * missing, *stride)
        self.padding = (*(0,) * missing, *padding)
        self.dilation = (*(1,) * missing, *dilation)
        x, w = _five(input), _five(weight)
        self.in_size, self.taps = tuple(x.shape[2:]), tuple(w.shape[2:])
        self.out_size = tuple(
            (size + 2 * pad - dilate * (taps - 1) - 1) // step + 1
            for size, pad, dilate, taps, step in zip(
                self.in_size, self.padding, self.dilation, self.taps, self.stride, strict=True
            )
        )
        self.filters = weight.size(0)
        self.per_group, self.channels = self.filters // groups, weight.size(1)
        self.shape = (input.size(0), self.filters, *self.out_size[missing:])
        self.pixels = input.size(0) * math.prod(self.out_size)
        # Filters of each channel of a depthwise convolution; 0 where groups have products.
        self.multiplier = self.per_group if self.channels == 1 and groups > 1 else 0
        # Channels that fill less than a block of a product are taken together with the taps.
        self.flat = self.channels < 16 and math.prod(self.taps) > 1 and self.multiplier == 0
        self.window = (*self.stride, *self.padding, *self.dilation)
        self.constants = {
            "CHANNELS": self.channels,
            "FILTERS": self.per_group,
            "TAPS_D": self.taps[0],
            "TAPS_H": self.taps[1],
            "TAPS_W": self.taps[2],
            "PRE": ACTIVATIONS[pre_activation],
            "PRECISION": _triton.dot_precision(input.dtype),
        }

    def forward_plan(self) -> tuple[Tile, int, dict[str, Any]]:
        """Tile and groups of the forward's launches, and what depends on them."""
        if self.multiplier:
            switches = {"FILTERS": self.filters, "FLAT": False, "MULTIPLIER": self.multiplier}
            return self.pick("depthwise", depthwise_tiles(self.filters), self.filters), 1, switches
        depth = self.channels * math.prod(self.taps) if self.flat else self.channels
        switches = {"FLAT": self.flat, "MULTIPLIER": 0}
        found = tiles(self.input.dtype, self.per_group, depth)
        return self.pick("forward", found, self.per_group, depth), self.groups, switches

    def pick(self, kernel: str, candidates: Sequence[Tile], *key: int) -> Tile:
        """The tile of a kernel for channels ``key``; no size of the images decides."""
        taps = math.prod(self.taps)
        return tuning.pick(f"conv_{kernel}", (self.input.dtype, *key, taps), candidates, self.input.device)

    def empty_z(self) -> Tensor:
        """In channels last, whatever the input is in; a line's strides are those of one."""
        return _empty(self.input, self.shape, True)


class _Norm(NamedTuple):
    """The vectors of the normalisation; None where one is absent."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float

    def pointers(self, dummy: Tensor) -> tuple[Tensor, ...]:
        return tuple(dummy if tensor is None else tensor.contiguous() for tensor in self[:4])

    def switches(self) -> dict[str, bool]:
        return {"HAS_WEIGHT": self.weight is not None, "HAS_SHIFT": self.bias is not None}


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _numbers(eps: float, slope: float, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    return _triton.number(eps, like), _triton.number(slope, like)


def _convolve(
    a: _Conv,
    bias: Tensor | None,
    norm: _Norm,
    residual: Tensor | None,
    activation: str,
    wrap: Launcher,
    *,
    out: Tensor | None = None,
    z: Tensor | None = None,
    statistics: bool = False,
) -> Tensor | None:
    """Write z, the finished result, or both; returns statistics of tiles, ``[tiles, 3, filters]``, where asked for."""
    tile, groups, plan = a.forward_plan()
    tiles_m = triton.cdiv(a.pixels, tile.m)
    partial = a.input.new_empty(tiles_m, 3, a.filters, dtype=a.wide) if statistics else None
    some = a.input
    written = out if out is not None else some
    wrap(kernels.conv)[(tiles_m * triton.cdiv(a.filters // groups, tile.n), groups)](
        some, a.weight, some if bias is None else bias.contiguous(), *norm.pointers(some),
        some if residual is None else residual, written, some if z is None else z,
        some if partial is None else partial, a.pixels, a.filters, *a.in_size, *a.out_size, *_strides(some),
        *_strides(a.weight), *_strides(written if residual is None else residual), *_strides(written), *a.window,
        *_numbers(norm.eps, a.slope, some), **{**a.constants, **plan}, HAS_BIAS=bias is not None,
        HAS_NORM=norm.mean is not None, **norm.switches(), HAS_RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS[activation], WRITE_OUT=out is not None, WRITE_Z=z is not None, STATISTICS=statistics,
        **_options(tile),
    )  # fmt: skip
    return partial


def _merge_statistics(a: _Conv, partial: Tensor, wrap: Launcher) -> tuple[Tensor, Tensor]:
    mean, var = (partial.new_empty(a.filters) for _ in range(2))
    rows = a.forward_plan()[0].m
    wrap(kernels.merge_statistics)[(triton.cdiv(a.filters, 32),)](
        partial, mean, var, partial.size(0), a.pixels, a.filters, ROWS=rows, BLOCK_T=32, BLOCK_C=32, num_warps=4
    )
    return mean, var


def _refuse(variant: Variant) -> None:
    from ptkernels.ops.conv_bn_relu.routing import uncovered_by_triton

    if reason := uncovered_by_triton(variant):
        raise RuntimeError(f"{variant.op}: no kernel for this call: {reason}")


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "relu",
    negative_slope: float = 0.01,
    save_conv: bool = False,
    *variant: Any,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``out``, z where it is saved, and the statistics of the batch where training, of checked arguments."""
    of_variant = Variant(*variant)
    _refuse(of_variant)
    a = _Conv(input, weight, stride, padding, dilation, groups, of_variant.pre_activation, negative_slope)
    out = _empty(input, a.shape, _is_channels_last(input))
    nothing = input.new_empty(0, dtype=a.wide)
    z = a.empty_z() if save_conv or training else None
    norm = _Norm(bn_weight, bn_bias, running_mean, running_var, eps)
    mean, var = nothing, nothing.clone()
    if training:
        mean, var = (input.new_zeros(a.filters, dtype=a.wide) for _ in range(2))
    if out.numel() > 0:
        if training:
            unnormalised = norm._replace(mean=None, var=None)
            partial = _convolve(a, bias, unnormalised, None, "none", wrap, z=z, statistics=True)
            assert partial is not None
            assert z is not None
            mean, var = _merge_statistics(a, partial, wrap)
            _normalize(a, z, norm._replace(mean=mean, var=var), residual, activation, negative_slope, out, wrap)
        else:
            _convolve(a, bias, norm, residual, activation, wrap, out=out, z=z)
    saved = z if save_conv and z is not None else nothing
    return out, saved, mean, var


def _normalize(
    a: _Conv,
    z: Tensor,
    norm: _Norm,
    residual: Tensor | None,
    activation: str,
    slope: float,
    out: Tensor,
    wrap: Launcher,
) -> None:
    block_m, block_c = _pointwise_tile(z.dtype, a.filters)
    wrap(kernels.normalize)[(triton.cdiv(a.pixels, block_m), triton.cdiv(a.filters, block_c))](
        z, *norm.pointers(z), z if residual is None else residual, out, a.pixels, a.filters, *a.out_size,
        *_strides(out if residual is None else residual), *_strides(out), *_numbers(norm.eps, slope, z),
        **norm.switches(), HAS_RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS[activation], BLOCK_M=block_m,
        BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip


def conv_bn_relu_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    conv: Tensor | None,
    training: bool,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "relu",
    negative_slope: float = 0.01,
    output_mask: Sequence[bool] = (True,) * 6,
    *variant: Any,
    wrap: Launcher = identity,
) -> Gradients:
    """Gradients of input, weight, bias, bn_weight, bn_bias and residual, None where not asked for."""
    of_variant = Variant(*variant)
    _refuse(of_variant)
    a = _Conv(input, weight, stride, padding, dilation, groups, of_variant.pre_activation, negative_slope)
    want_x, want_w, want_bias, want_scale, want_shift, want_residual = output_mask
    channels_last = _is_channels_last(input)
    if a.pixels == 0 or a.filters == 0:
        wanted = zip((input, weight, bias, bn_weight, bn_bias, residual), output_mask, strict=True)
        found = [torch.zeros_like(t) if t is not None and needed else None for t, needed in wanted]
        return found[0], found[1], found[2], found[3], found[4], found[5]
    norm = _Norm(bn_weight, bn_bias, mean, var, eps)
    z = conv
    if z is None:
        z = a.empty_z()
        _convolve(a, bias, norm._replace(mean=None, var=None), None, "none", wrap, z=z)
    needs_sums = training or want_scale or want_shift or want_bias
    pointwise = _Pointwise(a, grad_out, z, norm, residual, activation, negative_slope, wrap)
    sums = pointwise.sums() if needs_sums else None
    dz = a.empty_z() if want_x or want_w else None
    dr = _empty(input, a.shape, channels_last) if want_residual else None
    if dz is not None or dr is not None:
        pointwise.gradients(sums if training else None, dz, dr)
    dx = _input_gradient(a, dz, _empty(input, input.shape, channels_last), wrap) if want_x and dz is not None else None
    dw = _weight_gradient(a, dz, wrap) if want_w and dz is not None else None
    dbias = dscale = dshift = None
    if want_bias and bias is not None:
        # Statistics of the batch remove a bias; elsewhere dz is du by a factor of the channel.
        dbias = torch.zeros_like(bias) if training or sums is None else (sums[0] * _factor(norm, sums)).to(bias.dtype)
    if want_scale and bn_weight is not None and sums is not None:
        dscale = sums[1].to(bn_weight.dtype)
    if want_shift and bn_bias is not None and sums is not None:
        dshift = sums[0].to(bn_bias.dtype)
    return dx, dw, dbias, dscale, dshift, dr


def _factor(norm: _Norm, like: Tensor) -> Tensor:
    """Of du in dz with given statistics."""
    factor = like.new_ones(like.size(1)) if norm.var is None else (norm.var.to(like.dtype) + norm.eps).rsqrt()
    return factor if norm.weight is None else factor * norm.weight.to(like.dtype)


class _Pointwise:
    """The two passes over grad_out and z."""

    def __init__(
        self,
        a: _Conv,
        grad_out: Tensor,
        z: Tensor,
        norm: _Norm,
        residual: Tensor | None,
        activation: str,
        slope: float,
        wrap: Launcher,
    ) -> None:
        self.a, self.wrap, self.z = a, wrap, z
        self.block_m, self.block_c = _pointwise_tile(z.dtype, a.filters)
        self.blocks_c = triton.cdiv(a.filters, self.block_c)
        self.operands = (grad_out, z, *norm.pointers(z), z if residual is None else residual)
        others = _strides(grad_out if residual is None else residual)
        self.geometry = (a.pixels, a.filters, *a.out_size, *_strides(grad_out), *others)
        self.numbers = _numbers(norm.eps, slope, z)
        self.switches = {
            "HAS_NORM": norm.mean is not None,
            **norm.switches(),
            "HAS_RESIDUAL": residual is not None,
            "ACTIVATION": ACTIVATIONS[activation],
            "BLOCK_C": self.block_c,
            "num_warps": 8,
        }

    def sums(self) -> Tensor:
        """Of du, and of du * xhat: ``[2, filters]``."""
        repeats, block_m = 8, max(self.block_m // 2, 16)
        shares = triton.cdiv(self.a.pixels, repeats * block_m)
        partial = self.z.new_empty(shares, 2, self.a.filters, dtype=self.a.wide)
        self.wrap(backward_kernels.backward_sums)[(shares, self.blocks_c)](
            *self.operands, partial, *self.geometry, *self.numbers, **self.switches, BLOCK_M=block_m, REPEATS=repeats
        )
        return partial.sum(0)

    def gradients(self, sums: Tensor | None, dz: Tensor | None, dr: Tensor | None) -> None:
        """dz, its batch's share taken off where there are sums, and the residual's gradient."""
        some = self.z
        self.wrap(backward_kernels.backward_normalize)[(triton.cdiv(self.a.pixels, self.block_m), self.blocks_c)](
            *self.operands, some if sums is None else sums, some if dz is None else dz, some if dr is None else dr,
            *self.geometry, *_strides(some if dr is None else dr), *self.numbers, **self.switches,
            OF_BATCH=sums is not None, WRITE_DZ=dz is not None, WRITE_DR=dr is not None, BLOCK_M=self.block_m,
        )  # fmt: skip


def _input_gradient(a: _Conv, dz: Tensor, dx: Tensor, wrap: Launcher) -> Tensor:
    if dx.numel() == 0:
        return dx
    # With a dilation every class meets taps of every remainder: they are tried one by one.
    steps = [s if d == 1 else 1 for s, d in zip(a.stride, a.dilation, strict=True)]
    pixels = a.input.size(0) * math.prod(triton.cdiv(size, step) for size, step in zip(a.in_size, steps, strict=True))
    channels, groups, constants = a.channels, a.groups, {**a.constants, "MULTIPLIER": a.multiplier}
    if a.multiplier:
        channels, groups = a.groups, 1
        constants["CHANNELS"] = channels
        tile = a.pick("depthwise_input", depthwise_tiles(channels), channels)
    else:
        tile = a.pick("input", tiles(a.input.dtype, channels, a.per_group), channels, a.per_group)
    grid = (triton.cdiv(pixels, tile.m) * triton.cdiv(channels, tile.n), groups, math.prod(steps))
    wrap(backward_kernels.input_gradient)[grid](
        dz, a.weight, a.input, dx, pixels, a.input.size(0), a.filters, *a.in_size, *a.out_size, *_strides(a.weight),
        *_strides(a.input), *_strides(dx), *a.window, _triton.number(a.slope, dz), **constants,
        STEP_D=steps[0], STEP_H=steps[1], STEP_W=steps[2], **_options(tile),
    )  # fmt: skip
    return dx


def _shares(pixels: int, programs: int, block: int) -> tuple[int, int]:
    """Into how many shares pixels are cut so that the GPU is full, and how many pixels, whole blocks, are in one."""
    wanted = max(1, min(_PROGRAMS // programs, triton.cdiv(pixels, 4 * block), 128))
    share = triton.cdiv(triton.cdiv(pixels, wanted), block) * block
    return triton.cdiv(pixels, share), share


def _depthwise_weight_gradient(a: _Conv, dz: Tensor, wrap: Launcher) -> Tensor:
    tile, taps = a.pick("depthwise_weight", depthwise_tiles(a.filters), a.filters), math.prod(a.taps)
    blocks = triton.cdiv(a.filters, tile.n)
    shares, share = _shares(a.pixels, blocks * taps, tile.m)
    partial = dz.new_empty(shares, a.filters, taps, dtype=a.wide)
    constants = {name: a.constants[name] for name in ("TAPS_D", "TAPS_H", "TAPS_W", "PRE")}
    wrap(backward_kernels.depthwise_weight_gradient)[(blocks, taps, shares)](
        dz, a.input, partial, a.pixels, share, a.filters, *a.in_size, *a.out_size, *_strides(a.input), *a.window,
        _triton.number(a.slope, dz), **constants, MULTIPLIER=a.multiplier, BLOCK_M=tile.m, BLOCK_C=tile.n,
        num_warps=tile.warps,
    )  # fmt: skip
    return partial.sum(0).to(a.weight.dtype).view(a.weight.shape)


def _weight_gradient(a: _Conv, dz: Tensor, wrap: Launcher) -> Tensor:
    taps = math.prod(a.taps)
    if a.weight.numel() == 0:
        return a.weight.new_zeros(a.weight.shape)
    if a.multiplier:
        return _depthwise_weight_gradient(a, dz, wrap)
    columns = a.channels * taps if a.flat else a.channels
    tile = a.pick("weight", weight_tiles(a.input.dtype, a.per_group, columns), a.per_group, columns)
    programs = triton.cdiv(a.per_group, tile.m) * triton.cdiv(columns, tile.n) * (1 if a.flat else taps)
    shares, share = _shares(a.pixels, programs * a.groups, tile.k)
    partial = dz.new_empty(shares, a.filters, taps * a.channels, dtype=a.wide)
    wrap(backward_kernels.weight_gradient)[(programs, a.groups, shares)](
        dz, a.input, partial, a.pixels, share, a.filters, *a.in_size, *a.out_size, *_strides(a.input), *a.window,
        _triton.number(a.slope, dz), **a.constants, FLAT=a.flat, **_options(tile),
    )  # fmt: skip
    total = partial.sum(0) if shares > 1 else partial[0]
    grad = total.view(a.filters, taps, a.channels).transpose(1, 2).to(a.weight.dtype)
    return grad.contiguous().view(a.weight.shape)
